"""Where things are: the nearest in view, what is remembered, the numbers made of it; Crafter's memory of a life."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_classic.constants import Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.crafter import captions
from envs.crafter.env import CraftaxEnv, first_look, observe_one
from envs.crafter.vocabulary import BASIC_SUB_GOALS, KINDS, LASTING
from envs.nearest import FAR, IN_VIEW, NUM_FEATURES, REMEMBERED, find_places, nearest, pointed, remember_places
from envs.toy import ToyEnv

AHEAD = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])  # west, east, north, south


def place_by_loop(seen, facing):
    """[dy, dx, how known] of one kind: what is in front, else the fewest steps, else the eight neighbours, else the
    first one read; never what the player stands on."""
    (rows, cols), (front_y, front_x) = seen.shape, facing
    best, found = None, [0, 0, 0]
    for y in range(rows):
        for x in range(cols):
            dy, dx = y - rows // 2, x - cols // 2
            order = ((dy, dx) != (front_y, front_x), abs(dy) + abs(dx), max(abs(dy), abs(dx)))
            if seen[y, x] and (dy or dx) and (best is None or order < best):
                best, found = order, [dy, dx, IN_VIEW]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(7, 9), (3, 3), (5, 7)]))
def test_places_in_view_against_a_loop(seed, view):
    rng = np.random.default_rng(seed)
    seen, facing = rng.random((6, 3, *view)) < rng.random() ** 2, AHEAD[rng.integers(4, size=6)]
    found = np.asarray(find_places(jnp.asarray(seen), jnp.asarray(facing, jnp.int32)))
    expected = [[place_by_loop(kind, front) for kind in cells] for cells, front in zip(seen, facing, strict=True)]
    assert found.tolist() == expected


def remembered(old, moved, new, lasting=(True, True, False), view=(3, 5)):
    """One player's places after a step. Three kinds, the last one wanders."""
    old, moved, new = (jnp.asarray(x, jnp.int32) for x in (old, moved, new))
    return remember_places(old, moved, new, np.array(lasting), view).tolist()


NOTHING = [[0, 0, 0]] * 3


def test_a_place_moves_against_the_player_and_stays_in_mind():
    assert remembered([[-1, 2, IN_VIEW], [0, 0, 0], [0, 0, 0]], (0, -1), NOTHING)[0] == [-1, 3, REMEMBERED]
    assert remembered([[-1, 3, REMEMBERED], [0, 0, 0], [0, 0, 0]], (1, 0), NOTHING)[0] == [-2, 3, REMEMBERED]
    assert remembered(NOTHING, (1, 0), NOTHING) == NOTHING


def test_what_should_be_in_view_and_is_not_is_forgotten():
    old = [[-2, 0, REMEMBERED], [0, 4, REMEMBERED], [0, 0, 0]]
    assert remembered(old, (-1, 0), NOTHING) == [[0, 0, 0], [1, 4, REMEMBERED], [0, 0, 0]]
    assert remembered([[1, 0, IN_VIEW], *old[1:]], (0, 0), NOTHING)[0] == [0, 0, 0]  # it was taken
    assert remembered([[0, 3, REMEMBERED], *old[1:]], (0, 1), NOTHING)[0] == [0, 0, 0]


def test_only_what_stays_is_remembered():
    assert remembered([[1, 2, IN_VIEW]] * 3, (0, -1), NOTHING) == [[1, 3, REMEMBERED]] * 2 + [[0, 0, 0]]


def test_what_is_in_view_takes_the_place_of_what_is_remembered():
    new = [[1, 1, IN_VIEW], [0, 0, 0], [1, -1, IN_VIEW]]
    old = [[9, 9, REMEMBERED], [9, 9, REMEMBERED], [0, 0, 0]]
    assert remembered(old, (0, 0), new) == [new[0], old[1], new[2]]


def test_far_places_are_remembered_as_at_the_edge_of_what_a_byte_holds():
    assert remembered([[FAR, -FAR, REMEMBERED]] + NOTHING[1:], (-1, 1), NOTHING)[0] == [FAR, -FAR, REMEMBERED]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_memory_along_a_random_walk_against_a_map(seed):
    """On a map that does not change what is remembered is there, and nothing is forgotten but what is stood on."""
    rng = np.random.default_rng(seed)
    world, at, places = rng.random((2, 40, 40)) < 0.03, np.array([20, 20]), jnp.zeros((2, 3), jnp.int32)
    for _ in range(12):
        moved, before = AHEAD[rng.integers(4)], np.asarray(places)
        at = at + moved
        seen = world[:, at[0] - 1 : at[0] + 2, at[1] - 2 : at[1] + 3]
        new = find_places(jnp.asarray(seen), jnp.asarray([0, 1], jnp.int32))
        places = remember_places(places, jnp.asarray(moved), new, np.array([True, True]), (3, 5))
        for kind, (dy, dx, how) in enumerate(places.tolist()):
            assert how == 0 or world[kind, at[0] + dy, at[1] + dx]
            assert how or not before[kind, 2] or (before[kind, :2] == moved).all()


# ---- numbers


def numbers(dy, dx, how, facing=(0, 1), view=(7, 9)):
    return nearest(jnp.array([[dy, dx, how]]), jnp.asarray(facing, jnp.int32), view)[0].tolist()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((0, 1, IN_VIEW), [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 / 4, 0, 1 / 63, 0]),  # in front
        ((-2, 0, IN_VIEW), [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 2 / 3, 0, 2 / 63]),
        ((1, -1, IN_VIEW), [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 1 / 4, 1 / 3, 1 / 63, 1 / 63]),
        ((-20, 40, REMEMBERED), [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 40 / 63, 20 / 63]),
        ((0, 1, REMEMBERED), [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1 / 4, 0, 1 / 63, 0]),
        ((0, 0, 0), [0] * 18),
    ],
)
def test_numbers_of_simple_layouts(place, expected):
    assert len(expected) == NUM_FEATURES
    np.testing.assert_allclose(numbers(*place), expected, atol=1e-6)
    assert numbers(*place)[11] == (place[2] > 0)


def test_what_is_pointed_at_is_picked_by_its_kind():
    near = jnp.arange(2 * 3 * NUM_FEATURES, dtype=jnp.float32).reshape(2, 3, NUM_FEATURES) + 1
    picked = pointed(near, jnp.array([[2, 0], [3, 1]])).reshape(2, 2, NUM_FEATURES)
    np.testing.assert_array_equal(picked, [[near[0, 2], near[0, 0]], [jnp.zeros(NUM_FEATURES), near[1, 1]]])


def test_the_toy_has_the_one_thing_in_front():
    env = ToyEnv()
    places = env.places(jnp.array([[0, 3], [1, 3]]))
    assert places.tolist() == [[[-1, 0, IN_VIEW], [0, 0, 0]], [[0, 0, 0], [-1, 0, IN_VIEW]]]
    near = nearest(places, env.facing(jnp.zeros((2, 2))), env.view)
    assert near[:, :, 13].tolist() == [[1, 0], [0, 1]]


# ---- Crafter: what a player keeps in mind of its life

N = 8
ENV = CraftaxEnv(pool_size=N, params=EnvParams(max_timesteps=10_000))
STEP = jax.jit(lambda key, state, action: ENV.step(jax.random.split(key, N), state, action))
LOOK = jax.jit(lambda envs: first_look(jax.vmap(observe_one)(envs)))
NOOP = jnp.zeros(N, jnp.int32)


@pytest.fixture(scope="module")
def start():
    return jax.jit(ENV.reset, static_argnums=1)(jax.random.key(4), N)


def with_envs(state, **changes):
    """The same games with these arrays, looked at for the first time."""
    envs = state.envs.replace(**{name: jnp.asarray(x, getattr(state.envs, name).dtype) for name, x in changes.items()})
    return dataclasses.replace(state, envs=envs, obs=LOOK(envs))


def with_blocks(state, blocks):
    """The same games on grass, with {(dy, dx): block} around the player, who looks north, and no mobs."""
    world = np.full(state.envs.map.shape, BlockType.GRASS.value)
    position = np.asarray(state.envs.player_position)
    for (dy, dx), block in blocks.items():
        world[np.arange(N), position[:, 0] + dy, position[:, 1] + dx] = block.value
    calm = {kind: getattr(state.envs, kind) for kind in ("zombies", "cows", "skeletons", "arrows")}
    envs = state.envs.replace(**{kind: mobs.replace(mask=jnp.zeros_like(mobs.mask)) for kind, mobs in calm.items()})
    return with_envs(dataclasses.replace(state, envs=envs), map=world, player_direction=[Action.UP.value] * N)


def test_places_agree_with_the_true_map_along_a_random_walk(start):
    """Blocks change only where the player is, so that what it remembers of them is true."""
    state, rng, remembered_steps = start, np.random.default_rng(0), 0
    blocks = [kind for kind in KINDS if kind in LASTING and kind not in ("cow", "plant", "grass")]
    ids = np.array([BlockType[kind.replace("crafting table", "crafting_table").upper()].value for kind in blocks])
    columns = [KINDS.index(kind) for kind in blocks]
    for t in range(120):
        actions = rng.choice([1, 1, 2, 3, 3, 4, 5], N)  # it drifts to the north-west
        state, _, done, _ = STEP(jax.random.key(t), state, jnp.asarray(actions))
        places, position = np.asarray(ENV.places(state.obs)), np.asarray(state.envs.player_position)
        world = np.asarray(state.envs.map)
        for env in range(N):
            dy, dx, how = places[env, columns].T
            at = position[env] + np.stack([dy, dx], -1)
            true = world[env][tuple(np.clip(at, 0, 63).T)] == ids
            assert true[how > 0].all(), (t, env, np.array(blocks)[(how > 0) & ~true])
            remembered_steps += int((how == REMEMBERED).sum())
    assert remembered_steps > 100


def test_a_new_life_remembers_nothing(start):
    places = np.asarray(ENV.places(start.obs))
    old = np.asarray(start.obs).copy()
    stored = old[:, captions.PLACES].reshape(N, len(KINDS), 3)
    stored[:, KINDS.index("diamond")] = FAR, FAR - 20, REMEMBERED
    old[:, captions.PLACES] = stored.reshape(N, -1)
    old[:, captions.PLANT_AGE] = 77
    alive = dataclasses.replace(start, obs=jnp.asarray(old))
    dying = with_envs(start, player_health=[0] * N)
    after = {name: STEP(jax.random.key(0), dataclasses.replace(state, obs=alive.obs), NOOP)[0].obs
             for name, state in (("alive", start), ("dead", dying))}  # fmt: skip
    diamond = {name: np.asarray(ENV.places(obs))[:, KINDS.index("diamond"), 2] for name, obs in after.items()}
    assert (diamond["alive"] == REMEMBERED).all() and not (diamond["dead"] == REMEMBERED).any()
    assert (after["alive"][:, captions.PLANT_AGE] >= 77).all() and not after["dead"][:, captions.PLANT_AGE].any()
    assert not (places[..., 2] == REMEMBERED).any() and not after["dead"][:, captions.HOUR].any()


def test_the_clock_shows_half_the_steps_since_dawn(start):
    for time, hour in ((0, 0), (1, 1), (120, 60), (148, 74), (298, 149), (299, 0), (450, 75)):
        state = with_envs(start, timestep=[time] * N)
        assert STEP(jax.random.key(0), state, NOOP)[0].obs[:, captions.HOUR].tolist() == [hour] * N


def test_the_age_of_a_plant(start):
    """From the step that planted it, in quarters of steps, until one is eaten; the first of several counts."""
    planting = jnp.full(N, Action.PLACE_PLANT.value)
    inventory = start.envs.inventory.replace(sapling=jnp.full(N, 2, start.envs.inventory.sapling.dtype))
    state = with_blocks(dataclasses.replace(start, envs=start.envs.replace(inventory=inventory)), {})
    ages = []
    for t in range(22):
        state, *_ = STEP(jax.random.key(t), state, planting if t in (1, 9) else NOOP)
        ages.append(int(state.obs[0, captions.PLANT_AGE]))
    assert ages[0] == 0 and ages[1] == 1 and ages[21] == 1 + 20 // 4
    assert all(after - before in (0, 1) for before, after in zip(ages, ages[1:], strict=False))
    old = np.asarray(state.obs).copy()
    old[:, captions.PLANT_AGE] = 255
    eating = with_blocks(state, {(-1, 0): BlockType.RIPE_PLANT})
    for action, age in ((Action.NOOP, 255), (Action.DO, 0)):
        kept = dataclasses.replace(eating, obs=jnp.asarray(old))
        after, _, _, info = STEP(jax.random.key(3), kept, jnp.full(N, action.value))
        assert after.obs[:, captions.PLANT_AGE].tolist() == [age] * N
        assert info["reached"][:, BASIC_SUB_GOALS.index("eat plant")].all() == (action == Action.DO)


NORTH, SOUTH, WEST, EAST = (-1, 0), (1, 0), (0, -1), (0, 1)
STONE = dict.fromkeys((NORTH, SOUTH, WEST, EAST), BlockType.STONE)
ROOM = dict.fromkeys((SOUTH, WEST, EAST, (-1, -1), (-1, 1), (-2, 0)), BlockType.STONE)  # the player's cell and the next


def without(blocks, *cells):
    return {cell: block for cell, block in blocks.items() if cell not in cells}


@pytest.mark.parametrize(
    ("blocks", "shelter"),
    [
        (STONE, 2),
        (STONE | {NORTH: BlockType.WATER, WEST: BlockType.CRAFTING_TABLE}, 2),
        (ROOM, 2),  # two cells, a stone behind
        (without(ROOM, (-2, 0)), 1),  # the way out is through the cell ahead
        (without(ROOM, SOUTH), 0),  # it is behind: the player has to turn
        (without(STONE, NORTH), 1),  # a stone ahead closes it
        (without(STONE, EAST), 0),  # open beside the player, who looks north
        (without(STONE, NORTH, EAST), 0),
        (STONE | {NORTH: BlockType.SAND}, 1),
        (STONE | {NORTH: BlockType.PATH}, 1),
        (STONE | {NORTH: BlockType.LAVA}, 2),
        ({}, 0),
    ],
)
def test_shelter(start, blocks, shelter):
    assert with_blocks(start, blocks).obs[:, captions.SHELTER].tolist() == [shelter] * N
