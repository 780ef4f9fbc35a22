"""Few runs, honest intervals: what Agarwal et al. 2021 (arXiv 2108.13264) recommend, and paired differences.

The paper's package rliable is not used: docs/benchmarks.md says why. Scores are (R, M): R runs (seeds) of M tasks;
the Crafter results here have one task, M = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

RESAMPLES = 5000


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: of all runs of all tasks together, without the lowest and the highest quarter.

    A quarter is rounded down: of fewer than four numbers none is left out, and this is the mean.

    Args:
        scores: (..., R, M)
    Returns:
        (...)
    """
    values = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How often a run of x beats one of y on the same task, ties counting half; the mean over the tasks.

    Args:
        x, y: (..., R, M), the numbers of runs may differ
    Returns:
        (...), 0 to 1
    """
    pairs = x[..., :, None, :], y[..., None, :, :]
    return (np.greater(*pairs) + 0.5 * np.equal(*pairs)).mean((-3, -2, -1))


def bootstrap_interval(function: Callable[..., np.ndarray], *scores: np.ndarray) -> tuple[float, float]:
    """95 % interval by the stratified percentile bootstrap: runs are drawn again within each task of each argument.

    The resamples are the same at every call. With one run the interval has no width and means nothing.

    Args:
        function: of arrays (B, R, M), one for each of `scores`, to (B,)
        scores: (R, M) each
    Returns:
        low, high
    """
    rng = np.random.default_rng(0)
    drawn = [np.take_along_axis(s[None], rng.integers(s.shape[0], size=(RESAMPLES, *s.shape)), axis=1) for s in scores]
    low, high = np.percentile(function(*drawn), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_band(curves: np.ndarray) -> np.ndarray:
    """95 % percentile bootstrap interval of the mean curve; whole curves are drawn again. (R, T) -> (2, T)"""
    drawn = np.random.default_rng(0).integers(len(curves), size=(RESAMPLES, len(curves)))
    return np.percentile(curves[drawn].mean(1), [2.5, 97.5], axis=0)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with a 95 % t-interval; None with one pair."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is on one side of zero, else 0"""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.mean > 0 else -1


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """a - b, both (n,), a[i] and b[i] being of the same seed. The interval assumes normal differences."""
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Difference(mean, None)
    half = float(student_t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return Difference(mean, (mean - half, mean + half))
