"""The original Crafter, seen as craftax is: bytes, places, actions, plants, new lives. Hand-made worlds and play."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_classic.constants import DIRECTIONS, Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvParams, EnvState, Inventory, Mobs
from craftax.craftax_classic.game_logic import calculate_light_level

from envs.crafter import captions
from envs.crafter.env import first_look, observe_one
from envs.crafter.original import BLOCKS, OriginalCrafter, view_of
from envs.crafter.vocabulary import ACHIEVEMENTS, ACTIONS, FACTS, INVENTORY, KINDS, VITALS
from envs.nearest import FAR, IN_VIEW, REMEMBERED

pytest.importorskip("crafter")
from crafter import constants, objects

FACTS_OF = jax.jit(captions.facts)
FIRST_LOOK = jax.jit(first_look)
OBSERVE_CRAFTAX = jax.jit(observe_one)
LEFT, RIGHT, UP, DOWN, DO, NOOP = (ACTIONS.index(name) for name in ("left", "right", "up", "down", "do", "noop"))
AHEAD = {LEFT: (-1, 0), RIGHT: (1, 0), UP: (0, -1), DOWN: (0, 1)}  # dx, dy


@pytest.fixture(scope="module")
def games():
    return OriginalCrafter(1, seed=5)


@pytest.fixture
def game(games, monkeypatch):
    """A game in the middle of a meadow, with nobody on it and nobody to come, at the dawn of a life, facing south."""
    env = games.envs[0]
    env._world.reset(seed=0)
    env._world._mat_map[:] = env._world._mat_ids["grass"]
    env._player = objects.Player(env._world, (32, 32))
    env._world.add(env._player)
    env._step, env._unlocked, env._last_health = 0, set(), env._player.health
    env._update_time()
    monkeypatch.setattr(env, "_balance_chunk", lambda *of_world: None)
    games.obs = np.asarray(FIRST_LOOK(games._views()))
    return env


def put(env, dx, dy, what, *rest):
    """A material, or a creature of that class, so many steps from the player."""
    x, y = env._player.pos + (dx, dy)
    if isinstance(what, str):
        env._world[x, y] = what
        return None
    thing = what(env._world, (x, y), *rest)
    env._world.add(thing)
    return thing


def look(env):
    """(218,) what a player sees who has just been born into this state."""
    return np.asarray(FIRST_LOOK(view_of(env)[None]))[0]


def facts_of(obs):
    return dict(zip(FACTS, np.asarray(FACTS_OF(jnp.asarray(obs))).tolist(), strict=True))


def place_of(obs, kind):
    dy, dx, how = obs[captions.PLACES].reshape(-1, 3)[KINDS.index(kind)].astype(int)
    return (dx - FAR, dy - FAR, how) if how else None


def play(games, *actions):
    """The last step's reward, done and achievements by name."""
    for act in actions:
        act = ACTIONS.index(act) if isinstance(act, str) else act
        reward, done, unlocked = games.step(np.array([act]))
    return float(reward[0]), bool(done[0]), {name for name, had in zip(ACHIEVEMENTS, unlocked[0], strict=True) if had}


# ---- what is seen


def test_names_are_those_of_the_game():
    assert set(constants.achievements) == set(ACHIEVEMENTS)
    assert {name.replace("_", " ") for name in constants.items} == {*INVENTORY, *VITALS}
    assert set(constants.materials) <= set(BLOCKS)


def test_a_view_by_hand(game):
    """Everything in a place of its own, so that no axis and no order can be mixed up."""
    for column, material in enumerate(constants.materials[:9]):
        put(game, column - 4, -3, material)  # the upper row
    for row, material in enumerate(constants.materials[9:]):
        put(game, -4, row, material)
    put(game, 1, 2, objects.Zombie, game._player)
    put(game, 2, 1, objects.Cow)
    put(game, 3, 3, objects.Skeleton, game._player)
    put(game, -1, 0, objects.Arrow, (1, 0))
    put(game, 0, -1, objects.Plant)
    put(game, 0, 1, objects.Plant).grown = 301
    put(game, 5, 0, objects.Cow), put(game, 0, 4, objects.Cow)  # out of view
    view = view_of(game)
    blocks, mobs = view[captions.BLOCKS].reshape(7, 9), view[captions.MOBS].reshape(7, 9)
    expected = np.full((7, 9), BlockType.GRASS.value)
    expected[0] = [BlockType[name].value for name in "WATER GRASS STONE PATH SAND TREE LAVA COAL IRON".split()]
    expected[3:6, 0] = [BlockType[name].value for name in "DIAMOND CRAFTING_TABLE FURNACE".split()]
    expected[2, 4], expected[4, 4] = BlockType.PLANT.value, BlockType.RIPE_PLANT.value
    np.testing.assert_array_equal(blocks, expected)
    there = {(int(row), int(col)): int(mobs[row, col]) for row, col in zip(*np.nonzero(mobs), strict=True)}
    assert there == {(5, 5): 1, (4, 6): 2, (6, 7): 4, (3, 3): 8}
    facts, obs = facts_of(look(game)), look(game)
    assert all(facts[f"{sight} in view"] for sight in ("tree", "diamond", "ripe plant", "zombie", "arrow", "cow"))
    assert facts["zombie near"] and not facts["table in reach"]
    assert place_of(obs, "cow") == (2, 1, IN_VIEW) and place_of(obs, "diamond") == (-4, 0, IN_VIEW)
    assert place_of(obs, "tree") == (1, -3, IN_VIEW)
    assert "Facing: ripe plant." in captions.to_text(obs)


def test_inventory_vitals_sleep_and_light(game):
    for n, name in enumerate((*INVENTORY, *VITALS)):
        game._player.inventory[name.replace(" ", "_")] = n % 10
    game._player.sleeping = True
    game._player.achievements |= {"eat_cow": 3, "make_iron_sword": 1}
    game._world.daylight = 0.4
    view = view_of(game)
    assert view[captions.NUMBERS].tolist() == [n % 10 for n in range(16)]
    assert view[captions.LIGHT] == 102 and view[captions.ASLEEP] == 1
    assert np.flatnonzero(view[captions.UNLOCKED]).tolist() == [2, 21]


def test_daylight_is_that_of_craftax(game):
    for step in range(300):
        game._step = step
        game._update_time()
        expected = float(calculate_light_level(step, EnvParams())) * 255
        assert abs(int(view_of(game)[captions.LIGHT]) - expected) <= 0.5 + 1e-3


def craftax_state(env):
    """The same situation in craftax, converted whole."""
    world, player = env._world, env._player
    names = np.array([BLOCKS[world._mat_names[i]] for i in range(len(world._mat_names))])
    blocks = names[world._mat_map].T  # craftax counts rows first
    things = {"Zombie": [], "Cow": [], "Skeleton": [], "Arrow": []}
    for thing in world.objects:
        x, y = thing.pos
        if isinstance(thing, objects.Plant):
            blocks[y, x] = BlockType.RIPE_PLANT.value if thing.grown > 300 else BlockType.PLANT.value
        elif thing is not player:
            things[type(thing).__name__].append((y, x))
    facing = next(act for act, ahead in AHEAD.items() if ahead == tuple(player.facing))
    items = {name: player.inventory[name] for name in Inventory.__dataclass_fields__}
    nothing = dict.fromkeys(EnvState.__dataclass_fields__)
    return EnvState(**nothing | {
        "map": jnp.asarray(blocks), "player_position": jnp.array(player.pos[::-1]), "player_direction": facing,
        "inventory": Inventory(**items), "is_sleeping": player.sleeping, "timestep": env._step,
        "player_health": player.health, "player_food": player.inventory["food"],
        "player_drink": player.inventory["drink"], "player_energy": player.inventory["energy"],
        "zombies": mobs_at(things["Zombie"]), "cows": mobs_at(things["Cow"]),
        "skeletons": mobs_at(things["Skeleton"]), "arrows": mobs_at(things["Arrow"]),
        "light_level": calculate_light_level(env._step, EnvParams()),
        "achievements": jnp.array([player.achievements[name] > 0 for name in ACHIEVEMENTS]),
    })  # fmt: skip


def mobs_at(places, most=99):
    position = np.zeros((most, 2), int)
    position[: len(places)] = np.array(places).reshape(-1, 2)
    return Mobs(jnp.asarray(position), None, jnp.arange(most) < len(places), None)


def test_the_same_situation_in_craftax_is_the_same_bytes():
    """Real worlds with their creatures, seen from many places, the corners of the world too."""
    games = OriginalCrafter(1, seed=8)
    env, rng, seen = games.envs[0], np.random.default_rng(0), []
    for n, thing in enumerate(env._world.objects[1:40]):
        if env._world[thing.pos + (0, 1)] == ("grass", None):
            plant = objects.Plant(env._world, thing.pos + (0, 1))
            plant.grown = 300 + n % 2
            env._world.add(plant)
    corners = [(x, y) for x in (0, 63) for y in (0, 63)]
    places = [tuple(thing.pos + (1, 0)) for thing in env._world.objects[1:40]]  # beside creatures
    for x, y in corners + [(x, y) for x, y in places if x < 64] + rng.integers(0, 64, (20, 2)).tolist():
        if env._world[x, y][1] is not None:
            continue
        env._world.move(env._player, (x, y))
        env._player.facing = list(AHEAD.values())[rng.integers(4)]
        env._player.inventory = {name: int(rng.integers(10)) for name in env._player.inventory}
        env._player.achievements = {name: int(rng.integers(2)) for name in ACHIEVEMENTS}
        env._player.sleeping, env._step = bool(rng.integers(2)), int(rng.integers(1000))
        env._update_time()
        seen.append(view_of(env))
        np.testing.assert_array_equal(seen[-1], OBSERVE_CRAFTAX(craftax_state(env)))
    kinds = np.unique(np.stack(seen)[:, captions.MOBS])
    assert len(seen) > 30 and {1, 2}.issubset(kinds) and BlockType.OUT_OF_BOUNDS.value in seen[0]
    assert {15, 16}.issubset(np.unique(np.stack(seen)[:, captions.BLOCKS]))


# ---- what is done


def test_actions_go_by_their_names(games, game):
    assert [act.value for act in Action] == list(range(len(ACTIONS)))
    for act, name in enumerate(ACTIONS):
        play(games, act)
        assert game._player.action == ("move_" + name if act in AHEAD else name.replace(" ", "_"))


@pytest.mark.parametrize("act", AHEAD)
def test_steps_directions_and_remembered_places(games, game, act):
    dx, dy = AHEAD[act]
    put(game, -2 * dx + dy, -2 * dy + dx, "table")  # behind, and a step aside
    play(games, *[act] * 4)
    (obs,) = games.observe()
    assert tuple(game._player.pos) == (32 + 4 * dx, 32 + 4 * dy)
    assert tuple(DIRECTIONS[obs[captions.DIRECTION] + 1].tolist()) == (dy, dx)
    assert place_of(obs, "crafting table") == (-6 * dx + dy, -6 * dy + dx, REMEMBERED)
    assert facts_of(obs)["table close"] and not facts_of(obs)["crafting table in view"]
    assert obs[captions.HOUR] == 2


def test_a_workshop(games, game):
    """Places and tools, their achievements, and what is left."""
    game._player.inventory |= {"wood": 9, "stone": 8, "coal": 2, "iron": 2}
    assert play(games, "place table") == (1.0, False, {"place_table"})
    done = play(games, "make wood pickaxe", "make stone pickaxe", "make wood sword", "make stone sword", "right")[2]
    tools = {"make_wood_pickaxe", "make_stone_pickaxe", "make_wood_sword", "make_stone_sword"}
    assert done == {"place_table"} | tools
    reward, _, done = play(games, "place furnace", "make iron pickaxe")
    assert reward == 1.0 and done == {"place_table", "place_furnace", "make_iron_pickaxe"} | tools
    (obs,) = games.observe()
    # two wood for the table, one for each tool; four stones for the furnace, none for iron tools
    assert obs[captions.INVENTORY_SLICE].tolist() == [2, 2, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0]
    facts = facts_of(obs)
    assert facts["table in reach"] and facts["furnace in reach"] and facts["unlocked make iron pickaxe"]


def test_rewards_are_the_game_s(games, game):
    put(game, 0, 1, "tree")
    assert play(games, DO)[0] == 1.0
    put(game, 0, 1, "tree")
    assert play(games, DO) == (0.0, False, {"collect_wood"})
    game._player.health -= 2
    assert play(games, NOOP)[0] == pytest.approx(-0.2)


def test_plants_age_ripen_are_eaten_and_age_again(games, game):
    game._player.inventory["sapling"] = 2
    _, _, done = play(games, "place plant")
    assert done == {"place_plant"} and games.observe()[0, captions.PLANT_AGE] == 1
    facts = facts_of(games.observe()[0])
    assert facts["plant ripening"] and facts["plant in view"] and facts["sapling >= 1"]
    play(games, *[NOOP] * 9)
    assert games.observe()[0, captions.PLANT_AGE] == 1 + 2  # eight of ten steps
    plant = game._world[32, 33][1]
    assert plant.grown == 9
    plant.grown = 300
    play(games, NOOP)
    assert facts_of(games.observe()[0])["ripe plant in view"]
    game._player.inventory["food"] = 3
    _, _, done = play(games, DO)
    (obs,) = games.observe()
    assert done == {"place_plant", "eat_plant"} and obs[captions.VITALS_SLICE][1] == 7
    assert obs[captions.PLANT_AGE] == 0 and not facts_of(obs)["ripe plant in view"]
    play(games, UP, "place plant")
    assert games.observe()[0, captions.PLANT_AGE] == 1


def test_a_plant_that_was_trampled_is_forgotten_once_that_is_seen(games, game):
    game._player.inventory["sapling"] = 1
    play(games, "place plant", *[UP] * 6)
    plant = game._world[32, 33][1]
    game._world.remove(plant)
    play(games, NOOP)
    (obs,) = games.observe()
    assert obs[captions.PLANT_AGE] > 0 and place_of(obs, "plant") == (0, 7, REMEMBERED)
    play(games, *[DOWN] * 5)
    (obs,) = games.observe()
    assert obs[captions.PLANT_AGE] == 0 and place_of(obs, "plant") is None


def test_walls_and_shelter(games, game):
    for dx, dy in ((-1, 0), (1, 0), (0, -1)):
        put(game, dx, dy, "stone")
    assert look(game)[captions.SHELTER] == captions.ONE_STONE
    game._player.inventory["stone"] = 1
    play(games, "place stone")
    assert facts_of(games.observe()[0])["enclosed"]


def test_pictures_are_the_game_s_and_change_nothing(games, game):
    put(game, 1, 0, "water")
    game._world.daylight = 0.1  # darkness is drawn by lot
    before = game._world.random.get_state()[1:3]
    night, again = games.picture(0, 90), games.picture(0, 90)
    np.testing.assert_array_equal(night, again)
    np.testing.assert_array_equal(game._world.random.get_state()[1], before[0])
    assert game._world.random.get_state()[2] == before[1]
    game._world.daylight = 1.0
    day = games.picture(0, 90)
    assert day.shape == (90, 90, 3) and day.dtype == np.uint8 and games.picture(0, 100).shape == (100, 100, 3)
    water, grass = day[30:40, 50:60].mean((0, 1)), day[30:40, 30:40].mean((0, 1))
    assert water[2] > water[1] and grass[1] > grass[2]  # blue in the east, green in the west


# ---- lives


def test_a_new_life_knows_nothing_of_the_old_one(games, game):
    game._player.inventory |= {"sapling": 1, "wood": 5}
    play(games, "place plant", UP, "place table", *[RIGHT] * 6)
    assert place_of(games.observe()[0], "crafting table") == (-6, -1, REMEMBERED)
    put(game, 1, 0, "lava")
    reward, done, unlocked = play(games, RIGHT)
    assert done and reward == pytest.approx(-0.9) and unlocked == {"place_plant", "place_table"}
    (obs,) = games.observe()
    np.testing.assert_array_equal(obs, look(game))
    assert obs[captions.UNLOCKED].sum() == obs[captions.PLANT_AGE] == obs[captions.HOUR] == 0
    assert obs[captions.VITALS_SLICE].tolist() == [9] * 4 and place_of(obs, "crafting table") is None
    assert game._episode == 2 and len(set(game._world._mat_map.ravel())) > 4


def walk(seed, steps, length, n=2):
    """Random actions: observations (T + 1, N, 218), rewards, dones, achievements, maps of the games as they began."""
    games, rng = OriginalCrafter(n, seed, length), np.random.default_rng(0)
    maps = [env._world._mat_map.tobytes() for env in games.envs]
    all_obs, played = [games.observe()], []
    for _ in range(steps):
        played.append(games.step(rng.integers(0, len(ACTIONS), n)))
        all_obs.append(games.observe())
        maps += [games.envs[i]._world._mat_map.tobytes() for i in np.flatnonzero(played[-1][1])]
    return np.stack(all_obs), *(np.stack(x) for x in zip(*played, strict=True)), maps


@pytest.fixture(scope="module")
def walked():
    return walk(seed=1, steps=300, length=140)


def test_300_random_steps(walked):
    obs, reward, done, unlocked, maps = walked
    assert obs.shape == (301, 2, 218) and obs.dtype == np.uint8
    assert reward.shape == done.shape == (300, 2) and reward.dtype == np.float32 and done.dtype == bool
    assert unlocked.shape == (300, 2, 22) and unlocked.dtype == bool
    assert done.sum() >= 4 and len(set(maps)) == len(maps) == 2 + done.sum()  # each world is played once
    assert obs[..., captions.BLOCKS].max() <= 16 and obs[..., captions.MOBS].max() <= 8
    assert obs[..., captions.NUMBERS].max() <= 9 and obs[..., captions.DIRECTION].max() <= 3
    now = np.zeros(2, int)
    for before, after, ended, had in zip(obs, obs[1:], done, unlocked, strict=False):
        now = np.where(ended, 0, now + 1)
        np.testing.assert_array_equal(after[:, captions.HOUR], now % 300 // 2)
        known = after[:, captions.UNLOCKED] > 0
        np.testing.assert_array_equal(known[~ended], had[~ended])
        assert not known[ended].any() and (had >= before[:, captions.UNLOCKED]).all()
        how = after[:, captions.PLACES].reshape(2, -1, 3)[..., 2]
        assert (how[ended] != REMEMBERED).all()
    gained = np.array([[had.sum() for had in row] for row in unlocked])
    assert gained.max() > 1 and reward.max() <= 1.1 + 1e-6
    # at most the length, unless a player dies before
    ends = [np.flatnonzero(done[:, i]) for i in range(2)]
    assert all(np.diff([-1, *end]).max() <= 140 for end in ends)


def test_a_seed_repeats_a_game_and_another_does_not(walked):
    """Also where creatures are taken away, which the game draws from Python sets."""
    first, second = (walk(4, 220, 10_000, n=1) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not set(first[-1]) & set(walked[-1])


def test_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ValueError, match="pip install crafter"):
        OriginalCrafter(1, seed=0)
