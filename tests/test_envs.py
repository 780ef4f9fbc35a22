"""Craftax as we wrap it: pool, resets, observations, facts, captions, detectors; the toy game; the score."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_classic.constants import Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams, Mobs
from craftax.craftax_classic.game_logic import craftax_step
from craftax.craftax_classic.renderer import render_craftax_symbolic
from craftax.craftax_env import make_craftax_env_from_name
from random_situations import random_observations

from envs import make_env
from envs.crafter import CRAFTER, captions, goals
from envs.crafter.env import CraftaxEnv, first_look, observe_one
from envs.crafter.vocabulary import (
    ACHIEVEMENTS,
    BASIC_SUB_GOALS,
    CLOSE,
    FACTS,
    KINDS,
    KNOWN,
    LASTING,
    LOW,
    NEAR,
    SIGHTS,
)
from envs.nearest import IN_VIEW, REMEMBERED
from envs.scores import score
from envs.toy import EPISODE_LENGTH, TOY, ToyEnv

N = 4
SHORT = CraftaxEnv(pool_size=16, params=EnvParams(max_timesteps=6))
STEP = jax.jit(lambda key, state, action: SHORT.step(jax.random.split(key, N), state, action))
REFILL = jax.jit(lambda key, state: SHORT.refill(key[None], state))
TWO = CraftaxEnv(pool_size=24, num_pools=2)
REFILL_TWO = jax.jit(lambda key, state: TWO.refill(jax.random.split(key, 2), state))
FACTS_OF = jax.jit(captions.facts)
OBSERVE = jax.jit(lambda state: first_look(observe_one(state)[None])[0])


@pytest.fixture(scope="module")
def start():
    return jax.jit(SHORT.reset, static_argnums=1)(jax.random.key(0), N)


@pytest.fixture(scope="module")
def start_of_two():
    return jax.jit(TWO.reset, static_argnums=1)(jax.random.key(0), N)


@pytest.fixture(scope="module")
def world(start):
    """One fresh game."""
    return jax.tree.map(lambda x: x[0], start.envs)


def walk(state, steps, seed=0, refill_every=0):
    """Random actions; the states, rewards, dones and infos of every step."""
    out = []
    for t, key in enumerate(jax.random.split(jax.random.key(seed), steps)):
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (N,), 0, 17)
        new, reward, done, info = STEP(key_step, state, action)
        out.append((key_step, state, action, new, reward, done, info))
        state = new
        if refill_every and (t + 1) % refill_every == 0:
            state = REFILL(jax.random.fold_in(key, 7), state)
    return state, out


def hand_out(state, times):
    """End every episode `times` times; the maps that the envs got."""
    maps = []
    for t in range(times):
        old = dataclasses.replace(
            state, envs=state.envs.replace(player_health=jnp.zeros_like(state.envs.player_health))
        )
        state = STEP(jax.random.key(t), old, jnp.zeros(N, jnp.int32))[0]
        maps.append(np.asarray(state.envs.map))
    return state, np.concatenate(maps)


def unique_maps(maps):
    return len({m.tobytes() for m in np.asarray(maps)})


def test_each_world_of_the_pool_is_handed_out_once_while_it_lasts(start):
    state, maps = hand_out(start, 4)  # 16 episodes, 16 worlds
    assert unique_maps(maps) == 16
    assert {m.tobytes() for m in maps} == {m.tobytes() for m in np.asarray(start.pool.worlds.map[0])}
    assert state.pool.used.tolist() == [16] and state.pool.reused.tolist() == [0]


def test_an_empty_pool_reuses_worlds_and_counts_it(start):
    state, maps = hand_out(start, 5)  # 20 episodes, 16 worlds
    assert unique_maps(maps) == 16
    assert state.pool.reused.tolist() == [4]
    np.testing.assert_array_equal(maps[16:], maps[:4])


def test_unused_worlds_carry_over_a_refill(start):
    state, used = hand_out(start, 1)
    five = dataclasses.replace(start, pool=dataclasses.replace(start.pool, used=jnp.array([5])))
    refilled = REFILL(jax.random.key(4), five)
    old, new = np.asarray(five.pool.worlds.map[0]), np.asarray(refilled.pool.worlds.map[0])
    replaced = [i for i in range(16) if old[i].tobytes() != new[i].tobytes()]
    assert replaced == list(range(8))  # 5 used ones, rounded up to a chunk of 8
    assert refilled.pool.used.tolist() == [0] and unique_maps(new) == 16
    after = REFILL(jax.random.key(5), state)
    assert not {m.tobytes() for m in used} & {m.tobytes() for m in np.asarray(after.pool.worlds.map[0])}


def test_pools_serve_their_own_envs_only(start_of_two):
    """As if each were an env of its own, which is what lets devices work apart."""
    state = start_of_two
    dead = state.envs.replace(player_health=jnp.array([0.0, 9.0, 0.0, 0.0]).astype(state.envs.player_health.dtype))
    keys = jax.random.split(jax.random.key(1), N)
    noop = jnp.zeros(N, jnp.int32)
    state = jax.jit(TWO.step)(keys, dataclasses.replace(state, envs=dead), noop)[0]
    maps, worlds = np.asarray(state.envs.map), np.asarray(state.pool.worlds.map)
    np.testing.assert_array_equal(maps[0], worlds[0, 0])
    np.testing.assert_array_equal(maps[2:], worlds[1, :2])
    assert state.pool.used.tolist() == [1, 2]
    refilled = REFILL_TWO(jax.random.key(2), state)
    assert refilled.pool.used.tolist() == [0, 0] and unique_maps(refilled.pool.worlds.map.reshape(48, 64, 64)) == 48


def test_a_pool_that_needs_fewer_worlds_keeps_the_others(start_of_two):
    """As it would on a device of its own: results must not depend on how many pools share one."""
    pool = dataclasses.replace(start_of_two.pool, used=jnp.array([3, 20]))
    state = dataclasses.replace(start_of_two, pool=pool)
    refilled = REFILL_TWO(jax.random.key(1), state)
    old, new = np.asarray(state.pool.worlds.map), np.asarray(refilled.pool.worlds.map)
    changed = (old != new).any((2, 3)).sum(1).tolist()
    assert changed == [8, 24]  # in chunks of 8


def test_no_env_ever_mixes_two_worlds(start):
    """A new episode's state is one world of the pool in every array, also where neighbours go on."""
    uneven = start.envs.replace(timestep=jnp.arange(N, dtype=jnp.int32))  # episodes end one after the other
    state, steps = walk(dataclasses.replace(start, envs=uneven), 6)
    begun = 0
    for _, before, _, after, _, done, _ in steps:
        for i in np.flatnonzero(done):
            begun += 1
            index = int(before.pool.used[0]) + int(np.asarray(done)[:i].sum())
            expected = jax.tree.map(lambda x, j=index: np.asarray(raw(x)[0, j]), before.pool.worlds)
            got = jax.tree.map(lambda x, j=i: np.asarray(raw(x)[j]), after.envs)
            jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert begun == N


def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_done_and_reward_are_those_of_craftax_with_its_own_auto_reset(start):
    theirs = make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=True)
    step_env = jax.jit(jax.vmap(theirs.step_env, in_axes=(0, 0, 0, None)))
    _, steps = walk(start, 14, refill_every=5)
    ended = 0
    for key, before, action, after, reward, done, _ in steps:
        _, expected, their_reward, their_done, _ = step_env(jax.random.split(key, N), before.envs, action, SHORT.params)
        np.testing.assert_array_equal(reward, their_reward)
        np.testing.assert_array_equal(done, their_done)
        going_on = ~np.asarray(done)
        np.testing.assert_array_equal(np.asarray(after.envs.map)[going_on], np.asarray(expected.map)[going_on])
        assert (np.asarray(after.envs.timestep)[np.asarray(done)] == 0).all()
        ended += int(done.sum())
    assert ended == 2 * N


def test_reset_has_no_weak_types(start):
    """craftax's has, which once compiled every phase twice."""
    assert not [x for x in jax.tree.leaves(start) if getattr(x, "weak_type", False)]
    after = jax.eval_shape(STEP, jax.random.key(0), start, jnp.zeros(N, jnp.int32))[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


# ---- observations and facts


@pytest.fixture(scope="module")
def situations():
    return np.asarray(random_observations(CraftaxEnv(pool_size=8), jax.random.key(1), 400))


def test_features_are_craftax_symbolic_observation(start):
    state, _ = walk(start, 40)
    envs = CraftaxEnv()
    ours = np.asarray(jax.jit(lambda state: envs.features(envs.observe(state)))(state))
    theirs = np.asarray(jax.jit(jax.vmap(render_craftax_symbolic))(state.envs), np.float32)
    assert ours.shape == (N, 1345 + 4) and theirs.shape == (N, 1345)  # ours has a clock and plants behind it
    ours_grid, theirs_grid = ours[:, :1323].reshape(N, 63, 21), theirs[:, :1323].reshape(N, 63, 21)
    np.testing.assert_array_equal(ours_grid[..., :17], theirs_grid[..., :17])
    assert (ours_grid[..., 17:] >= theirs_grid[..., 17:]).all()  # theirs can lose a mob (Craftax issue 57)
    np.testing.assert_allclose(ours[:, 1323:1345], theirs[:, 1323:], atol=1 / 255)
    turn = 2 * np.pi * np.asarray(state.envs.timestep) / 300
    clock = np.stack([np.sin(turn), np.cos(turn), 0 * turn, 0 * turn], -1)  # no plants
    np.testing.assert_allclose(ours[:, 1345:], clock, atol=0.05)


def test_a_mob_out_of_view_does_not_hide_one_in_view(world):
    """Craftax issue 57: an index that wraps around. Facts must not inherit it."""
    position = world.player_position + jnp.array([[2, 4], [-4, -5], [0, 9]])  # in view; out, wraps onto it; out
    zombies = Mobs(position, jnp.full(3, 5), jnp.array([True, True, True]), jnp.zeros(3, jnp.int32))
    obs = observe(world.replace(zombies=zombies))
    assert facts_by_name(obs)["zombie in view"]


def observe(state):
    """(218,) what the player sees who has just been born into this state."""
    return np.asarray(OBSERVE(state))


def facts_by_name(obs):
    return dict(zip(FACTS, np.asarray(FACTS_OF(jnp.asarray(obs))).tolist(), strict=True))


WALKABLE = (2, 6, 7, 13)  # grass, wood, path, sand
AHEAD = ((0, -1), (0, 1), (-1, 0), (1, 0))


def shut_in(obs, stone=None):
    """Does no way lead farther than two steps? With a stone on that cell?"""
    free = {(y, x) for y in range(7) for x in range(9) if obs[y * 9 + x] in WALKABLE} - {stone}
    reached = {(3, 4)}
    for _ in range(3):
        beside = {(y + dy, x + dx) for y, x in reached for dy, dx in AHEAD}
        before, reached = reached, reached | (beside & free)
    return before == reached


def facts_by_loop(obs):
    """The truth of every fact but those of remembered places, cell by cell."""
    names = {"tree": 5, "water": 3, "stone": 4, "coal": 8, "iron": 9, "diamond": 10, "crafting table": 11,
             "furnace": 12, "plant": 15, "ripe plant": 16, "lava": 14}  # fmt: skip
    mobs = {"zombie": 1, "cow": 2, "skeleton": 4, "arrow": 8}
    items = "wood stone coal iron diamond sapling".split()
    vitals = "health food drink energy".split()
    truths = {f"unlocked {name.replace('_', ' ')}": bool(obs[145 + i]) for i, name in enumerate(ACHIEVEMENTS)}
    for name in FACTS:
        if ">=" in name:
            item, least = name.split(" >= ")
            amount = obs[126 + items.index(item)] if item in items else obs[138 + vitals.index(item)]
            truths[name] = amount >= int(least)
        elif name.endswith(" low"):
            truths[name] = obs[138 + vitals.index(name[:-4])] <= LOW
        elif name.endswith(" in view"):
            thing = name[:-8]
            cells = obs[:63] == names[thing] if thing in names else (obs[63:126] & mobs[thing]) > 0
            truths[name] = any(cells)
    near = reach_table = reach_furnace = False
    for y in range(7):
        for x in range(9):
            dy, dx, block, mob = abs(y - 3), abs(x - 4), obs[y * 9 + x], obs[63 + y * 9 + x]
            near |= bool(mob & 1) and dy + dx <= NEAR
            reach_table |= block == 11 and max(dy, dx) <= 1
            reach_furnace |= block == 12 and max(dy, dx) <= 1
    ahead = AHEAD[obs[142]]
    enclosed, hour, age = shut_in(obs), obs[captions.HOUR], obs[captions.PLANT_AGE]
    return truths | {
        "zombie near": near, "table in reach": reach_table, "furnace in reach": reach_furnace,
        "energy full": obs[141] == 9, "dark": obs[143] < 128, "asleep": obs[144] == 1, "enclosed": enclosed,
        "one stone from shelter": not enclosed and shut_in(obs, (3 + ahead[0], 4 + ahead[1])),
        "evening": 60 <= hour < 74 and obs[143] >= 128, "plant ripening": 0 < age < 151,
        "plant ripe by now": age >= 151,
    }  # fmt: skip


def test_facts_against_a_loop_over_cells(situations):
    ours = np.asarray(FACTS_OF(jnp.asarray(situations)))
    by_place = {name for name in FACTS if name.endswith((" known", " close"))}
    for obs, row in zip(situations.astype(int), ours, strict=True):
        found = {name: truth for name, truth in zip(FACTS, row.tolist(), strict=True) if name not in by_place}
        assert found == facts_by_loop(obs)
    often = dict(zip(FACTS, ours.mean(0), strict=True))
    rare = ("enclosed", "one stone from shelter", "evening", "plant ripening", "plant ripe by now", "zombie near")
    assert all(0 < often[name] < 1 for name in rare), {name: often[name] for name in rare}


def test_facts_of_places_against_a_loop(situations):
    ours = np.asarray(FACTS_OF(jnp.asarray(situations)))
    for obs, row in zip(situations.astype(int), ours, strict=True):
        stored = obs[captions.PLACES].reshape(len(KINDS), 3)
        away = {kind: abs(dy - 63) + abs(dx - 63) for kind, (dy, dx, how) in zip(KINDS, stored, strict=True) if how}
        expected = {f"{kind} known": kind in away for kind in KNOWN}
        expected["table close"] = away.get("crafting table", 99) <= CLOSE
        expected["furnace close"] = away.get("furnace", 99) <= CLOSE
        assert {name: row[FACTS.index(name)] for name in expected} == expected
        truths = facts_by_loop(obs)  # what is in view is known
        for name in set(KNOWN) & set(SIGHTS):
            assert expected[f"{name} known"] or not truths[f"{name} in view"]
    assert all(0 < ours[:, FACTS.index(f"{kind} known")].mean() for kind in KNOWN)


def test_the_caption_says_the_same_as_the_facts(situations):
    """The rules guide is given facts. It knows no more than an LLM, which reads the caption."""
    ours = np.asarray(FACTS_OF(jnp.asarray(situations)))
    for obs, row in zip(situations, ours, strict=True):
        read = captions.truths_of(captions.read_caption(captions.to_text(obs)))
        assert read == dict(zip(FACTS, row.tolist(), strict=True)), captions.to_text(obs)


def test_golden_captions():
    obs = np.zeros(captions.OBS_SIZE, np.uint8)
    obs[captions.BLOCKS] = BlockType.GRASS.value
    obs[captions.VITALS_SLICE] = 9
    obs[captions.LIGHT], obs[captions.DIRECTION] = 255, 2
    assert captions.to_text(obs) == "\n".join([
        "You see: nothing special.", "Remembered: nothing.", "Facing: grass.", "Inventory: nothing.",
        "Vitals (of 9): health 9, food 9, drink 9, energy 9.", "It is day. The player is awake.", "Unlocked: nothing.",
    ])  # fmt: skip
    obs[1 * 9 + 4], obs[4 * 9 + 1], obs[0] = BlockType.TREE.value, BlockType.WATER.value, BlockType.TREE.value
    obs[63 + 2 * 9 + 4] = 1
    obs[126], obs[131], obs[132] = 3, 1, 1
    obs[captions.VITALS_SLICE] = [9, 7, 3, 8]
    obs[captions.LIGHT], obs[captions.ASLEEP] = 20, 1
    obs[145] = obs[150] = 1
    for cell in (3 * 9 + 3, 3 * 9 + 5, 2 * 9 + 4, 4 * 9 + 4):
        obs[cell] = BlockType.STONE.value
    places = obs[captions.PLACES].reshape(len(KINDS), 3)
    places[KINDS.index("iron")] = 63 - 12, 63 + 4, REMEMBERED
    places[KINDS.index("cow")] = 63, 63 - 9, REMEMBERED
    places[KINDS.index("tree")] = 63 - 2, 63, IN_VIEW  # is among what the player sees
    places[KINDS.index("path")] = 63, 63 + 9, REMEMBERED  # not worth a word
    obs[captions.SHELTER], obs[captions.PLANT_AGE] = 2, 150
    assert captions.to_text(obs) == "\n".join([
        "You see: tree (2 north), water (1 south, 3 west), stone (1 north), zombie (1 north).",
        "Remembered: iron (12 north, 4 east), cow (9 west).",
        "Facing: zombie.", "Inventory: 3 wood, 1 sapling, wood pickaxe.",
        "Vitals (of 9): health 9, food 7, drink 3, energy 8.",
        "It is dark. The player is asleep. The player is enclosed. A plant is ripening.",
        "Unlocked: collect wood, make wood pickaxe.",
    ])  # fmt: skip
    obs[captions.LIGHT], obs[captions.HOUR], obs[captions.ASLEEP] = 200, 65, 0
    obs[captions.SHELTER], obs[captions.PLANT_AGE] = 1, 151
    about = "It is evening. The player is awake. A stone ahead would enclose the player. A plant should be ripe by now."
    assert about in captions.to_text(obs).splitlines()


# ---- detectors


@pytest.fixture(scope="module")
def play():
    """(state, action) -> names of the sub-goals reached, worked; the state after."""

    @jax.jit
    def step(state, action):
        after, _ = craftax_step(jax.random.key(0), state, action, SHORT.params, SHORT.static_params)
        return *goals.detect(state, action, after), after

    def run(state, action):
        reached, worked, after = step(state, jnp.int32(action.value))
        return *({BASIC_SUB_GOALS[i] for i in np.flatnonzero(x)} for x in (reached, worked)), after

    return run


def facing(state, block, **changes):
    """The player looks up at this block."""
    y, x = state.player_position + jnp.array([-1, 0])
    changes = {name: jnp.int32(n) for name, n in changes.items()}  # a number of Python's would compile the step anew
    inventory = state.inventory.replace(**changes)
    return state.replace(
        map=state.map.at[y, x].set(block.value), player_direction=jnp.int32(Action.UP.value), inventory=inventory
    )


@pytest.mark.parametrize(
    ("goal", "block", "action", "has"),
    [
        ("chop tree", BlockType.TREE, Action.DO, {}),
        ("mine stone", BlockType.STONE, Action.DO, {"wood_pickaxe": 1}),
        ("mine coal", BlockType.COAL, Action.DO, {"wood_pickaxe": 1}),
        ("mine iron", BlockType.IRON, Action.DO, {"stone_pickaxe": 1}),
        ("mine diamond", BlockType.DIAMOND, Action.DO, {"iron_pickaxe": 1}),
        ("place stone", BlockType.GRASS, Action.PLACE_STONE, {"stone": 1}),
        ("place crafting table", BlockType.GRASS, Action.PLACE_TABLE, {"wood": 2}),
        ("place furnace", BlockType.GRASS, Action.PLACE_FURNACE, {"stone": 1}),
        ("place plant", BlockType.GRASS, Action.PLACE_PLANT, {"sapling": 1}),
        ("make wood pickaxe", BlockType.CRAFTING_TABLE, Action.MAKE_WOOD_PICKAXE, {"wood": 1}),
        ("make wood sword", BlockType.CRAFTING_TABLE, Action.MAKE_WOOD_SWORD, {"wood": 1}),
        ("make stone pickaxe", BlockType.CRAFTING_TABLE, Action.MAKE_STONE_PICKAXE, {"wood": 1, "stone": 1}),
        ("make stone sword", BlockType.CRAFTING_TABLE, Action.MAKE_STONE_SWORD, {"wood": 1, "stone": 1}),
    ],
)
def test_a_sub_goal_is_detected_when_it_happens_and_only_then(world, play, goal, block, action, has):
    reached, worked, _ = play(facing(world, block, **has), action)
    assert reached == worked == {goal}
    assert play(facing(world, block, **has), Action.NOOP)[0] == set()
    without = {name: 0 for name in has}
    if without:
        assert play(facing(world, block, **without), action)[0] == set()


def test_iron_tools_need_table_and_furnace(world, play):
    has = {"wood": 2, "stone": 2, "coal": 2, "iron": 2}
    state = facing(world, BlockType.CRAFTING_TABLE, **has)
    assert play(state, Action.MAKE_IRON_PICKAXE)[0] == set()
    y, x = state.player_position + jnp.array([-1, 1])
    state = state.replace(map=state.map.at[y, x].set(BlockType.FURNACE.value))
    assert play(state, Action.MAKE_IRON_PICKAXE)[0] == {"make iron pickaxe"}
    assert play(state, Action.MAKE_IRON_SWORD)[0] == {"make iron sword"}


def test_eating_a_ripe_plant(world, play):
    assert play(facing(world, BlockType.RIPE_PLANT), Action.DO)[0] == {"eat plant"}
    assert play(facing(world, BlockType.PLANT), Action.DO)[0] == set()


def test_drinking_counts_when_thirsty_or_for_the_first_time(world, play):
    state = facing(world, BlockType.WATER)
    assert play(state, Action.DO)[0] == {"drink water"}  # unlocks
    known = state.replace(achievements=state.achievements.at[ACHIEVEMENTS.index("collect_drink")].set(True))
    assert play(known, Action.DO)[0] == set()  # full: a bonus here could be had for nothing
    assert play(known.replace(player_drink=jnp.int32(5)), Action.DO)[0] == {"drink water"}


@pytest.mark.parametrize(
    ("goal", "kind"), [("attack cow", "cows"), ("attack zombie", "zombies"), ("attack skeleton", "skeletons")]
)
def test_every_hit_is_work_and_the_last_one_reaches(world, play, goal, kind):
    mobs = getattr(world, kind)
    one = jnp.arange(mobs.mask.shape[0]) == 0
    target = world.player_position + jnp.array([-1, 0])
    position = jnp.where(one[:, None], target, mobs.position)

    def with_health(health):
        alive = mobs.replace(position=position, mask=one, health=jnp.where(one, health, mobs.health))
        return facing(world, BlockType.GRASS).replace(
            **{kind: alive}, mob_map=world.mob_map.at[target[0], target[1]].set(True)
        )

    assert play(with_health(3), Action.DO)[:2] == (set(), {goal})
    assert play(with_health(1), Action.DO)[:2] == ({goal}, {goal})
    assert play(with_health(1), Action.UP)[:2] == (set(), set())


def test_sleep_is_reached_on_waking_and_worked_towards_by_rest(world, play):
    asleep = world.replace(is_sleeping=jnp.asarray(True), player_energy=jnp.int32(5), player_fatigue=jnp.float32(-10.0))
    reached, worked, after = play(asleep, Action.NOOP)
    assert (reached, worked) == (set(), {"sleep"}) and int(after.player_energy) == 6
    restless = asleep.replace(player_fatigue=jnp.float32(-3.0))
    assert play(restless, Action.NOOP)[1] == {"sleep"}  # every step of it, also one that restores nothing
    assert play(restless.replace(is_sleeping=jnp.asarray(False)), Action.NOOP)[1] == set()
    rested = asleep.replace(player_energy=jnp.int32(9))
    assert play(rested, Action.NOOP)[0] == {"sleep"}


def test_a_full_inventory_earns_nothing(world, play):
    state = facing(world, BlockType.TREE, wood=9)
    state = state.replace(achievements=jnp.ones_like(state.achievements))
    assert play(state, Action.DO)[1] == set()


def test_every_unlocked_achievement_is_its_sub_goal(start):
    _, steps = walk(start, 30, seed=2)
    for _, before, _, _, _, _, info in steps:
        unlocked = np.asarray(info["achievements"]) & ~np.asarray(before.envs.achievements)
        assert (np.asarray(info["reached"]) >= unlocked).all()
        assert (np.asarray(info["worked"]) >= np.asarray(info["reached"])).all()


# ---- toy, score, ids


def test_the_toy_pays_for_the_right_action():
    env = ToyEnv()
    state = env.reset(jax.random.key(0), 16)
    total = 0.0
    for t in range(EPISODE_LENGTH):
        state, reward, done, info = env.step(jax.random.split(jax.random.key(t), 16), state, state.target)
        total += float(reward.mean())
        assert (np.asarray(info["reached"]).sum(1) == 1).all()
        assert bool(done.all()) == (t == EPISODE_LENGTH - 1)
    assert total == EPISODE_LENGTH
    assert env.to_text(np.array([1, 0])) == "You see: a lake."
    assert TOY.truths(np.asarray(env.facts(jnp.array([1, 0])))) == {"tree in view": False, "water in view": True}


def test_every_word_of_a_game_is_one_of_its_own():
    for game in (CRAFTER, TOY):
        reasons = [text for needs in game.needs.values() for text in needs]
        assert {text.removeprefix("not ") for text in reasons} <= set(game.facts)
        assert set(game.needs) == set(game.basic_sub_goals)
        assert set(game.things) <= set(game.basic_sub_goals)
        assert set(game.things.values()) <= set(game.kinds)
        assert set(game.sub_goal_aliases) <= set(game.sub_goals) and set(game.fact_aliases) <= set(game.facts)
    assert {*LASTING, *KNOWN} <= set(KINDS) and {*KNOWN} <= set(SIGHTS)
    truths = captions.truths_of(captions.read_caption(captions.to_text(np.zeros(captions.OBS_SIZE, np.uint8))))
    assert list(truths) == list(CRAFTER.facts)


def test_an_env_is_a_static_argument_of_jit():
    """Equal settings must not compile twice."""
    for env_id in ("Craftax-Classic-Symbolic-v1", "Toy-v0"):
        assert make_env(env_id, 8) == make_env(env_id, 8) and hash(make_env(env_id, 8)) == hash(make_env(env_id, 8))


def test_the_score_of_crafter():
    assert score(np.zeros(22)) == 0
    assert score(np.ones(22)) == pytest.approx(100)
    half = np.array([1.0] * 11 + [0.0] * 11)
    assert score(half) == pytest.approx(math.sqrt(101) - 1)
    for bad in ([], [1.5], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="success rates"):
            score(np.array(bad))


def test_unknown_env_id():
    with pytest.raises(ValueError, match="--env-id.*Craftax-Classic-Symbolic-v1"):
        make_env("Breakout", 4)
