"""Whole runs on the toy game: the folder, resume, ablations, bad input, Ctrl-C. In process, so that jax loads once."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import stat
import sys
from pathlib import Path

import jax
import make_adapter_tiny
import numpy as np
import pytest
import tyro

import guidance
import hindsight
import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs.toy import TOY as TOY_GAME
from utils import run_folder, runs, trials

ROOT = Path(__file__).parents[1]
TOY = (
    "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 "
    "--updates-per-phase 2 --guidance-rows 8 --queries-per-phase 4 --eval-episodes 16 --adapter none "
    "--no-anneal-lr --lr-warmup 0".split()
)  # the program of test_llm_server.py, whatever the number of steps
CAPTION = (
    "You see: tree (1 north).\nRemembered: nothing.\nFacing: tree.\nInventory: nothing.\n"
    "Vitals (of 9): health 9, food 9, drink 9, energy 9.\nIt is day. The player is awake.\nUnlocked: nothing."
)


@pytest.fixture(autouse=True)
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "use_compilation_cache", lambda: None)  # the tests have one of their own


def run(folder, *more, steps=1500):
    return rl.cli([*TOY, "--total-timesteps", str(steps), "--run-dir", str(folder), *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_a_complete_folder(tmp_path):
    assert run(tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    config = json.loads((tmp_path / "run/config.json").read_text())
    metrics = lines(tmp_path / "run/metrics.jsonl")
    guidance, outcomes = lines(tmp_path / "run/guidance.jsonl"), lines(tmp_path / "run/outcomes.jsonl")
    assert summary["global_step"] == 1536 == metrics[-1]["global_step"]  # met to within one update of 128
    assert summary["eval_episodes"] == 16 and summary["seed"] == 1 and summary["llm"] == "rules"
    assert 0 <= summary["episodic_return"] <= 8 and set(summary["achievements"]) == {"collect_wood", "collect_drink"}
    assert summary["SPS"] > 0 and summary["compile_seconds"] > 0
    assert summary["llm_calls"] == len(guidance) == sum(m["llm/calls"] for m in metrics) > 0
    assert [m["phase"] for m in metrics] == list(range(7))
    assert config["flags"]["num_envs"] == 8 and config["versions"]["jax"] and config["device"]
    assert guidance[0]["sub_goals"] and guidance[0]["messages"][0]["role"] == "system" and not guidance[0]["error"]
    assert outcomes[-1]["visits"] > 0 and 0 <= outcomes[-1]["comprehension"] <= 1
    for tag in ("charts/SPS", "losses/policy_loss", "guidance/coverage", "llm/calls", "time/train", "toy/score"):
        assert tag in metrics[-1], tag
    events = b"".join(p.read_bytes() for p in (tmp_path / "run").glob("events.out.*"))
    assert b"charts/episodic_return" in events


def test_what_comes_late_is_not_asked(tmp_path, capsys):
    assert run(tmp_path / "run", "--query-until", "0.5") == 0
    begun_at = [0, *(m["global_step"] for m in lines(tmp_path / "run/metrics.jsonl"))]
    asked = {line["phase"] for line in lines(tmp_path / "run/guidance.jsonl")}
    assert asked == {phase for phase, step in enumerate(begun_at[:-1]) if step < 768} and len(asked) < len(begun_at) - 1
    for until, pauses in ((0, 0), (0.05, 1), (0.5, 4), (1, 7)):
        assert run(tmp_path / "none", "--dry-run", "--query-until", str(until)) == 0
        assert f"in {pauses} pauses" in capsys.readouterr().out
    assert run(tmp_path / "none", "--query-until", "1.5") == 2
    assert "--query-until" in capsys.readouterr().err


def test_guidance_covers_the_toy_and_is_understood(tmp_path):
    run(tmp_path / "run", "--learning-rate", "5e-3", "--no-trials", steps=6000)
    first, *_, last = lines(tmp_path / "run/metrics.jsonl")
    assert last["guidance/coverage"] == 1.0 and last["guidance/rows"] >= 2
    assert last["guidance/goal_success"] > first["guidance/goal_success"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["episodic_return"] > 7


def numbers(folder):
    """Metrics without what a clock measures."""
    return [
        {k: v for k, v in m.items() if "time" not in k and "SPS" not in k and "seconds" not in k}
        for m in lines(folder / "metrics.jsonl")
    ]


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Within an episode, with memory, bonuses paid and a scale of values to carry on."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = "--anneal-lr --lr-warmup 0.3 --num-steps 12".split()  # an episode has 8 steps
    assert run(whole, *flags) == 0

    def stop_after_two(self, metrics):
        self.stop.asked = self.phase == 1
        return original(self, metrics)

    def note_start(self, env, *rest):
        found = start(self, env, *rest)
        started.append(env.to_host(found[0]))
        return found

    original, start, started = runs.Run.log_phase, runs.Run.start, []
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "log_phase", stop_after_two)
        assert run(halves, *flags) == 130
    assert not (halves / "summary.json").exists()
    (halves / "metrics.jsonl").open("a").write('{"phase": 2, "half a li')  # as a kill leaves it
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "start", note_start)
        assert rl.cli(["--resume", str(halves)]) == 0
    (carried,) = started
    assert carried.memory.any(1).all() and carried.paid.any() and (carried.previous < len(TOY_GAME.actions)).all()
    assert carried.value_stats.tolist() != [0, 1] and carried.update == 3
    assert numbers(whole) == numbers(halves)
    drop = ("wall_seconds", "compile_seconds", "SPS", "eval_seconds", "setup_seconds")
    a, b = (
        {k: v for k, v in json.loads((f / "summary.json").read_text()).items() if k not in drop}
        for f in (whole, halves)
    )
    assert a == b
    strip = [{k: v for k, v in g.items() if k != "seconds"} for g in lines(whole / "guidance.jsonl")]
    assert strip == [{k: v for k, v in g.items() if k != "seconds"} for g in lines(halves / "guidance.jsonl")]


def test_a_finished_run_goes_on_with_a_larger_total(tmp_path):
    assert run(tmp_path / "run", "--anneal-lr") == 0
    assert rl.cli(["--resume", str(tmp_path / "run"), "--total-timesteps", "2e3"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["global_step"] == 2048


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(tmp_path / name, "--seed", seed, steps=800) == 0
    a, b, c = (numbers(tmp_path / name) for name in "abc")
    assert a == b != c


ABLATIONS = {
    "no guidance": "--guidance none",
    "facts": "--guidance facts",
    "bonus without guidance": "--guidance none --guidance-bonus 0.1",
    "pause": "--guidance-lookup pause",
    "no trials": "--no-trials",
    "random guide": "--llm random",
    "no fine-tuning": "--sft-every 0",
    "binary": "--comprehension binary",
    "actions": "--comprehension cosine-actions",
    "success": "--comprehension success",
    "no score": "--comprehension none",
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_runs_two_phases(tmp_path, name):
    assert run(tmp_path / "run", *ABLATIONS[name].split(), steps=400) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert np.isfinite(summary["episodic_return"])
    assert (summary["llm_calls"] > 0) == ("--guidance n" not in ABLATIONS[name] and "facts" not in name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "model"
    make_adapter_tiny.train([CAPTION], folder, steps=2)
    return folder


def test_with_an_adapter_it_analyses_and_is_tuned(model, tmp_path, monkeypatch):
    """The real path with a tiny random model: analyses reach the messages, winners the fine-tuning."""
    monkeypatch.setattr(guidance.trials, "DECIDED_AT_SE", -1e9)  # everything wins
    monkeypatch.setattr(
        rladapter_adapter.Adapter, "analyse", lambda self, prompts, key: ["It should chop tree."] * len(prompts)
    )
    flags = ["--adapter", str(model), "--sft-every", "1"]
    assert rl.cli([*TOY, *flags, "--total-timesteps", "1500", "--run-dir", str(tmp_path / "run")]) == 0
    assert any("Analysis:" in g["messages"][1]["content"] for g in lines(tmp_path / "run/guidance.jsonl"))
    tuned = [m for m in lines(tmp_path / "run/metrics.jsonl") if "adapter/nll_after" in m]
    assert tuned and all(np.isfinite(m["adapter/nll_after"]) and m["time/sft"] > 0 for m in tuned)
    assert rladapter_adapter.load_adapter(tmp_path / "run/adapter").lora_config.rank == 8


def test_what_play_found_out_can_be_told_without_a_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hindsight, "HORIZON", 4)  # of the 32 steps of a phase
    told = ["--analyses", "retrieved", "--sft-data", "hindsight"]
    assert run(tmp_path / "run", *told, "--sft-every", "1", steps=3000) == 0
    said = {g["phase"]: g["analysis"] for g in lines(tmp_path / "run/guidance.jsonl")}
    assert said.pop(0) == "" and any(said.values())
    texts = {rladapter_adapter.suggestion([name]) for name in TOY_GAME.basic_sub_goals}
    assert set(said.values()) <= {"", *texts}
    assert not (tmp_path / "run/examples.jsonl").exists()  # there is nothing to tune
    assert run(tmp_path / "other", *told, "--sft-data", "best") == 2
    assert "--analyses retrieved: --sft-data best" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_phase_too_short_to_find_anything_out_is_refused(tmp_path, capsys):
    """Nothing was ever learned or said, and nothing told why."""
    told = "--analyses", "retrieved", "--sft-data", "experience"
    assert run(tmp_path / "run", *told) == 2 and not (tmp_path / "run").exists()
    assert "error: --sft-data experience: looks 64 steps ahead within a phase, which has " in capsys.readouterr().err


def test_examples_are_logged_as_they_are_tuned_on(model, tmp_path, monkeypatch):
    """`rladapter_adapter.py sft --data RUN/examples.jsonl` must be able to do a fine-tuning again."""
    tuned_on = []
    monkeypatch.setattr(trials, "DECIDED_AT_SE", 0.1)
    monkeypatch.setattr(
        rladapter_adapter.Adapter, "analyse",
        lambda self, prompts, key: [f"Chop tree or drink water, {i}." for i, _ in enumerate(prompts)],
    )  # fmt: skip
    tune = lambda self, pairs, *_, **__: tuned_on.append(pairs) or {"examples": len(pairs)}  # noqa: E731
    monkeypatch.setattr(rladapter_adapter.Adapter, "finetune", tune)
    flags = ["--adapter", str(model), "--num-envs", "16", "--guidance-rows", "4"]
    for sft_data in ("best", "all"):
        tuned_on.clear()
        args = [*TOY, *flags, "--total-timesteps", "6000", "--sft-every", "1", "--sft-data", sft_data]
        assert rl.cli([*args, "--run-dir", str(tmp_path / sft_data)]) == 0
        logged = lines(tmp_path / sft_data / "examples.jsonl")
        last = [(line["prompt"], line["response"]) for line in logged if line["phase"] == logged[-1]["phase"]]
        assert last and last == tuned_on[-1] and len(last) < len(logged)
        # Those of earlier fine-tunings would be trained on again, and measured on among the held-out ones.
        assert rladapter_adapter.read_examples(tmp_path / sft_data / "examples.jsonl") == last


def test_a_run_without_a_terminal_prints_a_line_a_phase(tmp_path, capsys):
    """Under nohup or SLURM nothing was printed for minutes."""
    assert run(tmp_path / "run") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase ")]
    assert [line.split()[1] for line in printed] == ["0", "1", "2", "3", "4", "5", "6"]
    assert all("steps/s" in line and "calls" in line for line in printed)


def key_bits(keys):
    """Of keys (..., ) as a list of bytes."""
    data = np.asarray(jax.random.key_data(keys))
    return [bits.tobytes() for bits in data.reshape(-1, data.shape[-1])]


def test_a_training_that_can_not_begin_says_why(tmp_path, monkeypatch):
    """What closes a run took a log for a progress bar, and hid the error."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "Log", stopped)
    assert run(tmp_path / "run", steps=400) == 130


def test_a_dry_run_needs_no_free_folder_and_says_first_what_can_not_work(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    flags = [*TOY, "--total-timesteps", "1500", "--dry-run", "--run-dir", str(tmp_path)]
    assert rl.cli(flags) == 0 and "question 0: adapter prompt" in capsys.readouterr().out
    assert rl.cli([*flags, "--llm-max-cost", "1"]) == 2
    captured = capsys.readouterr()
    assert "--llm-max-cost" in captured.err and not captured.out


def test_a_dry_run_shows_the_questions_that_the_run_asks(tmp_path, capsys, monkeypatch):
    """It drew other analyses than the run."""
    say = lambda self, prompts, key: [f"drawn with {key_bits(key)}" for _ in prompts]  # noqa: E731
    monkeypatch.setattr(rladapter_adapter.NoAdapter, "analyse", say)
    assert run(tmp_path / "run", "--dry-run", steps=256) == 0
    shown = capsys.readouterr().out
    assert run(tmp_path / "run", steps=256) == 0
    first = [line for line in lines(tmp_path / "run/guidance.jsonl") if line["phase"] == 0]
    assert first and all(line["messages"][1]["content"] in shown for line in first)


def test_seeds_share_no_keys():
    """Phase 1 of seed 1 used a key of seed 2: in jax split(key)[i] is fold_in(key, i)."""
    used = []
    for seed in range(4):
        key_agent, key_runner, key_phases, key_evaluation = rl.run_keys(seed)
        used += [*key_bits(key_agent), *key_bits(key_runner), *key_bits(key_phases), *key_bits(key_evaluation)]
        used += key_bits(jax.random.fold_in(jax.random.key(seed), 4))  # of fresh LoRA weights (`load_adapter`)
        used += [bits for phase in range(5) for bits in key_bits(rl.phase_keys(key_phases, phase))]
    assert len(used) == 4 * (5 + 2 * 5) == len(set(used))


def test_analyses_and_fine_tuning_share_no_keys():
    """Row 1 of the analyses had the key of the fine-tuning: both were fold_in(key, 1)."""
    key_analyse, key_sft = rl.phase_keys(jax.random.key(1), 3)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key_analyse, np.arange(64))
    epochs = jax.vmap(jax.random.fold_in, (None, 0))(key_sft, np.arange(8))
    used = [*key_bits(rows), *key_bits(key_sft), *key_bits(epochs)]
    for epoch in epochs:
        used += key_bits(jax.vmap(jax.random.fold_in, (None, 0))(epoch, np.arange(8)))
    assert len(used) == len(set(used))


# ---- bad input


def error_of(capsys, *argv):
    """The one line on stderr; exit code 2 is checked."""
    code = rl.cli(list(argv))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id Breakout-v5", "--env-id.*Breakout-v5.*Craftax-Classic-Symbolic-v1"),
        ("--num-minibatches 7", "--num-minibatches: 64 envs can't be divided into 7"),
        ("--num-envs -4", "--num-envs: -4"),
        ("--num-envs 0", "--num-envs: 0"),
        ("--num-envs 1000000 --num-steps 100000", "--num-envs, --num-steps"),
        ("--total-timesteps 0", "--total-timesteps: 0"),
        ("--total-timesteps -1e6", "--total-timesteps: -1000000"),
        ("--learning-rate nan", "--learning-rate: nan"),
        ("--gamma 1.5", "--gamma: 1.5"),
        ("--guidance-bonus -1", "--guidance-bonus: -1"),
        ("--guidance-rows 0", "--guidance-rows: 0"),
        ("--seed -1", "--seed: -1"),
        ("--adapter /nowhere/model", "--adapter.*/nowhere/model"),
        ("--llm http --llm-model m --llm-base-url http://127.0.0.1:9/v1", "--llm-base-url"),
        ("--llm http --llm-model m --llm-base-url https://api.example.com/v1", "OPENAI_API_KEY"),
        ("--llm http", "--llm-model"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(tmp_path, capsys, flags, expected):
    env = [] if "--env-id" in flags or "minibatches" in flags or "num-steps" in flags else ["--env-id", "Toy-v0"]
    error = error_of(capsys, *env, *flags.split(), "--run-dir", str(tmp_path / "run"))
    assert re.search(expected, error), error
    assert not (tmp_path / "run").exists()


def test_tracking_without_wandb_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = error_of(capsys, "--env-id", "Toy-v0", "--track", "--run-dir", str(tmp_path / "run"))
    assert "--track" in error and "pip install wandb" in error and not (tmp_path / "run").exists()


class Wandb:
    """The part of wandb that is used: as in 0.31, `login` raises without a key and a terminal, but not offline."""

    def __init__(self, problem=None):
        self.problem, self.logged, self.finished = problem, [], 0

    def login(self):
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        if not offline and "WANDB_API_KEY" not in os.environ:
            raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")
        return not offline

    def init(self, **settings):
        if self.problem:
            raise RuntimeError(self.problem)
        return self

    def log(self, tagged, step):
        self.logged.append((tagged, step))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tracking_without_a_login_is_refused_before_anything_is_made(tmp_path, capsys, wandb):
    error = error_of(capsys, *TOY, "--track", "--run-dir", str(tmp_path / "run"))
    assert "--track" in error and "No API key" in error and "WANDB_MODE=offline" in error
    assert not (tmp_path / "run").exists() and not wandb.logged


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "k")])
def test_tracking_offline_needs_no_login(name, value, tmp_path, monkeypatch, wandb):
    monkeypatch.setenv(name, value)
    assert run(tmp_path / "run", "--track") == 0 and wandb.finished == 1
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [step for _, step in wandb.logged] == [m["global_step"] for m in metrics]
    assert wandb.logged[0][0]["losses/policy_loss"] == metrics[0]["losses/policy_loss"]


def test_where_tracking_does_not_start_training_goes_on(tmp_path, monkeypatch, capsys, wandb):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb.problem = "timed out"
    assert run(tmp_path / "run", "--track") == 0 and (tmp_path / "run/summary.json").exists()
    assert "can't start Weights & Biases (timed out)" in capsys.readouterr().err


def test_flags_that_do_not_parse(capsys):
    for bad in (
        ["--total-timesteps", "many"],
        ["--total-timesteps", "1.5"],
        ["--no-such-flag", "1"],
        ["--llm", "telepathy"],
    ):
        with pytest.raises(SystemExit) as stop:
            rl.cli(bad)
        assert stop.value.code == 2
    capsys.readouterr()
    assert tyro.cli(rl.Args, args=["--total-timesteps", "1e6"]).total_timesteps == 1_000_000
    assert tyro.cli(rl.Args, args=["--no-trials"]).table.trials is False


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert "--resume" in error_of(capsys, *TOY, "--run-dir", str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--run-dir" in error_of(capsys, *TOY, "--run-dir", str(tmp_path / "file" / "run"))
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        assert "--run-dir" in error_of(capsys, *TOY, "--run-dir", str(tmp_path / "locked" / "run"))


def test_resuming_what_is_no_run(tmp_path, capsys):
    assert "no run folder" in error_of(capsys, "--resume", str(tmp_path))
    assert "no run folder" in error_of(capsys, "--resume", str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{broken")
    assert "no run folder" in error_of(capsys, "--resume", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"seed": 1}}))
    assert "no checkpoint" in error_of(capsys, "--resume", str(tmp_path))


def test_resuming_with_other_flags_or_a_damaged_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, steps=400) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "--num-envs" in error_of(capsys, "--resume", str(folder), "--num-envs", "16")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    for step in (folder / "checkpoints").iterdir():
        shutil.rmtree(step / "arrays")
    code = rl.cli(["--resume", str(folder)])
    assert code == 2 and "no checkpoint" in capsys.readouterr().err


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_append", full)
    assert run(tmp_path / "run", steps=400) == 0
    captured = capsys.readouterr()
    assert captured.err.count("No space left on device") == 1 and '"global_step": 512' in captured.out


def test_a_failing_checkpoint_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run_folder.ocp.CheckpointManager, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    assert run(tmp_path / "run", steps=400) == 0
    assert "can't write a checkpoint" in capsys.readouterr().err


def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n')

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.seek(0, 2)

        def write(self, text):
            self.file.write(text[:3])
            self.file.flush()
            raise OSError(28, "No space left on device")

    real = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, mode, **more: Full(real(self, mode, **more)))
        with pytest.raises(OSError, match="No space"):
            run_folder._append(path, '{"b": 2}\n')
    assert path.read_text() == '{"a": 1}\n'


def test_a_guide_that_always_fails_does_not_stop_the_training(tmp_path, monkeypatch):
    class Broken(llm_client.RulesGuide):
        def complete(self, questions):
            return [llm_client.Reply(error="503 from the server") for _ in questions]

    monkeypatch.setattr(rl, "make_guide", lambda args, game, seed: Broken(game))
    assert run(tmp_path / "run", steps=800) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["llm_failures"] > 0 and summary["llm_calls"] == 0


def test_ctrl_c_twice_stops_at_once_and_is_given_back():
    old = signal.getsignal(signal.SIGINT)
    stop = runs.StopRequest()
    try:
        stop.listen(type("Console", (), {"print": lambda *a: None})())
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0.1)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) == old


# ---- flags and docs


OWNERS = {"Args": "rladapter_ppo.py", "TableArgs": "guidance.py", "SftArgs": "rladapter_adapter.py",
          "LlmArgs": "llm_client.py"}  # fmt: skip


def flag_fields(owner):
    tree = ast.parse((ROOT / OWNERS[owner]).read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner][0].body


def test_every_flag_is_read():
    """CleanRL #426: flags that do nothing."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")]
    trees = [ast.parse(path.read_text()) for path in sources]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    fields = [n for owner in OWNERS for n in flag_fields(owner) if isinstance(n, ast.AnnAssign)]
    names = [n.target.id for n in fields if "OmitArgPrefixes" not in ast.dump(n.annotation)]
    assert len(names) > 30 and not [name for name in names if name not in read]
    assert sorted(runs.flags(rl.Args())) == sorted(names)  # a flag's name is unique


@pytest.mark.parametrize("owner", OWNERS)
def test_every_flag_has_a_text_that_stands_alone(owner):
    body = flag_fields(owner)
    for field, after in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and "OmitArgPrefixes" not in ast.dump(field):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), field.target.id
            words = set(re.findall(r"[a-z]+", after.value.value.lower()))
            assert not words & {"their", "them", "they"}, field.target.id  # read alone, nobody knows whose
            assert not after.value.value.startswith("of "), field.target.id


def test_flags_survive_config_json():
    args = tyro.cli(rl.Args, args="--llm-cache none --llm-replay a/b --seed 7 --no-trials --lora-rank 3".split())
    assert runs.args_from_flags(rl.Args, json.loads(json.dumps(runs.flags(args)))) == args


@dataclasses.dataclass(frozen=True)
class ForkArgs:
    pair: tuple[str, int] = ("a", 1)
    names: tuple[str, ...] = ()


def test_tuples_of_a_fork_survive_config_json():
    args = ForkArgs(names=("x", "y", "z"))
    assert runs.args_from_flags(ForkArgs, json.loads(json.dumps(runs.flags(args)))) == args
    for wrong in ({"pair": ["a"]}, {"pair": ["a", "b"]}, {"names": [1]}, {"names": "x"}):
        with pytest.raises(ValueError, match="^config.json: "):
            runs.args_from_flags(ForkArgs, wrong)


def documented_commands():
    texts = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    texts["rladapter_ppo.py"] = rl.__doc__
    for name, text in texts.items():
        for line in text.splitlines():
            command = re.search(r"python rladapter_ppo\.py[^`|\n]*", line)
            if command:
                yield name, command.group().split("#")[0].strip()


def test_every_documented_command_parses(monkeypatch):
    commands = list(documented_commands())
    assert len(commands) >= 10
    for where, command in commands:
        argv = [word for word in shlex.split(command)[2:] if word != "..."]
        try:
            args = tyro.cli(rl.Args, args=argv)
        except SystemExit as stop:
            assert stop.code == 0, f"{where}: {command}"  # 0: --help
            continue
        if args.resume is None:
            rl.check_args(args)
