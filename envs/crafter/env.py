"""Craftax-Classic-Symbolic-v1, vectorised, with compact observations and a pool of fresh worlds.

`envs` documents the protocol. Termination and truncation are merged, as in craftax: an episode that hits
`max_timesteps` (10,000) ends like a death, its value is not bootstrapped.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_classic.constants import OBS_DIM, Achievement, Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams, EnvState, StaticEnvParams
from craftax.craftax_classic.game_logic import craftax_step, is_game_over
from craftax.craftax_classic.world_gen import generate_world

from envs.crafter import CRAFTER, captions, draw, goals, habits
from envs.crafter.vocabulary import BASIC_SUB_GOALS, KINDS, LASTING
from envs.game import Game
from envs.nearest import remember_places

assert tuple(a.name.lower() for a in Achievement) == CRAFTER.achievements, "craftax has changed its achievements"
assert tuple(a.name.lower().replace("_", " ") for a in Action) == CRAFTER.actions, "craftax has changed its actions"

NUM_BLOCKS = len(BlockType)
ROWS, COLS = OBS_DIM  # 7, 9
CELLS = ROWS * COLS
MARGIN = max(OBS_DIM)  # padding that keeps every view inside the padded map
DAY, HOURS = 300, 150  # a day in steps, and in what the clock shows
STAY = np.array([kind in LASTING for kind in KINDS])
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
    obs: jax.Array  # (N, 218) uint8, what the players see and remember


@dataclass(frozen=True)
class CraftaxEnv:
    """N parallel games of Craftax-Classic.

    World generation costs as much as hundreds of steps, and craftax's own auto-reset pays it at every step for every
    env. Here worlds come from pools of `pool_size`: `refill` replaces the ones that were handed out, in chunks, once
    per update, so a run pays for about one world per episode. Each world is handed out once; unused ones stay for the
    next update. When more episodes end between two refills than a pool holds, worlds are handed out again, from the
    first, and counted in `pool.reused`.
    """

    pool_size: int = 64
    num_pools: int = 1
    params: EnvParams = EnvParams()
    static_params: StaticEnvParams = StaticEnvParams()
    view: tuple[int, int] = (ROWS, COLS)

    game: Game = CRAFTER
    HABITS: ClassVar = habits.HABITS
    DEATHS: ClassVar = habits.CAUSES
    ORIGINAL: ClassVar = "Crafter"

    def reset(self, key: jax.Array, num_envs: int) -> VectorState:
        key_envs, key_pool = jax.random.split(key)
        worlds = self._generate(jax.random.split(key_pool, (self.num_pools, self.pool_size)))
        zeros = jnp.zeros(self.num_pools, jnp.int32)
        envs = self._generate(jax.random.split(key_envs, num_envs))
        return VectorState(envs, Pool(worlds, zeros, zeros), first_look(jax.vmap(observe_one)(envs)))

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
        return dataclasses.replace(state, pool=Pool(worlds, jnp.zeros_like(pool.used), pool.reused))

    def step(
        self, keys: jax.Array, state: VectorState, action: jax.Array
    ) -> tuple[VectorState, jax.Array, jax.Array, dict]:
        before = state.envs
        envs, reward = jax.vmap(craftax_step, in_axes=(0, 0, 0, None, None))(
            keys, before, action, self.params, self.static_params
        )
        done = jax.vmap(is_game_over, in_axes=(0, None))(envs, self.params)
        reached, worked = jax.vmap(goals.detect)(before, action, envs)
        # Most steps end no episode: the worlds are only touched when one does.
        stepped = dataclasses.replace(state, envs=envs)
        begun = jax.lax.cond(done.any(), _start_episodes, lambda s, _: s, stepped, done)
        view, moved = jax.vmap(observe_one)(begun.envs), envs.player_position - before.player_position
        age = jnp.where(done, 0, plant_age(state.obs, envs.timestep, reached))
        known = jnp.where(done[:, None], 0, state.obs)  # nothing is remembered of another life
        obs = look_again(known, view, moved, begun.envs.timestep, age)
        info = {"reached": reached, "worked": worked, "achievements": envs.achievements}
        return dataclasses.replace(begun, obs=obs), reward, done, info

    def observe(self, state: VectorState) -> jax.Array:
        return state.obs

    def features(self, obs: jax.Array) -> jax.Array:
        """The numbers of craftax's symbolic observation in its order, then the clock and plants: (..., 1349) f32."""
        blocks = jax.nn.one_hot(obs[..., captions.BLOCKS], NUM_BLOCKS, dtype=jnp.float32)
        mobs = (obs[..., captions.MOBS, None] >> jnp.arange(4, dtype=jnp.uint8)) & 1
        grid = jnp.concatenate([blocks, mobs.astype(jnp.float32)], axis=-1)  # (..., 63, 21)
        numbers = obs[..., captions.NUMBERS].astype(jnp.float32) / 10.0  # inventory, vitals
        direction = jax.nn.one_hot(obs[..., captions.DIRECTION], 4, dtype=jnp.float32)
        light = obs[..., captions.LIGHT, None].astype(jnp.float32) / 255.0
        asleep = obs[..., captions.ASLEEP, None].astype(jnp.float32)
        turn = obs[..., captions.HOUR, None].astype(jnp.float32) * (2 * jnp.pi / HOURS)
        age = obs[..., captions.PLANT_AGE, None].astype(jnp.float32) / captions.RIPE_AGE
        parts = [numbers, direction, light, asleep, jnp.sin(turn), jnp.cos(turn), jnp.minimum(age, 1.0), age >= 1.0]
        return jnp.concatenate([grid.reshape(*obs.shape[:-1], -1), *parts], axis=-1)

    def places(self, obs: jax.Array) -> jax.Array:
        return captions.places(obs)

    def facing(self, obs: jax.Array) -> jax.Array:
        return captions.facing(obs)

    def facts(self, obs: jax.Array) -> jax.Array:
        return captions.facts(obs)

    def to_text(self, obs: Any) -> str:
        return captions.to_text(obs)

    def find_habits(
        self, obs: jax.Array, action: jax.Array, next_obs: jax.Array, done: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return habits.detect(obs, action, next_obs, done)

    def cause_of_death(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        return habits.cause_of_death(obs, action)

    def original(self, num_envs: int, seed: int) -> "OriginalCrafter":  # noqa: F821
        from envs.crafter.original import OriginalCrafter  # late: it is another package

        return OriginalCrafter(num_envs, seed)

    def scene(self, state: VectorState) -> EnvState:
        return draw.scene(state.envs)

    def draw(self, scene: EnvState) -> np.ndarray:
        return draw.draw(scene)

    def letters(self, obs: np.ndarray) -> list[list[tuple[str, str]]]:
        return draw.letters(obs)

    def status(self, obs: np.ndarray) -> tuple[dict[str, int], dict[str, int]]:
        return draw.status(obs)

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
    return dataclasses.replace(state, envs=envs, pool=Pool(pool.worlds, used, pool.reused + reused))


def first_look(view: jax.Array) -> jax.Array:
    """What a player knows when its life begins: view (N, 167) uint8 -> obs (N, 218) uint8."""
    nothing, zeros = jnp.zeros((len(view), captions.OBS_SIZE), jnp.uint8), jnp.zeros(len(view), jnp.int32)
    return look_again(nothing, view, jnp.zeros((len(view), 2), jnp.int32), zeros, zeros.astype(jnp.uint8))


def look_again(obs: jax.Array, view: jax.Array, moved: jax.Array, time: jax.Array, age: jax.Array) -> jax.Array:
    """What a player knows after a step.

    Args:
        obs: (N, 218) uint8 before it; zeros where nothing is known
        view: (N, 167) uint8 after it
        moved: (N, 2) int32, how far the step moved the player
        time: (N,) int32, steps since its life began
        age: (N,) uint8 of its oldest plant, of `plant_age`
    """
    seen = captions.places_in_view(view)
    places = remember_places(captions.places(obs), moved, seen, STAY, OBS_DIM)
    hour = (time % DAY * HOURS // DAY).astype(jnp.uint8)
    numbers = jnp.stack([hour, age, captions.shelter(view)], -1)
    return jnp.concatenate([view, captions.stored_places(places), numbers], -1)


def plant_age(obs: jax.Array, time: jax.Array, reached: jax.Array) -> jax.Array:
    """Counts how old a player's first plant is, in quarters of steps: (N, 218), (N,), (N, 22) bool -> (N,) uint8."""
    age = obs[..., captions.PLANT_AGE]
    planted = (age == 0) & reached[:, BASIC_SUB_GOALS.index("place plant")]
    older = age + ((age > 0) & (age < 255) & (time % 4 == 0))
    return jnp.where(reached[:, BASIC_SUB_GOALS.index("eat plant")], 0, older + planted).astype(jnp.uint8)


def observe_one(state: EnvState) -> jax.Array:
    """Everything that the game shows of itself in 167 bytes; the layout is that of `envs.crafter.captions`.

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
