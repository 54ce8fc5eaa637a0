"""Training groups from a run over the training queries: what it ranks high and nobody judged relevant is a hard negative.

Left out: every passage judged relevant (any grade above 0), and every passage with the text of a relevant one, which is the same
answer under another id.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import open_artifact
from simlm.data.store import Store, Table
from simlm.errors import DataError
from simlm.rankings import Floats, Groups, Ints, Run, offsets_of
from simlm.recipe import MiningSettings
from simlm.stages import Context


def run(settings: MiningSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, run (of split train). Facts: how many queries became groups, which did not and why, and what was left out."""
    store = Store.open(inputs["store"])
    searched = Run.load(open_artifact(inputs["run"], "run").path, "train")
    groups, counts = mine(searched, store.qrels("train"), text_digests(store.passages, searched, store.qrels("train")), settings)
    context.record(**counts)
    if len(groups) == 0:
        raise DataError(
            f"{inputs['run']}: no training query has a relevant passage and a candidate negative: of {counts['num_queries']:,} queries "
            f"{counts['num_without_positive']:,} have no relevant passage and {counts['num_without_negatives']:,} no candidate; "
            "check that the training judgements name passages of this corpus, and that the corpus has more than those"
        )
    groups.save(context.work)
    left_out = counts["num_without_positive"] + counts["num_without_negatives"]
    context.progress.say(
        f"mined {counts['negatives_per_query']:.1f} negatives a query for {len(groups):,} queries"
        + (f"; {left_out:,} queries left out: {counts['num_without_positive']:,} without a relevant passage, "
           f"{counts['num_without_negatives']:,} without a candidate" if left_out else "")
    )  # fmt: skip


def mine(
    searched: Run, qrels: dict[int, dict[int, int]], digest_of: dict[int, bytes], settings: MiningSettings
) -> tuple[Groups, dict[str, int | float]]:
    """Groups of the queries that have a positive and a negative, in the order of the run, and what was counted on the way.

    qrels: query row -> {passage row: grade}. digest_of: passage row -> digest of its text, for every passage of the run and of the qrels.
    In this order: the first `depth` of the run; without positives and their copies; without the first `skip_top` of those; without those
    above `below_positive` (see `_ceiling`); the first `num_negatives`.
    """
    counts: Counter[str] = Counter()
    position_of = {int(query): position for position, query in enumerate(searched.query_rows)}
    # A judged query that the run does not have is a query without candidates.
    queries = [int(query) for query in searched.query_rows] + sorted(query for query in qrels if query not in position_of)
    kept: list[tuple[int, Ints, Floats, Ints, Floats]] = []
    for query in queries:
        positives = np.array(sorted(row for row, grade in qrels.get(query, {}).items() if grade > 0), dtype=np.int64)
        if len(positives) == 0:
            counts["num_without_positive"] += 1
            continue
        rows, scores = searched.ranked(position_of[query]) if query in position_of else (np.empty(0, np.int64), np.empty(0, np.float32))
        positive_scores = _scores_of(positives, rows, scores)
        counts["num_positive_in_run"] += bool(np.isfinite(positive_scores).any())
        negatives, negative_scores = _negatives(
            rows,
            scores,
            positives=positives,
            positive_scores=positive_scores,
            digest_of=digest_of,
            settings=settings,
            counts=counts,
        )
        if len(negatives) == 0:
            counts["num_without_negatives"] += 1
            continue
        counts["num_negatives"] += len(negatives)
        kept.append((query, positives, positive_scores, negatives, negative_scores))
    with_positive = len(queries) - counts["num_without_positive"]
    facts: dict[str, int | float] = {
        name: counts[name]
        for name in ("num_without_positive", "num_without_negatives", "num_negatives", "num_positives_left_out", "num_copies_left_out")
    }
    facts |= {
        "num_queries": len(queries),
        "num_groups": len(kept),
        "negatives_per_query": round(counts["num_negatives"] / max(len(kept), 1), 2),
        "positive_in_run": round(counts["num_positive_in_run"] / max(with_positive, 1), 4),
    }
    if settings.below_positive is not None:
        facts |= {name: counts[name] for name in ("num_above_ceiling", "num_without_ceiling")}
    return _grouped(kept), facts


def _negatives(
    rows: Ints,
    scores: Floats,
    *,
    positives: Ints,
    positive_scores: Floats,
    digest_of: dict[int, bytes],
    settings: MiningSettings,
    counts: Counter[str],
) -> tuple[Ints, Floats]:
    rows, scores = np.asarray(rows[: settings.depth]), np.asarray(scores[: settings.depth])
    relevant = np.isin(rows, positives)
    answers = {digest_of[int(row)] for row in positives}
    copies = np.fromiter((digest_of[int(row)] in answers for row in rows), dtype=bool, count=len(rows)) & ~relevant
    counts["num_positives_left_out"] += int(relevant.sum())
    counts["num_copies_left_out"] += int(copies.sum())
    chosen = np.flatnonzero(~relevant & ~copies)[settings.skip_top :]
    if settings.below_positive is not None:
        ceiling = _ceiling(positive_scores, settings.below_positive)
        if ceiling is None:
            counts["num_without_ceiling"] += 1
        else:
            above = scores[chosen] > ceiling
            counts["num_above_ceiling"] += int(above.sum())
            chosen = chosen[~above]
    chosen = chosen[: settings.num_negatives]
    return rows[chosen], scores[chosen]


def _ceiling(positive_scores: Floats, share: float) -> float | None:
    """The score that a negative must not exceed: `share` of the lowest score of a positive; None if the run has none of them.

    The lowest, so that it holds for each positive that the group can be trained with. For a score below 0 the share lowers it as much as
    it would lower a score of the same size above 0.
    """
    found = positive_scores[np.isfinite(positive_scores)]
    if len(found) == 0:
        return None
    lowest = float(found.min())
    return lowest - (1.0 - share) * abs(lowest)


def _scores_of(wanted: Ints, rows: Ints, scores: Floats) -> Floats:
    """The run's score of each wanted passage, NaN where it is not in the run."""
    found = np.full(len(wanted), np.nan, dtype=np.float32)
    places = np.flatnonzero(np.isin(rows, wanted))
    found[np.searchsorted(wanted, rows[places])] = scores[places]
    return found


def _grouped(kept: list[tuple[int, Ints, Floats, Ints, Floats]]) -> Groups:
    ints, floats = np.empty(0, np.int64), np.empty(0, np.float32)
    return Groups(
        "train",
        np.array([group[0] for group in kept], dtype=np.int64),
        offsets_of([len(group[1]) for group in kept]),
        np.concatenate([ints, *(group[1] for group in kept)]),
        np.concatenate([floats, *(group[2] for group in kept)]),
        offsets_of([len(group[3]) for group in kept]),
        np.concatenate([ints, *(group[3] for group in kept)]),
        np.concatenate([floats, *(group[4] for group in kept)]),
    )


def text_digests(passages: Table, searched: Run, qrels: dict[int, dict[int, int]]) -> dict[int, bytes]:
    """Digest of the normalised text of every passage that is in the run or judged."""
    judged: NDArray[np.int64] = np.array(sorted({row for grades in qrels.values() for row in grades}), dtype=np.int64)
    rows = np.unique(np.concatenate([np.asarray(searched.passage_rows), judged]))
    return {int(row): hashlib.blake2b(normalised(passages.text(int(row))).encode(), digest_size=8).digest() for row in rows}


def normalised(text: str) -> str:
    """Text as duplicates are told by: Unicode NFKC, case folded, runs of white space as one space; titles do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
