"""check_teacher: is the teacher better than the retriever that it is to teach? What distill does is decided here.

Inputs: "store", "groups", "teacher" ("teacher.2" ...: runs of split train with raw logits for the groups), "student_scores" (the student's,
of the same pairs), and, where they were made, "dev_student" (first-stage run of the student) and "dev_teacher" ("dev_teacher.2" ...: its
first passages, re-ranked by each teacher). Output: comparison.json, which holds the facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from simlm.artifacts import open_artifact, write_json
from simlm.data.store import Store
from simlm.data.teachers import ScoredLists, of_scored_queries, scored_candidates, scored_groups
from simlm.evaluation.report.verdicts import teaching_verdict
from simlm.rankings import Groups, Run
from simlm.recipe import CheckTeacherSettings
from simlm.stages import Context
from simlm.training.teaching import Comparison, Mixed, best_mixture, compare

Action = Literal["teach", "mix", "skip"]
CHECKED_GROUPS = 1000
"""Training groups that are compared, a seeded sample."""
CUTOFF = 10
"""Of the reciprocal rank on dev."""


def run(settings: CheckTeacherSettings, inputs: dict[str, Path], context: Context) -> None:
    """Facts: the comparison (measured_on "dev", or "train" without dev queries), the same on the training groups, and what is done.

    action: "teach" = distil from the teacher; "mix" = from teacher_weight x teacher + (1 - teacher_weight) x student; "skip" = do not.
    Raises DataError for a score that is missing or not finite.
    """
    store = Store.open(inputs["store"])
    trained = _training_lists(inputs, store, context.seed)
    on_groups = compare(trained, cutoff=None, seed=context.seed)
    lists, cutoff = trained, None
    measured: dict[str, Any] = {"measured_on": "train", "measure": "RR"}
    on_dev = _dev_lists(settings, inputs, store) if "dev_teacher" in inputs else None
    if on_dev is not None and len(on_dev):
        lists, cutoff = on_dev, CUTOFF
        measured = {"measured_on": "dev", "measure": f"RR@{CUTOFF}"}
    else:
        context.progress.say(
            "check teacher: there are no dev queries to compare teacher and student on, so the training groups are taken, which both were "
            "trained on; add dev queries for a fair comparison"
        )
    found = on_groups if lists is trained else compare(lists, cutoff=cutoff, seed=context.seed)
    action, mixed = decide(settings, found, lists, cutoff=cutoff)
    facts = measured | found.facts() | (mixed.facts() if mixed else {}) | {"action": action, "student_name": settings.student}
    facts |= {"if_worse": settings.if_worse, "training_groups": on_groups.facts()}
    context.progress.say(f"check teacher: {teaching_verdict(facts)}")
    write_json(context.work / "comparison.json", facts)
    context.record(**facts)


def decide(
    settings: CheckTeacherSettings, comparison: Comparison, lists: ScoredLists, *, cutoff: int | None
) -> tuple[Action, Mixed | None]:
    """What is taught, and the best mixture where one was looked for."""
    worse = comparison.outcome == "worse"
    if settings.interpolate or (worse and settings.if_worse == "mix"):
        mixed = best_mixture(lists, cutoff=cutoff)
        return "skip" if mixed.teacher_weight == 0 else "teach" if mixed.teacher_weight == 1 else "mix", mixed
    return "skip" if worse and settings.if_worse == "skip" else "teach", None


def _training_lists(inputs: dict[str, Path], store: Store, seed: int) -> ScoredLists:
    """What teachers and student say of a sample of the training groups that have a negative."""
    artifacts = {role: open_artifact(path, "run") for role, path in inputs.items() if role.split(".")[0] == "teacher"}
    scorers = {_told(role): Run.load(artifact.path, "train") for role, artifact in artifacts.items()}
    groups = Groups.load(open_artifact(inputs["groups"], "groups").path)
    if any(artifact.manifest.settings.get("num_queries") for artifact in artifacts.values()):
        groups = of_scored_queries(groups, next(iter(scorers.values())))
    usable = np.flatnonzero((np.diff(groups.negative_offsets) > 0) & (np.diff(groups.positive_offsets) > 0))
    if len(usable) > CHECKED_GROUPS:
        usable = np.sort(np.random.default_rng([seed, 12]).choice(usable, CHECKED_GROUPS, replace=False))
    scorers["the student"] = Run.load(open_artifact(inputs["student_scores"], "run").path, "train")
    query_ids, passage_ids = store.queries("train").ids, store.passages.ids
    return scored_groups(groups.take(usable), scorers, query_id=lambda row: query_ids[row], passage_id=lambda row: passage_ids[row])


def _dev_lists(settings: CheckTeacherSettings, inputs: dict[str, Path], store: Store) -> ScoredLists:
    """The student's first passages for the dev queries that the teachers re-ranked; its scores are the logits of its loss."""
    scorers = {
        _told(role): Run.load(open_artifact(path, "run").path, "dev")
        for role, path in inputs.items()
        if role.split(".")[0] == "dev_teacher"
    }
    student = Run.load(open_artifact(inputs["dev_student"], "run").path, "dev")
    asked = np.isin(student.query_rows, next(iter(scorers.values())).query_rows)
    candidates = student.take(np.flatnonzero(asked & (np.diff(student.offsets) > 0)), settings.depth)
    logits = (np.asarray(candidates.scores) / np.float32(settings.student_temperature)).astype(np.float32)
    scorers["the student"] = Run("dev", candidates.query_rows, candidates.offsets, candidates.passage_rows, logits)
    relevant = {query: [row for row, grade in grades.items() if grade > 0] for query, grades in store.qrels("dev").items()}
    query_ids, passage_ids = store.queries("dev").ids, store.passages.ids
    return scored_candidates(candidates, relevant, scorers, query_id=lambda row: query_ids[row], passage_id=lambda row: passage_ids[row])


def _told(role: str) -> str:
    """A teacher's name in messages."""
    number = role.partition(".")[2]
    return f"teacher {number}" if number else "the teacher"
