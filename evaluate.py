"""Look at a trained agent: play it, film it, step through an episode, put all about it on one page.

    python evaluate.py runs/my-run                      # success rates beside human experts, eval.json
    python evaluate.py runs/my-run --video 1            # and its best episode as MP4 and GIF
    python evaluate.py runs/my-run --report             # and report.html: curves, guidance, films, in one file
    python evaluate.py runs/my-run --guidance none      # what the policy does without its advice
    python evaluate.py runs/my-run --env-id Crafter     # in the original game (pip install crafter)
    python evaluate.py runs/my-run --play               # one step at a time, in this terminal
    python evaluate.py runs/guided runs/facts --report  # runs side by side

The policy is that of the newest checkpoint, or of --checkpoint; its guidance table is frozen, unless --ask lets adapter
and guide go on. Every env plays the same number of whole episodes, so that short ones do not count more.
"""

import dataclasses
import functools
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import llm_client
import rladapter_ppo as rl
from advice import rows_in_force
from envs import make_env
from envs.nearest import IN_VIEW
from envs.scores import Tally
from guidance import HostTable
from llm_client import LlmArgs, make_guide
from rladapter_adapter import make_adapter, write_analyses
from utils import devices, film, published, report, run_folder, runs, terminal
from utils.cli import BigInt, check_ranges, exit_code
from utils.compilation import use_compilation_cache

SHOWN = 10_000  # steps that a film or --play looks for whole episodes in, at most


@dataclass(frozen=True)
class EvalArgs:
    """What to look at. Flags of the guide are for --ask; without them it is the guide of the run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs; the first is the one that is filmed and played"""
    checkpoint: int | None = None
    """phase of the checkpoint; default the newest"""
    episodes: BigInt = 256
    """episodes to play, rounded up to a multiple of --num-envs; 0: none, take eval.json as it is"""
    num_envs: int = 64
    """parallel games"""
    seed: int = 1
    """seed of worlds and actions"""
    guidance: Literal["run", "none"] = "run"
    """run: as the run was trained; none: its advice is withheld"""
    env_id: str | None = None
    """play in the original of the run's game, which is not made of JAX: Crafter. Default the run's own env"""
    ask: bool = False
    """go on asking adapter and guide, as often as the run did, about what is met in the evaluation"""
    video: int = 0
    """films of so many episodes, those with the most return of --num-envs: film-1.mp4, film-1.gif, ..."""
    report: bool = False
    """write report.html, about all these runs, into the folder of the first"""
    play: bool = False
    """step through an episode in this terminal"""
    llm: tyro.conf.OmitArgPrefixes[LlmArgs] = LlmArgs()


LIMITS = {
    "episodes": (0, 10**7),
    "num_envs": (1, 2**16),
    "seed": (0, 2**32 - 1),
    "video": (0, 100),
}


# --------------------------------------------------------------------------------------------------
# A trained agent
# --------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A run's policy and guidance, ready to play."""

    folder: Path
    args: rl.Args
    agent: rl.Agent
    params: Any
    table: HostTable
    phase: int
    saved: dict[str, Any]  # the checkpoint's arrays
    totals: dict[str, Any]
    llm: LlmArgs  # the guide whose advice it follows

    @property
    def frozen(self) -> rl.GuidanceTable:
        return self.agent.env.put(self.table.for_evaluation())


def load(folder: Path, given: EvalArgs) -> Trained:
    """Reads a run's policy and table. Raises ValueError, one line, for what is no run or does not fit this code."""
    flags = run_folder.read_config(folder, "runs")["flags"]
    base = runs.args_from_flags(rl.Args, dict(flags))
    odd = sorted(set(flags) - set(runs.flags(base)))  # a flag that is newer than the run has its default
    if odd:
        name = run_folder.clean_line(odd[0])
        raise ValueError(f"runs: {folder} was made by another version of this code (unknown flag: {name})")
    rl.check_args(base)
    # One minibatch, one device: nothing is trained, and any number of games may be played.
    args = dataclasses.replace(
        base, num_envs=given.num_envs, num_minibatches=1, num_devices=1, distributed=False, resume=None,
        eval_episodes=max(given.episodes, 1), seed=given.seed, llm=given.llm,
    )  # fmt: skip
    env = devices.SharedEnv(make_env(args.env_id, args.num_envs))
    original = getattr(env.env, "ORIGINAL", None)
    if given.env_id not in (None, original):
        choice = f"choose {original}, or leave it out" if original else "leave it out"
        raise ValueError(f"--env-id: {given.env_id!r} is not the original of {args.env_id}; {choice}")
    phase, saved, extra = run_folder.read_checkpoint(folder, given.checkpoint)
    table = HostTable(args.table, env)
    try:
        table.load_state(saved["table"], extra["table"])
        if given.guidance == "none":
            table.rows.valid[:] = False
        agent, params = rl.make_agent(args, env, table.for_training(), jax.random.key(0))
        params, totals = like(params, saved["runner"]["params"]), extra["totals"]
        runs.check_totals(totals)
    except Exception as error:  # whatever it lacks
        why = run_folder.clean_line(str(error))
        raise ValueError(f"runs: {folder} was made by another version of this code ({why})") from None
    llm = given.llm if given.ask else base.llm
    return Trained(folder, args, agent, params, table, phase, saved, totals, llm)


def like(template: Any, saved: dict[str, Any]) -> Any:
    """Takes arrays out of nested dicts, by the names that they have in a pytree. Raises KeyError, ValueError."""

    def take(path: Any, leaf: jax.Array) -> jax.Array:
        name, found = jax.tree_util.keystr(path, simple=True, separator="."), saved
        for key in name.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        if found.shape != leaf.shape:
            raise ValueError(f"{name} is {found.shape} there, {leaf.shape} here")
        return jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(take, template)


class Asker:
    """Adapter and guide of a run, at work on its table."""

    def __init__(self, trained: Trained):
        """Raises ValueError, one line, for a run that asks nobody, and for a guide that can't be asked."""
        args, env = trained.args, trained.agent.env
        if not trained.agent.context.guided:
            raise ValueError(f"--ask: {trained.folder} was trained with --guidance {args.guidance}; it asks nobody")
        self.trained, self.guide = trained, make_guide(args.llm, env.game, args.seed)
        self.guide.check()
        self.adapter = make_adapter(args.sft, args.seed, env.game)
        self.adapter.load_state(trained.saved.get("adapter", {}))  # a checkpoint leaves out what is empty
        self.key, self.asked, self.failed = jax.random.key(args.seed), 0, 0

    def __call__(self, obs: jax.Array, version: Any = None) -> rl.GuidanceTable:
        """Asks about some of the situations (N, O), as training does. Returns the table with what was advised.

        Of another version of the game new advice heeds the demands, too (`heed`).
        """
        env, table = self.trained.agent.env, self.trained.table
        situations = {"obs": np.asarray(obs), "facts": np.asarray(env.facts(jnp.asarray(obs)))}
        questions = table.choose_questions(env, situations)
        self.key, key_analyse = jax.random.split(self.key)
        sft = self.trained.args.sft
        write_analyses(self.adapter, env.game, questions, key_analyse, sft.analyses, table.retrieved(questions, sft))
        table.store(self.guide.ask(questions).wait())
        if version is not None:
            heed(table, version)
        self.asked += len(questions)
        self.failed += sum(bool(question.error) for question in questions)
        return self.trained.frozen


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def watch(env: devices.SharedEnv, transitions: rl.Transition, next_obs: jax.Array) -> dict[str, jax.Array]:
    """Finds habits and causes of death at each step, where the game knows any."""
    if not hasattr(env.env, "HABITS"):
        return {}
    occasions, sensible = env.env.find_habits(transitions.obs, transitions.action, next_obs, transitions.done)
    cause = jax.nn.one_hot(env.env.cause_of_death(transitions.obs, transitions.action), len(env.env.DEATHS))
    return {"occasions": occasions, "sensible": sensible, "deaths": cause * transitions.done[..., None]}


def evaluate(trained: Trained, given: EvalArgs, console: Console) -> dict[str, Any]:
    """Plays fresh episodes. Returns what `rladapter_ppo.evaluate` does, with habits and causes of death by name."""
    key = jax.random.key(given.seed)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"playing {trained.folder.name}", total=None)
        update = functools.partial(show, progress, task)
        args, agent, ask = trained.args, trained.agent, Asker(trained) if given.ask else None
        if given.env_id:
            result = evaluate_original(trained, given, update, ask)
        else:
            result = rl.evaluate(args, agent, trained.params, trained.frozen, key, update, watch, ask)
    if ask:
        ask.guide.close()
        result |= {"questions": ask.asked, "questions_failed": ask.failed}
    return result | by_name(agent.env.env, result.pop("watched", {}), result["eval_episodes"])


def show(progress: Progress, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def by_name(env: Any, watched: dict[str, np.ndarray], episodes: int) -> dict[str, Any]:
    """Names what was watched: habits {name: {occasions, sensible, per_episode, share, what}}, deaths {cause: share}."""
    if not watched:
        return {}
    habits = {}
    for (name, what), met, well in zip(env.HABITS.items(), watched["occasions"], watched["sensible"], strict=True):
        share = float(well / met) if met else None
        counts = {"occasions": int(met), "sensible": int(well), "per_episode": float(met / episodes)}
        habits[name] = counts | {"share": share, "what": what}
    deaths = dict(zip(env.DEATHS, (watched["deaths"] / episodes).tolist(), strict=True))
    return {"habits": habits, "deaths": deaths}


def evaluate_original(trained: Trained, given: EvalArgs, update: Any, ask: Asker | None) -> dict[str, Any]:
    """Plays whole episodes of the original game, on the host. Returns what `rladapter_ppo.evaluate` does."""
    games, agent = original_games(trained, given.num_envs, given.seed)
    tally = Tally(agent.env.game, given.num_envs, trained.args.eval_episodes)
    earned, lasted = np.zeros(given.num_envs), np.zeros(given.num_envs)
    for step in play_original(trained, agent, games, jax.random.key(given.seed), ask):
        earned, lasted = earned + step["reward"], lasted + 1
        episode = {"episodic_return": earned, "episodic_length": lasted, "achievements": step["achievements"]}
        watched = watch_step(agent.env, *(step[name] for name in ("obs", "action", "next_obs", "done")))
        tally.add(*jax.tree.map(lambda x: np.asarray(x)[None], (step["done"], episode, watched)))
        earned, lasted = earned * ~step["done"], lasted * ~step["done"]
        update(tally.played, tally.episodes)
        if tally.full:
            return tally.result()


def original_games(trained: Trained, num_envs: int, seed: int) -> tuple[Any, rl.Agent]:
    """Makes games of the original, and the agent that plays what they show."""
    env = trained.agent.env.env
    games = env.original(num_envs, seed)
    heed(trained.table, games.game)
    return games, dataclasses.replace(trained.agent, env=devices.SharedEnv(Shown(env, games.game)))


def heed(table: HostTable, game: Any) -> None:
    """Restricts advice to where its sub-goal has what this version of the game demands of it, and the other did not.

    What the policy has learned stays as it is; its guide has read the other rules.
    """
    rows, demanded = table.rows, game.needs_matrix[table.rows.goal]
    more = (demanded != 0) & (demanded != table.game.needs_matrix[rows.goal])
    rows.care |= more
    rows.truth = np.where(more, demanded > 0, rows.truth)


@dataclass(frozen=True)
class Shown:
    """An env whose state is what it shows: for games that are played elsewhere, of another version."""

    env: Any
    game: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def observe(self, state: jax.Array) -> jax.Array:
        return state


def play_original(
    trained: Trained, agent: rl.Agent, games: Any, key: jax.Array, ask: Asker | None = None
) -> Iterator[dict[str, Any]]:
    """Plays on and on. Yields what was seen and done at each step, and what came of it."""
    args, table, num_actions, obs = trained.args, trained.frozen, len(agent.env.game.actions), games.observe()
    key, key_exposure = jax.random.split(key)
    exposure = rl.draw_exposures(table, key_exposure, agent.env.facts(jnp.asarray(obs)))
    memory, previous = np.zeros((len(obs), args.rnn_size), np.float32), np.full(len(obs), num_actions, np.int32)
    for t in itertools.count():
        if t and t % (args.num_steps * args.updates_per_phase) == 0:  # as often as in training
            table = ask(obs, games.game) if ask else table
            key, key_exposure = jax.random.split(key)
            exposure = rl.draw_exposures(table, key_exposure, agent.env.facts(jnp.asarray(obs)))
        key, key_action = jax.random.split(key)
        seen, memory = choose(args, agent, trained.params, table, exposure, (obs, memory, previous), key_action)
        action, memory = np.asarray(seen["action"]), np.asarray(memory)
        reward, done, achievements = games.step(action)
        next_obs = games.observe()
        yield {
            "obs": obs, "action": action, "next_obs": next_obs, "reward": reward, "done": done,
            "achievements": achievements,
        }  # fmt: skip
        memory, previous = np.where(done[:, None], 0, memory), np.where(done, num_actions, action).astype(np.int32)
        obs = next_obs


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose(
    args: rl.Args, agent: rl.Agent, params: Any, table: rl.GuidanceTable, exposure: rl.Exposure, now: tuple, key: Any
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Asks the policy now: obs (N, O), memory (N, R) and previous actions (N,). Returns what `rl.act` does."""
    obs, memory, previous = now
    unused = {field.name: jnp.zeros(()) for field in dataclasses.fields(rl.Runner)}
    known = {"params": params, "env_state": obs, "memory": memory, "previous": previous}
    return rl.act(args, agent, rl.Runner(**unused | known | {"value_stats": jnp.zeros(2)}), table, exposure, key)


@functools.partial(jax.jit, static_argnums=0)
def watch_step(env: devices.SharedEnv, obs: Any, action: Any, next_obs: Any, done: Any) -> dict[str, jax.Array]:
    return watch(env, SimpleNamespace(obs=obs, action=action, done=done), next_obs)


# --------------------------------------------------------------------------------------------------
# Episodes, step by step
# --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def record(
    args: rl.Args, agent: rl.Agent, runner: rl.Runner, table: rl.GuidanceTable, exposure: rl.Exposure
) -> tuple[rl.Runner, dict[str, Any]]:
    """Plays T steps of all envs as `rl.rollout` does, and keeps what is needed to show them (T, N, ...)."""
    key, key_refill, key_steps = jax.random.split(runner.key, 3)

    def step(carry: rl.Runner, key_step: jax.Array) -> tuple[rl.Runner, dict[str, Any]]:
        scene = agent.env.env.scene(carry.env_state)
        carry, transition, achievements = rl.play_step(args, agent, carry, table, exposure, key_step)
        seen = jax.tree.map(lambda x: x[None], {name: getattr(transition, name) for name in rl.SEEN})
        logits = agent(carry.params, table, seen, transition.memory)[0][0]
        rows = rows_in_force(args.table, table, exposure, transition.facts) & exposure.shown & agent.context.guided
        kept = {"scene": scene, "achievements": achievements, "choices": jax.nn.softmax(logits), "rows": rows}
        names = ("obs", "pointed", "hinted", "action", "env_reward", "done", "reached")
        return carry, kept | {name: getattr(transition, name) for name in names}

    runner, steps = jax.lax.scan(step, runner, jax.random.split(key_steps, args.num_steps))
    env_state = agent.env.refill(key_refill, runner.env_state)
    return dataclasses.replace(runner, key=key, env_state=env_state), steps


def episodes(trained: Trained, given: EvalArgs, console: Console) -> list[dict[str, Any]]:
    """Plays the first episode of each env. Returns what `record` kept of each, the one with the most return first."""
    args, agent = trained.args, trained.agent
    if not hasattr(agent.env.env, "draw"):
        raise ValueError(f"--video, --play: {args.env_id} has no pictures")
    key_play, table, chunks = jax.random.key(given.seed), trained.frozen, []
    runner, _ = rl.init_runner(args, agent, trained.params, key_play)
    ended = np.zeros(args.num_envs, bool)
    with console.status("playing episodes to show"):
        while not ended.all() and len(chunks) * args.num_steps < SHOWN:
            if len(chunks) % args.updates_per_phase == 0:
                runner, exposure = rl.draw_exposure(agent, runner, table)
            runner, steps = record(args, agent, runner, table, exposure)
            chunks.append(agent.env.to_host(steps))
            ended |= chunks[-1]["done"].any(0)
    steps = jax.tree.map(lambda *x: np.concatenate(x), *chunks)
    lasted = np.where(ended, steps["done"].argmax(0) + 1, len(steps["done"]))
    found = [jax.tree.map(lambda x, i=i: x[: lasted[i], i], steps) for i in range(args.num_envs)]
    return sorted(found, key=lambda episode: -episode["env_reward"].sum())


def moments(trained: Trained, episode: dict[str, Any]) -> Iterator[film.Moment]:
    """Puts each step of an episode (T, ...) into words."""
    game, env, table = trained.agent.env.game, trained.agent.env.env, trained.table
    scores = table.comprehension()
    urgency, analyses = np.asarray(trained.frozen.urgency), latest_analyses(table)
    places = np.asarray(env.places(jnp.asarray(episode["obs"])))
    earned, total = episode["env_reward"].cumsum(), len(episode["done"])
    for t in range(total):
        rows = np.flatnonzero(episode["rows"][t])
        rows = rows[np.argsort(urgency[rows], kind="stable")]
        vitals, bag = env.status(episode["obs"][t])
        likeliest = np.argsort(-episode["choices"][t])
        hinted = int(episode["hinted"][t])
        yield film.Moment(
            step=t,
            earned=float(earned[t]),
            obs=episode["obs"][t],
            scene=jax.tree.map(lambda x, t=t: x[t], episode["scene"]),
            action=game.actions[episode["action"][t]],
            choices=[(game.actions[i], float(episode["choices"][t][i])) for i in likeliest],
            vitals=vitals,
            bag=bag,
            advice=[(game.sub_goals[table.rows.goal[row]], table.reasons_text(row)) for row in rows],
            score=float(scores[rows[0]]) if len(rows) and not np.isnan(scores[rows[0]]) else None,
            analysis=analyses.get(int(table.rows.advice_id[rows[0]]), "") if len(rows) else "",
            pointed=[
                (game.kinds[kind], int(places[t, kind, 0]), int(places[t, kind, 1]), places[t, kind, 2] == IN_VIEW)
                for kind in episode["pointed"][t]
                if kind < len(game.kinds)
            ],
            hint=game.actions[hinted] if hinted < len(game.actions) else "",
            reached=tuple(game.sub_goals[i] for i in np.flatnonzero(episode["reached"][t])),
            unlocked=tuple(game.achievements[i] for i in np.flatnonzero(episode["achievements"][t])),
            end=ending(trained, episode) if t == total - 1 else "",
        )


def latest_analyses(table: HostTable) -> dict[int, str]:
    """Returns the latest analysis that led to each piece of advice, by advice_id."""
    return {advice_id: analysis.text for analysis in table.analyses for _, _, advice_id in analysis.advice}


def ending(trained: Trained, episode: dict[str, Any]) -> str:
    """Says what ended an episode."""
    env = trained.agent.env.env
    if not episode["done"][-1]:
        return f"still alive after {len(episode['done'])} steps"
    if not hasattr(env, "DEATHS"):
        return "the end"
    cause = env.cause_of_death(jnp.asarray(episode["obs"][-1]), jnp.asarray(episode["action"][-1]))
    return f"died: {env.DEATHS[int(cause)]}"


def make_films(trained: Trained, given: EvalArgs, console: Console) -> list[Path]:
    """Films the episodes with the most return. Returns the files."""
    env, files = trained.agent.env.env, []
    for number, episode in enumerate(episodes(trained, given, console)[: given.video], 1):
        told = trained.args.guidance if given.guidance == "run" else f"{trained.args.guidance}, its advice withheld"
        title = f"{trained.folder.name}   guidance {told}   guide {guide_name(trained)}"
        frames = (
            film.compose(moment, env.draw(moment.scene), title, env.game.achievements, env.view)
            for moment in moments(trained, episode)
        )
        with console.status(f"drawing film {number}, {len(episode['done'])} steps"):
            files += film.write(trained.folder / f"film-{number}", frames)
    return files


def guide_name(trained: Trained) -> str:
    """Names the guide of a run, for people."""
    if not trained.args.context.guided:
        return "none"
    llm = trained.llm
    if llm.llm not in report.NO_LLM:
        return llm.llm_model if llm.llm == "http" else llm.llm
    other = f" of {llm.rules_knowledge}" * (llm.llm == "rules" and llm.rules_knowledge != "expert")
    return f"{llm.llm}{other} (no LLM)"


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def eval_file(folder: Path, given: EvalArgs) -> Path:
    """Names the file of an evaluation: eval.json, with what is unusual about it in the name."""
    odd = ["unguided" if given.guidance == "none" else None, "asked" if given.ask else None]
    odd.append(given.env_id and given.env_id.lower())
    return folder / f"{'-'.join(['eval', *filter(None, odd)])}.json"


def evaluate_and_write(trained: Trained, given: EvalArgs, argv: list[str], console: Console) -> dict[str, Any]:
    """Evaluates a run and writes the file. Returns what is in it."""
    result = {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "git_commit": run_folder.git_commit(),
        "checkpoint": trained.phase,
        "global_step": trained.totals["global_step"],
        "env_id": given.env_id or trained.args.env_id,
        "guidance": trained.args.guidance if given.guidance == "run" else "none",
        "guide": guide_name(trained),
        "seed": given.seed,
        "num_envs": given.num_envs,
        "ask": given.ask,
    } | evaluate(trained, given, console)
    path = eval_file(trained.folder, given)
    try:
        run_folder.write_json(path, result)
    except OSError as error:
        raise ValueError(f"can't write {path} ({error.strerror})") from None
    return result


def read_evaluation(folder: Path, given: EvalArgs) -> dict[str, Any]:
    """Reads an evaluation that was made before. Raises ValueError, one line."""
    path = eval_file(folder, given)
    try:
        result = json.loads(path.read_text())
        for key in ("achievements", "episodic_return", "score", "eval_episodes", "episodic_length"):
            result[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--episodes 0: {path} can't be read; give a number of episodes") from None
    return result


def human_experts(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the success rates of human experts, where it is their game; {} elsewhere."""
    theirs = all(result["achievements"].keys() == published.HUMAN.keys() for result in results.values())
    return published.HUMAN if theirs else {}


def result_tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """Tables for people: runs side by side, human experts beside them."""
    overall = Table(title="Evaluation", title_justify="left")
    rates = Table(title="Success rates, % of episodes", title_justify="left")
    for table, first in ((overall, ""), (rates, "achievement")):
        table.add_column(first)
        for name in results:
            table.add_column(name, justify="right", overflow="fold")
    names = next(iter(results.values()))["achievements"]
    human = human_experts(results)
    for table in (overall, rates) if human else ():
        table.add_column("human experts", justify="right")
    lines = ("episodic_return", "return", "14.3"), ("score", "score %", "50.5"), ("episodic_length", "steps", "")
    for key, label, expert in (*lines, ("eval_episodes", "episodes", "")):
        values = [f"{r[key]:.2f}" if isinstance(r[key], float) else str(r[key]) for r in results.values()]
        overall.add_row(label, *values, *([expert] if human else []))
    order = sorted(names, key=lambda name: -max(r["achievements"].get(name, 0) for r in results.values()))
    for name in order:
        values = [f"{100 * r['achievements'].get(name, 0):.0f}" for r in results.values()]
        rates.add_row(name.replace("_", " "), *values, *([f"{human[name]:.0f}"] if human else []))
    return [overall, *([published_table()] if human else []), rates, *habit_tables(results)]


def published_table() -> Table:
    """What others reached, the highest score first."""
    table = Table(title="Published", title_justify="left")
    for name in ("method", "observation", "LLM", "env steps"):
        table.add_column(name)
    for name in ("score %", "return"):
        table.add_column(name, justify="right")
    for *words, score, mean_return, _ in sorted(published.PUBLISHED, key=lambda row: -(row[4] or 0)):
        table.add_row(*words, *("-" if x is None else f"{x:.1f}" for x in (score, mean_return)))
    return table


def habit_tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """A table of habits, and one of what ended the episodes, where they were watched."""
    watched = {name: result for name, result in results.items() if "habits" in result}
    if not watched:
        return []
    habits = Table(title="Common sense, % of the occasions (occasions per episode)", title_justify="left")
    deaths = Table(title="What ended the episodes, %", title_justify="left")
    for table in (habits, deaths):
        table.add_column("")
        for name in watched:
            table.add_column(name, justify="right", overflow="fold")
    first = next(iter(watched.values()))
    for habit in first["habits"]:
        nothing = {"share": None, "per_episode": 0.0}
        cells = [result["habits"].get(habit, nothing) for result in watched.values()]
        shares = ["-" if c["share"] is None else f"{100 * c['share']:.0f} ({c['per_episode']:.1f})" for c in cells]
        habits.add_row(habit, *shares)
    for cause in first["deaths"]:
        deaths.add_row(cause, *[f"{100 * result['deaths'].get(cause, 0):.0f}" for result in watched.values()])
    return [habits, deaths]


def main(given: EvalArgs, argv: list[str]) -> None:
    """Does what the flags ask for. Raises ValueError, one line, for what can't work."""
    console, results = Console(), {}
    for number, folder in enumerate(given.runs):
        trained = load(folder, given)
        name = folder.name if folder.name not in results else str(folder)
        results[name] = (
            evaluate_and_write(trained, given, argv, console) if given.episodes else read_evaluation(folder, given)
        )
        if number == 0 and given.video:
            for file in make_films(trained, given, console):
                console.print(f"film: {file}", markup=False, highlight=False, soft_wrap=True)
        if number == 0 and given.play:
            terminal.play(console, trained.agent.env.env, moments(trained, episodes(trained, given, console)[0]))
    for table in result_tables(results):
        console.print(table)
    if given.report:
        path = given.runs[0] / "report.html"
        report.write_report(path, list(given.runs), human_experts(results))
        console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


def check(given: EvalArgs) -> None:
    """Raises ValueError, one line that names the flag, for what can't work."""
    check_ranges(given, LIMITS)
    check_ranges(given.llm, llm_client.LIMITS)
    if not given.runs:
        raise ValueError("runs: name the folder of a run, for example runs/my-run")
    if given.guidance == "none" and given.ask:
        raise ValueError("--guidance none: nobody is asked without guidance; leave --ask out")
    if given.env_id and (given.video or given.play):
        raise ValueError(f"--env-id {given.env_id}: films and --play are of the run's own env; leave one of them out")


def read_args(argv: list[str]) -> EvalArgs:
    """Parses flags. Those of the guide have the first run's values unless they are given."""
    given = tyro.cli(EvalArgs, args=argv)
    if given.ask and given.runs:
        flags = run_folder.read_config(given.runs[0], "runs")["flags"]
        given = tyro.cli(EvalArgs, args=argv, default=EvalArgs((), llm=runs.args_from_flags(LlmArgs, dict(flags))))
    return given


def cli(argv: list[str] | None = None) -> int:
    """Runs `main` from the command line. Exit code 0, or 2 after one line for input that can't work."""
    argv = sys.argv[1:] if argv is None else argv

    def command() -> None:
        given = read_args(argv)
        check(given)
        use_compilation_cache()
        main(given, argv)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(cli())
