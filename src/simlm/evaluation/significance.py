"""Is the difference between two systems, measured on the same queries, more than chance?

Sources: Smucker, Allan and Carterette, CIKM 2007 (paired randomization test for retrieval); Phipson and Smyth 2010 (the +1 of a sampled
p-value); Holm 1979 (several tests in one table). All tests are two-sided. Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.errors import ShapeError

Floats = NDArray[np.float64]
Method = Literal["randomization", "t-test"]

# Sign flips worked on at once: 2 M float64 = 16 MB.
_BLOCK_ELEMENTS = 2_000_000


def p_value(
    values_Q: Floats, against_Q: Floats, *, method: Method = "randomization", num_samples: int = 10_000, seed: int = 0
) -> float | None:
    """Probability of a mean difference at least this large if the two systems were alike; None where the test is not defined.

    values_Q, against_Q: one measure of the same queries in the same order.
    Raises ShapeError if they are not equally long.
    """
    if method == "t-test":
        return t_test(values_Q, against_Q)
    return randomization_test(values_Q, against_Q, num_samples=num_samples, seed=seed)


def randomization_test(values_Q: Floats, against_Q: Floats, *, num_samples: int = 10_000, seed: int = 0) -> float | None:
    """p-value of the paired randomization test: how often random swaps of the two systems differ at least as much.

    Sampled: (hits + 1) / (num_samples + 1). Where the queries that differ allow no more than num_samples different swaps, all of them
    are gone through and the p-value is exact. None for no queries; 1 if no query differs.
    """
    differences = _differences(values_Q, against_Q)
    if not len(differences):
        return None
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    total = differences.sum()
    # Sums of the same numbers in another order may differ in the last bits: they count as equal.
    threshold = abs(total) - 1e-9 * float(np.abs(differences).sum())
    exact = 2 ** len(differences) <= num_samples if len(differences) < 60 else False
    count = 2 ** len(differences) if exact else num_samples
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // len(differences))
    hits = 0
    for start in range(0, count, block):
        size = min(block, count - start)
        flips: NDArray[np.integer[Any]]
        if exact:
            flips = np.arange(start, start + size)[:, None] >> np.arange(len(differences)) & 1
        else:
            packed = rng.integers(0, 256, size=(size, -(-len(differences) // 8)), dtype=np.uint8)
            flips = np.unpackbits(packed, axis=1, count=len(differences))
        hits += int(np.count_nonzero(np.abs(total - 2.0 * (flips.astype(np.float64) @ differences)) >= threshold))
    return hits / count if exact else (hits + 1) / (count + 1)


def t_test(values_Q: Floats, against_Q: Floats) -> float | None:
    """p-value of Student's paired t-test; None for fewer than two queries; 1 if no query differs, 0 if all differ by the same."""
    from scipy import stats

    differences = _differences(values_Q, against_Q)
    num_queries = len(differences)
    if num_queries < 2:
        return None
    if not differences.any():
        return 1.0
    deviation = float(differences.std(ddof=1))
    mean = float(differences.mean())
    if deviation <= 1e-12 * abs(mean):
        return 0.0
    return float(2.0 * stats.t.sf(abs(mean) / (deviation / num_queries**0.5), num_queries - 1))


def holm(p_values: Mapping[str, float | None], *, num_tests: int | None = None) -> dict[str, float | None]:
    """Each p-value corrected for the number of tests in the table (Holm); None stays None and does not count as a test.

    num_tests: how many there will be, for a table of which only some are done, so that a p-value does not rise as the others come in.
    """
    tests = sorted(((p, name) for name, p in p_values.items() if p is not None), key=lambda test: test[0])
    total = len(tests) if num_tests is None else num_tests
    assert total >= len(tests), f"{len(tests)} tests are done of {total}"
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    running = 0.0
    for position, (p, name) in enumerate(tests):
        running = max(running, min(1.0, (total - position) * p))
        corrected[name] = running
    return corrected


def wins_ties_losses(values_Q: Floats, against_Q: Floats) -> tuple[int, int, int]:
    """Queries on which the first is better, equal, worse."""
    differences = _differences(values_Q, against_Q)
    return int((differences > 0).sum()), int((differences == 0).sum()), int((differences < 0).sum())


def _differences(values_Q: Floats | Sequence[float], against_Q: Floats | Sequence[float]) -> Floats:
    values, against = np.asarray(values_Q, dtype=np.float64), np.asarray(against_Q, dtype=np.float64)
    if values.shape != against.shape or values.ndim != 1:
        raise ShapeError(f"a paired test needs the same queries on both sides; got shapes {values.shape} and {against.shape}")
    return values - against


__all__ = ["Method", "holm", "p_value", "randomization_test", "t_test", "wins_ties_losses"]
