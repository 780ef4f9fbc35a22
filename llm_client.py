"""The guide's side of the method: messages to an LLM, replies read back into sub-goals, clients, text embeddings.

    caption, previous sub-goals, analysis -> build_messages -> client.complete -> parse_reply -> Guidance
                                                                                     embed_sub_goals -> (D,) context

Clients have `name`; `check()`, before training: ValueError, one line, where the guide cannot work; `complete(batch,
samples)`, all queries of a pause: Replies in order, never raises, failures are in Reply.error; and `close()`:

    rules    a decision list that reads only the text of the messages: offline, free, a stand-in for an LLM
    random   three random basic sub-goals: what any context at all is worth
    http     any OpenAI-compatible server; the key comes from OPENAI_API_KEY only

Plain Python and numpy, no jax. Captions come from `envs.captions` as text.
"""

import asyncio
import hashlib
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
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

REPAIR_PROMPT = """Your reply could not be used: {reason}. Reply with only the JSON object
{{"sub_goals": {{name: [facts], ...}}}}, with names from the lists."""

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


class HttpGuide:
    """Any server with OpenAI's /chat/completions.

    timeout: seconds that one attempt may be silent; a whole request, with the SDK's retries, may take twice that.
    deadline: seconds that a whole pause may take; queries that are not answered by then fail.
    Temperature 1, as in the reference, so samples of the same messages differ.
    Raises ValueError, naming the flag or variable, where it cannot work at all.
    """

    def __init__(
        self, base_url: str, model: str, concurrency: int = 16, timeout: float = 60, retries: int = 3,
        deadline: float = 600,
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
        self._limit_name = "max_tokens"

    def check(self) -> None:
        """One short chat. Raises ValueError where training would be in vain, warns on stderr where it may go well."""
        openai, where = self._openai, f"the LLM server at {self.base_url}"
        try:
            read_completion(asyncio.run(self._probe()))
        except Exception as error:
            status, hint = getattr(error, "status_code", 0), "--llm-base-url (/v1 at the end?), --llm-model"
            slow = isinstance(error, TimeoutError | openai.APITimeoutError)
            if slow or status in (408, 409, 425, 429) or status >= 500:
                print(f"warning: {where} is not ready, going on: {self._said(error)}", file=sys.stderr)
                return
            if status in (401, 403):
                hint = "OPENAI_API_KEY"
            elif isinstance(error, openai.APIConnectionError):
                hint = "--llm-base-url, and that the server runs"
            raise ValueError(f"cannot use {where}: check {hint}: {self._said(error)}") from None

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        """All queries at once, at most `concurrency` at a time. `samples` need no care: the server draws them."""
        try:
            return asyncio.run(self._complete(batch))
        except Exception as error:  # the event loop itself failed
            return [Reply(error=self._said(error)) for _ in batch]

    def close(self) -> None: ...

    def _client(self, retries: int) -> Any:
        """A client for one event loop, that is, for one pause."""
        # A proxy from the environment is of no use for a server on this machine, and often in the way.
        transport = self._openai.DefaultAsyncHttpxClient(trust_env=not self._local)
        common = {"api_key": self._key, "base_url": self.base_url, "timeout": self.timeout}
        return self._openai.AsyncOpenAI(**common, max_retries=retries, http_client=transport)

    async def _probe(self) -> bytes:
        """The answer to CHECK_MESSAGES. Newer OpenAI models take the reply's limit only under another name."""
        async with self._client(retries=0) as client:
            try:
                return await self._post(client, CHECK_MESSAGES)
            except self._openai.BadRequestError as error:
                if "max_completion_tokens" not in str(error):
                    raise
                self._limit_name = "max_completion_tokens"
                return await self._post(client, CHECK_MESSAGES)

    async def _complete(self, batch: list[list[dict[str, str]]]) -> list[Reply]:
        until = asyncio.get_running_loop().time() + self.deadline
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client(self.retries) as client:
            return list(await asyncio.gather(*(self._ask(client, gate, until, messages) for messages in batch)))

    async def _ask(self, client: Any, gate: asyncio.Semaphore, until: float, messages: list[dict[str, str]]) -> Reply:
        """One query, with at most one repair turn. A failure ends in Reply.error, with what was spent until then."""
        text, error, calls, prompt_tokens, completion_tokens = "", "", 0, 0, 0
        start = time.perf_counter()
        try:
            async with asyncio.timeout_at(until), gate:
                start = time.perf_counter()
                for turn in range(2):
                    body = await self._post(client, messages)
                    calls += 1
                    text, prompt, completion = read_completion(body)
                    prompt_tokens, completion_tokens = prompt_tokens + prompt, completion_tokens + completion
                    text = self._redact(text)[:MAX_REPLY]  # in this order: half a key would not be found
                    try:
                        parse_reply(text)
                        break
                    except ValueError as reason:
                        if turn == 1 or not text.strip():  # nothing to repair in an empty reply
                            raise
                        turns = (("assistant", clean(text, 2_000)), ("user", REPAIR_PROMPT.format(reason=reason)))
                        messages = messages + [{"role": role, "content": content} for role, content in turns]
        except Exception as failure:
            error = self._said(failure)
        return Reply(text, error, False, prompt_tokens, completion_tokens, time.perf_counter() - start, calls)

    async def _post(self, client: Any, messages: list[dict[str, str]]) -> bytes:
        """Body of the answer to one chat request. Read in pieces, so that its size and time are bounded by us."""
        body = bytearray()
        request = {"model": self.model, "messages": messages, "temperature": 1.0, self._limit_name: MAX_TOKENS}
        create = client.chat.completions.with_streaming_response.create
        async with asyncio.timeout(2 * self.timeout), create(**request) as response:
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ValueError(f"the reply is longer than {MAX_BODY} bytes")
        return bytes(body)

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) > 4 else text  # the dummy key is no secret

    def _said(self, error: BaseException) -> str:
        """An exception in one line, never empty, never with the key: redacted after cleaning, before the cut."""
        cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
        message = "time-out" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}{cause}"
        return self._redact(clean(message, MAX_REPLY))[:MAX_ERROR]


def make_llm(llm: str, *, model: str, base_url: str, seed: int) -> OfflineGuide | HttpGuide:
    """The client that --llm names. Raises ValueError for another name, or where an HTTP guide cannot work."""
    if llm in ("rules", "random"):
        return RulesGuide(seed) if llm == "rules" else RandomGuide(seed)
    if llm == "http":
        return HttpGuide(base_url, model)
    raise ValueError(f"--llm {clean(llm, 80)!r} is unknown: use rules, http or random")


def _unit(vector: np.ndarray) -> np.ndarray:
    """(D,) float32 of norm 1; zeros stay zeros."""
    return (vector / (float(np.linalg.norm(vector)) or 1.0)).astype(np.float32)


class HashEmbedding:
    """Text -> (D,) without a model: word 1-2-grams and character 3-5-grams in signed buckets. Sees shared words, not
    meaning, so it is for names from the closed vocabulary. The same in every process (crc32, not `hash`)."""

    def __init__(self, dim: int = 384) -> None:
        self.dim = dim
        self._cache: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) float32, rows of norm 1; a zero row for a text without words."""
        self._cache |= {text: self._embed(text) for text in texts if text not in self._cache}
        return np.array([self._cache[text] for text in texts], np.float32).reshape(len(texts), self.dim)

    def _embed(self, text: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower())
        grams = [*words, *map(" ".join, zip(words, words[1:], strict=False))]
        for word in (f"<{word}>" for word in words):
            grams += [word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1)]
        hashes = np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams], np.int64)
        return _unit(np.bincount((hashes >> 1) % self.dim, weights=2.0 * (hashes & 1) - 1, minlength=self.dim))


def embed_sub_goals(embedding: HashEmbedding, indices: Sequence[int]) -> np.ndarray:
    """(D,) of a set of sub-goals: the normalised sum over their names, so order does not matter; zeros if empty."""
    return _unit(embedding.encode([vocab.SUB_GOALS[i] for i in indices]).sum(axis=0))
