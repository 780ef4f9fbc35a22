"""The offline guide that knows another game, and how it hears what an adapter's analysis says."""

import numpy as np
import pytest

import llm_client
import rladapter_adapter as ra
from envs.crafter import CRAFTER, minecraft, rules
from envs.crafter.vocabulary import FACTS
from envs.game import holds
from envs.toy import TOY
from llm_client import LlmArgs, Question, RulesGuide, make_guide

GOAL = CRAFTER.sub_goal_numbers


def truths(*names):
    return {name: name in names for name in FACTS}


def advised(facts, named=None):
    """The sub-goals advised, with their reasons."""
    named = {GOAL[name]: takes for name, takes in (named or {}).items()}
    return {CRAFTER.sub_goals[i]: reasons for i, reasons in minecraft.advise(truths(*facts), named)}


def test_beliefs_name_sub_goals_and_facts_that_exist():
    for sub_goal, reasons in minecraft.BELIEFS:
        assert sub_goal in CRAFTER.basic_sub_goals
        assert all(CRAFTER.read_fact(reason) is not None for reason in reasons)
    assert len(dict(minecraft.BELIEFS)) == len(minecraft.BELIEFS)


@pytest.mark.parametrize(
    ("facts", "sub_goal"),
    [
        (["wood >= 2"], "place crafting table"),  # costs 2 here, 4 there
        (["wood >= 1", "crafting table known", "table close"], "make wood pickaxe"),
        (["stone >= 1"], "place furnace"),
        (["drink low", "water in view"], "drink water"),  # nobody is thirsty there
        (["iron >= 1", "wood >= 1", "stone >= 1", "coal >= 1", "table in reach", "furnace in reach", "table close",
          "furnace close"], "make iron pickaxe"),
    ],
)  # fmt: skip
def test_it_does_not_know_what_experts_know(facts, sub_goal):
    assert sub_goal not in advised(facts)
    assert sub_goal in {CRAFTER.sub_goals[i] for i, _ in rules.advise(truths(*facts), {})}


def test_what_an_analysis_names_comes_first_for_reasons_that_hold():
    facts = ["wood >= 3", "tree in view", "iron in view", "unlocked make stone pickaxe", "dark"]
    assert next(iter(advised(facts))) == "sleep"
    heard = advised(facts, {"mine iron": ()})
    assert next(iter(heard.items())) == ("mine iron", ("unlocked make stone pickaxe", "iron in view"))
    assert [*heard][1:] == [name for name in advised(facts) if name != "mine iron"]
    assert advised(["water in view"], {"drink water": ()})["drink water"] == ("water in view",)  # no belief about that
    assert advised([], {"mine diamond": ()})["mine diamond"] == ("unlocked make iron pickaxe", "diamond in view")
    assert "place stone" not in advised(["stone >= 1"], {"place stone": ()})  # it has no idea why


def test_it_is_never_told_what_the_game_demands():
    """Advice without reasons rests on what the game demands: the guide must not give any."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        now = {name: bool(rng.random() < 0.1) for name in FACTS}
        assert all(reasons for _, reasons in minecraft.advise(now, dict.fromkeys(range(22), ())))


def test_it_believes_what_an_analysis_says_that_something_takes():
    facts = ["wood >= 1", "wood >= 2"]
    assert "place crafting table" not in advised(facts)
    heard = advised(facts, {"place crafting table": ("wood >= 2",)})
    assert heard["place crafting table"] == ("not table close", "wood >= 2")
    near = advised([*facts, "table close"], {"place crafting table": ("wood >= 2",)})
    assert "place crafting table" not in near  # that it is wanted only away from one stays believed


def test_what_must_be_near_is_where_to_go_and_a_rule_is_stated_before_it_holds():
    takes = "furnace in reach, table in reach, iron >= 1, iron in view, iron known, zombie in view"
    heard = CRAFTER.heard_in_text(f"Make iron pickaxe takes {takes}.")[GOAL["make iron pickaxe"]]
    assert heard == ("furnace known", "crafting table known", "iron >= 1", "iron known", "zombie in view")
    first = "not unlocked make iron pickaxe"
    assert advised([], {"make iron pickaxe": heard}) == advised([]) | {"make iron pickaxe": (first, *heard)}


def test_what_is_said_of_other_sub_goals_is_believed_but_does_not_come_first():
    text = ra.suggestion(["mine coal"]) + " It takes coal in view. To place furnace takes stone >= 1."
    assert [CRAFTER.sub_goals[i] for i in CRAFTER.sub_goals_in_text(text)] == ["mine coal"]
    heard = {CRAFTER.sub_goals[i]: takes for i, takes in CRAFTER.heard_in_text(text).items()}
    assert heard == {"mine coal": ("coal known",), "place furnace": ("stone >= 1",)}
    advice = advised(["dark", "coal known", "unlocked make wood pickaxe"], heard)
    assert [*advice][:3] == ["mine coal", "sleep", "place furnace"]  # the last where the guide itself would put it
    assert advice["place furnace"] == ("not unlocked place furnace", "stone >= 1")


def test_what_is_done_is_not_done_again():
    facts = ["unlocked make wood pickaxe", "wood >= 1", "table in reach"]
    assert "make wood pickaxe" not in advised(facts, {"make wood pickaxe": ("wood >= 1",)})


def test_what_is_done_is_done_again_where_something_is_lacking():
    takes = ("stone >= 1", "table in reach", "not furnace in reach", "not unlocked make iron pickaxe")
    facts = ["unlocked place furnace", "stone >= 1"]
    assert advised(facts, {"place furnace": takes})["place furnace"] == takes  # also where it does not hold yet
    assert "place furnace" not in advised(facts, {"place furnace": ("stone >= 1", "not unlocked place furnace")})


def test_what_is_made_on_the_spot_needs_what_is_near_and_goes_nowhere():
    text = "To place furnace takes table in reach, not furnace in reach. To make iron pickaxe takes table in reach."
    heard = {CRAFTER.sub_goals[i]: takes for i, takes in CRAFTER.heard_in_text(text).items()}
    assert heard == {
        "place furnace": ("table in reach", "not furnace in reach"), "make iron pickaxe": ("crafting table known",)
    }  # fmt: skip


def question(analysis, facts=("wood >= 2", "tree in view"), sample=0):
    situation = np.isin(FACTS, facts)
    asked = Question(np.zeros(3, np.uint8), situation, [], None, sample=sample, analysis=analysis)
    asked.messages = [{"role": "user", "content": analysis}]
    return asked


def test_an_analysis_is_heard_in_the_share_of_replies_that_a_real_model_heard_it_in():
    guide = RulesGuide(CRAFTER, 3, "minecraft")
    analysis = ra.suggestion(["place crafting table"]) + " It takes wood >= 2."
    replies = [guide.answer(question(analysis, sample=i)) for i in range(400)]
    heard = np.mean(["crafting table" in reply for reply in replies])
    assert heard == pytest.approx(llm_client.HEEDED, abs=0.07)
    assert replies == [RulesGuide(CRAFTER, 3, "minecraft").answer(question(analysis, sample=i)) for i in range(400)]
    assert not any("crafting table" in guide.answer(question("", sample=i)) for i in range(50))


def test_the_expert_hears_everything_and_is_as_before():
    guide = make_guide(LlmArgs(), CRAFTER, 1)
    assert guide.name == "rules" and make_guide(LlmArgs(rules_knowledge="minecraft"), CRAFTER, 1).name == (
        "rules (minecraft)"
    )
    assert make_guide(LlmArgs(llm="shuffled"), CRAFTER, 1).name == "shuffled"
    reply = guide.answer(question("The player may chop tree."))
    advice = rules.advise(CRAFTER.truths(question("").situation), {GOAL["chop tree"]: ()})
    assert llm_client.parse_reply(CRAFTER, reply) == tuple(
        (i, tuple(CRAFTER.read_fact(reason) for reason in reasons)) for i, reasons in advice[: llm_client.MAX_SUB_GOALS]
    )


def test_a_game_without_such_rules_is_one_line():
    with pytest.raises(ValueError, match="^--rules-knowledge: toy has no rules 'minecraft'; use expert$"):
        make_guide(LlmArgs(rules_knowledge="minecraft"), TOY, 1)


def test_what_an_analysis_says_is_read_in_any_order_and_only_where_it_is_named():
    text = "To mine coal takes coal in view, unlocked make wood pickaxe. " + ra.suggestion(["mine coal", "sleep"])
    assert CRAFTER.heard_in_text(text) == {
        GOAL["mine coal"]: ("coal known", "unlocked make wood pickaxe"), GOAL["sleep"]: ()
    }  # fmt: skip
    after = ra.suggestion(["mine coal"]) + " It takes coal in view, not dark."
    assert CRAFTER.heard_in_text(after) == {GOAL["mine coal"]: ("coal known", "not dark")}
    twice = "Mine iron went badly. " + ra.suggestion(["sleep", "mine iron"]) + " It takes iron in view."
    assert CRAFTER.heard_in_text(twice) == {GOAL["mine iron"]: ("iron known",), GOAL["sleep"]: ()}
    assert CRAFTER.heard_in_text("to SLEEP takes not energy full") == {GOAL["sleep"]: ("not energy full",)}
    assert CRAFTER.heard_in_text("It takes courage.") == {}


@pytest.mark.parametrize("facts", [
    "dark, nonsense", "dark,", "not not dark", "dark, not dark", "not dark, wood >= 1, dark", "",
    "iron in view, not iron known",
])  # fmt: skip
def test_what_is_garbled_is_not_heard(facts):
    text = ra.suggestion(["sleep"]) + f" It takes {facts}. To mine coal takes {facts}. To chop tree takes dark, dark."
    assert CRAFTER.heard_in_text(text) == {GOAL["sleep"]: (), GOAL["chop tree"]: ("dark",)}


def test_what_is_advised_holds_but_for_what_the_analysis_says():
    rng = np.random.default_rng(0)
    for _ in range(300):
        now = {name: bool(rng.random() < 0.4) for name in FACTS}
        named = {int(i): ("wood >= 1",) if rng.random() < 0.5 else () for i in rng.permutation(22)[:2]}
        for goal, reasons in minecraft.advise(now, named):
            assert goal in named or holds(now, reasons)


class Parrot(llm_client.Guide):
    def answer(self, question):
        return '{"sub_goals": {"chop tree": []}}' if question.sample == 0 else '{"sub_goals": {"sleep": []}}'


def asked(captions, sample=0):
    questions = [question("", sample=sample * (i > 0)) for i, _ in enumerate(captions)]
    for each, caption in zip(questions, captions, strict=True):
        each.caption = caption
    return questions


def test_a_guide_that_has_one_answer_to_everything_is_warned_of_once(capsys):
    guide = Parrot(CRAFTER)
    guide.ask(asked("aabbcc")).wait()  # three situations
    guide.ask(asked("abcd", sample=1)).wait()  # two answers
    assert capsys.readouterr().err == ""
    guide.ask(asked("abcd")).wait()
    guide.ask(asked("efgh")).wait()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "one answer to 4 situations" in error and '"chop tree"' in error


def test_rules_that_have_one_answer_to_everything_are_not(capsys):
    guide = llm_client.RulesGuide(CRAFTER)
    guide.answer = Parrot(CRAFTER).answer
    guide.ask(asked("abcd")).wait()
    assert capsys.readouterr().err == ""
