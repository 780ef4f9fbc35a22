"""A run's folder: create one, log to it, checkpoint it, read it.

    config.json  metrics.jsonl  guidance.jsonl  outcomes.jsonl  examples.jsonl  summary.json  checkpoints/
    events.out.* (TensorBoard)  adapter/ (the fine-tuned LoRA weights)

Every line of a .jsonl file carries the phase it was written in, so that a resumed run can cut them back to its
checkpoint. Errors are ValueError with one line that says what to do; once training is under way nothing in here stops
it: a log or checkpoint that can't be written is reported once and training goes on.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "craftax", "transformers", "openai")
LOCK = "lock"
LOGS = ("metrics.jsonl", "guidance.jsonl", "outcomes.jsonl", "examples.jsonl")


def default_folder(env_id: str, exp_name: str, seed: int) -> Path:
    return Path("runs") / f"{env_id}__{exp_name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"


def check_free(folder: Path) -> None:
    """Raises ValueError if the folder holds anything already, or can't be one."""
    try:
        nothing = LOCK, "config.json.tmp"  # a process that was killed before it began leaves no more
        taken = folder.exists() and (not folder.is_dir() or any(path.name not in nothing for path in folder.iterdir()))
    except OSError as error:
        raise ValueError(
            f"--run-dir, --exp-name: {str(folder)[:80]}... can't be a folder ({error.strerror}); choose another name"
        ) from None
    if taken:
        raise ValueError(
            f"--run-dir: {folder} exists and is not empty; choose another, or continue it with --resume {folder}"
        )


def create(folder: Path, config: dict[str, Any]) -> None:
    """Makes a new run folder with its config.json. Raises ValueError if it can't be written."""
    check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise ValueError(f"--run-dir: can't write to {folder} ({error.strerror}); choose another folder") from None


def reserve(folder: Path) -> Path:
    """Makes a new folder of this name, or of this name and a number where another process was faster."""
    for number in itertools.count(1):
        name = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            name.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"--run-dir: can't write to {name} ({error.strerror}); choose another folder") from None
        return name


def lock(folder: Path) -> TextIO:
    """Makes a run folder and claims it for this process, until the file is closed.

    Raises ValueError if another process has it, or if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise ValueError(f"--run-dir: can't write to {folder} ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"--run-dir, --resume: another process trains in {folder}; wait for it, or stop it") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: can't lock {folder} ({error.strerror}); let no other process train there", file=sys.stderr)
    return file


def read_config(folder: Path, flag: str = "--resume") -> dict[str, Any]:
    """Reads config.json of a run that can be resumed.

    Raises ValueError, which begins with the flag, if the folder is no run or has no checkpoint.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        config["flags"]["seed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{flag}: {folder} is no run folder (no readable config.json in it)") from None
    if not has_checkpoint(folder):
        way = "start anew with another --run-dir" if flag == "--resume" else "let it train for some phases more"
        raise ValueError(f"{flag}: {folder} has no checkpoint yet; {way}")
    return config


def has_checkpoint(folder: Path) -> bool:
    """Says whether a whole checkpoint is there; one that is being written has a longer name."""
    return any(path.name.isdigit() for path in (folder / "checkpoints").glob("[0-9]*"))


def clear(folder: Path) -> None:
    """Takes away what a run left that was stopped before its first checkpoint, so that it can begin anew there.

    Raises ValueError for one that was not stopped: its checkpoints may be lost, or there was no space for any.
    """
    if not (folder / "config.json").exists():
        return
    if (folder / "summary.json").exists():
        way = "look at its summary.json, and give another --run-dir"
        raise ValueError(f"--resume: {folder} has made all its steps and has no checkpoint to go on from; {way}")
    with lock(folder):  # it may not have been stopped at all
        for name in ("checkpoints", "wandb", "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)
        files = (folder / name for name in (*LOGS, "config.json"))
        for path in (*files, *folder.glob("events.out.*"), *folder.glob("*.tmp")):
            path.unlink(missing_ok=True)


def describe_machine() -> dict[str, Any]:
    """Returns versions, device and git commit, for config.json."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return {
        "git_commit": git_commit(),
        "versions": versions,
        "device": f"{device.platform}: {device.device_kind}",
        "num_cpus": os.cpu_count(),
    }


def git_commit() -> str | None:
    """Returns the commit of this code, "-dirty" behind it with changes; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def is_in_no_commit(commit: str | None) -> bool:
    """Says whether what `git_commit` returned is of code that nobody can look up."""
    return not commit or commit.endswith("-dirty")


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes via a temporary file: a kill or a full disk leaves the old content or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Puts None in place of NaN and infinite numbers, for which JSON has no words."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    try:
        write_json(folder / "summary.json", summary)
    except OSError as error:
        print(f"warning: can't write {folder / 'summary.json'} ({error.strerror}); it reads:", file=sys.stderr)
        print(json.dumps(summary, indent=2))


class Log:
    """The .jsonl files, TensorBoard, and Weights & Biases if asked for."""

    def __init__(self, folder: Path, track: bool, config: dict[str, Any], first_step: int = 0):
        self.folder = folder
        self.failed = self.odd = False  # was a failure reported, a number that is none?
        self.tensorboard: TensorBoard | None = None
        self._guarded(lambda: setattr(self, "tensorboard", TensorBoard(folder, first_step + 1)))
        self.wandb = _start_wandb(folder, config) if track else None

    def metrics(self, record: dict[str, Any]) -> None:
        """Writes one object a phase; numbers go to TensorBoard and W&B under their tags."""
        odd = [tag for tag, value in record.items() if value is not None and finite(value) is None]
        if odd and not self.odd:
            self.odd = True
            print(f"warning: {', '.join(odd)} became NaN or infinite in phase {record['phase']}", file=sys.stderr)
        record = finite(record)
        self.append("metrics.jsonl", [record])
        step = record["global_step"]
        tagged = {tag: value for tag, value in record.items() if "/" in tag and value is not None}
        if self.tensorboard is not None:
            self._guarded(lambda: self.tensorboard.write(tagged, step))
        if self.wandb is not None:
            self._guarded(lambda: self.wandb.log(tagged, step=step))

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
        self._guarded(lambda: _append(self.folder / name, lines))

    def close(self) -> None:
        if self.tensorboard is not None:
            self._guarded(self.tensorboard.close)
        if self.wandb is not None:
            self._guarded(self.wandb.finish)

    def _guarded(self, write: Any) -> None:
        """Reports a failure once: a full disk or a lost connection must not end a training of hours."""
        try:
            write()
        except Exception as error:
            if not self.failed:
                print(f"warning: can't log to {self.folder} ({error}); training goes on", file=sys.stderr)
            self.failed = True


class NoLog:
    """For processes that are not the first one."""

    def metrics(self, record: dict[str, Any]) -> None: ...

    def append(self, name: str, records: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """A file of TensorBoard's events. Steps from purge_step on that older files hold are not shown.

    tensorboardX's SummaryWriter writes in a thread; when a full disk has ended that, it waits for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int):
        library = _import_tensorboard()
        from tensorboardX.event_file_writer import EventsWriter

        self.events, self.summaries = library.proto.event_pb2, library.proto.summary_pb2
        self.file = EventsWriter(str(folder / "events"))
        start = self.events.SessionLog(status=self.events.SessionLog.START)
        self.file.write_event(self.events.Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, tagged: dict[str, float], step: int) -> None:
        values = [self.summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in tagged.items()]
        summary = self.summaries.Summary(value=values)
        self.file.write_event(self.events.Event(wall_time=time.time(), step=step, summary=summary))
        self.file.flush()

    def close(self) -> None:
        """Closes the file. What a full disk does not take is given up: Python 3.13 would print a traceback later."""
        records = self.file._py_recordio_writer
        try:
            records.flush()
        finally:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, records._writer.fileno())
                os.close(nowhere)
            records.close()


def _import_tensorboard() -> Any:
    """Imports without torch, which it loads where it finds it: that takes longer than all the rest."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # its import fails, which tensorboardX expects
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


def _append(path: Path, text: str) -> None:
    """Appends whole lines: what a full disk cut off is taken back."""
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        start, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.truncate(path, start)
            raise


def check_wandb() -> None:
    """Logs in to Weights & Biases, or asks for the key where there is a terminal; offline it needs none.

    Raises ValueError, one line, where it is not installed, or takes no login.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "--track: Weights & Biases is not installed; pip install wandb, or leave --track out"
        ) from None
    try:
        wandb.login()
    except Exception as error:  # no key and no terminal to ask at, a key that is refused, no network
        way = "set WANDB_API_KEY, or WANDB_MODE=offline, or leave --track out"
        raise ValueError(f"--track: can't log in to Weights & Biases ({clean_line(str(error))}); {way}") from None


def _start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """Begins a run of W&B. None, after a warning, where it does not come about: training goes on without."""
    import wandb

    try:
        return wandb.init(project="rladapter-jax", name=folder.name, dir=str(folder), config=config)
    except Exception as error:
        print(f"warning: can't start Weights & Biases ({clean_line(str(error))}); training goes on", file=sys.stderr)
        return None


class Checkpoints:
    """Orbax checkpoints of a run: the arrays of a pytree, and a small JSON beside them.

    Raises ValueError, one line, for a folder of checkpoints that can't be made or read at all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Of several processes only the first one has checkpoints: it must not wait for the others.
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="0")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=False, enable_async_checkpointing=False, multiprocessing_options=alone
        )
        try:
            (folder / "checkpoints").mkdir(exist_ok=True)
            with quiet("absl"):
                self.manager = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)
        except Exception as error:
            raise ValueError(f"{folder / 'checkpoints'} can't be used ({clean_line(str(error))})") from None
        self.failed = False  # was it said that the newest one could not be written?
        say_nothing_of_failed_saves()

    def save(
        self, phase: int, arrays: Any, situations: dict[str, np.ndarray], extra: dict[str, Any]
    ) -> bool:
        """Returns True if it was written. Where not, training goes on, the older checkpoint in place.

        That is reported once, until one can be written again. What was written of it is taken away: space may be short.
        """
        try:
            items = {"arrays": ocp.args.StandardSave(arrays), "extra": ocp.args.JsonSave(extra)}
            if all(map(len, situations.values())):  # Orbax takes no empty arrays
                items["situations"] = ocp.args.StandardSave(situations)
            with quiet("absl"):  # Orbax would log a stack trace of its own for what is reported below
                self.manager.save(phase, args=ocp.args.Composite(**items), force=True)
                self.manager.wait_until_finished()
            self.failed = False
        except Exception as error:
            self.take_away_failed()
            if not self.failed:
                reason = f"can't write a checkpoint to {self.folder} ({clean_line(str(error))})"
                print(f"warning: {reason}; training goes on", file=sys.stderr)
            self.failed = True
        return not self.failed

    def take_away_failed(self, still: float = 0.2, at_most: float = 5) -> None:
        """Takes away what saves that failed have left, until no more of it has come for a while.

        Their threads, for which nobody can wait, write on: what was taken away comes again, and fills the disk.

        Args:
            still, at_most: seconds
        """
        start = quiet_since = time.monotonic()
        while time.monotonic() < min(quiet_since + still, start + at_most):
            for half in (self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
                if not half.exists():
                    quiet_since = time.monotonic()
            time.sleep(still / 10)

    def restore(self, arrays: Any, situations: dict[str, np.ndarray]) -> tuple[int, Any, Any, dict[str, Any]]:
        """Reads the newest readable checkpoint. Raises ValueError if none is.

        Returns:
            phase; arrays like those given; situations, of any number, those given where none were saved; extra
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        found = self._newest(self._phases(), ocp.args.StandardRestore(abstract))
        if found is None:
            way = "start anew with another --run-dir"
            raise ValueError(f"--resume: no checkpoint of {self.folder} fits this code; {way}")
        phase, restored = found
        met = to_numpy(restored["situations"]) if "situations" in restored else situations
        return phase, restored["arrays"], met, restored["extra"]

    def read(self, phase: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Reads what `read_checkpoint` returns."""
        there = self._phases()
        if phase is not None and phase not in there:
            choice = " or ".join(map(str, there))
            raise ValueError(f"--checkpoint: {self.folder} has none of phase {phase}; choose {choice}")
        found = self._newest(there if phase is None else [phase], ocp.args.StandardRestore())
        if found is None:
            raise ValueError(f"runs: no checkpoint of {self.folder} can be read")
        return found[0], found[1]["arrays"], found[1]["extra"]

    def _phases(self) -> list[int]:
        return sorted(self.manager.all_steps(), reverse=True)

    def _newest(self, phases: list[int], arrays: Any) -> tuple[int, Any] | None:
        """Reads the first readable checkpoint of these phases, its arrays as `arrays` says. None if none is."""
        for phase in phases:
            items = {"arrays": arrays, "extra": ocp.args.JsonRestore()}
            if (self.folder / "checkpoints" / str(phase) / "situations").exists():
                items["situations"] = ocp.args.StandardRestore()
            try:
                with quiet("absl"):
                    return phase, self.manager.restore(phase, args=ocp.args.Composite(**items))
            except Exception as error:
                reason = clean_line(str(error))
                print(f"warning: checkpoint {phase} of {self.folder} can't be read ({reason})", file=sys.stderr)
        return None

    def close(self) -> None:
        self.manager.close()


def say_nothing_of_failed_saves() -> None:
    """Keeps the rest of a save or a restore that failed quiet: hundreds of files find nobody any more to report to.

    What they say comes at any time: from a thread that lags behind, or when garbage is collected. Python 3.11 breaks
    where that interrupts `ast.parse`, as it parses to print a traceback.
    """
    before = sys.unraisablehook
    if getattr(before, "says_nothing", False):
        return

    def hook(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    hook.says_nothing = True
    sys.unraisablehook = hook
    for name in "asyncio", "absl":
        logging.getLogger(name).addFilter(lambda record: not re.search("orbax|OCDBT", record.getMessage()))


def read_checkpoint(folder: Path, phase: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint whatever code wrote it: that of a phase, or the newest readable one. Raises ValueError.

    Returns:
        phase; arrays as nested dicts of numpy arrays; the JSON beside them
    """
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.read(phase)
    finally:
        checkpoints.close()


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Lets a library's logger say nothing for a while."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


def clean_line(text: str) -> str:
    """Returns a text in one line that is not long, without what would do something in a terminal."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


def read_log(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the whole lines of a log: one may be cut off."""
    records = []
    # At \n alone: splitlines would also split at characters that JSON leaves in strings.
    content = (folder / name).read_bytes() if (folder / name).exists() else b""
    for line in content.split(b"\n"):
        try:
            record = json.loads(line.decode())
            if type(record["phase"]) is int:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def cut_logs(folder: Path, phase: int) -> None:
    """Drops what was logged in this phase or later, or was cut off in the middle of a line."""
    for name in LOGS:
        path = folder / name
        if not path.exists():
            continue
        kept = [json.dumps(record) + "\n" for record in read_log(folder, name) if record["phase"] < phase]
        write_whole(path, "".join(kept))


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
