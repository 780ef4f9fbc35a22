"""The words of Crafter: achievements, facts, sub-goals and their aliases. Plain Python, no jax.

The sub-goals are the closed list of the reference method (arXiv 2309.17176): 22 basic ones, in the order of the
achievement that each of them unlocks, then nine composite ones, which are advice only (nothing detects them).
Facts are named booleans about a situation. Advice may rest on them and on nothing else.
"""

# Crafter's 22 achievements, in the order of craftax's `Achievement` enum.
ACHIEVEMENTS = (
    "collect_wood", "place_table", "eat_cow", "collect_sapling", "collect_drink", "make_wood_pickaxe",
    "make_wood_sword", "place_plant", "defeat_zombie", "collect_stone", "place_stone", "eat_plant",
    "defeat_skeleton", "make_stone_pickaxe", "make_stone_sword", "wake_up", "place_furnace", "collect_coal",
    "collect_iron", "collect_diamond", "make_iron_pickaxe", "make_iron_sword",
)  # fmt: skip

# SUB_GOALS[i] is the sub-goal that unlocks ACHIEVEMENTS[i], for i < 22.
BASIC_SUB_GOALS = (
    "chop tree", "place crafting table", "attack cow", "chop grass", "drink water", "make wood pickaxe",
    "make wood sword", "place plant", "attack zombie", "mine stone", "place stone", "eat plant",
    "attack skeleton", "make stone pickaxe", "make stone sword", "sleep", "place furnace", "mine coal",
    "mine iron", "mine diamond", "make iron pickaxe", "make iron sword",
)  # fmt: skip
COMPOSITE_SUB_GOALS = (
    "plant row", "chop grass with wood pickaxe", "vegetarianism", "make workshop", "survival", "deforestation",
    "work and sleep", "gardening", "wilderness survival",
)  # fmt: skip
SUB_GOALS = BASIC_SUB_GOALS + COMPOSITE_SUB_GOALS
NUM_BASIC = len(BASIC_SUB_GOALS)

# In the order of craftax's `Action` enum.
ACTIONS = (
    "noop", "left", "right", "up", "down", "do", "sleep", "place stone", "place table", "place furnace", "place plant",
    "make wood pickaxe", "make stone pickaxe", "make iron pickaxe", "make wood sword", "make stone sword",
    "make iron sword",
)  # fmt: skip

INVENTORY = (
    "wood", "stone", "coal", "iron", "diamond", "sapling",
    "wood pickaxe", "stone pickaxe", "iron pickaxe", "wood sword", "stone sword", "iron sword",
)  # fmt: skip
VITALS = ("health", "food", "drink", "energy")
LOW = 4  # a vital is low at this value (of 9) or below: one or two lost points from trouble, time enough to act
NEAR = 3  # a zombie is near within this many steps

# Things that a caption can report as in view, passable or not.
SIGHTS = (
    "tree", "water", "stone", "coal", "iron", "diamond", "crafting table", "furnace", "plant", "ripe plant", "lava",
    "cow", "zombie", "skeleton", "arrow",
)  # fmt: skip

# Things that advice can point at, and whose nearest place the policy sees: blocks, then mobs.
KINDS = (
    "grass", "water", "stone", "tree", "path", "coal", "iron", "diamond", "crafting table", "furnace", "lava", "plant",
    "zombie", "cow", "skeleton", "arrow",
)  # fmt: skip

AMOUNTS = (
    ("wood", 1), ("wood", 2), ("wood", 3), ("wood", 4), ("wood", 6), ("stone", 1), ("stone", 2), ("stone", 4),
    ("stone", 6), ("coal", 1), ("coal", 2), ("iron", 1), ("iron", 2), ("sapling", 1), ("food", 7),
    ("drink", 7), ("energy", 7),
)  # fmt: skip

# Kinds that stay where they were seen (cows wander, but not far), and those whose place is worth a fact.
LASTING = tuple(kind for kind in KINDS if kind not in ("zombie", "skeleton", "arrow"))
KNOWN = ("tree", "water", "stone", "coal", "iron", "diamond", "crafting table", "furnace", "plant", "cow")
CLOSE = 8  # a table or furnace is close within this many steps: no need of another one

# Fact names, (P,). The order is the layout of every situation: unlocked, amounts, vitals, view, places, the rest.
_UNLOCKED = tuple("unlocked " + name.replace("_", " ") for name in ACHIEVEMENTS)
_AMOUNTS = tuple(f"{item} >= {n}" for item, n in AMOUNTS)
_LOW = tuple(f"{vital} low" for vital in VITALS)
_VIEW = tuple(f"{sight} in view" for sight in SIGHTS)
_KNOWN = tuple(f"{kind} known" for kind in KNOWN) + ("table close", "furnace close")
_REST = (
    "zombie near", "table in reach", "furnace in reach", "energy full", "evening", "dark", "asleep",
    "one stone from shelter", "enclosed", "plant ripening", "plant ripe by now",
)  # fmt: skip
FACTS = _UNLOCKED + _AMOUNTS + _LOW + _VIEW + _KNOWN + _REST
# What is near once somebody is there -> what is enough to set out for it
DESTINATIONS = {"table in reach": "crafting table known", "furnace in reach": "furnace known"} | {
    f"{kind} in view": f"{kind} known" for kind in KNOWN if kind in SIGHTS
}

# Other words for the same sub-goal, as language models like to put them. Keys are in normal form (`Game.normalise`).
SUB_GOAL_ALIASES = {
    "chop tree": "chop wood, cut tree, cut down tree, chop down tree, collect wood, gather wood, get wood, harvest "
    "wood, harvest tree, collect log, punch tree, chop a tree down, collect tree",
    "place crafting table": "place table, place a workbench, craft a workbench, build workbench, make crafting table, "
    "craft crafting table, build crafting table, craft table, make table, build table, place workbench, create "
    "crafting table, craft a table, set up crafting table",
    "attack cow": "eat cow, kill cow, hunt cow, slay cow, eat beef, get food from cow, hunt cows for food, eat meat, "
    "defeat cow, hunt for food",
    "chop grass": "collect sapling, get sapling, gather sapling, cut grass, harvest grass, find sapling, search grass "
    "for sapling, obtain sapling, collect grass",
    "drink water": "collect drink, drink, get water, collect water, find water, drink from lake, quench thirst, "
    "drink from water, gather water",
    "make wood pickaxe": "craft wood pickaxe, craft wooden pickaxe, make wooden pickaxe, build wooden pickaxe, "
    "create wooden pickaxe, wood pickaxe, wooden pickaxe, create wood pickaxe",
    "make wood sword": "craft wood sword, craft wooden sword, make wooden sword, build wooden sword, create wooden "
    "sword, wood sword, wooden sword, create wood sword",
    "place plant": "place sapling, plant sapling, plant tree, plant a seed, put sapling, plant",
    "attack zombie": "defeat zombie, kill zombie, fight zombie, slay zombie, fight off zombie, defend against zombie",
    "mine stone": "collect stone, gather stone, get stone, dig stone, mine rock, collect rock, mine cobblestone",
    "place stone": "put stone, place rock, place block, block with stone, build shelter, place stone block",
    "eat plant": "eat ripe plant, harvest plant, eat crop, harvest ripe plant, eat fruit",
    "attack skeleton": "defeat skeleton, kill skeleton, fight skeleton, slay skeleton",
    "make stone pickaxe": "craft stone pickaxe, build stone pickaxe, create stone pickaxe, stone pickaxe",
    "make stone sword": "craft stone sword, build stone sword, create stone sword, stone sword",
    "sleep": "wake up, rest, go to sleep, take a nap, get sleep, sleep until rested, restore energy",
    "place furnace": "make furnace, craft furnace, build furnace, create furnace, put furnace",
    "mine coal": "collect coal, gather coal, get coal, dig coal",
    "mine iron": "collect iron, gather iron, get iron, dig iron, mine iron ore",
    "mine diamond": "collect diamond, gather diamond, get diamond, dig diamond, find diamond",
    "make iron pickaxe": "craft iron pickaxe, build iron pickaxe, create iron pickaxe, iron pickaxe",
    "make iron sword": "craft iron sword, build iron sword, create iron sword, iron sword",
    "plant row": "plant a row of saplings, plant rows",
    "chop grass with wood pickaxe": "cut grass with wooden pickaxe",
    "make workshop": "build workshop",
    "work and sleep": "work then sleep",
    "gardening": "garden",
    "wilderness survival": "survive in the wilderness",
    "survival": "survive, stay alive",
}

FACT_ALIASES = {
    "crafting table in view": "table in view, workbench in view",
    "table in reach": "crafting table in reach, crafting table nearby, table nearby, near table, near crafting table",
    "furnace in reach": "furnace nearby, near furnace",
    "crafting table known": "table known, knows a table, remembers a table",
    "table close": "crafting table close",
    "zombie near": "zombie nearby, zombie is near, zombie close",
    "drink low": "thirsty, water low, thirst low, low drink",
    "food low": "hungry, low food, hunger low",
    "energy low": "tired, low energy",
    "health low": "low health, hurt",
    "dark": "night, is dark, it is dark",
    "sapling >= 1": "sapling, has sapling, have sapling",
    "unlocked make wood pickaxe": "has wood pickaxe, wood pickaxe, have wood pickaxe",
    "unlocked make stone pickaxe": "has stone pickaxe, stone pickaxe, have stone pickaxe",
    "unlocked make iron pickaxe": "has iron pickaxe, iron pickaxe, have iron pickaxe",
    "unlocked make wood sword": "has wood sword, wood sword, have wood sword",
    "unlocked make stone sword": "has stone sword, stone sword, have stone sword",
    "unlocked make iron sword": "has iron sword, iron sword, have iron sword",
}

WORD_FORMS = {
    "trees": "tree", "cows": "cow", "zombies": "zombie", "skeletons": "skeleton", "stones": "stone",
    "saplings": "sapling", "plants": "plant", "logs": "log", "diamonds": "diamond", "rocks": "rock",
    "tables": "table", "sleeping": "sleep", "drinking": "drink", "chopping": "chop", "mining": "mine",
    "placing": "place", "making": "make", "crafting": "crafting", "eating": "eat", "attacking": "attack",
    "collecting": "collect",
}  # fmt: skip
