"""Choosing from many: farthest first."""

import numpy as np


def farthest_first(facts: np.ndarray, asked: np.ndarray, n: int) -> list[int]:
    """Chooses up to n indices into facts (M, P): greedily the situation that differs most from those asked and chosen.

    Distance is the number of differing facts. Farthest first; of equally far ones the most frequent.
    """
    situations, first, counts = np.unique(facts, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    situations, first = situations[order].astype(np.float32), first[order]

    def distance(other: np.ndarray) -> np.ndarray:
        other = other.astype(np.float32)
        return situations.sum(1)[:, None] + other.sum(1) - 2 * situations @ other.T

    nearest = distance(asked).min(1) if len(asked) else np.full(len(situations), np.inf)
    chosen: list[int] = []
    while len(chosen) < n and nearest.max() > 0:
        i = int(nearest.argmax())
        chosen.append(int(first[i]))
        nearest = np.minimum(nearest, distance(situations[i : i + 1])[:, 0])
    return chosen
