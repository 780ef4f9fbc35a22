"""The offline guide `rules` with generic Minecraft in its head: a stand-in for an LLM that does not know the game.

It believes what anybody who has played Minecraft would, and what is wrong in Crafter: tools take planks and sticks, a
table four of what it calls planks, a furnace eight stones, iron tools two or three ingots; nobody is ever thirsty;
sleeping is for the night and harms nobody. It is never told better, except by the adapter's analysis.
"""

from collections.abc import Mapping

from envs.crafter.rules import THINGS
from envs.crafter.vocabulary import BASIC_SUB_GOALS, FACTS, SUB_GOALS
from envs.game import Advice, Heard, holds

# (sub-goal, when it is believed to be wise), the most urgent first. Amounts as far as there are facts for them.
BELIEFS = (
    ("attack zombie", ("zombie near",)),
    ("attack skeleton", ("skeleton in view",)),
    ("attack cow", ("food low",)),
    ("sleep", ("dark",)),
    ("make iron pickaxe", ("not unlocked make iron pickaxe", "iron >= 2", "wood >= 2", "crafting table known")),
    ("make iron sword", ("not unlocked make iron sword", "iron >= 2", "wood >= 1", "crafting table known")),
    ("mine diamond", ("unlocked make iron pickaxe", "diamond in view")),
    ("make stone pickaxe", ("not unlocked make stone pickaxe", "stone >= 4", "wood >= 2", "crafting table known")),
    ("make stone sword", ("not unlocked make stone sword", "stone >= 2", "wood >= 1", "crafting table known")),
    ("make wood pickaxe", ("not unlocked make wood pickaxe", "wood >= 4", "crafting table known")),
    ("make wood sword", ("not unlocked make wood sword", "wood >= 3", "crafting table known")),
    ("place furnace", ("not unlocked place furnace", "stone >= 6")),
    ("mine iron", ("unlocked make stone pickaxe", "iron in view")),
    ("mine coal", ("unlocked make wood pickaxe", "coal in view")),
    ("place crafting table", ("not table close", "wood >= 4")),
    ("mine stone", ("unlocked make wood pickaxe", "not stone >= 6")),
    ("chop tree", ("not wood >= 6",)),
    ("eat plant", ("ripe plant in view",)),
    ("place plant", ("sapling >= 1",)),
    ("chop grass", ("not sapling >= 1",)),
)
# What of that says why and when something is wanted; the rest says what it is believed to take.
WHY = ("food low", "dark")
DONE = "not unlocked "  # what is done once


def advise(truths: dict[str, bool], named: Heard) -> Advice:
    """Returns sub-goals for a situation, the most urgent first, each with the facts that it rests on.

    Args:
        truths: the truth of every fact
        named: basic sub-goals that the adapter's analysis names or says what they take, which is believed for this
            reply, beside why it is wanted; the first one is put first, where its reasons hold. What is done already is
            not advised, unless it is said to take that something is lacking.
    """
    beliefs, told = dict(BELIEFS), {}
    for sub_goal, takes in ((BASIC_SUB_GOALS[i], takes) for i, takes in named.items()):
        why = [reason for reason in beliefs.get(sub_goal, ()) if reason.startswith("not ") or reason in WHY]
        if any(reason.startswith("not ") and not reason.startswith(DONE) for reason in takes):
            why = [reason for reason in why if not reason.startswith(DONE)]  # once more, for another end
        until = [reason for reason in why if reason.startswith("not ")]
        reasons = tuple(dict.fromkeys((*why, *takes))) if takes else reasons_for(sub_goal, truths, beliefs)
        if reasons and holds(truths, until):  # advice without reasons would rest on what the game demands
            told[sub_goal] = reasons  # advice is a rule, also where it does not hold yet
    advice = {sub_goal: reasons for sub_goal, reasons in list(told.items())[:1] if holds(truths, reasons)}
    for sub_goal, reasons in (beliefs | told).items():
        if sub_goal in told or holds(truths, reasons):
            advice.setdefault(sub_goal, reasons)
    return [(SUB_GOALS.index(sub_goal), reasons) for sub_goal, reasons in advice.items()]


def reasons_for(
    sub_goal: str, truths: dict[str, bool], beliefs: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:  # fmt: skip
    """Returns why a sub-goal that somebody else found urgent might be so.

    What is believed of it, as far as it holds, and the thing that it is about, if that is in view. Where nothing of
    that holds, all of it: the rule for later. () if nothing is known of it.
    """
    thing = f"{THINGS.get(sub_goal)} in view"
    known = (*beliefs.get(sub_goal, ()), *[thing] * (thing in FACTS))
    return tuple(dict.fromkeys([reason for reason in known if holds(truths, (reason,))] or known))
