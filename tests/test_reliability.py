"""What a machine, a scheduler or a hurried user does to a run. In process, on the toy game."""

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runs import ROOT, TOY

import rladapter_adapter
import rladapter_ppo as rl
from utils import compilation, devices, run_folder, runs

TUNED = "--adapter", str(ROOT / "assets/adapter-tiny"), "--sft-every", 1, "--sft-data", "all"


@pytest.fixture(autouse=True)
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "use_compilation_cache", lambda: None)  # the tests have one of their own


def train(*words, steps=800):
    return rl.cli([*TOY, "--total-timesteps", str(steps), *map(str, words)])


def refused(capsys, *words, steps=800):
    """The line that a command says before it ends with exit code 2."""
    assert train(*words, steps=steps) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def at_phase(monkeypatch, number, act):
    """Lets something happen while a phase is trained."""
    real, count = rl.train_phase, iter(range(1000))

    def phase(*args):
        if next(count) == number:
            act()
        return real(*args)

    monkeypatch.setattr(rl, "train_phase", phase)


def contents(folder, *names):
    """Logs without times."""

    def timeless(line):
        return {name: x for name, x in line.items() if not any(word in name for word in ("time", "SPS", "seconds"))}

    return [[timeless(json.loads(line)) for line in (folder / name).open()] for name in names]


# --------------------------------------------------------------------------------------------------
# Stopped, and gone on with
# --------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rladapter_ppo.py"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert train("--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        at_phase(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train("--run-dir", tmp_path / "run", "--save-every", 10**6) == 143
    assert {number: signal.getsignal(number) for number in before} == before
    said = capsys.readouterr().out
    assert f"rladapter_ppo.py --resume {tmp_path / 'run'}" in said
    assert rl.cli(["--resume", str(tmp_path / "run")]) == 0
    logs = "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl"
    assert contents(tmp_path / "run", *logs) == contents(tmp_path / "whole", *logs)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_as_if_it_had_never_been_killed(tmp_path, kills):
    """Real processes, killed while they import, set up, pause, train, save: logs and parameters are the same."""
    flags = [*TOY, "--total-timesteps", "12000", "--save-every", "1", "--resume", "auto", "--run-dir"]
    command = [sys.executable, str(ROOT / "rladapter_ppo.py"), *flags]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    for moment in np.random.default_rng(0).uniform(0.2, 1.0, kills):
        process = subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(moment * seconds)
            assert process.returncode in (0, 2), process.stderr.read()  # 2: it had ended the time before
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run([*command, str(tmp_path / "run")], capture_output=True)
    assert_same(tmp_path / "run", tmp_path / "whole", "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl")


# Its first two words say when it kills itself: so many seconds into a step of fine-tuning, the first one is number 1.
KILLED_IN_FINE_TUNING = """
import itertools, os, signal, sys, threading
import rladapter_adapter, rladapter_ppo
number, seconds, *words = sys.argv[1:]
real, count = rladapter_adapter.sft_step, itertools.count(1)
def step(*args):
    if next(count) == int(number):
        threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return real(*args)
rladapter_adapter.sft_step = step
sys.exit(rladapter_ppo.cli(words))
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_the_adapter_is_tuned_it_ends_as_if_it_had_never_been_killed(tmp_path, kills):
    """Real processes again. A step of fine-tuning takes some 20 ms, one has two to four: what was tuned is lost."""
    steps = 400 * kills
    flags = [*TOY, *TUNED, "--total-timesteps", steps, "--save-every", 1, "--resume", "auto", "--run-dir"]
    assert train(*flags[len(TOY) : -3], "--run-dir", tmp_path / "whole", steps=steps) == 0
    moments = np.random.default_rng(0)
    for _ in range(kills):
        words = moments.integers(1, 6), moments.uniform(0, 0.05), *flags, tmp_path / "run"
        command = [sys.executable, "-c", KILLED_IN_FINE_TUNING, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert train(*flags[len(TOY) :], tmp_path / "run", steps=steps) == 0
    logs = "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl", "examples.jsonl"
    assert_same(tmp_path / "run", tmp_path / "whole", *logs)
    tuned = [m for m in run_folder.read_log(tmp_path / "run", "metrics.jsonl") if m["adapter/examples"]]
    assert len(tuned) > kills and any(m["adapter/nll_after"] < m["adapter/nll_before"] for m in tuned)
    weights = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def assert_same(run, whole, *logs):
    """Two runs logged the same but for times, and ended with the same parameters and the same evaluation."""
    assert contents(run, *logs) == contents(whole, *logs)
    expected, found = (run_folder.read_checkpoint(folder)[1] for folder in (whole, run))
    assert jax.tree.all(jax.tree.map(np.array_equal, expected, found))
    results = [json.loads((folder / "summary.json").read_text()) for folder in (whole, run)]
    assert results[0]["episodic_return"] == results[1]["episodic_return"]


def test_resume_auto_starts_goes_on_and_starts_again_what_was_killed_early(tmp_path, monkeypatch):
    flags = "--resume", "auto", "--run-dir", tmp_path / "run"
    with monkeypatch.context() as patch:
        at_phase(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(*flags) == 143
    assert train(*flags) == 0  # goes on
    assert json.loads((tmp_path / "run/summary.json").read_text())["global_step"] == 896
    early = tmp_path / "early"
    shutil.copytree(tmp_path / "run", early)
    shutil.rmtree(early / "checkpoints")
    (early / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # killed in its first save
    (early / "summary.json").rename(early / "summary.json.tmp")
    (early / "adapter").mkdir()
    assert train("--resume", "auto", "--run-dir", early) == 0 and not (early / "summary.json.tmp").exists()
    logs = "metrics.jsonl", "guidance.jsonl"
    assert contents(early, *logs) == contents(tmp_path / "run", *logs)


def test_a_resumed_run_stays_in_its_folder(tmp_path, capsys):
    assert train("--run-dir", tmp_path / "a") == 0
    assert "goes on in its own folder" in refused(capsys, "--resume", tmp_path / "a", "--run-dir", tmp_path / "b")
    assert "give a --run-dir" in refused(capsys, "--resume", "auto")
    assert "nothing to train" in refused(capsys, "--resume", tmp_path / "a")
    summary = (tmp_path / "a/summary.json").read_bytes()
    assert (tmp_path / "a/summary.json").read_bytes() == summary and not (tmp_path / "b").exists()


def test_resume_auto_leaves_a_live_run_alone(tmp_path, capsys):
    """One that another process trains, and that has no checkpoint yet: it was once wiped, its lock included."""
    assert train("--run-dir", tmp_path / "run") == 0
    for path in (tmp_path / "run/checkpoints", tmp_path / "run/summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with run_folder.lock(tmp_path / "run"):
        assert "another process" in refused(capsys, "--resume", "auto", "--run-dir", tmp_path / "run")
        assert (tmp_path / "run/config.json").exists() and (tmp_path / "run/metrics.jsonl").exists()
        assert "not empty" in refused(capsys, "--run-dir", tmp_path / "run")
    (tmp_path / "run/wandb").mkdir()
    assert train("--resume", "auto", "--run-dir", tmp_path / "run") == 0  # its process is gone


def test_an_evaluation_that_was_stopped_is_made_up_for(tmp_path, monkeypatch, capsys):
    real = rl.Tally.add

    def stop(self, *steps):
        os.kill(os.getpid(), signal.SIGINT)
        real(self, *steps)

    with monkeypatch.context() as patch:
        patch.setattr(rl.Tally, "add", stop)
        assert train("--run-dir", tmp_path / "run", "--eval-episodes", 8) == 130
    assert "can be resumed" in capsys.readouterr().err and not (tmp_path / "run/summary.json").exists()
    assert rl.cli(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/summary.json").exists()


def test_ctrl_c_before_training_says_that_nothing_was_saved(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "make_adapter", stop)
    assert train("--run-dir", tmp_path / "run") == 130
    assert "nothing was saved yet" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_was_killed_in_its_first_save_has_no_checkpoint_yet(tmp_path, capsys):
    assert train("--run-dir", tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints/0.orbax-checkpoint-tmp-12").mkdir(parents=True)
    assert "no checkpoint yet" in refused(capsys, "--resume", tmp_path / "run")


def test_a_second_process_is_kept_out(tmp_path, capsys):
    assert train("--run-dir", tmp_path / "run") == 0
    (tmp_path / "run/summary.json").unlink()
    with run_folder.lock(tmp_path / "run"):
        before = (tmp_path / "run/metrics.jsonl").read_bytes()
        said = refused(capsys, "--resume", tmp_path / "run", "--total-timesteps", "2000", steps=2000)
        assert "another process" in said and (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert rl.cli(["--resume", str(tmp_path / "run"), "--total-timesteps", "1200"]) == 0  # the lock is given back


# --------------------------------------------------------------------------------------------------
# Names and places
# --------------------------------------------------------------------------------------------------


def test_default_names_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    assert train() == train() == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "Toy-v0__rladapter_ppo__1__now", "Toy-v0__rladapter_ppo__1__now-2"
    ]  # fmt: skip


def test_home_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train("--run-dir=~/run") == 0
    assert (tmp_path / "run/summary.json").exists() and not Path("~").exists()
    args = runs.at_home(rl.tyro.cli(rl.Args, args=["--llm-replay=~/r", "--adapter=~/a", "--embed=~/e", "--resume=~/x"]))
    found = args.llm.llm_replay, args.sft.adapter, args.table.embed, args.resume
    assert found == (tmp_path / "r", f"{tmp_path}/a", f"{tmp_path}/e", tmp_path / "x")


def test_flags_that_would_do_nothing(tmp_path, capsys):
    where = "--run-dir", tmp_path / "run"
    assert "--sft-data plans: --adapter none" in refused(capsys, *where, "--sft-data", "plans")
    assert "--llm echo: " in refused(capsys, *where, "--llm", "echo")
    assert "--llm-replay: " in refused(capsys, *where, "--llm-replay", tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--exp-name", "--run-dir"])
def test_a_name_that_no_folder_can_have(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "choose another" in refused(capsys, flag, "x" * 300)
    assert not any(tmp_path.rglob("*.json"))


def test_a_fork_names_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my variant.py"])
    assert runs.again(tmp_path / "a b") == f"python 'my variant.py' --resume '{tmp_path}/a b'"


# --------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------


def test_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder.git_commit() is None


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("RLADAPTER_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # and a user whom the machine does not know
    assert compilation.cache_folder().is_absolute()


def test_a_folder_whose_checkpoints_are_deleted_meanwhile(tmp_path, monkeypatch, capsys):
    at_phase(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run/checkpoints"))
    assert train("--run-dir", tmp_path / "run", "--save-every", 1, steps=1200) == 0
    said = capsys.readouterr().err
    assert (tmp_path / "run/summary.json").exists() and "Traceback" not in said
    assert "can't write a checkpoint" in said or run_folder.has_checkpoint(tmp_path / "run")


def test_files_that_may_not_grow_do_not_stop_the_training(tmp_path):
    """A real limit of the system, as a full disk is one: no file may be larger than 20 kB."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code += "import rladapter_ppo as rl; sys.exit(rl.cli(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *TOY, "--total-timesteps", "4000", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "run/summary.json").exists(), done.stderr
    assert "can't log to" in done.stderr and "can't write a checkpoint" in done.stderr
    assert run_folder.read_log(tmp_path / "run", "metrics.jsonl")  # whole lines


FULL_DISK = """
disk=$1; size=$2; shift 2
mount -t tmpfs -o size=$size tmpfs $disk || exit 99
"$@"; echo $? >&2
mount -o remount,size=64m $disk
"$@"; echo $? >&2
cp -r $disk/run $disk-kept
"""


@pytest.mark.parametrize("size, flags", [("8k", ()), ("300k", TUNED)])
def test_a_full_disk_does_not_stop_a_training_nor_block_the_next_one(size, flags, tmp_path):
    """A small tmpfs, in a mount namespace of its own. It is made larger before the same command is given again."""
    flags = "--total-timesteps", 800, "--save-every", 1, *flags
    (tmp_path / "disk").mkdir()
    command = [sys.executable, ROOT / "rladapter_ppo.py", *TOY, *flags, "--resume", "auto", "--run-dir"]
    words = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", tmp_path / "disk", size, *command, tmp_path / "disk/run"]
    try:
        done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        pytest.skip(f"no disk can be made here: {error}")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be made here: {done.stderr}")
    said = done.stderr.splitlines()
    first, again = said[: said.index("0")], said[said.index("0") + 1 :]
    assert not [line for line in first if not line.startswith("warning: ")] and len(first) == len(set(first)) <= 5
    assert sum("can't write a checkpoint" in line for line in first) == 1
    folder = tmp_path / "disk-kept"
    assert not list(folder.rglob("*.tmp"))
    if size == "8k":  # too small for a summary, or for one line of a log: trained anew
        assert again == ["0"] and train(*flags, "--run-dir", tmp_path / "whole") == 0
        assert_same(folder, tmp_path / "whole", "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl")
    else:  # large enough for all but a checkpoint and the adapter
        assert "has made all its steps" in again[0] and again[1:] == ["2"]
        assert run_folder.read_log(folder, "metrics.jsonl")[-1]["global_step"] == 896
        assert "can't write" in first[-1] and "adapter" in first[-1] and not any((folder / "adapter").iterdir())


def test_what_a_failed_save_writes_late_is_taken_away(tmp_path):
    """Orbax's threads write on after the save has failed: a disk would stay full of what nobody reads."""
    checkpoints = run_folder.Checkpoints(tmp_path)
    half = tmp_path / "checkpoints/0.orbax-checkpoint-tmp/d"

    def write_late():
        for _ in range(20):
            with contextlib.suppress(OSError):  # just taken away
                half.mkdir(parents=True, exist_ok=True)
                (half / "part").write_text("late")
            time.sleep(0.02)

    late = threading.Thread(target=write_late)
    late.start()
    checkpoints.take_away_failed(still=2, at_most=60)
    assert not late.is_alive() and not list((tmp_path / "checkpoints").iterdir())
    checkpoints.close()


def test_what_a_failed_save_says_late_is_not_shown(tmp_path, caplog):
    """Orbax's tasks fail on after the save has: asyncio would print each of them when garbage is collected."""
    run_folder.Checkpoints(tmp_path).close()

    async def fail(path):
        raise OSError(path)

    async def start(path):
        task = asyncio.create_task(fail(path))
        await asyncio.sleep(0)
        del task

    read = 'DATA_LOSS: Error reading "params/.zarray" in OCDBT database at local file "checkpoints/3/arrays/"'
    for path in "checkpoints/3.orbax-checkpoint-tmp/arrays", read, "elsewhere":
        asyncio.run(start(path))
        gc.collect()
    said = caplog.text
    assert "checkpoint" not in said and said.count("never retrieved") == 1 and "elsewhere" in said


def test_tensorboard_gets_every_number_of_every_phase(tmp_path):
    assert train("--run-dir", tmp_path / "run") == 0
    library = run_folder._import_tensorboard()  # without torch
    data, events = next((tmp_path / "run").glob("events.out.*")).read_bytes(), []
    while data:  # records of TensorFlow: length, its checksum, that many bytes, their checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(library.proto.event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2" and events[1].step == 1  # what is older than this is purged
    metrics = run_folder.read_log(tmp_path / "run", "metrics.jsonl")
    assert [event.step for event in events[2:]] == [m["global_step"] for m in metrics]
    for event, record in zip(events[2:], metrics, strict=True):
        shown = {value.tag: value.simple_value for value in event.summary.value}
        assert shown == pytest.approx({tag: x for tag, x in record.items() if "/" in tag and x is not None}, rel=1e-6)


def test_in_a_thread(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train("--run-dir", tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [0] and (tmp_path / "run/summary.json").exists()


def test_without_a_device(tmp_path, monkeypatch, capsys):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda': no device\nsecond line")

    monkeypatch.setattr(jax, "devices", none)
    assert "JAX_PLATFORMS" in refused(capsys, "--run-dir", tmp_path / "run") and not (tmp_path / "run").exists()


def test_numbers_of_64_bits_are_refused(tmp_path, monkeypatch, capsys):
    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", True)
        with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
            devices.check()
    finally:
        jax.config.update("jax_enable_x64", before)


def test_settings_of_jax_in_the_environment_hold(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append(name))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    compilation.use_compilation_cache()
    assert asked == ["jax_persistent_cache_min_compile_time_secs"]


def test_numbers_that_are_none_become_null_and_are_reported_once(tmp_path, monkeypatch, capsys):
    real = rl.phase_metrics
    monkeypatch.setattr(rl, "phase_metrics", lambda *args: real(*args) | {"losses/policy_loss": float("nan")})
    assert train("--run-dir", tmp_path / "run") == 0
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in text and '"losses/policy_loss": null' in text
    assert capsys.readouterr().err.count("losses/policy_loss became NaN") == 1


def no_numbers(monkeypatch, where):
    """Makes advantages NaN for some envs (N,)."""
    real = rl.compute_gae

    def gae(*args):
        advantages, returns = real(*args)
        return jnp.where(jnp.asarray(where), jnp.nan, advantages), returns

    monkeypatch.setattr(rl, "compute_gae", gae)


def test_gradients_that_are_no_numbers_stop_the_run_and_spoil_nothing(tmp_path, monkeypatch, capsys):
    no_numbers(monkeypatch, [True] * 8)
    flags = "--num-steps", 10, "--save-every", 1  # a program of its own
    assert train("--run-dir", tmp_path / "run", *flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "3 updates in a row" in line and "--learning-rate" in line and "Traceback" not in line
    saved = run_folder.read_checkpoint(tmp_path / "run")[1]["runner"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((saved["params"], saved["opt_state"])))
    assert [m["losses/skipped"] for m in map(json.loads, (tmp_path / "run/metrics.jsonl").open())] == [1.0, 1.0]


def test_a_minibatch_without_numbers_is_left_out(tmp_path, monkeypatch, capsys):
    """One env of eight, with two minibatches an epoch: half of them are skipped, the rest is learned from."""
    no_numbers(monkeypatch, [True] + [False] * 7)
    monkeypatch.setattr(runs, "MAX_FAILED", 10**6)
    assert train("--run-dir", tmp_path / "run", "--num-steps", 11, "--no-norm-adv", steps=300) == 0
    assert {m["losses/skipped"] for m in map(json.loads, (tmp_path / "run/metrics.jsonl").open())} == {0.5}
    assert capsys.readouterr().err.count("gradients were NaN") == 1
    saved = run_folder.read_checkpoint(tmp_path / "run")[1]["runner"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))


def without_adapter(folder):
    """Logs without the times, and without what was measured of the adapter; and the policy at the end."""
    logs = contents(folder, "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl")
    logs = [[{name: x for name, x in line.items() if not name.startswith("adapter/")} for line in log] for log in logs]
    return logs, jax.tree.map(np.asarray, run_folder.read_checkpoint(folder)[1]["runner"]["params"])


@pytest.mark.parametrize("how", ["diverges", "no memory"])
def test_an_adapter_that_cannot_be_tuned_never_touches_the_policy(how, tmp_path, monkeypatch, capsys):
    """The run is, bit for bit, one in which the adapter is not tuned at all."""
    assert train("--run-dir", tmp_path / "never", *TUNED, "--sft-every", 0) == 0
    capsys.readouterr()
    if how == "diverges":
        monkeypatch.setitem(rladapter_adapter.LIMITS, "sft_learning_rate", (0, 1e38))
        flags = "--sft-learning-rate", 1e30
    else:
        flags, too_large = (), lambda *_: jax.jit(lambda x: x + jnp.zeros((2**22, 2**22)))(1.0)  # 70 TB
        monkeypatch.setattr(rladapter_adapter, "sft_step", too_large)
    assert train("--run-dir", tmp_path / "run", *TUNED, *flags) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "a fine-tuning of the adapter was" in line]
    assert "warning: " in said and ("NaN" in said if how == "diverges" else "memory" in said)
    metrics = run_folder.read_log(tmp_path / "run", "metrics.jsonl")
    assert [m["adapter/sft_stopped"] for m in metrics] == [1] * len(metrics)
    (logs, policy), (expected_logs, expected) = (without_adapter(tmp_path / name) for name in ("run", "never"))
    assert logs == expected_logs and jax.tree.all(jax.tree.map(np.array_equal, policy, expected))
    tuned, untuned = (run_folder.read_checkpoint(tmp_path / name)[1]["adapter"] for name in ("run", "never"))
    assert jax.tree.all(jax.tree.map(np.array_equal, tuned, untuned))


def test_lines_are_cut_at_line_feeds_alone(tmp_path):
    line = '{"phase": 0, "reply": "a\u2028b\u0085c"}\n'
    (tmp_path / "guidance.jsonl").write_text(line + '{"phase": 1}\n{"pha')
    assert [record["phase"] for record in run_folder.read_log(tmp_path, "guidance.jsonl")] == [0, 1]


def test_where_nobody_listens_training_goes_on(tmp_path):
    """Real processes: what is buffered would fail again when Python ends. Standard output is full; or closed."""
    code = "import sys, rladapter_ppo as rl; sys.exit(rl.cli(sys.argv[1:]))"
    for name, end in (("full", "> /dev/full"), ("closed", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}")):
        folder = tmp_path / name
        command = f'"{sys.executable}" -c "{code}" {" ".join(TOY)} --total-timesteps 800 --run-dir {folder} {end}'
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and (folder / "summary.json").exists(), done.stderr
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
