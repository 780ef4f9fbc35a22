"""Train the runs of a comparison: every variant with every seed, what is finished kept, what is begun resumed.

    python benchmarks/run.py --suite main --seeds 5                       # into runs/main/<variant>-<seed>
    python benchmarks/run.py --suite main --seeds 5 --variants guided none --jobs 2
    python benchmarks/run.py --suite main --seeds 5 --slurm > job.sh      # the same as a SLURM array
    python benchmarks/run.py --suite toy --seeds 1                        # a minute, to see that everything works

Ctrl-C lets the runs save and stops; the same command goes on. What a run writes to stderr is in
runs/<suite>/<variant>-<seed>.log. Then: python benchmarks/plot.py --collect
"""

import fcntl
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import tyro
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import rladapter_ppo as rl  # noqa: E402
from utils import run_folder, runs  # noqa: E402
from utils.cli import BigInt  # noqa: E402


@dataclass(frozen=True)
class Variant:
    label: str  # in figures
    what: str  # in tables
    flags: str  # of rladapter_ppo.py


# What the tiny adapter takes to learn what it is tuned on: some 15 seconds of a CPU core a phase.
TUNED = "--sft-learning-rate 7e-3 --lora-plus-ratio 1 --sft-batch-size 8 --sft-every 1 --sft-max-tokens 100000"
# A general model of 135M weights, and what it takes: some six minutes of a CPU core every second phase.
SMOLLM2 = "--adapter HuggingFaceTB/SmolLM2-135M-Instruct --adapter-max-tokens 96"
SMOLLM2_TUNED = "--sft-every 2 --sft-max-tokens 33000 --sft-epochs 1"

# README's tables, the figures and the tests are made from this.
VARIANTS = {
    "guided": Variant("RLAdapter", "RLAdapter", ""),
    "none": Variant("plain PPO", "plain PPO", "--guidance none"),
    "none-bonus": Variant(
        "PPO + bonus",
        "control: a bonus for every basic sub-goal, no guidance",
        "--guidance none --guidance-bonus 0.1",
    ),
    "facts": Variant("PPO + facts", "control: the facts that guidance rests on as context", "--guidance facts"),
    "facts-bonus": Variant(
        "PPO + facts + bonus", "control: those facts and that bonus", "--guidance facts --guidance-bonus 0.1"
    ),
    "facts-pointer": Variant(
        "PPO + facts + pointer",
        "control: those facts, and a pointer to the things of all sub-goals that are possible, in a fixed order",
        "--guidance facts --pointer fixed",
    ),
    "context-only": Variant(
        "no bonus", "guidance as context only, no bonus", "--guidance-bonus 0 --approach-bonus 0"
    ),
    "no-pointer": Variant("no pointer", "guidance as embedding only, as in the paper", "--pointer none"),
    "no-memory": Variant("no memory", "a policy without memory", "--rnn-size 0"),
    "no-prediction": Variant("no prediction", "no auxiliary loss of the policy", "--predict-coef 0"),
    "no-adapter": Variant("no adapter", "no adapter", "--adapter none"),
    "no-sft": Variant("no fine-tuning", "no fine-tuning of the adapter", "--sft-every 0"),
    "no-trials": Variant("no trials", "no trials of advice against saying nothing", "--no-trials"),
    "random": Variant("random guide", "a guide that advises at random", "--llm random"),
    "shuffled": Variant("shuffled guide", "a guide whose sub-goals are exchanged with each other", "--llm shuffled"),
    "pause": Variant(
        "kept per phase",
        "advice drawn once per phase and kept, as the method is usually described",
        "--guidance-lookup pause",
    ),
    "sft-all": Variant(
        "tuned on all", "fine-tuning on all analyses, as in the paper", f"--sft-data all {TUNED}"
    ),
    "sft-best": Variant("tuned on the best", "the same on analyses whose advice won its trial", TUNED),
    "hindsight": Variant(
        "hindsight",
        "fine-tuning on what the player did next where that paid",
        f"--sft-data hindsight {TUNED}",
    ),
    "experience": Variant(
        "experience",
        "fine-tuning on what paid, and on what sub-goals were found to take",
        f"--sft-data experience {TUNED}",
    ),
    "plans": Variant(
        "plans",
        "fine-tuning on the same as experience, and on plans and guesses",
        f"--sft-data plans --adapter-max-tokens 64 {TUNED}",
    ),
    "experience-no-score": Variant(
        "experience, no score",
        "experience, where the adapter is not told how well advice was understood",
        f"--sft-data experience {TUNED} --comprehension none",
    ),
    "experience-paper-score": Variant(
        "experience, paper's score",
        "experience, with the comprehension score as in the paper, from action names",
        f"--sft-data experience {TUNED} --comprehension cosine-actions",
    ),
    "smollm2-no-sft": Variant(
        "SmolLM2, untuned", "a general language model as adapter, SmolLM2-135M-Instruct", f"{SMOLLM2} --sft-every 0"
    ),
    "smollm2-experience": Variant(
        "SmolLM2, experience",
        "fine-tuning of SmolLM2-135M-Instruct on the same as experience",
        f"{SMOLLM2} --sft-data experience {SMOLLM2_TUNED}",
    ),
    "exchanged": Variant(
        "exchanged",
        "control: experience, with the analyses exchanged among the situations of a pause",
        f"--sft-data experience {TUNED} --analyses exchanged",
    ),
    "retrieved": Variant(
        "retrieved",
        "control: what experience would tune it on, told word for word, no language model for an adapter",
        "--adapter none --sft-data experience --analyses retrieved",
    ),
    "retrieved-plans": Variant(
        "retrieved, plans",
        "control: what plans would tune it on, told word for word, no language model for an adapter",
        "--adapter none --sft-data plans --analyses retrieved",
    ),
    "echo": Variant(
        "no LLM",
        "control: experience, where the advice is what the analysis says, no LLM",
        f"--sft-data experience {TUNED} --llm echo",
    ),
    "echo-plans": Variant(
        "no LLM, plans", "control: plans, where the advice is what the analysis says, no LLM",
        f"--sft-data plans --adapter-max-tokens 64 {TUNED} --llm echo",
    ),
    "random-analyses": Variant(
        "random analyses", "control: a sentence that names random sub-goals, for the analysis", "--analyses random"
    ),
    "rules": Variant(
        "expert rules",
        "control: a guide that knows the game, the expert rules, no LLM and no adapter",
        "--llm rules --rules-knowledge expert --adapter none",
    ),
    "cosine-actions": Variant(
        "score: actions",
        "comprehension score as in the paper, from action names",
        "--comprehension cosine-actions",
    ),
    "success": Variant(
        "score: success", "comprehension score: share of visits that reached a sub-goal", "--comprehension success"
    ),
    "binary": Variant("score: binary", "comprehension score: was any sub-goal reached", "--comprehension binary"),
    "no-comprehension": Variant("no score", "no comprehension score", "--comprehension none"),
}

# Without guidance, in a figure of their own; the others are the method and its ablations.
UNGUIDED = ("none", "none-bonus", "facts", "facts-bonus", "facts-pointer")


@dataclass(frozen=True)
class Suite:
    variants: tuple[str, ...]
    flags: str = ""  # of all its runs


# Of the suites with a guide that does not know the task
WITH_ADAPTERS = (
    "none", "facts", "no-adapter", "no-sft", "sft-best", "sft-all", "hindsight", "experience", "plans",
    "experience-no-score", "experience-paper-score", "smollm2-no-sft", "smollm2-experience", "exchanged", "retrieved",
    "retrieved-plans", "echo", "echo-plans", "random-analyses", "rules",
)  # fmt: skip

# The offline guide that believes in Minecraft
MINECRAFT = (
    "--rules-knowledge minecraft --guidance-support 3 --adapter-temperature 0.5 --query-until 0.8 --eval-episodes 512"
)

SUITES = {
    "main": Suite((
        "guided", "none", "facts", "facts-pointer", "none-bonus", "facts-bonus", "context-only", "no-pointer",
        "no-memory", "no-prediction", "no-trials", "no-adapter", "no-sft", "random", "shuffled", "pause",
    ), "--eval-episodes 512"),
    # A guide that does not know the task: what the adapter's analyses are worth, and what it is tuned on.
    "adapter": Suite(WITH_ADAPTERS, f"{MINECRAFT} --total-timesteps 300000"),
    # Whether it still is where there is more time; without any guide that is of the suite main.
    "adapter-1m": Suite((
        "no-adapter", "no-sft", "sft-best", "sft-all", "hindsight", "experience", "plans", "exchanged", "retrieved",
        "retrieved-plans", "echo", "echo-plans", "random-analyses", "rules",
    ), MINECRAFT),
    # The same with a real, small LLM: start the server first, docs/adapter.md says how.
    "llm": Suite(
        WITH_ADAPTERS,
        "--llm http --llm-model smollm2 --llm-base-url http://127.0.0.1:18080/v1 --llm-concurrency 4 --llm-timeout 300 "
        "--llm-cache none --guidance-support 2 --adapter-temperature 0.5 --query-until 0.8 --eval-episodes 512 "
        "--total-timesteps 300000",
    ),
    "comprehension": Suite(("guided", "cosine-actions", "success", "binary", "no-comprehension")),
    "toy": Suite(
        ("guided", "none"),
        "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --updates-per-phase 3 "
        "--queries-per-phase 2 --eval-episodes 16 --adapter none --total-timesteps 2000",
    ),
}  # fmt: skip
SuiteName = Literal["main", "adapter", "adapter-1m", "llm", "comprehension", "toy"]
FREE_FLAGS = {"run_dir", "resume", "exp_name", "track", "save_every"}  # these change no result


@dataclass(frozen=True)
class Options:
    suite: SuiteName = "main"
    """main: the method, its controls and ablations; adapter: what it is worth to a guide that does not know the task;
    adapter-1m: the same with 1M steps, a part of it; llm: the same with a server that --llm http asks;
    comprehension: the scores; toy: a minute's check"""
    seeds: int = 5
    """seeds 1 to this"""
    jobs: int = 1
    """runs at a time"""
    variants: tuple[str, ...] = ()
    """only these; default all of the suite"""
    only: tuple[str, ...] = ()
    """only these of the runs, for example none-3"""
    total_timesteps: BigInt | None = None
    """env steps of each run; default as the suite has it"""
    runs_dir: Path | None = None
    """where the run folders are; default runs/<suite>"""
    slurm: bool = False
    """print a SLURM array script that does the same, and train nothing"""


@dataclass
class Job:
    """One run: its folder, the command that trains or resumes it, and where it stands."""

    folder: Path
    argv: list[str]
    total: int  # env steps
    state: Literal["waiting", "kept", "running", "done", "failed", "stopped", "busy"] = "waiting"
    error: str = ""
    process: subprocess.Popen | None = None
    log: TextIO | None = None
    task: TaskID | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log_path(self) -> Path:
        return self.folder.with_name(self.name + ".log")


# --------------------------------------------------------------------------------------------------------------------
# What is to be done
# --------------------------------------------------------------------------------------------------------------------


def flags_of(suite: str, variant: str, seed: int, total_timesteps: int | None = None) -> list[str]:
    words = [*SUITES[suite].flags.split(), *VARIANTS[variant].flags.split(), "--seed", str(seed)]  # the last one counts
    return words if total_timesteps is None else [*words, "--total-timesteps", str(total_timesteps)]


def differing_flag(found: dict[str, Any], argv: list[str]) -> str | None:
    """Where a config.json's flags are not those of argv: "--name: found, expected"; None if they are the same.

    A flag that either side does not know counts as having its default.
    """
    default, expected = runs.flags(rl.Args()), runs.flags(tyro.cli(rl.Args, args=argv))
    for name in expected.keys() - FREE_FLAGS:
        if found.get(name, default[name]) != expected[name]:
            return f"--{name.replace('_', '-')}: {found.get(name, default[name])} there, {expected[name]} here"
    return None


def plan(options: Options) -> list[Job]:
    """The jobs, one seed of every variant before the next seed. Raises ValueError, one line, for what can't work."""
    suite = SUITES[options.suite]
    variants = options.variants or suite.variants
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        where = "--variants" if options.variants else f"SUITES[{options.suite!r}]"
        raise ValueError(f"{where}: unknown variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: {getattr(options, name)} is out of range; choose 1 or more")
    runs_dir = (options.runs_dir or ROOT / "runs" / options.suite).resolve()
    pairs = {f"{variant}-{seed}": (variant, seed) for seed in range(1, options.seeds + 1) for variant in variants}
    odd = [name for name in options.only if name not in pairs]
    if odd:
        raise ValueError(f"--only: {odd[0]!r} is none of the runs {next(iter(pairs))} to {list(pairs)[-1]}")
    return [
        plan_job(runs_dir / name, flags_of(options.suite, *pairs[name], options.total_timesteps))
        for name in options.only or pairs
    ]


def plan_job(folder: Path, flags: list[str]) -> Job:
    """Kept if finished, resumed from its checkpoint, begun anew without one. Raises ValueError for a foreign folder."""
    args = tyro.cli(rl.Args, args=flags)
    rl.check_args(args)
    job = Job(folder, [*flags, "--run-dir", str(folder)], args.num_updates * args.batch_size)
    if not folder.exists():
        return job
    try:
        found = json.loads((folder / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is no run folder (no readable config.json); move it away") from None
    difference = differing_flag(found, flags)
    if difference:
        raise ValueError(f"{folder} was made with other flags ({difference}); choose another --runs-dir")
    if (folder / "summary.json").exists():
        job.state = "kept"
    elif any((folder / "checkpoints").glob("[0-9]*")):
        job.argv = ["--resume", str(folder)]
    return job


def slurm_script(jobs: list[Job], argv: list[str]) -> str:
    """An array job, one task for each run that is not finished. A task that is requeued resumes its run."""
    names = [job.name for job in jobs if job.state != "kept"]
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), *[word for word in argv if word != "--slurm"]])
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(names) - 1}",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --signal=B:INT@300",
        f"names=({' '.join(names)})",
        f"exec {command} --only ${{names[$SLURM_ARRAY_TASK_ID]}}",
    ])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Doing it
# --------------------------------------------------------------------------------------------------------------------


class Stop:
    """Ctrl-C, or SIGTERM, once: the runs finish their phase, save and end. Twice: they end at once."""

    def __init__(self, jobs: list[Job], progress: Progress):
        self.asked, self.jobs, self.progress = False, jobs, progress
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, *_: Any) -> None:
        if not self.asked:
            self.progress.console.print("Stopping: the runs finish their phase and save. Ctrl-C again stops at once.")
        self.asked = True
        for job in self.jobs:
            if job.state == "running":
                job.process.send_signal(signal.SIGINT)
            elif job.state == "waiting":
                job.state = "stopped"


def start(job: Job, progress: Progress) -> None:
    """Begin a run, in a session of its own so that Ctrl-C reaches it through us only.

    Its stderr is locked: the lock is the child's too, so nobody else trains in this folder until it has ended.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.log = job.log_path.open("a+")
    try:
        fcntl.flock(job.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        job.log.close()
        job.state = "busy"
        return
    job.log.truncate(0)
    if job.argv[0] != "--resume" and job.folder.exists():
        shutil.rmtree(job.folder)  # begun with these flags, but stopped before its first checkpoint
    command = [sys.executable, "rladapter_ppo.py", *job.argv]
    job.process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=job.log, start_new_session=True
    )
    job.state, job.task = "running", progress.add_task(job.name, total=job.total, status="starting")


def watch(job: Job, progress: Progress, stopping: bool) -> None:
    """Show how far a run is, and what became of it."""
    code = job.process.poll()
    last = last_metrics(job.folder)
    if last:
        mean_return = last.get("charts/episodic_return")
        status = f"{last['charts/SPS']:,.0f} steps/s" + ("" if mean_return is None else f"  return {mean_return:.2f}")
        if last["global_step"] >= job.total:
            status = "evaluating"
        progress.update(job.task, completed=last["global_step"], status=status)
    if code is None:
        return
    job.log.close()
    progress.remove_task(job.task)
    if code == 0 and (job.folder / "summary.json").exists():
        job.state = "done"
    elif stopping:
        job.state = "stopped"
    else:
        lines = job.log_path.read_text(errors="replace").split("\n")
        job.state = "failed"
        job.error = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}, no message")
    progress.console.print(f"{job.name}: {job.state}", highlight=False)


def last_metrics(folder: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, None before there is one."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2**16))
            return json.loads(file.read().split(b"\n")[-2])
    except (OSError, ValueError, IndexError):
        return None


def run_jobs(jobs: list[Job], limit: int) -> bool:
    """Train what is waiting, at most `limit` at a time. True if it was stopped."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        stop = Stop(jobs, progress)
        finished = sum(job.state == "kept" for job in jobs)
        everything = progress.add_task("all runs", total=len(jobs), completed=finished, status="")
        while any(job.state in ("waiting", "running") for job in jobs):
            running = [job for job in jobs if job.state == "running"]
            for job in [job for job in jobs if job.state == "waiting"][: limit - len(running)]:
                start(job, progress)
            time.sleep(0.2)
            for job in running:
                watch(job, progress, stop.asked)
            ended = sum(job.state not in ("waiting", "running") for job in jobs)
            progress.update(everything, completed=ended, status=f"{ended} of {len(jobs)}")
    return stop.asked


def report(jobs: list[Job], stopped: bool, argv: list[str]) -> int:
    """Print what became of the runs. Exit code 0; 1 if a run failed or is another process's; 130 after Ctrl-C."""
    counts = {state: sum(job.state == state for job in jobs) for state in ("kept", "done", "stopped", "busy", "failed")}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for job in jobs:
        if job.state == "busy":
            print(f"busy: {job.name}: another process trains it", file=sys.stderr)
        if job.state == "failed":
            print(f"FAILED: {job.name}: {job.error} (all of it: {job.log_path})", file=sys.stderr)
    if stopped:
        print(f"stopped; go on with: {shlex.join(['python', 'benchmarks/run.py', *argv])}")
        return 130
    return 1 if counts["failed"] or counts["busy"] else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        jobs = plan(options)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if any(job.state == "waiting" for job in jobs) and run_folder.is_in_no_commit(run_folder.git_commit()):
        way = "commit first, or collect with --allow-dirty"
        print(f"warning: code that is in no commit: plot.py --collect refuses its runs; {way}", file=sys.stderr)
    if not options.slurm:
        return report(jobs, run_jobs(jobs, options.jobs), argv)
    if all(job.state == "kept" for job in jobs):
        print("nothing is left to do", file=sys.stderr)
    else:
        print(slurm_script(jobs, argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
