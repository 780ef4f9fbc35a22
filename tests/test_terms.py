"""The glossary and the worked question of docs/rladapter.md say what the code does."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import llm_client
from envs.crafter import CRAFTER
from envs.crafter.captions import read_caption, truths_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rladapter.md").read_text()
PRODUCT = [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")]


def block(name):
    """The text between two markers, without its indentation."""
    inside = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL).group(1)
    return "\n".join(line.strip() for line in inside.splitlines())


def test_the_worked_question_is_answered_as_the_page_says():
    caption, analysis = block("caption"), block("analysis")
    situation = np.array(list(truths_of(read_caption(caption)).values()))
    question = llm_client.Question(np.zeros(0, np.uint8), situation, [], 0.37, caption=caption, analysis=analysis)
    (answered,) = llm_client.RulesGuide(CRAFTER).ask([question]).wait()
    assert answered.reply.text == block("reply")
    assert [CRAFTER.sub_goals[goal] for goal, _ in answered.advice][:3] == [
        "attack zombie", "attack skeleton", "mine coal",
    ]  # fmt: skip
    last, _ = answered.advice[-1]
    assert CRAFTER.sub_goals_in_text(analysis) == [last] == [CRAFTER.sub_goal_numbers["chop grass"]]  # as the page says


def test_the_glossary_has_the_words_that_the_code_uses():
    glossary = PAGE[PAGE.index("## Glossary") : PAGE.index("## How it works")]
    words = set(re.findall(r"^\| ([a-z -]+?) \|", glossary, re.M))
    assert words >= {
        "fact", "situation", "caption", "sub-goal", "reason", "advice", "guidance table", "guide", "analysis",
        "question", "pause", "phase", "exposure", "trial", "visit", "comprehension score", "game",
    }  # fmt: skip


def docstrings(tree):
    """The ids of all strings that stand alone: docstrings, and the texts of flags."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_nothing_outside_envs_names_a_game(path):
    """But for the default of --env-id, and the packages whose versions are logged."""
    tree = ast.parse(path.read_text())
    texts = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if node.value not in ("Craftax-Classic-Symbolic-v1", "craftax"):
                assert not re.search("craft(er|ax)", node.value, re.I), node.lineno
        for name in ("id", "attr", "name", "module"):
            assert not re.search("craft(er|ax)", str(getattr(node, name, "")), re.I), node
