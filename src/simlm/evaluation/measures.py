"""Retrieval measures by ir_measures, for every judged query.

Source: ir_measures (pytrec_eval, that is trec_eval 9, where it supports a measure).
What counts: every query with a judgement. A judged query that the run lacks scores 0 (trec_eval leaves it out unless told `-c`);
a judged query without any relevant passage scores 0 too, as in trec_eval; a query of the run without judgements is ignored.
Ties: the order of the run is what is measured. trec_eval sorts equal scores by passage id; ir_measures is therefore given scores that
fall by one with each rank, so that ids never decide.
Grades below 0 count as 0, judged not relevant.
"""

from __future__ import annotations

import ast
import difflib
import gzip
import math
import re
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from simlm.errors import DataError, RecipeError
from simlm.rankings import Run
from simlm.types import Split

DEFAULT_MEASURES = ("RR@10", "nDCG@10", "R@50", "R@100", "R@1000")
"""Those of the paper's table 2 (RR@10, R@50, R@1000, nDCG@10), and R@100 of its table 4."""

# Queries turned into trec_eval's dictionaries at once: bounds memory at depth 1000 to some 50 MB.
_CHUNK_QUERIES = 512

_BLANK = re.compile(r"\s")

Floats = NDArray[np.float64]


class JudgedStore(Protocol):
    """What is needed of a store: its judgements."""

    def qrels(self, split: Split) -> Mapping[int, Mapping[int, int]]: ...


@dataclass(frozen=True)
class PerQuery:
    """Values of each judged query. values: measure -> float64 [Q], in the order of `query_ids`."""

    query_ids: list[Any]
    values: dict[str, Floats]

    def averages(self) -> dict[str, float]:
        """Measure -> mean over the queries (the sum, for the few measures that count: NumQ, NumRet, NumRel)."""
        return {name: average(name, values) for name, values in self.values.items()}


def evaluate_run(
    run: str | Path | Mapping[str, Any] | Run,
    qrels: str | Path | Mapping[str, Mapping[str, int]] | Mapping[int, Mapping[int, int]] | JudgedStore,
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> dict[str, float]:
    """Measure -> its average over every judged query.

    run: a TREC run file (plain or .gz); {query id: {passage id: score}} or {query id: [passage ids, best first]}; or a Run.
    qrels: a TREC or BEIR qrels file; {query id: {passage id: grade}}; or, for a Run, its store.
    measures: names as ir_measures writes them: RR@10, nDCG@10, R@1000, R(rel=2)@50, AP, P@5 ...
    Equal scores: a file keeps its rank column's order, a dictionary its own order, a Run the smaller passage row first.
    Raises RecipeError for an unknown measure, DataError for unusable input or if run and qrels have no query in common.
    """
    return evaluate_queries(*_ranked_and_qrels(run, qrels), measures).averages()


def evaluate_queries(
    ranked: Mapping[Any, Sequence[Hashable] | NDArray[np.int64]],
    qrels: Mapping[Any, Mapping[Any, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
) -> PerQuery:
    """The measures of each judged query; ranked: query -> passages best first, the same keys as qrels.

    Raises RecipeError for an unknown measure, DataError if `ranked` has queries and none of them is judged.
    """
    parsed = {name: parse_measure(name) for name in measures}
    query_ids = [query for query, grades in qrels.items() if len(grades)]
    if len(ranked) and query_ids and not any(query in ranked for query in query_ids):
        raise DataError(
            f"none of the {len(ranked):,} queries of the run is among the {len(query_ids):,} judged ones "
            f"(the run has {next(iter(ranked))!r}, the qrels {query_ids[0]!r}); check that both are of the same data set and split"
        )
    values = {name: np.zeros(len(query_ids)) for name in parsed}
    depths = _by_depth(parsed)
    deepest = None if None in depths else max((depth for depth in depths if depth is not None), default=0)
    for start in range(0, len(query_ids), _CHUNK_QUERIES):
        chunk = [_Ranking.of(ranked.get(query, ()), qrels[query], deepest) for query in query_ids[start : start + _CHUNK_QUERIES]]
        judged = {str(position): ranking.judged for position, ranking in enumerate(chunk)}
        for depth, names in depths.items():
            of_measure = {parsed[name]: name for name in names}
            run = {str(position): ranking.scores(depth) for position, ranking in enumerate(chunk) if ranking.length}
            for metric in _evaluator(list(of_measure), judged).iter_calc(run):
                values[of_measure[metric.measure]][start + int(metric.query_id)] = metric.value
    for name, same in _aliases(parsed).items():
        values[name] = values[same]
    return PerQuery(query_ids, values)


def measure_run(run: Run, qrels: Mapping[int, Mapping[int, int]], measures: Sequence[str] = DEFAULT_MEASURES) -> dict[str, float]:
    """Measure -> its average over every judged query; qrels: query row -> {passage row: grade}, as a store gives them."""
    return evaluate_queries(ranked_passages(run), qrels, measures).averages()


def ranked_passages(run: Run) -> dict[int, NDArray[np.int64]]:
    """Query row -> passage rows best first, as `evaluate_queries` takes them."""
    return {query: np.asarray(passages) for query, passages, _ in run}


def average(name: str, values: Floats) -> float:
    """Mean over the queries, or the sum where the measure is a count; 0 for no queries."""
    if not len(values):
        return 0.0
    aggregator = parse_measure(name).aggregator()
    return float(values.sum() if type(aggregator).__name__ == "SumAgg" else values.mean())


def parse_measure(name: str) -> Any:
    """The ir_measures measure of this name; RecipeError with the nearest known name if there is none.

    Own parser: that of ir_measures 0.4 uses parts of `ast` that newer Pythons have dropped, and does not check parameters.
    """
    import ir_measures

    registry = ir_measures.measures.registry
    match = re.fullmatch(r"\s*([^\W\d]\w*)\s*(?:\((.*)\))?\s*(?:@\s*([\w.]+))?\s*", name)
    if match is None:
        raise RecipeError(f"measure {name!r} is not readable; expected a name as RR@10, nDCG@10 or R(rel=2)@50{_nearest_measure(name)}")
    base, arguments, cutoff = match.groups()
    if base not in registry:
        known = ", ".join(sorted(registry))
        raise RecipeError(f"unknown measure {name!r}{_nearest_measure(name) or f' (known: {known})'}")
    measure = registry[base]
    try:
        if arguments:
            measure = measure(**{str(word.arg): ast.literal_eval(word.value) for word in _keywords(arguments)})
        if cutoff is not None:
            measure = measure @ ast.literal_eval(cutoff)
        measure.validate_params()
    except (AssertionError, ValueError, SyntaxError, TypeError):
        takes = ", ".join(f"{key}{' (needed)' if info.required else ''}: {info.desc}" for key, info in measure.SUPPORTED_PARAMS.items())
        raise RecipeError(f"measure {name!r}: its parameters do not fit; {base} takes {takes or 'none'}; write as R(rel=2)@50") from None
    if measure.params.get("cutoff", 1) < 1:
        raise RecipeError(f"measure {name!r}: the cut-off must be 1 or more")
    return measure


def read_trec_run(path: str | Path) -> dict[str, list[str]]:
    """Query id -> passage ids, best first: by score, equal scores by the rank column, then by line.

    (trec_eval ignores the rank column and sorts equal scores by passage id.) Plain or .gz.
    Raises DataError with path:line for a malformed line, a score that is not a number, or a passage that a query has twice.
    """
    found: dict[str, list[tuple[float, float, int, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for line, fields in _lines(Path(path)):
        if len(fields) != 6:
            raise DataError(f"{path}:{line}: {len(fields)} fields; expected the 6 of a TREC run: query Q0 passage rank score tag")
        query, _, passage, rank, score, _ = fields
        if (query, passage) in seen:
            raise DataError(f"{path}:{line}: query {query!r} has passage {passage!r} twice; a run ranks a passage once")
        seen.add((query, passage))
        try:
            key = (-_number(score), _number(rank), line, passage)
        except ValueError:
            raise DataError(f"{path}:{line}: rank {rank!r} and score {score!r}; both must be numbers") from None
        found.setdefault(query, []).append(key)
    return {query: [passage for *_, passage in sorted(entries)] for query, entries in found.items()}


def read_trec_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Query id -> {passage id: grade} of a TREC file (4 fields) or a BEIR one (3 fields, with a header). Plain or .gz.

    Raises DataError with path:line for a malformed line or two different grades of one pair.
    """
    qrels: dict[str, dict[str, int]] = {}
    for line, fields in _lines(Path(path)):
        if len(fields) not in (3, 4):
            raise DataError(f"{path}:{line}: {len(fields)} fields; expected the 4 of TREC qrels: query 0 passage grade (or the 3 of BEIR)")
        query, passage, grade = fields[0], fields[-2], fields[-1]
        try:
            value = int(grade)
        except ValueError:
            if line == 1 and len(fields) == 3:
                continue
            raise DataError(f"{path}:{line}: grade {grade!r} is not a whole number") from None
        if qrels.setdefault(query, {}).setdefault(passage, value) != value:
            raise DataError(
                f"{path}:{line}: query {query!r}, passage {passage!r}: grade {value}, but {qrels[query][passage]} on an earlier line"
            )
    return qrels


def write_trec_run(path: Path, ranked: Iterable[tuple[str, Sequence[str], Sequence[float] | NDArray[np.float32]]], *, tag: str) -> None:
    """Write (query id, passage ids best first, scores) of each query as a TREC run.

    A score equal to the one before is lowered by the smallest step of float32, so that trec_eval, which sorts equal scores by id, keeps
    the order. White space in an id becomes %20 and so on, since the format is separated by it.
    """
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for query, passages, scores in ranked:
            name = _trec_id(query)
            strict = _strictly_falling(np.asarray(scores, dtype=np.float32)).tolist()
            file.writelines(
                f"{name} Q0 {_trec_id(passage)} {rank} {score:.9g} {tag}\n"
                for rank, (passage, score) in enumerate(zip(passages, strict, strict=True), start=1)
            )


def write_trec_qrels(path: Path, judged: Iterable[tuple[str, str, int]]) -> None:
    """Write (query id, passage id, grade) as TREC qrels; white space in an id as in `write_trec_run`."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{_trec_id(query)} 0 {_trec_id(passage)} {grade}\n" for query, passage, grade in judged)


def _ranked_and_qrels(run: Any, qrels: Any) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    if isinstance(run, Run):
        judged = qrels if isinstance(qrels, Mapping) else _store_qrels(qrels, run.split)
        return ranked_passages(run), judged
    ranked = read_trec_run(run) if isinstance(run, str | Path) else {query: _best_first(query, entries) for query, entries in run.items()}
    judged = read_trec_qrels(qrels) if isinstance(qrels, str | Path) else qrels
    if not isinstance(judged, Mapping):
        raise DataError(
            f"qrels: {type(qrels).__name__}; expected a TREC file or a dictionary (a store goes with a Run, whose rows it names)"
        )
    return ranked, judged


def _store_qrels(store: Any, split: Split) -> Mapping[int, Mapping[int, int]]:
    if not hasattr(store, "qrels"):
        raise DataError(f"qrels: {type(store).__name__}; a Run holds rows of its store, so give the store (or row numbers as a dictionary)")
    judged: Mapping[int, Mapping[int, int]] = store.qrels(split)
    return judged


def _best_first(query: Any, entries: Any) -> list[Any]:
    if not isinstance(entries, Mapping):
        passages = list(entries)
        if len(set(passages)) != len(passages):
            raise DataError(f"run: query {query!r} has a passage twice; a run ranks a passage once")
        return passages
    if any(math.isnan(score) for score in entries.values()):
        raise DataError(f"run: query {query!r} has a score that is not a number")
    return sorted(entries, key=lambda passage: -entries[passage])


def _by_depth(parsed: Mapping[str, Any]) -> dict[int | None, list[str]]:
    """Cut-off -> the measures that look no deeper; None for those that look at the whole ranking. One name a measure."""
    depths: dict[int | None, list[str]] = {}
    seen = set()
    for name, measure in parsed.items():
        if measure in seen:
            continue
        seen.add(measure)
        whole = "cutoff" not in measure.params or measure.params.get("judged_only", False)
        depths.setdefault(None if whole else int(measure.params["cutoff"]), []).append(name)
    return depths


def _aliases(parsed: Mapping[str, Any]) -> dict[str, str]:
    """Names that mean the same measure as an earlier one (MRR@10 and RR@10)."""
    first: dict[Any, str] = {}
    return {name: first[measure] for name, measure in parsed.items() if first.setdefault(measure, name) != name}


@dataclass(frozen=True)
class _Ranking:
    """One query as trec_eval takes it. Judged passages are named by their number among the judged, others by their rank: what
    they are called changes no measure, and short names are quick."""

    judged: dict[str, int]
    length: int
    hits: list[tuple[int, str]]

    @classmethod
    def of(cls, passages: Any, grades: Mapping[Any, int], deepest: int | None) -> _Ranking:
        names = {passage: f"j{number}" for number, passage in enumerate(grades)}
        passages = passages[:deepest]
        if isinstance(passages, np.ndarray):
            hits = [(int(rank), names[int(passages[rank])]) for rank in np.flatnonzero(np.isin(passages, list(names)))]
        else:
            hits = [(rank, names[passage]) for rank, passage in enumerate(passages) if passage in names]
        return cls({names[passage]: max(0, int(grade)) for passage, grade in grades.items()}, len(passages), hits)

    def scores(self, depth: int | None) -> dict[str, float]:
        length = self.length if depth is None else min(self.length, depth)
        names = _UNJUDGED[:length] if length <= len(_UNJUDGED) else [f"u{rank}" for rank in range(length)]
        for rank, name in self.hits:
            if rank < length:
                names[rank] = name
        return dict(zip(names, map(float, range(length, 0, -1)), strict=True))


_UNJUDGED = [f"u{rank}" for rank in range(1000)]


def _evaluator(measures: list[Any], judged: dict[str, dict[str, int]]) -> Any:
    import ir_measures

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional providers that are not installed
            return ir_measures.evaluator(measures, judged)
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"measures {', '.join(map(str, measures))}: {error}") from None


def _keywords(arguments: str) -> list[ast.keyword]:
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    if call.args:
        raise ValueError("parameters need names, as in R(rel=2)@50")
    return call.keywords


def _nearest_measure(name: str) -> str:
    import ir_measures

    registry = ir_measures.measures.registry
    word = re.split(r"[(@_.\d]", name.strip(), maxsplit=1)[0].strip().lower()
    folded = {known.lower(): known for known in registry} | {"recall": "R", "mrr": "RR", "precision": "P", "map": "AP", "ndcg": "nDCG"}
    close = difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    if not close:
        return ""
    cutoff = re.search(r"(\d+)\D*$", name)
    suggestion = folded[close[0]] + (f"@{cutoff[1]}" if cutoff else "")
    return f"; did you mean {suggestion!r}?" if suggestion != name else ""


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
    """(line number from 1, fields) of each line that is not blank."""
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if fields:
                    yield number, fields
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as text ({error})") from None


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _strictly_falling(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores, each at least one float32 step below the one before."""
    if len(scores) < 2 or bool(np.all(scores[1:] < scores[:-1])):
        return scores
    falling = scores.copy()
    for rank in range(1, len(falling)):
        falling[rank] = min(falling[rank], np.nextafter(falling[rank - 1], np.float32(-np.inf)))
    return falling


def _trec_id(name: str) -> str:
    if _BLANK.search(name) is None:
        return name
    return _BLANK.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


__all__ = [
    "DEFAULT_MEASURES",
    "JudgedStore",
    "PerQuery",
    "average",
    "evaluate_queries",
    "evaluate_run",
    "measure_run",
    "parse_measure",
    "ranked_passages",
    "read_trec_qrels",
    "read_trec_run",
    "write_trec_qrels",
    "write_trec_run",
]
