"""make_queries, filter_queries and score_groups: stores with pseudo queries, the round trip, BM25 and dense as one teacher."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import BaseModel

from simlm.artifacts import Kind, build_artifact, read_manifest
from simlm.data.store import Store, passages_fingerprint
from simlm.errors import DataError
from simlm.index import open_index
from simlm.progress import Progress
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import ConsistencySettings, HybridTeacherSettings, IndexSettings, ModelSettings, PseudoQuerySettings
from simlm.stages import Context, build_index, filter_queries, make_queries, score_groups
from simlm.stages.filter_queries import own_ranks, trivial
from simlm.stages.score_groups import fused
from simlm.types import Split
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = {"title_keywords": 1.0, "keywords": 1.0, "first_sentence": 1.0, "crop": 1.0, "cloze": 1.0, "title": 0.5}


def run_stage(stage: ModuleType, path: Path, kind: Kind, settings: BaseModel, inputs: dict[str, Path], seed: int = 0) -> dict[str, Any]:
    with build_artifact(path, kind=kind, stage=stage.__name__, settings=settings.model_dump(), seed=seed) as builder:
        stage.run(settings, inputs, Context(builder, seed, Progress(quiet=True)))
    return builder.facts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> dict[str, Path]:
    """The tiny corpus with its test queries alone, and BM25 over it."""
    folder = tmp_path_factory.mktemp("corpus")
    build_store(folder / "store", tiny_wordpiece, tiny_passages(), tiny_queries(), {"test": tiny_qrels("test")})
    run_stage(build_index, folder / "bm25", "index", IndexSettings(type="bm25", language="english"), {"store": folder / "store"})
    return {"store": folder / "store", "index": folder / "bm25"}


def made(path: Path, corpus: dict[str, Path], seed: int = 0, **changes: Any) -> tuple[Store, dict[str, Any]]:
    settings = PseudoQuerySettings.model_validate({"kinds": KINDS, "num_queries": 120, "dev_fraction": 0.2, "words": [3, 8], **changes})
    facts = run_stage(make_queries, path, "store", settings, corpus, seed)
    return Store.open(path), facts


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path]) -> tuple[Store, dict[str, Any]]:
    """What `made` gives without changes, and its facts; read only."""
    return made(tmp_path_factory.mktemp("made") / "made", corpus)


def queries_of(store: Store) -> dict[str, tuple[str, str, list[int]]]:
    """Query id -> (split, text, relevant passages)."""
    found: dict[str, tuple[str, str, list[int]]] = {}
    for split in store.splits:
        table, qrels = store.queries(split), store.qrels(split)
        found |= {table.ids[row]: (split, table.text(row), sorted(qrels[row])) for row in range(len(table))}
    return found


# --- make_queries


def test_the_store_has_the_same_passages_the_test_queries_and_the_made_ones(
    corpus: dict[str, Path], default: tuple[Store, dict[str, Any]]
) -> None:
    store, facts = default
    base = Store.open(corpus["store"])
    assert store.splits == ["train", "dev", "test"]
    assert [store.passages.ids[row] for row in range(60)] == [base.passages.ids[row] for row in range(60)]
    assert np.array_equal(store.passages.tokens, base.passages.tokens)
    assert passages_fingerprint(store.path) == passages_fingerprint(base.path) == read_manifest(base.path).fingerprint
    assert read_manifest(store.path).fingerprint != read_manifest(base.path).fingerprint
    for row in range(12):
        assert store.queries("test").text(row) == base.queries("test").text(row)
    assert store.qrels("test") == base.qrels("test")
    counted = {kind: sum(name.startswith(f"{kind}/") for name in queries_of(store)) for kind in KINDS}
    kinds = facts["kinds"]
    assert {kind: kinds["train"].get(kind, 0) + kinds["dev"].get(kind, 0) for kind in KINDS} == counted
    assert all(count > 0 for kind, count in counted.items() if kind != "title")
    assert sum(facts["made"].values()) == 120
    assert facts["num_passages_asked_for"] <= 60


def test_a_query_is_made_of_words_of_its_passage_and_no_passage_is_in_train_and_dev(default: tuple[Store, dict[str, Any]]) -> None:
    store, _ = default
    asked: dict[str, set[int]] = {"train": set(), "dev": set()}
    for name, (split, text, rows) in queries_of(store).items():
        if split == "test":
            continue
        asked[split].update(rows)
        kind, _, passage_id = name.split("/", 2)
        row = store.passages.ids.row(passage_id)
        assert row in rows
        words = text.split() if kind != "cloze" else text.split()[2:]
        own = f"{store.passages.title(row)} {store.passages.text(row)}"
        assert all(word.strip(".,;") in own for word in words), (name, text)
    assert asked["train"] and asked["dev"]
    assert not asked["train"] & asked["dev"]


def test_the_same_seed_makes_the_same_files_and_another_one_others(tmp_path: Path, corpus: dict[str, Path]) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        made(tmp_path / name, corpus, seed)
    files = {name: read_manifest(tmp_path / name).files for name in ("one", "two", "three")}
    assert files["one"] == files["two"]
    assert files["one"]["queries/train/text.bin"] != files["three"]["queries/train/text.bin"]


def test_a_title_that_few_passages_share_has_them_all_as_positives(tmp_path: Path, corpus: dict[str, Path]) -> None:
    # Each subject has five passages, of which up to one has no title.
    store, facts = made(tmp_path / "made", corpus, kinds={"title": 1.0}, max_positives=5, dev_fraction=0.0)
    assert facts["kinds"]["train"] == {"title": 12}
    assert "dev" not in store.splits
    for _, text, rows in (found for name, found in queries_of(store).items() if name.startswith("title/")):
        assert {store.passages.title(row) for row in rows} == {text}
        assert len(rows) in (4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kinds": {"title": 1.0}},
            r"none of the kinds title gives a query.*60 passages: 50 of 60 passages have a title, and titles that more than 3",
        ),
        ({"kinds": {"crop": 1.0}, "words": [60, 80]}, r"none of the kinds crop gives a query.*crops and sentences need 60 words"),
        ({"kinds": {"keywords": 1.0}, "keywords": [50, 50]}, r"keyword queries 50"),
        ({"kinds": {"title": 1.0}, "max_positives": 5, "dev_fraction": 0.9999999}, r"no training query is left of 12"),
    ],
)
def test_a_corpus_that_gives_no_query_is_refused(tmp_path: Path, corpus: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(tmp_path / "made", corpus, **changes)


def test_titles_alone_without_titles(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    bare = [{"_id": str(number), "text": f"passage number {number} says something"} for number in range(5)]
    build_store(tmp_path / "store", tiny_wordpiece, bare, [], {})
    run_stage(build_index, tmp_path / "bm25", "index", IndexSettings(type="bm25"), {"store": tmp_path / "store"})
    with pytest.raises(DataError, match="0 of 5 passages have a title"):
        made(tmp_path / "made", {"store": tmp_path / "store", "index": tmp_path / "bm25"}, kinds={"title": 1.0, "title_keywords": 1.0})


def test_rare_words_weigh_more_than_common_ones(corpus: dict[str, Path]) -> None:
    index = open_index(corpus["index"])
    weights = dict(make_queries.weigher(index)("the beetle of brass wings and time"))  # type: ignore[arg-type]
    assert not {"the", "of", "and"} & weights.keys()
    pairs = make_queries.weigher(index)("beetle beetle brass")  # type: ignore[arg-type]
    once = dict(make_queries.weigher(index)("beetle brass"))  # type: ignore[arg-type]
    # BM25's saturation, k1 = 0.9: twice counts 2 x 1.9 / 2.9, once 1.
    assert pairs[0][1] == pytest.approx(once["beetle"] * 2 * 1.9 / 2.9)
    assert once["brass"] > once["beetle"]


# --- an endpoint


@pytest.fixture
def endpoint_url(monkeypatch: pytest.MonkeyPatch) -> Any:
    from tests.unit.test_query_endpoint import Server, good

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    server.reply = lambda number, body: good("" if "Salt" in body["messages"][1]["content"] else f"asked {body['seed']}")
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_queries_of_an_endpoint_join_the_others(tmp_path: Path, corpus: dict[str, Path], endpoint_url: Any) -> None:
    endpoint = {"url": endpoint_url.url, "model": "m"}
    changes: dict[str, Any] = {"kinds": {"ask_question": 1.0, "crop": 1.0}, "num_queries": 80, "endpoint": endpoint}
    store, facts = made(tmp_path / "made", corpus, **changes)
    assert facts["endpoint"]["asked"] == 40
    silent = facts["endpoint"]["no_query"]
    assert 0 < silent < 40
    # What the model had no query for, the crops make up for.
    assert facts["made"] == {"ask_question": 40 - silent, "crop": 40 + silent}
    asked = {name: text for name, (_, text, _) in queries_of(store).items() if name.startswith("ask_question/")}
    assert all(text.startswith("asked ") for text in asked.values())
    # The answers lie beside the artifact: made again, whatever else is asked for, nothing is paid twice.
    again, facts = made(tmp_path / "again", corpus, **changes | {"words": [4, 6]})
    assert facts["endpoint"] == {"asked": 0, "kept_before": 40, "no_query": silent}
    assert asked == {name: text for name, (_, text, _) in queries_of(again).items() if name.startswith("ask_question/")}


# --- filter_queries


def test_ranks_and_trivial_queries_by_hand() -> None:
    run = Run.from_lists("train", [0, 1, 2, 4], [([7, 3, 5], [9, 5, 1]), ([3, 5], [4, 3]), ([8], [1]), ([], [])])
    qrels = {0: {3: 1}, 1: {3: 1, 9: 1}, 2: {1: 1}, 3: {7: 1}, 4: {7: 1}}
    assert own_ranks(run, qrels, 5).tolist() == [2, 1, 0, 0, 0]
    # Query 1: 4 against 3, a quarter to spare.
    assert trivial(run, qrels, 5, margin=0.25).tolist() == [False, True, False, False, False]
    assert trivial(run, qrels, 5, margin=0.26).tolist() == [False] * 5
    alone = Run.from_lists("train", [0], [([3, 4], [2.0, 1.9])])
    assert trivial(alone, {0: {3: 1, 4: 1}}, 1, margin=0.9).tolist() == [True]


def searched(path: Path, store: Store, ranks: dict[Split, list[int]]) -> Path:
    """A run in which the relevant passage of query r stands at ranks[split][r] (0: nowhere) of 5; scores 10, 9, 8, 7, 6."""
    with build_artifact(path, kind="run") as builder:
        for split, wanted in ranks.items():
            qrels = store.qrels(split)
            lists = []
            for query, rank in enumerate(wanted):
                own = min(qrels[query])
                others = [row for row in range(60) if row not in qrels[query]][:5]
                rows = [*others[: rank - 1], own, *others[rank - 1 :]][:5] if rank else others
                lists.append((rows, [10.0, 9.0, 8.0, 7.0, 6.0]))
            Run.from_lists(split, range(len(wanted)), lists).save(builder.work)
    return path


def test_queries_that_do_not_find_their_passage_go(tmp_path: Path, corpus: dict[str, Path], default: tuple[Store, dict[str, Any]]) -> None:
    store, _ = default
    train, dev = len(store.queries("train")), len(store.queries("dev"))
    ranks: dict[Split, list[int]] = {"train": [(row % 6) for row in range(train)], "dev": [1 + row % 2 for row in range(dev)]}
    run = searched(tmp_path / "run", store, ranks)
    settings = ConsistencySettings(by="bm25", within=2)
    facts = run_stage(filter_queries, tmp_path / "kept", "store", settings, {"store": store.path, "run": run})
    kept = Store.open(tmp_path / "kept")
    wanted = [row for row in range(train) if row % 6 in (1, 2)]
    assert [kept.queries("train").ids[row] for row in range(len(wanted))] == [store.queries("train").ids[row] for row in wanted]
    assert [kept.qrels("train")[row] for row in range(len(wanted))] == [store.qrels("train")[row] for row in wanted]
    assert [kept.queries("train").text(row) for row in range(3)] == [store.queries("train").text(row) for row in wanted[:3]]
    assert (facts["train"]["kept"], facts["train"]["not_found"]) == (len(wanted), train - len(wanted))
    assert sum(facts["train"]["kept_kinds"].values()) == len(wanted)
    assert len(kept.queries("dev")) == dev
    assert kept.qrels("test") == store.qrels("test")
    assert passages_fingerprint(kept.path) == passages_fingerprint(corpus["store"])


def test_at_most_a_share_of_those_kept_is_trivial(tmp_path: Path, default: tuple[Store, dict[str, Any]]) -> None:
    store, _ = default
    train, dev = len(store.queries("train")), len(store.queries("dev"))
    # Half have their passage first, a tenth of the score ahead; the others second.
    ranks: dict[Split, list[int]] = {"train": [1 + row % 2 for row in range(train)], "dev": [2] * dev}
    run = searched(tmp_path / "run", store, ranks)
    inputs = {"store": store.path, "run": run, "bm25": run}
    settings = ConsistencySettings(by="bm25", within=5, trivial_share=0.25, trivial_margin=0.1)
    facts = run_stage(filter_queries, tmp_path / "kept", "store", settings, inputs)["train"]
    others = train // 2
    assert facts["trivial"] == train - others
    assert facts["kept"] == others + others // 3
    none_left = settings.model_copy(update={"trivial_share": 0.0})
    assert run_stage(filter_queries, tmp_path / "none", "store", none_left, inputs)["train"]["kept"] == others
    wide = settings.model_copy(update={"trivial_margin": 0.11})
    assert run_stage(filter_queries, tmp_path / "wide", "store", wide, inputs)["train"]["kept"] == train


def test_nobody_filters_and_nothing_left(tmp_path: Path, default: tuple[Store, dict[str, Any]]) -> None:
    store, _ = default
    facts = run_stage(filter_queries, tmp_path / "all", "store", ConsistencySettings(by="none"), {"store": store.path})
    assert facts["train"]["kept"] == len(store.queries("train"))
    run = searched(tmp_path / "run", store, {"train": [0] * len(store.queries("train")), "dev": [0] * len(store.queries("dev"))})
    with pytest.raises(DataError, match=r"none of the .* pseudo queries is left: .* do not find their passage among the first 10 \(bm25\)"):
        run_stage(filter_queries, tmp_path / "none", "store", ConsistencySettings(by="bm25"), {"store": store.path, "run": run})


# --- score_groups


def test_fused_scores_by_hand() -> None:
    dense, bm25 = np.array([0.5, 0.3, 0.1], np.float32), np.array([0.0, 6.0, 3.0], np.float32)
    spread = float(np.std([0.5, 0.3, 0.1]))
    # Standardised: dense 1.2247, 0, -1.2247; BM25 -1.2247, 1.2247, 0.
    unit = 1.5**0.5
    assert fused(dense, bm25, dense_weight=0.75, temperature=0.02) == pytest.approx(
        np.array([0.75 * unit - 0.25 * unit, 0.25 * unit, -0.75 * unit]) * spread / 0.02, rel=1e-5
    )


def test_the_dense_part_alone_is_what_the_dense_model_says() -> None:
    dense, bm25 = np.array([0.5, 0.3, 0.1, 0.25], np.float32), np.array([0.0, 6.0, 3.0, 1.0], np.float32)
    scores = fused(dense, bm25, dense_weight=1.0, temperature=0.02)
    assert scores - scores[0] == pytest.approx((dense - dense[0]) / 0.02, rel=1e-4)


def test_equal_scores_add_nothing() -> None:
    dense, none = np.array([0.5, 0.3], np.float32), np.zeros(2, np.float32)
    assert fused(dense, none, dense_weight=0.5, temperature=0.1) == pytest.approx([0.5, -0.5], rel=1e-5)
    assert fused(np.full(3, 0.2, np.float32), np.arange(3, dtype=np.float32), dense_weight=0.5, temperature=0.1).tolist() == [0.0] * 3
    assert fused(np.array([0.4], np.float32), np.array([3.0], np.float32), dense_weight=0.5, temperature=0.1).tolist() == [0.0]


def test_groups_are_scored_by_both(
    tmp_path: Path,
    corpus: dict[str, Path],
    default: tuple[Store, dict[str, Any]],
    tiny_wordpiece: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simlm.models.backbone import load_encoder
    from simlm.models.biencoder import BiEncoder
    from simlm.models.retriever import load_retriever

    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    store, _ = default
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=config), seed=1, tokenizer=tiny_wordpiece), "mean")
    with build_artifact(tmp_path / "model", kind="model") as builder:
        model.save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=64)
    retriever = load_retriever(tmp_path / "model")
    vectors = retriever.encode_passages([(store.passages.title(row), store.passages.text(row)) for row in range(60)])
    with build_artifact(tmp_path / "vectors", kind="embeddings") as builder:
        np.save(builder.work / "vectors.npy", vectors)
    rng = np.random.default_rng(0)
    count = len(store.queries("train"))
    positives = np.array([next(iter(grades)) for grades in store.qrels("train").values()])
    negatives = np.stack([rng.permutation(np.setdiff1d(np.arange(60), [row]))[:6] for row in positives])
    nan = np.full(count, np.nan, np.float32)
    groups = Groups(
        "train",
        np.arange(count),
        offsets_of([1] * count),
        positives,
        nan,
        offsets_of([6] * count),
        negatives.reshape(-1),
        np.repeat(nan, 6),
    )
    with build_artifact(tmp_path / "groups", kind="groups") as builder:
        groups.save(builder.work)
    inputs = {"store": store.path, "groups": tmp_path / "groups", "index": corpus["index"], "embeddings": tmp_path / "vectors"}
    settings = HybridTeacherSettings(dense="best", dense_weight=0.5, depth=4)
    monkeypatch.setattr(score_groups, "QUERIES_AT_ONCE", 7)
    facts = run_stage(score_groups, tmp_path / "scores", "run", settings, inputs | {"model": tmp_path / "model"})
    assert (facts["num_queries"], facts["num_pairs"]) == (count, 5 * count)
    taught = Run.load(tmp_path / "scores", "train")
    index: Any = open_index(corpus["index"])
    all_scores, all_rows = index.search([store.queries("train").text(row) for row in range(count)], 60)
    for query, rows, scores in taught:
        assert set(rows.tolist()) == {int(positives[query]), *negatives[query, :4].tolist()}
        of_row = dict(zip(all_rows[query].tolist(), all_scores[query].tolist(), strict=True))
        bm25 = np.array([of_row.get(int(row), 0.0) for row in rows], np.float32)
        dense = vectors[rows] @ retriever.encode_queries([store.queries("train").text(query)])[0]
        assert scores == pytest.approx(fused(dense, bm25, dense_weight=0.5, temperature=0.02), rel=1e-3, abs=1e-4)
