"""Draw the results and write the tables.

    python benchmarks/plot.py                # figures into docs/, tables into README.md and docs/benchmarks.md
    python benchmarks/plot.py --collect      # takes the finished runs of runs/main into benchmarks/results/main first
    python benchmarks/plot.py --suite toy --collect --results /tmp/toy --out /tmp/toy

Figures are for a phone's width: one column, large type. Bands and bars are 95 % bootstrap intervals over the seeds.
"""

import json
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from collect import Results, collect, column, load
from run import ROOT, UNGUIDED, VARIANTS, SuiteName
from stats import bootstrap_band, bootstrap_interval, iqm, probability_of_improvement
from tables import (
    FULL,
    RESULTS,
    between_markers,
    generated,
    guide_of,
    of_a_suite,
    shares,
    throughput,
    watched,
    with_unguided,
)

from utils.published import HUMAN

try:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("error: matplotlib is missing; pip install -r requirements-dev.txt")

STYLE = {
    "font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 2.2, "savefig.dpi": 110,
}  # fmt: skip
WIDTH = 6.4  # inches
RETURN, SCORE = "return", "score, %"
# Whose own colour would be taken in a figure of COMPARED
COLOURS = {
    "no-sft": "tab:green", "retrieved": "tab:purple", "echo": "tab:brown", "rules": "0.3",
    "smollm2-no-sft": "tab:olive", "smollm2-experience": "tab:pink", "plans": "navy", "echo-plans": "gold",
}  # fmt: skip
COMPARED = (  # where the guide knows little
    "none", "facts", "no-adapter", "no-sft", "experience", "plans", "smollm2-no-sft", "smollm2-experience",
    "retrieved", "echo", "echo-plans", "rules",
)  # fmt: skip
OURS = ("env, our resets", "rollout", "unguided", "guided", "guided, no adapter", "same work, ours")


@dataclass(frozen=True)
class Options:
    suite: SuiteName = "main"
    """which results"""
    collect: bool = False
    """first make result files of the finished runs in --runs-dir"""
    runs_dir: Path | None = None
    """where the run folders are; default runs/<suite>"""
    results: Path | None = None
    """where the result files are; default benchmarks/results/<suite>"""
    out: Path | None = None
    """where figures and tables.md go; default docs/, README.md and docs/benchmarks.md, for suite main only"""
    allow_dirty: bool = False
    """collect also what was made from code that is in no commit"""


def look(name: str) -> dict[str, Any]:
    """Colour and line of a variant, the same in all figures."""
    number = list(VARIANTS).index(name) if name in VARIANTS else len(VARIANTS)
    label = VARIANTS[name].label if name in VARIANTS else name
    color = COLOURS.get(name) or plt.get_cmap("tab10")(number % 10)
    style = {"color": color, "linestyle": "--" if number >= 10 else "-", "label": label}
    return style | ({"linewidth": 3.2, "zorder": 3} if name == FULL else {})


def mean_curves(runs: dict[int, Any], names: list[str]) -> np.ndarray | None:
    """(seeds, 1 + len(names), T): env steps, then these columns, at the env steps of the run with the fewest points.

    None if a run has not got one of the columns.
    """
    curves = [result["curve"] for result in runs.values()]
    if any(name not in curve for curve in curves for name in names) or not all(c["global_step"] for c in curves):
        return None
    steps = np.array(min((curve["global_step"] for curve in curves), key=len), np.float64)
    steps = steps[steps <= min(curve["global_step"][-1] for curve in curves)]
    at = [[steps, *[np.interp(steps, c["global_step"], c[name]) for name in names]] for c in curves]
    return np.array(at)


def draw_curve(axes: Any, name: str, x: np.ndarray, curves: np.ndarray) -> None:
    """Mean over the seeds with its interval. x (T,), curves (R, T)"""
    style = look(name)
    axes.plot(x, curves.mean(0), **style)
    if len(curves) > 1:
        low, high = bootstrap_band(curves)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def finish(figure: Any, handles: list[Any], path: Path) -> None:
    """Legend below, save."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=14, columnspacing=1.2)
    figure.savefig(path)
    plt.close(figure)


def subtitle(results: Results) -> str:
    """Env and guides of all results."""
    summaries = [result["summary"] for runs in results.values() for result in runs.values()]
    envs = ", ".join(sorted({s["env_id"].removesuffix("-v1").removesuffix("-v0") for s in summaries}))
    names = sorted({guide_of(summary) for summary in summaries if summary["llm"] != "none"})
    whole = "; ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    return envs + ("\n" + textwrap.fill(f"guide: {whole}", 60) if names else "")


def plot_controls(results: Results, path: Path) -> bool:
    """Learning curves of the full method and of what it must beat."""
    return plot_curves({name: runs for name, runs in results.items() if name in (FULL, *UNGUIDED)}, path)


def plot_ablations(results: Results, path: Path) -> bool:
    """Learning curves of the full method and of what lacks a part of it."""
    shown = {name: runs for name, runs in results.items() if name not in UNGUIDED}
    return shown.keys() != {FULL} and plot_curves(shown, path)


def plot_guide(suite: str, _: Results, path: Path) -> bool:
    """Learning curves with a guide that does not know the game, of the suite `llm`, `adapter` or `adapter-1m`."""
    return plot_curves({name: runs for name, runs in with_unguided(suite).items() if name in COMPARED}, path)


def plot_curves(results: Results, path: Path) -> bool:
    """Return, and score below, of the training episodes against env steps."""
    panels = [("episodic_return", RETURN), ("score", SCORE)]
    panels = [p for p in panels if any(mean_curves(runs, [p[0]]) is not None for runs in results.values())]
    if not panels:
        return False
    figure, axes = plt.subplots(
        len(panels), squeeze=False, sharex=True, figsize=(WIDTH, 1.8 + 3.9 * len(panels)), layout="constrained"
    )
    handles: dict[str, Any] = {}
    for ax, (key, label) in zip(axes[:, 0], panels, strict=True):
        for name, runs in results.items():
            curves = mean_curves(runs, [key])
            if curves is not None:
                draw_curve(ax, name, curves[0, 0] / 1e6, curves[:, 1])
                handles.setdefault(name, ax.get_lines()[-1])
        ax.set(ylabel=f"{label}, training episodes", ylim=(0, None))
        ax.set_xlim(0, None)
        if len(ax.get_lines()) < len(handles):
            ax.text(0.98, 0.03, "others: not recorded", transform=ax.transAxes, ha="right", color="0.4")
    axes[-1, 0].set_xlabel("env steps, millions")
    figure.suptitle(subtitle(results), fontsize=15)
    finish(figure, list(handles.values()), path)
    return True


def plot_calls(results: Results, path: Path) -> bool:
    """Return against LLM calls so far, both means over the seeds at the same env steps."""
    found = {name: mean_curves(runs, ["llm_calls", "episodic_return"]) for name, runs in results.items()}
    found = {name: curves for name, curves in found.items() if curves is not None and curves[:, 1, -1].any()}
    if not found:
        return False
    figure, ax = plt.subplots(figsize=(WIDTH, 5.2), layout="constrained")
    for name, curves in found.items():
        draw_curve(ax, name, curves[:, 1].mean(0), curves[:, 2])
    ax.set(xlabel="LLM calls so far", ylabel=f"{RETURN}, training episodes", ylim=(0, None))
    ax.set_xlim(0, None)
    figure.suptitle(subtitle(results), fontsize=15)
    finish(figure, ax.get_lines(), path)
    return True


def plot_achievements(results: Results, path: Path) -> bool:
    """Success rates of the trained policies as bars: human experts, plain PPO, the full method."""
    shown = [name for name in ("none", FULL) if name in results]
    if not shown:
        return False
    names = list(next(iter(results[shown[0]].values()))["summary"]["achievements"])
    names.sort(key=lambda name: -HUMAN.get(name, 0))
    bars = (
        [("human expert (pixels)", "0.75", [[HUMAN.get(name, 0) for name in names]])]
        if HUMAN.keys() >= set(names)
        else []
    )
    for variant in shown:
        rates = [[100 * r["summary"]["achievements"][n] for n in names] for r in results[variant].values()]
        bars.append((look(variant)["label"], look(variant)["color"], rates))
    figure, ax = plt.subplots(figsize=(WIDTH, 1.7 + 0.52 * len(names)), layout="constrained")
    height = 0.84 / len(bars)
    for number, (label, color, rates) in enumerate(bars):
        at, rates = np.arange(len(names)) + (number - (len(bars) - 1) / 2) * height, np.array(rates)
        ax.barh(at, rates.mean(0), height, color=color, label=label)
        if len(rates) > 1:
            low, high = bootstrap_band(rates)
            ax.hlines(at, low, high, color="black", linewidth=1.2)
    ax.set(yticks=np.arange(len(names)), xlim=(0, 100), xlabel="success rate, %", ylim=(len(names) - 0.5, -0.5))
    ax.set_yticklabels([name.replace("_", " ") for name in names])
    ax.grid(axis="y", visible=False)
    figure.suptitle(subtitle({name: results[name] for name in shown}), fontsize=15)
    finish(figure, ax.containers, path)
    return True


def plot_habits(results: Results, path: Path) -> bool:
    """Habits of common sense as bars, of the variants whose runs were watched: share of the occasions handled well."""
    shown = {name: watched(runs) for name, runs in results.items() if watched(runs)}
    if not shown:
        return False
    names = list(next(iter(next(iter(shown.values())).values()))["habits"]["counts"])
    figure, ax = plt.subplots(figsize=(WIDTH, 1.9 + 0.24 * len(names) * len(shown)), layout="constrained")
    height = 0.84 / len(shown)
    for number, (variant, runs) in enumerate(shown.items()):
        found = [shares(runs, name) for name in names]
        at = np.arange(len(names)) + (number - (len(shown) - 1) / 2) * height
        means = [x.mean() if len(x) else 0 for x in found]
        ax.barh(at, means, height, color=look(variant)["color"], label=look(variant)["label"])
        for y, x in zip(at, found, strict=True):
            if len(x) > 1:
                low, high = bootstrap_band(x[:, None])
                ax.hlines(y, low, high, color="black", linewidth=1.2)
    label = "% of the occasions"
    ax.set(yticks=np.arange(len(names)), xlim=(0, 100), xlabel=label, ylim=(len(names) - 0.5, -0.5))
    ax.set_yticklabels(names)
    ax.grid(axis="y", visible=False)
    figure.suptitle(subtitle({name: results[name] for name in shown}), fontsize=15)
    finish(figure, ax.containers, path)
    return True


def plot_aggregate(results: Results, path: Path) -> bool:
    """IQM of return and score with intervals; probability that the full method improves on each other variant."""
    names = list(results)
    scores = {
        key: {name: column(results[name], key)[:, None] for name in names} for key in ("episodic_return", "score")
    }
    compared = [name for name in names if name != FULL] if FULL in results else []
    sizes = [len(names), len(names)] + [len(compared)] * bool(compared)
    figure, axes = plt.subplots(
        len(sizes),
        figsize=(WIDTH, 2.6 + 0.5 * sum(sizes)),
        layout="constrained",
        height_ratios=[s + 1.0 for s in sizes],
    )
    for ax, key, label in zip(axes, scores, ("IQM of return", "IQM of score, %"), strict=False):
        for row, name in enumerate(names):
            draw_estimate(ax, row, name, iqm, scores[key][name])
        finish_estimates(ax, names, label)
        ax.set_xlim(0, None)
    if compared:
        for row, name in enumerate(compared):
            returns = scores["episodic_return"]
            draw_estimate(axes[2], row, name, probability_of_improvement, returns[FULL], returns[name])
        finish_estimates(axes[2], compared, "P(RLAdapter's return is higher)")
        axes[2].axvline(0.5, color="0.5", linestyle=":")
        axes[2].set_xlim(0, 1.02)
    figure.suptitle(subtitle(results), fontsize=15)
    finish(figure, [], path)
    return True


def draw_estimate(ax: Any, row: int, name: str, function: Any, *scores: np.ndarray) -> None:
    """A point, and a bar for its interval if there are seeds enough."""
    color = look(name)["color"]
    ax.plot([float(function(*scores))], [row], "|", color=color, markersize=22, markeredgewidth=3)
    if min(len(s) for s in scores) > 1:
        ax.hlines(row, *bootstrap_interval(function, *scores), color=color, linewidth=12, alpha=0.35)


def finish_estimates(ax: Any, names: list[str], label: str) -> None:
    ax.set(yticks=range(len(names)), xlabel=label, ylim=(len(names) - 0.5, -0.5))
    ax.set_yticklabels([look(name)["label"] for name in names])


def plot_speed(_: Results, path: Path) -> bool:
    """Env steps per second, and below the memory of a guided training, against the number of envs."""
    rates = throughput()["steps_per_second"]
    figure, (ax, memory) = plt.subplots(
        2, figsize=(WIDTH, 9.6), layout="constrained", height_ratios=(2, 1), sharex=True
    )
    for number, name in enumerate(next(iter(rates.values()))):
        at = [(int(n), column[name]) for n, column in rates.items() if name in column]
        style = {"color": plt.get_cmap("tab10")(number % 10), "linestyle": "-" if name in OURS else ":"}
        ax.plot(*zip(*at, strict=True), marker="o", label=name, **style)
    ax.set(xscale="log", yscale="log", ylabel="env steps/s")
    rows = json.loads((RESULTS / "scale.json").read_text())["scale"]
    at = [(row["num_envs"], row["peak_memory_gb"]) for row in rows]
    memory.plot(*zip(*at, strict=True), color="black", marker="o")
    memory.set(ylim=(0, None), xlabel="parallel envs", ylabel="peak memory, GB\n(guided)")
    memory.set_xticks([n for n, _ in at], [f"{n:,}" for n, _ in at])
    memory.minorticks_off()
    figure.suptitle("two CPU cores", fontsize=15)
    finish(figure, ax.get_lines(), path)
    return True


OF_A_SUITE = {
    "results_curves.png": plot_controls,
    "results_ablations.png": plot_ablations,
    "results_calls.png": plot_calls,
    "results_achievements.png": plot_achievements,
    "results_habits.png": plot_habits,
    "results_aggregate.png": plot_aggregate,
}
FIGURES = OF_A_SUITE | {
    "results_llm.png": partial(plot_guide, "llm"),
    "results_guide.png": partial(plot_guide, "adapter"),
    "results_guide_1m.png": partial(plot_guide, "adapter-1m"),
    "speed.png": plot_speed,
}


def write_tables(results: Results, out: Path | None) -> None:
    """Into README.md and docs, or those of these results into out/tables.md."""
    if out is not None:
        tables = of_a_suite(results)
        (out / "tables.md").write_text("\n\n".join(f"## {name}\n\n{text}" for (_, name), text in tables.items()) + "\n")
        return
    for (path, name), text in generated(results).items():
        between_markers(path, name, text)


def run(options: Options) -> None:
    """Raises ValueError, one line, for what can't work."""
    if options.out is None and (options.suite != "main" or options.results is not None):
        raise ValueError("--out: README shows the committed results of suite main; name a folder for any others")
    folder = options.results or RESULTS / options.suite
    if options.collect:
        runs_dir = options.runs_dir or ROOT / "runs" / options.suite
        written = collect(options.suite, runs_dir, folder, options.allow_dirty)
        print(f"collected {', '.join(path.stem for path in written)} into {folder}")
    results, out = load(folder), options.out or ROOT / "docs"
    out.mkdir(parents=True, exist_ok=True)
    write_tables(results, options.out)
    with plt.rc_context(STYLE):
        for name, draw in (FIGURES if options.out is None else OF_A_SUITE).items():
            print(f"{out / name}: {'drawn' if draw(results, out / name) else 'no data'}")


def main(argv: list[str] | None = None) -> int:
    try:
        run(tyro.cli(Options, args=argv, description=__doc__))
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
