"""make_queries: a store without training queries -> the same passages with queries made from them.

Inputs: "store" (the corpus; its test queries are taken along, others it does not have), "index" (BM25 over it: the weights of words).
Output: a store with the pseudo queries as train and, of a share of the passages, as dev; each is judged relevant to the passages it was
made from. Answers of an endpoint are kept beside the artifact, in ENDPOINT_ANSWERS.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from simlm.data.pseudo_queries import (
    Drawing,
    Lengths,
    PseudoQuery,
    Weigh,
    allot,
    counts_of,
    parted,
    united,
)
from simlm.data.query_endpoint import Endpoint, Request
from simlm.data.store import Store, id_hash
from simlm.data.store_writer import Row, StoreWriter
from simlm.errors import DataError
from simlm.index import open_index
from simlm.index.bm25 import BM25Index
from simlm.recipe import ENDPOINT_QUERY_KINDS, PseudoQuerySettings
from simlm.stages import Context
from simlm.types import Split

ENDPOINT_ANSWERS = "endpoint_answers"
_DEV_PARTS = 1 << 32
_SATURATION = 0.9
"""BM25's k1 (Anserini's), for how much a word gains by being there often."""


def run(settings: PseudoQuerySettings, inputs: dict[str, Path], context: Context) -> None:
    """Facts: made, kept and left out by kind, requests asked and answered without a query, num_passages_asked_for."""
    store = Store.open(inputs["store"])
    index = cast("BM25Index", open_index(inputs["index"]))
    _clear(context)
    drawing = Drawing(
        store.passages,
        seed=context.seed,
        lengths=Lengths(settings.words[0], settings.words[1], _pair(settings.keywords), _pair(settings.title_keywords)),
        drop_words=settings.drop_words,
        weigh=weigher(index),
        per_passage=settings.queries_per_passage,
        max_positives=settings.max_positives,
    )
    facts: dict[str, Any] = {}
    asked = _from_endpoint(settings, drawing, context, facts)
    own = {kind: share for kind, share in settings.kinds.items() if kind not in ENDPOINT_QUERY_KINDS}
    made = asked + (drawing.draw(own, settings.num_queries - len(asked)) if own else [])
    facts["made"] = counts_of(made)
    queries, num_ambiguous = united(made, settings.max_positives)
    train, dev, num_on_both_sides = parted(queries, _is_dev(store, settings.dev_fraction, context.seed))
    if not train:
        raise DataError(_why_none(settings, store, made))
    facts |= {
        "kinds": {"train": counts_of(train), "dev": counts_of(dev)},
        "num_same_text": len(made) - len(queries) - num_ambiguous,
        "num_ambiguous": num_ambiguous,
        "num_on_both_sides": num_on_both_sides,
        "num_passages_asked_for": len({row for query in train + dev for row in query.passage_rows}),
    }
    _write(store, {"train": train, "dev": dev}, context)
    context.record(**facts)
    _say(settings, facts, len(train), len(dev), context)


def weigher(index: BM25Index) -> Weigh:
    """Words of a text with their BM25 weights in it: rarity in the corpus, and how often the text has them.

    Where words are not separated, or one word gives several terms (Chinese: pairs of characters), the terms stand for it.
    """
    terms_of: dict[str, tuple[tuple[str, str], ...]] = {}

    def terms(word: str) -> tuple[tuple[str, str], ...]:
        if word not in terms_of:
            found = index.analyzer.terms(word)
            whole = len(found) <= 1 or found[0] == word.casefold()
            terms_of[word] = tuple((word, term) for term in found[:1]) if whole else tuple((term, term) for term in found)
        return terms_of[word]

    def weigh(text: str) -> Sequence[tuple[str, float]]:
        shown = [pair for word in _WORD.findall(text) for pair in terms(word)]
        counts = Counter(term for _, term in shown)
        return [
            (word, index.inverse_document_frequency(term) * counts[term] * (1 + _SATURATION) / (counts[term] + _SATURATION))
            for word, term in shown
        ]

    return weigh


_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def _from_endpoint(settings: PseudoQuerySettings, drawing: Drawing, context: Context, facts: dict[str, Any]) -> list[PseudoQuery]:
    if settings.endpoint is None:
        return []
    counts = {kind: count for kind, count in allot(settings.kinds, settings.num_queries).items() if kind in ENDPOINT_QUERY_KINDS}
    endpoint = Endpoint(settings.endpoint, context.builder.path.parent / ENDPOINT_ANSWERS, seed=context.seed)
    table = drawing.passages
    chosen = [
        (kind, number, row) for kind, count in counts.items() for _, (number, row) in zip(range(count), drawing.places(kind), strict=False)
    ]
    requests = [Request(kind, table.ids[row], table.title(row), table.text(row), number) for kind, number, row in chosen]
    bar = context.progress.bar(f"ask {settings.endpoint.model}", total=len(requests), unit="queries")
    try:
        answers = endpoint.ask(requests, on_answer=lambda: bar.update(1))
    finally:
        bar.close()
    facts["endpoint"] = {"asked": endpoint.num_asked, "kept_before": len(requests) - endpoint.num_asked, "no_query": answers.count(None)}
    return [
        PseudoQuery(f"{kind}/{number}/{table.ids[row]}", kind, text, (row,))
        for (kind, number, row), text in zip(chosen, answers, strict=True)
        if text is not None
    ]


def _pair(limits: list[int]) -> tuple[int, int]:
    return limits[0], limits[1]


def _is_dev(store: Store, fraction: float, seed: int) -> Any:
    """Row -> whether the passage is one of the share whose queries are dev: a function of seed and passage id."""
    bound = fraction * _DEV_PARTS
    return lambda row: id_hash(f"dev/{store.passages.ids[row]}", seed) % _DEV_PARTS < bound


def _clear(context: Context) -> None:
    """Drop what an interrupted try has written: the store is written in one go."""
    for entry in context.work.iterdir():
        if entry != context.resume:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _write(store: Store, queries: dict[Split, list[PseudoQuery]], context: Context) -> None:
    writer = StoreWriter(
        context.work,
        store.tokenizer(),
        max_passage_tokens=int(store.info["max_passage_tokens"]),
        max_query_tokens=int(store.info["max_query_tokens"]),
    )
    writer.take_passages(store)
    for split, made in queries.items():
        if made:
            writer.write_queries(split, (Row(query.query_id, query.text) for query in made))
            query_rows = np.repeat(np.arange(len(made)), [len(query.passage_rows) for query in made])
            passage_rows = np.array([row for query in made for row in query.passage_rows], dtype=np.int64)
            writer.write_qrels(split, query_rows, passage_rows, np.ones(len(passage_rows), dtype=np.int32))
    if "test" in store.splits:
        writer.take_queries(store, "test", np.arange(len(store.queries("test"))))
    writer.finish(**{name: store.info[name] for name in ("scripts", "source") if name in store.info})


def _why_none(settings: PseudoQuerySettings, store: Store, made: Sequence[PseudoQuery]) -> str:
    titled = store.info["tables"]["passages"]["with_title"]
    if made:
        return (
            f"pseudo_queries: no training query is left of {len(made):,}: each is given by more than {settings.max_positives} passages, "
            "or by one whose queries became dev queries; raise max_positives, or lower dev_fraction"
        )
    reasons = []
    if {"title", "title_keywords"} & settings.kinds.keys():
        shared = f", and titles that more than {settings.max_positives} passages share are left out" if titled else ""
        reasons.append(f"{titled:,} of {len(store.passages):,} passages have a title{shared}")
    if settings.kinds.keys() - {"title", *ENDPOINT_QUERY_KINDS}:
        reasons.append(f"crops and sentences need {settings.words[0]} words (`words`), keyword queries {settings.keywords[0]} (`keywords`)")
    if settings.endpoint is not None:
        reasons.append("the endpoint's answers hold no query")
    return (
        f"pseudo_queries: none of the kinds {', '.join(settings.kinds)} gives a query for any of the {len(store.passages):,} passages: "
        f"{'; '.join(reasons)}. Name other kinds, or lower the limits"
    )


def _say(settings: PseudoQuerySettings, facts: dict[str, Any], num_train: int, num_dev: int, context: Context) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"]["train"].items())
    context.progress.say(f"made {num_train:,} training queries ({kinds}) and {num_dev:,} dev queries from the passages")
    absent = [kind for kind in settings.kinds if not facts["made"].get(kind)]
    if absent:
        context.progress.say(f"make_queries: the corpus gives no query of the kind {', '.join(absent)}; the others make up for it")
    if settings.dev_fraction and not num_dev:
        context.progress.say(f"make_queries: dev_fraction {settings.dev_fraction} of so few passages gives no dev query")
