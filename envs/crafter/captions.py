"""What is known about a situation: facts (on the device) and a caption in words (on the host).

Both are made from the compact observation of `envs.crafter.env`, 218 uint8, whose layout is fixed here: what the game
shows now, then what a player who watches keeps in mind of this life: where things were last seen, how long it has
lasted, and how long ago a sapling was planted.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from envs.crafter.vocabulary import (
    ACHIEVEMENTS,
    AMOUNTS,
    CLOSE,
    INVENTORY,
    KINDS,
    KNOWN,
    LOW,
    NEAR,
    SIGHTS,
    VITALS,
)
from envs.nearest import FAR, IN_VIEW, find_places

ROWS, COLS = 7, 9
CENTRE = (ROWS // 2, COLS // 2)

# Layout of the compact observation.
BLOCKS = slice(0, 63)  # craftax's BlockType of each cell of the 7 x 9 view, row by row
MOBS = slice(63, 126)  # bits of each cell: 1 zombie, 2 cow, 4 skeleton, 8 arrow
INVENTORY_SLICE = slice(126, 138)
VITALS_SLICE = slice(138, 142)  # health, food, drink, energy
NUMBERS = slice(126, 142)  # inventory and vitals
DIRECTION, LIGHT, ASLEEP = 142, 143, 144  # 0 left, 1 right, 2 up, 3 down; 0 to 255; 0 or 1
UNLOCKED = slice(145, 167)
VIEW_SIZE = 167  # what comes after this is remembered
PLACES = slice(167, 167 + 3 * len(KINDS))  # per kind dy + FAR, dx + FAR, how known (envs.nearest)
HOUR = PLACES.stop  # half the steps since dawn, 0 to 149
PLANT_AGE = HOUR + 1  # a quarter of the steps since the first of the saplings was planted, from 1; 0: there is none
SHELTER = PLANT_AGE + 1  # of `shelter`: 0 open, 1 one stone from it, 2 enclosed
OBS_SIZE = SHELTER + 1

# craftax's block of each sight; mobs have a bit instead
_BLOCK_IDS = {
    "grass": 2, "water": 3, "stone": 4, "tree": 5, "wood": 6, "path": 7, "coal": 8, "iron": 9, "diamond": 10,
    "crafting table": 11, "furnace": 12, "sand": 13, "lava": 14, "plant": 15, "ripe plant": 16,
}  # fmt: skip
_BLOCK_NAMES = {number: name for name, number in _BLOCK_IDS.items()} | {0: "nothing", 1: "the edge of the world"}
_MOB_BITS = {"zombie": 0, "cow": 1, "skeleton": 2, "arrow": 3}
_BLOCK_SIGHTS = tuple(s for s in SIGHTS if s in _BLOCK_IDS)
_MOB_SIGHTS = tuple(s for s in SIGHTS if s in _MOB_BITS)
assert _BLOCK_SIGHTS + _MOB_SIGHTS == SIGHTS

_STEPS = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])  # of the four directions
_OFFSETS = np.stack(np.meshgrid(np.arange(ROWS) - CENTRE[0], np.arange(COLS) - CENTRE[1], indexing="ij"), -1)
_OFFSETS = _OFFSETS.reshape(-1, 2)  # (63, 2) of each cell from the player
_DISTANCE = np.abs(_OFFSETS).sum(1)  # (63,) in steps
_IN_REACH = np.abs(_OFFSETS).max(1) == 1  # (63,) the eight neighbours, where crafting works
_CLOSED_BLOCKS = (0, 1, 3, 4, 5, 8, 9, 10, 11, 12, 14, 15, 16)  # nothing walks in from there
# What the caption says of light, sleep, shelter and plants, as facts.
ABOUT = {
    "evening": "It is evening.",
    "dark": "It is dark.",
    "asleep": "The player is asleep.",
    "one stone from shelter": "A stone ahead would enclose the player.",
    "enclosed": "The player is enclosed.",
    "plant ripening": "A plant is ripening.",
    "plant ripe by now": "A plant should be ripe by now.",
}

_AT_CENTRE = _DISTANCE.reshape(ROWS, COLS) == 0
_AHEAD = (_OFFSETS == _STEPS[:, None]).all(-1).reshape(4, ROWS, COLS)  # the cell ahead, by direction
ONE_STONE, ENCLOSED = 1, 2
ROOM = 2  # a shelter may be so many steps deep: dig in, turn back, put a stone behind you
DARK = 128  # light below this (of 255): zombies come twice as often as by day, or more
EVENING = (60, 74)  # hours before it gets dark: time to eat, drink and find shelter
RIPE_AGE = 151  # a sapling is ripe when it was planted 600 steps ago


def facts(obs: jax.Array) -> jax.Array:
    """The facts of `vocabulary.FACTS`, in that order.

    Args:
        obs: (..., 218) uint8
    Returns:
        (..., P) bool
    """
    blocks, mobs, numbers, vitals = obs[..., BLOCKS], obs[..., MOBS], obs[..., NUMBERS], obs[..., VITALS_SLICE]
    amounts = [numbers[..., (*INVENTORY, *VITALS).index(item)] >= n for item, n in AMOUNTS]
    views = [(blocks == _BLOCK_IDS[sight]).any(-1) for sight in _BLOCK_SIGHTS]
    any_mob = jax.lax.reduce_or(mobs, (mobs.ndim - 1,))
    views += [(any_mob >> _MOB_BITS[sight]) & 1 for sight in _MOB_SIGHTS]
    where = places(obs)
    is_known = where[..., 2] > 0  # (..., W)
    is_close = is_known & (jnp.abs(where[..., :2]).sum(-1) <= CLOSE)
    known = [is_known[..., KINDS.index(kind)] for kind in KNOWN]
    known += [is_close[..., KINDS.index(kind)] for kind in ("crafting table", "furnace")]
    age = obs[..., PLANT_AGE]
    rest = [
        (mobs[..., _cells(_DISTANCE <= NEAR)] & 1).any(-1),
        (blocks[..., _cells(_IN_REACH)] == _BLOCK_IDS["crafting table"]).any(-1),
        (blocks[..., _cells(_IN_REACH)] == _BLOCK_IDS["furnace"]).any(-1),
        vitals[..., VITALS.index("energy")] >= 9,
        (obs[..., HOUR] >= EVENING[0]) & (obs[..., HOUR] < EVENING[1]) & (obs[..., LIGHT] >= DARK),
        obs[..., LIGHT] < DARK,
        obs[..., ASLEEP] > 0,
        obs[..., SHELTER] == ONE_STONE,
        obs[..., SHELTER] == ENCLOSED,
        (age > 0) & (age < RIPE_AGE),
        age >= RIPE_AGE,
    ]
    parts = [
        obs[..., UNLOCKED] > 0,
        jnp.stack([a.astype(bool) for a in amounts], -1),
        vitals <= LOW,
        jnp.stack([v.astype(bool) for v in views], -1),
        jnp.stack(known, -1),
        jnp.stack(rest, -1),
    ]
    return jnp.concatenate(parts, -1)


def shelter(view: jax.Array) -> jax.Array:
    """Is the player shut in, so that nothing can walk up to it? Would it be with a stone put down ahead?

    Args:
        view: (..., 167 or more) uint8
    Returns:
        (...) uint8: ENCLOSED if no way leads farther than ROOM steps, ONE_STONE if a stone ahead would make it so, or 0
    """
    free = ~jnp.isin(view[..., BLOCKS], jnp.array(_CLOSED_BLOCKS, jnp.uint8)).reshape(*view.shape[:-1], ROWS, COLS)
    ahead = jnp.asarray(_AHEAD)[view[..., DIRECTION]]  # (..., 7, 9)
    ways = jnp.stack([free, free & ~ahead], -3)  # (..., 2, 7, 9) as it is, and with that stone
    reached = jnp.broadcast_to(_AT_CENTRE, ways.shape)
    for _ in range(ROOM):
        reached |= _spread(reached) & ways
    closed = ~(_spread(reached) & ways & ~reached).any((-2, -1))  # (..., 2)
    return jnp.where(closed[..., 0], ENCLOSED, ONE_STONE * closed[..., 1]).astype(jnp.uint8)


def _spread(cells: jax.Array) -> jax.Array:
    """The cells beside some cells: (..., 7, 9) bool -> (..., 7, 9) bool."""
    padded = jnp.pad(cells, [(0, 0)] * (cells.ndim - 2) + [(1, 1), (1, 1)])
    return padded[..., :-2, 1:-1] | padded[..., 2:, 1:-1] | padded[..., 1:-1, :-2] | padded[..., 1:-1, 2:]


def places_in_view(obs: jax.Array) -> jax.Array:
    """The nearest place in view of each of `vocabulary.KINDS`: (..., 167 or more) uint8 -> (..., W, 3) int32.

    A ripe plant is a plant here: what was planted is remembered in one place, and is to be eaten there.
    """
    blocks, mobs = obs[..., None, BLOCKS], obs[..., None, MOBS]
    blocks = jnp.where(blocks == _BLOCK_IDS["ripe plant"], jnp.uint8(_BLOCK_IDS["plant"]), blocks)
    ids = jnp.array([_BLOCK_IDS[kind] for kind in KINDS if kind in _BLOCK_IDS], jnp.uint8)[:, None]
    bits = jnp.array([_MOB_BITS[kind] for kind in KINDS if kind in _MOB_BITS], jnp.uint8)[:, None]
    seen = jnp.concatenate([blocks == ids, (mobs >> bits) & 1 == 1], -2)  # (..., W, 63)
    return find_places(seen.reshape(*seen.shape[:-1], ROWS, COLS), facing(obs))


def places(obs: jax.Array) -> jax.Array:
    """The nearest place of each of `vocabulary.KINDS`, in view or remembered: (..., 218) uint8 -> (..., W, 3) int32."""
    stored = obs[..., PLACES].reshape(*obs.shape[:-1], len(KINDS), 3).astype(jnp.int32)
    return stored - jnp.array([FAR, FAR, 0])


def stored_places(where: jax.Array) -> jax.Array:
    """What `places` reads: (..., W, 3) int32 -> (..., 3 W) uint8"""
    stored = (where + jnp.array([FAR, FAR, 0])).astype(jnp.uint8)
    return stored.reshape(*where.shape[:-2], -1)


def facing(obs: jax.Array) -> jax.Array:
    """Steps to the cell that the player faces: (..., O) uint8 -> (..., 2) int32 dy, dx."""
    return jnp.asarray(_STEPS, jnp.int32)[obs[..., DIRECTION]]


def to_text(obs: np.ndarray) -> str:
    """The caption that adapter and LLM read: the facts in words, with directions and distances of the nearest things.

    Args:
        obs: (218,) uint8
    """
    obs = np.asarray(obs).astype(int)
    blocks, mobs = obs[BLOCKS], obs[MOBS]
    seen = [(sight, blocks == _BLOCK_IDS[sight]) for sight in _BLOCK_SIGHTS]
    seen += [(sight, (mobs >> _MOB_BITS[sight]) & 1 == 1) for sight in _MOB_SIGHTS]
    views = [f"{sight} ({_direction(where)})" for sight, where in seen if where.any()]
    items = [
        name if "pickaxe" in name or "sword" in name else f"{n} {name}"
        for name, n in zip(INVENTORY, obs[INVENTORY_SLICE], strict=True)
        if n > 0
    ]
    vitals = ", ".join(f"{name} {n}" for name, n in zip(VITALS, obs[VITALS_SLICE], strict=True))
    hour = "evening" if EVENING[0] <= obs[HOUR] < EVENING[1] else "day"
    sleep = "asleep" if obs[ASLEEP] else "awake"
    also = {ONE_STONE: ["one stone from shelter"], ENCLOSED: ["enclosed"]}.get(int(obs[SHELTER]), [])
    if obs[PLANT_AGE]:
        also.append("plant ripe by now" if obs[PLANT_AGE] >= RIPE_AGE else "plant ripening")
    also = "".join(f" {ABOUT[fact]}" for fact in also)
    unlocked = [name.replace("_", " ") for name, done in zip(ACHIEVEMENTS, obs[UNLOCKED], strict=True) if done]
    return "\n".join([
        f"You see: {', '.join(views) or 'nothing special'}.",
        f"Remembered: {', '.join(_remembered(obs)) or 'nothing'}.",
        f"Facing: {_facing(obs)}.",
        f"Inventory: {', '.join(items) or 'nothing'}.",
        f"Vitals (of 9): {vitals}.",
        f"It is {'dark' if obs[LIGHT] < DARK else hour}. The player is {sleep}.{also}",
        f"Unlocked: {', '.join(unlocked) or 'nothing'}.",
    ])  # fmt: skip


def _cells(mask: np.ndarray) -> np.ndarray:
    """Indices of the cells in a constant mask: a gather with constant indices is cheaper than a where."""
    return np.flatnonzero(mask)


def _direction(where: np.ndarray) -> str:
    """ "2 north, 1 east" of the nearest cell in the mask; of several the one in reach, then the first one read."""
    cells = np.flatnonzero(where)
    nearness = _DISTANCE[cells] * 10 + np.abs(_OFFSETS[cells]).max(1)
    return _steps(*_OFFSETS[cells[np.argmin(nearness)]])


def _remembered(obs: np.ndarray) -> list[str]:
    """Says where things that are worth a fact were last seen, if they are out of view now."""
    where = obs[PLACES].reshape(-1, 3)
    return [
        f"{kind} ({_steps(dy - FAR, dx - FAR)})"
        for kind, (dy, dx, known) in zip(KINDS, where, strict=True)
        if kind in KNOWN and 0 < known < IN_VIEW
    ]


def _steps(dy: int, dx: int) -> str:
    parts = [f"{abs(dy)} {'north' if dy < 0 else 'south'}"] if dy else []
    parts += [f"{abs(dx)} {'west' if dx < 0 else 'east'}"] if dx else []
    return ", ".join(parts) or "here"


def _facing(obs: np.ndarray) -> str:
    dy, dx = _STEPS[obs[DIRECTION]]
    cell = (CENTRE[0] + dy) * COLS + CENTRE[1] + dx
    for name, bit in _MOB_BITS.items():
        if obs[MOBS][cell] >> bit & 1:
            return name
    return _BLOCK_NAMES[int(obs[BLOCKS][cell])]


# ------------------------------------------------------------------------------------------- a caption, read back
# For programs that are given nothing but text: benchmarks/chat_server.py, the teacher of the tiny adapter, and the test
# that a caption says the same as the facts. Training never reads text back.


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    sights: dict[str, tuple[int, int]]  # name -> (dy, dx) of the nearest one, in steps, north and west negative
    remembered: dict[str, tuple[int, int]]  # the same of what is out of view
    facing: str
    inventory: dict[str, int]  # tools count 1
    vitals: dict[str, int]
    about: str  # what the caption says of light, sleep, open sides and plants
    unlocked: frozenset[str]  # achievements in words: "collect wood"


def read_caption(text: str) -> Scene:
    """Reads the caption that a text starts with, ignoring what follows. Raises ValueError where there is none."""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        label, _, rest = line.partition(": ")
        lines.setdefault(label, rest.rstrip(" ."))
    vitals = {name: int(n) for name, n in re.findall(r"([a-z]+) (\d+)", lines.get("Vitals (of 9)", ""))}
    missing = [label for label in ("You see", "Facing", "Inventory", "Unlocked") if label not in lines]
    missing += [name for name in VITALS if name not in vitals]
    if missing:
        raise ValueError(f"no {missing[0]!r} in the caption {text[:80]!r}")
    items = _items(lines["Inventory"])
    about = next((line for line in text.splitlines() if line.startswith("It is ")), "")
    return Scene(
        sights=_sights(lines["You see"]),
        remembered=_sights(lines.get("Remembered", "")),
        facing=lines["Facing"],
        inventory={item.lstrip("0123456789 "): int(re.match("[0-9]*", item)[0] or 1) for item in items},
        vitals=vitals,
        about=about,
        unlocked=frozenset(_items(lines["Unlocked"])),
    )


def _items(listing: str) -> list[str]:
    return [] if listing.startswith("nothing") else listing.split(", ")


def _sights(listing: str) -> dict[str, tuple[int, int]]:
    return {name: _offset(steps) for name, steps in re.findall(r"([a-z][a-z ]*) \(([^)]*)\)", listing)}


def _offset(steps: str) -> tuple[int, int]:
    """(dy, dx) of "1 south, 3 west" and the like."""
    far = {direction: int(count) for count, direction in re.findall(r"(\d+) (north|south|west|east)", steps)}
    return far.get("south", 0) - far.get("north", 0), far.get("east", 0) - far.get("west", 0)


def truths_of(scene: Scene) -> dict[str, bool]:
    """The truth of every name in FACTS, in that order, from a caption alone."""
    near = {name: (abs(dy), abs(dx)) for name, (dy, dx) in scene.sights.items()}
    known = near | ({"plant": near["ripe plant"]} if "ripe plant" in near else {})
    known |= {name: (abs(dy), abs(dx)) for name, (dy, dx) in scene.remembered.items()}
    nowhere = (99, 99)
    names = (name.replace("_", " ") for name in ACHIEVEMENTS)
    truths = {f"unlocked {name}": name in scene.unlocked for name in names}
    truths |= {f"{item} >= {n}": (scene.inventory | scene.vitals).get(item, 0) >= n for item, n in AMOUNTS}
    truths |= {f"{vital} low": scene.vitals[vital] <= LOW for vital in VITALS}
    truths |= {f"{sight} in view": sight in scene.sights for sight in SIGHTS}
    truths |= {f"{kind} known": kind in known for kind in KNOWN}
    truths["table close"] = sum(known.get("crafting table", nowhere)) <= CLOSE
    truths["furnace close"] = sum(known.get("furnace", nowhere)) <= CLOSE
    truths["zombie near"] = sum(near.get("zombie", nowhere)) <= NEAR
    truths["table in reach"] = max(near.get("crafting table", nowhere)) <= 1
    truths["furnace in reach"] = max(near.get("furnace", nowhere)) <= 1
    truths["energy full"] = scene.vitals["energy"] >= 9
    return truths | {name: words in scene.about for name, words in ABOUT.items()}
