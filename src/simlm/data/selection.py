"""Which records of a data set go into a store: everything is read once and checked before the long work begins.

Ids are held as 64-bit hashes (8 bytes a record), so memory stays small whatever the corpus is; where hashes say that two records
have one id, or that an id is unknown, the records are read again and compared by the ids themselves.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.data.datasets import Loader, sets_dev_apart
from simlm.data.formats import BadRecords
from simlm.data.store import id_hash
from simlm.data.store_writer import Row
from simlm.errors import DataError
from simlm.recipe import DataSettings
from simlm.types import SPLITS, Passage, Query, Split

Hashes = NDArray[np.uint64]

SCRIPTS = {
    "latin": "A-Za-z\u00c0-\u024f",
    "greek": "\u0370-\u03ff",
    "cyrillic": "\u0400-\u04ff",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "kana": "\u3040-\u30ff",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
}
_SCRIPT = {name: re.compile(f"[{characters}]") for name, characters in SCRIPTS.items()}
SAMPLED_PASSAGES, SAMPLED_CHARACTERS = 2000, 200


@dataclass
class Selection:
    """What goes into the store.

    num_passages: passages kept. scripts: share of each script among the letters of the first passages.
    sources: split of the store -> split of the data set that it comes from (dev may come from train).
    facts: what was found, left out or set apart, as JSON.
    """

    loader: Loader
    bad: BadRecords
    num_passages: int
    scripts: dict[str, float]
    sources: dict[Split, Split]
    facts: dict[str, Any]
    _skipped: set[int]
    _kept: NDArray[np.bool_] | None
    _queries: dict[Split, set[int]]

    def passages(self) -> Iterator[Row]:
        """Passages kept, in the order of the corpus."""
        for number, (_, passage, _) in enumerate(_with_text(self.loader, self.bad)):
            if number not in self._skipped and (self._kept is None or self._kept[number]):
                yield Row(passage.passage_id, passage.text, passage.title, metadata=passage.metadata)

    def queries(self, split: Split) -> Iterator[Row]:
        """Queries kept for a split of the store."""
        wanted, given = self._queries[split], set[str]()
        for _, query in _valid_queries(self.loader, self.sources[split], self.bad):
            # The second record of a duplicate id was reported when all was checked.
            if id_hash(query.query_id) in wanted and query.query_id not in given:
                given.add(query.query_id)
                yield Row(query.query_id, query.text, answers=query.answers)

    def texts(self, limit: int) -> Iterator[str]:
        """Title and text of passages kept, about `limit` of them, evenly spread."""
        stride = max(1, self.num_passages // limit)
        for number, row in enumerate(self.passages()):
            if number % stride == 0:
                yield f"{row.title} {row.text}" if row.title else row.text


def select(loader: Loader, settings: DataSettings, *, seed: int) -> Selection:
    """Read and check all records, then choose.

    Raises DataError at the first record that cannot be used, or, where bad records are skipped, if nothing is left.
    Choices: dev is set apart from train where there is no dev; `max_queries` of each split; `max_passages`, judged ones first; training
    queries without a positive are left out, those of dev and test stay (they are judged, so they count).
    """
    bad = BadRecords(settings.on_bad_record)
    corpus = _scan_corpus(loader, settings, bad, draw=seed if settings.max_passages else None)
    facts: dict[str, Any] = {"passages_with_title_only": corpus.title_only}
    judged = {split: found for split in SPLITS if len((found := _scan_split(loader, split, corpus, bad, seed)).hashes)}
    facts["queries_without_positive"] = {split: found.without_positive for split, found in judged.items() if found.without_positive}
    facts["repeated_judgements"] = {split: found.repeated_judgements for split, found in judged.items() if found.repeated_judgements}
    facts["queries_without_judgement"] = _without_judgement(judged)
    if "train" in judged:
        judged["train"] = judged["train"].with_positive()
    sources: dict[Split, Split] = {split: split for split in judged}
    if sets_dev_apart(settings, list(judged)) and len(judged["train"].hashes) > 1:
        judged["train"], judged["dev"] = judged["train"].parted(settings.dev_fraction)
        sources["dev"] = "train"
        facts["dev_set_apart_from_train"] = len(judged["dev"].hashes)
    judged = {split: found.sample(settings.max_queries.get(split)) for split, found in judged.items()}
    kept = _sample_passages(corpus, judged, settings.max_passages)
    if kept is not None:
        judged = {split: found.among(corpus.hashes[kept]) for split, found in judged.items()}
        if "train" in judged:
            judged["train"] = judged["train"].with_positive()
    judged = {split: judged[split] for split in SPLITS if split in judged and len(judged[split].hashes)}
    facts["queries_in_several_splits"] = _overlap(judged)
    facts["skipped"] = dict(bad.counts)
    facts["skipped_examples"] = bad.examples
    return Selection(
        loader,
        bad,
        len(corpus.hashes) - len(corpus.skipped) if kept is None else int(kept.sum()),
        corpus.scripts,
        {split: sources[split] for split in judged},
        {name: value for name, value in facts.items() if value},
        corpus.skipped,
        kept,
        {split: set(found.hashes.tolist()) for split, found in judged.items()},
    )


# --- corpus


@dataclass(frozen=True)
class _Corpus:
    """hashes: of every record with text, in file order; skipped: numbers of records whose id was used before; known: hashes, sorted."""

    hashes: Hashes
    draws: Hashes | None
    skipped: set[int]
    known: Hashes
    title_only: int
    scripts: dict[str, float]


def _with_text(loader: Loader, bad: BadRecords) -> Iterator[tuple[str, Passage, bool]]:
    """Passages with text; one with a title alone (the last value is True then) gets the title as its text."""
    for where, passage in loader.passages(bad):
        if passage.text:
            yield where, passage, False
        elif passage.title:
            yield where, replace(passage, text=passage.title, title=""), True
        else:
            bad.report(where, "empty passage", f"passage {passage.passage_id!r} has neither text nor title")


def _scan_corpus(loader: Loader, settings: DataSettings, bad: BadRecords, *, draw: int | None) -> _Corpus:
    hashes, draws = array("Q"), array("Q")
    scripts: Counter[str] = Counter()
    missing = set(settings.metadata_fields or ())
    title_only = 0
    for number, (_, passage, titled) in enumerate(_with_text(loader, bad)):
        hashes.append(id_hash(passage.passage_id))
        if draw is not None:
            draws.append(id_hash(passage.passage_id, draw))
        if number < SAMPLED_PASSAGES:
            for name, pattern in _SCRIPT.items():
                scripts[name] += len(pattern.findall(passage.text[:SAMPLED_CHARACTERS]))
        title_only += titled
        missing.difference_update(passage.metadata)
    if not hashes:
        skipped = f" ({sum(bad.counts.values()):,} records were skipped, the first: {bad.examples[0]})" if bad.examples else ""
        raise DataError(f"the corpus has no passages{skipped}; check data.path and data.corpus")
    if missing:
        # A slip of the pen would otherwise show only when a filter finds nothing.
        absent = ", ".join(map(repr, sorted(missing)))
        raise DataError(f"data.metadata_fields: no passage has a field {absent}; give names of the corpus's columns, or leave them out")
    found = np.array(hashes, dtype=np.uint64)
    names = ((where, passage.passage_id) for where, passage, _ in _with_text(loader, bad))
    letters = max(sum(scripts.values()), 1)
    return _Corpus(
        found,
        np.array(draws, dtype=np.uint64) if draw is not None else None,
        _report_duplicates(names, found, "passage", bad),
        np.unique(found),
        title_only,
        {name: round(count / letters, 4) for name, count in scripts.most_common() if count},
    )


def _report_duplicates(names: Iterator[tuple[str, str]], hashes: Hashes, kind: str, bad: BadRecords) -> set[int]:
    """Numbers of records whose id an earlier one has; `names` are read only if hashes repeat."""
    known, counts = np.unique(hashes, return_counts=True)
    suspects = set(known[counts > 1].tolist())
    first: dict[str, str] = {}
    repeated: set[int] = set()
    if not suspects:
        return repeated
    for number, (where, name) in enumerate(names):
        if id_hash(name) not in suspects:
            continue
        if name in first:
            bad.report(where, "duplicate id", f"{kind} id {name!r} is used twice, first at {first[name]}")
            repeated.add(number)
        else:
            first[name] = where
    return repeated


def _sample_passages(corpus: _Corpus, judged: dict[Split, _Judged], limit: int | None) -> NDArray[np.bool_] | None:
    """Which records of the corpus are kept: positives first, then other judged ones, then the rest, each by seeded draw; None = all."""
    usable = np.ones(len(corpus.hashes), dtype=bool)
    usable[list(corpus.skipped)] = False
    if limit is None or int(usable.sum()) <= limit:
        return None
    assert corpus.draws is not None
    rank = np.full(len(corpus.hashes), 2, dtype=np.int64)
    for found in judged.values():
        rank[np.isin(corpus.hashes, found.passages)] = np.minimum(rank[np.isin(corpus.hashes, found.passages)], 1)
    for found in judged.values():
        rank[np.isin(corpus.hashes, found.passages[found.grades > 0])] = 0
    rank[~usable] = 3
    kept = np.zeros(len(corpus.hashes), dtype=bool)
    kept[np.lexsort((corpus.draws, rank))[:limit]] = True
    return kept


# --- queries and judgements


@dataclass(frozen=True)
class _Judged:
    """Judged queries of a split, and their judgements.

    hashes, draws: of each query, in file order; queries, passages, grades: of each judgement (hashes, hashes, int32).
    all_queries: hashes of the queries read for this split, judged or not.
    """

    hashes: Hashes
    draws: Hashes
    queries: Hashes
    passages: Hashes
    grades: NDArray[np.int32]
    without_positive: int = 0
    repeated_judgements: int = 0
    all_queries: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))

    def only(self, chosen: NDArray[np.bool_]) -> _Judged:
        """These queries alone, with their judgements."""
        hashes = self.hashes[chosen]
        theirs = np.isin(self.queries, hashes)
        return replace(
            self,
            hashes=hashes,
            draws=self.draws[chosen],
            queries=self.queries[theirs],
            passages=self.passages[theirs],
            grades=self.grades[theirs],
        )

    def with_positive(self) -> _Judged:
        return self.only(np.isin(self.hashes, self.queries[self.grades > 0]))

    def sample(self, limit: int | None) -> _Judged:
        """At most `limit` queries, by seeded draw."""
        if limit is None or len(self.hashes) <= limit:
            return self
        chosen = np.zeros(len(self.hashes), dtype=bool)
        chosen[np.argsort(self.draws, kind="stable")[:limit]] = True
        return self.only(chosen)

    def parted(self, fraction: float) -> tuple[_Judged, _Judged]:
        """(the rest, a share of `fraction`): at least one query on either side. The draw is not the one of `sample`."""
        count = min(max(round(len(self.hashes) * fraction), 1), len(self.hashes) - 1)
        apart = np.zeros(len(self.hashes), dtype=bool)
        apart[np.argsort(self.draws, kind="stable")[::-1][:count]] = True
        return self.only(~apart), self.only(apart)

    def among(self, passages: Hashes) -> _Judged:
        """Queries that keep a judgement when only `passages` are left."""
        left = np.isin(self.passages, passages)
        found = replace(self, queries=self.queries[left], passages=self.passages[left], grades=self.grades[left])
        return found.only(np.isin(found.hashes, found.queries))


def _valid_queries(loader: Loader, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
    for where, query in loader.queries(split, bad):
        if query.text:
            yield where, query
        else:
            bad.report(where, "empty query", f"query {query.query_id!r} has no text")


def _scan_split(loader: Loader, split: Split, corpus: _Corpus, bad: BadRecords, seed: int) -> _Judged:
    """Judged queries of a split; reports unknown ids, duplicate query ids and judgements that contradict each other."""
    queries, passages, grades = array("Q"), array("Q"), array("i")
    for _, qrel in loader.qrels(split, bad):
        queries.append(id_hash(qrel.query_id))
        passages.append(id_hash(qrel.passage_id))
        grades.append(qrel.grade)
    hashes, draws = array("Q"), array("Q")
    if queries:
        for _, query in _valid_queries(loader, split, bad):
            hashes.append(id_hash(query.query_id))
            draws.append(id_hash(query.query_id, seed))
    found = np.array(hashes, dtype=np.uint64)
    names = ((where, query.query_id) for where, query in _valid_queries(loader, split, bad))
    repeated = _report_duplicates(names, found, "query", bad)
    single = np.ones(len(found), dtype=bool)
    single[list(repeated)] = False
    found = found[single]
    judged = _Judged(
        found,
        np.array(draws, dtype=np.uint64)[single],
        np.array(queries, dtype=np.uint64),
        np.array(passages, dtype=np.uint64),
        np.array(grades, dtype=np.int32),
    )
    judged = _report_qrels(loader, split, judged, corpus, bad)
    known = judged.only(np.isin(judged.hashes, judged.queries))
    without_positive = len(known.hashes) - len(known.with_positive().hashes)
    return replace(known, without_positive=without_positive, all_queries=found)


def _report_qrels(loader: Loader, split: Split, judged: _Judged, corpus: _Corpus, bad: BadRecords) -> _Judged:
    """The judgements without unknown ids and repetitions; the first of two that contradict each other stays."""
    order = np.lexsort((judged.passages, judged.queries))
    queries, passages = judged.queries[order], judged.passages[order]
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:]] = (queries[1:] == queries[:-1]) & (passages[1:] == passages[:-1])
    flags = _QrelFlags(np.isin(judged.queries, judged.hashes), np.isin(judged.passages, corpus.known), repeated)
    good = flags.known_query & flags.known_passage & ~repeated
    if not good.all():
        _report_bad_qrels(loader, split, judged, flags, bad)
    return replace(
        judged,
        queries=judged.queries[good],
        passages=judged.passages[good],
        grades=judged.grades[good],
        repeated_judgements=int((repeated & flags.known_query & flags.known_passage).sum()),
    )


@dataclass(frozen=True)
class _QrelFlags:
    """Of each judgement in file order; repeated: an earlier one has the same query and passage."""

    known_query: NDArray[np.bool_]
    known_passage: NDArray[np.bool_]
    repeated: NDArray[np.bool_]


def _report_bad_qrels(loader: Loader, split: Split, judged: _Judged, flags: _QrelFlags, bad: BadRecords) -> None:
    """Read the judgements again and report those with unknown ids and those that contradict an earlier one."""
    repeated = set(zip(judged.queries[flags.repeated].tolist(), judged.passages[flags.repeated].tolist(), strict=True))
    grades: dict[tuple[int, int], int] = {}
    advice = "check that both come from the same version of the data set"
    for number, (where, qrel) in enumerate(loader.qrels(split, bad)):
        if not flags.known_passage[number]:
            message = f"the judgement names passage {qrel.passage_id!r}, absent from the corpus; {advice}"
            bad.report(where, "unknown passage id", message)
        elif not flags.known_query[number]:
            message = f"the judgement names query {qrel.query_id!r}, absent from the {len(judged.hashes):,} {split} queries; {advice}"
            bad.report(where, "unknown query id", message)
        elif repeated:
            pair = (id_hash(qrel.query_id), id_hash(qrel.passage_id))
            if pair in repeated and grades.setdefault(pair, qrel.grade) != qrel.grade:
                message = f"grade {qrel.grade} contradicts grade {grades[pair]} for the same query and passage given before"
                bad.report(where, "contradicting judgement", message)


def _without_judgement(judged: dict[Split, _Judged]) -> int:
    """Queries that no split judges; they are left out."""
    if not judged:
        return 0
    read = np.unique(np.concatenate([found.all_queries for found in judged.values()]))
    return len(np.setdiff1d(read, np.concatenate([found.hashes for found in judged.values()])))


def _overlap(judged: dict[Split, _Judged]) -> dict[str, int]:
    """Queries that two splits share, e.g. {"train and test": 3}: a leak that makes measures look better than they are."""
    pairs = [(first, second) for first in judged for second in judged if SPLITS.index(first) < SPLITS.index(second)]
    shared = {f"{first} and {second}": len(np.intersect1d(judged[first].hashes, judged[second].hashes)) for first, second in pairs}
    return {name: count for name, count in shared.items() if count}
