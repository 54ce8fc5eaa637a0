"""prepare: corpus, queries and judgements -> the token store.

All records are read and checked first (ids, text, judgements), so that bad input stops before the long work; then passages are tokenised
and written in parallel, streaming.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.data.datasets import open_dataset
from simlm.data.formats import BadRecords
from simlm.data.selection import Selection, select
from simlm.data.store import IdColumn
from simlm.data.store_writer import StoreWriter
from simlm.data.vocabulary import train_wordpiece
from simlm.recipe import PrepareSettings, expand_path
from simlm.stages import Context
from simlm.types import SPLITS, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# A new vocabulary is learned from at most so many passages, evenly spread: more change it next to nothing.
VOCABULARY_PASSAGES = 1_000_000
PEEKED_RECORDS = 20


def run(settings: PrepareSettings, inputs: dict[str, Path], context: Context) -> None:
    """Write the store into `context.work`. DataError names the place of what cannot be used."""
    check(settings)
    _clear(context)
    loader = open_dataset(settings.data, seed=context.seed)
    context.progress.say(f"reading and checking {settings.data.dataset} data")
    selection = select(loader, settings.data, seed=context.seed)
    tokenizer = _tokenizer(settings, selection)
    writer = StoreWriter(
        context.work,
        tokenizer,
        max_passage_tokens=settings.max_passage_tokens,
        max_query_tokens=settings.max_query_tokens,
        num_workers=settings.num_workers,
    )
    facts: dict[str, Any] = dict(selection.facts)
    rows = context.progress.track(selection.passages(), "passages", total=selection.num_passages, unit="passages")
    facts["passages"] = writer.write_passages(rows)
    facts["queries"], facts["judgements"] = {}, {}
    passage_ids = IdColumn(context.work / "passages")
    for split in SPLITS:
        if split in selection.sources:
            facts["queries"][split] = writer.write_queries(split, selection.queries(split))
            facts["judgements"][split] = _write_qrels(writer, selection, split, passage_ids)
    facts |= {"scripts": selection.scripts, "vocabulary": writer.info["vocabulary"], **loader.facts()}
    meta = _meta(settings)
    if meta:
        facts["source"] = meta
    writer.finish(scripts=selection.scripts, source={"dataset": settings.data.dataset, "path": settings.data.path or "", **meta})
    context.record(**facts)
    for message in _messages(facts, settings.data.splits):
        context.progress.say(message)


def check(settings: PrepareSettings) -> None:
    """Raise DataError for what a quick look shows: an unknown loader, option or field, absent files, first records that cannot be used."""
    loader = open_dataset(settings.data)
    if settings.data.dataset == "python-docs":
        return
    bad = BadRecords(settings.data.on_bad_record)
    _peek(loader.passages(bad))
    for split in SPLITS:
        _peek(loader.queries(split, bad))
        _peek(loader.qrels(split, bad))


def _peek(records: Iterator[Any]) -> None:
    for _ in zip(range(PEEKED_RECORDS), records, strict=False):
        pass


def _clear(context: Context) -> None:
    """Drop what an interrupted try has written: the store is written in one go."""
    for entry in context.work.iterdir():
        if entry == context.resume:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _tokenizer(settings: PrepareSettings, selection: Selection) -> PreTrainedTokenizerFast:
    if settings.train_vocabulary is None:
        from simlm.models.backbone import load_tokenizer

        return load_tokenizer(settings.tokenizer)
    return train_wordpiece(
        lambda: selection.texts(VOCABULARY_PASSAGES),
        settings.train_vocabulary,
        lowercase=settings.lowercase,
        # Taking accents off takes Korean syllables apart, and changes words of other scripts.
        strip_accents=settings.lowercase and selection.scripts.get("latin", 0.0) > 0.9,
    )


def _write_qrels(writer: StoreWriter, selection: Selection, split: Split, passage_ids: IdColumn) -> int:
    """Write the judgements of a split; returns their number. Those of queries or passages left out of the store are left out too."""
    query_ids = IdColumn(writer.path / "queries" / split)
    queries, passages, grades = array("q"), array("q"), array("i")
    for _, qrel in selection.loader.qrels(selection.sources[split], selection.bad):
        query, passage = query_ids.find(qrel.query_id), passage_ids.find(qrel.passage_id)
        if query is not None and passage is not None:
            queries.append(query)
            passages.append(passage)
            grades.append(qrel.grade)
    # A pair that is there twice counts once; the first is the one that the check let through.
    pairs = np.stack([np.array(queries, np.int64), np.array(passages, np.int64)])
    _, first = np.unique(pairs, axis=1, return_index=True)
    writer.write_qrels(split, pairs[0, first], pairs[1, first], np.array(grades, np.int32)[first])
    return len(first)


def _meta(settings: PrepareSettings) -> dict[str, str]:
    """Name, language, licence and source that a `meta.json` beside the corpus states."""
    if not settings.data.path:
        return {}
    file = expand_path(settings.data.path) / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(meta, dict):
        return {}
    return {key: meta[key] for key in ("name", "lang", "licence", "license", "source") if isinstance(meta.get(key), str)}


def _messages(facts: dict[str, Any], wanted: list[Split] | None) -> list[str]:
    """What a user should know at once. wanted: splits that were to be read, None for all."""
    passages, queries = facts["passages"], facts["queries"]
    counts = ", ".join(f"{queries[split]['rows']:,} {split}" for split in queries) or "none"
    lines = [
        f"store: {passages['rows']:,} passages of {passages['mean_tokens']} tokens on average ({passages['cut']:,} cut); queries: {counts}"
    ]
    if passages.get("with_metadata"):
        left_out = facts.get("metadata_left_out", ())
        more = f"; left out, as they are not single values: {', '.join(left_out)}" if left_out else ""
        lines.append(f"{passages['with_metadata']:,} passages have metadata to filter by{more}")
    if "train" not in queries and (wanted is None or "train" in wanted):
        lines.append(
            "no training queries: pre-training, BM25 and the indexes work; a trained retriever needs queries and qrels of the split train"
        )
    if "test" not in queries:
        lines.append("no test queries: measures will be on dev, if there is one")
    if facts.get("skipped"):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["skipped"].items())
        lines.append(f"skipped: {reasons}; the first: {facts['skipped_examples'][0]}")
    for shared, count in facts.get("queries_in_several_splits", {}).items():
        lines.append(f"{count:,} queries are in {shared}: measures on them look better than they are")
    return lines
