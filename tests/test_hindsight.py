"""What RL finds out: what came of situations, what sub-goals take, examples, agreement."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_guidance import Words, table_of

import hindsight
import rladapter_adapter as ra
import rladapter_ppo as rl
from envs.crafter import CRAFTER
from envs.crafter.vocabulary import FACTS, NUM_BASIC
from hindsight import HORIZON, Found, Plan, enough, look_ahead, usual
from llm_client import Question

GOAL, FACT = CRAFTER.sub_goal_numbers, CRAFTER.fact_numbers


def history_of(rng, steps, envs, goals):
    return {
        "reward": rng.normal(size=(steps, envs)),
        "done": rng.random((steps, envs)) < 0.02,
        "reached": rng.random((steps, envs, goals)) < 0.01,
    }


def test_look_ahead_against_a_loop():
    rng = np.random.default_rng(0)
    history = history_of(rng, 200, 3, 4)
    steps, envs = rng.integers(200, size=300), rng.integers(3, size=300)
    packed = history | {"reached": np.packbits(history["reached"], axis=-1)}
    came = look_ahead(packed, steps, envs, num_goals=4)
    for i, (step, env) in enumerate(zip(steps, envs, strict=True)):
        total, when, known, paid = 0.0, [HORIZON] * 4, False, [False] * 4
        for ahead in range(HORIZON):
            if step + ahead == 200:
                break
            total += history["reward"][step + ahead, env]
            for goal in np.flatnonzero(history["reached"][step + ahead, env]):
                when[goal] = min(when[goal], ahead)
                paid[goal] |= history["reward"][step + ahead, env] > hindsight.PAYS
            known |= ahead == HORIZON - 1
            if history["done"][step + ahead, env]:
                break
        assert came["known"][i] == (step + HORIZON <= 200) and not known > came["known"][i]
        if came["known"][i]:
            assert came["when"][i].tolist() == when and came["paid"][i].tolist() == paid
            np.testing.assert_allclose(came["returns"][i], total)
    assert 0.5 < came["known"].mean() < 1


def test_what_is_usual_is_what_situations_with_these_facts_bring():
    rng = np.random.default_rng(1)
    facts = rng.random((3000, 5)) < 0.5
    returns = 3.0 * facts[:, 2] - facts[:, 4] + 1 + rng.normal(size=3000)
    np.testing.assert_allclose(usual(facts, returns), 3.0 * facts[:, 2] - facts[:, 4] + 1, atol=0.25)


def phase_of(updates=2, steps=HORIZON, envs=3, chosen=((0, 1, 2), (3, 4, 5))):
    """A phase in which nothing happens; of its last rollout there is a step too little to look at."""
    return {
        "reward": np.zeros((updates, steps, envs), np.float32),
        "done": np.zeros((updates, steps, envs), bool),
        "reached": np.zeros((updates, steps, envs, NUM_BASIC), bool),
        "chosen": np.array(chosen),
    }


def add(found, history, facts, sums=None):
    met = {"obs": np.arange(2 * len(facts), dtype=np.uint8).reshape(-1, 2), "facts": np.asarray(facts, bool)}
    history = history | {"reached": np.packbits(history["reached"], axis=-1)}
    found.add(sums or {}, history, met)


def test_a_phase_is_seen_as_a_whole_and_what_it_does_not_show_is_left_out():
    """The first rollout's situations look into the second one, those of the second have not enough to look at."""
    found, history = Found(CRAFTER, 2), phase_of()
    history["reached"][1, 0, 1, GOAL["mine iron"]] = True  # HORIZON steps after the beginning: one too late
    history["reached"][0, HORIZON - 1, 2, GOAL["sleep"]] = True
    history["done"][0, 5, 0] = history["done"][1, 5, 0] = True
    history["reward"][0, 5, 0] = 2.5
    history["reward"][0, 6, 0] = 9.0  # of the next life
    add(found, history, np.zeros((6, len(FACTS))))
    assert found.num == 3  # all of the first rollout, and of the second not even the one whose life ended
    assert [found.worth_saying(i) for i in range(3)] == [None, None, GOAL["sleep"]]
    assert found.arrays.returns[:3].tolist() == [2.5, 0.0, 0.0] and found.arrays.obs[2].tolist() == [4, 5]


def test_nothing_is_kept_where_nothing_is_learnt():
    found = Found(CRAFTER, 2)
    found.add({}, {}, {"obs": np.zeros((3, 2)), "facts": np.zeros((3, len(FACTS)))})
    assert found.num == 0 and not len(found.gains()) and found.examples("hindsight", 9, str) == []


def counts(always=(), base=(), times=40, steps=1000):
    """Sums of a phase in which iron was mined when `always` was true; base: in how many steps facts are."""
    then, together = np.zeros((NUM_BASIC, len(FACTS))), np.zeros((len(FACTS), len(FACTS)))
    for name in always:
        then[GOAL["mine iron"], FACT[name]] = times
    for name, count in base:
        together[FACT[name], FACT[name]] = count
    reached = np.zeros(NUM_BASIC)
    reached[GOAL["mine iron"]] = times
    return {"times": reached, "true_then": then, "together": together, "steps": steps}


def test_what_a_sub_goal_takes_is_what_was_always_so_and_is_not_so_anyway():
    found = Found(CRAFTER, 2)
    names = ("iron in view", "unlocked make stone pickaxe", "tree known", "iron known")
    sums = counts(names, zip(names, (90, 300, 950, 120), strict=True))
    sums["true_then"][GOAL["mine iron"], FACT["dark"]] = 38  # of 40: not always
    sums["together"][FACT["iron in view"], FACT["iron known"]] = 90  # seen is known: it need not be said
    sums["together"][FACT["iron known"], FACT["iron in view"]] = 90
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes()[GOAL["mine iron"]] == ["iron in view", "unlocked make stone pickaxe"]
    assert list(found.takes()) == [GOAL["mine iron"]]  # the others were never reached


def test_what_it_brings_need_not_be_there_yet():
    """Mined for the first time it brings iron, and "unlocked": what is lacking more rarely is said."""
    sums = counts(["iron in view"], [("iron in view", 90), ("unlocked collect iron", 500), ("iron >= 1", 300)])
    sums |= {"followed": sums["times"] - 2, "brought": np.zeros_like(sums["true_then"])}
    for name, times in (("unlocked collect iron", 38), ("iron >= 1", 38), ("dark", 5)):
        sums["brought"][GOAL["mine iron"], FACT[name]] = times
    found = Found(CRAFTER, 2)
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes()[GOAL["mine iron"]] == ["iron in view", "not unlocked collect iron"]
    sums["brought"][GOAL["mine iron"], FACT["unlocked collect iron"]] = 20  # every second time it was there before
    found = Found(CRAFTER, 2)
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes()[GOAL["mine iron"]] == ["iron in view", "not iron >= 1"]


def test_what_others_take_is_got_whenever_it_is_lacking():
    """Coal brings "coal >= 1", which iron tools take: mine it while there is none, in each life more than once."""
    coal, tool, sleep = (GOAL[name] for name in ("mine coal", "make iron sword", "sleep"))
    base = [("coal in view", 90), ("coal >= 1", 100), ("unlocked collect coal", 500), ("asleep", 100), ("dark", 300)]
    sums = counts((), base) | {"brought": np.zeros((NUM_BASIC, len(FACTS))), "followed": np.zeros(NUM_BASIC)}
    for goal, name in ((coal, "coal in view"), (sleep, "asleep"), (sleep, "dark")):
        sums["true_then"][goal, FACT[name]] = 40
    for name in ("unlocked collect coal", "coal >= 1"):
        sums["brought"][coal, FACT[name]] = 40
    sums["times"][[coal, sleep]] = sums["followed"][[coal, sleep]] = 40
    found = Found(CRAFTER, 2)
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes()[coal] == ["coal in view", "not unlocked collect coal"]  # nobody takes it yet
    assert found.takes()[sleep] == ["dark"]  # asleep is what it is doing
    found.arrays.times[tool], found.arrays.true_then[tool, FACT["coal >= 1"]] = 9, 9
    assert found.takes()[coal] == ["coal in view", "not coal >= 1"] and found.takes()[tool] == ["coal >= 1"]
    found.arrays.together[FACT["coal >= 2"], FACT["coal >= 2"]] = 50
    found.arrays.times[20], found.arrays.true_then[20, FACT["coal >= 2"]] = 9, 9
    assert found.takes()[coal] == ["coal in view", "not coal >= 2"]  # as much as any takes


def test_too_few_times_say_nothing():
    found = Found(CRAFTER, 2)
    sums = counts(["iron in view"], [("iron in view", 90)], times=hindsight.MIN_TIMES - 1)
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes() == {}


def paying(found):
    """The middle env mines iron and is paid for it, the last one sleeps and is not."""
    history = phase_of(updates=3, chosen=[(0, 1, 2), (0, 1, 2), (3, 4, 5)])
    history["reached"][:, 10, 1, GOAL["mine iron"]] = history["reached"][:, 10, 2, GOAL["sleep"]] = True
    history["reward"][:, 10, 1] = 1.0
    facts = np.zeros((9, len(FACTS)), bool)
    facts[:, FACT["iron in view"]] = [False, True, True] * 3  # so half of what is in view pays
    add(found, history, facts)
    return facts


def test_examples_are_of_what_paid_and_held_out_situations_are_none_of_them():
    found = Found(CRAFTER, 2)
    paying(found)
    assert found.num == 6 and found.arrays.held[:6].all()  # few situations: all of them measure
    assert found.examples("hindsight", 9, lambda obs, facts: f"obs {obs[0]}") == []
    found.arrays.held[:] = False
    pairs = found.examples("hindsight", 9, lambda obs, facts: f"obs {obs[0]}")
    assert pairs == [(f"obs {i}", "The most urgent sub-goal now is mine iron.") for i in (2, 8)]
    assert found.examples("hindsight", 1, lambda obs, facts: f"obs {obs[0]}") == pairs[:1]


def test_in_place_of_the_adapter_it_tells_what_was_right_in_the_most_similar_situation():
    table, situations = table_of(), np.zeros((2, len(FACTS)), bool)
    sft = ra.SftArgs(analyses="retrieved", sft_data="hindsight")
    questions = [Question(np.zeros(1), facts, [], None) for facts in situations]
    assert table.retrieved(questions, sft) == [] == table.retrieved([], sft)  # nothing is known yet
    paying(table.found)
    table.found.arrays.held[:] = False
    table.found.arrays.facts[1, FACT["dark"]] = True  # two situations have lessons, this one of another sub-goal
    table.found.arrays.paid[1] = np.arange(NUM_BASIC) == GOAL["mine coal"]
    situations[1, [FACT["dark"], FACT["food low"]]] = True
    told = [ra.suggestion([name]) for name in ("mine iron", "mine coal")]
    assert table.retrieved(questions, sft) == told
    assert table.retrieved(questions, dataclasses.replace(sft, analyses="own")) == []
    with_facts = table.retrieved(questions, dataclasses.replace(sft, sft_data="experience"))
    examples = dict.fromkeys(text for _, text in table.found.examples("experience", 9, lambda obs, facts: str(obs)))
    assert set(with_facts) <= set(examples)
    assert all(text.startswith(suggested) for text, suggested in zip(with_facts, told, strict=True))


def test_what_is_rare_is_worth_saying_and_comes_first():
    found = Found(CRAFTER, 2)
    tree, iron, coal = GOAL["chop tree"], GOAL["mine iron"], GOAL["mine coal"]
    found.arrays.times[[tree, iron, coal]] = 900, 2, 50
    found.num = 5
    for i, (tree_at, iron_at, coal_at) in enumerate([(0, 30, 9), (0, 64, 9), (3, 64, 5), (0, 64, 64), (64, 64, 64)]):
        found.arrays.when[i] = HORIZON
        found.arrays.when[i, [tree, iron, coal]] = tree_at, iron_at, coal_at
    found.arrays.returns[:5] = 1, 3, 2, 4, 5
    assert [found.worth_saying(i) for i in range(5)] == [iron, coal, coal, tree, None]
    found.gains = lambda: found.arrays.returns[:5]
    assert found.most_telling() == [0, 1, 3, 2]  # one of iron, coal, trees; then the second one of coal
    found.arrays.held[1] = True
    assert found.most_telling() == [0, 2, 3]
    found.arrays.paid[0, coal] = True  # iron was mined before, and is not paid again
    assert found.worth_saying(0) == coal and found.worth_saying(1) == coal


@pytest.mark.parametrize("together, said", [(71, ["iron in view", "wood >= 1"]), (73, ["iron in view"])])
def test_what_is_mostly_there_with_another_fact_is_not_said(together, said):
    found = Found(CRAFTER, 2)
    names = ("iron in view", "wood >= 1")
    sums = counts(names, zip(names, (90, 300), strict=True))
    for pair in (names, names[::-1]):
        sums["together"][FACT[pair[0]], FACT[pair[1]]] = together
    add(found, phase_of(), np.zeros((6, len(FACTS))), sums)
    assert found.takes()[GOAL["mine iron"]] == said


def test_experience_says_what_it_takes_in_words_that_are_read_back():
    found = Found(CRAFTER, 2)
    paying(found)
    found.arrays.held[:] = False
    names = ("iron in view", "unlocked make stone pickaxe")
    for name, value in counts(names, zip(names, (90, 300), strict=True)).items():
        setattr(found.arrays, name, value)
    (_, text), *_ = found.examples("experience", 1, lambda obs, facts: "prompt")
    assert text.startswith(ra.suggestion(["mine iron"]) + " ")
    assert CRAFTER.heard_in_text(text) == {GOAL["mine iron"]: ("iron known", names[1])}  # as a place to go to


def test_experience_says_what_others_take_too(monkeypatch):
    found = Found(CRAFTER, 2)
    paying(found)
    found.arrays.held[:] = False
    takes = {"mine iron": ["iron in view"], "sleep": ["dark"], "mine coal": ["coal in view"]}
    monkeypatch.setattr(found, "takes", lambda: {GOAL[name]: facts for name, facts in takes.items()})
    (_, text), *_ = found.examples("experience", 1, lambda obs, facts: "prompt")
    heard = {CRAFTER.sub_goals[i]: list(takes) for i, takes in CRAFTER.heard_in_text(text).items()}
    assert heard == {"mine iron": ["iron known"], "sleep": ["dark"], "mine coal": ["coal known"]}
    assert CRAFTER.sub_goals_in_text(text) == [GOAL["mine iron"]]  # one is suggested
    assert found.examples("experience", 1, lambda obs, facts: "prompt")[0][1] == text


def test_experience_says_more_often_what_rarer_ones_take():
    found = Found(CRAFTER, 2)
    tree, sleep, coal, iron = (GOAL[name] for name in ("chop tree", "sleep", "mine coal", "mine iron"))
    found.arrays.times[[tree, sleep, coal]] = 1600, 1600, 4
    known = {tree: ["dark"], sleep: ["dark"], coal: ["dark"]}
    known = [Plan(goal, goal, tuple(facts)) for goal, facts in known.items()]
    said = [found.of_others(iron, known, np.random.default_rng(i)) for i in range(200)]
    assert all(len(sentences) == len(set(sentences)) == 2 for sentences in said)
    times = [sum(f"To {CRAFTER.sub_goals[i]} takes dark." in sentences for sentences in said) for i in (tree, coal)]
    assert times[0] < 0.7 * 200 and times[1] > 0.95 * 200
    assert found.of_others(coal, [], np.random.default_rng(0)) == []
    assert found.of_others(coal, [Plan(coal, tree, ("dark",))], np.random.default_rng(0)) == []
    told = [Plan(tree, coal, ("dark",)), Plan(coal, tree, ("dark",)), Plan(sleep, tree, ("dark",))]
    said = [found.of_others(iron, told, np.random.default_rng(i)) for i in range(200)]  # a plan is as rare as its goal
    assert sum("To chop tree takes dark." in sentences for sentences in said) > 0.95 * 200


def crafting(iron_pickaxe=True, coal=False):
    """Tables and furnaces were placed; a table was near whenever a stone pickaxe was made, both for one of iron."""
    found = Found(CRAFTER, 2)
    takes = {
        "place crafting table": ("wood >= 2",), "place furnace": ("stone >= 1",), "sleep": ("dark",),
        "make stone pickaxe": ("table in reach", "wood >= 1", "stone >= 1"), "mine iron": ("iron in view",),
        "make iron pickaxe": ("table in reach", "furnace in reach", "wood >= 1", "iron >= 1") * iron_pickaxe,
        "mine coal": ("coal in view",) * coal,
    }  # fmt: skip
    brought = {
        "place crafting table": ("table in reach", "unlocked place table"), "mine iron": ("iron >= 1",),
        "place furnace": ("furnace in reach", "unlocked place furnace"), "mine coal": ("coal >= 1",) * coal,
        "make stone pickaxe": ("unlocked make stone pickaxe",),
        "make iron pickaxe": ("unlocked make iron pickaxe",) * iron_pickaxe,
    }  # fmt: skip
    arrays = found.arrays
    for goal, facts in ((GOAL[name], facts) for name, facts in takes.items() if facts):
        arrays.times[goal] = arrays.followed[goal] = 9
        arrays.true_then[goal, [FACT[fact] for fact in facts]] = 9
    for name, facts in brought.items():
        arrays.brought[GOAL[name], [FACT[fact] for fact in facts]] = 9
    arrays.steps += 1000
    rarest = "iron >= 1", "furnace in reach", "table in reach", "coal >= 1", "stone >= 1", "wood >= 2", "wood >= 1"
    for count, name in enumerate((*rarest, "unlocked place table", "unlocked place furnace")):
        arrays.together[FACT[name], FACT[name]] = 9 + count
    return found


def test_what_is_needed_near_is_made_on_the_spot():
    """For what both take, amounts added up; as long as it is not here, and what it is for not done. Not for what takes
    one thing near, which can be gone to."""
    found = crafting()
    told = found.plans(found.takes())
    plans = {(CRAFTER.sub_goals[plan.sub_goal], CRAFTER.sub_goals[plan.goal]): plan.takes for plan in told}
    assert plans == {
        ("place crafting table", "make iron pickaxe"): (
            "wood >= 3", "iron >= 1", "furnace in reach", "not table in reach", "not unlocked make iron pickaxe"
        ),
        ("place furnace", "make iron pickaxe"): (
            "stone >= 1", "iron >= 1", "table in reach", "wood >= 1", "not furnace in reach",
            "not unlocked make iron pickaxe",
        ),
    }  # fmt: skip


def test_what_can_never_hold_is_told_nobody():
    found = crafting()
    near = ["table in reach", "furnace in reach", "wood >= 1"]
    takes = {GOAL["place crafting table"]: ["wood >= 2"], GOAL["make wood sword"]: near}
    (plan,) = found.plans(takes)
    assert plan.takes == ("wood >= 3", "furnace in reach", "not table in reach")
    takes[GOAL["make wood sword"]].append("not wood >= 3")
    assert found.plans(takes) == []
    takes = {GOAL["make stone pickaxe"]: ["unlocked make stone sword", "not unlocked make stone pickaxe"]}
    assert found.guesses(takes) == {}  # a sword that is to be made only by those who have one


def test_a_plan_takes_what_a_list_leaves_out_as_too_usual():
    """Who places a furnace for a pickaxe that takes a stone as well needs two: the list of the pickaxe has no stone."""
    found = crafting()
    found.arrays.true_then[GOAL["make iron pickaxe"], FACT["stone >= 1"]] = 9
    found.arrays.together[FACT["stone >= 1"], FACT["stone >= 1"]] = 900  # of 1000 steps
    takes = found.takes()
    assert "stone >= 1" not in takes[GOAL["make iron pickaxe"]]
    takes[GOAL["place furnace"]].insert(0, "stone >= 1")
    plans = {(plan.sub_goal, plan.goal): plan.takes for plan in found.plans(takes)}
    assert plans[GOAL["place furnace"], GOAL["make iron pickaxe"]][0] == "stone >= 2"
    guess = {GOAL["make iron sword"]: takes[GOAL["make iron pickaxe"]]}  # as what is named alike took
    for stones in (0, 9):
        found.arrays.true_then[GOAL["make iron pickaxe"], FACT["stone >= 1"]] = stones
        plans = {(plan.sub_goal, plan.goal): plan.takes for plan in found.plans(takes | guess)}
        assert ("stone >= 2" in plans[GOAL["place furnace"], GOAL["make iron sword"]]) == bool(stones)


def test_nothing_is_known_of_what_was_never_reached():
    found = crafting()
    takes = found.takes() | {GOAL["eat plant"]: ["table in reach", "furnace in reach"]}
    plans = {(plan.sub_goal, plan.goal): plan.takes for plan in found.plans(takes)}
    assert plans[GOAL["place furnace"], GOAL["eat plant"]] == ("stone >= 1", "table in reach", "not furnace in reach")


def test_plans_say_how_much_to_gather(monkeypatch):
    """A table for an iron pickaxe, which takes wood as well, takes 3 wood together."""
    monkeypatch.setattr(hindsight, "OTHERS", 99)
    found = crafting()
    paying(found)
    found.arrays.held[:] = False
    tree = GOAL["chop tree"]
    found.arrays.times[tree] = found.arrays.followed[tree] = 9
    found.arrays.true_then[tree, FACT["tree in view"]] = found.arrays.brought[tree, FACT["wood >= 1"]] = 9
    for source, ends in (("experience", "not wood >= 2"), ("plans", "not wood >= 3")):
        (_, text), *_ = found.examples(source, 9, lambda obs, facts: str(obs))
        assert CRAFTER.heard_in_text(text)[tree][-1] == ends


def test_who_gathers_stops_at_the_largest_amount_that_is_told():
    takes = {1: ["tree in view", "not wood >= 2"], 2: ["not unlocked eat cow"], 3: ["dark"], 4: ["not coal >= 1"]}
    told = ["wood >= 3", "not wood >= 5", "dark"], ["wood >= 1", "stone in view"]
    assert enough(takes, told) == {**takes, 1: ["tree in view", "not wood >= 3"]}
    assert enough(takes, []) == takes
    assert enough({1: ["not wood >= 5"]}, told) == {1: ["not wood >= 5"]}  # never before


def named(guesses):
    return {CRAFTER.sub_goals[goal]: takes for goal, takes in guesses.items()}


def test_what_a_sub_goal_takes_that_was_never_reached_is_guessed():
    """As one that is named alike takes, and what is had and of no use yet: things have one."""
    found = crafting(iron_pickaxe=False, coal=True)
    guesses = named(found.guesses(found.takes()))
    tools = ["iron >= 1", "furnace in reach", "table in reach", "coal >= 1", "stone >= 1"]
    assert guesses == {
        "make iron pickaxe": [*tools, "not unlocked make iron pickaxe"],
        "make stone sword": ["furnace in reach", "table in reach", "coal >= 1", "stone >= 1", "wood >= 1",
                             "not unlocked make stone sword"],
    }  # fmt: skip
    pickaxe = GOAL["make iron pickaxe"]
    found.arrays.times[pickaxe] = 2  # too few to know, but what was not so then is not needed
    found.arrays.true_then[pickaxe] = 2
    found.arrays.true_then[pickaxe, FACT["coal >= 1"]] = 1
    assert "coal >= 1" not in named(found.guesses(found.takes()))["make iron pickaxe"]
    found.arrays.true_then[pickaxe] = 0
    assert "make iron pickaxe" not in named(found.guesses(found.takes()))  # nothing was so both times
    found.arrays.times[pickaxe] = 9
    found.arrays.true_then[pickaxe] = 9
    found.arrays.brought[pickaxe] = 0
    found.arrays.together += np.diag(np.full(len(FACT), 900.0))  # nothing that would tell it: known to take nothing
    assert pickaxe not in found.takes() and "make iron pickaxe" not in named(found.guesses(found.takes()))
    found.arrays.together -= np.diag(np.full(len(FACT), 900.0))
    found.arrays.times[pickaxe] = found.arrays.true_then[pickaxe] = 0
    found.arrays.brought[GOAL["mine iron"]] = 0  # nobody has any iron
    assert list(named(found.guesses(found.takes()))) == ["make stone sword"]


def test_what_is_known_is_not_guessed():
    found = crafting()
    assert list(named(found.guesses(found.takes()))) == ["make stone sword", "make iron sword"]
    assert Found(CRAFTER, 2).guesses({}) == {}


def test_what_is_in_the_name_of_another_sub_goal_is_for_that():
    found = crafting(iron_pickaxe=False)
    plant = GOAL["place plant"]
    found.arrays.times[plant] = found.arrays.followed[plant] = 9
    found.arrays.true_then[plant, FACT["dark"]] = found.arrays.brought[plant, FACT["plant in view"]] = 9
    assert "plant in view" not in str(named(found.guesses(found.takes())))  # to be eaten


def test_plans_are_told_among_what_others_take_and_read_back():
    found = crafting()
    known = found.takes()
    plans, told = found.plans(known), set()
    for i in range(100):
        sentences = found.of_others(
            GOAL["sleep"], [Plan(*2 * [GOAL["mine iron"]], ("dark",)), *plans], np.random.default_rng(i)
        )
        assert 1 <= len(sentences) <= 2
        told |= {(goal, takes) for goal, takes in CRAFTER.heard_in_text(" ".join(sentences)).items()}
    assert {(plan.sub_goal, plan.takes) for plan in plans} < told
    for i in range(50):  # a sub-goal that is suggested is said to take one thing
        sentences = found.of_others(GOAL["place furnace"], plans, np.random.default_rng(i))
        assert not any("To place furnace" in sentence for sentence in sentences)
    assert Found(CRAFTER, 2).plans({}) == []


def test_a_plan_makes_what_is_near_and_no_amount_and_is_made_here():
    found = crafting()
    plant, grass, coal = GOAL["place plant"], GOAL["chop grass"], GOAL["mine coal"]
    found.arrays.brought[grass, FACT["sapling >= 1"]] = found.arrays.brought[coal, FACT["coal in view"]] = 9
    found.arrays.followed[[grass, coal]] = 9
    takes = {grass: ["dark"], coal: ["dark"], plant: ["sapling >= 1", "coal in view"]}
    assert found.plans(takes) == []  # a sapling is got, and coal is a thing to go to


def test_only_plans_tell_plans_and_guesses(monkeypatch):
    """And there are plans for what is guessed."""
    monkeypatch.setattr(hindsight, "OTHERS", 99)
    found = crafting(iron_pickaxe=False)
    paying(found)
    found.arrays.held[:] = False
    (_, knows), *_ = found.examples("experience", 9, lambda obs, facts: str(obs))
    (_, plans), *_ = found.examples("plans", 9, lambda obs, facts: str(obs))
    assert knows.startswith("The most urgent sub-goal now is mine iron. It takes iron in view")
    assert plans.startswith("The most urgent sub-goal now is mine iron. It takes iron in view")
    assert "make iron pickaxe" not in knows and "not furnace in reach" not in knows
    heard = {CRAFTER.sub_goals[goal]: takes for goal, takes in CRAFTER.heard_in_text(plans).items()}
    assert heard["make iron pickaxe"][-1] == "not unlocked make iron pickaxe"
    assert "not table in reach" in plans


def test_amounts_add_up_as_far_as_there_is_a_fact():
    facts = ("wood >= 2", "dark", "wood >= 1", "energy >= 7", "energy >= 7", "coal >= 1", "coal >= 2", "dark")
    assert CRAFTER.added_up(facts) == ["wood >= 3", "dark", "energy >= 7", "coal >= 2"]
    for numbers in itertools.permutations((2, 2, 1)):  # five of wood is no fact
        assert CRAFTER.added_up(f"wood >= {number}" for number in numbers) == ["wood >= 4"]


def test_agreement():
    found = Found(CRAFTER, 2)
    paying(found)
    rows, prompts = found.held_out(lambda obs, facts: f"obs {obs[0]}")
    assert prompts == [f"obs {2 * i}" for i in range(6)]
    iron, sleep = GOAL["mine iron"], GOAL["sleep"]
    assert found.agreement(rows, [[iron]] * 6) == pytest.approx(2 / 6)
    assert found.agreement(rows, [[], [iron], [sleep], [], [iron, sleep], []]) == pytest.approx(2 / 4)
    assert found.agreement(rows, [[]] * 6) is None


def test_possible_is_what_the_game_demands():
    found = Found(CRAFTER, 2)
    facts = paying(found)
    demands = CRAFTER.needs["chop grass"], CRAFTER.needs["mine iron"]
    assert demands == ((), ("unlocked make stone pickaxe", "iron in view"))
    assert GOAL["mine iron"] not in found.possible(np.array([1]))[0] and GOAL["chop grass"] in found.possible([0])[0]
    found.arrays.facts[1, FACT["unlocked make stone pickaxe"]] = True
    assert GOAL["mine iron"] in found.possible(np.array([1]))[0] and facts[1, FACT["iron in view"]]


def test_the_oldest_situations_are_forgotten(monkeypatch):
    monkeypatch.setattr(hindsight, "MAX_REMEMBERED", 4)
    found = Found(CRAFTER, 2)
    for _ in range(2):
        add(found, phase_of(), np.zeros((6, len(FACTS))))  # three of six are known
    assert found.num == 6 and sorted(found.arrays.obs[:, 0].tolist()) == [0, 2, 4, 4]


def test_a_table_keeps_what_was_found():
    table, other = table_of(), table_of()
    paying(table.found)
    arrays, rest = table.state()
    other.load_state(arrays, rest)
    assert other.found.num == 6
    for name, value in vars(table.found.arrays).items():
        np.testing.assert_array_equal(getattr(other.found.arrays, name), value)
    without = {name: value for name, value in arrays.items() if not name.startswith("found_")}
    table_of().load_state(without, {key: value for key, value in rest.items() if key != "found"})  # an older run's


class Parrot:
    """Names one sub-goal in every analysis."""

    def __init__(self, goal, most=100):
        self.text, self.most, self.asked = ra.suggestion([goal]), most, []

    def affordable_analyses(self, prompts):
        return self.most

    def analyse(self, prompts, key):
        assert all(ra.INSTRUCTION in prompt for prompt in prompts)
        self.asked += [prompt.split("\n")[0] for prompt in prompts]
        return [self.text] * len(prompts)


def test_a_table_measures_what_an_adapter_names():
    table = table_of()
    paying(table.found)
    before = table.agreement(Words(), Parrot("mine iron"), None, "before")
    assert before["agreement_before"] == pytest.approx(2 / 6) and before["agreement_rules"] is not None
    assert before["agreement_possible"] == 0  # nothing that is possible there was reached
    assert table.agreement(Words(), Parrot("mine coal"), None, "after") == {"agreement_after": 0}
    assert table_of().agreement(Words(), Parrot("mine iron"), None, "before") == {}  # nothing is known yet
    slow = Parrot("mine coal", most=2)
    assert table.agreement(Words(), slow, None, "after") == {"agreement_after": 0}
    assert slow.asked == ["a caption of [0, 1]", "a caption of [6, 7]"]  # of all parts of the phase


def test_what_a_rollout_shows():
    """The sums and the packed steps that the device gives are those of the transitions."""
    rng = np.random.default_rng(2)
    steps, envs, goals, facts = 4, 3, 11, 6
    reached, true = rng.random((steps, envs, goals)) < 0.4, rng.random((steps, envs, facts)) < 0.5
    fields = dict.fromkeys((field.name for field in dataclasses.fields(rl.Transition)), None)
    reward = rng.random((steps, envs))
    seen = {"reached": jnp.asarray(reached), "facts": jnp.asarray(true), "env_reward": jnp.asarray(reward)}
    done = rng.random((steps, envs)) < 0.3
    transitions = rl.Transition(**fields | seen | {"done": jnp.asarray(done)})
    args = rl.Args(num_envs=envs, num_steps=steps)
    assert rl.look_back(dataclasses.replace(args, guidance="none"), transitions, jnp.arange(2)) == ({}, {})
    sums, history = rl.look_back(args, transitions, jnp.arange(2))
    np.testing.assert_array_equal(np.unpackbits(history["reached"], axis=-1, count=goals).astype(bool), reached)
    paid = (reached & (reward > hindsight.PAYS)[..., None]).astype(float)
    np.testing.assert_allclose(sums["times"], paid.sum((0, 1)))
    followed, new = paid[:-1] * ~done[:-1, :, None], true[1:] & ~true[:-1]
    np.testing.assert_allclose(sums["followed"], followed.sum((0, 1)))
    np.testing.assert_allclose(sums["brought"], np.einsum("tng,tnp->gp", followed, new))
    np.testing.assert_allclose(sums["true_then"], np.einsum("tng,tnp->gp", paid, true))
    np.testing.assert_allclose(sums["together"], np.einsum("tnp,tnq->pq", true.astype(float), true))
    assert sums["steps"] == steps * envs
