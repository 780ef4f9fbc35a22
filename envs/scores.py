"""Crafter's score (Hafner 2021, section 3.3). numpy only."""

import numpy as np


def crafter_score(success_rates: np.ndarray) -> float:
    """Geometric mean of the success rates with an offset of one percent: exp(mean(log(1 + s))) - 1.

    Args:
        success_rates: (A,) share of episodes that unlocked each achievement, in 0 to 1
    Returns:
        score in percent, 0 to 100
    """
    rates = np.asarray(success_rates, np.float64) * 100
    if rates.ndim != 1 or rates.size == 0 or not ((rates >= 0) & (rates <= 100)).all():
        raise ValueError(f"success rates must be a non-empty list of numbers in 0 to 1, got {success_rates}")
    return float(np.exp(np.log1p(rates).mean()) - 1)
