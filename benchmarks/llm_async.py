"""What --llm-async is worth: how long the device waits for a slow guide, and what answers one phase late cost.

    python benchmarks/llm_async.py                       # the table in docs/llm.md
    python benchmarks/llm_async.py --latencies 0.2 --flags="--adapter none --eval-episodes 16" --total-timesteps 2e4

Each run is a training against benchmarks/chat_server.py, which waits before every answer. Prints a table; runs are kept
in --runs.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    latencies: tuple[float, ...] = (1.0, 10.0)
    """seconds that the guide takes for an answer"""
    total_timesteps: str = "1.6e5"
    """of each run"""
    flags: str = "--updates-per-phase 4 --adapter none --eval-episodes 128"
    """more flags of the training script"""
    seed: int = 1
    """seed of each run"""
    runs: Path = Path("runs/llm-async")
    """where the runs go; must not exist yet"""


def train(options: Options, latency: float, mode: list[str], folder: Path) -> Path:
    """One training against a server of its own. Raises CalledProcessError if it fails."""
    serve = [sys.executable, "benchmarks/chat_server.py", "--port", "0", "--latency", str(latency)]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = server.stdout.readline().strip()
        command = [sys.executable, "rladapter_ppo.py", "--llm", "http", "--llm-model", "rules", "--llm-base-url", url,
                   "--llm-cache", "none", "--total-timesteps", options.total_timesteps, "--seed", str(options.seed),
                   "--run-dir", str(folder.resolve()), *shlex.split(options.flags), *mode]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()
    return folder


def row(folder: Path, latency: float, mode: list[str]) -> str:
    """A line of the table. The share counts the time of all phases, without compilation and evaluation."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waited = sum(m["time/llm_wait"] for m in metrics)
    trained = sum(m["time/train"] for m in metrics)
    share = waited / (summary["wall_seconds"] - summary["compile_seconds"])
    return (
        f"| {latency:g} s | {'--llm-async' if mode else 'waiting'} | {waited:.1f} s | {trained:.0f} s | {share:.1%} | "
        f"{summary['SPS']:,.0f} | {summary['episodic_return']:.2f} |"
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print("| latency | mode | device waits | device trains | share waiting | steps/s | return |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for latency in options.latencies:
        for mode in ([], ["--llm-async"]):
            folder = train(options, latency, mode, options.runs / f"{latency:g}s-{'async' if mode else 'waiting'}")
            print(row(folder, latency, mode), flush=True)


if __name__ == "__main__":
    main()
