"""The first comparison: which runs, what they gave, and the table in the README.

    python benchmarks/first_results.py run --jobs 2     # trains what is missing in runs/first, keeps what is finished
    python benchmarks/first_results.py collect          # copies the summaries to benchmarks/results/first
    python benchmarks/first_results.py table            # prints the table from there
    python benchmarks/first_results.py plot             # draws docs/first_results.png from there

The committed files under benchmarks/results/first are the summaries of these runs, with argv, commit and device.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "first", ROOT / "benchmarks" / "results" / "first"
SEEDS = (1, 2, 3)
VARIANTS = {
    "guided": ("full method: advice, facts, bonus 0.1", ""),
    "none": ("plain PPO", "--guidance none"),
    "none-bonus": ("plain PPO, bonus 0.1 for every basic sub-goal", "--guidance none --guidance-bonus 0.1"),
    "facts": ("the facts as context, no guidance", "--guidance facts"),
    "facts-bonus": (
        "the facts as context, bonus 0.1 for every basic sub-goal",
        "--guidance facts --guidance-bonus 0.1",
    ),
    "context-only": ("guidance as context, no bonus", "--guidance-bonus 0"),
    "no-adapter": ("guidance without adapter and trials", "--adapter none --candidates 1"),
    "pause": ("advice drawn once per phase and kept", "--guidance-lookup pause"),
    "random": ("a guide that advises at random", "--llm random"),
}


def command(variant: str, seed: int) -> list[str]:
    return ["rladapter_ppo.py", *VARIANTS[variant][1].split(), "--seed", str(seed)]


def run_one(variant: str, seed: int) -> str:
    """Train one variant, unless it is finished or begun; a begun one is resumed."""
    folder = RUNS / f"{variant}-{seed}"
    if (folder / "summary.json").exists():
        return f"{folder.name}: kept"
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    argv = (
        ["rladapter_ppo.py", "--resume", str(folder)] if begun else [*command(variant, seed), "--run-dir", str(folder)]
    )
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    return f"{folder.name}: {'done' if done.returncode == 0 else 'FAILED ' + done.stderr.strip()[-300:]}"


def collect() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in sorted(RUNS.glob("*")):
        if (folder / "summary.json").exists():
            config = json.loads((folder / "config.json").read_text())
            result = {
                "command": "python " + " ".join(command(*folder.name.rsplit("-", 1))),
                "git_commit": config["git_commit"], "versions": config["versions"], "device": config["device"],
                "num_cpus": config["num_cpus"], "summary": json.loads((folder / "summary.json").read_text()),
                "curve": curve(folder),
            }  # fmt: skip
            (RESULTS / f"{folder.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def curve(folder: Path) -> list[list[float]]:
    """[env step, mean return of the training episodes of that phase] for each phase."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[m["global_step"], round(m["charts/episodic_return"], 3)] for m in lines if m.get("charts/episodic_return")]


def table() -> str:
    """Markdown: mean over the seeds, and the seeds' own values, of the final evaluation."""
    rows = [
        "| variant | flags | return: mean (each seed) | reward % | score % | LLM calls |",
        "|---|---|---|---|---|---|",
    ]
    for variant, (what, flags) in VARIANTS.items():
        paths = sorted(RESULTS.glob(f"{variant}-[0-9]*.json"))
        if paths:
            found = [json.loads(path.read_text())["summary"] for path in paths]
            returns = [f["episodic_return"] for f in found]
            each = ", ".join(f"{r:.2f}" for r in returns)
            reward, score, calls = (np.mean([f[k] for f in found]) for k in ("reward_percent", "score", "llm_calls"))
            shown = f"`{flags}`" if flags else "(defaults)"
            rows.append(
                f"| {what} | {shown} | **{np.mean(returns):.2f}** ({each}) | {reward:.1f} | {score:.1f} | {calls:.0f} |"
            )
    return "\n".join(rows)


def plot() -> None:
    """Learning curves, mean over the seeds with a band from the lowest to the highest."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for variant, (what, _) in VARIANTS.items():
        paths = sorted(RESULTS.glob(f"{variant}-[0-9]*.json"))
        if paths:
            curves = np.array([json.loads(path.read_text())["curve"] for path in paths])  # (seeds, phases, 2)
            steps, returns = curves[0, :, 0] / 1e6, curves[..., 1]
            (line,) = axes.plot(steps, returns.mean(0), label=f"{what} ({len(paths)} seeds)")
            axes.fill_between(steps, returns.min(0), returns.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(
        xlabel="env steps, millions", ylabel="return of training episodes, without bonus", xlim=(0, 1), ylim=(0, None)
    )
    axes.set_title("Craftax-Classic-Symbolic, guide `rules` (no LLM); band: lowest to highest seed", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "first_results.png", dpi=130)


def main(
    action: Annotated[Literal["run", "collect", "table", "plot"], tyro.conf.Positional],
    variants: tuple[str, ...] = tuple(VARIANTS),
    jobs: int = 1,
) -> None:
    if action == "run":
        with ThreadPoolExecutor(jobs) as pool:
            todo = [(variant, seed) for variant in variants for seed in SEEDS]
            for line in pool.map(lambda pair: run_one(*pair), todo):
                print(line, flush=True)
    elif action == "collect":
        collect()
    elif action == "plot":
        plot()
    else:
        print(table())


if __name__ == "__main__":
    tyro.cli(main)
