"""filter_queries: the round trip of pseudo queries; those whose own passage is not found again are left out.

Source: consistency filtering of Promptagator (arXiv 2209.11755) and InPars-v2 (arXiv 2301.01820).
Inputs: "store" (of make_queries), "run" (its train and dev queries searched; absent where nobody filters), "bm25" (the same, searched with
BM25, for `trivial_share`). Output: a store with the queries kept. The runs are read, nothing is searched: another limit costs seconds.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import open_artifact
from simlm.data.store import Ints, Store, id_hash
from simlm.data.store_writer import StoreWriter
from simlm.errors import DataError
from simlm.rankings import Run
from simlm.recipe import ConsistencySettings
from simlm.stages import Context
from simlm.types import Split

Bools = NDArray[np.bool_]


def run(settings: ConsistencySettings, inputs: dict[str, Path], context: Context) -> None:
    """Facts, by split: num_queries, not_found, trivial, trivial_left_out, kept, and kept_kinds (kind -> queries)."""
    store = Store.open(inputs["store"])
    kept: dict[Split, Ints] = {}
    facts: dict[str, Any] = {}
    for split in (split for split in store.splits if split != "test"):
        searched = Run.load(open_artifact(inputs["run"], "run").path, split) if "run" in inputs else None
        by_words = Run.load(open_artifact(inputs["bm25"], "run").path, split) if "bm25" in inputs else None
        kept[split], facts[split] = _kept(settings, store, split, searched, by_words, context.seed)
    if not len(kept["train"]):
        raise DataError(
            f"consistency: none of the {facts['train']['num_queries']:,} pseudo queries is left: {facts['train']['not_found']:,} do not "
            f"find their passage among the first {settings.within} ({settings.by}), {facts['train']['trivial_left_out']:,} are trivial; "
            "raise consistency.within or trivial_share, or make other kinds of queries"
        )
    _write(store, kept, context)
    context.record(**facts)
    counts = facts["train"]
    context.progress.say(
        f"kept {counts['kept']:,} of {counts['num_queries']:,} pseudo queries: {counts['not_found']:,} do not find their passage among the "
        f"first {settings.within} ({settings.by}), {counts['trivial_left_out']:,} are left out as trivial"
    )


def own_ranks(searched: Run, qrels: dict[int, dict[int, int]], num_queries: int) -> Ints:
    """int64 [Q]: rank (from 1) of the best-ranked relevant passage of each query; 0 where the run does not have one."""
    ranks = np.zeros(num_queries, dtype=np.int64)
    for query, rows, _ in searched:
        places = np.flatnonzero(np.isin(rows, list(qrels.get(query, {}))))
        if len(places):
            ranks[query] = places[0] + 1
    return ranks


def trivial(by_words: Run, qrels: dict[int, dict[int, int]], num_queries: int, margin: float) -> Bools:
    """bool [Q]: whether BM25 has a relevant passage first, and no other passage within `margin` (a share of its score) of it."""
    found = np.zeros(num_queries, dtype=bool)
    for query, rows, scores in by_words:
        relevant = np.isin(rows, list(qrels.get(query, {})))
        if len(rows) and relevant[0]:
            others = scores[~relevant]
            found[query] = len(others) == 0 or float(scores[0] - others[0]) >= margin * float(scores[0])
    return found


def _kept(
    settings: ConsistencySettings, store: Store, split: Split, searched: Run | None, by_words: Run | None, seed: int
) -> tuple[Ints, dict[str, Any]]:
    table, qrels = store.queries(split), store.qrels(split)
    count = len(table)
    consistent = np.ones(count, dtype=bool)
    if searched is not None:
        ranks = own_ranks(searched, qrels, count)
        consistent = (ranks > 0) & (ranks <= settings.within)
    easy = trivial(by_words, qrels, count, settings.trivial_margin) & consistent if by_words is not None else np.zeros(count, dtype=bool)
    dropped = _surplus(easy, int(consistent.sum()) - int(easy.sum()), settings.trivial_share, table.ids, seed)
    chosen = np.flatnonzero(consistent & ~dropped).astype(np.int64)
    return chosen, {
        "num_queries": count,
        "not_found": count - int(consistent.sum()),
        "trivial": int(easy.sum()),
        "trivial_left_out": int(dropped.sum()),
        "kept": len(chosen),
        "kept_kinds": dict(sorted(Counter(table.ids[int(row)].partition("/")[0] for row in chosen).items())),
    }


def _surplus(easy: Bools, num_others: int, share: float, ids: Any, seed: int) -> Bools:
    """Trivial queries beyond `share` of what is kept; those to go are drawn by (seed, query id)."""
    dropped = np.zeros(len(easy), dtype=bool)
    rows = np.flatnonzero(easy)
    most = len(rows) if share == 1.0 else int(num_others * share / (1.0 - share))
    order = sorted(rows.tolist(), key=lambda row: id_hash(ids[row], seed))
    dropped[order[most:]] = True
    return dropped


def _write(store: Store, kept: dict[Split, Ints], context: Context) -> None:
    for entry in context.work.iterdir():
        if entry != context.resume:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    writer = StoreWriter(
        context.work,
        store.tokenizer(),
        max_passage_tokens=int(store.info["max_passage_tokens"]),
        max_query_tokens=int(store.info["max_query_tokens"]),
    )
    writer.take_passages(store)
    for split in store.splits:
        rows = kept.get(split, np.arange(len(store.queries(split)), dtype=np.int64))
        if len(rows):
            writer.take_queries(store, split, rows)
    writer.finish(**{name: store.info[name] for name in ("scripts", "source") if name in store.info})
