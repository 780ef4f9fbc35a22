"""The score of Crafter (Hafner 2021, section 3.3), for any game with achievements. numpy only."""

from typing import Any

import numpy as np

from envs.game import Game


def score(success_rates: np.ndarray) -> float:
    """Returns the geometric mean of the success rates with an offset of one percent: exp(mean(log(1 + s))) - 1.

    Args:
        success_rates: (A,) share of episodes that unlocked each achievement, in 0 to 1
    Returns:
        score in percent, 0 to 100
    """
    rates = np.asarray(success_rates, np.float64) * 100
    if rates.ndim != 1 or rates.size == 0 or not ((rates >= 0) & (rates <= 100)).all():
        raise ValueError(f"success rates must be a non-empty list of numbers in 0 to 1, got {success_rates}")
    return float(np.exp(np.log1p(rates).mean()) - 1)


def episode_metrics(game: Game, sums: dict[str, Any], totals: dict[str, Any]) -> dict[str, float]:
    """Returns the tags of the episodes that ended in a phase; but for their number none, where none ended.

    Args:
        sums: episodes, and over them episodic_return, episodic_length, achievements (A,)
        totals: episodes and achievements (A,) of the whole run so far
    """
    episodes = float(sums["episodes"])
    if not episodes:
        return {"charts/episodes": 0.0}
    mean_return, rates = float(sums["episodic_return"]) / episodes, sums["achievements"] / episodes
    return {
        "charts/episodes": episodes,
        "charts/episodic_return": mean_return,
        "charts/episodic_length": float(sums["episodic_length"]) / episodes,
        f"{game.name}/reward_percent": 100 * mean_return / len(rates),
        f"{game.name}/score": score(rates),
        f"{game.name}/score_all_episodes": score(totals["achievements"] / totals["episodes"]),
        **{f"achievements/{name}": float(rate) for name, rate in zip(game.achievements, rates, strict=True)},
    }
