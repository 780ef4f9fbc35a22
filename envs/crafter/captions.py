"""What is known about a situation: facts (on the device) and a caption in words (on the host).

Both are made from the compact observation of `envs.crafter.env`, 167 uint8, whose layout is fixed here. Facts and
caption are read from the game's state, which the compact observation copies, not from craftax's symbolic observation.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from envs.crafter.vocabulary import ACHIEVEMENTS, AMOUNTS, INVENTORY, LOW, NEAR, SIGHTS, VITALS

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
OBS_SIZE = 167

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
_BESIDE = _DISTANCE == 1  # (63,) the four neighbours
_CLOSED_BLOCKS = (0, 1, 3, 4, 5, 8, 9, 10, 11, 12, 14, 15, 16)  # nothing walks in from there
DARK = 128  # light below this (of 255): zombies come twice as often as by day, or more


def facts(obs: jax.Array) -> jax.Array:
    """The facts of `vocabulary.FACTS`, in that order.

    Args:
        obs: (..., 167) uint8
    Returns:
        (..., P) bool
    """
    blocks, mobs = obs[..., BLOCKS], obs[..., MOBS]
    inventory, vitals = obs[..., INVENTORY_SLICE], obs[..., VITALS_SLICE]
    amounts = [inventory[..., INVENTORY.index(item)] >= n for item, n in AMOUNTS]
    views = [(blocks == _BLOCK_IDS[sight]).any(-1) for sight in _BLOCK_SIGHTS]
    any_mob = jax.lax.reduce_or(mobs, (mobs.ndim - 1,))
    views += [(any_mob >> _MOB_BITS[sight]) & 1 for sight in _MOB_SIGHTS]
    rest = [
        (mobs[..., _cells(_DISTANCE <= NEAR)] & 1).any(-1),
        (blocks[..., _cells(_IN_REACH)] == _BLOCK_IDS["crafting table"]).any(-1),
        (blocks[..., _cells(_IN_REACH)] == _BLOCK_IDS["furnace"]).any(-1),
        vitals[..., VITALS.index("energy")] >= 9,
        obs[..., LIGHT] < DARK,
        obs[..., ASLEEP] > 0,
        jnp.isin(blocks[..., _cells(_BESIDE)], jnp.array(_CLOSED_BLOCKS, jnp.uint8)).all(-1),
    ]
    parts = [
        obs[..., UNLOCKED] > 0,
        jnp.stack([a.astype(bool) for a in amounts], -1),
        vitals <= LOW,
        jnp.stack([v.astype(bool) for v in views], -1),
        jnp.stack(rest, -1),
    ]
    return jnp.concatenate(parts, -1)


def to_text(obs: np.ndarray) -> str:
    """The caption that adapter and LLM read: the facts in words, with directions and distances of the nearest things.

    Args:
        obs: (167,) uint8
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
    beside = blocks[_BESIDE]
    enclosed = " The player is enclosed." if np.isin(beside, _CLOSED_BLOCKS).all() else ""
    sleep = "asleep" if obs[ASLEEP] else "awake"
    unlocked = [name.replace("_", " ") for name, done in zip(ACHIEVEMENTS, obs[UNLOCKED], strict=True) if done]
    return "\n".join([
        f"You see: {', '.join(views) or 'nothing special'}.",
        f"Facing: {_facing(obs)}.",
        f"Inventory: {', '.join(items) or 'nothing'}.",
        f"Vitals (of 9): {vitals}.",
        f"It is {'dark' if obs[LIGHT] < DARK else 'day'}. The player is {sleep}.{enclosed}",
        f"Unlocked: {', '.join(unlocked) or 'nothing'}.",
    ])  # fmt: skip


def _cells(mask: np.ndarray) -> np.ndarray:
    """Indices of the cells in a constant mask: a gather with constant indices is cheaper than a where."""
    return np.flatnonzero(mask)


def _direction(where: np.ndarray) -> str:
    """ "2 north, 1 east" of the nearest cell in the mask; of several the one in reach, then the first one read."""
    cells = np.flatnonzero(where)
    nearness = _DISTANCE[cells] * 10 + np.abs(_OFFSETS[cells]).max(1)
    dy, dx = _OFFSETS[cells[np.argmin(nearness)]]
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
    facing: str
    inventory: dict[str, int]  # tools count 1
    vitals: dict[str, int]
    dark: bool
    asleep: bool
    enclosed: bool
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
        sights={name: _offset(steps) for name, steps in re.findall(r"([a-z][a-z ]*) \(([^)]*)\)", lines["You see"])},
        facing=lines["Facing"],
        inventory={item.lstrip("0123456789 "): int(re.match("[0-9]*", item)[0] or 1) for item in items},
        vitals=vitals,
        dark="It is dark." in about,
        asleep="The player is asleep." in about,
        enclosed="The player is enclosed." in about,
        unlocked=frozenset(_items(lines["Unlocked"])),
    )


def _items(listing: str) -> list[str]:
    return [] if listing.startswith("nothing") else listing.split(", ")


def _offset(steps: str) -> tuple[int, int]:
    """(dy, dx) of "1 south, 3 west" and the like."""
    far = {direction: int(count) for count, direction in re.findall(r"(\d+) (north|south|west|east)", steps)}
    return far.get("south", 0) - far.get("north", 0), far.get("east", 0) - far.get("west", 0)


def truths_of(scene: Scene) -> dict[str, bool]:
    """The truth of every name in FACTS, in that order, from a caption alone."""
    near = {name: (abs(dy), abs(dx)) for name, (dy, dx) in scene.sights.items()}
    nowhere = (99, 99)
    names = (name.replace("_", " ") for name in ACHIEVEMENTS)
    truths = {f"unlocked {name}": name in scene.unlocked for name in names}
    truths |= {f"{item} >= {n}": scene.inventory.get(item, 0) >= n for item, n in AMOUNTS}
    truths |= {f"{vital} low": scene.vitals[vital] <= LOW for vital in VITALS}
    truths |= {f"{sight} in view": sight in scene.sights for sight in SIGHTS}
    truths["zombie near"] = sum(near.get("zombie", nowhere)) <= NEAR
    truths["table in reach"] = max(near.get("crafting table", nowhere)) <= 1
    truths["furnace in reach"] = max(near.get("furnace", nowhere)) <= 1
    truths["energy full"] = scene.vitals["energy"] >= 9
    return truths | {"dark": scene.dark, "asleep": scene.asleep, "enclosed": scene.enclosed}
