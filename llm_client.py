"""The guide's side of the method: messages to an LLM, replies read back into sub-goals, clients, cache, budget.

    caption, previous sub-goals, analysis -> build_messages -> client.complete -> parse_reply -> Guidance

Clients have `name`; `check()`, before training: ValueError, one line, where the guide cannot work; `complete(batch,
samples)`, all queries of a pause: Replies in order, never raises, failures are in Reply.error; `resume(queries, calls,
cost)`: what a run that goes on has asked and spent; and `close()`:

    rules    a decision list that reads only the text of the messages: offline, free, a stand-in for an LLM
    random   three random basic sub-goals: what any context at all is worth
    http     any OpenAI-compatible server; the key comes from OPENAI_API_KEY only
    replay   what the guide of an earlier run said, from its guidance.jsonl

    python llm_client.py --llm http --llm-base-url http://127.0.0.1:8000/v1 --llm-model NAME --prompt "hi"

asks a server once and shows what came back. Plain Python and numpy, no jax. Captions come from `envs.captions` as text.
docs/llm.md says how to start servers.
"""

import asyncio
import email.utils
import hashlib
import itertools
import json
import math
import os
import random
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

import envs.vocabulary as vocab

MAX_SUB_GOALS = 6  # of a reply
MAX_ANALYSIS = 1_000  # characters of the adapter's analysis that are passed on
MAX_REPLY = 20_000  # characters of a reply that are looked at
MAX_ERROR = 300  # characters of an error message

SYSTEM_PROMPT = f"""You guide a player in Crafter, a two-dimensional survival game on a grid. The player learns by trial
and error and hears from you only now and then. In each life it earns a reward the first time that it does each of 22
things: collect wood, stone, coal, iron, diamond, a sapling, a drink; place a table, a furnace, a stone, a plant; make a
pickaxe and a sword of wood, of stone, of iron; eat a cow, a ripe plant; defeat a zombie, a skeleton; sleep and wake up.
It dies when its health is used up: zombies, skeletons, hunger, thirst and tiredness take it, and so does lava.

Rules. A table costs 2 wood; a wood pickaxe or sword 1 wood; a stone one 1 wood, 1 stone; an iron one 1 wood, 1 stone,
1 coal, 1 iron; a furnace 1 stone. Tools are made with a table in reach, iron tools with a furnace in reach too. There
are no planks, sticks or smelting. Stone and coal need a wood pickaxe, iron a stone pickaxe, diamond an iron pickaxe.
Grass gives a sapling one time in ten; a placed sapling must ripen before it is eaten. Zombies come in the dark and
while the player sleeps: it sleeps safely when enclosed, for example by stones.

Sub-goals, the only ones that exist: {", ".join(vocab.BASIC_SUB_GOALS)};
and wider ones: {", ".join(vocab.COMPOSITE_SUB_GOALS)}.

Facts, the only ones that exist: {", ".join(vocab.FACTS)}.

Reply with one JSON object and nothing else, for example
{{"sub_goals": {{"chop tree": ["not wood >= 4"], "make wood pickaxe": ["wood >= 1", "crafting table in view"]}}}}
It names at most {MAX_SUB_GOALS} sub-goals from the list, the most urgent first, each with the facts that it
rests on, "not " in front of one that is false. A sub-goal will be advised in every situation that shares its facts, so
leave out what does not matter to it, and leave out nothing that does."""

REPAIR_PROMPT = "Your reply could not be used: {reason}. Reply with only the JSON object, with names from the lists."

# The same reply as a JSON schema. A list, not an object with the sub-goals as keys: servers that compile a schema to a
# grammar fix the order of keys, and here the most urgent comes first. Lists are bounded: small models
# never end them.
_NAMES = [f"{sign}{fact}" for fact in vocab.FACTS for sign in ("", "not ")]
_ITEM = {
    "type": "object", "additionalProperties": False, "required": ["name", "because"],
    "properties": {
        "name": {"type": "string", "enum": list(vocab.SUB_GOALS)},
        "because": {"type": "array", "maxItems": 4, "items": {"type": "string", "enum": _NAMES}},
    },
}  # fmt: skip
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["sub_goals"],
    "properties": {"sub_goals": {"type": "array", "minItems": 1, "maxItems": MAX_SUB_GOALS, "items": _ITEM}},
}  # fmt: skip
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "sub_goals", "strict": True, "schema": SCHEMA}}
SCHEMA_NOTE = """

Write the object in this form, the most urgent sub-goal first:
{"sub_goals": [{"name": "chop tree", "because": ["not wood >= 4"]}, {"name": "sleep", "because": ["energy low"]}]}"""

_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def clean(text: str, limit: int) -> str:
    """Text that is safe to show or log: one line, no control characters or terminal escapes, at most `limit` long."""
    text = " ".join(_ESCAPES.sub("", text[: 4 * limit + 1_000]).split())  # the rest would be cut off anyway
    text = "".join(c for c in text if c.isprintable())  # drops bidi overrides and lone surrogates, too
    return " ".join(text.split())[:limit].rstrip()


def build_messages(caption: str, sub_goals: Sequence[int], analysis: str) -> list[dict[str, str]]:
    """The chat for one query: the rules of the game, then caption, previous sub-goals and the adapter's analysis.

    The analysis is put on one line, so whatever an adapter writes cannot pass for a line of the caption.
    """
    lines = [caption.strip(), f"Previous sub-goals: {vocab.sub_goals_text(tuple(sub_goals))}."]
    if analysis := clean(analysis, MAX_ANALYSIS):
        lines.append(f"Analysis: {analysis}")
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "\n".join(lines)}]


Literals = tuple[tuple[int, bool], ...]  # (index into FACTS, truth)


@dataclass(frozen=True)
class Guidance:
    """What a reply says."""

    sub_goals: tuple[int, ...]  # indices into SUB_GOALS, most urgent first, 1 to MAX_SUB_GOALS of them
    because: tuple[Literals, ...]  # what each of them rests on; empty means on all facts


@dataclass(frozen=True)
class Reply:
    """One query's outcome. Where `error` is empty, `text` holds a reply that `parse_reply` reads."""

    text: str = ""
    error: str = ""
    cached: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    calls: int = 0  # requests that the guide answered: 2 with a repair; SDK retries do not count
    cost: float = 0.0  # in the currency of --llm-price-in
    skipped: bool = False  # not asked: the budget is spent; `error` says so, but it is no failure of the guide


_SEPARATORS = re.compile(r"[\n,;:\[\](){}\"'`*]|\s[-–—]\s")
_MAX_OBJECTS = 50  # tries at "{": bounds the work on a text full of braces


def _read_sub_goals(value: Any, common: Any = None) -> dict[int, Literals]:
    """At most MAX_SUB_GOALS sub-goals, each once, with their reasons; what is no sub-goal is dropped.

    Takes {name: reasons}, a (list of) strings, or a list of {"name": ..., "because": ...}; `common` are the reasons of
    those that come without their own.
    """
    found: dict[int, Literals] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            fields = {re.sub("[^a-z]", "", str(key).lower()): field for key, field in item.items()}
            name = next((fields[key] for key in ("name", "subgoal", "goal") if key in fields), None)
            pairs = list(item.items()) if name is None else [(name, fields.get("because", common))]
        else:
            pairs = [(item, common)]
        for names, reasons in pairs:
            for piece in _SEPARATORS.split(names) if isinstance(names, str) else ():
                index = vocab.sub_goal_index(re.sub(r"^[^a-zA-Z]+", "", piece))  # without "1." or "- " in front
                if index is not None and len(found) < MAX_SUB_GOALS:
                    found.setdefault(index, _read_because(reasons))
    return found


def _read_because(value: Any) -> Literals:
    """Facts in a list of strings, one string, or {name: true/false}. Unknown and contradictory ones are dropped."""
    if isinstance(value, dict):
        named = [(name, truth) for name, truth in value.items() if isinstance(truth, bool)]
    else:
        strings = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
        named = [(name, True) for item in strings for name in re.split("[,;\n]", item)]
    seen: dict[int, set[bool]] = {}
    for name, said in named:
        fact = vocab.fact_index(re.sub(r"^\s*!\s*", "not ", name))
        if fact is not None:
            seen.setdefault(fact[0], set()).add(fact[1] == said)
    return tuple((index, truths.pop()) for index, truths in seen.items() if len(truths) == 1)


def _find_object(text: str) -> dict[str, Any] | None:
    """The first balanced JSON object in the text that has sub-goals, alone, in prose, in a fence or nested; else None.

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


def parse_reply(text: str) -> Guidance:
    """Read an LLM's reply. Raises ValueError, with the reason, when it holds no usable sub-goal, and nothing else.

    Takes a JSON object wherever it stands, else a plain list of sub-goals by lines or commas. What a reasoning model
    writes between <think> and </think> is not its answer and is not read.
    """
    text = text[:MAX_REPLY].rpartition("</think>")[2].partition("<think>")[0]
    fields = _find_object(text)
    if fields is not None:
        found = _read_sub_goals(fields["subgoals"], fields.get("because"))
    else:  # a list, or JSON that was cut off or is not quite JSON: what follows "because" are facts, not sub-goals
        found = _read_sub_goals(re.split(r"[\"']?because[\"']?\s*:", text, maxsplit=1)[0])
    if not found:
        raise ValueError(f"no known sub-goal in the reply {clean(text, 80)!r}")
    return Guidance(tuple(found), tuple(found.values()))


def format_reply(advice: Iterable[tuple[int, Iterable[str]]]) -> str:
    """The JSON text that SYSTEM_PROMPT asks for, from indices into SUB_GOALS and their reasons."""
    return json.dumps({"sub_goals": {vocab.SUB_GOALS[i]: list(reasons) for i, reasons in advice}})


@dataclass(frozen=True)
class Situation:
    """What a caption says."""

    sights: dict[str, tuple[int, int]]  # name -> (dy, dx) of the nearest one, in steps, north and west negative
    facing: str
    inventory: dict[str, int]  # tools count 1
    vitals: dict[str, int]
    dark: bool
    asleep: bool
    enclosed: bool
    unlocked: frozenset[str]  # achievements in words: "collect wood"


def _items(listing: str) -> list[str]:
    return [] if listing.startswith("nothing") else listing.split(", ")


def _offset(steps: str) -> tuple[int, int]:
    """(dy, dx) of "1 south, 3 west" and the like."""
    far = {direction: int(count) for count, direction in re.findall(r"(\d+) (north|south|west|east)", steps)}
    return far.get("south", 0) - far.get("north", 0), far.get("east", 0) - far.get("west", 0)


def read_caption(text: str) -> Situation:
    """Read the caption that a text starts with, ignoring what follows. Raises ValueError where it has no such lines."""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        label, _, rest = line.partition(": ")
        lines.setdefault(label, rest.rstrip(" ."))
    vitals = {name: int(n) for name, n in re.findall(r"([a-z]+) (\d+)", lines.get("Vitals (of 9)", ""))}
    missing = [label for label in ("You see", "Facing", "Inventory", "Unlocked") if label not in lines]
    missing += [name for name in vocab.VITALS if name not in vitals]
    if missing:
        raise ValueError(f"no {missing[0]!r} in the caption {clean(text, 80)!r}")
    items = _items(lines["Inventory"])
    about = next((line for line in text.splitlines() if line.startswith("It is ")), "")
    return Situation(
        sights={name: _offset(steps) for name, steps in re.findall(r"([a-z][a-z ]*) \(([^)]*)\)", lines["You see"])},
        facing=lines["Facing"],
        inventory={item.lstrip("0123456789 "): int(re.match("[0-9]*", item)[0] or 1) for item in items},
        vitals=vitals,
        dark="It is dark." in about,
        asleep="The player is asleep." in about,
        enclosed="The player is enclosed." in about,
        unlocked=frozenset(_items(lines["Unlocked"])),
    )


def facts_of(situation: Situation) -> dict[str, bool]:
    """Truth of every name in FACTS, in that order, from a caption alone."""
    s, near = situation, {name: (abs(dy), abs(dx)) for name, (dy, dx) in situation.sights.items()}
    facts = {f"unlocked {name}": name in s.unlocked for name in (name.replace("_", " ") for name in vocab.ACHIEVEMENTS)}
    facts |= {f"{item} >= {n}": s.inventory.get(item, 0) >= n for item, n in vocab.AMOUNTS}
    facts |= {f"{vital} low": s.vitals[vital] <= vocab.LOW for vital in vocab.VITALS}
    facts |= {f"{sight} in view": sight in s.sights for sight in vocab.SIGHTS}
    facts["zombie near"] = sum(near.get("zombie", (99, 99))) <= vocab.NEAR
    facts["table in reach"] = max(near.get("crafting table", (99, 99))) <= 1
    facts["furnace in reach"] = max(near.get("furnace", (99, 99))) <= 1
    facts["energy full"] = s.vitals["energy"] >= 9
    return facts | {"dark": s.dark, "asleep": s.asleep, "enclosed": s.enclosed}


# What Crafter demands of a basic sub-goal now ("not " marks a false fact). Tools are never lost: unlocked means owned.
_WOOD_TOOL = ("table in reach", "wood >= 1")
_STONE_TOOL = (*_WOOD_TOOL, "stone >= 1")
_IRON_TOOL = (*_STONE_TOOL, "furnace in reach", "coal >= 1", "iron >= 1")
POSSIBLE: dict[str, tuple[str, ...]] = {
    "chop tree": ("tree in view",), "place crafting table": ("wood >= 2",), "attack cow": ("cow in view",),
    "chop grass": (), "drink water": ("water in view",), "make wood pickaxe": _WOOD_TOOL,
    "make wood sword": _WOOD_TOOL, "place plant": ("sapling >= 1",), "attack zombie": ("zombie in view",),
    "mine stone": ("unlocked make wood pickaxe", "stone in view"), "place stone": ("stone >= 1",),
    "eat plant": ("ripe plant in view",), "attack skeleton": ("skeleton in view",),
    "make stone pickaxe": _STONE_TOOL, "make stone sword": _STONE_TOOL, "sleep": ("not energy full",),
    "place furnace": ("stone >= 1",), "mine coal": ("unlocked make wood pickaxe", "coal in view"),
    "mine iron": ("unlocked make stone pickaxe", "iron in view"),
    "mine diamond": ("unlocked make iron pickaxe", "diamond in view"),
    "make iron pickaxe": _IRON_TOOL, "make iron sword": _IRON_TOOL,
}  # fmt: skip
# (sub-goal, when it is wise), the most urgent first: a life in danger, what the analysis names (`advise`), the next
# tool, then what it takes, then what earns a first reward. Where a thing need not be in view for its sub-goal to be
# wise the list does not ask for it: the player sees for itself, and the fewer facts a piece of advice rests on, the
# more situations it serves.
URGENT = (
    ("attack zombie", ("zombie near",)), ("drink water", ("drink low",)), ("attack cow", ("food low",)),
    ("eat plant", ("food low", "ripe plant in view")), ("sleep", ("energy low",)),
)  # fmt: skip
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
)  # fmt: skip


def holds(facts: dict[str, bool], literals: Iterable[str]) -> bool:
    """Is each of these facts as it is said to be? "not " stands in front of a false one."""
    return all(facts[text.removeprefix("not ")] != text.startswith("not ") for text in literals)


def advise(facts: dict[str, bool], heeded: list[int]) -> list[tuple[int, tuple[str, ...]]]:
    """Sub-goals for a situation, the most urgent first, each with the facts that it rests on.

    A sub-goal in `heeded` counts as wise where it is possible now and was not reached in this life: advised for ever,
    some things could be done and undone for a bonus without end. (The first facts are the achievements, in the order of
    the sub-goals that unlock them.)
    """
    names = [vocab.BASIC_SUB_GOALS[i] for i in heeded]
    named = tuple((name, (f"not {vocab.FACTS[i]}", *POSSIBLE[name])) for i, name in zip(heeded, names, strict=True))
    advice: dict[int, tuple[str, ...]] = {}
    for sub_goal, reasons in (*URGENT, *named, *WISE):
        if holds(facts, reasons) and len(advice) < MAX_SUB_GOALS:
            advice.setdefault(vocab.SUB_GOAL_INDEX[sub_goal], reasons)
    return list(advice.items())


def _generator(seed: int, messages: list[dict[str, str]], sample: int) -> np.random.Generator:
    """Random numbers that depend on nothing else, in any process."""
    digest = hashlib.sha256(json.dumps([seed, sample, messages]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


class OfflineGuide:
    """What rules and random share. Subclasses have `answer(messages, sample)`, which depends on these and the seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        return [self._reply(messages, sample) for messages, sample in zip(batch, samples, strict=True)]

    def _reply(self, messages: list[dict[str, str]], sample: int) -> Reply:
        start = time.perf_counter()
        try:
            return Reply(self.answer(messages, sample), calls=1, seconds=time.perf_counter() - start)
        except Exception as error:  # a fork's caption that the rules cannot read must not end the training
            return Reply(error=clean(f"{type(error).__name__}: {error}", MAX_ERROR))

    def check(self) -> None: ...

    def resume(self, queries: int, calls: int, cost: float) -> None: ...

    def close(self) -> None: ...


class RulesGuide(OfflineGuide):
    """Stands in for an LLM: knows Crafter's rules, and heeds the analysis where it names what is possible now."""

    name = "rules"

    def answer(self, messages: list[dict[str, str]], sample: int) -> str:
        """Raises ValueError where the last message holds no caption."""
        text = messages[-1]["content"]
        analysis = text.partition("\nAnalysis: ")[2]
        return format_reply(advise(facts_of(read_caption(text)), vocab.sub_goals_in_text(analysis)))


class RandomGuide(OfflineGuide):
    """Three random basic sub-goals, each for two random facts of the situation."""

    name = "random"

    def answer(self, messages: list[dict[str, str]], sample: int) -> str:
        generator = _generator(self.seed, messages, sample)
        facts = facts_of(read_caption(messages[-1]["content"]))
        literals = [name if truth else f"not {name}" for name, truth in facts.items()]
        drawn = generator.choice(vocab.NUM_BASIC, 3, replace=False).tolist()
        return format_reply((i, generator.choice(literals, 2, replace=False).tolist()) for i in drawn)


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_TOKENS = 300  # of a reply: the JSON object asked for has about 100
MAX_BODY = 4_000_000  # bytes of an HTTP body that are read: no server fills the memory
CHECK_MESSAGES = [{"role": "user", "content": "Reply with one word: ready"}]


def check_server(base_url: str) -> tuple[str, bool]:
    """(key, whether the server is on this machine, where none is needed). Raises ValueError naming flag or variable."""
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        usable = usable and "@" not in url.netloc and not url.query  # secrets there would show in every log
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("--llm-base-url must look like http://127.0.0.1:8000/v1, without user, password or query")
    key, local = os.environ.get("OPENAI_API_KEY", "").strip(), url.hostname in LOCAL_HOSTS
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it again")
    if not key and not local:
        raise ValueError(f"--llm-base-url {clean(base_url, 80)} needs a key: set OPENAI_API_KEY in the environment")
    return key or "none", local


def read_completion(body: bytes) -> tuple[str, int, int]:
    """(text, prompt tokens, completion tokens) of a chat completion. Raises ValueError for anything else."""
    try:
        answer = json.loads(body.decode("utf-8"))
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the body is not a chat completion with at least one choice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not {'UTF-8' if isinstance(error, UnicodeError) else 'JSON'}") from None
    if text is not None and not isinstance(text, str):
        raise ValueError("the content is not text")
    usage = answer.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [0, 0]
    prompt, completion = (n if type(n) is int and 0 <= n < 10**9 else 0 for n in counts)
    return text or "", prompt, completion


def follows_schema(text: str) -> bool:
    """Is the reply what RESPONSE_FORMAT asks for? If not, the server ignored it."""
    try:
        items = json.loads(text)["sub_goals"]
        return bool(items) and all(set(item) == {"name", "because"} for item in items) and bool(parse_reply(text))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class NoCache:
    """Remembers nothing."""

    def read(self, key: str) -> str | None: ...

    def keep(self, key: str, text: str) -> str:
        return text

    def close(self) -> None: ...


class Cache:
    """Replies on disk, keyed by a hash of the whole request. Several processes may share the file, a kill costs nothing
    that was written (SQLite, WAL). A damaged file is set aside and a new one begun; nothing here stops a training.

    Raises ValueError, one line, if there can be no file at this path.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._warned = path, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._start_anew()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"--llm-cache: can't use {path} ({error}); choose another file, or none") from None

    def _open(self) -> None:
        # One complete() runs at a time, but with --llm-async in a thread of its own.
        self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        if self._db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        for attempt in range(100):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:  # another process is at it, for which SQLite does not wait here
                if attempt == 99:
                    raise
                time.sleep(0.05)
        self._db.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the newest replies, a kill none
        self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")

    def _start_anew(self) -> None:
        self._db.close()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        print(f"warning: --llm-cache: {self.path} is damaged; set aside as {aside.name}", file=sys.stderr)
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            except FileNotFoundError:
                continue  # there is none, or another process was faster
        self._open()

    def _run(self, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
        try:
            try:
                return self._db.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._start_anew()
        except (OSError, sqlite3.Error) as error:
            if not self._warned:
                print(f"warning: --llm-cache: {self.path} can't be used now ({error})", file=sys.stderr)
            self._warned = True
        return []

    def read(self, key: str) -> str | None:
        """A reply that `parse_reply` reads, None if there is none."""
        for (text,) in self._run("SELECT text FROM replies WHERE key = ?", (key,)):
            try:
                text = json.loads(text)
                parse_reply(text)
                return text
            except (ValueError, TypeError):  # another version's reply, or no text
                return None
        return None

    def keep(self, key: str, text: str) -> str:
        """Write a reply; returns the one that is kept: the first, which another process may have used already."""
        # As JSON, because SQLite takes no lone surrogates.
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(text)))
        return self.read(key) or text

    def close(self) -> None:
        self._db.close()


def is_damage(error: sqlite3.Error) -> bool:
    """Of SQLite's errors only what it says about a file that is no database any more has no class of its own."""
    return type(error) is sqlite3.DatabaseError


def open_cache(path: str | Path) -> Cache | NoCache:
    """The cache at a path; "none" is no cache."""
    return NoCache() if str(path) == "none" else Cache(Path(path).expanduser())


class NotReady(ValueError):
    """A server that may answer later."""


class BudgetSpent(ValueError):
    """One more call could pass --llm-max-calls or --llm-max-cost."""


class Budget:
    """Calls and money, spent and reserved for calls under way. None means no limit.

    Prices are per million tokens, in any currency.
    """

    def __init__(
        self, max_calls: int | None = None, max_cost: float | None = None, price_in: float = 0, price_out: float = 0
    ) -> None:
        if max_cost is not None and not price_in + price_out > 0:
            raise ValueError("--llm-max-cost needs --llm-price-in and --llm-price-out, the prices of a million tokens")
        self.max_calls, self.max_cost, self.price_in, self.price_out = max_calls, max_cost, price_in, price_out
        self.calls, self.cost = 0, 0.0

    def price(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.price_in * prompt_tokens + self.price_out * completion_tokens) / 1e6

    def reserve(self, cost: float) -> None:
        """Set one call aside, at most as dear as this. Raises BudgetSpent where that is more than there is left."""
        if self.max_calls is not None and self.calls + 1 > self.max_calls:
            raise BudgetSpent("not asked: --llm-max-calls is spent")
        if self.max_cost is not None and self.cost + cost > self.max_cost:
            raise BudgetSpent("not asked: --llm-max-cost is spent")
        self.calls, self.cost = self.calls + 1, self.cost + cost

    def settle(self, reserved: float, calls: int, cost: float) -> None:
        """The call has ended; what it took, instead of what was reserved."""
        self.calls, self.cost = self.calls - 1 + calls, self.cost - reserved + cost


def estimate_tokens(messages: list[dict[str, str]]) -> int:
    """About what a chat counts as, rather too many: English has some four characters per token."""
    return sum(len(message["content"]) // 3 + 8 for message in messages)


def is_transient(status: int) -> bool:
    """May the same request succeed later?"""
    return status in (408, 409, 425, 429) or status >= 500


def retry_delay(error: Exception, attempt: int) -> float:
    """Seconds to wait before attempt + 1: what Retry-After says, else half a second, doubled each time, up to eight.
    With jitter, so that many clients do not come back at once."""
    said = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = math.nan
    if not seconds >= 0:
        seconds = 0.75 * min(0.5 * 2**attempt, 8.0)
    return seconds * random.uniform(1, 4 / 3)


@dataclass
class Spending:
    """What one query has taken so far."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class HttpGuide:
    """Any server with OpenAI's /chat/completions.

    concurrency: requests under way at a time.
    timeout: seconds that one attempt may be silent; a whole request, with its retries, may take twice that.
    deadline: seconds that a whole pause may take; queries that are not answered by then fail.
    structured: json_schema asks for SCHEMA, text does not, auto asks for it until the server refuses or ignores it.
    Temperature 1, as in the reference, so samples of the same messages differ.
    Raises ValueError, naming the flag or variable, where it cannot work at all.
    """

    def __init__(
        self, base_url: str, model: str, concurrency: int = 32, timeout: float = 60, retries: int = 3,
        deadline: float = 600, structured: str = "text", cache: Cache | NoCache | None = None,
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        if not model.strip():
            raise ValueError("--llm http needs the name of a model: set --llm-model")
        self._key, self._local = check_server(base_url)
        try:
            import openai  # lazily: a second of start-up that other guides need not pay
        except ImportError:
            raise ValueError("--llm http needs the openai package: pip install -r requirements.txt") from None
        self._openai, self.name, self.base_url, self.model = openai, f"http:{model}", base_url, model
        self.concurrency, self.timeout, self.retries, self.deadline = concurrency, timeout, retries, deadline
        self.structured, self.cache, self.budget = structured, cache or NoCache(), budget or Budget()
        # What this server takes, as far as is known: the name of the reply's limit, and whether a schema may be sent.
        self._dialect = ("max_tokens", structured != "text")

    @property
    def sends_schema(self) -> bool:
        """After `check`: does the server answer in the schema that it is asked for?"""
        return self._dialect[1]

    def check(self) -> None:
        """One short chat, two where the server does not answer in the schema that --llm-structured auto asks for.
        Raises ValueError where training would be in vain, warns on stderr where it may go well."""
        try:
            self.try_out(CHECK_MESSAGES)
        except NotReady as error:
            print(f"warning: {error}; training starts all the same", file=sys.stderr)

    def try_out(self, messages: list[dict[str, str]]) -> Reply:
        """The answer to one chat, which need not be guidance, asked without retries. Raises ValueError, one line that
        names the flag to look at; NotReady where the same may go well later."""
        openai, where = self._openai, f"the LLM server at {self.base_url}"
        try:
            return asyncio.run(self._probe(messages))
        except Exception as error:
            status, hint = getattr(error, "status_code", 0), "--llm-base-url (/v1 at the end?), --llm-model"
            if isinstance(error, TimeoutError | ConnectionError | openai.APITimeoutError) or is_transient(status):
                raise NotReady(f"{where} is not ready: {self._said(error)}") from None
            if status in (401, 403):
                hint = "OPENAI_API_KEY"
            elif isinstance(error, openai.APIConnectionError):
                hint = "--llm-base-url, and that the server runs"
            elif self.structured == "json_schema":
                hint += ", or use --llm-structured auto"
            raise ValueError(f"cannot use {where}: check {hint}: {self._said(error)}") from None

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        """All queries at once, at most `concurrency` at a time; those in the cache are not asked, none is asked twice.

        The server draws the samples. Their index only tells the cache that another answer is wanted.
        """
        keys = [self.cache_key(messages, sample) for messages, sample in zip(batch, samples, strict=True)]
        found = {key: Reply(text, cached=True) for key in keys if (text := self.cache.read(key)) is not None}
        new = {key: messages for key, messages in zip(keys, batch, strict=True) if key not in found}
        try:
            found |= asyncio.run(self._complete(new)) if new else {}
        except Exception as error:  # the event loop itself failed
            found |= {key: Reply(error=self._said(error)) for key in new}
        replies = []
        for key in keys:
            reply = found[key]
            replies.append(reply)
            found[key] = Reply(reply.text, reply.error, not reply.error, skipped=reply.skipped)  # took nothing again
        return replies

    def cache_key(self, messages: list[dict[str, str]], sample: int) -> str:
        """Hash of all that decides a reply; the key of the API is no part of it."""
        request = {
            "base_url": self.base_url, "model": self.model, "messages": messages, "sample": sample, "temperature": 1.0,
            "max_tokens": MAX_TOKENS, "structured": self.structured,
            "schema": None if self.structured == "text" else [SCHEMA, SCHEMA_NOTE],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def resume(self, queries: int, calls: int, cost: float) -> None:
        self.budget.calls, self.budget.cost = calls, cost

    def close(self) -> None:
        self.cache.close()

    def _client(self) -> Any:
        """A client for one event loop, that is, for one pause."""
        # A proxy from the environment is of no use for a server on this machine, and often in the way.
        transport = self._openai.DefaultAsyncHttpxClient(trust_env=not self._local)
        common = {"api_key": self._key, "base_url": self.base_url, "timeout": self.timeout}
        return self._openai.AsyncOpenAI(**common, max_retries=0, http_client=transport)

    async def _probe(self, messages: list[dict[str, str]]) -> Reply:
        """`try_out`, with the SDK's exceptions. With structured auto this settles whether a schema is sent from now on:
        one is where the reply has its form."""
        spent, start = Spending(), time.perf_counter()
        async with self._client() as client:
            try:
                text = await self._call(client, messages, spent, Budget(), retries=0)
            except self._openai.APIStatusError as error:
                # Some servers answer a schema with 500. Of the others the same question would have the same answer.
                if error.status_code < 500 or self.structured != "auto" or not self.sends_schema:
                    raise
                text = ""
            if self.sends_schema and self.structured == "auto" and not follows_schema(text):
                before, self._dialect = self._dialect, (self._dialect[0], False)
                try:
                    text = await self._call(client, messages, spent, Budget(), retries=0)
                except Exception:
                    self._dialect = before  # it says nothing about schemas
                    raise
        return Reply(text, "", False, spent.prompt_tokens, spent.completion_tokens, time.perf_counter() - start,
                     spent.calls, spent.cost)  # fmt: skip

    async def _complete(self, questions: dict[str, list[dict[str, str]]]) -> dict[str, Reply]:
        until = asyncio.get_running_loop().time() + self.deadline
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:
            asked = (self._ask(client, gate, until, key, messages) for key, messages in questions.items())
            return dict(zip(questions, await asyncio.gather(*asked), strict=True))

    async def _ask(
        self, client: Any, gate: asyncio.Semaphore, until: float, key: str, messages: list[dict[str, str]]
    ) -> Reply:
        """One query, with at most one repair turn. A failure ends in Reply.error, with what was spent until then."""
        text, error, spent, skipped = "", "", Spending(), False
        start = time.perf_counter()
        try:
            async with asyncio.timeout_at(until), gate:
                start = time.perf_counter()
                for turn in range(2):
                    text = await self._call(client, messages, spent, self.budget, self.retries)
                    try:
                        parse_reply(text)
                        text = self.cache.keep(key, text)  # at once: it is paid for
                        break
                    except ValueError as reason:
                        if turn == 1 or not text.strip():  # nothing to repair in an empty reply
                            raise
                        turns = (("assistant", clean(text, 2_000)), ("user", REPAIR_PROMPT.format(reason=reason)))
                        messages = messages + [{"role": role, "content": content} for role, content in turns]
        except Exception as failure:
            error = self._said(failure)
            skipped = isinstance(failure, BudgetSpent) and not spent.calls
        seconds = time.perf_counter() - start
        tokens = spent.prompt_tokens, spent.completion_tokens
        return Reply(text, error, False, *tokens, seconds, spent.calls, spent.cost, skipped)

    async def _call(
        self, client: Any, messages: list[dict[str, str]], spent: Spending, budget: Budget, retries: int
    ) -> str:
        """The text of one reply, within a budget; what it took is added to `spent`. Raises what the SDK raises,
        BudgetSpent, and ValueError for what is no completion."""
        worst = budget.price(estimate_tokens(messages), MAX_TOKENS)
        budget.reserve(worst)
        calls = cost = 0
        try:
            body = await self._post(client, messages, retries)
            calls, cost = 1, worst  # the price of an answer that does not say how long it is
            text, prompt, completion = read_completion(body)
            if prompt or completion:
                cost = budget.price(prompt, completion)
            spent.prompt_tokens += prompt
            spent.completion_tokens += completion
        finally:
            spent.calls += calls
            spent.cost += cost
            budget.settle(worst, calls, cost)
        return self._redact(text)[:MAX_REPLY]  # in this order: half a key would not be found

    async def _post(self, client: Any, messages: list[dict[str, str]], retries: int) -> bytes:
        """Body of the answer to one chat request, asked again without what the server refused to take."""
        known = dialect = self._dialect
        while True:
            try:
                body = await self._send_patiently(client, messages, dialect, retries)
                if dialect != known:
                    self._dialect = dialect
                return body
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                refused, dialect = dialect, self._simpler(dialect, str(error))
                if dialect == refused:
                    raise

    def _simpler(self, dialect: tuple[str, bool], said: str) -> tuple[str, bool]:
        """Newer OpenAI models take the reply's limit only under another name, older servers take no schema."""
        limit, schema = dialect
        if limit == "max_tokens" and "max_completion_tokens" in said:
            return "max_completion_tokens", schema
        return limit, schema and self.structured != "auto"

    async def _send_patiently(
        self, client: Any, messages: list[dict[str, str]], dialect: tuple[str, bool], retries: int
    ) -> bytes:
        """`_send` with retries. Not the SDK's: they miss an answer that breaks off, and a wait that is longer than the
        time that is left would end as a time-out, without the reason."""
        clock = asyncio.get_running_loop().time
        until = clock() + 2 * self.timeout
        async with asyncio.timeout_at(until):
            attempt = 0
            while True:
                try:
                    return await self._send(client, messages, *dialect)
                except (self._openai.APIError, ConnectionError) as error:
                    status = getattr(error, "status_code", 503)  # none: the connection failed
                    wait = retry_delay(error, attempt)
                    if attempt >= retries or clock() + wait >= until or not is_transient(status):
                        raise
                await asyncio.sleep(wait)
                attempt += 1

    async def _send(self, client: Any, messages: list[dict[str, str]], limit_name: str, schema: bool) -> bytes:
        """Body of the answer to one chat request. Read in pieces, so that its size and time are bounded by us."""
        request = {"messages": messages, "temperature": 1.0, limit_name: MAX_TOKENS}
        if schema:  # the note after the first message, which is the same in all requests, as servers cache by prefix
            first = messages[0] | {"content": messages[0]["content"] + SCHEMA_NOTE}
            request |= {"messages": [first, *messages[1:]], "response_format": RESPONSE_FORMAT}
        body = bytearray()
        create = client.chat.completions.with_streaming_response.create
        # As extra_body, because the SDK takes a millisecond to look through what it is given as arguments.
        async with create(model=self.model, messages=[], extra_body=request) as response:
            chunks = aiter(response.iter_bytes())
            while len(body) <= MAX_BODY:
                try:
                    body += await anext(chunks)
                except StopAsyncIteration:
                    return bytes(body)
                except Exception as error:  # the SDK does not wrap what its transport raises here
                    raise ConnectionError(f"the answer broke off: {error}") from None
        raise ValueError(f"the reply is longer than {MAX_BODY} bytes")

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) > 4 else text  # the dummy key is no secret

    def _said(self, error: BaseException) -> str:
        """An exception in one line, never empty, never with the key: redacted after cleaning, before the cut."""
        cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
        message = "time-out" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}{cause}"
        return self._redact(clean(message, MAX_REPLY))[:MAX_ERROR]


class ReplayGuide(OfflineGuide):
    """Says what an earlier run's guide said, in the same order, failures included: the same flags give the same
    training, bit for bit, without a server. Where a run with other flags asks something else, the answer to the same
    messages is looked up; where there is none, that query fails.

    Raises ValueError, one line, if the folder has no guidance.
    """

    name = "replay"

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        if folder is None:
            raise ValueError("--llm replay needs the folder of a run: set --llm-replay")
        self.records: list[tuple[str, Reply]] = []
        try:
            for line in (folder / "guidance.jsonl").read_text().splitlines():
                record = json.loads(line)
                reply = Reply(
                    record["reply"], record["error"], not record["error"], skipped=record.get("skipped", False)
                )
                self.records.append((json.dumps(record["messages"]), reply))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a kill may have cut the last line off
        if not self.records:
            raise ValueError(f"--llm-replay: {folder} has no readable guidance.jsonl")
        self.by_messages = {messages: reply for messages, reply in reversed(self.records) if not reply.error}
        self.position = 0

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        missing = Reply(error="the replayed run was not asked this")
        replies = []
        for messages in map(json.dumps, batch):
            said = self.records[self.position : self.position + 1]
            self.position += 1
            replies.append(said[0][1] if said and said[0][0] == messages else self.by_messages.get(messages, missing))
        return replies

    def resume(self, queries: int, calls: int, cost: float) -> None:
        self.position = queries


def make_llm(
    llm: str, *, model: str = "", base_url: str = "", seed: int = 0, replay_run: Path | None = None,
    cache: str | Path = "none", max_calls: int | None = None, max_cost: float | None = None, price_in: float = 0,
    price_out: float = 0, **http: Any,
) -> OfflineGuide | HttpGuide:  # fmt: skip
    """The client that --llm names. `http`: other settings of HttpGuide.

    Raises ValueError for another name, or where that guide cannot work.
    """
    if llm in ("rules", "random"):
        return RulesGuide(seed) if llm == "rules" else RandomGuide(seed)
    if llm == "replay":
        return ReplayGuide(replay_run)
    if llm == "http":
        guide = HttpGuide(base_url, model, budget=Budget(max_calls, max_cost, price_in, price_out), **http)
        guide.cache = open_cache(cache)  # last: nothing is written for flags that cannot work
        return guide
    raise ValueError(f"--llm {clean(llm, 80)!r} is unknown: use rules, http, replay or random")


@dataclass(frozen=True)
class Cli:
    """Ask a guide once, to see whether server, model and key work, and show what came back."""

    llm: Literal["http"] = "http"
    """the other guides have no server to check"""
    llm_model: str = ""
    """model name"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address; the key comes from OPENAI_API_KEY"""
    llm_structured: Literal["auto", "json_schema", "text"] = "auto"
    """is a reply in a JSON schema asked for?"""
    prompt: str = CHECK_MESSAGES[0]["content"]
    """what to ask"""


def main() -> int:
    """Exit code 0; 2 with one line on stderr where the server cannot be used."""
    import tyro

    args = tyro.cli(Cli)
    try:
        guide = HttpGuide(args.llm_base_url, args.llm_model, structured=args.llm_structured)
        reply = guide.try_out([{"role": "user", "content": args.prompt}])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"reply: {clean(reply.text, 2_000)}")
    print(f"tokens: {reply.prompt_tokens} prompt, {reply.completion_tokens} completion, of {reply.calls} chats")
    print(f"latency: {reply.seconds / reply.calls:.2f} seconds a chat")
    print(f"structured output (JSON schema): {'yes' if guide.sends_schema else 'no'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
