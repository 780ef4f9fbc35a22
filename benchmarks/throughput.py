"""Env steps per second: of the env alone, of rollouts, of training with guidance and without, in one run.

    python benchmarks/throughput.py                                           # half an hour on two cores
    python benchmarks/throughput.py --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --num-envs 64 --no-baseline               # 6 minutes
    python benchmarks/throughput.py --scale 64 256 1024 4096 --json benchmarks/results/scale.json
    python benchmarks/throughput.py --num-envs 64 --no-baseline --check benchmarks/results/throughput.json
                                                                    # exit code 1: a ratio fell by 20 %

All that is compared takes turns, so that a machine that slows down slows all of it, and only ratios are compared.
Clocks stop after `block_until_ready`; compilation and each one's first turn are left out. Three ways to reset:
craftax's own auto-reset (a fresh world for every env at every step), optimistic resets as in Craftax_Baselines (a fresh
world for every 16th env at every step, shared by those that end), and ours (`envs/crafter/env.py`).

"Same work": the loop of Craftax_Baselines' PPO (`baseline.py`) beside ours, both with its network, rollouts, epochs and
minibatches. With its own number of envs, 1,024, our defaults take turns beside them.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from baseline import Config, TwoTowers, make_baseline, optimistic_env
from craftax.craftax_env import make_craftax_env_from_name
from flax import nnx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import rladapter_ppo as rl  # noqa: E402
from advice import draw_exposures  # noqa: E402
from envs import make_env  # noqa: E402
from envs.nearest import NUM_FEATURES  # noqa: E402
from guidance import HostTable  # noqa: E402
from rladapter_adapter import make_adapter  # noqa: E402
from utils import run_folder, runs  # noqa: E402
from utils.compilation import use_compilation_cache  # noqa: E402
from utils.devices import SharedEnv  # noqa: E402
from utils.llm_http import estimate_tokens  # noqa: E402

ENV_ID = "Craftax-Classic-Symbolic-v1"
ENVS_OF_MINIBATCH = 2048  # at most: what bounds memory
SHORTER = 512  # env steps of a turn with craftax's own auto-reset, which is slow
DEFAULTS = "unguided, our defaults (64 envs)"
TRAININGS: dict[str, Callable[[rl.Args], rl.Args]] = {
    "unguided": lambda args: replace(args, guidance="none"),
    "guided": lambda args: args,
    "guided, no adapter": lambda args: replace(args, sft=replace(args.sft, adapter="none")),
}
# What --check compares: (name, numerator, denominator)
RATIOS = (
    ("guided / unguided", "guided", "unguided"),
    ("guided without adapter / unguided", "guided, no adapter", "unguided"),
    ("our resets / optimistic resets", "env, our resets", "env, optimistic resets"),
    ("our resets / craftax's auto-reset", "env, our resets", "env, craftax's auto-reset"),
    ("unguided / rollout", "unguided", "rollout"),
    ("same work, ours / Craftax_Baselines' PPO", "same work, ours", "Craftax_Baselines' PPO"),
    (f"{DEFAULTS} / Craftax_Baselines' PPO", DEFAULTS, "Craftax_Baselines' PPO"),
)
ALLOWED_LOSS = 0.2


@dataclass(frozen=True)
class Options:
    turns: int = 8
    """timed turns of each with 64 envs; fewer with more envs, at least three; of trainings, which are long, a third"""
    num_envs: tuple[int, ...] = (64, 256, 1024)
    """numbers of parallel games, one after the other"""
    num_steps: int = rl.Args.num_steps
    """steps of a rollout"""
    trainings: bool = True
    """--no-trainings measures env and rollout only"""
    baseline: bool = True
    """--no-baseline leaves Craftax_Baselines' PPO out"""
    scale: tuple[int, ...] = ()
    """measure only trainings and their memory, with these numbers of envs, each in a process of its own"""
    guidance: tuple[Literal["full", "none", "facts"], ...] = ("full",)
    """the trainings of --scale"""
    scale_turns: int = 1
    """timed turns of each training of --scale"""
    warm: bool = False
    """--scale uses the programs that are in the cache; default: each process compiles, and memory counts that"""
    json: Path | None = None
    """also write the result here"""
    check: Path | None = None
    """compare the ratios with those of this result; exit code 1 where one is lower by more than 20 %"""
    child: bool = False
    """internal: be a process that does --turns updates after its first one"""


@dataclass(frozen=True)
class Setting:
    """One number of envs."""

    num_envs: int
    num_steps: int
    turns: int

    @property
    def training_turns(self) -> int:
        return -(-self.turns // 3)

    @property
    def num_minibatches(self) -> int:
        """As many as by default, or as keep minibatches small enough."""
        fewest = max(rl.Args().num_minibatches, -(-self.num_envs // ENVS_OF_MINIBATCH))
        return next(n for n in range(fewest, self.num_envs + 1) if self.num_envs % n == 0)

    @property
    def args(self) -> rl.Args:
        """With any number of envs as many questions and fine-tunings per env step as with the defaults."""
        default, base = rl.Args(), replace(rl.Args(), num_envs=self.num_envs, num_steps=self.num_steps)
        usual = default.updates_per_phase * default.batch_size  # env steps of a phase
        updates = min(max(1, usual // base.batch_size), default.updates_per_phase)
        times = updates * base.batch_size / usual
        queries = max(1, round(default.table.queries_per_phase * times))
        sft_every = max(1, round(default.sft.sft_every / times))
        num_phases = 1 + self.training_turns * sft_every
        return replace(
            base,
            updates_per_phase=updates,
            table=replace(base.table, queries_per_phase=queries),
            sft=replace(base.sft, sft_every=sft_every),
            num_minibatches=self.num_minibatches,
            total_timesteps=num_phases * updates * base.batch_size,
        )


def settings_of(options: Options) -> list[Setting]:
    return [Setting(n, options.num_steps, max(3, options.turns * 64 // n)) for n in options.num_envs]


# ------------------------------------------------------------------------------------------------------ the env alone


def our_resets(setting: Setting) -> tuple[Any, Callable]:
    """(state, function of state and key) that plays num_steps steps at random; observations are made and looked at."""
    env, n = make_env(ENV_ID, setting.num_envs), setting.num_envs

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (n,), 0, len(env.game.actions))
        state, reward, _, _ = env.step(jax.random.split(key_step, n), state, action)
        return state, env.features(env.observe(state)).sum() + reward.sum()

    def play(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_steps, key_refill = jax.random.split(key)
        state, out = jax.lax.scan(step, state, jax.random.split(key_steps, setting.num_steps))
        return env.refill(jax.random.split(key_refill, env.num_pools), state), out

    return jax.jit(lambda key: env.reset(key, n))(jax.random.key(0)), jax.jit(play)


def optimistic_resets(setting: Setting) -> tuple[Any, Callable]:
    """The same with craftax's env and a world for every 16th env at every step."""
    reset, step, num_actions = optimistic_env(ENV_ID, setting.num_envs, Config().reset_ratio)
    return jax.jit(reset)(jax.random.key(0))[1], random_play(step, num_actions, setting.num_envs, setting.num_steps)


def auto_resets(setting: Setting) -> tuple[Any, Callable]:
    """The same with craftax's env as it is, in shorter turns."""
    env = make_craftax_env_from_name(ENV_ID, auto_reset=True)
    vmapped = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
        return vmapped(jax.random.split(key, setting.num_envs), state, action, env.default_params)[:4]

    reset, _, num_actions = optimistic_env(ENV_ID, setting.num_envs, 1)
    play = random_play(step, num_actions, setting.num_envs, steps_of_auto_reset(setting))
    return jax.jit(reset)(jax.random.key(0))[1], play


def random_play(step_env: Callable, num_actions: int, num_envs: int, num_steps: int) -> Callable:
    """Jitted function of state and key: num_steps steps at random of an env whose steps give observations."""

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        key_action, key_step = jax.random.split(key)
        obs, state, reward, _ = step_env(key_step, state, jax.random.randint(key_action, (num_envs,), 0, num_actions))
        return state, obs.sum() + reward.sum()

    return jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, num_steps)))


def steps_of_auto_reset(setting: Setting) -> int:
    return max(1, SHORTER // setting.num_envs)


def rollout(setting: Setting) -> tuple[Any, Callable]:
    """An unguided policy plays."""
    args = replace(setting.args, guidance="none")
    env = SharedEnv(make_env(ENV_ID, args.num_envs))
    table = HostTable(args.table, env).for_training()
    agent, params = rl.make_agent(args, env, table, jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    exposure = draw_exposures(table, jax.random.key(2), env.facts(env.observe(runner.env_state)))

    def play(runner: Any, key: jax.Array) -> tuple[Any, Any]:
        runner, transitions, _ = rl.rollout(args, agent, runner, table, exposure)
        return runner, transitions

    return runner, jax.jit(play)


class Towers(TwoTowers):
    """The baseline's network, called like `rladapter_ppo.ActorCritic`: it looks at the features alone."""

    def __call__(self, features: Any, *others: Any) -> tuple:
        return *super().__call__(features), others[-1], None  # the memory, and nothing to predict from


def same_work(config: Config) -> tuple[Any, Callable]:
    """One of our updates with the baseline's network, rollouts, epochs and minibatches."""
    args = rl.Args(
        guidance="none", updates_per_phase=1, num_envs=config.num_envs, num_steps=config.num_steps,
        update_epochs=config.update_epochs, num_minibatches=config.num_minibatches, rnn_size=0, predict_coef=0.0,
    )  # fmt: skip
    env = SharedEnv(make_env(ENV_ID, args.num_envs))
    num_features = jax.eval_shape(env.features, np.zeros((1, env.obs_size), np.uint8)).shape[-1]
    num_features += (len(env.game.kinds) + 2) * NUM_FEATURES  # the nearest things, and those that are pointed at
    network = Towers(num_features, len(env.game.actions), config.layer_size, nnx.Rngs(0))
    graphdef, params = nnx.split(network)
    agent = rl.Agent(env, graphdef, args.context)
    table = HostTable(args.table, env).for_training()
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))

    def play(runner: Any, _: jax.Array) -> tuple[Any, Any]:
        runner, metrics, *_ = rl.train_phase(args, agent, runner, table, np.int32(1))
        return runner, metrics

    return runner, play


class Player:
    """Takes turns of one rollout."""

    def __init__(self, state: Any, play: Callable):
        self.state, self.play, self.seconds = state, play, []

    def close(self) -> None: ...

    def turn(self, i: int) -> None:
        start = time.perf_counter()
        self.state, out = self.play(self.state, jax.random.key(i))
        jax.block_until_ready((self.state, out))
        self.seconds.append(time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------- trainings


class GatedRun(runs.Run):
    """A run that waits before each phase until it may go on."""

    def __init__(self, args: rl.Args):
        super().__init__(args)
        self.console.quiet = True
        self.may_go, self.done, self.error = threading.Semaphore(0), threading.Semaphore(0), None

    def phases(self) -> Iterator[int]:
        for phase in super().phases():
            self.may_go.acquire()
            if self.stopped:
                return
            yield phase
            self.done.release()


class Trainee:
    """A run in a temporary folder; a turn is a phase.

    It trains in a thread of its own, so that `main` is what is measured, and stands still between its turns.
    """

    def __init__(self, args: rl.Args, folder: Path):
        # One phase more than there are turns for: the final evaluation is no part of a turn.
        one_phase = args.updates_per_phase * args.batch_size
        self.args = replace(args, run_dir=folder, total_timesteps=args.total_timesteps + one_phase)
        self.folder, self.seconds = folder, []
        self.run = GatedRun(self.args)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            with self.run:
                rl.main(self.args, self.run)
        except BaseException as error:
            self.run.error = error
            self.run.done.release()

    def turn(self, i: int) -> None:
        """Trains; the first fine-tuning compiles in a turn that counts, so compilation is taken off."""
        start, compiled = time.perf_counter(), self.run.compile_clock.seconds
        self.run.may_go.release()
        self.run.done.acquire()
        if self.run.error:
            raise self.run.error
        compile_seconds = self.run.compile_clock.seconds - compiled
        self.seconds.append(time.perf_counter() - start - compile_seconds)

    def close(self) -> None:
        self.run.stopped = True
        self.run.may_go.release()
        self.thread.join()


def take_turns(players: dict[str, Any], turns: int, times: int = 1) -> None:
    """Takes turns, so many times each, and adds up the times of a turn; the one before the first does not count: it
    compiles or is a short phase. Whoever began is last next time, as a machine gets slower or faster meanwhile."""
    for i in range(1 + turns * times):
        for player in list(players.values())[:: 1 if i % 2 else -1]:
            player.turn(i)
    for player in players.values():
        player.seconds = np.reshape(player.seconds[1:], (turns, times)).sum(1).tolist()
        player.close()


def be_child(options: Options) -> None:
    """A training of one phase and --turns turns, whose times and peak memory are printed."""
    (num_envs,), (guidance,) = options.num_envs, options.guidance
    args = replace(Setting(num_envs, options.num_steps, 3 * options.turns).args, guidance=guidance)
    args = replace(args, anneal_lr=False, lr_warmup=0.0)  # the same programs for any number of turns
    use_compilation_cache()
    with tempfile.TemporaryDirectory() as folder:
        trainee = Trainee(args, Path(folder) / "run")
        take_turns({guidance: trainee}, options.turns, args.sft.sft_every)
        compile_seconds = trainee.run.compile_clock.seconds
    steps = args.batch_size * args.updates_per_phase * args.sft.sft_every
    rate = steps / float(np.median(trainee.seconds)) if options.turns else None
    print(json.dumps({"compile": compile_seconds, "steps_per_second": rate} | peak_memory()))


def run_child(cache: str | None, **flags: Any) -> dict[str, Any]:
    """What it printed, and the seconds of the whole process: `first_update`, if there were no turns."""
    command = [sys.executable, __file__, "--child"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    start, environment = time.perf_counter(), os.environ | ({"RLADAPTER_CACHE": cache} if cache else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"first_update": time.perf_counter() - start}


def time_start_up() -> dict[str, dict[str, float]]:
    """Seconds of a guided training with the defaults to its first update, and those of compilation among them: with an
    empty cache of compiled programs, and warm."""
    with tempfile.TemporaryDirectory() as cache:
        children = {name: run_child(cache, turns=0, num_envs=rl.Args().num_envs) for name in ("cold", "warm")}
    return {name: {key: child[key] for key in ("first_update", "compile")} for name, child in children.items()}


def measure_scale(options: Options) -> list[dict[str, Any]]:
    rows = []
    for num_envs, guidance in itertools.product(options.scale, options.guidance):
        with tempfile.TemporaryDirectory() as cold:
            child = run_child(
                None if options.warm else cold, turns=options.scale_turns, num_envs=num_envs, guidance=guidance,
                num_steps=options.num_steps,
            )  # fmt: skip
        del child["first_update"], child["compile"]
        rows.append({"num_envs": num_envs, "guidance": guidance} | child)
        print(rows[-1], file=sys.stderr)
    return rows


def peak_memory() -> dict[str, float]:
    """GB of this process so far, and of its GPU or TPU, where jax knows that."""
    peaks = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in of_device:
        peaks["peak_device_memory_gb"] = of_device["peak_bytes_in_use"] / 2**30
    return peaks


# -------------------------------------------------------------------------------------------------------------- report


def ratio(players: dict[str, Any], over: str, under: str, steps: dict[str, int]) -> float:
    """Of the rates, the median over the turns: each beside the one next to it in time."""
    quotients = np.array(players[under].seconds) / np.array(players[over].seconds)
    return float(np.median(quotients)) * steps[over] / steps[under]


def all_ratios(players: dict[str, Any], steps: dict[str, int]) -> dict[str, float]:
    """RATIOS of these players, which took turns."""
    return {name: ratio(players, over, under, steps) for name, over, under in RATIOS if {over, under} <= set(players)}


def questions_per_million(trainee: Trainee) -> dict[str, float]:
    """Questions and tokens, those of the guide estimated as for a budget."""
    adapter = make_adapter(trainee.args.sft, trainee.args.seed, make_env(trainee.args.env_id, 1).game)
    answers = run_folder.read_log(trainee.folder, "guidance.jsonl")
    sums = {
        "questions": len(answers),
        "adapter, prompt tokens": sum(len(adapter.chat.encode(a["adapter_prompt"], 10**6)) for a in answers),
        "adapter, tokens written": sum(len(adapter.tokenizer.encode(a["analysis"])) for a in answers),
        "guide, prompt tokens": sum(estimate_tokens(a["messages"]) for a in answers),
    }
    return {name: value / trainee.run.totals["global_step"] * 1e6 for name, value in sums.items()}


def measure_envs(setting: Setting, _: Path) -> tuple[dict[str, Player], dict[str, int]]:
    """Env and rollout have taken turns; the env steps of a turn of each."""
    players = {
        "env, our resets": Player(*our_resets(setting)),
        "env, optimistic resets": Player(*optimistic_resets(setting)),
        "env, craftax's auto-reset": Player(*auto_resets(setting)),
        "rollout": Player(*rollout(setting)),
    }
    steps = dict.fromkeys(players, setting.args.batch_size)
    steps["env, craftax's auto-reset"] = setting.num_envs * steps_of_auto_reset(setting)
    take_turns(players, setting.turns)
    return players, steps


def measure_trainings(setting: Setting, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Trainings, and a rollout once more, to be compared with what is beside it."""
    args, phases = setting.args, setting.args.sft.sft_every  # a turn has one fine-tuning
    trainees = {name: Trainee(change(args), folder / name) for name, change in TRAININGS.items()}
    steps = dict.fromkeys(trainees, args.batch_size * args.updates_per_phase * phases)
    steps["rollout"] = args.batch_size * phases
    players = trainees | {"rollout": Player(*rollout(setting))}
    take_turns(players, setting.training_turns, phases)
    return players, steps


def measure_baseline(setting: Setting, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Craftax_Baselines' PPO and the same work in our loop; with its own number of envs also our defaults."""
    config = Config(num_envs=setting.num_envs)
    players = {
        "Craftax_Baselines' PPO": Player(*make_baseline(config)), "same work, ours": Player(*same_work(config)),
    }  # fmt: skip
    steps = dict.fromkeys(players, config.batch_size)
    if config == Config():
        args = replace(rl.Args(), guidance="none")
        players[DEFAULTS] = Trainee(args, folder / "defaults")
        steps[DEFAULTS] = args.batch_size * args.updates_per_phase
    take_turns(players, setting.turns)
    return players, steps


def measure(options: Options) -> dict[str, Any]:
    use_compilation_cache()
    rates, ratios, result = {}, {}, {"num_steps": options.num_steps}
    parts = [measure_envs, *[measure_trainings] * options.trainings, *[measure_baseline] * options.baseline]
    for setting in settings_of(options):
        n = str(setting.num_envs)
        rates[n], ratios[n] = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for part in parts:
                players, steps = part(setting, Path(folder))
                new = {name: steps[name] / float(np.median(player.seconds)) for name, player in players.items()}
                rates[n], ratios[n] = new | rates[n], ratios[n] | all_ratios(players, steps)
                if "guided" in players and setting.num_envs == rl.Args().num_envs:
                    result["per_million_steps"] = questions_per_million(players["guided"])
                jax.clear_caches()
                print(f"{n} envs: {json.dumps(new)}", file=sys.stderr)
    if options.trainings:
        result["start_up_seconds"] = time_start_up()
    return result | {"steps_per_second": rates, "ratios": ratios}


def machine() -> dict[str, Any]:
    described = run_folder.describe_machine()
    return {name: described[name] for name in ("device", "num_cpus", "git_commit")}


def check(result: dict[str, Any], expected: dict[str, Any]) -> int:
    """1 if a ratio is lower than the expected one by more than ALLOWED_LOSS, or if none of them was measured."""
    pairs = {
        f"{name}, {n} envs": (ratios[name], old)
        for n, ratios in result["ratios"].items()
        for name, old in expected["ratios"].get(n, {}).items()
        if name in ratios
    }
    lost = [
        f"{name}: is {new:.2f}, was {old:.2f}" for name, (new, old) in pairs.items() if new < (1 - ALLOWED_LOSS) * old
    ]
    verdict = (
        "no ratio fell by more than 20 %" if pairs else "nothing to compare: choose numbers of envs that are there"
    )
    print("\n".join(lost) or verdict, file=sys.stderr)
    return int(bool(lost) or not pairs)


def check_options(options: Options) -> None:
    """Raises ValueError, one line, for what would be ignored or can't work."""
    default = Options()
    of_scale, of_others = ("guidance", "scale_turns", "warm"), ("turns", "num_envs", "trainings", "baseline")
    for name in of_others if options.scale else of_scale:
        if getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: says nothing {'with' if options.scale else 'without'} --scale; leave it out")
    if options.scale_turns < 1:
        raise ValueError(f"--scale-turns: {options.scale_turns} is out of range; choose 1 or more")


def read_expected(options: Options) -> dict[str, Any]:
    """The result of --check. Raises ValueError, one line, for what can't be compared with."""
    if options.scale:
        raise ValueError("--check: compares ratios, and --scale measures none; leave one of them out")
    try:
        expected = json.loads(options.check.read_text())
        if all(isinstance(ratios, dict) for ratios in expected["ratios"].values()):
            return expected
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"--check: {options.check} is no result of this script (--json writes one)")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.child:
        be_child(options)
        return 0
    try:
        check_options(options)
        expected = read_expected(options) if options.check else None
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    result = ({"scale": measure_scale(options)} if options.scale else measure(options)) | machine()
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return check(result, expected) if expected else 0


if __name__ == "__main__":
    sys.exit(main())
