"""Crafter's rules: what a sub-goal needs, and the offline guide `rules`, a stand-in for an LLM that is none."""

from envs.crafter.vocabulary import BASIC_SUB_GOALS, FACTS, SUB_GOALS
from envs.game import Advice, Heard, holds

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
    "eat plant": "plant",
    "attack skeleton": "skeleton",
    "make stone pickaxe": "crafting table",
    "make stone sword": "crafting table",
    "mine coal": "coal",
    "mine iron": "iron",
    "mine diamond": "diamond",
    "make iron pickaxe": "furnace",
    "make iron sword": "furnace",
}

# (sub-goal, when it is wise), the most urgent first: a life in danger, what can be made now, what is in view for the
# first time, what the next tool takes; last, in `advise`, what the analysis names. Where a thing need not be known for
# its sub-goal to be wise the list does not ask for it: the player sees for itself, and the fewer facts a piece of
# advice rests on, the more situations it serves.
_PICKAXE = "unlocked make wood pickaxe"
URGENT = (
    ("attack zombie", ("zombie near",)),
    ("drink water", ("drink low",)),
    ("attack cow", ("food low",)),
    ("eat plant", ("ripe plant in view", "food low")),
    ("eat plant", ("ripe plant in view", "not unlocked eat plant")),
    ("eat plant", ("plant ripe by now", "plant known", "not unlocked eat plant")),
    ("sleep", ("enclosed", "dark", "not energy >= 7")),
    ("place stone", ("one stone from shelter", "dark", "stone >= 1")),
    ("place stone", ("one stone from shelter", "energy low", "stone >= 1")),
    ("sleep", ("energy low", "enclosed")),
    ("sleep", ("energy low", "not zombie in view")),
)
# Each thing earns a reward once a life: what would be the first one, and is in view, the rarest first.
FIRST = tuple(
    (sub_goal, (f"not unlocked {achievement}", *NEEDS[sub_goal]))
    for sub_goal, achievement in (
        ("mine diamond", "collect diamond"),
        ("mine iron", "collect iron"),
        ("mine coal", "collect coal"),
        ("mine stone", "collect stone"),
        ("drink water", "collect drink"),
        ("attack cow", "eat cow"),
        ("chop tree", "collect wood"),
        ("attack skeleton", "defeat skeleton"),
    )
)
_AT_TABLE = "table close"
_AWAY = f"not {_AT_TABLE}"
_STONE_PICKAXE = "unlocked make stone pickaxe"
_IRON_BAG = ("wood >= 1", "stone >= 1", "coal >= 1", "iron >= 1", "furnace close", _AT_TABLE)
MAKE = (
    ("make iron pickaxe", ("not unlocked make iron pickaxe", *_IRON_BAG)),
    ("make iron sword", ("not unlocked make iron sword", "unlocked make iron pickaxe", *_IRON_BAG)),
    ("make stone pickaxe", ("not unlocked make stone pickaxe", "stone >= 1", "wood >= 1", _AT_TABLE)),
    ("make stone sword", ("not unlocked make stone sword", "stone >= 1", "wood >= 1", _AT_TABLE)),
    ("make wood pickaxe", ("not unlocked make wood pickaxe", "wood >= 1", _AT_TABLE)),
    ("make wood sword", ("not unlocked make wood sword", "wood >= 1", _AT_TABLE)),
    ("place furnace", ("iron >= 1", "coal >= 1", "stone >= 2", "not furnace in reach", "table in reach")),
    ("place furnace", ("not unlocked place furnace", "stone >= 1")),
    ("place stone", ("not unlocked place stone", "stone >= 1")),
    ("place plant", ("not unlocked place plant", "sapling >= 1")),
    ("place crafting table", ("not unlocked place table", "wood >= 2")),
    ("place crafting table", (_AWAY, "wood >= 4", "stone >= 1", f"not {_STONE_PICKAXE}")),  # wood for both tools
    ("place crafting table", (_AWAY, "wood >= 3", "stone >= 1", _STONE_PICKAXE, "not unlocked make stone sword")),
    ("place crafting table", (_AWAY, "wood >= 3", "iron >= 1", "coal >= 1", "not unlocked make iron pickaxe")),
    ("place crafting table", (_AWAY, "wood >= 3", "iron >= 1", "coal >= 1", "not unlocked make iron sword")),
)
WISE = (
    ("sleep", ("not unlocked wake up", "not energy full", "not dark", "not zombie in view")),  # a nap: 12 steps
    ("mine diamond", ("unlocked make iron pickaxe", "not unlocked collect diamond")),
    ("mine iron", (_STONE_PICKAXE, "not iron >= 2", "not unlocked make iron sword")),
    ("mine coal", (_PICKAXE, "not coal >= 2")),
    ("mine stone", (_PICKAXE, "not stone >= 6")),
    ("chop tree", ("not wood >= 6",)),
    ("drink water", ("not unlocked collect drink",)),
    ("attack cow", ("not unlocked eat cow",)),
    ("chop grass", ("not unlocked collect sapling",)),
    ("drink water", ("not drink >= 7", "water in view")),
    ("attack cow", ("not food >= 7", "cow in view")),
    ("attack zombie", ("not unlocked defeat zombie",)),
)


def advise(truths: dict[str, bool], named: Heard) -> Advice:
    """Returns sub-goals for a situation, the most urgent first, each with the facts that it rests on.

    Args:
        truths: the truth of every fact
        named: basic sub-goals that the adapter's analysis names. One counts as wise where it is possible now and was
            not reached in this life: advised for ever, some things could be done and undone for a bonus without end.
    """
    heeded = tuple((BASIC_SUB_GOALS[i], (f"not {FACTS[i]}", *NEEDS[BASIC_SUB_GOALS[i]])) for i in named)
    advice: dict[str, tuple[str, ...]] = {}
    for sub_goal, reasons in (*URGENT, *MAKE, *FIRST, *WISE, *heeded):
        if holds(truths, reasons):
            advice.setdefault(sub_goal, reasons)
    return [(SUB_GOALS.index(sub_goal), reasons) for sub_goal, reasons in advice.items()]
