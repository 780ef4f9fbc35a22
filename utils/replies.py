"""Replies of LLMs, read back into advice: sub-goals with their reasons. Whatever a reply is, nothing worse than a
ValueError with the reason comes of it.
"""

import itertools
import json
import re
from typing import Any

from envs.game import Game, Literals
from utils.llm_http import MAX_REPLY, answer_of, clean

MAX_SUB_GOALS = 6  # of a reply
_SEPARATORS = re.compile(r"[\n,;:\[\](){}\"'`*]|\s[-–—]\s")
_MAX_OBJECTS = 50  # tries at "{": bounds the work on a text full of braces


def parse_reply(game: Game, text: str) -> tuple[tuple[int, Literals], ...]:
    """Returns what `read_reply` does, without what was dropped."""
    return read_reply(game, text)[0]


def read_reply(game: Game, text: str) -> tuple[tuple[tuple[int, Literals], ...], int]:
    """Reads an LLM's reply: 1 to MAX_SUB_GOALS sub-goals with their reasons; and how many reasons were dropped.

    Reasons that are no facts are dropped; a sub-goal whose reasons contradict each other is.

    Takes a JSON object wherever it stands, else a plain list of sub-goals by lines or commas. What a reasoning model
    writes between <think> and </think> is not its answer and is not read. Raises ValueError, with the reason, when
    there is no usable sub-goal, and nothing else.
    """
    text = answer_of(text[:MAX_REPLY])
    fields = _find_object(text)
    if fields is not None:
        found, dropped, contradictory = _read_sub_goals(game, fields["subgoals"], fields.get("because"))
    else:  # a list, or JSON that was cut off or is not quite JSON: what follows "because" are facts, not sub-goals
        text_of_goals = re.split(r"[\"']?because[\"']?\s*:", text, maxsplit=1)[0]
        found, dropped, contradictory = _read_sub_goals(game, text_of_goals)
    if not found:
        why = "reasons that contradict each other" if contradictory else "no known sub-goal"
        raise ValueError(f"{why} in the reply {clean(text, 80)!r}")
    return tuple(found.items()), dropped


def is_usable(game: Game, text: str) -> bool:
    """Can `parse_reply` read this?"""
    try:
        return bool(parse_reply(game, text))
    except ValueError:
        return False


def follows_schema(game: Game, text: str) -> bool:
    """Is the reply what `reply_schema` asks for? If not, the server ignored it.

    It may be of no use all the same: a small model gives a fact and its contrary as reasons, which no schema forbids.
    """
    try:
        items = json.loads(text)["sub_goals"]
        in_form = all(set(item) == {"name", "because"} and item["name"] in game.sub_goals for item in items)
        facts = {reason.removeprefix("not ") for item in items for reason in item["because"]}
        return bool(items) and in_form and facts <= set(game.facts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _find_object(text: str) -> dict[str, Any] | None:
    """Returns the first balanced JSON object that has sub-goals, alone, in prose, in a fence or nested; else None.

    Keys come back in the form "subgoals", "because". Linear in the text: a bounded number of tries, each one pass.
    """
    for brace in itertools.islice(re.finditer("{", text), _MAX_OBJECTS):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        fields = {re.sub("[^a-z]", "", key.lower()): field for key, field in value.items()}
        if "subgoals" in fields:
            return fields
    return None


def _read_sub_goals(game: Game, value: Any, common: Any = None) -> tuple[dict[int, Literals], int, bool]:
    """Reads at most MAX_SUB_GOALS sub-goals, each once, with their reasons.

    Drops what is no sub-goal, and what is advised for reasons that contradict each other. Returns the rest, how many
    reasons are no facts, and whether any contradict each other.

    Takes {name: reasons}, a (list of) strings, or a list of {"name": ..., "because": ...}; `common` are the reasons of
    those that come without their own.
    """
    found: dict[int, Literals] = {}
    dropped, contradictory = 0, False
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            fields = {re.sub("[^a-z]", "", str(key).lower()): field for key, field in item.items()}
            name = next((fields[key] for key in ("name", "subgoal", "goal") if key in fields), None)
            pairs = list(item.items()) if name is None else [(name, fields.get("because", common))]
        else:
            pairs = [(item, common)]
        for names, reasons in pairs:
            for piece in _SEPARATORS.split(names) if isinstance(names, str) else ():
                index = game.read_sub_goal(re.sub(r"^[^a-zA-Z]+", "", piece))  # without "1." or "- " in front
                if index is not None and index not in found and len(found) < MAX_SUB_GOALS:
                    literals, unknown = _read_because(game, reasons)
                    dropped += unknown
                    contradictory |= literals is None
                    if literals is not None:
                        found[index] = literals
    return found, dropped, contradictory


def _read_because(game: Game, value: Any) -> tuple[Literals | None, int]:
    """Reads facts from a list of strings, one string, or {name: true/false}.

    Returns:
        the facts with their truth, None where they contradict each other; how many reasons are no facts
    """
    if isinstance(value, dict):
        named = [(name, truth) for name, truth in value.items() if isinstance(truth, bool)]
        unknown = len(value) - len(named)
    else:
        items = value if isinstance(value, list) else [] if value is None else [value]
        strings = [item for item in items if isinstance(item, str)]
        unknown = len(items) - len(strings)
        named = [(name, True) for item in strings for name in re.split("[,;\n]", item) if name.strip()]
    seen: dict[int, bool] = {}
    for name, said in named:
        fact = game.read_fact(re.sub(r"^\s*!\s*", "not ", name))
        unknown += fact is None
        if fact is not None and seen.setdefault(fact[0], fact[1] == said) != (fact[1] == said):
            return None, unknown
    return tuple(seen.items()), unknown
