"""One order out of many short ones: the model of Bradley and Terry (Biometrika 39, 1952)."""

import numpy as np

PRIOR = 0.5  # imagined comparisons with an average item, half of them won: keeps unbeaten items finite
ITERATIONS = 100


def ranks(before: np.ndarray) -> np.ndarray:
    """Ranks items by who stands before whom.

    Args:
        before: (K, K), how often i stood before j
    Returns:
        (K,) int, 0 for the one that stands first; an item that was never compared is in the middle
    """
    met, wins = before + before.T, before.sum(1) + PRIOR
    strength = np.ones(len(before))
    for _ in range(ITERATIONS):  # minorisation-maximisation, Hunter, Annals of Statistics 32, 2004
        strength = wins / ((met / (strength[:, None] + strength)).sum(1) + 2 * PRIOR / (strength + 1))
    return np.argsort(np.argsort(-strength, kind="stable"), kind="stable")
