"""Detectors of the 22 basic sub-goals: was one reached, was one worked towards? Pure JAX, one game at a time.

A detector looks at the state before a step, the action, and the state after it. *Reached* means that the thing itself
happened (again): wood was added to the inventory, a cow was eaten, the player woke up. *Worked towards* is what a bonus
may reward: the same, but every hit on a mob counts, and every step asleep until energy is full (else steps that are
paid elsewhere would be worth more than a nap). Neither can be had for nothing: drinking when not thirsty, or mining
with a full inventory, is not detected, except for the first time, when it unlocks the achievement.
"""

import jax
import jax.numpy as jnp
from craftax.craftax_classic.constants import DIRECTIONS, Action, BlockType
from craftax.craftax_classic.envs.craftax_state import EnvState, Mobs
from craftax.craftax_classic.game_logic import get_player_attack_damage

from envs.crafter.vocabulary import BASIC_SUB_GOALS

_MOB_GOALS = {"attack cow": "cows", "attack zombie": "zombies", "attack skeleton": "skeletons"}
_GAINS = {
    "chop tree": "wood", "chop grass": "sapling", "mine stone": "stone", "mine coal": "coal", "mine iron": "iron",
    "mine diamond": "diamond", "make wood pickaxe": "wood_pickaxe", "make stone pickaxe": "stone_pickaxe",
    "make iron pickaxe": "iron_pickaxe", "make wood sword": "wood_sword", "make stone sword": "stone_sword",
    "make iron sword": "iron_sword",
}  # fmt: skip
_PLACINGS = {
    "place crafting table": (Action.PLACE_TABLE, "wood"),
    "place furnace": (Action.PLACE_FURNACE, "stone"),
    "place stone": (Action.PLACE_STONE, "stone"),
    "place plant": (Action.PLACE_PLANT, "sapling"),
}


def detect(before: EnvState, action: jax.Array, after: EnvState) -> tuple[jax.Array, jax.Array]:
    """Sub-goals of one step of one game.

    Args:
        before: the state that the step began in
        action: () int
        after: the state that the step led to, before any reset
    Returns:
        reached (22,) bool, worked (22,) bool; worked includes reached
    """
    reached, worked = {}, {}
    doing = (action == Action.DO.value) & ~before.is_sleeping
    target = before.player_position + DIRECTIONS[before.player_direction]
    damage = get_player_attack_damage(before)
    any_hit = jnp.zeros((), bool)
    for goal, kind in _MOB_GOALS.items():
        hit, killed = _attack(getattr(before, kind), target, damage, doing)
        reached[goal], worked[goal] = killed, hit
        any_hit |= hit
    for goal, item in _GAINS.items():
        reached[goal] = getattr(after.inventory, item) > getattr(before.inventory, item)
    for goal, (act, item) in _PLACINGS.items():
        spent = getattr(after.inventory, item) < getattr(before.inventory, item)
        reached[goal] = (action == act.value) & spent
    block = before.map[target[0], target[1]]
    reached["eat plant"] = doing & ~any_hit & (block == BlockType.RIPE_PLANT.value)
    drinking = doing & ~any_hit & (block == BlockType.WATER.value)
    reached["drink water"] = drinking & (after.player_drink > before.player_drink)
    reached["sleep"] = before.is_sleeping & ~after.is_sleeping
    worked["sleep"] = before.is_sleeping & (before.player_energy < 9)

    first_time = after.achievements & ~before.achievements
    all_reached = jnp.stack([reached[goal] for goal in BASIC_SUB_GOALS]) | first_time
    all_worked = jnp.stack([worked.get(goal, reached[goal]) for goal in BASIC_SUB_GOALS]) | all_reached
    return all_reached, all_worked


def _attack(mobs: Mobs, target: jax.Array, damage: jax.Array, doing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Was a mob of this kind hit, was it killed? () bool each. Read from the state before: after it, a new mob may
    have taken the place of a dead one in craftax's arrays."""
    in_front = mobs.mask & (mobs.position == target).all(1)  # (M,)
    hit = doing & in_front.any()
    return hit, hit & (mobs.health[jnp.argmax(in_front)] <= damage)
