"""Training groups from runs over the training queries: what they rank high and nobody judged relevant is a hard negative.

Left out: every passage judged relevant (any grade above 0), and every passage with the text of a relevant one, which is the same
answer under another id; then whatever the filters of the settings drop. All of it reads stored scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import Artifact, open_artifact, read_manifest
from simlm.data.duplicates import Digests, text_digests
from simlm.data.store import Store, Table
from simlm.errors import ArtifactError, DataError, RecipeError
from simlm.evaluation.negatives import MinedRun, measure_negatives
from simlm.evaluation.report.negatives import write_negatives
from simlm.rankings import Floats, Groups, Ints, Run, offsets_of
from simlm.recipe import MiningSettings
from simlm.stages import Context

Facts = dict[str, Any]
ALONE = "run"
"""Name of the only run, where there is no mix."""
_REMOVED = {
    "num_positives_left_out": "judged relevant",
    "num_copies_left_out": "with a relevant passage's text",
    "num_skipped_top": "by skip_top",
    "num_above_ceiling": "by below_positive",
    "num_above_teacher": "by teacher_margin",
    "num_unscored_dropped": "without a teacher score",
}


def run(settings: MiningSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store; run, or run.NAME for each name of `settings.mix`; optional teacher (raw logits). Runs are of split train.

    Facts: how many queries became groups, which did not and why, and what each filter removed. Writes the groups, and what they are like
    as negatives.json and negatives.html.
    """
    store = Store.open(inputs["store"])
    artifacts = _run_artifacts(settings, inputs)
    runs = {name: Run.load(artifact.path, "train") for name, artifact in artifacts.items()}
    teacher = _teacher(settings, inputs)
    qrels = store.qrels("train")
    digests = digest_lookup(store.passages, list(runs.values()), qrels)
    query_ids = store.queries("train").ids
    groups, facts = mine(runs, qrels, digests, settings, teacher=teacher, query_id=lambda row: query_ids[row])
    context.record(**facts)
    if len(groups) == 0:
        raise DataError(f"{', '.join(str(artifact.path) for artifact in artifacts.values())}: {_nothing_left(facts)}")
    groups.save(context.work)
    mined_runs = [MinedRun(name, runs[name], settings.mix.get(name), cosine=is_cosine(artifact)) for name, artifact in artifacts.items()]
    report = measure_negatives(
        groups,
        mined_runs,
        store,
        name=context.builder.path.name,
        digests=digests,
        facts=facts,
        seed=context.seed,
        teacher=teacher,
    )
    write_negatives(context.work / "negatives", report)
    left_out = facts["num_without_positive"] + facts["num_without_negatives"]
    context.progress.say(
        f"mined {facts['negatives_per_query']:.1f} negatives a query for {len(groups):,} queries"
        + (f"; {left_out:,} queries left out: {facts['num_without_positive']:,} without a relevant passage, "
           f"{facts['num_without_negatives']:,} without a candidate" if left_out else "")
    )  # fmt: skip


def is_cosine(artifact: Artifact) -> bool:
    """Whether a run's scores are cosines: those of any vector index are, BM25's and fused ones are not."""
    return bool(artifact.manifest.facts.get("index_type", "bm25") != "bm25")


def mine(
    runs: Mapping[str, Run],
    qrels: dict[int, dict[int, int]],
    digests: Callable[[Ints], Digests],
    settings: MiningSettings,
    *,
    teacher: Run | None = None,
    query_id: Callable[[int], str] = str,
) -> tuple[Groups, Facts]:
    """Groups of the queries that have a positive and a negative, in the order of the first run, and what was counted on the way.

    runs: as `settings.mix` has them, or one. qrels: query row -> {passage row: grade}. digests: passage rows -> digests of their texts,
    for every passage of the runs and of the qrels. teacher: for `settings.teacher_margin`.
    Of each run, in this order: the first `depth`; without positives and their copies; without the first `skip_top` of those; without those
    above `below_positive` (see `_ceiling`) or above the teacher's margin. Then the runs' lists as one (see `_interleaved`), and of that the
    first `num_negatives`.
    Raises DataError if a query has candidates and the teacher has no score for any of its positives, or a score that is not finite.
    """
    miner = _Miner(list(runs.values()), qrels, digests, settings, teacher)
    first = next(iter(runs.values())).query_rows
    known = set(first.tolist())
    others = {int(query) for run in runs.values() for query in run.query_rows} | qrels.keys()
    # A judged query that no run has is a query without candidates.
    kept = [group for query in [*first.tolist(), *sorted(others - known)] if (group := miner.group(int(query))) is not None]
    miner.check_teacher(query_id)
    groups = _grouped(kept, len(runs))
    return groups, miner.facts(groups, list(runs), num_queries=len(known | others))


# --- what is read


def _run_artifacts(settings: MiningSettings, inputs: dict[str, Path]) -> dict[str, Artifact]:
    """Name -> run artifact, in the order of the mix."""
    given = {role.removeprefix("run."): path for role, path in inputs.items() if role.startswith("run.")}
    if not settings.mix:
        if given or ALONE not in inputs:
            raise RecipeError(f"mix is empty, so one run was expected, found {', '.join(given) or 'none'}; give each its share in mix")
        given = {ALONE: inputs[ALONE]}
    elif set(given) != set(settings.mix):
        raise RecipeError(
            f"mix names {', '.join(settings.mix)}, there are runs of {', '.join(given) or 'none'}; each needs both, a share and a run"
        )
    return {name: _of_store(given[name], inputs["store"]) for name in settings.mix or given}


def _teacher(settings: MiningSettings, inputs: dict[str, Path]) -> Run | None:
    if (settings.teacher_margin is None) != ("teacher" not in inputs):
        raise RecipeError(
            "teacher_margin compares scores of a teacher run, and there is none; give one, or leave teacher_margin out"
            if "teacher" not in inputs
            else f"{inputs['teacher']}: teacher scores are given, and no teacher_margin to compare them by; set it, for example to 1.0"
        )
    return Run.load(_of_store(inputs["teacher"], inputs["store"]).path, "train") if "teacher" in inputs else None


def _of_store(path: Path, store: Path) -> Artifact:
    artifact = open_artifact(path, "run")
    made_from = artifact.manifest.inputs.get("store")
    if made_from is not None and made_from != read_manifest(store, "store").fingerprint:
        raise ArtifactError(
            f"{path}: made from another version of the corpus than {store}, so passage rows do not fit; run the step that makes it again"
        )
    return artifact


def digest_lookup(passages: Table, runs: Sequence[Run], qrels: dict[int, dict[int, int]]) -> Callable[[Ints], Digests]:
    """Passage rows -> digests of their normalised texts, for every passage that is in a run or judged; all are read here, once."""
    judged: Ints = np.array(sorted({row for grades in qrels.values() for row in grades}), dtype=np.int64)
    rows = np.unique(np.concatenate([judged, *(np.asarray(run.passage_rows) for run in runs)]))
    digests = text_digests(passages, rows.tolist())
    return lambda wanted: digests[np.searchsorted(rows, wanted)]


# --- one query


@dataclass(frozen=True)
class _Group:
    """positive_scores: float32 [S, positives]."""

    query: int
    positives: Ints
    positive_scores: Floats
    negatives: Ints
    scores: Floats
    sources: NDArray[np.int8]


class _Miner:
    """Makes the groups one by one, and counts."""

    def __init__(
        self,
        runs: Sequence[Run],
        qrels: dict[int, dict[int, int]],
        digests: Callable[[Ints], Digests],
        settings: MiningSettings,
        teacher: Run | None,
    ) -> None:
        if teacher is not None and not np.isfinite(teacher.scores).all():
            bad = int(np.count_nonzero(~np.isfinite(teacher.scores)))
            raise DataError(f"{bad:,} teacher scores are not finite numbers; train that cross-encoder again, or score in fp32")
        self.runs = runs
        self.qrels = qrels
        self.digests = digests
        self.settings = settings
        self.shares = np.array(list(settings.mix.values()) or [1.0])
        self.teacher = teacher
        self.places = [{int(query): place for place, query in enumerate(run.query_rows)} for run in runs]
        self.teacher_places = {} if teacher is None else {int(query): place for place, query in enumerate(teacher.query_rows)}
        self.counts: Counter[str] = Counter()
        self.untaught: list[int] = []
        """Queries whose positives the teacher has not scored."""

    def group(self, query: int) -> _Group | None:
        positives: Ints = np.array(sorted(row for row, grade in self.qrels.get(query, {}).items() if grade > 0), dtype=np.int64)
        if len(positives) == 0:
            self.counts["num_without_positive"] += 1
            return None
        lists = [_ranked(run, places.get(query)) for run, places in zip(self.runs, self.places, strict=True)]
        positive_scores = np.stack([_scores_of(positives, rows, scores) for rows, scores in lists])
        self.counts["num_positive_in_run"] += bool(np.isfinite(positive_scores).any())
        candidates = [
            self._filtered(rows, scores, positives, of_run) for (rows, scores), of_run in zip(lists, positive_scores, strict=True)
        ]
        if self.teacher is not None:
            candidates = self._below_teacher(query, positives, candidates)
        rows, scores, sources = _interleaved(candidates, self.shares)
        self.counts["num_in_several_runs"] += sum(len(part) for part, _ in candidates) - len(rows)
        self.counts["num_beyond_limit"] += max(0, len(rows) - self.settings.num_negatives)
        if len(rows) == 0:
            self.counts["num_without_negatives"] += 1
            return None
        kept = slice(self.settings.num_negatives)
        return _Group(query, positives, positive_scores, rows[kept], scores[kept], sources[kept])

    def _filtered(self, rows: Ints, scores: Floats, positives: Ints, positive_scores: Floats) -> tuple[Ints, Floats]:
        """Candidates of one run, by what that run and the judgements say."""
        settings = self.settings
        rows, scores = rows[: settings.depth], scores[: settings.depth]
        relevant = np.isin(rows, positives)
        copies = np.isin(self.digests(rows), self.digests(positives)) & ~relevant
        chosen = np.flatnonzero(~relevant & ~copies)
        self.counts["num_positives_left_out"] += int(relevant.sum())
        self.counts["num_copies_left_out"] += int(copies.sum())
        self.counts["num_skipped_top"] += min(settings.skip_top, len(chosen))
        chosen = chosen[settings.skip_top :]
        if settings.below_positive is not None:
            ceiling = _ceiling(positive_scores, settings.below_positive)
            if ceiling is None:
                self.counts["num_without_ceiling"] += 1
            else:
                above = scores[chosen] > ceiling
                self.counts["num_above_ceiling"] += int(above.sum())
                chosen = chosen[~above]
        return rows[chosen], scores[chosen]

    def _below_teacher(self, query: int, positives: Ints, candidates: list[tuple[Ints, Floats]]) -> list[tuple[Ints, Floats]]:
        """The candidates that the teacher scores no higher than the lowest of the positives it knows, less the margin."""
        settings = self.settings
        assert self.teacher is not None and settings.teacher_margin is not None
        if not any(len(rows) for rows, _ in candidates):
            return candidates
        known = _ranked(self.teacher, self.teacher_places.get(query))
        positive_scores = _scores_of(positives, *known)
        if np.isnan(positive_scores).all():
            self.untaught.append(query)
            return candidates
        limit = float(np.nanmin(positive_scores)) - settings.teacher_margin
        left = []
        for rows, scores in candidates:
            taught = _scores_of(rows, *known)
            unscored, above = np.isnan(taught), taught > limit
            self.counts["num_above_teacher"] += int(above.sum())
            self.counts["num_unscored"] += int(unscored.sum())
            if settings.teacher_unscored == "drop":
                self.counts["num_unscored_dropped"] += int(unscored.sum())
                above |= unscored
            left.append((rows[~above], scores[~above]))
        return left

    def check_teacher(self, query_id: Callable[[int], str]) -> None:
        """DataError if the teacher knows no positive of a query that has candidates."""
        if self.untaught:
            names = ", ".join(query_id(query) for query in self.untaught[:5]) + (" ..." if len(self.untaught) > 5 else "")
            raise DataError(
                f"the teacher run has no score for the relevant passages of {len(self.untaught):,} training queries ({names}), so there is "
                "nothing to hold their candidates against; score them with the rerank step over the groups, or leave teacher_margin out"
            )

    def facts(self, groups: Groups, names: list[str], *, num_queries: int) -> Facts:
        counts, settings = self.counts, self.settings
        always = ["num_without_positive", "num_without_negatives", "num_positives_left_out", "num_copies_left_out"]
        always += ["num_skipped_top", "num_beyond_limit"]
        if settings.below_positive is not None:
            always += ["num_above_ceiling", "num_without_ceiling"]
        if self.teacher is not None:
            always += ["num_above_teacher", "num_unscored", "num_unscored_dropped"]
        facts: Facts = {name: counts[name] for name in always}
        if groups.negative_sources is not None:
            per_source = np.bincount(groups.negative_sources, minlength=len(names)).tolist()
            facts |= {"negatives_of": dict(zip(names, per_source, strict=True)), "num_in_several_runs": counts["num_in_several_runs"]}
        return facts | {
            "num_queries": num_queries,
            "num_groups": len(groups),
            "num_negatives": len(groups.negative_rows),
            "negatives_per_query": round(len(groups.negative_rows) / max(len(groups), 1), 2),
            "positive_in_run": round(counts["num_positive_in_run"] / max(num_queries - counts["num_without_positive"], 1), 4),
        }


def _ranked(run: Run, place: int | None) -> tuple[Ints, Floats]:
    if place is None:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    rows, scores = run.ranked(place)
    return np.asarray(rows), np.asarray(scores)


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
    """The score of each wanted passage, NaN where it is not among the rows."""
    if len(rows) == 0:
        return np.full(len(wanted), np.nan, dtype=np.float32)
    order = np.argsort(rows)
    places = order[np.minimum(np.searchsorted(rows, wanted, sorter=order), len(rows) - 1)]
    return np.where(rows[places] == wanted, scores[places], np.float32(np.nan))


def _interleaved(lists: Sequence[tuple[Ints, Floats]], shares: NDArray[np.float64]) -> tuple[Ints, Floats, NDArray[np.int8]]:
    """Several lists as one, each passage once: rows, scores, and the list that each is from.

    Any beginning of it has of each list its share, as near as whole numbers come, for as long as the list lasts; what falls due at once
    stands in the order of the lists. A passage in several lists belongs to that where it falls due first.
    """
    rows = np.concatenate([part for part, _ in lists])
    scores = np.concatenate([part for _, part in lists])
    sources = np.repeat(np.arange(len(lists), dtype=np.int8), [len(part) for part, _ in lists])
    if len(lists) == 1:
        return rows, scores, sources
    order = _due_order(sources, shares)
    _, first = np.unique(rows[order], return_index=True)
    order = order[np.sort(first)]
    # Without the repeated ones the lists have moved up; their order within is the same.
    order = order[_due_order(sources[order], shares)]
    return rows[order], scores[order], sources[order]


def _due_order(sources: NDArray[np.int8], shares: NDArray[np.float64]) -> Ints:
    """Places in the order in which they are due: the n-th of a list falls due at n / its share."""
    due = np.empty(len(sources))
    for source, share in enumerate(shares):
        own = np.flatnonzero(sources == source)
        due[own] = np.arange(1, len(own) + 1) / share
    return np.lexsort((sources, np.round(due, 9)))


def _grouped(kept: list[_Group], num_runs: int) -> Groups:
    ints, floats = np.empty(0, np.int64), np.empty(0, np.float32)
    of_runs = np.concatenate([np.empty((num_runs, 0), np.float32), *(group.positive_scores for group in kept)], axis=1)
    return Groups(
        "train",
        np.array([group.query for group in kept], dtype=np.int64),
        offsets_of([len(group.positives) for group in kept]),
        np.concatenate([ints, *(group.positives for group in kept)]),
        of_runs[0],
        offsets_of([len(group.negatives) for group in kept]),
        np.concatenate([ints, *(group.negatives for group in kept)]),
        np.concatenate([floats, *(group.scores for group in kept)]),
        *([np.concatenate([np.empty(0, np.int8), *(group.sources for group in kept)]), of_runs] if num_runs > 1 else []),
    )


def _nothing_left(facts: Facts) -> str:
    removed = [f"{facts[name]:,} {words}" for name, words in _REMOVED.items() if facts.get(name)]
    return (
        f"no training query has a relevant passage and a candidate negative: of {facts['num_queries']:,} queries "
        f"{facts['num_without_positive']:,} have no relevant passage and {facts['num_without_negatives']:,} no candidate"
        + (f" (left out: {', '.join(removed)})" if removed else "")
        + "; check that the training judgements name passages of this corpus, that the corpus has more than those, "
        "and that the filters of the mining leave some"
    )
