"""The original Crafter (`pip install crafter`, 1.8.3) on the host, seen as Craftax-Classic is seen.

A policy that was trained in craftax can play it: actions, achievements and the 218 bytes of `envs.crafter.captions` are
the same, read from the game's state, not from its pictures. Worlds and rules are the original ones. What differs from
craftax (in brackets), and cannot be bridged:

- A furnace costs 4 stones (1); iron tools need no stone (1). Tables and furnaces are in reach in the eight
  cells around in both games, but in the first row and column of the original's world nothing is.
- A plant ripens after 301 steps (600), counted while the player is within 17 steps of it; the age in the observation
  counts all steps, so a plant is ripe before it says so. A zombie, skeleton or cow beside a plant destroys it (nothing
  does). A player who sees that it is gone stops counting (`look`). Eating one doesn't reset hunger (it does).
- A zombie hits in the step that brings it near, and its cooldown runs only beside the player (hits from where it stood
  before the step; always runs). It follows from 8 steps away nine times in ten (from 9, three in four). New ones come
  on grass, in light of 5/6 or less (also on paths, at any time).
- Mobs are balanced in each 12 x 12 part of the world, and move within 17 steps of the player (at most 3 zombies,
  3 cows, 2 skeletons and 3 arrows in all, removed from 14 steps on). Arrows hurt whatever they hit (only the player).
- `wake_up` takes full energy (being woken by a zombie counts). Any loss of health wakes (only zombies and arrows do).
- A second sword of a kind is of no use (damage is multiplied by their number).
- A step that unlocks several achievements is paid 1 (1 for each). There may be no diamond (there is one).
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from craftax.craftax_classic.constants import BlockType

from envs.crafter import CRAFTER, captions
from envs.crafter.env import first_look, look_again, plant_age
from envs.crafter.vocabulary import ACHIEVEMENTS, ACTIONS, INVENTORY, KINDS, VITALS
from envs.game import Game

# Crafter's material -> craftax's block; there is none beyond the edge of the world
BLOCKS = {block.name.lower(): block.value for block in BlockType}
BLOCKS |= {None: BlockType.OUT_OF_BOUNDS.value, "table": BlockType.CRAFTING_TABLE.value}
BITS = {"Zombie": 1, "Cow": 2, "Skeleton": 4, "Arrow": 8}
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # dx, dy of left, right, up, down
NUMBERS = tuple(name.replace(" ", "_") for name in (*INVENTORY, *VITALS))


# What the original demands of a sub-goal where craftax demands less.
GAME = dataclasses.replace(CRAFTER, needs=CRAFTER.needs | {"place furnace": ("stone >= 4",)})


class OriginalCrafter:
    """N games of the original Crafter. A game that ends begins anew, in a world that was not played before."""

    game: Game = GAME

    def __init__(self, num_envs: int, seed: int, length: int = 10_000):
        """Makes N worlds, about a second each. Raises ValueError where the game is not installed."""
        try:
            import crafter  # late: it is needed here only
        except ImportError:
            raise ValueError("the original Crafter is not installed; pip install crafter") from None
        names = [name.removeprefix("move_").replace("_", " ") for name in crafter.constants.actions]
        self.actions = [names.index(name) for name in ACTIONS]
        seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        self.envs = [crafter.Env(length=length, seed=seed) for seed in seeds]
        for env in self.envs:
            env._obs = env._sem_view = lambda: None  # pictures and maps that nobody looks at, most of a step's time
            begin(env)
        self.obs = np.asarray(jax.jit(first_look)(self._views()))

    def observe(self) -> np.ndarray:
        """What the players see and remember: (N, 218) uint8."""
        return self.obs

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Plays one step of each game.

        Args:
            action: (N,) int, of `vocabulary.ACTIONS`
        Returns:
            reward (N,) f32, done (N,) bool, achievements (N, 22) bool at the end of the step, before any new game
        """
        position, count = self._positions(), self._counts()
        played = [env.step(self.actions[act])[1:3] for env, act in zip(self.envs, action, strict=True)]
        reward, done = np.array(played, np.float32).T
        done, new_count, moved = done > 0, self._counts(), self._positions() - position
        for i in np.flatnonzero(done):
            begin(self.envs[i])
        time = np.array([env._step for env in self.envs], np.int32)
        self.obs = np.asarray(look(self.obs, self._views(), moved, time, new_count > count, done))
        return reward, done, new_count > 0

    def picture(self, i: int, size: int) -> np.ndarray:
        """Draws game i as the game does: (size, size, 3) uint8. Darkness is drawn by lot, on which nothing depends."""
        env = self.envs[i]
        state = env._world.random.get_state()
        canvas = env.render((size, size))
        env._world.random.set_state(state)
        return canvas

    def _views(self) -> np.ndarray:
        return np.stack([view_of(env) for env in self.envs])  # (N, 167)

    def _positions(self) -> np.ndarray:
        return np.array([env._player.pos[::-1] for env in self.envs], np.int32)  # (N, 2) row, column

    def _counts(self) -> np.ndarray:
        return np.array([[env._player.achievements[name] for name in ACHIEVEMENTS] for env in self.envs])  # (N, 22)


class Creatures(dict):
    """A set in the order of its making."""

    def add(self, creature: Any) -> None:
        self[creature] = None

    def remove(self, creature: Any) -> None:
        del self[creature]


def begin(env: Any) -> None:
    """Begins a new game in the next world of this env's seed.

    The game draws creatures to remove from Python sets, whose order is that of memory addresses: a seed alone would not
    repeat a game.
    """
    env.reset()
    chunks = collections.defaultdict(Creatures)
    for creature in env._world.objects:
        chunks[env._world.chunk_key(creature.pos)].add(creature)
    env._world._chunks = chunks


def view_of(env: Any) -> np.ndarray:
    """What the game shows of itself: (167,) uint8, as `envs.crafter.env.observe_one` tells it of craftax."""
    world, player = env._world, env._player
    (x, y), (up, left) = player.pos, captions.CENTRE
    cells = [world[x + j - left, y + i - up] for i in range(captions.ROWS) for j in range(captions.COLS)]
    blocks = [block_of(material, thing) for material, thing in cells]
    mobs = [BITS.get(type(thing).__name__, 0) for _, thing in cells]
    numbers = [player.inventory[name] for name in NUMBERS]
    rest = [DIRECTIONS.index(tuple(player.facing)), round(world.daylight * 255), player.sleeping]
    unlocked = [player.achievements[name] > 0 for name in ACHIEVEMENTS]
    return np.array([*blocks, *mobs, *numbers, *rest, *unlocked], np.uint8)


def block_of(material: str | None, thing: Any) -> int:
    """craftax's block of a cell. Plants are blocks there; here they are things that stand on grass."""
    if type(thing).__name__ == "Plant":
        return BlockType.RIPE_PLANT.value if thing.ripe else BlockType.PLANT.value
    return BLOCKS[material]


@jax.jit
def look(
    obs: jax.Array, view: jax.Array, moved: jax.Array, time: jax.Array, again: jax.Array, done: jax.Array
) -> jax.Array:
    """What players know after a step, as in `CraftaxEnv.step`.

    Args:
        obs: (N, 218) uint8 before it
        view: (N, 167) uint8 after it, of the new game where one ended
        moved: (N, 2) int32
        time: (N,) int32, steps since the game began
        again: (N, 22) bool, achievements that were had with this step, for the first time or again: the sub-goals that
            unlock them, in that order, were reached
        done: (N,) bool
    Returns:
        (N, 218) uint8
    """
    known = jnp.where(done[:, None], 0, obs)  # nothing is remembered of another life
    new = look_again(known, view, moved, time, plant_age(known, time, again))
    # Where no plant is known none has an age. In craftax, plants stay.
    has_plant = captions.places(new)[:, KINDS.index("plant"), 2] > 0
    return new.at[:, captions.PLANT_AGE].multiply(has_plant.astype(jnp.uint8))
