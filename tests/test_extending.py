"""The forks of docs/extending.md: each diff applies to the code as it is now, and trains two phases on a toy game.

A fork is a patched copy of the code, imported in this process in place of the code itself.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE, DIFFS = ROOT / "docs" / "extending.md", ROOT / "docs" / "forks"
CODE = [*sorted(path.name for path in ROOT.glob("*.py")), "envs", "utils"]
SMALL = "--num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --updates-per-phase 3 --guidance-rows 8 " \
    "--rnn-size 16 --queries-per-phase 4 --eval-episodes 16 --total-timesteps 400".split()  # fmt: skip
STALE = """{diff} does not apply any more:
{said}
To write it anew: in a copy of the repository (git worktree add ../fork; cd ../fork)
    patch -p1 < {diff}          # then put in by hand what patch left in *.rej
    git add -N . && git diff -U1 --patience -- '*.py' > {diff}          # and copy that back"""


def patched_copy(name: str, folder: Path) -> Path:
    """Copies the code into the folder, and applies a fork's diff there."""
    for entry in CODE:
        if (ROOT / entry).is_dir():
            shutil.copytree(ROOT / entry, folder / entry, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / entry, folder / entry)
    patch = ["patch", "-p1", "--batch", "--no-backup-if-mismatch", "-i", str(DIFFS / f"{name}.diff")]
    done = subprocess.run(patch, cwd=folder, capture_output=True, text=True)
    assert not done.returncode, STALE.format(diff=f"docs/forks/{name}.diff", said=done.stdout + done.stderr)
    return folder


def is_code(module: str) -> bool:
    """Is this one of our modules?"""
    return module.split(".")[0] in [entry.removesuffix(".py") for entry in CODE]


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(name): the fork's rladapter_ppo. Until the end of the test its modules stand in for ours."""
    ours = {name: module for name, module in sys.modules.items() if is_code(name)}

    def load(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.syspath_prepend(str(patched_copy(name, folder)))
        for module in ours:
            del sys.modules[module]
        rl = importlib.import_module("rladapter_ppo")
        assert Path(rl.__file__).parent == folder
        monkeypatch.setenv("RLADAPTER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(rl.runs, "use_compilation_cache", lambda: None)  # the tests have one of their own
        return rl

    yield load
    for module in [name for name in sys.modules if is_code(name)]:
        del sys.modules[module]
    sys.modules.update(ours)


def command(name: str) -> list[str]:
    """Returns the flags of the page's command for a fork."""
    section = PAGE.read_text().partition(f"(forks/{name}.diff)")[2]
    return shlex.split(re.search(r"    python -m rladapter_ppo (.*)", section).group(1))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(rl, name: str, folder: Path, *more: str) -> list[dict]:
    """Trains two phases with the page's command. Returns the metrics of both."""
    assert rl.cli([*command(name), *SMALL, "--run-dir", str(folder), *more]) == 0
    metrics = lines(folder / "metrics.jsonl")
    assert len(metrics) == 2 and all(np.isfinite(m["losses/policy_loss"]) for m in metrics)
    assert json.loads((folder / "summary.json").read_text())["eval_episodes"] == 16
    return metrics


def test_the_page_shows_every_fork():
    linked = re.findall(r"\(forks/([\w-]+)\.diff\)", PAGE.read_text())
    assert sorted(set(linked)) == sorted(path.stem for path in DIFFS.glob("*.diff"))
    for name in linked:
        diff = (DIFFS / f"{name}.diff").read_text()
        more, less = (len(re.findall(rf"^[{sign}](?!{re.escape(sign * 2)} )", diff, re.MULTILINE)) for sign in "+-")
        said = f"(forks/{name}.diff), {more} lines more" + f" and {less} less" * bool(less)
        assert said in PAGE.read_text(), f"docs/extending.md does not say {said}"
        assert command(name)


def test_what_the_page_shows_of_a_diff_is_in_it():
    """Blocks ```diff are lines of the fork that was linked last, as they stand there, gaps marked by "..."."""
    page = PAGE.read_text()
    shown = [(m.start(), m.group(1)) for m in re.finditer(r"```diff\n(.*?)```", page, re.DOTALL)]
    assert len(shown) >= 3
    for at, block in shown:
        name = re.findall(r"\(forks/([\w-]+)\.diff\)", page[:at])[-1]
        diff = (DIFFS / f"{name}.diff").read_text()
        for part in block.split("...\n"):
            assert part.strip() and part in diff, f"docs/extending.md shows what {name}.diff has not:\n{part}"


# ---- each fork


def test_film_advice_modulates_the_policy(fork, tmp_path):
    rl = fork("film")
    train(rl, "film", tmp_path / "run")
    args = rl.Args(env_id="Toy-v0", guidance="film", num_envs=3, num_minibatches=1, hidden_size=16, rnn_size=8)
    env = rl.devices.share_env(rl.make_env, args.env_id, 3, 1, 1)
    host_table = rl.HostTable(args.table, env)
    table = host_table.for_training()
    agent, params = rl.make_agent(args, env, table, jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    _, exposure = rl.draw_exposure(agent, runner, table)
    seen, _ = rl.act(args, agent, runner, table, exposure, jax.random.key(2))
    same = {name: jnp.zeros_like(seen[name][None]) for name in rl.SEEN}
    advised = same | {"advised": jnp.eye(3, dtype=bool).at[2].set(False)[None]}
    logits, value, *_ = agent(params, table, advised, jnp.zeros((3, 8)))
    assert len({tuple(row) for row in np.asarray(logits[0]).tolist()}) == len(set(value[0].tolist())) == 3
    plain = {**params, "film": jax.tree.map(jnp.zeros_like, params["film"])}
    unmoved, *_ = agent(type(params)(plain), table, advised, jnp.zeros((3, 8)))
    np.testing.assert_allclose(unmoved[0], np.broadcast_to(logits[0, 2], (3, 3)), atol=1e-6)  # without advice the same


def test_new_game_trains_with_its_own_words(fork, tmp_path):
    rl = fork("new-game")
    metrics = train(rl, "new-game", tmp_path / "run")
    assert metrics[-1]["guidance/coverage"] > 0 and not metrics[-1]["llm/failures"]
    asked = lines(tmp_path / "run/guidance.jsonl")
    assert {goal for line in asked for goal in line["sub_goals"]} <= {"press red", "press green", "press blue"}
    page_file = re.search(r"```python\n(.*?)```", PAGE.read_text().partition("(forks/new-game.diff)")[2], re.DOTALL)
    assert page_file.group(1) == (Path(rl.__file__).parent / "envs/buttons.py").read_text()

    env = rl.make_env("Buttons-v0", num_envs=4)
    state, total, keys = env.reset(jax.random.key(0), 4), 0.0, jax.random.split(jax.random.key(1), 4)
    step = jax.jit(env.step)
    for _ in range(10):
        state, reward, done, info = step(keys, state, state.lit)
        total += reward
    assert total.tolist() == [5.0] * 4 and done.all() and not state.time.any()
    places = env.places(env.observe(state))
    assert places[0].tolist() == [[-1, x, 2] for x in (-1, 0, 1)] and places.shape == (4, 3, 3)


def test_preference_loss_prefers(fork, tmp_path, monkeypatch):
    rl = fork("preference")
    module, tiny = sys.modules["rladapter_adapter"], str(ROOT / "assets/adapter-tiny")
    adapter = module.load_adapter(tiny)
    pairs = [(f"You see: {thing}.", "Chop tree.", "Drink water.") for thing in ("a tree", "an oak")]
    texts = [adapter.encode_example(*pair) for pair in pairs]
    prompt, preferred, rejected = texts[0]
    rows = module.pack([*texts, (prompt, preferred), (prompt, rejected)], module.row_length(texts))
    nll = jax.jit(module.answer_nll, static_argnums=0)(adapter.graphdef, adapter.base, adapter.lora, rows)
    difference, _, alone, other = (nll * rows["weights"]).sum(-1).tolist()
    assert difference == pytest.approx(alone - other, abs=1e-3)  # the two texts of a row do not see each other

    batch, lora, optimizer, losses = module.batches(rows, 8, np.arange(2))[0], adapter.lora, adapter.optimizer, []
    for _ in range(6):
        lora, optimizer, loss, finite = module.sft_step(
            adapter.graphdef, module.dpo_loss, adapter.base, lora, optimizer, batch, jnp.float32(3e-3), None
        )
        assert finite
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < 0.9 * losses[0]

    said = ["Chop tree.", "Drink water."]
    monkeypatch.setattr(module.Adapter, "analyse", lambda self, prompts, key: (said * len(prompts))[: len(prompts)])
    monkeypatch.setattr(rl.HostTable, "trial_z", lambda self: np.full(len(self.rows.valid), 9.0))
    metrics = train(rl, "preference", tmp_path / "run", "--adapter", tiny, "--sft-every", "1")
    assert all(0 < m["adapter/sft_loss"] < 0.7 for m in metrics)
    for line in lines(tmp_path / "run/examples.jsonl"):
        answers = ["Chop tree.", "Drink water."] if "a tree" in line["prompt"] else ["Drink water.", "Chop tree."]
        assert [line["response"], line["rejected"]] == answers


def test_prompt_can_be_reworded(fork, tmp_path):
    rl = fork("prompt")
    metrics = train(rl, "prompt", tmp_path / "run")
    assert metrics[-1]["guidance/coverage"] > 0
    for line in lines(tmp_path / "run/guidance.jsonl"):
        assert line["messages"][1]["content"].startswith("The player reports: I stand before a")
        assert line["sub_goals"] and not line["error"]
