"""What the policy is told at each step: the facts, the sub-goals advised, the things that advice points at.

    rows_in_force(...)   one matmul finds the rows of the guidance table that fit
    two_kinds(...)       the things that advice points at
    row_outcomes(...)    what came of each row in a rollout
    CONTEXTS             one class for each --guidance

The device half of the guidance table: pure functions inside jit. guidance.py is the host half, and says what the words
mean. K rows, P facts, S sub-goals of which G are basic, W kinds of things, N envs, T steps, D size of an embedding.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from envs.game import Game
from utils import trials
from utils.trials import add_up_visits

NEVER = 1e6  # wrong facts of an empty row
TOLERANCE = 0  # a row also serves a situation that differs in so many of the facts it rests on

# Context vectors (B, D) as weights (B, M) @ basis (M, D). They are never formed: few vectors make up all of them, and
# to project those instead of every sample's sum is many times cheaper.
ContextVectors = list[tuple[jax.Array, jax.Array]]


def pytree(cls: type) -> type:
    """Makes a class a frozen dataclass that jax can take apart."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@pytree
class GuidanceTable:
    """What the guide said, fixed between two pauses. facts @ weights + offset counts wrong facts."""

    weights: jax.Array  # (P, K) f32, -1: this fact must be true, 1: it must be false, 0: either
    offset: jax.Array  # (K,) f32, how many facts must be true; NEVER for an empty row
    goals: jax.Array  # (K, S) bool, one-hot, the advised sub-goal
    show_probability: jax.Array  # (K,) f32, that an env is given this advice in a phase, trials apart
    on_trial: jax.Array  # (AT_ONCE,) int32, rows that some envs are denied in this phase; K for none
    urgency: jax.Array  # (K,) f32, its rank in the order of the guide's replies: 0 is the most urgent
    kinds: jax.Array  # (K,) int32, which kind of thing it is about; W for none
    sub_goal_embeddings: jax.Array  # (S, D) f32


@pytree
class Exposure:
    """Which envs are given which advice, drawn once per phase."""

    shown: jax.Array  # (N, K) bool
    pinned: jax.Array  # (N, K) bool, rows that fitted at the pause, for --guidance-lookup pause


def draw_exposures(table: GuidanceTable, key: jax.Array, facts: jax.Array) -> Exposure:
    """Draws who is given what, and finds the rows that fit the facts (N, P) now."""
    shown = trials.draw_shown(key, table.show_probability, table.on_trial, facts.shape[0])
    return Exposure(shown, fitting_rows(table, facts))


def fitting_rows(table: GuidanceTable, facts: jax.Array) -> jax.Array:
    """Finds the rows whose reasons hold: (N, P) -> (N, K)."""
    return facts.astype(jnp.float32) @ table.weights + table.offset <= TOLERANCE + 0.5


def rows_in_force(args: Any, table: GuidanceTable, exposure: Exposure, facts: jax.Array) -> jax.Array:
    """Finds the rows that fit at this step, or that fitted at the pause: (N, P) -> (N, K)."""
    return fitting_rows(table, facts) if args.guidance_lookup == "step" else exposure.pinned


def two_kinds(known: jax.Array, active: jax.Array, urgency: jax.Array, kinds: jax.Array) -> jax.Array:
    """Picks the kinds of things that the two most urgent pieces of advice are about, of those whose place is known.

    Args:
        known: (N, W) bool, kinds of things whose place is known
        active: (N, K) bool, advice that counts
        urgency: (K,) f32, the smallest is the most urgent
        kinds: (K,) int32, what each is about; W for nothing
    Returns:
        (N, 2) int32, two different kinds; W for nothing
    """
    num_kinds, found = known.shape[-1], []
    active = active & jnp.pad(known, ((0, 0), (0, 1)))[:, kinds]
    for _ in range(2):
        kind = most_urgent(active, urgency, kinds, num_kinds)
        active &= kinds != kind[:, None]
        found.append(kind)
    return jnp.stack(found, -1)


def one_action(active: jax.Array, urgency: jax.Array, actions: jax.Array, num_actions: int) -> jax.Array:
    """Picks the action of the most urgent piece of advice that is a single action.

    Args:
        active: (N, K) bool, advice that counts, and that the game allows now
        urgency: (K,) f32, the smallest is the most urgent
        actions: (K,) int32; A for advice that is none
    Returns:
        (N,) int32; A for none
    """
    return most_urgent(active & (actions < num_actions), urgency, actions, num_actions)


def most_urgent(active: jax.Array, urgency: jax.Array, values: jax.Array, nothing: int) -> jax.Array:
    """Picks the value (K,) of the most urgent piece of advice that is active (N, K): (N,) int32; nothing for none."""
    first = jnp.where(active, urgency, jnp.inf).argmin(-1)
    return jnp.where(active.any(-1), values[first], nothing).astype(jnp.int32)


def possible_sub_goals(game: Game, facts: jax.Array) -> jax.Array:
    """Says which sub-goals have all that the game demands of them now: (N, P) -> (N, S) bool."""
    needs = jnp.asarray(game.needs_matrix.T)
    return facts.astype(jnp.float32) @ needs >= (needs > 0).sum(0) - 0.5


def reward_to_go(reward: jax.Array, done: jax.Array) -> jax.Array:
    """Adds up what is earned from each step to the end of the episode or of the rollout: (T, N), (T, N) -> (T, N)."""

    def step(later: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total = x[0] + jnp.where(x[1], 0.0, later)
        return total, total

    return jax.lax.scan(step, jnp.zeros_like(reward[0]), (reward, done), reverse=True)[1]


def row_outcomes(
    args: Any, env: Any, table: GuidanceTable, exposure: Exposure, transitions: Any, returns: jax.Array
) -> dict[str, jax.Array]:
    """Adds up what came of each row in one rollout: sums (K, 2, ...) of `utils.trials.add_up_visits`.

    Args:
        transitions: of T steps and N envs, with facts, action, reached, done
        returns: (T, N) f32, of `reward_to_go`. With neither bonus nor value function: both would favour advice that
            promises more bonus; and not discounted: what pays later counts as much.
    """
    done, num_basic = transitions.done, env.game.num_basic
    fresh = jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])  # (T, N), an episode begins
    action = jax.nn.one_hot(transitions.action, len(env.game.actions))
    steps = (transitions.facts, transitions.reached, action, returns, fresh)

    goals = table.goals[:, :num_basic].astype(jnp.float32)

    def add_up(shown: jax.Array, pinned: jax.Array, *steps: jax.Array) -> jax.Array:
        in_force = functools.partial(rows_in_force, args, table, Exposure(shown, pinned))
        return add_up_visits(in_force, goals, shown, steps)[None]

    # Every device adds up its own envs: they meet once and not at every step.
    add_up = env.map_over_envs(add_up, (0, 0, *[1] * len(steps)))
    sums = add_up(exposure.shown, exposure.pinned, *steps).sum(0)
    names = ("visits", "returns", "squares", "successes", "steps")
    outcomes = {name: sums[..., i] for i, name in enumerate(names)}
    return outcomes | {"reached": sums[..., 5 : 5 + num_basic], "actions": sums[..., 5 + num_basic :]}


# --------------------------------------------------------------------------------------------------
# What the policy is told, one class for each --guidance
# --------------------------------------------------------------------------------------------------


class NoContext:
    """--guidance none: plain PPO. The base of the other contexts: what the policy is told, and what a bonus is for."""

    guided = False  # do adapter and guide run?
    rewards_anything = True  # is a bonus for every basic sub-goal, or for those that are advised?
    default_bonus = 0.0
    situations_per_update = 0  # of each rollout, for the next pause to choose from

    @staticmethod
    def advise(
        args: Any, game: Game, table: GuidanceTable, exposure: Exposure, facts: jax.Array, known: jax.Array
    ) -> dict[str, jax.Array]:
        """Looks up what each env is advised.

        --pointer fixed, a control, advises nothing, and points at the things of all sub-goals that are possible, and
        hints at their actions, the last ones of the list first.

        Args:
            facts: (N, P) bool
            known: (N, W) bool, kinds of things whose place is known
        Returns:
            advised (N, S) bool; pointed (N, 2) int32, kinds of things to point at, W for none; hinted (N,) int32, the
            action to take, A for none
        """
        num_envs = len(facts)
        pointed = jnp.full((num_envs, 2), len(game.kinds), jnp.int32)
        hinted = jnp.full(num_envs, len(game.actions), jnp.int32)
        if args.pointer == "fixed":
            kinds = jnp.asarray(game.kind_numbers[: game.num_basic], jnp.int32)
            order = -jnp.arange(game.num_basic, dtype=jnp.float32)
            possible = possible_sub_goals(game, facts)[:, : game.num_basic]
            pointed = two_kinds(known, possible, order, kinds)
            actions = jnp.asarray(game.action_numbers[: game.num_basic], jnp.int32)
            hinted = one_action(possible, order, actions, len(game.actions))
        advised = jnp.zeros((num_envs, len(game.sub_goals)), bool)
        return {"advised": advised, "pointed": pointed, "hinted": hinted}

    @staticmethod
    def vectors(table: GuidanceTable, seen: dict[str, jax.Array]) -> ContextVectors:
        """Makes what the network gets of advised (..., S) and facts (..., P)."""
        return []

    @staticmethod
    def outcomes(args: Any, env: Any, table: GuidanceTable, exposure: Exposure, transitions: Any) -> dict:
        """Adds up what came of each row in a rollout."""
        return {}


class FactsContext(NoContext):
    """--guidance facts: the control. All that advice may rest on, and no advice."""

    @staticmethod
    def vectors(table: GuidanceTable, seen: dict[str, jax.Array]) -> ContextVectors:
        return [(seen["facts"].astype(jnp.float32), jnp.eye(seen["facts"].shape[-1]))]


class AdviceContext(FactsContext):
    """--guidance full: the advised sub-goals and the facts.

    The facts, what is unlocked among them, are worth much to a policy without memory, and the guide has read them all:
    a policy that is given advice but not its reasons loses to one that sees the facts alone.
    """

    guided = True
    rewards_anything = False
    default_bonus = 0.1
    situations_per_update = 256

    @staticmethod
    def advise(
        args: Any, game: Game, table: GuidanceTable, exposure: Exposure, facts: jax.Array, known: jax.Array
    ) -> dict[str, jax.Array]:
        nothing = NoContext.advise(args, game, table, exposure, facts, known)
        rows = rows_in_force(args.table, table, exposure, facts) & exposure.shown
        advised = rows.astype(jnp.float32) @ table.goals.astype(jnp.float32) > 0
        if args.pointer != "advice":
            return nothing | {"advised": advised}
        pointed = two_kinds(known, rows, table.urgency, table.kinds)
        goals = table.goals.argmax(-1)
        possible = possible_sub_goals(game, facts)[:, goals]
        actions = jnp.asarray(game.action_numbers, jnp.int32)[goals]
        hinted = one_action(rows & possible, table.urgency, actions, len(game.actions))
        return {"advised": advised, "pointed": pointed, "hinted": hinted}

    @staticmethod
    def vectors(table: GuidanceTable, seen: dict[str, jax.Array]) -> ContextVectors:
        """Adds up the advised sub-goals' embeddings, scales the sum to norm sqrt(D); and the facts."""
        names, advised = table.sub_goal_embeddings, seen["advised"].astype(jnp.float32)  # (S, D)
        squared_norm = ((advised @ (names @ names.T)) * advised).sum(-1, keepdims=True)
        scale = math.sqrt(names.shape[1]) / jnp.sqrt(jnp.maximum(squared_norm, 1e-12))
        return [(advised * scale, names), *FactsContext.vectors(table, seen)]

    @staticmethod
    def outcomes(args: Any, env: Any, table: GuidanceTable, exposure: Exposure, transitions: Any) -> dict:
        returns = reward_to_go(transitions.env_reward, transitions.done)
        return row_outcomes(args.table, env, table, exposure, transitions, returns)


CONTEXTS = {"full": AdviceContext, "facts": FactsContext, "none": NoContext}
