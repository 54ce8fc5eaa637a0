"""Made-up passages about made-up things: each has a few words of its own, and its query uses some of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

SYLLABLES = ["ba", "ko", "mi", "ru", "ten", "sol", "var", "lin", "dor", "pax", "gre", "nul", "fi", "zam", "quo", "hex"]
FILLER = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "this",
    "that",
    "which",
    "are",
    "was",
    "be",
]


def make_word(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def make_corpus(num_passages: int = 120, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(passages, queries) as BEIR rows; query `q<i>` is answered by passage `p<i>`."""
    rng = random.Random(seed)
    vocabulary = sorted({make_word(rng) for _ in range(300)})
    passages, queries = [], []
    for number in range(num_passages):
        own = rng.sample(vocabulary, 6)
        words = [rng.choice(own) if rng.random() < 0.4 else rng.choice(FILLER) for _ in range(rng.randint(8, 30))] + own
        title = f"{own[0]} {own[1]}" if number % 4 else ""
        passages.append({"_id": f"p{number}", "title": title, "text": " ".join(words) + "."})
        asked = rng.sample(own, 3)
        queries.append({"_id": f"q{number}", "text": f"what is {asked[0]} with {asked[1]} {asked[2]}"})
    return passages, queries


def write_beir(folder: Path, *, num_passages: int = 120, seed: int = 0, splits: tuple[str, ...] = ("train", "dev", "test")) -> Path:
    """A BEIR folder; queries are dealt out to the splits 4 : 1 : 1."""
    passages, queries = make_corpus(num_passages, seed)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(passage) + "\n" for passage in passages)
    with gzip.open(folder / "queries.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(query | {"answers": [query["text"].split()[2]]}) + "\n" for query in queries)
    for split in splits:
        rows = [number for number in range(num_passages) if split_of(number) == split]
        lines = ["query-id\tcorpus-id\tscore\n", *(f"q{number}\tp{number}\t1\n" for number in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def write_msmarco(folder: Path, *, num_passages: int = 120, seed: int = 0) -> Path:
    """MS MARCO's TSV files with titles, as the RocketQA corpus has them."""
    passages, queries = make_corpus(num_passages, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{passage['_id'][1:]}\t{passage['title']}\t{passage['text']}\n" for passage in passages]
    (folder / "collection.tsv").write_text("".join(lines), encoding="utf-8")
    for split, name in (("train", "train"), ("test", "dev.small")):
        rows = [number for number in range(num_passages) if (split_of(number) == "test") == (split == "test")]
        (folder / f"queries.{name}.tsv").write_text("".join(f"{n}\t{queries[n]['text']}\n" for n in rows), encoding="utf-8")
        (folder / f"qrels.{name}.tsv").write_text("".join(f"{n}\t0\t{n}\t1\n" for n in rows), encoding="utf-8")
    return folder


def split_of(number: int) -> str:
    return {4: "dev", 5: "test"}.get(number % 6, "train")


TINY = [
    "model.start=scratch",
    'model.config={model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, '
    "max_position_embeddings=64}",
    "prepare.train_vocabulary=300",
    "prepare.max_passage_tokens=48",
    "prepare.max_query_tokens=16",
    "prepare.num_workers=1",
    "generator.source=train",
    "generator.hidden_size=16",
    "generator.num_attention_heads=2",
    "generator.intermediate_size=32",
    "generator.passages_per_step=16",
    "generator.held_out_passages=8",
    "generator.training.max_steps=3",
    "pretrain.passages_per_step=16",
    "pretrain.held_out_passages=8",
    "pretrain.training.max_steps=3",
    "mining.depth=20",
    "retriever1.queries_per_step=8",
    "retriever1.group_size=3",
    "retriever1.training.max_steps=3",
    "retriever2.queries_per_step=8",
    "retriever2.group_size=3",
    "retriever2.training.max_steps=3",
    "reranker.initial=start",
    "reranker.queries_per_step=4",
    "reranker.group_size=6",
    "reranker.train_hardest=3",
    "reranker.max_pair_tokens=64",
    "reranker.training.max_steps=3",
    "teacher.depth=8",
    "distilled.queries_per_step=8",
    "distilled.group_size=4",
    "distilled.training.max_steps=3",
    "rerank.depth=10",
    "search.depth=50",
    "evaluate.num_samples=200",
]
"""Overrides that bring any recipe down to seconds: a fresh tiny BERT, three steps a stage."""
