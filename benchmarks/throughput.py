"""Env steps per second: of the env alone, of rollouts, of training with guidance and without, in one run.

    python benchmarks/throughput.py                                           # some 6 minutes on two cores
    python benchmarks/throughput.py --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --scale 64 256 1024 4096 --json benchmarks/results/scale.json
    python benchmarks/throughput.py --check benchmarks/results/throughput.json    # exit code 1: a ratio fell by 20 %

All that is compared takes turns, so that a machine that slows down slows all of it, and only ratios are compared.
Clocks stop after `block_until_ready`; compilation and each one's first turn are left out. Three ways to reset:
craftax's own auto-reset (a fresh world for every env at every step), optimistic resets as in Craftax_Baselines (a fresh
world for every 16th env at every step, shared by those that end), and ours (`envs/craftax.py`).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import rladapter_ppo as rl  # noqa: E402
import runs  # noqa: E402
from envs import make_env  # noqa: E402

ENV_ID = "Craftax-Classic-Symbolic-v1"
SHORTER = 12  # times
RATIO = 16  # envs per fresh world of optimistic resets
TRAININGS = {
    "unguided": {"guidance": "none"},
    "guided": {},
    "guided, no adapter": {"adapter": "none"},
}
# What --check compares: (name, numerator, denominator)
RATIOS = (
    ("guided / unguided", "guided", "unguided"),
    ("guided without adapter / unguided", "guided, no adapter", "unguided"),
    ("our resets / optimistic resets", "env, our resets", "env, optimistic resets"),
    ("our resets / craftax's auto-reset", "env, our resets", "env, craftax's auto-reset"),
    ("unguided / rollout", "unguided", "rollout"),
)
ALLOWED_LOSS = 0.2


@dataclass(frozen=True)
class Options:
    turns: int = 8
    """timed turns of each"""
    num_envs: int = 64
    """parallel games"""
    num_steps: int = 96
    """steps of a rollout"""
    trainings: bool = True
    """--no-trainings measures env and rollout only"""
    scale: tuple[int, ...] = ()
    """measure only guided updates and their memory, with these numbers of envs, each in a process of its own"""
    json: Path | None = None
    """also write the result here"""
    check: Path | None = None
    """compare the ratios with those of this result; exit code 1 where one is lower by more than 20 %"""
    child: bool = False
    """internal: be a process that does --turns updates after its first one"""


# ------------------------------------------------------------------------------------------------------ the env alone


def our_resets(options: Options) -> tuple[Any, Callable]:
    """(state, function of state and key) that plays num_steps steps at random; observations are made and looked at."""
    env, n = make_env(ENV_ID, options.num_envs), options.num_envs

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (n,), 0, env.num_actions)
        state, reward, _, _ = env.step(jax.random.split(key_step, n), state, action)
        return state, env.features(env.observe(state)).sum() + reward.sum()

    def play(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_steps, key_refill = jax.random.split(key)
        state, out = jax.lax.scan(step, state, jax.random.split(key_steps, options.num_steps))
        return env.refill(jax.random.split(key_refill, env.num_pools), state), out

    return jax.jit(lambda key: env.reset(key, n))(jax.random.key(0)), jax.jit(play)


def craftax_resets(options: Options, optimistic: bool) -> tuple[Any, Callable]:
    """The same with craftax's env and one of its two reset schemes; a SHORTER turn with the slow one."""
    from craftax.craftax_env import make_craftax_env_from_name

    env, n = make_craftax_env_from_name(ENV_ID, auto_reset=not optimistic), options.num_envs
    params, num_worlds = env.default_params, max(1, n // RATIO)
    reset = jax.vmap(env.reset, in_axes=(0, None))

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_action, key_step, key_reset, key_choice = jax.random.split(key, 4)
        action = jax.random.randint(key_action, (n,), 0, env.num_actions)
        keys = jax.random.split(key_step, n)
        obs, state, reward, done, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)
        if optimistic:
            worlds = reset(jax.random.split(key_reset, num_worlds), params)
            chosen = jax.random.randint(key_choice, (n,), 0, num_worlds)
            obs, state = jax.tree.map(
                lambda new, old: jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new[chosen], old),
                worlds, (obs, state),
            )  # fmt: skip
        return state, obs.sum() + reward.sum()

    def play(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        num_steps = options.num_steps if optimistic else -(-options.num_steps // SHORTER)
        return jax.lax.scan(step, state, jax.random.split(key, num_steps))

    state = jax.jit(reset)(jax.random.split(jax.random.key(0), n), params)[1]
    state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)
    return state, jax.jit(play)


def rollout(options: Options) -> tuple[Any, Callable]:
    """An unguided policy plays."""
    args = rl.Args(num_envs=options.num_envs, num_steps=options.num_steps, guidance="none")
    env = make_env(ENV_ID, options.num_envs)
    agent, params = rl.make_agent(args, env, jax.random.key(0))
    runner = jax.jit(rl.init_runner, static_argnums=(0, 1))(args, agent, params, jax.random.key(1))
    table = rl.Records(args, env.num_actions, env.observe(runner.env_state).shape[1:]).table()
    lookup = rl.make_lookup(args, table, jax.random.key(2), env.facts(env.observe(runner.env_state)))

    def play(runner: Any, key: jax.Array) -> tuple[Any, Any]:
        runner, transitions, _ = rl.rollout(args, agent, runner, table, lookup)
        return runner, transitions

    return runner, jax.jit(play)


class Player:
    """Takes turns of one rollout."""

    def __init__(self, state: Any, play: Callable):
        self.state, self.play, self.seconds = state, play, []

    def turn(self, i: int) -> None:
        start = time.perf_counter()
        self.state, out = self.play(self.state, jax.random.key(i))
        jax.block_until_ready((self.state, out))
        self.seconds.append(time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------- trainings


class Trainee:
    """A run in a temporary folder; a turn is a phase, pause and fine-tuning included."""

    def __init__(self, args: rl.Args, folder: Path):
        self.session = rl.prepare(args, folder, False, [])
        self.log = runs.Log(folder, False, {})
        values = args, self.session.agent, self.session.runner, rl.current_table(self.session), np.int32(1)
        self.compiled, self.compile_seconds = rl.ahead_of_time(args, rl.train_phase, *values)
        self.compile_seconds += rl.warm_up_adapter(self.session)
        self.seconds: list[float] = []

    def turn(self, i: int) -> None:
        start = time.perf_counter()
        rl.run_phase(self.session, self.compiled, self.log)
        self.seconds.append(time.perf_counter() - start)


def training_args(options: Options) -> rl.Args:
    base = replace(rl.Args(), num_envs=options.num_envs, num_steps=options.num_steps)
    return replace(base, total_timesteps=base.batch_size * base.updates_per_phase * (options.turns + 1))


def take_turns(players: dict[str, Any], turns: int) -> None:
    """The first turn, which compiles or is a short phase, does not count."""
    for i in range(turns + 1):
        for player in players.values():
            player.turn(i)
    for player in players.values():
        del player.seconds[0]


def be_child(options: Options) -> None:
    """A guided training of one update and --turns more, whose times and peak memory are printed."""
    args = replace(training_args(options), updates_per_phase=1)
    rl.configure_jax(args)
    with tempfile.TemporaryDirectory() as folder:
        trainee = Trainee(args, Path(folder) / "run")
        for i in range(1 + options.turns):
            trainee.turn(i)
    print(json.dumps({"seconds": trainee.seconds, "peak_memory_gb": peak_memory()}))


def run_child(turns: int, num_envs: int, cache: str) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole process, and what it printed."""
    command = [sys.executable, __file__, "--child", "--turns", str(turns), "--num-envs", str(num_envs)]
    start, environment = time.perf_counter(), os.environ | {"RLADAPTER_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def time_start_up(options: Options) -> dict[str, float]:
    """Seconds of a process that ends with its first update: with an empty cache of compiled programs, and warm."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: run_child(0, options.num_envs, cache)[0] for name in ("cold", "warm")}


def measure_scale(options: Options) -> list[dict[str, float]]:
    rows = []
    for num_envs in options.scale:
        with tempfile.TemporaryDirectory() as cache:
            _, child = run_child(2, num_envs, cache)
        rate = num_envs * rl.Args().num_steps / float(np.median(child["seconds"][1:]))
        rows.append({"num_envs": num_envs, "steps_per_second": rate, "peak_memory_gb": child["peak_memory_gb"]})
        print(rows[-1], file=sys.stderr)
    return rows


def peak_memory() -> float:
    """GB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -------------------------------------------------------------------------------------------------------------- report


def ratio(players: dict[str, Any], over: str, under: str, steps: dict[str, int]) -> float:
    """Of the rates, the median over the turns: each beside the one next to it in time."""
    quotients = np.array(players[under].seconds) / np.array(players[over].seconds)
    return float(np.median(quotients)) * steps[over] / steps[under]


def all_ratios(players: dict[str, Any], steps: dict[str, int]) -> dict[str, float]:
    """RATIOS of these players, which took turns."""
    return {name: ratio(players, over, under, steps) for name, over, under in RATIOS if {over, under} <= set(players)}


def measure(options: Options) -> dict[str, Any]:
    players = {
        "env, our resets": Player(*our_resets(options)),
        "env, optimistic resets": Player(*craftax_resets(options, True)),
        "env, craftax's auto-reset": Player(*craftax_resets(options, False)),
        "rollout": Player(*rollout(options)),
    }
    args = training_args(options)
    steps = dict.fromkeys(players, args.batch_size)
    steps["env, craftax's auto-reset"] = args.num_envs * -(-args.num_steps // SHORTER)
    take_turns(players, options.turns)
    ratios, compile_seconds, start_up_seconds = all_ratios(players, steps), {}, {}
    if options.trainings:
        with tempfile.TemporaryDirectory() as folder:
            trainees = {
                name: Trainee(replace(args, **changes), Path(folder) / str(i))
                for i, (name, changes) in enumerate(TRAININGS.items())
            }
            steps |= dict.fromkeys(trainees, args.batch_size * args.updates_per_phase)
            # A rollout once more, to be compared with the trainings beside it.
            beside = trainees | {"rollout": Player(players["rollout"].state, players["rollout"].play)}
            take_turns(beside, options.turns)
        players, ratios = players | beside, ratios | all_ratios(beside, steps)
        compile_seconds = {name: trainee.compile_seconds for name, trainee in trainees.items()}
        start_up_seconds = time_start_up(options)
    rates = {name: steps[name] / float(np.median(player.seconds)) for name, player in players.items()}
    return {
        "num_envs": options.num_envs, "num_steps": options.num_steps, "steps_per_second": rates,
        "ratios": ratios,
        "compile_seconds": compile_seconds, "start_up_seconds": start_up_seconds,
        "peak_memory_gb": peak_memory(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    described = runs.describe_machine()
    return {name: described[name] for name in ("device", "num_cpus", "git_commit")}


def check(result: dict[str, Any], expected: dict[str, Any]) -> int:
    """1 if a ratio is lower than the expected one by more than ALLOWED_LOSS."""
    lost = [
        f"{name} is {result['ratios'][name]:.2f}, was {old:.2f}"
        for name, old in expected["ratios"].items()
        if name in result["ratios"] and result["ratios"][name] < (1 - ALLOWED_LOSS) * old
    ]
    print("\n".join(lost) or "no ratio fell by more than 20 %", file=sys.stderr)
    return int(bool(lost))


def main(options: Options) -> int:
    if options.child:
        be_child(options)
        return 0
    result = ({"scale": measure_scale(options)} if options.scale else measure(options)) | machine()
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return check(result, json.loads(options.check.read_text())) if options.check else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
