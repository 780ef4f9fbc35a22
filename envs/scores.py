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


class Tally:
    """Counts whole episodes, of every env the same number: else envs with short episodes would count more."""

    def __init__(self, game: Game, num_envs: int, episodes: int):
        """Takes the number of episodes wanted; it is rounded up to a multiple of num_envs."""
        self.game, self.per_env = game, -(-episodes // num_envs)
        self.episodes, self.ended = self.per_env * num_envs, np.zeros(num_envs, int)
        self.sums: dict[str, Any] = {}
        self.watched: dict[str, Any] = {}

    def add(self, done: np.ndarray, episodes: dict[str, np.ndarray], watched: dict[str, np.ndarray]) -> None:
        """Adds steps of all envs.

        Args:
            done: (T, N) bool
            episodes: (T, N, ...) episodic_return, episodic_length and achievements of the episode so far
            watched: (T, N, ...) whatever is to be summed over all steps
        """
        before = self.ended + done.cumsum(0) - done  # (T, N), episodes that ended before this step
        counts = before < self.per_env
        for sums, found, where in ((self.sums, episodes, counts & done), (self.watched, watched, counts)):
            for name, x in found.items():
                sums[name] = sums.get(name, 0) + x[where].sum(0, dtype=np.float64)
        self.ended += (counts & done).sum(0)

    @property
    def played(self) -> int:
        return int(self.ended.sum())

    @property
    def full(self) -> bool:
        return bool(self.ended.min() == self.per_env)

    def result(self) -> dict[str, Any]:
        """Returns eval_episodes, episodic_return, episodic_length, score, reward_percent, achievements {name: rate},
        and the sums of what was watched, if anything was."""
        rates, mean_return = self.sums["achievements"] / self.episodes, self.sums["episodic_return"] / self.episodes
        return {
            "eval_episodes": self.episodes,
            "episodic_return": float(mean_return),
            "episodic_length": float(self.sums["episodic_length"] / self.episodes),
            "reward_percent": 100 * float(mean_return) / len(rates),
            "score": score(rates),
            "achievements": dict(zip(self.game.achievements, rates.tolist(), strict=True)),
        } | ({"watched": self.watched} if self.watched else {})
