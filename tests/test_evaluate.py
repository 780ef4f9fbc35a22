"""Trained agents, looked at: evaluate.py, films, the terminal. On short runs of the toy game and of Crafter."""

import dataclasses
import io
import json
import re
import shlex
import shutil

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_runs import ROOT, TOY

import evaluate
import llm_client
import rladapter_ppo as rl
from envs.crafter import CRAFTER as CRAFTER_GAME
from envs.crafter import captions
from envs.crafter.vocabulary import INVENTORY
from envs.scores import Tally, score
from envs.toy import TOY as TOY_GAME
from utils import film, published, run_folder, runs, terminal

CRAFTER = (
    "--num-envs 4 --num-steps 8 --num-minibatches 1 --update-epochs 1 --hidden-size 16 --rnn-size 16 "
    "--updates-per-phase 2 --queries-per-phase 8 --eval-episodes 1 --adapter none --no-anneal-lr --lr-warmup 0".split()
)


@pytest.fixture(autouse=True)
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLADAPTER_CACHE", str(tmp_path / "cache"))
    for module in (runs, evaluate):  # the tests have a compilation cache of their own
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert rl.cli([*TOY, "--total-timesteps", "1500", "--save-every", "2", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def crafter_run(tmp_path_factory):
    """Trained for three phases without its evaluation, which would play whole episodes."""
    folder = tmp_path_factory.mktemp("crafter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "evaluate", lambda *_: {"achievements": {}, "episodic_return": 0.0})
        assert rl.cli([*CRAFTER, "--total-timesteps", "160", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(toy_run, tmp_path / "run")


def given(*folders, **more):
    return evaluate.EvalArgs(tuple(folders), **{"episodes": 16, "num_envs": 8} | more)


def quiet():
    return Console(file=io.StringIO(), width=120)


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def test_every_env_plays_the_same_number_of_whole_episodes():
    """Env 0 dies at every step and env 1 lives three: counting the first episodes to end would count env 0 only."""
    tally = Tally(TOY_GAME, 2, 3)  # rounded up to 2 an env
    assert tally.episodes == 4
    done = np.array([[1, 0], [1, 0], [1, 1], [1, 0], [1, 0], [1, 1]], bool)
    earned = np.where(done, [[1.0, 10.0]], 0.0)
    chopped = np.stack([np.ones_like(done), np.zeros_like(done)], -1) & np.array([[True], [False]])
    for half in (slice(0, 3), slice(3, 6)):
        episodes = {"episodic_return": earned[half], "episodic_length": 1 + done[half], "achievements": chopped[half]}
        tally.add(done[half], episodes, {"steps": np.ones((3, 2))})
    assert tally.full and tally.played == 4
    result = tally.result()
    assert result["episodic_return"] == (2 * 1 + 2 * 10) / 4
    assert result["achievements"] == {"collect_wood": 0.5, "collect_drink": 0.0}
    assert result["score"] == score(np.array([0.5, 0.0]))
    assert result["watched"]["steps"] == 2 + 6  # no step of env 0 after its second episode


def test_it_plays_what_was_trained(toy_run):
    """The same numbers as the evaluation that training makes with these arrays, from the checkpoint alone."""
    trained = evaluate.load(toy_run, given(toy_run))
    saved = run_folder.read_checkpoint(toy_run)[1]["runner"]["params"]
    kernel = saved["actor"]["kernel"]["value"]
    assert np.array_equal(trained.params["actor"]["kernel"][...], kernel) and np.abs(kernel).sum() > 0
    expected = rl.evaluate(trained.args, trained.agent, trained.params, trained.frozen, jax.random.key(1))
    assert evaluate.evaluate(trained, given(toy_run), quiet()) == expected
    assert trained.table.rows.valid.any()


def test_the_command_prints_a_table_and_writes_a_file(run, capsys):
    assert evaluate.cli([str(run), "--episodes", "10", "--num-envs", "8", "--seed", "3"]) == 0
    printed, result = capsys.readouterr().out, json.loads((run / "eval.json").read_text())
    assert "collect wood" in printed and "human" not in printed  # experts played another game
    assert result["eval_episodes"] == 16 and (result["seed"], result["num_envs"]) == (3, 8)
    assert result["guide"] == "rules (no LLM)"
    assert result["command"].endswith("--episodes 10 --num-envs 8 --seed 3") and result["global_step"] == 1536
    assert evaluate.cli([str(run), "--episodes", "0"]) == 0  # as it is
    assert f"{result['episodic_return']:.2f}" in capsys.readouterr().out


def test_an_older_checkpoint(toy_run):
    phases = sorted(int(path.name) for path in (toy_run / "checkpoints").iterdir())
    old, new = (evaluate.load(toy_run, given(toy_run, checkpoint=phase)) for phase in phases)
    assert (old.phase, new.phase) == tuple(phases) and old.totals["global_step"] < new.totals["global_step"]
    kernels = [trained.params["actor"]["kernel"][...] for trained in (old, new)]
    assert not np.array_equal(*kernels)


def test_without_its_advice(run):
    assert evaluate.cli([str(run), "--episodes", "8", "--num-envs", "8", "--guidance", "none"]) == 0
    assert not (run / "eval.json").exists()
    assert json.loads((run / "eval-unguided.json").read_text())["guidance"] == "none"
    assert not evaluate.load(run, given(run, guidance="none")).table.rows.valid.any()


def test_runs_side_by_side(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert evaluate.cli([str(run), str(other), "--episodes", "8", "--num-envs", "8", "--report"]) == 0
    printed = capsys.readouterr().out
    assert "run" in printed and "other" in printed and "report.html" in printed
    page = (run / "report.html").read_text()
    assert "other" in page and not (other / "report.html").exists()


def test_adapter_and_guide_can_be_asked_on(run, capsys, monkeypatch):
    """The guide that is named is asked, about what is met; the run's own table and evaluation stay as they are."""
    asked = []
    real = llm_client.RandomGuide.complete
    monkeypatch.setattr(llm_client.RandomGuide, "complete", lambda self, qs: asked.extend(qs) or real(self, qs))
    flags = [str(run), "--episodes", "64", "--num-envs", "8", "--ask"]  # episodes of 8 steps, phases of 32
    assert evaluate.cli([*flags, "--llm", "random"]) == 0
    result = json.loads((run / "eval-asked.json").read_text())
    assert len(asked) == result["questions"] > 0 == result["questions_failed"] and result["guide"] == "random (no LLM)"
    assert not (run / "eval.json").exists()
    assert evaluate.cli(flags) == 0  # the run's own guide
    assert json.loads((run / "eval-asked.json").read_text())["guide"] == "rules (no LLM)"
    assert "--llm-model" in refused(capsys, *flags, "--llm", "http")
    assert "leave --ask out" in refused(capsys, *flags, "--guidance", "none")


def test_human_experts_stand_beside_crafters_rates():
    rates = dict.fromkeys(published.HUMAN, 0.25)
    result = {"achievements": rates, "episodic_return": 5.0, "score": 1.0, "episodic_length": 9.0, "eval_episodes": 4}
    console = quiet()
    for table in evaluate.result_tables({"mine": result}):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert any("collect diamond" in line and "25" in line and "12" in line for line in lines)
    assert any("Achievement Distillation" in line and "21.8" in line and "12.6" in line for line in lines)
    assert evaluate.human_experts({"mine": result}) == published.HUMAN
    assert evaluate.human_experts({"mine": result, "toy": {"achievements": {"collect_coal": 0.5}}}) == {}


def test_habits_are_counted_over_whole_episodes(crafter_run, monkeypatch):
    """Every game is ended after five steps: 4 games of 2 episodes are 40 steps, and each ends of nothing known."""
    trained = evaluate.load(crafter_run, given(crafter_run, num_envs=4, episodes=8))
    env = trained.agent.env
    short = dataclasses.replace(env.env, params=dataclasses.replace(env.env.params, max_timesteps=5))
    trained.agent = dataclasses.replace(trained.agent, env=dataclasses.replace(env, env=short))
    result = evaluate.evaluate(trained, given(crafter_run), quiet())
    assert result["eval_episodes"] == 8 and result["episodic_length"] == 5
    assert sum(result["deaths"].values()) == pytest.approx(1.0) and result["deaths"]["unknown"] == 1.0
    assert all(0 <= habit["sensible"] <= habit["occasions"] <= 40 for habit in result["habits"].values())
    assert evaluate.habit_tables({"mine": result})[0].row_count == len(short.HABITS)


# --------------------------------------------------------------------------------------------------
# Films and the terminal
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(crafter_run, monkeypatch):
    """A trained agent, and the moments of its best episode, cut off after 16 steps."""
    monkeypatch.setattr(evaluate, "SHOWN", 16)
    flags = given(crafter_run, num_envs=4)
    trained = evaluate.load(crafter_run, flags)
    found = evaluate.episodes(trained, flags, quiet())
    return trained, found, list(evaluate.moments(trained, found[0]))


def test_moments_say_what_was_seen_advised_and_done(shown):
    trained, found, moments = shown
    table, game = trained.table, trained.agent.env.game
    assert len(found) == 4 and len(moments) == 16 and moments[-1].end == "still alive after 16 steps"
    returns = [episode["env_reward"].sum() for episode in found]
    assert returns == sorted(returns, reverse=True) and moments[-1].earned == pytest.approx(returns[0])
    fits = table.fits(np.asarray(trained.agent.env.facts(found[0]["obs"])))
    for t, moment in enumerate(moments):
        fitting = {int(table.rows.goal[row]) for row in np.flatnonzero(fits[t])}
        assert {game.sub_goals.index(name) for name, _ in moment.advice} == fitting
        assert moment.vitals["health"] <= 9 and sum(p for _, p in moment.choices) == pytest.approx(1, abs=1e-5)
        assert moment.action == game.actions[found[0]["action"][t]]
    pointed = [moment for moment in moments if moment.pointed]
    first = {game.things.get(name) for moment in pointed for name, _ in moment.advice}
    assert pointed and {kind for moment in pointed for kind, *_ in moment.pointed} <= first


def test_a_film_is_whole_and_shows_every_step(shown, tmp_path):
    trained, _, moments = shown
    env = trained.agent.env.env
    frames = [film.compose(m, env.draw(m.scene), "title", env.game.achievements, env.view) for m in moments]
    assert all(frame.size == frames[0].size and not frame.width % 2 and not frame.height % 2 for frame in frames)
    assert np.asarray(frames[0])[:400, :500].std() > 20  # a picture is there
    mp4, gif = film.write(tmp_path / "film-1", frames)
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(mp4))
    assert count == 16 + film.HOLD * film.FPS and seconds == pytest.approx(count / film.FPS, abs=0.2)
    assert Image.open(gif).n_frames > 16 and sorted(tmp_path.iterdir()) == [gif, mp4]


def test_without_ffmpeg_a_gif_is_written_and_said(tmp_path, monkeypatch, capsys):
    def nothing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nothing)
    frames = [Image.new("RGB", (64, 32), (i, 0, 0)) for i in (0, 90, 180)]
    (gif,) = film.write(tmp_path / "film-1", frames)
    assert gif.suffix == ".gif" and Image.open(gif).n_frames >= 3
    assert "GIF only" in capsys.readouterr().err


def test_a_film_that_cannot_be_written_leaves_nothing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "film-1.mp4").mkdir()  # in the way
    with pytest.raises(ValueError, match="--video: can't write"):
        film.write(folder / "film-1", [Image.new("RGB", (64, 32))] * 3)
    assert [path.name for path in folder.iterdir()] == ["film-1.mp4"]


def test_hostile_text_is_drawn_and_printed_as_text(shown):
    trained, _, moments = shown
    env, text = trained.agent.env.env, "[red]x[/red] \x1b[31m \ud800 <b> \U0001f9df \n" + "word " * 400
    moment = dataclasses.replace(moments[0], analysis=text, reached=("a" * 500,), end="z" * 500)
    frame = film.compose(moment, env.draw(moment.scene), text, env.game.achievements, env.view)
    assert frame.size[1] < 700
    console = quiet()
    console.print(terminal.picture(moment, env, 3))
    assert "[red]x[/red]" in console.file.getvalue() and "\x1b" not in console.file.getvalue()


def test_keys_step_through_an_episode(shown, monkeypatch):
    trained, _, moments = shown

    def steps(keys):
        console = quiet()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{key}\n" for key in keys)))
        terminal.play(console, trained.agent.env.env, moments)
        return [int(step) for step in re.findall(r"─ step (\d+) of 16", console.file.getvalue())]

    assert steps([]) == [0]
    assert steps(["", "f", "b", "x", "q", ""]) == [0, 1, 11, 10, 10]
    assert steps(["g", ""]) == [0, 15]  # one step on from the last is the end


def test_the_original_game_is_played_with_the_same_policy(crafter_run, tmp_path, monkeypatch):
    crafter = pytest.importorskip("crafter")
    from envs.crafter import original

    assert crafter
    short = original.OriginalCrafter
    monkeypatch.setattr(original, "OriginalCrafter", lambda n, seed: short(n, seed, length=12))
    folder = shutil.copytree(crafter_run, tmp_path / "run")
    flags = "--episodes 2 --num-envs 2 --env-id Crafter".split()
    assert evaluate.cli([str(folder), *flags]) == 0
    result = json.loads((folder / "eval-crafter.json").read_text())
    assert result["env_id"] == "Crafter" and result["eval_episodes"] == 2 and result["episodic_length"] == 12
    assert -1 <= result["episodic_return"] <= 12 and set(result["achievements"]) == set(published.HUMAN)


def test_advice_heeds_what_the_original_demands(crafter_run):
    """A player that was told to place a furnace with one stone tried so for the rest of its life."""
    original = pytest.importorskip("envs.crafter.original")
    table = evaluate.load(crafter_run, given(crafter_run)).table
    game, furnace = table.game, table.game.sub_goal_numbers["place furnace"]
    table.rows.valid[:2], table.rows.care[:2] = True, False
    table.rows.goal[:2] = furnace, game.sub_goal_numbers["mine coal"]
    evaluate.heed(table, original.GAME)
    assert table.reasons_text(0) == ["stone >= 4"] and table.reasons_text(1) == []
    assert CRAFTER_GAME.needs["place furnace"] == ("stone >= 1",)
    ask = evaluate.Asker(evaluate.load(crafter_run, given(crafter_run, ask=True)))
    obs = np.zeros((1, captions.OBS_SIZE), np.uint8)
    obs[:, captions.INVENTORY_SLICE.start + INVENTORY.index("stone")] = 1
    ask.trained.table.rows.valid[:] = False
    ask(obs, original.GAME)  # what is advised from then on, too
    table = ask.trained.table
    advised = [table.reasons_text(row) for row in np.flatnonzero(table.rows.valid & (table.rows.goal == furnace))]
    assert advised and all("stone >= 4" in reasons for reasons in advised)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """The line that a command says before it ends with exit code 2."""
    assert evaluate.cli([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_what_is_no_run_is_refused(run, tmp_path, capsys):
    assert "no run folder" in refused(capsys, tmp_path / "nowhere")
    assert "name the folder" in refused(capsys)
    assert "none of phase 99" in refused(capsys, run, "--checkpoint", 99)
    assert "can't be read" in refused(capsys, run, "--episodes", 0)
    (run / "eval.json").write_text('{"achievements": {}')
    assert "can't be read" in refused(capsys, run, "--episodes", 0)
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint" in refused(capsys, run)
    (run / "config.json").write_text('{"fl')
    assert "no readable config.json" in refused(capsys, run)


def test_flags_that_can_not_work_are_refused(run, capsys):
    assert "no pictures" in refused(capsys, run, "--episodes", 8, "--num-envs", 8, "--video", 1)
    assert "is not the original of Toy-v0; leave" in refused(capsys, run, "--env-id", "Crafter", "--num-envs", 8)
    assert "--num-envs" in refused(capsys, run, "--num-envs", 0)
    assert "leave one of them out" in refused(capsys, run, "--env-id", "Crafter", "--play")
    assert not list(run.glob("film*")) and not (run / "report.html").exists()


def test_a_checkpoint_of_another_version_is_refused(run, capsys):
    config = json.loads((run / "config.json").read_text())
    config["flags"]["hidden_size"] = 24
    (run / "config.json").write_text(json.dumps(config))
    assert "another version" in refused(capsys, run, "--num-envs", 8)
    config["flags"]["no_such_flag"] = 1
    (run / "config.json").write_text(json.dumps(config))
    assert "no_such_flag" in refused(capsys, run, "--num-envs", 8)
    assert not (run / "eval.json").exists()


def test_a_damaged_checkpoint_is_passed_over(run, capsys):
    phases = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    for file in (run / "checkpoints" / str(phases[-1])).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert evaluate.load(run, given(run)).phase == phases[0]
    assert f"checkpoint {phases[-1]}" in capsys.readouterr().err


def test_a_guided_run_only_can_ask(toy_run, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert rl.cli([*TOY, "--total-timesteps", "256", "--guidance", "none", "--run-dir", str(plain)]) == 0
    assert "asks nobody" in refused(capsys, plain, "--num-envs", 8, "--ask")


def test_every_documented_command_parses():
    texts = [evaluate.__doc__, *(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))]
    commands = [command for text in texts for command in re.findall(r"python evaluate\.py ([^`|#\n]*)", text)]
    assert len(commands) > 10
    for command in commands:
        evaluate.check(evaluate.read_args([word for word in shlex.split(command) if word != "--ask"]))
