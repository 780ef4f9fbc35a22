"""Craftax-Classic-Symbolic-v1, vectorised, with compact observations and a pool of fresh worlds.

The env protocol, for whoever wants to add an env (`envs/toy.py` is the smallest one). An env is an object without
arrays of its own (so that it can be a static argument of `jax.jit`), equal to another one of the same settings, with

    name: str    num_actions: int    achievements: tuple[str, ...] (A)
    num_pools: int                                       G, see below
    reset(key, num_envs) -> state                        fresh episodes; `state` is any pytree
    refill(keys (G,), state) -> state                    called once per update, for work too dear to do at each step
    observe(state) -> obs (N, O) uint8                   all that policy, facts and caption are made of
    step(keys (N,), state, action (N,)) -> state, reward (N,) f32, done (N,) bool, info
    features(obs (..., O)) -> (..., F) f32               what the policy sees of it
    facts(obs (..., O)) -> (..., P) bool                 in the order of `vocabulary.FACTS`
    to_text(obs (O,)) -> str                             the caption, on the host
    random_observations(key, n) -> (n, O) uint8          situations of all kinds, for the default adapter's first words

The first axis of every array of `state` has N or G entries: env i and pool i * G // N belong together, and nothing else
does, so that D devices (G divisible by D) can each run `refill`, `observe` and `step` on their part of both.

`step` resets an env whose episode ends: the state it returns is then the first one of the next episode, reward and
done are those of the step. `info` holds, per env, `reached (N, 22) bool` and `worked (N, 22) bool` (see `envs.goals`),
`achievements (N, A) bool` as they stood at the end of the step, before the reset. Termination and truncation are
merged, as in craftax: an episode that hits `max_timesteps` (10,000) ends like a death, its value is not bootstrapped.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from craftax.craftax_classic.constants import OBS_DIM, Achievement, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams, EnvState, StaticEnvParams
from craftax.craftax_classic.game_logic import craftax_step, is_game_over
from craftax.craftax_classic.world_gen import generate_world

from envs import captions, goals
from envs.vocabulary import ACHIEVEMENTS

assert tuple(a.name.lower() for a in Achievement) == ACHIEVEMENTS, "craftax has changed the order of its achievements"

NUM_BLOCKS = len(BlockType)
ROWS, COLS = OBS_DIM  # 7, 9
CELLS = ROWS * COLS
MARGIN = max(OBS_DIM)  # padding that keeps every view inside the padded map
REFILL_CHUNK = 8  # worlds made at a time when a small pool is refilled; a sixteenth of a large one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """Fresh worlds waiting for the next episodes, in G pools, each for its N / G envs."""

    worlds: EnvState  # (G, W, ...)
    used: jax.Array  # (G,) int32, worlds[:used] of a pool have been handed out since the last refill
    reused: jax.Array  # (G,) int32, episodes that began in a world handed out before, because the pool had run empty


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VectorState:
    envs: EnvState  # (N, ...)
    pool: Pool


@dataclass(frozen=True)
class CraftaxEnv:
    """N parallel games of Craftax-Classic.

    World generation costs as much as hundreds of steps, and craftax's own auto-reset pays it at every step for every
    env. Here worlds come from pools of `pool_size`: `refill` replaces the ones that were handed out, in chunks, once
    per update, so a run pays for about one world per episode. Each world is handed out once; unused ones stay for the
    next update. When more episodes end between two refills than a pool holds, worlds are handed out again, from the
    first, and counted in `pool.reused`.
    """

    name: str = "Craftax-Classic-Symbolic-v1"
    pool_size: int = 64
    num_pools: int = 1
    params: EnvParams = EnvParams()
    static_params: StaticEnvParams = StaticEnvParams()

    num_actions: int = 17
    achievements: tuple[str, ...] = ACHIEVEMENTS

    def reset(self, key: jax.Array, num_envs: int) -> VectorState:
        key_envs, key_pool = jax.random.split(key)
        worlds = self._generate(jax.random.split(key_pool, (self.num_pools, self.pool_size)))
        zeros = jnp.zeros(self.num_pools, jnp.int32)
        return VectorState(self._generate(jax.random.split(key_envs, num_envs)), Pool(worlds, zeros, zeros))

    def refill(self, keys: jax.Array, state: VectorState) -> VectorState:
        """Move unused worlds to the back of the pools and make new ones in front of them."""
        pool = state.pool
        # The last chunk may reach over the used worlds: what it overwrites there is as fresh as what it writes.
        chunk = min(max(REFILL_CHUNK, self.pool_size // 16), self.pool_size)
        num_chunks = (jnp.minimum(pool.used, self.pool_size) + chunk - 1) // chunk  # (G,)

        def make_chunk(i: jax.Array, worlds: EnvState) -> EnvState:
            new = self._generate(jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i), chunk))(keys))
            start = jnp.minimum(i * chunk, self.pool_size - chunk)

            def put(old: jax.Array, x: jax.Array) -> jax.Array:
                # A pool that needs no more keeps what it has, however many others there are on this device.
                kept = jax.lax.dynamic_slice_in_dim(old, start, chunk, 1)
                x = jnp.where((i < num_chunks).reshape(-1, *[1] * (x.ndim - 1)), x, kept)
                return jax.lax.dynamic_update_slice_in_dim(old, x, start, 1)

            return jax.tree.map(put, worlds, new)

        worlds = jax.lax.fori_loop(0, num_chunks.max(), make_chunk, pool.worlds)
        return VectorState(state.envs, Pool(worlds, jnp.zeros_like(pool.used), pool.reused))

    def step(
        self, keys: jax.Array, state: VectorState, action: jax.Array
    ) -> tuple[VectorState, jax.Array, jax.Array, dict]:
        before = state.envs
        envs, reward = jax.vmap(craftax_step, in_axes=(0, 0, 0, None, None))(
            keys, before, action, self.params, self.static_params
        )
        done = jax.vmap(is_game_over, in_axes=(0, None))(envs, self.params)
        reached, worked = jax.vmap(goals.detect)(before, action, envs)
        info = {"reached": reached, "worked": worked, "achievements": envs.achievements}
        # Most steps end no episode: the worlds are only touched when one does.
        state = jax.lax.cond(done.any(), _start_episodes, lambda s, _: s, VectorState(envs, state.pool), done)
        return state, reward, done, info

    def observe(self, state: VectorState) -> jax.Array:
        return jax.vmap(_observe)(state.envs)

    def features(self, obs: jax.Array) -> jax.Array:
        """The same numbers in the same order as craftax's symbolic observation, (..., 1345) f32."""
        blocks = jax.nn.one_hot(obs[..., captions.BLOCKS], NUM_BLOCKS, dtype=jnp.float32)
        mobs = (obs[..., captions.MOBS, None] >> jnp.arange(4, dtype=jnp.uint8)) & 1
        grid = jnp.concatenate([blocks, mobs.astype(jnp.float32)], axis=-1)  # (..., 63, 21)
        numbers = obs[..., captions.NUMBERS].astype(jnp.float32) / 10.0  # inventory, vitals
        direction = jax.nn.one_hot(obs[..., captions.DIRECTION], 4, dtype=jnp.float32)
        light = obs[..., captions.LIGHT, None].astype(jnp.float32) / 255.0
        asleep = obs[..., captions.ASLEEP, None].astype(jnp.float32)
        return jnp.concatenate([grid.reshape(*obs.shape[:-1], -1), numbers, direction, light, asleep], axis=-1)

    def facts(self, obs: jax.Array) -> jax.Array:
        return captions.facts(obs)

    def to_text(self, obs: Any) -> str:
        return captions.to_text(obs)

    def random_observations(self, key: jax.Array, n: int) -> jax.Array:
        """Situations of every stage of the game: random walks, with inventory, vitals and achievements drawn anew."""
        return _random_observations(self, key, n)

    def _generate(self, keys: jax.Array) -> EnvState:
        """One fresh world per key, with the keys' leading axes."""
        states = jax.vmap(generate_world, in_axes=(0, None, None))(keys.reshape(-1), self.params, self.static_params)
        # craftax returns weakly typed numbers here and strong ones from a step, which would compile everything twice.
        states = jax.tree.map(lambda x: x.reshape(*keys.shape, *x.shape[1:]), states)
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), states)


def _start_episodes(state: VectorState, done: jax.Array) -> VectorState:
    """Give each finished env the next world of its pool."""
    pool = state.pool
    num_pools, pool_size = pool.worlds.timestep.shape
    done = done.reshape(num_pools, -1)
    # (G, N / G) which world an env would get, counted from the last refill
    index = pool.used[:, None] + jnp.cumsum(done, axis=1) - 1
    chosen = (jnp.arange(num_pools)[:, None] * pool_size + index % pool_size).reshape(-1)

    def choose(world: jax.Array, env: jax.Array) -> jax.Array:
        new = world.reshape(-1, *world.shape[2:])[chosen]
        return jnp.where(done.reshape(-1, *[1] * (env.ndim - 1)), new, env)

    envs = jax.tree.map(choose, pool.worlds, state.envs)
    reused = (done & (index >= pool_size)).sum(1, dtype=jnp.int32)
    used = pool.used + done.sum(1, dtype=jnp.int32)
    return VectorState(envs, Pool(pool.worlds, used, pool.reused + reused))


def _observe(state: EnvState) -> jax.Array:
    """Everything that matters about one game in 167 bytes; the layout is that of `envs.captions`.

    Equal to craftax's symbolic observation but for its mob map, where a mob out of view can hide one in view (an index
    that wraps around, Craftax issue 57), and for the light, rounded to 1/255.
    """
    padded = jnp.pad(state.map.astype(jnp.uint8), MARGIN, constant_values=BlockType.OUT_OF_BOUNDS.value)
    corner = state.player_position + MARGIN - jnp.array([ROWS // 2, COLS // 2])
    blocks = jax.lax.dynamic_slice(padded, corner, OBS_DIM)
    mobs = jnp.zeros(CELLS, jnp.uint8)
    kinds = (state.zombies, state.cows, state.skeletons, state.arrows)
    for bit, mob in enumerate(kinds):
        local = mob.position - state.player_position + jnp.array([ROWS // 2, COLS // 2])  # (M, 2)
        cell = local[:, 0] * COLS + local[:, 1]
        seen = mob.mask & (local >= 0).all(1) & (local < jnp.array(OBS_DIM)).all(1)
        present = ((cell[:, None] == jnp.arange(CELLS)) & seen[:, None]).any(0)
        mobs = mobs | (present.astype(jnp.uint8) << bit)
    inv = state.inventory
    numbers = jnp.stack([
        inv.wood, inv.stone, inv.coal, inv.iron, inv.diamond, inv.sapling, inv.wood_pickaxe, inv.stone_pickaxe,
        inv.iron_pickaxe, inv.wood_sword, inv.stone_sword, inv.iron_sword,
        state.player_health, state.player_food, state.player_drink, state.player_energy,
        state.player_direction - 1, jnp.round(state.light_level * 255), state.is_sleeping,
    ]).astype(jnp.uint8)  # fmt: skip
    return jnp.concatenate([blocks.reshape(-1), mobs, numbers, state.achievements.astype(jnp.uint8)])


@partial(jax.jit, static_argnums=(0, 2))
def _random_observations(env: CraftaxEnv, key: jax.Array, n: int) -> jax.Array:
    env = replace(env, num_pools=1)
    key_reset, key_walk, key_mix = jax.random.split(key, 3)
    num_envs = min(n, 64)
    num_steps = -(-n // num_envs)

    def step(state: VectorState, key: jax.Array) -> tuple[VectorState, None]:
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (num_envs,), 0, env.num_actions)
        return env.step(jax.random.split(key_step, num_envs), state, action)[0], None

    def walk(state: VectorState, key: jax.Array) -> tuple[VectorState, jax.Array]:
        key_steps, key_refill = jax.random.split(key)
        state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, 10))  # so that neighbours in the sample differ
        return env.refill(key_refill[None], state), env.observe(state)

    _, obs = jax.lax.scan(walk, env.reset(key_reset, num_envs), jax.random.split(key_walk, num_steps))
    obs = obs.reshape(-1, obs.shape[-1])[:n]
    return jax.vmap(_enrich)(jax.random.split(key_mix, n), obs)


def _enrich(key: jax.Array, obs: jax.Array) -> jax.Array:
    """Half of the situations keep what a random walk has; the others get things that a random walk never owns."""
    key_which, key_stage, key_items, key_vitals, key_block, key_light = jax.random.split(key, 6)
    stage = jax.random.randint(key_stage, (), 0, 5)  # none, wood, stone, iron, all tools
    tools = (jnp.array([1, 2, 3, 1, 2, 3]) <= stage).astype(jnp.uint8)
    items = jax.random.randint(key_items, (6,), 0, 6).astype(jnp.uint8)
    items = items * (jnp.array([0, 1, 1, 2, 3, 0]) <= stage)
    vitals = jax.random.randint(key_vitals, (4,), 1, 10).astype(jnp.uint8)
    rich = obs.at[captions.INVENTORY_SLICE].set(jnp.concatenate([items, tools]))
    rich = rich.at[captions.VITALS_SLICE].set(vitals)
    cell, kind = jax.random.randint(key_block, (2,), 0, CELLS - 1)
    cell += cell >= CELLS // 2  # anywhere but under the player
    rich = rich.at[cell].set(jnp.array([11, 12, 8, 9, 10, 16, 3, 5, 4], jnp.uint8)[kind % 9])
    rich = rich.at[captions.LIGHT].set(jax.random.randint(key_light, (), 0, 256).astype(jnp.uint8))
    unlocked = jnp.array([
        items[0] > 0, stage > 0, False, items[5] > 0, False, tools[0], tools[3], False, False, items[1] > 0,
        False, False, False, tools[1], tools[4], False, False, items[2] > 0, items[3] > 0, items[4] > 0,
        tools[2], tools[5],
    ])  # fmt: skip
    unlocked = unlocked | (jax.random.uniform(jax.random.fold_in(key, 1), (22,)) < 0.1 * stage)
    rich = rich.at[captions.UNLOCKED].set(unlocked.astype(jnp.uint8))
    return jnp.where(jax.random.uniform(key_which) < 0.5, obs, rich)
