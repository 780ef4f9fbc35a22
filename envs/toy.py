"""The smallest env: a tree or a lake is in view, chop the one or drink from the other. For tests and first steps.

Eight steps an episode; each right action is worth 1, so the best return is 8 and a random one about 8 / 3.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs.vocabulary import FACT_INDEX, FACTS, NUM_BASIC, SUB_GOAL_INDEX

EPISODE_LENGTH = 8
_FACTS = np.array([FACT_INDEX["tree in view"], FACT_INDEX["water in view"]])
_GOALS = np.array([SUB_GOAL_INDEX["chop tree"], SUB_GOAL_INDEX["drink water"]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ToyState:
    target: jax.Array  # (N,) int32, 0 tree, 1 lake
    time: jax.Array  # (N,) int32
    unlocked: jax.Array  # (N, 2) bool


@dataclass(frozen=True)
class ToyEnv:
    name: str = "Toy-v0"
    num_pools: int = 1
    num_actions: int = 3  # chop, drink, nothing
    achievements: tuple[str, ...] = ("collect_wood", "collect_drink")

    def reset(self, key: jax.Array, num_envs: int) -> ToyState:
        target = jax.random.bernoulli(key, shape=(num_envs,)).astype(jnp.int32)
        return ToyState(target, jnp.zeros(num_envs, jnp.int32), jnp.zeros((num_envs, 2), bool))

    def refill(self, keys: jax.Array, state: ToyState) -> ToyState:
        return state

    def observe(self, state: ToyState) -> jax.Array:
        return jnp.stack([state.target, state.time], -1).astype(jnp.uint8)

    def step(self, keys: jax.Array, state: ToyState, action: jax.Array) -> tuple[ToyState, jax.Array, jax.Array, dict]:
        right = action == state.target
        hit = (state.target[:, None] == jnp.arange(2)) & right[:, None]  # (N, 2)
        reached = jnp.zeros((*action.shape, NUM_BASIC), bool).at[:, _GOALS].set(hit)
        unlocked = state.unlocked | hit
        done = state.time + 1 >= EPISODE_LENGTH
        target = jax.vmap(jax.random.bernoulli)(keys).astype(jnp.int32)
        info = {"reached": reached, "worked": reached, "achievements": unlocked}
        state = ToyState(target, jnp.where(done, 0, state.time + 1), unlocked & ~done[:, None])
        return state, right.astype(jnp.float32), done, info

    def features(self, obs: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.nn.one_hot(obs[..., 0], 2), obs[..., 1:] / EPISODE_LENGTH], -1).astype(jnp.float32)

    def facts(self, obs: jax.Array) -> jax.Array:
        view = obs[..., :1] == jnp.arange(2)
        return jnp.zeros((*obs.shape[:-1], len(FACTS)), bool).at[..., _FACTS].set(view)

    def to_text(self, obs: Any) -> str:
        sight = "water" if obs[0] else "tree"
        return "\n".join([
            f"You see: {sight} (1 north).",
            f"Facing: {sight}.",
            "Inventory: nothing.",
            "Vitals (of 9): health 9, food 9, drink 8, energy 9.",
            "It is day. The player is awake.",
            "Unlocked: nothing.",
        ])  # fmt: skip

    def random_observations(self, key: jax.Array, n: int) -> jax.Array:
        return jax.random.randint(key, (n, 2), 0, 2).astype(jnp.uint8)
