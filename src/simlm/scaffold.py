"""`simlm init`: a commented recipe for the data and the machine at hand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlm.errors import DataError, RecipeError
from simlm.estimates import has_bf16


@dataclass(frozen=True)
class Machine:
    """What the sizes in a new recipe depend on."""

    cores: int
    memory_gib: float
    accelerators: tuple[str, ...]
    bf16: bool

    @property
    def description(self) -> str:
        if self.accelerators:
            return f"{len(self.accelerators)} x {self.accelerators[0]}, {self.cores} cores, {self.memory_gib:.0f} GiB"
        return f"{self.cores} cores without an accelerator, {self.memory_gib:.0f} GiB" + (", bf16 matrix products" if self.bf16 else "")


def look_at_machine() -> Machine:
    """Cores, memory and accelerators of this machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    return Machine(cores, memory, names, has_bf16())


def write_recipe(source: Path, output: Path | None, *, force: bool = False) -> tuple[Path, str]:
    """Write a recipe for the data at `source`; its path, and what was found in words.

    Raises DataError if nothing there is a known form of data, RecipeError if the recipe exists and `force` is not given.
    """
    from simlm.data.datasets import sniff

    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give the folder that holds your corpus")
    found = sniff(source)
    machine = look_at_machine()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", source.resolve().stem).strip("-") or "corpus"
    path = output or Path(f"{name}.toml")
    if path.exists() and not force:
        raise RecipeError(f"{path}: exists already; give another name with --output, or --force to write over it")
    counts = found.counts
    text = _render(name, found.settings, counts, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    queries = ", ".join(f"{counts[split]:,} {split}" for split in ("train", "dev", "test") if counts.get(split)) or "none"
    lines = [
        f"{source}: {found.settings['dataset']} data, {counts.get('passages', 0):,} passages; judged queries: {queries}",
        f"machine: {machine.description}",
    ]
    if not counts.get("train"):
        lines.append(
            "no training queries: the recipe makes queries from the passages and trains on those; "
            "with queries and qrels for `train`, run `simlm init` again"
        )
    return path, "\n".join(lines)


def _render(name: str, data: dict[str, Any], counts: dict[str, int], machine: Machine) -> str:
    gpu = bool(machine.accelerators)
    passages, train = max(counts.get("passages", 1), 1), counts.get("train", 0)
    # On CPU about 100 steps of 64 pairs a stage are minutes; the paper's sizes are for accelerators.
    epochs = 3.0 if gpu else max(0.1, min(1.0, 12_000 / max(train, 1)))
    pretrain_epochs = 3.0 if gpu else max(0.1, min(1.0, 16_000 / passages))
    micro = 65_536 if gpu else 8_192
    values = {
        "name": name,
        "found": f"{passages:,} passages, {train:,} training queries",
        "machine": machine.description,
        "data": "\n".join(f"{key} = {_toml(value)}" for key, value in data.items()),
        "start": "bert-base-uncased" if gpu else "packaged:all-MiniLM-L6-v2",
        "start_note": "a hub id or a path works too" if gpu else "ships with simlm[packaged]; a hub id or a path works too",
        "no_labels_start": "sentence-transformers/all-MiniLM-L6-v2" if gpu else "packaged:all-MiniLM-L6-v2",
        "pooling": "cls" if gpu else "mean",
        "generator": "google/electra-base-generator" if gpu else "train",
        "pretrain_batch": min(2048 if gpu else 128, passages),
        "pretrain_rate": "3e-4" if gpu else "5e-5",
        "pretrain_epochs": round(pretrain_epochs, 2),
        "held_out": max(1, min(4096 if gpu else 512, passages // 10)),
        "micro": micro,
        "group": 16 if gpu else 4,
        "epochs": round(epochs, 2),
        "reranker_group": 64 if gpu else 8,
        "hardest": 16 if gpu else 4,
        "reranker": "google/electra-base-discriminator" if gpu else "start",
        "pair_tokens": 192 if gpu else 160,
        "teacher_depth": 63 if gpu else 15,
        "distilled_group": 24 if gpu else 8,
        "distilled_epochs": round(6.0 if gpu else epochs, 2),
        "rerank_depth": 200 if gpu else 20,
        "depth": min(200 if gpu else 100, max(passages, 1)),
    }
    if not train:
        # As many as give the same steps as real queries would; more passages give more.
        made = min(200_000 if gpu else 6_000, 4 * passages)
        share = 3.0 if gpu else max(0.1, min(1.0, 2_000 / made))
        values |= {"made": made, "epochs": round(share, 2), "distilled_epochs": round(share, 2)}
    template = TEMPLATE if train else NO_LABELS_TEMPLATE
    return re.sub(r"@(\w+)@", lambda match: str(values[match.group(1)]), template)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


TEMPLATE = """\
# Written by `simlm init`. Found: @found@.
# Sized for: @machine@.
# Every key has a default (the paper's); `simlm plan` says what each step will take. Unknown keys are errors.
name = "@name@"                 # results go to runs/@name@
seed = 42

[data]
@data@
# max_queries = { train = 10000 }   # a seeded sample, to try things out
# on_bad_record = "skip"            # leave broken records out and count them instead of stopping

[prepare]
max_passage_tokens = 144        # title and text together; longer passages are cut
max_query_tokens = 32

[model]
start = "@start@"   # @start_note@
pooling = "@pooling@"                # "cls" is the paper's; "mean" for checkpoints trained with it

[generator]                     # proposes the replaced tokens in pre-training; must have the start model's vocabulary
source = "@generator@"

[pretrain]                      # SimLM: replaced language modelling through the [CLS] bottleneck; needs no labels
passages_per_step = @pretrain_batch@
micro_batch_tokens = @micro@       # memory depends on it, the result does not
held_out_passages = @held_out@
[pretrain.training]             # any option of transformers.TrainingArguments
learning_rate = @pretrain_rate@
num_train_epochs = @pretrain_epochs@
save_steps = 100                # a killed run goes on from the last checkpoint

[mining]                        # hard negatives from the top of BM25, then of the retriever itself
depth = @depth@
# below_positive = 0.95         # leave out what scores nearly as the positive does: likely relevant too
# Where a start that retrieves already is trained for few steps, the hardest negatives first teach most (docs/negatives.md):
# num_negatives = 3
# [retriever1_mining]
# mix = { start = 1.0 }

[retriever1]                    # trained on BM25 negatives
queries_per_step = 64           # over all devices together
group_size = @group@                 # 1 positive + negatives
micro_batch_tokens = @micro@
[retriever1.training]
learning_rate = 2e-5
num_train_epochs = @epochs@

[retriever2]                    # trained on the negatives that retriever 1 finds
queries_per_step = 64
group_size = @group@
micro_batch_tokens = @micro@
[retriever2.training]
learning_rate = 2e-5
num_train_epochs = @epochs@

[reranker]                      # cross-encoder: the teacher
initial = "@reranker@"
queries_per_step = 32
group_size = @reranker_group@
train_hardest = @hardest@
max_pair_tokens = @pair_tokens@
micro_batch_tokens = @micro@
[reranker.training]
learning_rate = 3e-5
num_train_epochs = @epochs@

[teacher]                       # how many negatives of each training query the re-ranker scores
splits = ["train"]
depth = @teacher_depth@

[distilled]                     # the retriever to use
queries_per_step = 64
group_size = @distilled_group@
micro_batch_tokens = @micro@
[distilled.training]
learning_rate = 3e-5
num_train_epochs = @distilled_epochs@

[rerank]
depth = @rerank_depth@

[search]
depth = 1000

[evaluate]
measures = ["RR@10", "nDCG@10", "R@50", "R@100", "R@1000"]
"""

NO_LABELS_TEMPLATE = """\
# Written by `simlm init`. Found: @found@.
# Sized for: @machine@.
# Without labels: queries are made from the passages; BM25 and the starting model together teach the retriever (docs/no-labels.md).
# Every key has a default; `simlm plan` says what each step will take. Unknown keys are errors.
name = "@name@"                 # results go to runs/@name@
seed = 42
skip = ["pretrain", "retriever2"]   # "retriever2" out: without labels it serves only as a row of the report

[data]
@data@
# on_bad_record = "skip"            # leave broken records out and count them instead of stopping

[prepare]
max_passage_tokens = 144        # title and text together; longer passages are cut
max_query_tokens = 32

[model]                         # one that retrieves already: without labels it is what there is to build on
start = "@no_labels_start@"   # @start_note@
pooling = "mean"                # as this checkpoint was trained

[pseudo_queries]
num_queries = @made@
kinds = { title_keywords = 1, keywords = 1, first_sentence = 1, crop = 1, cloze = 1, title = 0.5 }
# Better, where there is a language model behind an OpenAI-compatible endpoint:
# kinds = { ask_question = 2, ask_keywords = 1, keywords = 1, crop = 1 }
# endpoint = { url = "http://127.0.0.1:8000/v1", model = "NAME" }

[consistency]                   # a query stays if it finds its passage again
by = "hybrid"
within = 10
trivial_share = 0.5             # at most half of them found by words alone

[mining]
depth = @depth@

[reranker_mining]
mix = { bm25 = 0.5, dense = 0.5 }

[hybrid_teacher]                # BM25 and the starting model; alone = false lets the re-ranker teach too
dense_weight = 0.6
depth = @teacher_depth@

[retriever1]
queries_per_step = 32           # over all devices together
group_size = @group@                 # 1 positive + negatives
micro_batch_tokens = @micro@       # memory depends on it, the result does not
[retriever1.training]           # any option of transformers.TrainingArguments
learning_rate = 1e-5            # plain contrastive training on made queries can hurt a strong start
num_train_epochs = @epochs@

[reranker]                      # cross-encoder: re-ranks the top of the search
queries_per_step = 32
group_size = @reranker_group@
train_hardest = @hardest@
max_pair_tokens = @pair_tokens@
micro_batch_tokens = @micro@
[reranker.training]
learning_rate = 3e-5
num_train_epochs = @epochs@

[distilled]                     # the retriever to use
initial = "start"
queries_per_step = 32
group_size = @distilled_group@
micro_batch_tokens = @micro@
[distilled.training]
learning_rate = 2e-5            # at 1e-4 made queries cost the start up to .06 of RR@10 (docs/no-labels.md)
num_train_epochs = @distilled_epochs@

[hybrid]                        # what to search with: BM25 and the distilled retriever
dense_weight = 0.5

[rerank]
depth = @rerank_depth@

[search]
depth = 1000

[evaluate]                      # on the test queries, where there are any, else on made dev queries
measures = ["RR@10", "nDCG@10", "R@50", "R@100", "R@1000"]
"""
