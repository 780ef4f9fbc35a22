"""Situations of every stage of Crafter: what a random walk never owns is drawn.

For the first words of `assets/adapter-tiny`, and for tests that compare facts and captions.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from envs.crafter import captions
from envs.crafter.env import CELLS, COLS, DAY, CraftaxEnv, VectorState, look_again

BESIDE = jnp.array([CELLS // 2 + step for step in (-1, 1, -COLS, COLS)])
STONE = jnp.uint8(4)


@partial(jax.jit, static_argnums=(0, 2))
def random_observations(env: CraftaxEnv, key: jax.Array, n: int) -> jax.Array:
    """(n, O) uint8: random walks, with inventory, vitals and achievements drawn anew in half of the situations."""
    env = replace(env, num_pools=1)
    key_reset, key_walk, key_mix = jax.random.split(key, 3)
    num_envs = min(n, 64)
    num_steps = -(-n // num_envs)

    def step(state: VectorState, key: jax.Array) -> tuple[VectorState, None]:
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (num_envs,), 0, len(env.game.actions))
        return env.step(jax.random.split(key_step, num_envs), state, action)[0], None

    def walk(state: VectorState, key: jax.Array) -> tuple[VectorState, jax.Array]:
        key_steps, key_refill = jax.random.split(key)
        state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, 10))  # so that neighbours in the sample differ
        return env.refill(key_refill[None], state), env.observe(state)

    _, obs = jax.lax.scan(walk, env.reset(key_reset, num_envs), jax.random.split(key_walk, num_steps))
    obs = obs.reshape(-1, obs.shape[-1])[:n]
    return jax.vmap(enrich)(jax.random.split(key_mix, n), obs)


def enrich(key: jax.Array, obs: jax.Array) -> jax.Array:
    """Half of the situations keep what a random walk has; the others get things that a random walk never owns."""
    key_which, key_stage, key_items, key_vitals, key_block, key_light, key_clock, key_walls = jax.random.split(key, 8)
    stage = jax.random.randint(key_stage, (), 0, 5)  # none, wood, stone, iron, all tools
    tools = (jnp.array([1, 2, 3, 1, 2, 3]) <= stage).astype(jnp.uint8)
    items = jax.random.randint(key_items, (6,), 0, 8).astype(jnp.uint8)
    items = items * (jnp.array([0, 1, 1, 2, 3, 0]) <= stage)
    vitals = jax.random.randint(key_vitals, (4,), 1, 10).astype(jnp.uint8)
    rich = obs.at[captions.INVENTORY_SLICE].set(jnp.concatenate([items, tools]))
    rich = rich.at[captions.VITALS_SLICE].set(vitals)
    cell, kind = jax.random.randint(key_block, (2,), 0, CELLS - 1)
    cell += cell >= CELLS // 2  # anywhere but under the player
    rich = rich.at[cell].set(jnp.array([11, 12, 8, 9, 10, 16, 3, 5, 4], jnp.uint8)[kind % 9])
    walls = jax.random.uniform(key_walls, (4,)) < jax.random.choice(key_walls, jnp.array([0.0, 0.0, 0.0, 0.8, 1.0]))
    rich = rich.at[BESIDE].set(jnp.where(walls, STONE, rich[BESIDE]))
    rich = rich.at[captions.LIGHT].set(jax.random.randint(key_light, (), 0, 256).astype(jnp.uint8))
    unlocked = jnp.array([
        items[0] > 0, stage > 0, False, items[5] > 0, False, tools[0], tools[3], False, False, items[1] > 0,
        False, False, False, tools[1], tools[4], False, False, items[2] > 0, items[3] > 0, items[4] > 0,
        tools[2], tools[5],
    ])  # fmt: skip
    unlocked = unlocked | (jax.random.uniform(jax.random.fold_in(key, 1), (22,)) < 0.1 * stage)
    rich = rich.at[captions.UNLOCKED].set(unlocked.astype(jnp.uint8))
    time, age = jax.random.randint(key_clock, (2,), 0, DAY)
    still = jnp.zeros((1, 2), jnp.int32)
    view = rich[None, : captions.VIEW_SIZE]
    rich = look_again(obs[None], view, still, time[None], jnp.maximum(age - DAY // 3, 0)[None].astype(jnp.uint8))[0]
    return jnp.where(jax.random.uniform(key_which) < 0.5, obs, rich)
