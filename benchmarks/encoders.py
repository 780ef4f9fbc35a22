"""What would finished runs' comprehension scores be with other text encoders? Nothing is trained.

    python benchmarks/encoders.py runs/main/guided-1 runs/main/guided-2 --embed hash MODEL --out encoders.json

Per encoder: how alike two different sub-goals' names are (mean cosine), and of each --comprehension score that uses
names the mean over the rows of advice and its rank correlation with the share of visits that reached the advised
sub-goal.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from envs import make_env  # noqa: E402
from utils.cli import exit_code  # noqa: E402
from utils.comprehension import SCORES, Understood  # noqa: E402
from utils.embeddings import Embedding, make_embedding  # noqa: E402
from utils.run_folder import git_commit, read_checkpoint, write_json  # noqa: E402
from utils.trials import MIN_VISITS, WITH  # noqa: E402


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders with guidance on Craftax-Classic-Symbolic-v1"""
    embed: tuple[str, ...] = ("hash",)
    """encoders, as --embed takes them"""
    out: Path | None = None
    """file that the measures are written to"""


def understood(game: Any, rows: dict[str, np.ndarray], encoder: Embedding) -> Understood:
    """Returns what was done with advice that was given MIN_VISITS times or more, in an encoder's words."""
    names = encoder.encode(game.sub_goals)
    given = rows["valid"] & (rows["visits"][:, WITH] >= MIN_VISITS)
    return Understood(
        **{name: rows[name][given, WITH] for name in ("visits", "successes", "reached", "actions")},
        advice=names[rows["goal"][given]],
        sub_goal_names=names[: game.num_basic],
        action_names=encoder.encode(game.actions),
    )


def measure(game: Any, tables: list[dict[str, np.ndarray]], encoder: Embedding) -> dict[str, Any]:
    """Returns the measures of one encoder, the correlations as means over the tables."""
    names = encoder.encode(game.sub_goals)
    measured: dict[str, Any] = {"alike": float((names @ names.T)[~np.eye(len(names), dtype=bool)].mean())}
    for score in ("cosine", "cosine-actions"):
        done = [understood(game, rows, encoder) for rows in tables]
        values = [(SCORES[score](u), SCORES["success"](u)) for u in done]
        measured[score] = {
            "mean": float(np.concatenate([scores for scores, _ in values]).mean()),
            "correlation_with_success": float(np.mean([spearmanr(*pair).statistic for pair in values])),
        }
    return measured


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    game = make_env("Craftax-Classic-Symbolic-v1", 1).game
    tables = [read_checkpoint(folder)[1]["table"] for folder in options.runs]
    result: dict[str, Any] = {"runs": [folder.name for folder in options.runs], "git_commit": git_commit()}
    for name in options.embed:
        result[Path(name).name] = measure(game, tables, make_embedding(name))
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    sys.exit(exit_code(main))
