"""Common sense in play: habits of a sensible player, and what lives end of. Pure JAX, read from observations alone.

A habit is judged on *occasions*. Each is one step, known by the observation before it, the action, and the observation
after it, which is of no use where a life ends: it is the first one of the next life. What the habits leave out, and
why, is in docs/common_sense.md; the layout of observations in `envs.crafter.captions`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_classic.constants import Action, BlockType

from envs.crafter import captions
from envs.crafter.captions import CENTRE, COLS, ROWS
from envs.crafter.vocabulary import ACHIEVEMENTS, CLOSE, FACTS, INVENTORY, NEAR, VITALS

URGENT = 2  # drink or food down to this is urgent: it runs out in 42 or 52 steps
HURT = 3  # health: the second blow of a zombie kills
EARLY = 50  # hours, of two steps each
MIDNIGHT = 105  # the hour at which it is darkest

# What is counted, in the order of the axis H of `detect`.
HABITS = {
    "sleeps sheltered": "of the times that it falls asleep, how often it is enclosed",
    "drinks in time": f"of the times that drink runs out, or rises above {URGENT} before it does, how often it rises",
    "eats in time": f"of the times that food runs out, or rises above {URGENT} before it does, how often it rises",
    "fights armed": "of the blows at a zombie, how many are struck with a sword in hand",
    "saves itself": f"of the steps awake and not enclosed, with health {HURT} or less and a zombie within {NEAR}, how "
    "many lead away from it, strike it with a sword, or put a stone in its way or where it encloses the player",
    "uses the table at hand": f"of the tables that it places, how many with no other one known within {CLOSE} steps",
    "makes a workshop": "of the furnaces that it places, how many with a table in reach",
    "carries wood to the ore": "of the times that it mines iron, how often it has the wood for a tool: "
    f"1 with a table known within {CLOSE} steps, else 3",
    "plants early": f"of the first plants of a life, how many are placed in its first {2 * EARLY} steps",
    "comes back to eat": "of the lives that end with a plant ripe by now or after eating one, in how many it ate one",
    "minds lava": "of the moves with lava beside the player, how many do not lead into lava",
    "is inside at midnight": "of the nights that it lives to the darkest hour of, in how many it is enclosed then",
    "plants in a row": "of the plants that it places after its first one, how many are beside another one",
    "chops grass with a pickaxe": "of the saplings that it collects, how many with a wood pickaxe in hand",
    "eats plants": "of the meals that raise food, how many are plants",
    "works, then sleeps": "of the times that it falls asleep after its first nap, how often it is dark or energy low",
}
CAUSES = ("zombie", "arrow", "lava", "thirst", "hunger", "tiredness", "unknown")

# Two (...) bool by the name of a habit: is the step an occasion, and would it be sensible then?
Findings = dict[str, tuple[jax.Array, jax.Array]]

_NUMBERS = (*INVENTORY, *VITALS)
_SWORDS = np.array([captions.NUMBERS.start + _NUMBERS.index(f"{kind} sword") for kind in ("wood", "stone", "iron")])
_ZOMBIE, _SKELETON, _ARROW = 1, 4, 8  # bits of captions.MOBS
_IN_THE_WAY = 1 | 2 | 4  # of zombies, cows and skeletons; an arrow stops nobody
_WALKABLE = tuple(BlockType[name].value for name in ("GRASS", "WOOD", "PATH", "SAND"))
_STONE_GOES_ON = (*_WALKABLE, BlockType.WATER.value, BlockType.LAVA.value)
_PLANTS = (BlockType.PLANT.value, BlockType.RIPE_PLANT.value)
# Vitals never fall below these in the first 100 steps of a life, and do by step 300 unless they were restored.
_FIRST_DAY = {"food": 6, "drink": 5, "energy": 6}

# Geometry of the view. Ways are numbered as craftax's actions: 0 stay, 1 left, 2 right, 3 up, 4 down.
_WAYS = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)], np.int32)  # dy, dx
_OFFSETS = np.indices((ROWS, COLS)).reshape(2, -1).T - CENTRE  # (63, 2) of each cell from the player
_DISTANCE_AFTER = np.abs(_OFFSETS - _WAYS[:, None]).sum(-1)  # (5, 63) of each cell in steps, once it went that way
_BESIDE = np.flatnonzero(_DISTANCE_AFTER[0] == 1)  # (4,)
_COMES_FROM = (_OFFSETS @ _WAYS[1:].T > 0).T & (_DISTANCE_AFTER[0] <= NEAR)  # (4, 63) near and ahead, by direction


def detect(obs: jax.Array, action: jax.Array, next_obs: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Says which habits a step tells something about, and what.

    Args:
        obs: (..., 218) uint8 before the step
        action: (...) int32
        next_obs: (..., 218) uint8 after it; of the next life where done
        done: (...) bool, the life ended with this step
    Returns:
        occasions (..., H) bool, sensible (..., H) bool in the order of HABITS; sensible only where there is an occasion
    """
    action, truth = _taken(obs, action), _truths(obs)
    happened = (
        _rest(truth, obs, next_obs)
        | _meals(obs, next_obs)
        | _buildings(truth, obs, action, next_obs)
        | _gardening(truth, obs, next_obs)
    )
    happened = {name: (occasion & ~done, sensible) for name, (occasion, sensible) in happened.items()}
    found = happened | _choices(truth, obs, action) | _whole_life(truth, done)
    occasions, sensible = (jnp.stack([found[name][i] for name in HABITS], -1) for i in range(2))
    return occasions, occasions & sensible


def _taken(obs: jax.Array, action: jax.Array) -> jax.Array:
    """The action that takes effect: nobody acts while asleep."""
    return jnp.where(obs[..., captions.ASLEEP] > 0, Action.NOOP.value, action)


def _truths(obs: jax.Array) -> dict[str, jax.Array]:
    """The truth of every fact, (...) bool each, by its name in `vocabulary.FACTS`."""
    facts = captions.facts(obs)
    return {name: facts[..., i] for i, name in enumerate(FACTS)}


def _amount(obs: jax.Array, item: str) -> jax.Array:
    """How much it has of an item of the inventory, or of a vital: (..., 218) -> (...) uint8."""
    return obs[..., captions.NUMBERS.start + _NUMBERS.index(item)]


def _ahead(obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block and the bits of mobs in the cell that the player faces, (...) uint8 each."""
    return _beside(obs, obs[..., captions.DIRECTION] + 1)


def _beside(obs: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block and the bits of mobs in the cell that lies that way, (...) uint8 each."""
    offset = jnp.asarray(_WAYS)[way]  # (..., 2)
    cell = (offset[..., 0] + CENTRE[0]) * COLS + offset[..., 1] + CENTRE[1]
    cell = cell[..., None]
    block = jnp.take_along_axis(obs[..., captions.BLOCKS], cell, -1)
    mobs = jnp.take_along_axis(obs[..., captions.MOBS], cell, -1)
    return block[..., 0], mobs[..., 0]


def _wanted(action: jax.Array) -> jax.Array:
    """Which way an action leads, if the way is free: (...) int32 -> (...) int32, 0 for those that lead nowhere."""
    return jnp.where(action <= Action.DOWN.value, action, 0)


def _gone(obs: jax.Array, action: jax.Array) -> jax.Array:
    """Which way the player goes, (...) int32: 0 if something is in its way. Into lava does not count."""
    way = _wanted(action)
    block, mobs = _beside(obs, way)
    free = _is_any(block, _WALKABLE) & (mobs & _IN_THE_WAY == 0)
    return jnp.where(free, way, 0)


def _into_lava(obs: jax.Array, action: jax.Array) -> jax.Array:
    way = _wanted(action)
    return (way > 0) & (_beside(obs, way)[0] == BlockType.LAVA.value)


def _is_any(block: jax.Array, kinds: tuple[int, ...]) -> jax.Array:
    return jnp.isin(block, jnp.array(kinds, jnp.uint8))


# ------------------------------------------------------------------------ what a step changed: not where a life ends


def _rest(truth: dict[str, jax.Array], obs: jax.Array, next_obs: jax.Array) -> Findings:
    falls_asleep = (obs[..., captions.ASLEEP] == 0) & (next_obs[..., captions.ASLEEP] > 0)
    midnight = (obs[..., captions.HOUR] < MIDNIGHT) & (next_obs[..., captions.HOUR] >= MIDNIGHT)
    # The first nap of a life is worth an achievement, whenever it is.
    again = falls_asleep & truth["unlocked wake up"]
    return {
        "sleeps sheltered": (falls_asleep, truth["enclosed"]),
        "is inside at midnight": (midnight, truth["enclosed"]),
        "works, then sleeps": (again, truth["dark"] | truth["energy low"]),
    }


def _meals(obs: jax.Array, next_obs: jax.Array) -> Findings:
    ahead, _ = _ahead(obs)
    eats = _amount(next_obs, "food") > _amount(obs, "food")  # nothing else raises it
    return {
        "drinks in time": _in_time(_amount(obs, "drink"), _amount(next_obs, "drink")),
        "eats in time": _in_time(_amount(obs, "food"), _amount(next_obs, "food")),
        "eats plants": (eats, ahead == BlockType.RIPE_PLANT.value),
    }


def _in_time(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Judged where one level is crossed, not at every sip: who comes to drink does so several times in a row."""
    runs_out = (before > 0) & (after == 0)
    relieved = (before > 0) & (before <= URGENT) & (after > URGENT)  # from 0 it is too late: it has run out before
    return runs_out | relieved, relieved


def _buildings(truth: dict[str, jax.Array], obs: jax.Array, action: jax.Array, next_obs: jax.Array) -> Findings:
    table = (action == Action.PLACE_TABLE.value) & (_amount(next_obs, "wood") < _amount(obs, "wood"))
    furnace = (action == Action.PLACE_FURNACE.value) & (_amount(next_obs, "stone") < _amount(obs, "stone"))
    iron = _amount(next_obs, "iron") > _amount(obs, "iron")
    wood = jnp.where(truth["table close"], truth["wood >= 1"], truth["wood >= 3"])
    return {
        "uses the table at hand": (table, ~truth["table close"]),
        "makes a workshop": (furnace, truth["table in reach"]),
        "carries wood to the ore": (iron, wood),
    }


def _gardening(truth: dict[str, jax.Array], obs: jax.Array, next_obs: jax.Array) -> Findings:
    places = _amount(next_obs, "sapling") < _amount(obs, "sapling")  # nothing else takes one
    collects = _amount(next_obs, "sapling") > _amount(obs, "sapling")
    planted_before = truth["unlocked place plant"]
    plants_first = ~planted_before & (next_obs[..., captions.UNLOCKED.start + ACHIEVEMENTS.index("place_plant")] > 0)
    early = obs[..., captions.HOUR] < EARLY
    for vital, least in _FIRST_DAY.items():  # the clock does not tell the days apart
        early &= _amount(obs, vital) >= least
    return {
        "plants early": (plants_first, early),
        "plants in a row": (places & planted_before, _plant_behind(obs)),
        "chops grass with a pickaxe": (collects, _amount(obs, "wood pickaxe") > 0),
    }


def _plant_behind(obs: jax.Array) -> jax.Array:
    """Is there a plant beside the cell that the player faces? (..., 218) -> (...) bool"""
    from_there = jnp.asarray(_DISTANCE_AFTER)[obs[..., captions.DIRECTION] + 1]  # (..., 63)
    return (_is_any(obs[..., captions.BLOCKS], _PLANTS) & (from_there == 1)).any(-1)


# ------------------------------------------------------------------------ what the player did: also where a life ends


def _choices(truth: dict[str, jax.Array], obs: jax.Array, action: jax.Array) -> Findings:
    lava_beside = (obs[..., captions.BLOCKS][..., _BESIDE] == BlockType.LAVA.value).any(-1)
    awake = obs[..., captions.ASLEEP] == 0
    threatened = (_amount(obs, "health") <= HURT) & truth["zombie near"] & awake & ~truth["enclosed"]
    return {
        "fights armed": (_strikes_zombie(obs, action), _armed(obs)),
        "saves itself": (threatened, _saves(truth, obs, action)),
        "minds lava": (lava_beside & (_wanted(action) > 0), ~_into_lava(obs, action)),
    }


def _strikes_zombie(obs: jax.Array, action: jax.Array) -> jax.Array:
    _, mobs = _ahead(obs)
    return (action == Action.DO.value) & (mobs & _ZOMBIE > 0)


def _armed(obs: jax.Array) -> jax.Array:
    return (obs[..., _SWORDS] > 0).any(-1)


def _saves(truth: dict[str, jax.Array], obs: jax.Array, action: jax.Array) -> jax.Array:
    """Does it get away from the nearest zombie, strike with a sword, or shut zombies out? (...) bool

    Judged by where zombies are before the step: they move after the player.
    """
    zombies = obs[..., captions.MOBS] & _ZOMBIE > 0  # (..., 63)
    nearest = [jnp.where(zombies, jnp.asarray(_DISTANCE_AFTER)[way], 99).min(-1) for way in (0, _gone(obs, action))]
    coming = (zombies & jnp.asarray(_COMES_FROM)[obs[..., captions.DIRECTION]]).any(-1)
    walls = _puts_stone(obs, action) & (truth["one stone from shelter"] | coming)
    return (nearest[1] > nearest[0]) | (_strikes_zombie(obs, action) & _armed(obs)) | walls


def _puts_stone(obs: jax.Array, action: jax.Array) -> jax.Array:
    block, mobs = _ahead(obs)
    possible = _is_any(block, _STONE_GOES_ON) & (mobs & _IN_THE_WAY == 0) & (_amount(obs, "stone") > 0)
    return (action == Action.PLACE_STONE.value) & possible


# ------------------------------------------------------------------------ where a life ends


def _whole_life(truth: dict[str, jax.Array], done: jax.Array) -> Findings:
    eaten = truth["unlocked eat plant"]
    return {"comes back to eat": (done & (eaten | truth["plant ripe by now"]), eaten)}


def cause_of_death(obs: jax.Array, action: jax.Array) -> jax.Array:
    """What a life ended of: the first of lava, zombies, arrows, thirst, hunger, tiredness that can have taken part.

    Args:
        obs: (..., 218) uint8, the last one of a life
        action: (...) int32, the last one
    Returns:
        (...) int32, index into CAUSES; unknown if all of them together could not have killed it, as where a life is
        cut at its greatest length
    """
    action, asleep = _taken(obs, action), obs[..., captions.ASLEEP] > 0
    # Zombies hit, and arrows fly, from beside where the player has gone to.
    beside = jnp.asarray(_DISTANCE_AFTER)[_gone(obs, action)] == 1  # (..., 63)
    mobs = jnp.where(beside, obs[..., captions.MOBS], 0)
    blows = (mobs & _ZOMBIE > 0).sum(-1) * jnp.where(asleep, 7, 2)
    arrows = (mobs & (_ARROW | _SKELETON) > 0).sum(-1) * 2  # a skeleton's arrow flies in the step in which it is shot
    thirst, hunger = _amount(obs, "drink") == 0, _amount(obs, "food") == 0
    tiredness = (_amount(obs, "energy") == 0) & ~asleep
    worst = blows + arrows + (thirst | hunger | tiredness)  # what is lacking takes one point, however much is lacking
    explained = worst >= _amount(obs, "health")
    lava = _into_lava(obs, action)
    hits = [explained & ~lava & (blows > 0), explained & ~lava & (arrows > 0), lava]
    lacks = [explained & lack for lack in (thirst, hunger, tiredness)]
    return jnp.argmax(jnp.stack([*hits, *lacks, jnp.ones_like(lava)], -1), -1).astype(jnp.int32)
