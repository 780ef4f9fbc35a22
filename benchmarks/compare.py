"""Did a change help? Two sets of runs, paired by seed: what a pull request quotes.

    python benchmarks/compare.py guided none                       # two variants of the committed results
    python benchmarks/compare.py guided none --results runs/main   # of run folders
    python benchmarks/compare.py runs/before runs/after            # every variant that both folders have

A and B are compared in the final evaluation's return and score, with a 95 % t-interval of the mean paired difference.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from collect import Result, column, load
from run import ROOT
from stats import Difference, paired_difference
from tables import markdown

FEW_SEEDS = 5
METRICS = {"return": "episodic_return", "score %": "score"}


@dataclass(frozen=True)
class Options:
    a: tyro.conf.Positional[str]
    """a variant, or a folder of runs"""
    b: tyro.conf.Positional[str]
    """what to compare it with"""
    results: Path = ROOT / "benchmarks" / "results" / "main"
    """folder of result files, or of run folders, for two variants"""


def compare(a: str, b: str, runs_a: dict[int, Result], runs_b: dict[int, Result]) -> str:
    """Markdown: table, verdict, warnings. Raises ValueError if no seed is in both."""
    seeds = sorted(runs_a.keys() & runs_b.keys())
    if not seeds:
        raise ValueError(f"{a} and {b} have no seed in common ({sorted(runs_a)} and {sorted(runs_b)})")
    runs_a, runs_b = ({seed: runs[seed] for seed in seeds} for runs in (runs_a, runs_b))
    pairs = {name: (column(runs_a, key), column(runs_b, key)) for name, key in METRICS.items()}
    differences = {name: paired_difference(*pair) for name, pair in pairs.items()}
    rows = [
        [name, *[f"{values.mean():.2f}" for values in pairs[name]], f"{d.mean:+.2f}", interval(d), each(*pairs[name])]
        for name, d in differences.items()
    ]
    header = ["", f"A: {a}", f"B: {b}", "A - B", "95 % interval", "A - B of each seed"]
    notes = [
        markdown(header, rows), "", f"Seeds {', '.join(map(str, seeds))}. {verdict(a, b, differences)}",
        *cautions(runs_a, runs_b),
    ]  # fmt: skip
    return "\n".join(notes)


def interval(difference: Difference) -> str:
    return "-" if difference.interval is None else "{:+.2f} to {:+.2f}".format(*difference.interval)


def each(x: np.ndarray, y: np.ndarray) -> str:
    return ", ".join(f"{d:+.2f}" for d in x - y)


def verdict(a: str, b: str, differences: dict[str, Difference]) -> str:
    """One sentence: what the intervals allow to say."""
    said = {1: "higher in {}", -1: "lower in {}", 0: "not shown to differ in {}"}
    words = " and ".join(said[d.sign].format(name.removesuffix(" %")) for name, d in differences.items())
    return f"{a} against {b}: {words}."


def cautions(runs_a: dict[int, Result], runs_b: dict[int, Result]) -> list[str]:
    """What makes the comparison weak, and what was compared."""
    lines = []
    if len(runs_a) == 1:
        lines.append("One seed gives no interval and decides nothing: run more.")
    elif len(runs_a) < FEW_SEEDS:
        lines.append(
            f"{len(runs_a)} seeds are few: the t-interval takes the differences for normal; 5 or more are better."
        )
    if all((column(runs_a, key) == column(runs_b, key)).all() for key in METRICS.values()):
        lines.append("A and B are equal in every seed: what differs between them did nothing.")
    for name in ("env_id", "global_step", "eval_episodes"):
        a, b = (sorted({r["summary"][name] for r in runs.values()}) for runs in (runs_a, runs_b))
        if a != b:
            lines.append(f"A and B differ in {name}: {', '.join(map(str, a))} and {', '.join(map(str, b))}.")
    for which, runs in (("A", runs_a), ("B", runs_b)):
        commits = ", ".join(sorted({str(r["git_commit"]) for r in runs.values()}))
        guides = ", ".join(sorted({r["summary"]["llm_model"] or r["summary"]["llm"] for r in runs.values()}))
        lines.append(f"{which}: commit {commits}, guide {guides}.")
    return lines


def comparisons(a: str, b: str, results: Path) -> list[str]:
    """Of two variants in `results`, or of every variant that the folders a and b share. Raises ValueError."""
    if Path(a).is_dir() and Path(b).is_dir():
        found_a, found_b = load(Path(a)), load(Path(b))
        shared = [name for name in found_a if name in found_b]
        if not shared:
            raise ValueError(f"{a} ({', '.join(found_a)}) and {b} ({', '.join(found_b)}) share no variant")
        return [compare(f"{a} {name}", f"{b} {name}", found_a[name], found_b[name]) for name in shared]
    found = load(results)
    for name in (a, b):
        if name not in found:
            raise ValueError(f"{name} is no variant in {results} ({', '.join(found)}), or not both are folders of runs")
    return [compare(a, b, found[a], found[b])]


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        print("\n\n".join(comparisons(options.a, options.b, options.results)))
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
