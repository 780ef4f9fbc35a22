"""Common sense in play: every habit by hand, where a life ends, what it ended of; then against real games."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_classic.constants import Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams
from craftax.craftax_classic.game_logic import calculate_light_level

from envs import make_env
from envs.crafter import captions, habits
from envs.crafter.env import first_look, observe_one
from envs.crafter.habits import CAUSES, HABITS
from envs.crafter.vocabulary import ACHIEVEMENTS, BASIC_SUB_GOALS, INVENTORY, KINDS, VITALS
from envs.nearest import FAR, REMEMBERED

DETECT, CAUSE = jax.jit(habits.detect), jax.jit(habits.cause_of_death)
NAMES = list(HABITS)
NORTH, SOUTH, WEST, EAST = (-1, 0), (1, 0), (0, -1), (0, 1)
ZOMBIE, COW, SKELETON, ARROW = 1, 2, 4, 8
BYTES = {
    "hour": captions.HOUR, "light": captions.LIGHT, "asleep": captions.ASLEEP, "shelter": captions.SHELTER,
    "age": captions.PLANT_AGE,
}  # fmt: skip


def situation(blocks=(), mobs=(), unlocked=(), table=None, **numbers):
    """A healthy player with nothing, who looks north on grass by day, but for what is said.

    blocks {(dy, dx): BlockType}, mobs {(dy, dx): bits}, names of achievements, (dy, dx) of a table out of view, and
    items, vitals and BYTES by name.
    """
    obs = np.zeros(captions.OBS_SIZE, np.uint8)
    obs[captions.BLOCKS], obs[captions.VITALS_SLICE] = BlockType.GRASS.value, 9
    obs[captions.LIGHT], obs[captions.DIRECTION] = 255, 2
    for (dy, dx), block in dict(blocks).items():
        obs[(3 + dy) * 9 + 4 + dx] = block.value
    for (dy, dx), bits in dict(mobs).items():
        obs[63 + (3 + dy) * 9 + 4 + dx] = bits
    for name in unlocked:
        obs[captions.UNLOCKED.start + ACHIEVEMENTS.index(name)] = 1
    for name, n in numbers.items():
        items = (*INVENTORY, *VITALS)
        obs[BYTES[name] if name in BYTES else captions.NUMBERS.start + items.index(name.replace("_", " "))] = n
    if table:
        places = obs[captions.PLACES].reshape(len(KINDS), 3)
        places[KINDS.index("crafting table")] = *np.add(table, FAR), REMEMBERED
    return obs


def judge(before, action, after=None, done=False):
    """{habit: sensible?} of those that a step is an occasion of. `before` and `after`: what `situation` takes."""
    obs = situation(**before)
    next_obs = situation(**(before | (after or {})))
    occasions, sensible = DETECT(*map(jnp.asarray, (obs, np.int32(action.value), next_obs, done)))
    assert occasions.shape == sensible.shape == (len(HABITS),) and occasions.dtype == sensible.dtype == bool
    assert not (sensible & ~occasions).any()
    return {name: bool(sensible[i]) for i, name in enumerate(NAMES) if occasions[i]}


GRASS, TREE, LAVA, WATER, STONE = (BlockType[name] for name in ("GRASS", "TREE", "LAVA", "WATER", "STONE"))
TABLE, PLANT, RIPE = BlockType.CRAFTING_TABLE, BlockType.PLANT, BlockType.RIPE_PLANT
PREY = {"health": 3, "mobs": {(0, 3): ZOMBIE}}  # hurt, a zombie three steps to the east
PLANTED, WOKEN, ATE = ({"unlocked": (name,)} for name in ("place_plant", "wake_up", "eat_plant"))

# (habit, before, action, after, was it sensible? None: it is no occasion)
CASES = [
    ("sleeps sheltered", {"shelter": 2, "energy": 5}, Action.SLEEP, {"asleep": 1}, True),
    ("sleeps sheltered", {"shelter": 1, "energy": 5}, Action.SLEEP, {"asleep": 1}, False),
    ("sleeps sheltered", {"shelter": 2}, Action.SLEEP, {}, None),  # not tired: it stays awake
    ("sleeps sheltered", {"shelter": 2, "energy": 5, "asleep": 1}, Action.NOOP, {}, None),  # it slept before
    ("drinks in time", {"drink": 2}, Action.DO, {"drink": 3}, True),
    ("drinks in time", {"drink": 1}, Action.NOOP, {"drink": 0}, False),
    ("drinks in time", {"drink": 1}, Action.DO, {"drink": 2}, None),  # one sip of several
    ("drinks in time", {"drink": 3}, Action.DO, {"drink": 4}, None),
    ("drinks in time", {"drink": 3}, Action.NOOP, {"drink": 2}, None),
    ("drinks in time", {"drink": 0}, Action.NOOP, {}, None),  # it ran out before
    ("eats in time", {"food": 1}, Action.DO, {"food": 7}, True),
    ("eats in time", {"food": 2}, Action.DO, {"food": 6}, True),
    ("eats in time", {"food": 1}, Action.DO, {"food": 0}, False),
    ("eats in time", {"food": 0}, Action.DO, {"food": 6}, None),  # that was too late, and was counted when it ran out
    ("eats in time", {"food": 3}, Action.DO, {"food": 9}, None),
    ("fights armed", {"mobs": {NORTH: ZOMBIE}, "stone_sword": 1}, Action.DO, {}, True),
    ("fights armed", {"mobs": {NORTH: ZOMBIE}, "iron_sword": 2}, Action.DO, {}, True),
    ("fights armed", {"mobs": {NORTH: ZOMBIE}, "iron_pickaxe": 1}, Action.DO, {}, False),
    ("fights armed", {"mobs": {NORTH: COW, SOUTH: ZOMBIE}, "wood_sword": 1}, Action.DO, {}, None),
    ("fights armed", {"mobs": {NORTH: ZOMBIE}, "wood_sword": 1}, Action.UP, {}, None),
    ("fights armed", {"mobs": {NORTH: ZOMBIE}, "wood_sword": 1, "asleep": 1}, Action.DO, {}, None),
    ("saves itself", PREY, Action.LEFT, {}, True),
    ("saves itself", PREY, Action.RIGHT, {}, False),
    ("saves itself", PREY, Action.NOOP, {}, False),
    ("saves itself", PREY | {"blocks": {WEST: TREE}}, Action.LEFT, {}, False),  # it only turns
    ("saves itself", PREY | {"blocks": {WEST: LAVA}}, Action.LEFT, {}, False),
    ("saves itself", PREY | {"mobs": {(0, 3): ZOMBIE, WEST: COW}}, Action.LEFT, {}, False),
    ("saves itself", PREY | {"mobs": {(0, 3): ZOMBIE, (0, -3): ZOMBIE}}, Action.LEFT, {}, False),  # to another one
    ("saves itself", PREY | {"mobs": {NORTH: ZOMBIE}, "wood_sword": 1}, Action.DO, {}, True),
    ("saves itself", PREY | {"mobs": {NORTH: ZOMBIE}}, Action.DO, {}, False),  # five blows: it takes two first
    ("saves itself", PREY | {"mobs": {(-2, 1): ZOMBIE}, "stone": 1}, Action.PLACE_STONE, {"stone": 0}, True),
    ("saves itself", PREY | {"stone": 1, "shelter": 1}, Action.PLACE_STONE, {"stone": 0, "shelter": 2}, True),
    ("saves itself", PREY | {"stone": 1}, Action.PLACE_STONE, {"stone": 0}, False),  # the zombie comes from the east
    ("saves itself", PREY | {"mobs": {EAST: ZOMBIE, (-3, 1): ZOMBIE}, "stone": 1}, Action.PLACE_STONE, {}, False),
    ("saves itself", PREY | {"mobs": {(-2, 1): ZOMBIE}}, Action.PLACE_STONE, {}, False),  # it has none
    ("saves itself", PREY | {"mobs": {NORTH: ZOMBIE}, "stone": 1}, Action.PLACE_STONE, {}, False),  # no room for it
    ("saves itself", PREY | {"health": 4}, Action.LEFT, {}, None),
    ("saves itself", PREY | {"mobs": {(0, 4): ZOMBIE, EAST: COW}}, Action.LEFT, {}, None),
    ("saves itself", PREY | {"shelter": 2}, Action.NOOP, {}, None),
    ("saves itself", PREY | {"asleep": 1}, Action.LEFT, {}, None),
    ("uses the table at hand", {"wood": 2}, Action.PLACE_TABLE, {"wood": 0}, True),
    ("uses the table at hand", {"wood": 9, "table": (0, 9)}, Action.PLACE_TABLE, {"wood": 7}, True),
    ("uses the table at hand", {"wood": 9, "table": (0, -8)}, Action.PLACE_TABLE, {"wood": 7}, False),
    ("uses the table at hand", {"wood": 1, "table": (0, -8)}, Action.PLACE_TABLE, {}, None),
    ("uses the table at hand", {"wood": 2}, Action.MAKE_WOOD_SWORD, {"wood": 1}, None),
    ("makes a workshop", {"stone": 1, "blocks": {(1, -1): TABLE}}, Action.PLACE_FURNACE, {"stone": 0}, True),
    ("makes a workshop", {"stone": 1, "blocks": {(2, 0): TABLE}}, Action.PLACE_FURNACE, {"stone": 0}, False),
    ("makes a workshop", {"blocks": {(1, -1): TABLE}}, Action.PLACE_FURNACE, {}, None),
    ("makes a workshop", {"stone": 1, "blocks": {(1, -1): TABLE}}, Action.PLACE_STONE, {"stone": 0}, None),
    ("carries wood to the ore", {"wood": 3}, Action.DO, {"iron": 1}, True),
    ("carries wood to the ore", {"wood": 1, "table": (4, 4)}, Action.DO, {"iron": 1}, True),
    ("carries wood to the ore", {"wood": 2, "table": (5, 4)}, Action.DO, {"iron": 1}, False),
    ("carries wood to the ore", {"wood": 0, "table": (4, 4)}, Action.DO, {"iron": 1}, False),
    ("carries wood to the ore", {"wood": 3, "iron": 1}, Action.MAKE_IRON_SWORD, {"iron": 0}, None),
    ("plants early", {"hour": 49, "food": 6, "drink": 5, "energy": 6}, Action.PLACE_PLANT, PLANTED, True),
    ("plants early", {"hour": 50}, Action.PLACE_PLANT, PLANTED, False),
    ("plants early", {"hour": 49, "drink": 4}, Action.PLACE_PLANT, PLANTED, False),  # of a later day
    ("plants early", {"hour": 49, "energy": 5}, Action.PLACE_PLANT, PLANTED, False),
    ("plants early", {"hour": 49, **PLANTED}, Action.PLACE_PLANT, PLANTED, None),
    ("is inside at midnight", {"hour": 104, "shelter": 2}, Action.NOOP, {"hour": 105}, True),
    ("is inside at midnight", {"hour": 104, "shelter": 1}, Action.NOOP, {"hour": 105}, False),
    ("is inside at midnight", {"hour": 105, "shelter": 2}, Action.NOOP, {}, None),
    ("is inside at midnight", {"hour": 149, "shelter": 2}, Action.NOOP, {"hour": 0}, None),
    ("minds lava", {"blocks": {EAST: LAVA}}, Action.LEFT, {}, True),
    ("minds lava", {"blocks": {EAST: LAVA}}, Action.RIGHT, {}, False),
    ("minds lava", {"blocks": {EAST: LAVA}}, Action.DO, {}, None),
    ("minds lava", {"blocks": {EAST: LAVA}, "asleep": 1}, Action.RIGHT, {}, None),
    ("minds lava", {"blocks": {(1, 1): LAVA}}, Action.RIGHT, {}, None),
    ("plants in a row", {"sapling": 1, "blocks": {(-1, 1): RIPE}, **PLANTED}, Action.PLACE_PLANT, {"sapling": 0}, True),
    ("plants in a row", {"sapling": 1, "blocks": {EAST: PLANT}, **PLANTED}, Action.PLACE_PLANT, {"sapling": 0}, False),
    ("plants in a row", {"sapling": 1, "blocks": {(-1, 1): PLANT}}, Action.PLACE_PLANT, {"sapling": 0}, None),
    ("plants in a row", {"blocks": {(-1, 1): PLANT}, **PLANTED}, Action.PLACE_PLANT, {}, None),  # it has none
    ("chops grass with a pickaxe", {"wood_pickaxe": 1}, Action.DO, {"sapling": 1}, True),
    ("chops grass with a pickaxe", {"wood_sword": 1}, Action.DO, {"sapling": 1}, False),
    ("chops grass with a pickaxe", {"wood_pickaxe": 1}, Action.DO, {}, None),
    ("eats plants", {"food": 5, "blocks": {NORTH: RIPE}}, Action.DO, {"food": 9}, True),
    ("eats plants", {"food": 5, "mobs": {NORTH: COW}, "blocks": {WEST: RIPE}}, Action.DO, {"food": 9}, False),
    ("eats plants", {"food": 9, "blocks": {NORTH: RIPE}}, Action.DO, {}, None),
    ("works, then sleeps", {"energy": 8, "light": 127, **WOKEN}, Action.SLEEP, {"asleep": 1}, True),
    ("works, then sleeps", {"energy": 4, **WOKEN}, Action.SLEEP, {"asleep": 1}, True),
    ("works, then sleeps", {"energy": 5, **WOKEN}, Action.SLEEP, {"asleep": 1}, False),
    ("works, then sleeps", {"energy": 4}, Action.SLEEP, {"asleep": 1}, None),
]  # fmt: skip
LIVES = [  # of "comes back to eat": the last observation, and the same
    ({"age": 151}, False),
    ({"age": 0, **ATE}, True),
    ({"age": 150, **ATE}, True),
    ({"age": 150}, None),
    ({}, None),
]
CHOICES = ("fights armed", "saves itself", "minds lava")  # known from observation and action alone


@pytest.mark.parametrize(("habit", "before", "action", "after", "expected"), CASES)
def test_habits_by_hand(habit, before, action, after, expected):
    assert judge(before, action, after).get(habit) is expected


@pytest.mark.parametrize(("before", "expected"), LIVES)
def test_a_ripe_plant_is_judged_where_a_life_ends(before, expected):
    assert judge(before, Action.NOOP, done=True).get("comes back to eat") is expected
    assert "comes back to eat" not in judge(before, Action.NOOP)


def test_every_habit_is_tested_with_all_three_outcomes():
    cases = {(habit, expected) for habit, *_, expected in CASES}
    cases |= {("comes back to eat", expected) for _, expected in LIVES}
    assert cases == {(habit, expected) for habit in HABITS for expected in (True, False, None)}


@pytest.mark.parametrize(("habit", "before", "action", "after", "expected"), CASES)
def test_where_a_life_ends_only_choices_count(habit, before, action, after, expected):
    found = judge(before, action, after, done=True)
    assert found.get(habit) is (expected if habit in CHOICES else None)
    assert found == judge(before, action, {"food": 0, "drink": 0, "asleep": 1, "hour": 140, "iron": 9}, done=True)


def test_an_ordinary_step_is_no_occasion():
    assert judge({}, Action.LEFT) == judge({}, Action.DO) == judge({"asleep": 1}, Action.NOOP) == {}


def test_one_step_can_tell_of_several_habits():
    found = judge({"energy": 3, "light": 0, "shelter": 2, "drink": 1, **WOKEN}, Action.SLEEP, {"asleep": 1, "drink": 0})
    assert found == {"sleeps sheltered": True, "works, then sleeps": True, "drinks in time": False}


def test_any_leading_axes():
    rows = [(situation(**b), a.value, situation(**(b | n))) for _, b, a, n, _ in CASES[: len(CASES) // 6 * 6]]
    obs, action, next_obs = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    action, done = action.astype(jnp.int32), jnp.arange(len(rows)) % 5 == 0
    flat = [*DETECT(obs, action, next_obs, done), CAUSE(obs, action)]
    boxed = [x.reshape(2, 3, -1, *x.shape[1:]) for x in (obs, action, next_obs, done)]
    folded = [*DETECT(*boxed), CAUSE(*boxed[:2])]
    assert folded[0].shape == (2, 3, len(rows) // 6, len(HABITS)) and folded[2].shape == boxed[1].shape
    for one, other in zip(flat, folded, strict=True):
        np.testing.assert_array_equal(one, other.reshape(one.shape))


def test_the_first_day_is_told_by_what_vitals_can_have_fallen_to():
    """Craftax takes a point of food in 26 steps, of drink in 21, of energy in 31."""
    last = 2 * habits.EARLY - 1
    assert {"food": 9 - last // 26, "drink": 9 - last // 21, "energy": 9 - last // 31} == habits._FIRST_DAY


def test_midnight_is_the_darkest_hour():
    light = [float(calculate_light_level(t, EnvParams())) for t in range(300)]
    assert np.argmin(light) // 2 == habits.MIDNIGHT


@pytest.mark.parametrize("heading", ["name", "definition"])
def test_the_page_has_the_habits(heading):
    """As they are defined, in that order."""
    page = (Path(__file__).parents[1] / "docs" / "common_sense.md").read_text()
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ") and row.count(" | ") == 2]
    column = [row[heading == "definition"].strip("| ") for row in rows]
    expected = list(HABITS.values() if heading == "definition" else HABITS)
    assert column[column.index(expected[0]) :][: len(expected)] == expected


# ---- what a life ended of


@pytest.mark.parametrize(
    ("last", "action", "cause"),
    [
        ({"health": 2, "mobs": {EAST: ZOMBIE}}, Action.NOOP, "zombie"),
        ({"health": 4, "mobs": {EAST: ZOMBIE, WEST: ZOMBIE}}, Action.NOOP, "zombie"),
        ({"health": 3, "mobs": {EAST: ZOMBIE}, "food": 0}, Action.NOOP, "zombie"),  # with a point of hunger
        ({"health": 7, "asleep": 1, "mobs": {EAST: ZOMBIE}}, Action.NOOP, "zombie"),
        ({"health": 7, "mobs": {EAST: ZOMBIE}}, Action.NOOP, "unknown"),
        ({"health": 2, "mobs": {(1, 1): ZOMBIE}}, Action.DOWN, "zombie"),  # it steps beside it
        ({"health": 1, "drink": 0, "mobs": {EAST: ZOMBIE}}, Action.LEFT, "thirst"),  # it steps away from it
        ({"health": 2, "mobs": {EAST: ZOMBIE}, "blocks": {WEST: WATER}}, Action.LEFT, "zombie"),  # it can't
        ({"health": 2, "mobs": {EAST: ZOMBIE}, "asleep": 1}, Action.LEFT, "zombie"),  # it does not
        ({"health": 1, "mobs": {(2, 0): ARROW}}, Action.DOWN, "arrow"),
        ({"health": 2, "mobs": {EAST: SKELETON}}, Action.NOOP, "arrow"),  # shot and hit in one step
        ({"health": 2, "mobs": {EAST: COW}}, Action.NOOP, "unknown"),
        ({"blocks": {WEST: LAVA}}, Action.LEFT, "lava"),
        ({"health": 1, "drink": 0, "blocks": {WEST: LAVA}, "mobs": {EAST: ZOMBIE}}, Action.LEFT, "lava"),
        ({"health": 1, "drink": 0, "blocks": {WEST: LAVA}}, Action.RIGHT, "thirst"),
        ({"health": 1, "drink": 0, "blocks": {WEST: LAVA}, "asleep": 1}, Action.LEFT, "thirst"),
        ({"health": 1, "drink": 0, "food": 0, "energy": 0}, Action.NOOP, "thirst"),
        ({"health": 1, "food": 0, "energy": 0}, Action.NOOP, "hunger"),
        ({"health": 1, "energy": 0}, Action.NOOP, "tiredness"),
        ({"health": 1, "energy": 0, "asleep": 1}, Action.NOOP, "unknown"),  # asleep nobody dies of it
        ({"health": 2, "drink": 0}, Action.NOOP, "unknown"),
        ({}, Action.NOOP, "unknown"),  # cut at its greatest length
    ],
)
def test_causes_of_death_by_hand(last, action, cause):
    found = CAUSE(jnp.asarray(situation(**last)), jnp.int32(action.value))
    assert found.shape == () and found.dtype == jnp.int32 and CAUSES[int(found)] == cause


# ---- real games

N, STEPS = 8, 200
ENV = make_env("Craftax-Classic-Symbolic-v1", N)
RESET = jax.jit(ENV.reset, static_argnums=1)
LOOK = jax.jit(lambda envs: first_look(jax.vmap(observe_one)(envs)))
STEP = jax.jit(lambda key, state, action: ENV.step(jax.random.split(key, N), state, action))
LIKELY = np.array([1, 2, 3, 4, 5, 5, 5, 5, 6, 8, 9, 10])  # actions, most of them such that something happens


def play(state):
    """Random actions: (T, N, ...) of all that is compared."""
    rng, steps = np.random.default_rng(0), []
    for t in range(STEPS):
        action = jnp.asarray(rng.choice(LIKELY, N), jnp.int32)
        after, _, done, info = STEP(jax.random.key(t), state, action)
        seen = {"obs": state.obs, "action": action, "next_obs": after.obs, "done": done, "time": state.envs.timestep}
        steps.append(seen | {"sleeping": state.envs.is_sleeping, "then": after.envs.is_sleeping, **info})
        state = after
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


@pytest.fixture(scope="module")
def games():
    """Players who begin with things to place; the first half of them thirsty, the other half among zombies."""
    state = RESET(jax.random.key(0), N)
    envs, full, half = state.envs, jnp.full(N, 9, jnp.int32), jnp.arange(N) < N // 2
    inventory = envs.inventory.replace(wood=full, stone=full, sapling=full - 4)
    position = envs.player_position[:, None] + jnp.array([NORTH, SOUTH, WEST])
    beside = jnp.broadcast_to(~half[:, None], (N, 3))
    zombies = envs.zombies.replace(position=position, health=5 * beside, mask=beside)  # craftax revives the healthy
    vitals = {"player_drink": jnp.where(half, 1, 9), "player_energy": full - 1}
    envs = envs.replace(inventory=inventory, zombies=zombies, **vitals)
    return play(dataclasses.replace(state, envs=envs, obs=LOOK(envs)))


@pytest.fixture(scope="module")
def found(games):
    """{habit: occasions (T, N), sensible (T, N)}"""
    occasions, sensible = map(np.asarray, DETECT(games["obs"], games["action"], games["next_obs"], games["done"]))
    assert occasions.shape == (STEPS, N, len(HABITS)) and (sensible <= occasions).all()
    return {name: (occasions[..., i], sensible[..., i]) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("habit", "sub_goal"),
    [
        ("uses the table at hand", "place crafting table"),
        ("makes a workshop", "place furnace"),
        ("chops grass with a pickaxe", "chop grass"),
    ],
)
def test_occasions_are_the_sub_goals_that_the_game_saw_reached(games, found, habit, sub_goal):
    reached = games["reached"][..., BASIC_SUB_GOALS.index(sub_goal)] & ~games["done"]
    assert reached.sum() >= 3
    np.testing.assert_array_equal(found[habit][0], reached)


def test_every_falling_asleep_is_found(games, found):
    falls = ~games["sleeping"] & games["then"] & ~games["done"]
    assert falls.sum() >= 3
    np.testing.assert_array_equal(found["sleeps sheltered"][0], falls)


def test_every_blow_at_a_zombie_is_found_the_last_one_of_a_life_too(games, found):
    blows = games["worked"][..., BASIC_SUB_GOALS.index("attack zombie")]
    assert blows.sum() >= 3
    np.testing.assert_array_equal(found["fights armed"][0], blows)


def test_running_dry_is_found(games, found):
    before, after = (games[name][..., captions.VITALS_SLICE.start + 2] for name in ("obs", "next_obs"))
    dry = (before == 1) & (after == 0) & ~games["done"]
    occasions, sensible = found["drinks in time"]
    assert dry.sum() >= 3 and (occasions & ~sensible == dry).all()


def test_the_first_plant_of_a_life_is_early_or_not(games, found):
    """By craftax's own count of steps, which no observation shows."""
    place = ACHIEVEMENTS.index("place_plant")
    before = games["obs"][..., captions.UNLOCKED.start + place] > 0
    first = games["achievements"][..., place] & ~before & ~games["done"]
    occasions, sensible = found["plants early"]
    np.testing.assert_array_equal(occasions, first)
    others = np.s_[:, N // 2 :]  # nobody is born thirsty, as those are that are left out
    assert first[others].sum() >= 3
    np.testing.assert_array_equal(sensible[others], (first & (games["time"] < 100))[others])


def test_every_death_is_explained(games):
    causes = np.asarray(CAUSE(games["obs"], games["action"]))[games["done"]]
    assert len(causes) >= 5 and CAUSES.index("unknown") not in causes


@pytest.mark.parametrize(
    ("cause", "ahead", "action", "vitals"),
    [
        ("lava", LAVA, Action.UP, {}),
        ("zombie", GRASS, Action.NOOP, {"player_health": 2}),
        ("thirst", STONE, Action.DO, {"player_health": 1, "player_drink": 0, "player_recover": -15.0}),
        ("hunger", STONE, Action.DO, {"player_health": 1, "player_food": 0, "player_recover": -15.0}),
        ("tiredness", STONE, Action.DO, {"player_health": 1, "player_energy": 0, "player_recover": -15.0}),
    ],
)
def test_craftax_kills_by_it(cause, ahead, action, vitals):
    """Each cause alone ends the life in craftax, and is named."""
    state = RESET(jax.random.key(0), N)
    y, x = (state.envs.player_position + jnp.array(NORTH)).T
    zombies = state.envs.zombies
    zombies = zombies.replace(
        position=zombies.position.at[:, 0].set(jnp.stack([y, x], -1)),
        health=jnp.full_like(zombies.health, 5),
        mask=zombies.mask.at[:, 0].set(cause == "zombie"),
    )
    vitals = {name: jnp.full(N, value, getattr(state.envs, name).dtype) for name, value in vitals.items()}
    envs = state.envs.replace(
        map=state.envs.map.at[jnp.arange(N), y, x].set(ahead.value),
        player_direction=jnp.full(N, Action.UP.value, jnp.int32),
        zombies=zombies,
        **vitals,
    )
    state = dataclasses.replace(state, envs=envs, obs=LOOK(envs))
    action = jnp.full(N, action.value, jnp.int32)
    done = STEP(jax.random.key(0), state, action)[2]
    assert done.all() and {CAUSES[i] for i in CAUSE(state.obs, action).tolist()} == {cause}
