"""Crafter (Hafner, arXiv 2109.06780), played as Craftax-Classic, its JAX version (arXiv 2402.16801).

    env.py         the vectorised env            goals.py     detectors of sub-goals reached and worked towards
    captions.py    facts and captions            rules.py     what sub-goals need; the offline guide `rules`
    vocabulary.py  names and their aliases       minecraft.py `rules` with Minecraft in its head
    this file      all of it as a `Game`, and the env's maker
"""

import math

from envs.crafter import minecraft, rules, vocabulary
from envs.game import Game

PROMPT = """You guide a player in Crafter, a two-dimensional survival game on a grid. The player learns by trial
and error and hears from you only now and then. In each life it earns a reward the first time that it does each of 22
things: collect wood, stone, coal, iron, diamond, a sapling, a drink; place a table, a furnace, a stone, a plant; make a
pickaxe and a sword of wood, of stone, of iron; eat a cow, a ripe plant; defeat a zombie, a skeleton; sleep and wake up.
It dies when its health is used up: zombies, skeletons, hunger, thirst and tiredness take it, and so does lava.

Rules. A table costs 2 wood; a wood pickaxe or sword 1 wood; a stone one 1 wood, 1 stone; an iron one 1 wood, 1 stone,
1 coal, 1 iron; a furnace 1 stone. Tools are made with a table in reach, iron tools with a furnace in reach too. There
are no planks, sticks or smelting. Stone and coal need a wood pickaxe, iron a stone pickaxe, diamond an iron pickaxe.
Grass gives a sapling one time in ten; a placed sapling must ripen before it is eaten. Zombies come in the dark and
while the player sleeps: it sleeps safely when enclosed, for example by stones."""

CRAFTER = Game(
    name="crafter",
    actions=vocabulary.ACTIONS,
    achievements=vocabulary.ACHIEVEMENTS,
    facts=vocabulary.FACTS,
    sub_goals=vocabulary.SUB_GOALS,
    num_basic=len(vocabulary.BASIC_SUB_GOALS),
    prompt=PROMPT,
    needs=rules.NEEDS,
    kinds=vocabulary.KINDS,
    things=rules.THINGS,
    destinations=vocabulary.DESTINATIONS,
    doing=("asleep",),
    acts={"place crafting table": "place table"},
    advise=rules.advise,
    believers={"minecraft": minecraft.advise},
    sub_goal_aliases=vocabulary.SUB_GOAL_ALIASES,
    fact_aliases=vocabulary.FACT_ALIASES,
    word_forms=vocabulary.WORD_FORMS,
)


def make_env(num_envs: int, num_devices: int) -> "CraftaxEnv":  # noqa: F821
    """Makes the env for num_envs parallel games on that many devices."""
    from envs.crafter.env import CraftaxEnv  # late: craftax takes seconds to import

    # From 2,048 envs on 1, 2, 4 and 8 devices have the same pools, and so the same results. Below that, as many pools
    # would waste worlds.
    num_pools = math.lcm(num_devices, 8 if num_envs % 8 == 0 and num_envs >= 2048 else 1)
    return CraftaxEnv(pool_size=max(8, num_envs // num_pools), num_pools=num_pools)
