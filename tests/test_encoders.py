"""benchmarks/encoders.py: comprehension scores of finished runs with other encoders."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import encoders

from envs.crafter import CRAFTER
from guidance import empty_rows
from utils.embeddings import HashEmbedding
from utils.trials import MIN_VISITS, WITH

GOAL = CRAFTER.sub_goal_numbers


def test_advice_that_is_followed_more_has_the_higher_score():
    """Three pieces of advice to sleep, followed in no, half, and all visits; a fourth was hardly given."""
    rows = empty_rows(5, 2, CRAFTER)
    rows.valid[:4], rows.goal[:4] = True, GOAL["sleep"]
    rows.visits[:4, WITH] = [40, 40, 40, MIN_VISITS - 1]
    rows.successes[:3, WITH] = 0, 20, 40
    rows.reached[:, WITH, GOAL["sleep"]] = rows.successes[:, WITH]
    rows.actions[:3, WITH, :3] = np.eye(3)
    measured = encoders.measure(CRAFTER, [vars(rows)], HashEmbedding())
    assert measured["cosine"]["correlation_with_success"] == pytest.approx(1)
    scores = [1 / (1 + np.e), 0.5 / (1 + np.e) + 0.5 / (1 + np.exp(-9)), 1 / (1 + np.exp(-9))]
    assert measured["cosine"]["mean"] == pytest.approx(np.mean(scores))
    assert -0.1 < measured["alike"] < 0.2
