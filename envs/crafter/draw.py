"""What people see of Crafter: pictures by craftax's own renderer, and a map in letters for a terminal."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_classic.constants import BlockType
from craftax.craftax_classic.renderer import make_craftax_pixel_renderer

from envs.crafter import captions
from envs.crafter.vocabulary import INVENTORY, VITALS

TILE = 64  # pixels, one of the three sizes that craftax has textures of
# A letter and a colour (as rich names it) for each block
LETTERS = {
    "INVALID": (" ", "black"), "OUT_OF_BOUNDS": (" ", "black"), "GRASS": (".", "green"), "WATER": ("~", "blue"),
    "STONE": ("#", "bright_black"), "TREE": ("T", "bold green"), "WOOD": ("w", "yellow"), "PATH": (" ", "white"),
    "COAL": ("c", "white"), "IRON": ("i", "bold yellow"), "DIAMOND": ("D", "bold cyan"),
    "CRAFTING_TABLE": ("t", "bold magenta"), "FURNACE": ("f", "bold red"), "SAND": (":", "yellow"),
    "LAVA": ("%", "bold red"), "PLANT": ("p", "bright_green"), "RIPE_PLANT": ("P", "bold bright_green"),
}  # fmt: skip
MOBS = (("Z", "bold green"), ("C", "bold white"), ("S", "bold white"), ("*", "bold red"))  # by bit of a cell's mobs
PLAYER = "<>^v"  # by direction


def scene(envs: Any) -> Any:
    """Returns all that a picture needs of the states (N, ...), with a map of bytes: many are kept."""
    return dataclasses.replace(envs, map=envs.map.astype(jnp.uint8))


@functools.cache
def _renderer(size: int) -> Any:
    render = make_craftax_pixel_renderer(size)

    def draw(state: Any) -> jax.Array:
        wide = dataclasses.replace(state, map=state.map.astype(jnp.int32))
        return jnp.clip(render(wide), 0, 255).astype(jnp.uint8)

    return jax.jit(draw)


def draw(state: Any, size: int = TILE) -> np.ndarray:
    """Draws one scene: (9 * size, 9 * size, 3) uint8, seven rows of the map and two of the inventory."""
    return np.asarray(_renderer(size)(state))


def letters(obs: np.ndarray) -> list[list[tuple[str, str]]]:
    """Returns the map of a player (218,) in letters: rows of (letter, colour), one for each cell."""
    blocks = np.asarray(obs[captions.BLOCKS]).reshape(captions.ROWS, captions.COLS)
    mobs = np.asarray(obs[captions.MOBS]).reshape(captions.ROWS, captions.COLS)
    names = [block.name for block in BlockType]
    rows = [[LETTERS.get(names[block], ("?", "white")) for block in row] for row in blocks]
    for bit, look in enumerate(MOBS):
        for row, col in np.argwhere(mobs >> bit & 1):
            rows[row][col] = look
    rows[captions.ROWS // 2][captions.COLS // 2] = (PLAYER[int(obs[captions.DIRECTION])], "bold bright_white")
    return rows


def status(obs: np.ndarray) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the vitals, and what is in the bag, of a player (218,)."""
    vitals = dict(zip(VITALS, map(int, obs[captions.VITALS_SLICE]), strict=True))
    bag = dict(zip(INVENTORY, map(int, obs[captions.INVENTORY_SLICE]), strict=True))
    return vitals, {name: n for name, n in bag.items() if n}
