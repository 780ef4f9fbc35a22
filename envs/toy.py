"""The smallest env: a tree or a lake is in view, chop the one or drink from the other. For tests and first steps.

Eight steps an episode; each right action is worth 1, so the best return is 8 and a random one about 8 / 3.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from envs.game import Advice, Game, Heard, holds
from envs.nearest import find_places

EPISODE_LENGTH = 8
RULES = (("chop tree", ("tree in view",)), ("drink water", ("water in view",)))


def advise(truths: dict[str, bool], named: Heard) -> Advice:
    """Returns what is right in a situation, whatever the adapter's analysis names."""
    return [(i, reasons) for i, (_, reasons) in enumerate(RULES) if holds(truths, reasons)]


TOY = Game(
    name="toy",
    actions=("chop", "drink", "noop"),
    achievements=("collect_wood", "collect_drink"),
    facts=("tree in view", "water in view"),
    sub_goals=("chop tree", "drink water", "rest"),
    num_basic=2,
    prompt="You guide a player who sees either a tree or a lake. It is paid for chopping trees and for drinking.",
    needs=dict(RULES),
    kinds=("tree", "water"),
    things={"chop tree": "tree", "drink water": "water"},
    advise=advise,
    sub_goal_aliases={"drink water": "drink from lake"},
    word_forms={"trees": "tree"},
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ToyState:
    target: jax.Array  # (N,) int32, 0 tree, 1 lake
    time: jax.Array  # (N,) int32
    unlocked: jax.Array  # (N, 2) bool


@dataclass(frozen=True)
class ToyEnv:
    num_pools: int = 1
    view: tuple[int, int] = (3, 3)
    game: Game = TOY

    def reset(self, key: jax.Array, num_envs: int) -> ToyState:
        target = jax.random.bernoulli(key, shape=(num_envs,)).astype(jnp.int32)
        return ToyState(target, jnp.zeros(num_envs, jnp.int32), jnp.zeros((num_envs, 2), bool))

    def refill(self, keys: jax.Array, state: ToyState) -> ToyState:
        return state

    def observe(self, state: ToyState) -> jax.Array:
        return jnp.stack([state.target, state.time], -1).astype(jnp.uint8)

    def step(self, keys: jax.Array, state: ToyState, action: jax.Array) -> tuple[ToyState, jax.Array, jax.Array, dict]:
        right = action == state.target
        reached = (state.target[:, None] == jnp.arange(2)) & right[:, None]  # (N, 2)
        unlocked = state.unlocked | reached
        done = state.time + 1 >= EPISODE_LENGTH
        target = jax.vmap(jax.random.bernoulli)(keys).astype(jnp.int32)
        info = {"reached": reached, "worked": reached, "achievements": unlocked}
        state = ToyState(target, jnp.where(done, 0, state.time + 1), unlocked & ~done[:, None])
        return state, right.astype(jnp.float32), done, info

    def features(self, obs: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.nn.one_hot(obs[..., 0], 2), obs[..., 1:] / EPISODE_LENGTH], -1).astype(jnp.float32)

    def places(self, obs: jax.Array) -> jax.Array:
        north = jnp.zeros((3, 3), bool).at[0, 1].set(True)
        return find_places((obs[..., :1] == jnp.arange(2))[..., None, None] & north, self.facing(obs))

    def facing(self, obs: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.array([-1, 0]), (*obs.shape[:-1], 2))

    def facts(self, obs: jax.Array) -> jax.Array:
        return obs[..., :1] == jnp.arange(2)

    def to_text(self, obs: Any) -> str:
        return f"You see: {'a lake' if obs[0] else 'a tree'}."


def make_env(num_envs: int, num_devices: int) -> ToyEnv:
    """Makes the env for any number of games on that many devices."""
    return ToyEnv(num_pools=num_devices)
