"""Which recipe makes the better retriever: sentence-transformers' documented ones, or simlm's four stages?

python benchmarks/recipe_quality.py [squad|medquad|scifact ...] [--steps 30] [--queries 32] [--group-size 3] [--work FOLDER]
    [--parts ours,negatives,mnrl ...] [--first-negatives start|bm25] [--num-negatives 0] [--temperature 0.05]
    [--distilled-start start|retriever2] [--if-worse mix|skip|go_on] [--interpolate] [--start CHECKPOINT]

Everyone starts from the same checkpoint (packaged MiniLM, or --start), trains on the same queries with as many queries and passages a
step for as many steps, cut to the same lengths, and is measured on the same test queries over the same
passages ($SIMLM_DATA or ../shared/data):

ours           `simlm run`: retriever 1 (negatives of the start, or of BM25), retriever 2 (mined with it), re-ranker, distilled retriever
negatives      hard negatives of sentence_transformers.util.mine_hard_negatives (relative margin 0.05, the top ones), and then
mnrl           MultipleNegativesRankingLoss as documented: scale 20, learning rate 2e-5, warm-up 0.1
mnrl_our_rate  the same with the learning rate of simlm's retrievers
teacher        CrossEncoder trained by CrossEncoderTrainer with BinaryCrossEntropyLoss on the same mined negatives, its scores, and then
distilled_theirs  DistillKLDivLoss (documented defaults) from the starting model
teacher_our_rate, distilled_our_rates  the same with the learning rates of simlm's re-ranker and distilled retriever

Their cross-encoder sees as many pairs as simlm's re-ranker, and both score as many queries: those that training gets to. Each part runs
once, in a process of its own; what it needs runs before it, and what is done stays done until an option that it depends on changes. Parts
that do not need each other (`ours` and `mnrl`) may be run at the same time, from two shells.
Prints a table for each data set of the parts that are done, with paired randomization tests (10,000 sign flips, two-sided), and, last, one
line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGED = "packaged:all-MiniLM-L6-v2"
MEASURES = ["RR@10", "nDCG@10", "R@50"]
DOCUMENTED_RATE = 2e-5
STAGES = {"start": "Starting model", "retriever1": "Retriever 1", "retriever2": "Retriever 2", "distilled": "Distilled retriever"}
PEERS = {
    "mnrl": "sentence-transformers: MNRL, mined negatives",
    "mnrl_our_rate": "the same, our learning rate",
    "distilled_theirs": "sentence-transformers: distillation",
    "distilled_our_rates": "the same, our learning rates",
}
NEEDS = {
    "store": [],
    "ours": ["store"],
    "negatives": ["store"],
    "mnrl": ["negatives"],
    "mnrl_our_rate": ["negatives"],
    "teacher": ["negatives"],
    "distilled_theirs": ["teacher"],
    "teacher_our_rate": ["negatives"],
    "distilled_our_rates": ["teacher_our_rate"],
}
TEACHERS = {"distilled_theirs": "teacher", "distilled_our_rates": "teacher_our_rate"}


@dataclass(frozen=True)
class Size:
    """What is equal for all, and then what is of ours."""

    dataset: str
    steps: int
    peer_steps: int
    queries: int
    group_size: int
    passage_tokens: int
    query_tokens: int
    train_queries: int
    test_queries: int
    passages: int
    reranker_steps: int
    reranker_queries: int
    reranker_group: int
    learning_rate: float
    reranker_rate: float
    teacher_queries: int
    seed: int
    teacher_depth: int
    distilled_start: str
    if_worse: str
    interpolate: bool
    check_queries: int
    first_negatives: str
    num_negatives: int
    temperature: float
    start: str


OF_DATA = ("start", "dataset", "passage_tokens", "query_tokens", "train_queries", "test_queries", "passages", "seed")
OF_TEACHER = ("reranker_steps", "reranker_queries", "reranker_group", "teacher_queries")
DEPENDS: dict[str, tuple[str, ...]] = {
    "store": (),
    "ours": tuple(name for name in Size.__annotations__ if name not in (*OF_DATA, "peer_steps")),
    "negatives": ("group_size", "reranker_group"),
    "mnrl": ("peer_steps", "queries"),
    "mnrl_our_rate": ("peer_steps", "queries", "learning_rate"),
    "teacher": OF_TEACHER,
    "distilled_theirs": ("peer_steps", "queries"),
    "teacher_our_rate": (*OF_TEACHER, "reranker_rate"),
    "distilled_our_rates": ("peer_steps", "queries", "learning_rate"),
}
"""Options that a part depends on beside those of what it needs and of the data."""


def main() -> None:
    options = parse_options()
    if options.part:
        part, size, folder = options.part, Size(**json.loads(options.size)), Path(options.work)
        work: Any = {"store": prepare, "ours": run_ours, "negatives": mine}.get(part)
        if work is None:
            work = functools.partial(train_teacher if part.startswith("teacher") else train_peer, part)
        work(size, folder)
        return
    summary: dict[str, Any] = {}
    for dataset in options.datasets:
        size = size_of(dataset, options)
        folder = options.work / f"{dataset}-{size.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for part in options.parts.split(","):
            if part not in NEEDS:
                raise SystemExit(f"--parts {part}: no such part; there are {', '.join(NEEDS)}")
            do(part, size, folder)
        summary[dataset] = report(size, folder)
    print(json.dumps(summary))


def size_of(dataset: str, options: argparse.Namespace) -> Size:
    given = {name: getattr(options, name) for name in Size.__annotations__ if name != "dataset"}
    given["peer_steps"] = given["peer_steps"] or given["steps"]
    given["teacher_queries"] = given["teacher_queries"] or given["steps"] * given["queries"]
    given["num_negatives"] = given["num_negatives"] or given["group_size"] - 1
    given["teacher_depth"] = given["teacher_depth"] or 2 * (given["group_size"] - 1)
    return Size(dataset=dataset, **given)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("datasets", nargs="*", default=["squad", "medquad", "scifact"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peer-steps", type=int, default=0, help="of their retrievers; 0 = as many as each of ours")
    parser.add_argument("--queries", type=int, default=32, help="of a step")
    parser.add_argument("--group-size", type=int, default=3, help="passages of a query")
    parser.add_argument("--passage-tokens", type=int, default=64)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--train-queries", type=int, default=1500)
    parser.add_argument("--test-queries", type=int, default=2000, help="at most")
    parser.add_argument("--passages", type=int, default=5000, help="at most, judged ones first")
    parser.add_argument("--reranker-steps", type=int, default=60)
    parser.add_argument("--reranker-queries", type=int, default=16)
    parser.add_argument("--reranker-group", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of our retrievers")
    parser.add_argument("--reranker-rate", type=float, default=2e-4, help="of our re-ranker")
    parser.add_argument("--teacher-queries", type=int, default=0, help="training queries that teachers score; 0 = steps x queries")
    parser.add_argument("--teacher-depth", type=int, default=0, help="negatives of each that ours scores; 0 = two epochs' worth")
    parser.add_argument("--distilled-start", choices=["start", "retriever2"], default="start", help="of our distilled retriever")
    parser.add_argument("--if-worse", choices=["mix", "skip", "go_on"], default="mix", help="what ours does with a teacher that is worse")
    parser.add_argument("--interpolate", action="store_true", help="ours always teaches the best mixture of re-ranker and retriever 2")
    parser.add_argument("--check-queries", type=int, default=150, help="dev queries that ours compares teacher and student on")
    parser.add_argument("--first-negatives", choices=["start", "bm25"], default="start", help="whose negatives our retriever 1 takes")
    parser.add_argument("--num-negatives", type=int, default=0, help="of a query that ours draws from, hardest first; 0 = a group's worth")
    parser.add_argument("--temperature", type=float, default=0.05, help="of our retrievers 1 and 2; theirs has 0.05, the paper 0.02")
    parser.add_argument("--start", default=PACKAGED, help="a checkpoint's folder, or packaged:NAME")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--work", type=Path, default=Path("runs/recipe_quality"))
    parser.add_argument("--parts", default=",".join(NEEDS), help="comma-separated")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    return parser.parse_args()


def depends(part: str, size: Size) -> dict[str, Any]:
    """The options that decide what a part makes."""
    names = [name for name in (*OF_DATA, *DEPENDS[part]) if name != "start" or size.start != PACKAGED]
    found = {name: getattr(size, name) for name in names}
    for needed in NEEDS[part]:
        found |= depends(needed, size)
    return found


def is_done(part: str, size: Size, folder: Path) -> bool:
    file = folder / f"{part}.done"
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["options"] == depends(part, size)


def do(part: str, size: Size, folder: Path) -> None:
    """A part in a process of its own, after what it needs, as far as it is not done with these options."""
    for needed in NEEDS[part]:
        do(needed, size, folder)
    if is_done(part, size, folder):
        return
    print(f"{size.dataset}: {part}", flush=True)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--part", part, "--work", str(folder), "--size", json.dumps(size.__dict__)]
    with open(folder / f"{part}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"{part} ended with code {code}; its log: {folder / f'{part}.log'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = {
        "seconds": round(time.perf_counter() - started),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
    }
    print(f"{size.dataset}: {part} took {took['seconds']} s ({took['processor_seconds']} s of processors)", flush=True)
    (folder / f"{part}.done").write_text(json.dumps(took | {"options": depends(part, size)}), encoding="utf-8")


# --- ours


def recipe_of(size: Size, folder: Path) -> Any:
    from simlm.recipe import parse_recipe

    data = Path(os.environ.get("SIMLM_DATA", "../shared/data")) / size.dataset
    retriever = {
        "initial": "start",
        "queries_per_step": size.queries,
        "group_size": size.group_size,
        "dropout": 0.0,
        "dev": {"num_queries": 0},
        "training": {"learning_rate": size.learning_rate, "max_steps": size.steps},
    }
    mining = {"depth": 100, "num_negatives": size.num_negatives, "below_positive": 0.95}
    contrastive = retriever | {"temperature": size.temperature}
    return parse_recipe(
        {
            "name": "ours",
            "output": str(folder / "ours"),
            "seed": size.seed,
            "skip": ["pretrain"],
            "data": {
                "dataset": "beir",
                "path": str(data),
                "max_passages": size.passages,
                "max_queries": {"train": size.train_queries, "dev": 300, "test": size.test_queries},
            },
            "prepare": {"max_passage_tokens": size.passage_tokens, "max_query_tokens": size.query_tokens},
            "model": {"start": size.start, "pooling": "mean"},
            "mining": mining | {"num_negatives": max(size.num_negatives, size.reranker_group - 1)},
            "retriever1_mining": mining | ({"mix": {"start": 1.0}} if size.first_negatives == "start" else {}),
            "retriever2_mining": mining,
            "retriever1": contrastive,
            "retriever2": contrastive,
            "reranker": {
                "queries_per_step": size.reranker_queries,
                "group_size": size.reranker_group,
                "max_pair_tokens": size.passage_tokens + size.query_tokens,
                "train_hardest": size.reranker_group,
                "rdrop_weight": 0.0,
                "dropout": 0.0,
                "dev": {"num_queries": 0},
                "training": {"learning_rate": size.reranker_rate, "max_steps": size.reranker_steps},
            },
            "teacher": {
                "depth": size.teacher_depth,
                "num_queries": size.teacher_queries,
                "max_pair_tokens": size.passage_tokens + size.query_tokens,
                "interpolate": size.interpolate,
                "check_queries": size.check_queries,
                **({} if size.interpolate else {"if_worse": size.if_worse}),
            },
            "distilled": retriever | {"initial": size.distilled_start},
            "search": {"depth": 100},
        }
    )


def prepare(size: Size, folder: Path) -> None:
    """The passages and queries that all parts read."""
    from simlm.pipeline import run_recipe

    run_recipe(recipe_of(size, folder), only=["store"])


def run_ours(size: Size, folder: Path) -> None:
    from simlm.pipeline import run_recipe

    tuned()
    run_recipe(recipe_of(size, folder), only=[f"{name}_run" for name in ("bm25", *STAGES)])


def tuned() -> None:
    """The allocator as simlm's command line sets it, for every part: quality is compared here, not speed."""
    from simlm.runtime import tune_allocator

    tune_allocator()


# --- theirs


def texts_of(size: Size, folder: Path) -> tuple[Any, list[str], list[str]]:
    """(store, texts of its passages with their titles before them, its training queries)."""
    from simlm.data.store import Store

    store = Store(folder / "ours" / "store")
    passages = [f"{store.passages.title(row)} {store.passages.text(row)}".strip() for row in range(len(store.passages))]
    queries = [store.queries("train").text(row) for row in range(len(store.queries("train")))]
    return store, passages, queries


def starting_model(size: Size) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from simlm.models.backbone import resolve_model

    transformer = Transformer(
        resolve_model(size.start),
        query_length=size.query_tokens,
        document_length=size.passage_tokens,
        max_seq_length=size.passage_tokens,
    )
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()], device="cpu")


def mine(size: Size, folder: Path) -> None:
    """Their own miner over the same passages, with the starting model."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    tuned()
    store, passages, queries = texts_of(size, folder)
    pairs = [(query, row) for query, grades in sorted(store.qrels("train").items()) for row, grade in sorted(grades.items()) if grade > 0]
    dataset = Dataset.from_dict({"anchor": [queries[query] for query, _ in pairs], "positive": [passages[row] for _, row in pairs]})
    negatives = max(size.group_size, size.reranker_group) - 1
    mined = mine_hard_negatives(
        dataset,
        starting_model(size),
        corpus=passages,
        relative_margin=0.05,
        num_negatives=negatives,
        sampling_strategy="top",
        output_format="n-tuple",
        use_faiss=True,
        verbose=False,
    )
    rows = [[row[name] for name in ("anchor", "positive", *(f"negative_{n}" for n in range(1, negatives + 1)))] for row in mined]
    (folder / "negatives.json").write_text(json.dumps(rows), encoding="utf-8")


def train_teacher(part: str, size: Size, folder: Path) -> None:
    """A cross-encoder, at the documented learning rate or at ours, and its raw scores for the groups."""
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    from simlm.models.backbone import resolve_model

    tuned()
    rows = json.loads((folder / "negatives.json").read_text(encoding="utf-8"))
    torch.manual_seed(size.seed)
    model = CrossEncoder(resolve_model(size.start), num_labels=1, max_length=size.passage_tokens + size.query_tokens, device="cpu")
    pairs = [(row[0], text, float(place == 0)) for row in rows for place, text in enumerate(row[1 : size.reranker_group + 1])]
    dataset = Dataset.from_dict({"query": [p[0] for p in pairs], "passage": [p[1] for p in pairs], "label": [p[2] for p in pairs]})
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder / f"trained-{part}"),
        per_device_train_batch_size=size.reranker_queries * size.reranker_group,
        max_steps=size.reranker_steps,
        learning_rate=DOCUMENTED_RATE if part == "teacher" else size.reranker_rate,
        warmup_steps=0.1,
        save_strategy="no",
        report_to="none",
        seed=size.seed,
        use_cpu=True,
    )
    loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(size.reranker_group - 1)))
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    taught = taught_rows(rows, size)
    wanted = [(row[0], text) for row in taught for text in row[1 : size.group_size + 1]]
    scores = model.predict(wanted, activation_fn=torch.nn.Identity(), batch_size=64).reshape(len(taught), size.group_size)
    (folder / f"scores-{part}.json").write_text(json.dumps(scores.tolist()), encoding="utf-8")


def taught_rows(rows: list[list[str]], size: Size) -> list[list[str]]:
    """The queries that their teacher scores, a seeded sample, and that its student is trained on."""
    import numpy as np

    if len(rows) <= size.teacher_queries:
        return rows
    return [rows[place] for place in np.sort(np.random.default_rng(size.seed).choice(len(rows), size.teacher_queries, replace=False))]


def train_peer(part: str, size: Size, folder: Path) -> None:
    """Train a retriever of theirs and keep its values for each test query."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    tuned()
    rows = json.loads((folder / "negatives.json").read_text(encoding="utf-8"))
    if part.startswith("distilled"):
        rows = taught_rows(rows, size)
    columns: dict[str, Any] = {
        name: [row[place] for row in rows]
        for place, name in enumerate(["anchor", "positive", *(f"negative_{n}" for n in range(1, size.group_size))])
    }
    model = starting_model(size)
    if part.startswith("distilled"):
        columns["label"] = json.loads((folder / f"scores-{TEACHERS[part]}.json").read_text(encoding="utf-8"))
        loss: Any = DistillKLDivLoss(model)
    else:
        loss = MultipleNegativesRankingLoss(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / f"trained-{part}"),
        per_device_train_batch_size=size.queries,
        max_steps=size.peer_steps,
        learning_rate=DOCUMENTED_RATE if part in ("mnrl", "distilled_theirs") else size.learning_rate,
        warmup_steps=0.1,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="no",
        report_to="none",
        seed=size.seed,
        use_cpu=True,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    measure_peer(part, model, size, folder)


def measure_peer(part: str, model: Any, size: Size, folder: Path) -> None:
    """Exact search with their model over the same passages, measured as ours is."""
    import numpy as np

    from simlm.evaluation.measures import evaluate_queries, ranked_passages
    from simlm.rankings import Run

    store, passages, _ = texts_of(size, folder)
    questions = [store.queries("test").text(row) for row in range(len(store.queries("test")))]
    passages_ND = model.encode_document(passages, batch_size=32)
    queries_QD = model.encode_query(questions, batch_size=32)
    scores_QN = queries_QD @ passages_ND.T
    rows_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :100]
    run = Run.from_matrix("test", np.arange(len(questions)), rows_QK, np.take_along_axis(scores_QN, rows_QK, axis=1))
    measured = evaluate_queries(ranked_passages(run), store.qrels("test"), MEASURES)
    keep(folder / f"values-{part}.json", measured)


def keep(file: Path, measured: Any) -> None:
    values = {name: dict(zip(map(int, measured.query_ids), map(float, of), strict=True)) for name, of in measured.values.items()}
    file.write_text(json.dumps(values), encoding="utf-8")


# --- the comparison


def report(size: Size, folder: Path) -> dict[str, Any]:
    """The table of what is done of one data set, and its figures: ours, distilled and retriever 2, against everything else."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from simlm.artifacts import read_manifest
    from simlm.data.store import Store
    from simlm.evaluation.measures import evaluate_queries, ranked_passages
    from simlm.evaluation.report.verdicts import teaching_verdict
    from simlm.evaluation.significance import p_value
    from simlm.rankings import Run

    store = Store(folder / "ours" / "store")
    systems: dict[str, dict[str, dict[int, float]]] = {}
    for key in ("bm25", *STAGES) if is_done("ours", size, folder) else ():
        run = Run.load(folder / "ours" / f"{key}_run", "test")
        measured = evaluate_queries(ranked_passages(run), store.qrels("test"), MEASURES)
        systems[key] = {name: dict(zip(measured.query_ids, of, strict=True)) for name, of in measured.values.items()}
    for key in PEERS:
        if is_done(key, size, folder):
            found = json.loads((folder / f"values-{key}.json").read_text(encoding="utf-8"))
            systems[key] = {name: {int(query): value for query, value in of.items()} for name, of in found.items()}
    queries = sorted(next(iter(systems.values()))["RR@10"]) if systems else []

    def values(key: str, measure: str) -> Any:
        return np.array([systems[key][measure][query] for query in queries])

    def p(key: str, other: str, measure: str) -> float | None:
        return p_value(values(key, measure), values(other, measure), seed=size.seed)

    names = {"bm25": "BM25", **STAGES, **PEERS}
    ours = [key for key in ("distilled", "retriever2") if key in systems]
    table = Table(
        title=f"{size.dataset}: {len(queries):,} test queries, {len(store.passages):,} passages, {size.steps} steps of {size.queries} x "
        f"{size.group_size} (theirs {size.peer_steps}), start {size.start}, seed {size.seed}",
        title_justify="left",
    )
    columns = [column for key in ours for column in (f"{key}: RR@10", "p", "nDCG@10", "p")]
    for column in ("", *MEASURES, *columns):
        table.add_column(column, justify="right" if column else "left")
    figures: dict[str, Any] = {"num_queries": len(queries), "seed": size.seed, "options": size.__dict__, "systems": {}}
    figures |= {f"{key}_against": {} for key in ours}
    for key, found in systems.items():
        cells = [f"{np.mean(list(found[measure].values())):.3f}" for measure in MEASURES]
        figures["systems"][key] = {measure: round(float(values(key, measure).mean()), 4) for measure in MEASURES}
        for own in ours:
            against = {}
            for measure in ("RR@10", "nDCG@10") if key != own else ():
                difference, chance = float((values(own, measure) - values(key, measure)).mean()), p(own, key, measure)
                against[measure] = {"difference": round(difference, 4), "p": chance}
                cells += [f"{difference:+.3f}", "" if chance is None else f"{chance:.4f}"]
            if against:
                figures[f"{own}_against"][key] = against
            else:
                cells += [""] * 4
        table.add_row(names[key], *cells)
    Console(width=180).print(table)
    if ours:
        figures["teaching"] = read_manifest(folder / "ours" / "teacher_check", "report").facts
        print(teaching_verdict(figures["teaching"]))
    return figures


if __name__ == "__main__":
    main()
