"""Passages that a teacher takes for answers of a query, although nobody judged them: no negatives of it.

Source of the idea: RocketQA (arXiv 2010.08191, section 3.2), which denoises negatives with a cross-encoder's scores.
Shapes: P passages of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simlm.errors import DataError
from simlm.rankings import Floats, Groups, Ints, Run

Bools = NDArray[np.bool_]


class TeacherMargin:
    """Passages whose teacher score for a query is known and above its positive's score minus `margin` (both raw logits).

    groups: those trained on. teacher: a run over their queries with raw logits; none = the scores of the groups are the teacher's.
    Raises DataError if a score is not finite or the teacher has scored no positive of any group.
    """

    def __init__(self, margin: float, groups: Groups, teacher: Run | None = None) -> None:
        self.margin = margin
        self._groups = groups
        self._teacher = teacher
        if teacher is not None:
            self._order = np.argsort(teacher.query_rows, kind="stable")
            self._sorted_queries = np.asarray(teacher.query_rows)[self._order]
            if not np.isfinite(teacher.scores).all():
                bad = np.count_nonzero(~np.isfinite(teacher.scores))
                raise DataError(
                    f"teacher_margin: {bad:,} of {len(teacher.scores):,} teacher scores are not finite numbers; run the rerank step again"
                )
        self.num_without = sum(not self._knows_positives(position) for position in range(len(groups)))
        """Queries whose positives the teacher has not all scored: nothing is known to be above an unscored one."""
        if self.num_without == len(groups):
            raise DataError(
                f"teacher_margin: the teacher has scored all positives of none of the {len(groups):,} training queries, so nothing can be "
                "compared with them; score the groups with the rerank step, or leave teacher_margin out"
            )

    def above(self, position: int, positive_row: int, passages_P: Ints) -> Bools:
        """bool [P] for the query at `position` of the groups, whose positive in this step is `positive_row`; True at that itself too."""
        rows, scores = self._scored(position)
        known = rows == positive_row
        if not known.any():
            return np.zeros(len(passages_P), dtype=np.bool_)
        above_P: Bools = np.isin(passages_P, rows[scores > scores[known][0] - self.margin]) | (passages_P == positive_row)
        return above_P

    def _knows_positives(self, position: int) -> bool:
        rows, _ = self._scored(position)
        return bool(np.isin(self._groups.positives(position)[0], rows).all())

    def _scored(self, position: int) -> tuple[Ints, Floats]:
        """Passage rows that the teacher has scored for a query, and their scores."""
        if self._teacher is None:
            pairs = (self._groups.positives(position), self._groups.negatives(position))
            rows, scores = (np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))
            scored = np.isfinite(scores)
            return rows[scored], scores[scored]
        query_row = self._groups.query_rows[position]
        place = int(np.searchsorted(self._sorted_queries, query_row))
        if place == len(self._sorted_queries) or self._sorted_queries[place] != query_row:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        return self._teacher.ranked(int(self._order[place]))
