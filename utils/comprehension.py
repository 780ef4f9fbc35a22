"""Comprehension scores: how well K pieces of advice were understood, from what was done while they were given.

Each score returns (K,) numbers from 0 to 1. G sub-goals, A actions, D the size of an embedding.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Understood:
    """What was done while advice was given, and what the words for it are."""

    visits: np.ndarray  # (K,)
    successes: np.ndarray  # (K,) visits that reached the advised sub-goal
    reached: np.ndarray  # (K, G) how often each sub-goal was reached
    actions: np.ndarray  # (K, A) how often each action was taken
    advice: np.ndarray  # (K, D) embedding of the advised sub-goal
    sub_goal_names: np.ndarray  # (G, D) embeddings
    action_names: np.ndarray  # (A, D) embeddings


def reference_score(cosine: np.ndarray | float) -> np.ndarray | float:
    """Returns the paper's score of a cosine: sigmoid(10 (cosine - 0.1)), arXiv 2309.17176."""
    return 1 / (1 + np.exp(-10 * (cosine - 0.1)))


def row_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosines (K,) of the rows of a and b, each (K, D)."""
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norm, 1e-9)


def success(u: Understood) -> np.ndarray:
    """Returns the share of visits that reached the advised sub-goal."""
    return np.clip(u.successes / np.maximum(u.visits, 1e-9), 0, 1)


def cosine(u: Understood) -> np.ndarray:
    """Compares the sub-goals reached with the advice; in visits that did not reach the advised one the cosine is 0."""
    score = reference_score(row_cosine(u.reached @ u.sub_goal_names, u.advice))
    return success(u) * score + (1 - success(u)) * reference_score(0.0)


def cosine_actions(u: Understood) -> np.ndarray:
    """Compares the actions taken with the advice, as the reference does."""
    return reference_score(row_cosine(u.actions @ u.action_names, u.advice))


# By the value of --comprehension
SCORES = {
    "cosine": cosine,
    "cosine-actions": cosine_actions,
    "binary": lambda u: (u.successes > 0).astype(np.float64),
    "success": success,
    "none": lambda u: np.full(len(u.visits), np.nan),
}
