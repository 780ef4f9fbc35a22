"""A training: its clocks, progress, checkpoints, Ctrl-C (`Run`), and how it starts from the command line (`launch`)."""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from utils import devices, run_folder
from utils.cli import EXIT_BAD_INPUT, first_line
from utils.compilation import CompileClock, use_compilation_cache
from utils.run_folder import Checkpoints, Log, NoLog, clean_line, to_numpy

EXIT_STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal, as shells have it
AUTO = Path("auto")  # --resume auto
MAX_FAILED = 3  # updates in a row whose gradients are no numbers
EXIT_DIVERGED = 1
Situations = dict[str, np.ndarray]  # obs (M, O) uint8, facts (M, P) bool
# Metrics that a run adds up over all its sessions: llm/calls is llm_calls in its totals and in summary.json
TOTALS = (
    "calls", "cache_hits", "failures", "skipped", "retries", "timeouts", "prompt_tokens", "completion_tokens", "cost"
)  # fmt: skip

# Flags that summary.json repeats
SUMMARY_FLAGS = (
    "seed env_id guidance guidance_lookup guidance_bonus llm rules_knowledge llm_model llm_async embed adapter trials "
    "analyses sft_every sft_data sft_learning_rate comprehension"
).split()


class Diverged(Exception):
    """A training whose gradients are no numbers any more."""


def launch(main: Callable[[Any, "Run"], Any], args_type: type, check: Callable[[Any], None], argv: list[str]) -> int:
    """Runs main(args, run) from the command line.

    Returns:
        0; 2 after one line on stderr for input that can't work (a ValueError before training); 1 for a training whose
        gradients are no numbers any more; 130 after Ctrl-C, 143 after SIGTERM
    """
    args = at_home(tyro.cli(args_type, args=argv))
    with devices.all_or_none():
        run = None
        try:
            if args.resume:
                args = resumed_args(args_type, args, argv)
            check(args)
            use_compilation_cache()
            if args.distributed:
                devices.initialize()
            devices.check()
            with Run(args) as run:
                summary = main(args, run)
        except ValueError as error:
            if run is not None and run.log is not None:  # training is under way: a bug, not bad input
                raise
            print(f"error: {first_line(error)}", file=sys.stderr)
            return devices.leave(EXIT_BAD_INPUT)
        except Diverged as error:
            print(f"error: {first_line(error)}", file=sys.stderr)
            return devices.leave(EXIT_DIVERGED)
        except KeyboardInterrupt:
            saved = run is not None and run_folder.has_checkpoint(run.folder)
            what = f"what was saved before can be resumed: {again(run.folder)}" if saved else "nothing was saved yet"
            print(f"stopped at once; {what}", file=sys.stderr)
            return devices.leave(EXIT_STOPPED[signal.SIGINT if run is None else run.stop.signal])
        return report(run, summary)


def report(run: "Run", summary: dict[str, Any] | None) -> int:
    """Prints how a run ended. Returns the exit code."""
    if run.stopped:
        run.console.print(f"stopped; continue with: {again(run.folder)}", markup=False, highlight=False, soft_wrap=True)
    if summary is not None and devices.is_leader():
        shown = {name: value for name, value in summary.items() if name != "achievements"}
        shown = {name: round(v, 2) or float(f"{v:.2g}") if isinstance(v, float) else v for name, v in shown.items()}
        run.console.print(json.dumps(shown, indent=2), markup=False, highlight=False, soft_wrap=True)
        folder = shlex.quote(str(run.folder))
        where = f"results: {folder}/summary.json   curves: tensorboard --logdir {folder}"
        run.console.print(where, markup=False, highlight=False, soft_wrap=True)
    return EXIT_STOPPED[run.stop.signal] if run.stopped else 0


def again(folder: Path) -> str:
    """Returns the command that goes on with a run."""
    script = sys.argv[0] if sys.argv[0].endswith(".py") else "rladapter_ppo.py"
    return f"python {shlex.quote(Path(script).name)} --resume {shlex.quote(str(folder))}"


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


def flags(args: Any) -> dict[str, Any]:
    """Returns the flags by name, those of nested groups among them, as config.json has them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            found |= flags(value)
        else:
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            found[field.name] = value
    return found


def args_from_flags(args_type: type, values: dict[str, Any]) -> Any:
    """Makes args of `flags`; takes the flags that it uses out of values. Raises ValueError for one of another type."""
    made = {}
    for name, kind in typing.get_type_hints(args_type).items():
        if dataclasses.is_dataclass(kind):
            made[name] = args_from_flags(kind, values)
        elif name in values:
            value = values.pop(name)
            if not may_be(kind, value):
                raise ValueError(f"config.json: {name} can't be {clean_line(json.dumps(value))}")
            if isinstance(value, list):
                value = tuple(value)
            elif value is not None and Path in typing.get_args(kind):
                value = Path(value)
            made[name] = value
    return args_type(**made)


def may_be(kind: Any, value: Any) -> bool:
    """Says whether a value of a config.json is of the type of a flag."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # the second is that of an Annotated one
        return any(may_be(one, value) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        return len(kinds) == len(value) and all(map(may_be, kinds, value))
    like = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    return type(value) in like


def at_home(args: Any) -> Any:
    """Puts the home folder for a leading ~ in every flag that may be a path: a shell leaves --flag=~/x as it is."""
    changed = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = at_home(value)
        elif isinstance(value, str | Path) and str(value).startswith("~"):
            changed[field.name] = type(value)(os.path.expanduser(value))
    return dataclasses.replace(args, **changed)


def resumed_args(args_type: type, args: Any, argv: list[str]) -> Any:
    """Reads a run's own flags; of those given now only --total-timesteps may differ. Raises ValueError otherwise.

    --resume auto goes on with the run in --run-dir; before its first checkpoint it begins anew there.
    """
    folder = args.resume
    if folder == AUTO:
        if args.run_dir is None:
            raise ValueError("--resume auto: goes on with the run in --run-dir, or starts it there; give a --run-dir")
        folder = args.run_dir
        if not run_folder.has_checkpoint(folder):
            run_folder.clear(folder)
            return dataclasses.replace(args, resume=None)
    elif args.run_dir is not None and args.run_dir.resolve() != folder.resolve():
        raise ValueError(
            f"--run-dir: a resumed run goes on in its own folder; leave it out, or copy {folder} and resume the copy"
        )
    saved = run_folder.read_config(folder)["flags"]
    odd = sorted(set(saved) ^ set(flags(args_type())))
    if odd:
        raise ValueError(
            f"--resume: {folder} was made by another version of this script (flags that differ: "
            f"{clean_line(', '.join(odd))})"
        )
    base = args_from_flags(args_type, dict(saved))
    given = at_home(tyro.cli(args_type, args=argv, default=base))
    now = flags(given)
    free = ("resume", "total_timesteps", "run_dir")
    changed = [name for name, value in flags(base).items() if name not in free and now[name] != value]
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise ValueError(
            f"{flag}: a resumed run keeps its flags, only --total-timesteps may change; start anew without --resume"
        )
    return dataclasses.replace(given, resume=folder, run_dir=base.run_dir)


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


class Run:
    """One training's folder, logs, checkpoints, clocks, progress bar, Ctrl-C. Of several processes the leader's writes.

    Reads these flags of args: run_dir, resume, dry_run, env_id, exp_name, seed, track, save_every, total_steps;
    sft.sft_every, whether the adapter learns; llm.llm, whether calls that a kill lost were paid for.
    """

    def __init__(self, args: Any):
        self.args, self.leads = args, devices.is_leader()
        self.folder = args.resume or args.run_dir or run_folder.default_folder(args.env_id, args.exp_name, args.seed)
        if args.track and self.leads and not args.dry_run:
            run_folder.check_wandb()
        if self.leads and args.run_dir and not (args.resume or args.dry_run):
            run_folder.check_free(self.folder)
        self.phase = 0
        self.totals: dict[str, Any] = {"global_step": 0, "wall_seconds": 0.0, "compile_seconds": 0.0}
        self.totals |= {"llm_questions": 0} | {f"llm_{name}": 0 for name in TOTALS}
        self.totals |= {"episodes": 0.0, "achievements": 0.0, "score_all_episodes": None}
        self.stop, self.stopped = StopRequest(), False
        self.console = Console(quiet=not self.leads, file=Unbreakable(sys.stdout))
        self.log: Log | NoLog | None = None  # until training starts
        self.checkpoints: Checkpoints | None = None
        self.guide: Any = None
        self.progress: Progress | None = None
        self.lock: TextIO | None = None
        self.warned = False  # of gradients that are no numbers
        self.compile_clock, self.made_at = CompileClock(), time.perf_counter()
        self.times: dict[str, float] = {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Closes what is open, and gives Ctrl-C back."""
        self.compile_clock.close()
        self.stop.close()
        if self.progress is not None:
            self.progress.stop()
        if kind is KeyboardInterrupt:  # stop at once: a guide may still be asked, a server may not answer
            return
        for part in (self.guide, self.log, self.checkpoints, self.lock):
            if part is not None:
                part.close()

    def start(
        self, env: devices.SharedEnv, runner: Any, situations: Situations, table: Any, adapter: Any, guide: Any
    ) -> tuple[Any, Situations]:
        """Makes the folder, or reads its newest checkpoint. Raises ValueError, one line, for what can't work.

        Returns:
            runner and situations to go on with; table, adapter and guide take what was saved
        """
        if self.leads and not self.args.resume:
            config = {"flags": flags(self.args), "argv": sys.argv[1:]} | run_folder.describe_machine()
            if self.args.run_dir is None:
                self.folder = run_folder.reserve(self.folder)
            self.lock = run_folder.lock(self.folder)
            run_folder.create(self.folder, config)
        elif self.leads:
            self.lock = run_folder.lock(self.folder)
        self.guide, self.checkpoints = guide, Checkpoints(self.folder) if self.leads else None
        if self.args.resume:
            runner, situations = self._restore(env, runner, situations, table, adapter, guide)
            if self.finished and (self.folder / "summary.json").exists():
                raise ValueError(
                    f"--resume: {self.folder} has made its {self.args.total_steps:,} steps, there is nothing to train; "
                    "give more --total-timesteps, or look at it with evaluate.py"
                )
        first_step = self.totals["global_step"]
        self.log = Log(self.folder, self.args.track, flags(self.args), first_step) if self.leads else NoLog()
        self.setup_seconds = time.perf_counter() - self.made_at
        self.stop.listen(self.console)
        status = TextColumn("{task.percentage:>3.0f}%  {task.fields[status]}")
        columns = TextColumn("{task.description}"), BarColumn(), status, TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(
            "training", total=self.args.total_steps, completed=first_step, status="compiling"
        )
        say = f"training in {self.folder}; the first phase includes compilation"
        self.console.print(say, markup=False, highlight=False, soft_wrap=True)
        self.progress.start()
        return runner, situations

    @property
    def finished(self) -> bool:
        return self.totals["global_step"] >= self.args.total_steps

    def phases(self) -> Iterator[int]:
        """Counts the phases that are left. Ends early after Ctrl-C."""
        while not (self.finished or self.stopped):
            self.times = {}
            self.phase_began = time.perf_counter(), self.compile_clock.seconds
            yield self.phase
            self.phase += 1
        self.training_ended = time.perf_counter()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the seconds of a part of a phase, without those of compilation, as time/<name>."""
        start, compiled = time.perf_counter(), self.compile_clock.seconds
        yield
        seconds = time.perf_counter() - start - (self.compile_clock.seconds - compiled)
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + seconds

    def due(self, every: int) -> bool:
        """Is this phase the last of `every`? Never with 0."""
        return every > 0 and (self.phase + 1) % every == 0

    def add(self, **values: Any) -> None:
        """Adds to the totals, which are saved with each checkpoint."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value  # a checkpoint may be older than a total

    def append(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Appends lines of this phase to a .jsonl file."""
        self.log.append(name, [{"phase": self.phase} | line for line in lines])

    def log_questions(self, questions: list[Any], game: Any) -> None:
        """Appends the questions of a pause to guidance.jsonl, as soon as they are answered: answers may be paid for."""
        place = {"global_step": self.totals["global_step"]}
        self.append("guidance.jsonl", [place | question.log_line(game, self.guide.name) for question in questions])
        self.add(llm_questions=len(questions))

    def log_phase(self, metrics: dict[str, Any]) -> None:
        """Writes the metrics of a phase, with its times, and shows how far the run is."""
        now, (began, compiled) = time.perf_counter(), self.phase_began
        compile_seconds = self.compile_clock.seconds - compiled
        self.add(wall_seconds=now - began, compile_seconds=compile_seconds)
        self.add(**{f"llm_{name}": metrics.get(f"llm/{name}", 0) for name in TOTALS})
        place = {"phase": self.phase, "global_step": self.totals["global_step"], "charts/SPS": self.steps_per_second}
        record = place | metrics | self.times | {"time/compile": compile_seconds}
        self.log.metrics(record)
        for tag in record:
            if tag.endswith("/score_all_episodes"):
                self.totals["score_all_episodes"] = record[tag]
        status = self._status(record)
        at = self.totals["global_step"]
        self.progress.update(self.task, description="training", completed=at, status=status)
        if not self.console.is_terminal:  # a bar would show nothing there until the end
            share = self.totals["global_step"] / self.args.total_steps
            self.console.print(f"phase {self.phase}  {share:4.0%}  {status}", highlight=False, soft_wrap=True)

    def _status(self, record: dict[str, Any]) -> str:
        mean_return = record.get("charts/episodic_return")
        score = next((value for tag, value in record.items() if tag.endswith("/score")), None)
        learned = "" if mean_return is None else f"return {mean_return:.2f}  score {score:.1f}%  "
        return f"{learned}{record['charts/SPS']:,.0f} steps/s  {self.totals['llm_calls']} calls"

    @property
    def steps_per_second(self) -> float:
        """Returns env steps per second of all sessions, without setting up, compilation and evaluation."""
        return self.totals["global_step"] / (self.totals["wall_seconds"] - self.totals["compile_seconds"])

    def check_numbers(self, skipped: float, failed: int) -> None:
        """Reports updates that were skipped, wholly or in part: their gradients were NaN or infinite.

        Args:
            skipped: share of this phase's minibatches
            failed: updates in a row
        Raises Diverged when there were MAX_FAILED in a row: nothing is learned any more.
        """
        if failed >= MAX_FAILED:
            raise Diverged(
                f"gradients were NaN or infinite in {failed} updates in a row, up to phase {self.phase}; the run "
                "stops. What it saved is sound, but goes the same way again: start anew with a smaller --learning-rate"
            )
        if skipped and not self.warned:
            self.warned = True
            what = f"{100 * skipped:.3g} % of the minibatches of phase {self.phase}"
            print(f"warning: gradients were NaN or infinite in {what}; these were skipped", file=sys.stderr)

    def save_if_due(
        self, env: devices.SharedEnv, runner: Any, situations: Situations, table: Any, adapter: Any
    ) -> None:
        """Writes a checkpoint every few phases, after the last one, and after Ctrl-C. All processes must call it."""
        self.stopped = bool(devices.from_leader(np.bool_(self.stop.asked))) and not self.finished
        last = self.stopped or self.finished
        if not (last or self.due(self.args.save_every)):
            return
        saved, rest = saved_arrays(env, runner, table, adapter)
        extra = {"totals": jax.tree.map(_plain, self.totals), "table": rest}
        if self.leads:
            self.checkpoints.save(self.phase, saved, situations, extra)

    def save_adapter(self, adapter: Any) -> None:
        """Writes what the adapter has learnt, if it is fine-tuned at all."""
        if not (self.leads and self.args.sft.sft_every):
            return
        try:
            adapter.save(self.folder / "adapter")
        except Exception as error:  # safetensors has a class of its own for a full disk
            print(f"warning: can't write {self.folder / 'adapter'} ({first_line(error)})", file=sys.stderr)

    def _restore(
        self, env: devices.SharedEnv, runner: Any, situations: Situations, table: Any, adapter: Any, guide: Any
    ) -> tuple[Any, Situations]:
        """Reads the newest checkpoint. The leader reads, and hands the others what they need."""
        saved, _ = saved_arrays(env, runner, table, adapter)
        phase, extra = 0, {}
        if self.leads:
            phase, saved, situations, extra = self.checkpoints.restore(saved, situations)
            try:
                table.load_state(saved["table"], extra["table"])
                check_totals(extra["totals"])
            except Exception as error:  # whatever is wrong with it
                why = f"{type(error).__name__}: {clean_line(str(error))}"
                raise ValueError(f"--resume: checkpoint {phase} of {self.folder} can't be used ({why})") from None
        phase, extra = devices.json_from_leader((phase, extra))
        runner = devices.put_like(devices.from_leader(saved["runner"]), runner)
        adapter.load_state(saved["adapter"])
        self.totals |= {name: np.array(v) if isinstance(v, list) else v for name, v in extra["totals"].items()}
        self.phase = phase + 1
        if self.args.llm.llm == "http":  # the phases after it are trained anew, but their calls were made and paid for
            lost = [line for line in run_folder.read_log(self.folder, "guidance.jsonl") if line["phase"] >= self.phase]
            self.add(**spent(lost))
        guide.resume(self.totals["llm_questions"], self.totals["llm_calls"], self.totals["llm_cost"])
        if self.leads:
            run_folder.cut_logs(self.folder, self.phase)
        return runner, situations

    def show_tuning(self, steps: int, total: int) -> None:
        """Shows how far a fine-tuning of the adapter is."""
        self.progress.update(self.task, description="fine-tuning", status=f"step {steps} of {total}")

    def show_evaluation(self, episodes: int, total: int) -> None:
        """Shows how far the final evaluation is. Raises KeyboardInterrupt if it is to stop: training is saved."""
        if self.stop.asked:
            raise KeyboardInterrupt
        self.progress.update(self.task, description="evaluating", status=f"{episodes} of {total} episodes")

    def finish(self, result: dict[str, Any], in_force: dict[str, Any]) -> dict[str, Any]:
        """Writes summary.json: the result, the totals, the clocks, the flags that results are sorted by.

        Args:
            in_force: flags that have another value than the one given
        """
        totals = {name: value for name, value in self.totals.items() if name not in ("achievements", "episodes")}
        clocks = {"setup_seconds": self.setup_seconds, "eval_seconds": time.perf_counter() - self.training_ended}
        given = flags(self.args) | in_force
        summary = totals | result | {"SPS": self.steps_per_second}
        summary |= clocks | {name: given[name] for name in SUMMARY_FLAGS}
        if self.leads:
            if self.checkpoints.failed:
                self.checkpoints.take_away_failed()
            run_folder.write_summary(self.folder, summary)
        return summary


class StopRequest:
    """Ctrl-C or SIGTERM once: finish the phase, save, stop. Ctrl-C again: stop at once."""

    def __init__(self) -> None:
        self.asked, self.signal, self.before, self.console = False, signal.SIGINT, {}, None

    def listen(self, console: Any) -> None:
        """Takes the signals over. In a thread that is not the main one they are not ours to take."""
        self.console = console
        with contextlib.suppress(ValueError):
            for number in EXIT_STOPPED:
                self.before[number] = signal.signal(number, self)

    def __call__(self, number: int, *_: Any) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.signal = True, number
            self.console.print("Stopping after this phase, then saving. Ctrl-C again stops at once.")

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class Unbreakable:
    """A stream for progress: where it was closed or is full (| head, a full disk) nothing more is said, and no more."""

    def __init__(self, stream: TextIO):
        self.stream, self.broken = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._guarded(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._guarded(self.stream.flush)

    def _guarded(self, use: Callable[[], Any]) -> None:
        if self.broken:
            return
        try:
            use()
        except (OSError, ValueError):  # ValueError: it is closed
            self.broken = True
            with contextlib.suppress(OSError, ValueError):  # what is buffered would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def saved_arrays(env: devices.SharedEnv, runner: Any, table: Any, adapter: Any) -> tuple[dict[str, Any], Any]:
    """Returns the arrays of a checkpoint, and the rest of the table. All processes must call it."""
    arrays, rest = table.state()
    return {"runner": env.to_host(runner), "table": arrays, "adapter": to_numpy(adapter.state())}, rest


def spent(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Returns what questions in a guidance.jsonl took, under the names of a run's totals."""
    names = ("calls", "cost", "prompt_tokens", "completion_tokens")
    return {f"llm_{name}": sum(line[name] for line in lines if is_number(line.get(name))) for name in names}


def check_totals(saved: dict[str, Any]) -> None:
    """Raises ValueError, or KeyError, for totals of a checkpoint that are no numbers."""
    for name, value in saved.items():
        none = value is None and name == "score_all_episodes"
        if not (none or all(map(is_number, value if isinstance(value, list) else [value]))):
            raise ValueError(f"{name} is no number")
    saved["global_step"]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _plain(value: Any) -> Any:
    """Returns a number or a list of numbers, for JSON."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
