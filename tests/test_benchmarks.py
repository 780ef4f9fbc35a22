"""benchmarks/: statistics by hand, what run.py keeps, resumes and refuses, a whole suite on the toy game."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import collect  # noqa: E402
import compare  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import stats  # noqa: E402
import tables  # noqa: E402

from envs.scores import score  # noqa: E402
from envs.toy import TOY  # noqa: E402
from llm_client import Question, ReplayGuide  # noqa: E402
from utils import published  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[7.0]], 7.0),
        ([[1.0], [2.0], [6.0]], 3.0),  # a quarter of three is none
        ([[9.0], [1.0], [2.0], [4.0]], 3.0),  # without 1 and 9
        ([[0.0, 100.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 3.5),  # tasks pooled: 2, 3, 4, 5 remain
    ],
)
def test_iqm_by_hand(scores, expected):
    assert stats.iqm(np.array(scores)) == expected


def test_iqm_works_on_batches():
    batch = np.arange(24.0).reshape(2, 4, 3)
    assert stats.iqm(batch).tolist() == [stats.iqm(batch[0]), stats.iqm(batch[1])] == [5.5, 17.5]


def test_probability_of_improvement_by_hand():
    x, y = np.array([[1.0], [3.0]]), np.array([[0.0], [1.0], [2.0]])
    # 1 beats 0, ties 1, loses to 2; 3 beats all: (1 + 0.5 + 3) / 6
    assert stats.probability_of_improvement(x, y) == 0.75
    assert stats.probability_of_improvement(y, x) == 0.25
    two_tasks = np.concatenate([x, -x], 1), np.concatenate([y, -y], 1)
    assert stats.probability_of_improvement(*two_tasks) == 0.5


def test_bootstrap_interval_of_a_mean_is_the_one_that_can_be_counted():
    # Of the 27 ways to draw three of 0, 0, 3: mean 0 8/27, 1 12/27, 2 6/27, 3 1/27 = 3.7 %, more than 2.5 %
    scores = np.array([[0.0], [0.0], [3.0]])
    assert stats.bootstrap_interval(stats.iqm, scores) == (0.0, 3.0)
    # Of 0, 0, 0, 0, 5 five times: P(mean >= 4) = 0.7 %, P(mean >= 3) = 5.8 %
    assert stats.bootstrap_interval(lambda s: s.mean((-2, -1)), np.array([[0.0]] * 4 + [[5.0]])) == (0.0, 3.0)
    assert stats.bootstrap_interval(stats.iqm, np.array([[2.0]])) == (2.0, 2.0)


def test_bootstrap_draws_runs_within_their_task():
    # Each task's runs are equal: however they are drawn, the mean over both tasks stays.
    low, high = stats.bootstrap_interval(lambda s: s.mean((-2, -1)), np.array([[1.0, 5.0]] * 3))
    assert low == high == 3.0


def test_bootstrap_band_draws_whole_curves():
    curves = np.array([[0.0, 1.0], [1.0, 0.0]])  # their sum is 1 at any draw that takes both, and also if one is twice
    low, high = stats.bootstrap_band(curves)
    assert low.tolist() == [0.0, 0.0] and high.tolist() == [1.0, 1.0]
    assert stats.bootstrap_band(np.array([[2.0, 3.0]] * 4)).tolist() == [[2.0, 3.0]] * 2


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t with 2 degrees of freedom 4.3027
    difference = stats.paired_difference(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert difference.mean == 2 and difference.sign == 0
    assert difference.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    clear = stats.paired_difference(np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0, 13.1]))
    assert clear.sign == -1
    assert stats.paired_difference(np.array([1.0]), np.array([0.0])) == stats.Difference(1.0, None)


def test_human_success_rates_are_those_of_the_published_score():
    rates = np.array(list(published.HUMAN.values())) / 100
    assert len(rates) == 22
    # The published score is a mean over humans, and the return counts health: they agree roughly
    assert score(rates) == pytest.approx(50.5, abs=2) and rates.sum() == pytest.approx(14.3, abs=0.5)


# --------------------------------------------------------------------------------------------------------------------
# What is to be run
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_variant_of_a_suite_is_flags_of_the_script(suite):
    seen = set()
    for variant in run.SUITES[suite].variants:
        args = tyro.cli(run.rl.Args, args=run.flags_of(suite, variant, 3))
        run.rl.check_args(args)
        assert args.seed == 3 and args not in seen, variant
        seen.add(args)


def test_all_variants_are_in_a_suite_and_have_names_for_all_uses():
    assert {v for suite in run.SUITES.values() for v in suite.variants} == set(run.VARIANTS)
    for field in ("label", "what", "flags"):
        values = [getattr(variant, field) for variant in run.VARIANTS.values()]
        assert len(set(values)) == len(values)


def begun(folder, argv, **files):
    folder.mkdir(parents=True)
    flags = run.runs.flags(tyro.cli(run.rl.Args, args=argv))
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def options(tmp_path, *words):
    return tyro.cli(run.Options, args=["--runs-dir", str(tmp_path), *words])


def test_finished_runs_are_kept_begun_ones_resumed_new_ones_begun(tmp_path):
    begun(tmp_path / "guided-1", run.flags_of("main", "guided", 1), summary="{}")
    (begun(tmp_path / "none-1", run.flags_of("main", "none", 1)) / "checkpoints" / "5").mkdir(parents=True)
    begun(tmp_path / "facts-1", run.flags_of("main", "facts", 1))  # stopped before its first checkpoint
    jobs = run.plan(options(tmp_path, "--seeds", "1", "--variants", "guided", "none", "facts", "random"))
    assert [(job.name, job.state) for job in jobs] == [
        ("guided-1", "kept"), ("none-1", "waiting"), ("facts-1", "waiting"), ("random-1", "waiting")
    ]  # fmt: skip
    assert jobs[1].argv == ["--resume", str(tmp_path / "none-1")]
    assert jobs[2].argv == [*run.flags_of("main", "facts", 1), "--run-dir", str(tmp_path / "facts-1")]
    assert jobs[0].total == 1_003_520


def test_seeds_go_round_before_the_next_one(tmp_path):
    jobs = run.plan(options(tmp_path, "--seeds", "2", "--variants", "guided", "none"))
    assert [job.name for job in jobs] == ["guided-1", "none-1", "guided-2", "none-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "gided"], "--variants: unknown variant 'gided'"),
        (["--seeds", "0"], "--seeds: 0 is out of range"),
        (["--jobs", "0"], "--jobs: 0 is out of range"),
        (["--only", "none-9"], "--only: 'none-9' is none of the runs"),
        (["--total-timesteps", "0"], "--total-timesteps: 0 is out of range"),
        (["--variants", "none"], "none-1 was made with other flags (--guidance: full there, none here)"),
        (["--variants", "facts"], "facts-1 is no run folder"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, words, message):
    begun(tmp_path / "none-1", run.flags_of("main", "guided", 1))
    (tmp_path / "facts-1").mkdir()
    assert run.main(["--runs-dir", str(tmp_path), "--seeds", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_flag_that_a_run_did_not_have_yet_counts_as_its_default():
    flags = run.runs.flags(run.rl.Args())
    del flags["queries_per_phase"]
    assert run.differing_flag(flags, []) is None
    assert run.differing_flag(flags, ["--queries-per-phase", "1"]) == "--queries-per-phase: 16 there, 1 here"
    assert run.differing_flag(flags, ["--run-dir", "x", "--save-every", "2"]) is None


def test_slurm_lines_do_the_same(tmp_path, capsys):
    begun(tmp_path / "guided-1", run.flags_of("main", "guided", 1), summary="{}")
    words = ["--runs-dir", str(tmp_path), "--seeds", "2", "--variants", "guided", "none"]
    assert run.main([*words, "--slurm"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2\n" in script
    dry = script.replace("exec ", "echo ")
    (tmp_path / "job.sh").write_text(dry)
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True
    )
    task = done.stdout.split()
    assert task[:2] == [sys.executable, str(ROOT / "benchmarks" / "run.py")] and task[-2:] == ["--only", "guided-2"]
    assert [job.name for job in run.plan(tyro.cli(run.Options, args=task[2:]))] == ["guided-2"]


# --------------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------------


def result(seed, value, commit="abc", steps=(10, 20, 30), columns=("episodic_return", "score", "llm_calls")):
    summary = {
        "seed": seed, "episodic_return": value, "score": 2 * value, "score_all_episodes": value,
        "reward_percent": value, "llm_calls": 5, "llm": "rules", "llm_model": "",
        "env_id": "Toy-v0", "global_step": 30, "eval_episodes": 8,
        "achievements": {"collect_wood": 0.5, "collect_drink": 1.0},
    }  # fmt: skip
    curve = {"global_step": list(steps)} | {name: [s * value for s in steps] for name in columns}
    return {"command": "", "git_commit": commit, "summary": summary, "curve": curve}


def write_results(folder, **runs):
    folder.mkdir(parents=True, exist_ok=True)
    for variant, values in runs.items():
        for seed, value in enumerate(values, 1):
            (folder / f"{variant}-{seed}.json").write_text(collect.dumps(result(seed, value)))
    return folder


def test_the_curve_has_at_most_fifty_points_and_adds_up_the_calls():
    metrics = [
        {"global_step": 10 * i, "charts/episodic_return": None if i == 0 else i / 3, "crafter/score": i, "llm/calls": 2}
        for i in range(201)
    ]
    curve = collect.curve(metrics)
    assert {len(values) for values in curve.values()} == {50}
    assert curve["global_step"][0] == 10 and curve["global_step"][-1] == 2000  # no episode ended in phase 0
    assert curve["llm_calls"][0] == 4 and curve["llm_calls"][-1] == 402
    assert curve["episodic_return"][0] == 0.333 and curve["score"][-1] == 200
    assert collect.curve(metrics[:1]) == {"global_step": [], "episodic_return": [], "score": [], "llm_calls": []}


def test_result_files_read_back_as_they_were(tmp_path):
    folder = write_results(tmp_path, none=[1.5, 2.5], guided=[3.0])
    assert json.loads((folder / "none-2.json").read_text()) == result(2, 2.5)
    loaded = collect.load(folder)
    assert list(loaded) == ["guided", "none"] and list(loaded["none"]) == [1, 2]
    assert collect.column(loaded["none"], "score").tolist() == [3.0, 5.0]


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "none-1.json").write_text('{"summary": {')
    with pytest.raises(ValueError, match=r"none-1\.json can't be read"):
        collect.load(tmp_path)
    (tmp_path / "none-1.json").rename(tmp_path / "moved")
    begun(tmp_path / "none-1", [], summary="{}")
    with pytest.raises(ValueError, match="none-1 can't be read"):
        collect.load(tmp_path)


def test_curves_of_different_lengths_meet_at_common_steps():
    runs = {1: result(1, 1.0), 2: result(2, 2.0, steps=(10, 15, 20, 25))}
    curves = plot.mean_curves(runs, ["score"])
    assert curves[:, 0].tolist() == [[10, 20], [10, 20]] and curves[:, 1].tolist() == [[10, 20], [20, 40]]
    assert plot.mean_curves({1: result(1, 1.0), 2: result(2, 1.0, columns=["episodic_return"])}, ["score"]) is None


def test_old_results_without_score_and_calls_are_drawn_as_far_as_they_go(tmp_path):
    results = {"none": {1: result(1, 1.0, columns=["episodic_return"])}}
    assert plot.plot_curves(results, tmp_path / "curves.png") and (tmp_path / "curves.png").stat().st_size > 1000
    assert not plot.plot_calls(results, tmp_path / "calls.png") and not (tmp_path / "calls.png").exists()


def test_controls_and_ablations_have_a_figure_each(monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "plot_curves", lambda results, path: drawn.append(list(results)) or True)
    plot.plot_controls({"guided": 0, "none": 0, "pause": 0}, Path("x"))
    plot.plot_ablations({"guided": 0, "none": 0, "pause": 0}, Path("x"))
    assert drawn == [["guided", "none"], ["guided", "pause"]]
    assert not plot.plot_ablations({"guided": 0, "none": 0}, Path("x"))


def test_compare_says_what_the_interval_allows(tmp_path, capsys):
    folder = write_results(tmp_path, guided=[5.0, 6.1, 7.0], none=[1.0, 2.0, 3.1], facts=[5.5, 5.5, 7.5])
    assert compare.main(["guided", "none", "--results", str(folder)]) == 0
    shown = capsys.readouterr().out
    # differences 4, 4.1, 3.9: mean 4, standard deviation 0.1, half width 4.3027 * 0.1 / sqrt(3) = 0.25
    assert "| return | 6.03 | 2.03 | +4.00 | +3.75 to +4.25 | +4.00, +4.10, +3.90 |" in shown
    assert "Seeds 1, 2, 3. guided against none: higher in return and higher in score." in shown
    assert "3 seeds are few" in shown and "A: commit abc, guide rules." in shown
    assert compare.main(["facts", "guided", "--results", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "not shown to differ in return and not shown to differ in score." in shown and "are equal" not in shown


def test_compare_pairs_by_seed_and_takes_two_folders(tmp_path, capsys):
    a, b = write_results(tmp_path / "a", guided=[5.0, 6.0], none=[1.0]), write_results(tmp_path / "b", guided=[4.0])
    assert compare.main([str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "+1.00 | - | +1.00 |" in shown and "Seeds 1. " in shown and "One seed gives no interval" in shown
    assert compare.main(["guided", "pause", "--results", str(a)]) == 2
    assert "error: pause is no variant in" in capsys.readouterr().err


def test_a_suite_that_names_no_variant_and_code_in_no_commit(tmp_path, monkeypatch, capsys):
    words = ["--suite", "toy", "--seeds", "1", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(run, "run_jobs", lambda *_: False)
    for commit, warned in (("abc", 0), ("abc-dirty", 1), (None, 1)):
        monkeypatch.setattr(run.run_folder, "git_commit", lambda commit=commit: commit)
        run.main(words)
        assert capsys.readouterr().err.count("in no commit") == warned
    monkeypatch.setitem(run.SUITES, "toy", run.Suite(("gided",)))
    assert run.main(words) == 2
    assert capsys.readouterr().err.startswith("error: SUITES['toy']: unknown variant 'gided'")


def test_readme_is_not_written_from_other_results(tmp_path, capsys):
    assert plot.main(["--suite", "toy"]) == 2
    assert plot.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: --out:") == 2


# --------------------------------------------------------------------------------------------------------------------
# From training to verdict, on the toy game
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """The toy suite, trained."""
    folder = tmp_path_factory.mktemp("toy") / "runs"
    done = run_py(folder)
    assert done.returncode == 0, done.stderr
    assert "2 done" in done.stdout
    return folder


def run_py(folder, *words):
    return subprocess.run(
        toy_command(folder, *words), cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment()
    )


def toy_command(folder, *words):
    return [sys.executable, "benchmarks/run.py", "--suite", "toy", "--seeds", "1", "--runs-dir", str(folder), *words]


def environment():
    return os.environ | {
        "RLADAPTER_CACHE": str(Path(tempfile.gettempdir()) / "rladapter-tests-cache"),
        "COLUMNS": "200",
    }


def test_a_suite_from_training_to_verdict(toy_runs, tmp_path, capsys):
    words = [
        "--suite",
        "toy",
        "--collect",
        "--runs-dir",
        str(toy_runs),
        "--results",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    assert plot.main([*words, "--allow-dirty"]) == 0
    loaded = collect.load(tmp_path)
    found = loaded["guided"][1]
    assert (
        found["command"].startswith("python rladapter_ppo.py --env-id Toy-v0 ")
        and found["command"].endswith(" --seed 1")
        and "run-dir" not in found["command"]
    )
    assert found["curve"]["llm_calls"][-1] == found["summary"]["llm_calls"] > 0
    assert set(loaded["none"][1]["curve"]["llm_calls"]) == {0}
    for name in plot.OF_A_SUITE.keys() - {"results_ablations.png", "results_habits.png"}:
        assert (tmp_path / name).stat().st_size > 5000, name
    assert not any((tmp_path / name).exists() for name in plot.FIGURES.keys() - plot.OF_A_SUITE.keys())  # of others
    assert not (tmp_path / "results_ablations.png").exists()  # neither variant is one
    shown = (tmp_path / "tables.md").read_text()
    assert f"| RLAdapter | `guided` | rules (no LLM) | **{found['summary']['episodic_return']:.2f}**" in shown
    capsys.readouterr()
    assert compare.main(["guided", "none", "--results", str(tmp_path)]) == 0
    assert "guided against none:" in capsys.readouterr().out
    assert compare.main([str(toy_runs), str(tmp_path)]) == 0  # run folders and their results are the same runs
    shown = capsys.readouterr().out
    assert shown.count("| +0.00 | - | +0.00 |") == 4 and shown.count("A and B are equal in every seed") == 2


def test_runs_of_uncommitted_code_or_other_flags_are_not_collected(toy_runs, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(toy_runs / "none-1", runs / "none-1")
    config = json.loads((runs / "none-1" / "config.json").read_text())
    for commit in ("abc-dirty", None):
        (runs / "none-1" / "config.json").write_text(json.dumps(config | {"git_commit": commit}))
        with pytest.raises(ValueError, match="--allow-dirty"):
            collect.collect("toy", runs, tmp_path / "results")
    longer = json.loads((runs / "none-1" / "config.json").read_text())
    longer["flags"]["total_timesteps"] = 1000
    (runs / "none-1" / "config.json").write_text(json.dumps(longer))
    with pytest.raises(ValueError, match="resumed with another --total-timesteps"):
        collect.collect("toy", runs, tmp_path / "results")
    (runs / "none-1").rename(runs / "guided-1")
    with pytest.raises(ValueError, match="other flags than guided has"):
        collect.collect("toy", runs, tmp_path / "results")
    (runs / "guided-1").rename(runs / "copy-1")
    with pytest.raises(ValueError, match="'copy' is no variant"):
        collect.collect("toy", runs, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_second_start_keeps_what_is_finished_and_reports_what_fails(toy_runs, tmp_path):
    shutil.copytree(toy_runs, tmp_path / "runs")
    broken = tmp_path / "runs" / "none-1"
    (broken / "summary.json").unlink()
    for checkpoint in (broken / "checkpoints").iterdir():
        shutil.rmtree(checkpoint / "arrays")
    before = (tmp_path / "runs" / "guided-1" / "summary.json").stat().st_mtime_ns
    done = run_py(tmp_path / "runs")
    assert done.returncode == 1 and "1 kept, 1 failed" in done.stdout
    assert "FAILED: none-1: error: --resume: no checkpoint of" in done.stderr
    assert (tmp_path / "runs" / "guided-1" / "summary.json").stat().st_mtime_ns == before


def test_replay_of_a_collected_run(tmp_path):
    """What was said is kept in a packed file, which --llm replay reads."""
    question = Question(np.zeros(1, np.uint8), np.zeros(1, bool), [], None, messages=[{"role": "user", "content": "?"}])
    said = '{"sub_goals":[]}'
    record = {"phase": 0, "messages": question.messages, "reply": said, "error": "", "skipped": False, "cost": 1.5}
    (tmp_path / "guidance.jsonl").write_text(json.dumps(record) + "\n")
    packed = tmp_path / "guided-1.jsonl.xz"
    packed.write_bytes(collect.packed_guidance(tmp_path))
    for path in (packed, tmp_path / "guidance.jsonl", tmp_path):
        (reply,) = ReplayGuide(TOY, path).complete([question])
        assert reply.text == said and not reply.error
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="^--llm-replay: .*has or is no readable guidance.jsonl"):
        ReplayGuide(TOY, packed)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, capsys):
    words = ["--variants", "none", "--total-timesteps", "30000"]
    process = subprocess.Popen(
        toy_command(tmp_path, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    metrics = tmp_path / "none-1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    other = run.plan(tyro.cli(run.Options, args=toy_command(tmp_path, *words)[2:]))
    run.start(other[0], None)
    assert run.report(other, False, []) == 1 and "none-1: another process trains it" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "1 stopped" in out and "stopped; go on with: python benchmarks/run.py --suite toy" in out
    assert list((tmp_path / "none-1" / "checkpoints").glob("[0-9]*"))
    steps = [json.loads(line)["global_step"] for line in metrics.read_text().splitlines()]
    assert 0 < steps[-1] < 30_000
    done = run_py(tmp_path, *words)
    assert done.returncode == 0 and "1 done" in done.stdout, done.stderr
    resumed = [json.loads(line)["global_step"] for line in metrics.read_text().splitlines()]
    assert resumed[: len(steps)] == steps and resumed[-1] >= 30_000


# --------------------------------------------------------------------------------------------------------------------
# Habits
# --------------------------------------------------------------------------------------------------------------------


def evaluation(**habits):
    """An eval.json: of each habit how many occasions of 4 episodes, and how many were handled sensibly."""
    found = {name: {"occasions": n, "sensible": well, "what": ""} for name, (n, well) in habits.items()}
    rest = {"git_commit": "abc", "seed": 1, "eval_episodes": 4, "episodic_return": 2.0, "score": 3.0, "other": 1}
    return rest | {"habits": found, "deaths": {"lava": 0.25, "thirst": 0.75}}


def test_what_evaluate_saw_is_collected(tmp_path):
    path = tmp_path / "eval.json"
    assert collect.habits(path) is None
    path.write_text(json.dumps({"score": 1.0}))  # of a game without habits
    assert collect.habits(path) is None
    path.write_text(json.dumps(evaluation(naps=(8, 4))))
    found = collect.habits(path)
    assert found["counts"] == {"naps": [8, 4]} and found["deaths"]["thirst"] == 0.75 and "other" not in found
    assert found["command"] == f"python evaluate.py {tmp_path.name} --episodes 4 --seed 1"
    path.write_text(json.dumps(evaluation(naps=(8, 4)) | {"num_envs": 2}))
    assert collect.habits(path)["command"].endswith(" --episodes 4 --seed 1 --num-envs 2")


def test_the_table_of_habits_has_means_of_shares_and_occasions_a_life(tmp_path):
    results = {"guided": {}, "none": {}, "facts": {1: {"summary": {}}}}  # facts were not watched
    for seed, name, counts in ((1, "guided", (8, 4)), (2, "guided", (4, 4)), (1, "none", (0, 0))):
        (tmp_path / "eval.json").write_text(json.dumps(evaluation(naps=counts)))
        summary = {"env_id": "Toy-v0", "llm": "rules", "llm_model": ""}
        results[name][seed] = {"summary": summary, "habits": collect.habits(tmp_path / "eval.json")}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.habits_table(results).splitlines()]
    assert [cell.split(",")[0] for cell in lines[0][1:]] == ["`guided`", "`none`"]
    assert lines[2] == ["naps", "75 [0, 100] (1.5)", "-"]  # no occasion is no share
    assert lines[3] == ["*ended by lava, % of the lives*", "25 [25, 25]", "25"]
    assert plot.plot_habits(results, tmp_path / "habits.png") and (tmp_path / "habits.png").stat().st_size > 5000
    assert tables.habits_table({"facts": results["facts"]}) == "not measured"


def test_the_original_game_stands_beside_the_own_env(tmp_path):
    there = {"env_id": "Crafter", "achievements": {"a": 0.5}, "episodic_return": 7.0, "score": 9.0}
    (tmp_path / "eval-crafter.json").write_text(json.dumps(evaluation() | there))
    found = collect.original(tmp_path / "eval-crafter.json")
    assert found["command"].endswith("--episodes 4 --seed 1 --env-id Crafter") and found["achievements"] == {"a": 0.5}
    assert collect.original(tmp_path / "nothing.json") is None
    summary = {"episodic_return": 16.0, "score": 60.0}
    results = {"guided": {1: {"summary": summary, "original": found}, 2: {"summary": {}}}, "none": {1: {"summary": {}}}}
    assert tables.original_table(results).splitlines()[2:] == ["| `guided` | 1 | 4 | 7.0 | 16.0 | 9.0 | 60.0 |"]
    assert tables.original_table({"none": results["none"]}) == "not measured"


def test_what_the_guide_was_told_is_collected_as_means_of_phases():
    metrics = [
        {"guidance/comprehension": None, "guidance/rules_stated": 4, "guidance/rules_holding": 1},
        {"guidance/comprehension": 0.5, "guidance/rules_stated": 4, "guidance/rules_holding": 3,
         "adapter/agreement_before": 0.25, "adapter/agreement_after": 0.5},
        {"guidance/comprehension": 0.25, "adapter/agreement_after": None},
    ]  # fmt: skip
    found = collect.advice(metrics)
    assert found == {"comprehension": 0.375, "agreement_before": 0.25, "agreement_after": 0.5, "holding": 0.5}
    assert collect.advice([{}]) == {}


def test_the_replies_that_heed_an_analysis_are_counted_among_the_usable_ones():
    game = collect.make_env("Toy-v0", 1).game
    first, second = game.sub_goals[:2]
    there = {"error": "", "situation": list(game.needs[first])}
    answers = [
        {"analysis": f"Now {first}, then {second}.", "sub_goals": [second, first], **there},
        {"analysis": f"Now {first}.", "sub_goals": [second], **there},
        {"analysis": "", "sub_goals": [second], "error": "", "situation": list(game.needs[second])},
        {"analysis": f"Now {first}.", "sub_goals": [], "error": "time-out", "situation": []},
    ]
    assert game.needs[first] and game.needs[second] and {*game.needs[first]} != {*game.needs[second]}
    assert collect.heard(game, answers) == {"usable": 0.75, "heeded": 0.5, "possible": 0.5}  # two of four, there
    assert collect.heard(game, answers[2:3]) == {"usable": 1.0, "possible": 1.0} and collect.heard(game, []) == {}


def test_what_was_said_in_the_last_pause_is_kept_in_its_order_and_safe_to_show(tmp_path):
    answers = [
        {"phase": phase, "analysis": f"It is {phase}.{i}\x1b[31m\n", "reply": '{ "sub_goals" : [\n ] }', "error": ""}
        for phase in (0, 3) for i in range(12)
    ]  # fmt: skip
    answers[12] |= {"reply": "", "error": "time-out"}
    said = collect.said(answers)
    assert len(said) == collect.SAID and said[0] == ["It is 3.0", "time-out"]
    assert said[1] == ["It is 3.1", '{"sub_goals":[]}'] and collect.said([]) == []
    assert collect.compact("{not JSON}") == "{not JSON}"
    assert len(collect.said([answers[0] | {"reply": "a" * 999}])[0][1]) == collect.LONGEST
    results = collect.load(write_results(tmp_path, **{"no-sft": [1.0], "experience": [2.0]}))
    results["no-sft"][1]["said"] = [["", "time-out"], said[1]]
    shown = tables.said_table(results).splitlines()
    assert "seed 1:" in shown[0] and shown[2:4] == ["    (nothing)", "    -> time-out"] and shown[5] == "    It is 3.1"
    assert tables.said_table({}) == "not measured"
    path = tmp_path / "again.json"
    path.write_text(collect.dumps(results["no-sft"][1]))
    assert collect.read_result(path) == results["no-sft"][1]


def test_the_table_of_the_adapter_compares_the_tuned_one_by_seed_with_all_others(tmp_path):
    folder = write_results(tmp_path, **{"no-adapter": [1.0, 2.0], "no-sft": [3.0], "experience": [4.0, 6.0, 8.0]})
    results = collect.load(folder)
    results["experience"][2]["advice"] = {"comprehension": 0.5}
    for runs in results.values():
        for each in runs.values():  # half of what they end with
            each["curve"]["score"] = [0.0, each["summary"]["score"]]
    parts = [
        {row[0] if row[0].startswith("`") else row[1]: row for row in
         ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[2:])}
        for part in tables.adapter_table(results).split("\n\n")
    ]  # fmt: skip
    rows, ahead, measured = parts
    assert list(rows) == ["`no-adapter`", "`no-sft`", "`experience`"] and list(ahead) == list(rows)[:2]
    assert rows["`no-adapter`"][2:] == ["**1.50** (1.00, 2.00)", "3.0 [0, 16]", "1.5 [0, 8]"]  # shares, so 0 to 100
    assert rows["`experience`"][2:] == ["**6.00** (4.00, 6.00, 8.00)", "12.0 [2, 22]", "6.0 [1, 11]"]
    assert measured == {"`experience`": ["`experience`", "50", *[""] * 8]}
    difference = ["+3.50 [-2.85, +9.85]", "+7.00 [-5.71, +19.71]", "+3.50 [-2.85, +9.85]"]
    assert ahead["`no-adapter`"][1:] == ["2", *difference] and ahead["`no-sft`"][1:] == ["1", "+1.00", "+2.00", "+1.00"]
    smollm2 = {"smollm2-no-sft": results["no-sft"], "smollm2-experience": results["experience"]}
    others = results | smollm2 | {"echo": {3: results["experience"][2]}}
    own = [part.splitlines() for part in tables.adapter_table(others).split("\n\n")[1:3]]
    assert [[line.split("`")[1] for line in lines if "`" in line] for lines in own] == [
        ["experience", "no-adapter", "no-sft", "echo"], ["smollm2-experience", "no-adapter", "smollm2-no-sft", "echo"],
    ]  # fmt: skip
    alone = tables.adapter_table({"experience": results["experience"]})
    assert "minus" not in alone and "minus" not in tables.adapter_table({"no-sft": results["no-sft"]})
    for seed, share in ((1, 0.75), (2, 0.25)):
        results["experience"][seed]["advice"] = {"agreement_after": share, "possible": 0.5}
    for runs in others.values():
        for run_result in runs.values():
            run_result["summary"] |= {"adapter": "assets/tiny"}
    claim = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             tables.claim_table({"adapter": others, "llm": {}}).splitlines()[2:]]  # fmt: skip
    start = ["rules (no LLM)", "tiny", "`experience`", claim[0][3], "1.5 / 3 %", "3.0 / 6 %", "6.0 / 12 %"]
    leads = ["+1.00 (1)", "+3.50 [-2.85, +9.85] (2)"]
    assert claim == [[*start, "6.0 / 12 %", *leads, "+2.00 (1)"], [*start, "", *leads, ""]]  # of both tuned adapters
    assert tables.claim_table({"adapter": {}}) == "not measured"
    shown = [tables.advice_table({name: results["experience"]}).splitlines()[2] for name in ("experience", "exchanged")]
    agreed = [" 50 [0, 100] " in line for line in shown]
    assert agreed == [True, False]  # the latter's is of an adapter whose analyses are not those heard
    assert tables.adapter_table({}) == "not measured"