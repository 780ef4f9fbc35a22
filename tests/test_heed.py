"""benchmarks/heed.py: what is asked, and what is counted."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import heed

import llm_client
from envs import make_env
from envs.crafter import CRAFTER
from envs.game import holds

GOAL = CRAFTER.sub_goal_numbers


def answer(text, error=""):
    question = llm_client.Question(np.zeros(1), np.zeros(1, bool), [], None)
    question.messages = llm_client.build_messages(CRAFTER, "It is dark.", (), "")
    question.reply, question.error = llm_client.Reply(text), error
    question.advice = () if error else llm_client.parse_reply(CRAFTER, text)
    return question


def test_what_is_counted():
    answers = [
        answer('{"sub_goals": {"sleep": [], "chop tree": []}}'),
        answer('{"sub_goals": {"chop tree": []}}'),
        answer('{"sub_goals": {"SUB-GOAL": ["FACT"]}}', "no known sub-goal"),
        answer('{"sub_goals": {"mine coal": [], "sleep": []}}'),
    ]
    counted = heed.measure(answers, [GOAL["sleep"]] * 4)
    assert counted == {"usable": 0.75, "named": 0.5, "first": 0.25, "copied": 0.25, "repeated": 0}
    told = answer('{"sub_goals": [{"name": "sleep", "because": ["dark"]}]}')
    told.messages = llm_client.build_messages(CRAFTER, "", (), "The most urgent sub-goal now is sleep. It takes dark.")
    assert heed.repeats(told)
    told.reply = llm_client.Reply('{"sub_goals": [{"name": "sleep", "because": []}]}')
    assert not heed.repeats(told)


@pytest.fixture(scope="module")
def env():
    return make_env("Craftax-Classic-Symbolic-v1", 64)


def test_what_is_suggested(env):
    situations = heed.choose_situations(env, 6, seed=1)
    assert len(situations) == 6
    for situation in situations:
        truths = CRAFTER.truths(situation["facts"])
        advised = [i for i, _ in CRAFTER.advise(truths, {})]
        assert situation["sensible"] == advised[0] and situation["rare"] not in advised
        assert holds(truths, CRAFTER.needs[CRAFTER.sub_goals[situation["rare"]]])


def test_the_suggestion_is_what_differs(env):
    asked = []
    ask = lambda questions: asked.append(questions) or SimpleNamespace(wait=lambda: questions)  # noqa: E731
    guide = SimpleNamespace(concurrency=4, ask=ask)
    situations = heed.choose_situations(env, 2, seed=1)
    for kind in heed.KINDS:
        heed.ask(guide, env, situations, kind)
    none, sensible, rare = asked
    assert [q.analysis for q in none] == ["", ""] and none[0].caption == rare[0].caption != none[1].caption
    for questions, kind in ((sensible, "sensible"), (rare, "rare")):
        assert [CRAFTER.sub_goals_in_text(q.analysis) for q in questions] == [[s[kind]] for s in situations]
