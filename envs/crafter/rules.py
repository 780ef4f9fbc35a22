"""Crafter's rules: what a sub-goal needs, and the offline guide `rules`, a stand-in for an LLM that is none."""

from collections.abc import Sequence

from envs.crafter.vocabulary import BASIC_SUB_GOALS, FACTS, SUB_GOALS
from envs.game import Advice, holds

# What Crafter demands of a basic sub-goal now ("not " marks a false fact). Tools are never lost: unlocked means owned.
_WOOD_TOOL = ("table in reach", "wood >= 1")
_STONE_TOOL = (*_WOOD_TOOL, "stone >= 1")
_IRON_TOOL = (*_STONE_TOOL, "furnace in reach", "coal >= 1", "iron >= 1")
NEEDS: dict[str, tuple[str, ...]] = {
    "chop tree": ("tree in view",),
    "place crafting table": ("wood >= 2",),
    "attack cow": ("cow in view",),
    "chop grass": (),
    "drink water": ("water in view",),
    "make wood pickaxe": _WOOD_TOOL,
    "make wood sword": _WOOD_TOOL,
    "place plant": ("sapling >= 1",),
    "attack zombie": ("zombie in view",),
    "mine stone": ("unlocked make wood pickaxe", "stone in view"),
    "place stone": ("stone >= 1",),
    "eat plant": ("ripe plant in view",),
    "attack skeleton": ("skeleton in view",),
    "make stone pickaxe": _STONE_TOOL,
    "make stone sword": _STONE_TOOL,
    "sleep": ("not energy full",),
    "place furnace": ("stone >= 1",),
    "mine coal": ("unlocked make wood pickaxe", "coal in view"),
    "mine iron": ("unlocked make stone pickaxe", "iron in view"),
    "mine diamond": ("unlocked make iron pickaxe", "diamond in view"),
    "make iron pickaxe": _IRON_TOOL,
    "make iron sword": _IRON_TOOL,
}

# Which thing a sub-goal is about: the one to go to. Placing and sleeping need none.
THINGS: dict[str, str] = {
    "chop tree": "tree",
    "attack cow": "cow",
    "drink water": "water",
    "make wood pickaxe": "crafting table",
    "make wood sword": "crafting table",
    "attack zombie": "zombie",
    "mine stone": "stone",
    "eat plant": "ripe plant",
    "attack skeleton": "skeleton",
    "make stone pickaxe": "crafting table",
    "make stone sword": "crafting table",
    "mine coal": "coal",
    "mine iron": "iron",
    "mine diamond": "diamond",
    "make iron pickaxe": "furnace",
    "make iron sword": "furnace",
}

# (sub-goal, when it is wise), the most urgent first: a life in danger, what the analysis names (`advise`), the next
# tool, then what it takes, then what earns a first reward. Where a thing need not be in view for its sub-goal to be
# wise the list does not ask for it: the player sees for itself, and the fewer facts a piece of advice rests on, the
# more situations it serves.
URGENT = (
    ("attack zombie", ("zombie near",)),
    ("drink water", ("drink low",)),
    ("attack cow", ("food low",)),
    ("eat plant", ("food low", "ripe plant in view")),
    ("sleep", ("energy low",)),
)
_AT_TABLE = "crafting table in view"
WISE = (
    ("make iron pickaxe", ("not unlocked make iron pickaxe", "iron >= 1", "furnace in view", _AT_TABLE)),
    ("make iron sword", ("not unlocked make iron sword", "iron >= 1", "furnace in view", _AT_TABLE)),
    ("make stone pickaxe", ("not unlocked make stone pickaxe", "stone >= 1", "wood >= 1", _AT_TABLE)),
    ("make stone sword", ("not unlocked make stone sword", "stone >= 1", "wood >= 1", _AT_TABLE)),
    ("make wood pickaxe", ("not unlocked make wood pickaxe", "wood >= 1", _AT_TABLE)),
    ("make wood sword", ("not unlocked make wood sword", "wood >= 1", _AT_TABLE)),
    ("place furnace", ("iron >= 1", "stone >= 1", "not furnace in view", _AT_TABLE)),
    ("place furnace", ("not unlocked place furnace", "stone >= 1")),
    ("place stone", ("not unlocked place stone", "stone >= 1")),
    ("place plant", ("not unlocked place plant", "sapling >= 1")),
    ("place crafting table", ("not unlocked place table", "wood >= 2")),
    ("place crafting table", ("not " + _AT_TABLE, "wood >= 4", "not unlocked make iron pickaxe")),
    ("mine diamond", ("unlocked make iron pickaxe", "not unlocked collect diamond")),
    ("mine iron", ("unlocked make stone pickaxe", "not iron >= 2")),
    ("mine coal", ("unlocked make wood pickaxe", "not coal >= 2")),
    ("mine stone", ("unlocked make wood pickaxe", "not stone >= 4")),
    ("chop tree", ("not wood >= 4",)),
    ("drink water", ("not unlocked collect drink",)),
    ("attack cow", ("not unlocked eat cow",)),
    ("chop grass", ("not unlocked collect sapling",)),
    ("sleep", ("not unlocked wake up", "not energy full")),
    ("attack zombie", ("not unlocked defeat zombie",)),
    ("attack skeleton", ("not unlocked defeat skeleton", "skeleton in view")),
)


def advise(truths: dict[str, bool], named: Sequence[int]) -> Advice:
    """Returns sub-goals for a situation, the most urgent first, each with the facts that it rests on.

    Args:
        truths: the truth of every fact
        named: basic sub-goals that the adapter's analysis names. One counts as wise where it is possible now and was
            not reached in this life: advised for ever, some things could be done and undone for a bonus without end.
    """
    heeded = tuple((BASIC_SUB_GOALS[i], (f"not {FACTS[i]}", *NEEDS[BASIC_SUB_GOALS[i]])) for i in named)
    advice: dict[str, tuple[str, ...]] = {}
    for sub_goal, reasons in (*URGENT, *heeded, *WISE):
        if holds(truths, reasons):
            advice.setdefault(sub_goal, reasons)
    return [(SUB_GOALS.index(sub_goal), reasons) for sub_goal, reasons in advice.items()]
