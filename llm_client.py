"""The guide's side of the method: messages to an LLM, replies read back into sub-goals, clients, text embeddings.

    caption, previous sub-goals, analysis -> build_messages -> client.complete -> parse_reply -> Guidance
                                                                                     embed_sub_goals -> (D,) context

Clients have `name: str` and
    check()                     before training: ValueError, one line, where the guide cannot work; else it may warn
    complete(batch, samples)    all queries of a pause: Replies in order; never raises, failures are in Reply.error
    close()

    rules    a decision list that reads only the text of the messages: offline, free, a stand-in for an LLM
    random   three random basic sub-goals: what any context at all is worth
    http     any OpenAI-compatible server; the key comes from OPENAI_API_KEY only

Plain Python and numpy, no jax: nothing here runs on the device. Captions come from `envs.captions` as text.
"""

import asyncio
import hashlib
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

# --- Messages

MAX_SUB_GOALS = 5
MAX_ANALYSIS = 1_000  # characters of the adapter's analysis that are passed on
MAX_REPLY = 20_000  # characters of a reply that are looked at
MAX_ERROR = 300  # characters of an error message

SYSTEM_PROMPT = f"""You guide a player in Crafter, a two-dimensional survival game on a grid. The player learns by trial
and error and hears from you only now and then. In each life it earns a reward the first time that it does each of 22
things: collect wood, stone, coal, iron, diamond, a sapling, a drink; place a table, a furnace, a stone, a plant; make a
pickaxe and a sword of wood, of stone, of iron; eat a cow, a ripe plant; defeat a zombie, a skeleton; sleep and wake up.
It dies when its health is used up: zombies, skeletons, hunger, thirst and tiredness take it, and so does lava.

Rules. A table costs 2 wood; a wood pickaxe or sword 1 wood; a stone one 1 wood, 1 stone; an iron one 1 wood, 1 stone,
1 coal, 1 iron; a furnace 1 stone. Tools and the furnace are made with a table in reach, iron tools with a furnace in
reach too. There are no planks, sticks or smelting. Stone and coal need a wood pickaxe, iron a stone pickaxe, diamond an
iron pickaxe. Grass gives a sapling one time in ten; a placed sapling must ripen before it is eaten. Zombies come in the
dark and while the player sleeps: it sleeps safely when enclosed, for example by stones.

Sub-goals, the only ones that exist: {", ".join(vocab.BASIC_SUB_GOALS)};
and wider ones: {", ".join(vocab.COMPOSITE_SUB_GOALS)}.

Facts, the only ones that exist: {", ".join(vocab.FACTS)}.

Reply with one JSON object and nothing else, for example
{{"sub_goals": ["chop tree", "drink water"], "because": ["tree in view", "not wood >= 4", "water in view"]}}
sub_goals: at most {MAX_SUB_GOALS} names from the list, the most urgent first, each possible now or soon.
because: every fact that your answer rests on, with "not " in front of one that is false. Your answer will be used in
every situation that shares these facts, so leave out what does not matter, and leave out nothing that does."""

REPAIR_PROMPT = """Your reply could not be used: {reason}. Reply with only the JSON object
{{"sub_goals": [...], "because": [...]}}, with names from the lists."""

_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def clean(text: str, limit: int) -> str:
    """Text that is safe to show or log: one line, no control characters or terminal escapes, at most `limit` long."""
    text = _ESCAPES.sub("", text[: 4 * limit + 1_000])  # what is cut off anyway is not worth looking at
    text = " ".join(text.split())
    text = "".join(c for c in text if c.isprintable())  # also drops bidi overrides and lone surrogates
    return " ".join(text.split())[:limit].rstrip()


def build_messages(caption: str, sub_goals: Sequence[int], analysis: str) -> list[dict[str, str]]:
    """The chat for one query: the rules of the game, then caption, previous sub-goals and the adapter's analysis.

    The analysis is put on one line, so whatever an adapter writes cannot pass for a line of the caption.
    """
    lines = [caption.strip(), f"Previous sub-goals: {vocab.sub_goals_text(tuple(sub_goals))}."]
    if analysis := clean(analysis, MAX_ANALYSIS):
        lines.append(f"Analysis: {analysis}")
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "\n".join(lines)}]


def repair_messages(messages: list[dict[str, str]], text: str, reason: str) -> list[dict[str, str]]:
    """The same chat with the unusable reply and a short correction appended."""
    said = {"role": "assistant", "content": clean(text, 2_000)}
    return [*messages, said, {"role": "user", "content": REPAIR_PROMPT.format(reason=reason)}]


# --- Replies


@dataclass(frozen=True)
class Guidance:
    """What a reply says. `sub_goals`: indices into SUB_GOALS, most urgent first, 1 to MAX_SUB_GOALS of them.

    `because`: (index into FACTS, truth) that the answer rests on; empty means on all of them.
    """

    sub_goals: tuple[int, ...]
    because: tuple[tuple[int, bool], ...]


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


def _read_sub_goals(value: Any) -> tuple[int, ...]:
    """Indices of the sub-goals in a string or list of strings, each once, at most MAX_SUB_GOALS.

    Strings are cut at list punctuation, "1." and "- " in front dropped. Unknown names and non-strings are dropped.
    """
    found: dict[int, None] = {}
    for item in value if isinstance(value, list) else [value]:
        for piece in _SEPARATORS.split(item) if isinstance(item, str) else ():
            index = vocab.sub_goal_index(re.sub(r"^[^a-zA-Z]+", "", piece))
            if index is not None and len(found) < MAX_SUB_GOALS:
                found[index] = None
    return tuple(found)


def _read_because(value: Any) -> tuple[tuple[int, bool], ...]:
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
    decoder, start = json.JSONDecoder(), -1
    for _ in range(_MAX_OBJECTS):
        start = text.find("{", start + 1)
        if start < 0:
            break
        try:
            value, _ = decoder.raw_decode(text, start)
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
        guidance = Guidance(_read_sub_goals(fields["subgoals"]), _read_because(fields.get("because")))
    else:  # a list, or JSON that was cut off or is not quite JSON: what follows "because" are facts, not sub-goals
        guidance = Guidance(_read_sub_goals(re.split(r"[\"']?because[\"']?\s*:", text, maxsplit=1)[0]), ())
    if not guidance.sub_goals:
        raise ValueError(f"no known sub-goal in the reply {clean(text, 80)!r}")
    return guidance


def format_reply(sub_goals: Iterable[int], because: Iterable[tuple[str, bool]]) -> str:
    """The JSON text that SYSTEM_PROMPT asks for, from indices into SUB_GOALS and (fact name, truth)."""
    facts = sorted(because, key=lambda literal: vocab.FACT_INDEX[literal[0]])
    because = [name if truth else f"not {name}" for name, truth in facts]
    return json.dumps({"sub_goals": [vocab.SUB_GOALS[i] for i in sub_goals], "because": because})


# --- Captions read back


@dataclass(frozen=True)
class Situation:
    """What a caption says. Distances in steps, north and west negative; tools count 1; vitals 0 to 9."""

    sights: dict[str, tuple[int, int]]  # name -> (dy, dx) of the nearest one
    facing: str
    inventory: dict[str, int]
    vitals: dict[str, int]
    dark: bool
    asleep: bool
    enclosed: bool
    unlocked: frozenset[str]  # achievements in words: "collect wood"


def _items(listing: str) -> list[str]:
    """Comma-separated items; "nothing" and "nothing special" are none."""
    return [] if listing.startswith("nothing") else listing.split(", ")


def _offset(steps: str) -> tuple[int, int]:
    """(dy, dx) of "1 south, 3 west"."""
    far = {direction: int(count) for count, direction in re.findall(r"(\d+) (north|south|west|east)", steps)}
    return far.get("south", 0) - far.get("north", 0), far.get("east", 0) - far.get("west", 0)


def read_caption(text: str) -> Situation:
    """Read the caption that a text starts with, ignoring what follows. Raises ValueError where it has no such lines."""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        label, _, rest = line.partition(": ")
        lines.setdefault(label, rest.rstrip(" ."))
    labels = ("You see", "Facing", "Inventory", "Vitals (of 9)", "Unlocked")
    if missing := [label for label in labels if label not in lines]:
        raise ValueError(f"no line {missing[0]!r} in the caption {clean(text, 80)!r}")
    you_see, facing, inventory, vitals, unlocked = (lines[label] for label in labels)
    levels = {name: int(value) for name, value in re.findall(r"([a-z]+) (\d+)", vitals)}
    if missing := [vital for vital in vocab.VITALS if vital not in levels]:
        raise ValueError(f"no {missing[0]!r} among the vitals of the caption {clean(text, 80)!r}")
    about = next((line for line in text.splitlines() if line.startswith("It is ")), "")
    return Situation(
        sights={name: _offset(steps) for name, steps in re.findall(r"([a-z][a-z ]*) \(([^)]*)\)", you_see)},
        facing=facing,
        inventory={item.lstrip("0123456789 "): int(re.match("[0-9]*", item)[0] or 1) for item in _items(inventory)},
        vitals=levels,
        dark="It is dark." in about,
        asleep="The player is asleep." in about,
        enclosed="The player is enclosed." in about,
        unlocked=frozenset(_items(unlocked)),
    )


def facts_of(situation: Situation) -> dict[str, bool]:
    """Truth of every name in FACTS, in that order, from a caption alone."""
    s = situation
    near = {name: (abs(dy), abs(dx)) for name, (dy, dx) in s.sights.items()}
    unlocked = [name.replace("_", " ") for name in vocab.ACHIEVEMENTS]
    facts = {f"unlocked {name}": name in s.unlocked for name in unlocked}
    facts |= {f"{item} >= {n}": s.inventory.get(item, 0) >= n for item, n in vocab.AMOUNTS}
    facts |= {f"{vital} low": s.vitals[vital] <= vocab.LOW for vital in vocab.VITALS}
    facts |= {f"{sight} in view": sight in s.sights for sight in vocab.SIGHTS}
    facts["zombie near"] = sum(near.get("zombie", (99, 99))) <= vocab.NEAR
    facts["table in reach"] = max(near.get("crafting table", (99, 99))) <= 1
    facts["furnace in reach"] = max(near.get("furnace", (99, 99))) <= 1
    facts["energy full"] = s.vitals["energy"] >= 9
    return facts | {"dark": s.dark, "asleep": s.asleep, "enclosed": s.enclosed}


# --- The rules guide

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
    "place furnace": ("table in reach", "stone >= 1"), "mine coal": ("unlocked make wood pickaxe", "coal in view"),
    "mine iron": ("unlocked make stone pickaxe", "iron in view"),
    "mine diamond": ("unlocked make iron pickaxe", "diamond in view"),
    "make iron pickaxe": _IRON_TOOL, "make iron sword": _IRON_TOOL,
}  # fmt: skip
# (sub-goal, when it is wise). Life and death comes first, then what the analysis names, what is new, what is useful.
URGENT = (
    ("attack zombie", ("zombie near",)), ("drink water", ("drink low",)), ("eat plant", ("food low",)),
    ("attack cow", ("food low",)), ("place stone", ("dark", "not enclosed")), ("sleep", ("energy low",)),
    ("sleep", ("dark", "enclosed")),
)  # fmt: skip
NEW = tuple(  # the first facts are "unlocked ..." in the order of the basic sub-goals; the hardest come last there
    (name, (f"not {fact}",)) for name, fact in zip(POSSIBLE, vocab.FACTS, strict=False) if name != "sleep"
)[::-1]
USEFUL = (
    ("mine iron", ("not iron >= 2",)), ("mine coal", ("not coal >= 2",)), ("mine stone", ("not stone >= 4",)),
    ("place crafting table", ("not crafting table in view",)), ("chop tree", ("not wood >= 4",)), ("chop grass", ()),
)  # fmt: skip


def advise(facts: dict[str, bool], heeded: list[int]) -> tuple[list[int], set[tuple[str, bool]]]:
    """Sub-goals for a situation, most urgent first, and the (fact name, truth) that the answer rests on.

    A decision list; a sub-goal in `heeded` counts as wise where it is possible now. The literals suffice: every
    situation that shares them (and `heeded`) gets the same answer. A rule that fires adds all its literals, a rule
    that does not adds one that fails it, none where a known one does already.
    """
    answer: list[int] = []
    because: set[tuple[str, bool]] = set()
    named = tuple((vocab.BASIC_SUB_GOALS[i], ()) for i in heeded)
    for sub_goal, wise in (*URGENT, *named, *NEW, *USEFUL):
        if len(answer) == MAX_SUB_GOALS:
            break
        if vocab.SUB_GOAL_INDEX[sub_goal] in answer:
            continue
        literals = [(text.removeprefix("not "), not text.startswith("not ")) for text in (*wise, *POSSIBLE[sub_goal])]
        failing = [(name, not truth) for name, truth in literals if facts[name] != truth]
        if not failing:
            answer.append(vocab.SUB_GOAL_INDEX[sub_goal])
            because.update(literals)
        elif because.isdisjoint(failing):
            because.add(failing[0])
    return answer, because


def _generator(seed: int, messages: list[dict[str, str]], sample: int) -> np.random.Generator:
    """Random numbers that depend on nothing else, in any process."""
    digest = hashlib.sha256(json.dumps([seed, sample, messages]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


# --- Clients


class OfflineGuide:
    """What rules and random have in common: free, never unreachable, a function of (seed, messages, sample) alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def answer(self, messages: list[dict[str, str]], sample: int) -> str:
        raise NotImplementedError

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        return [self._reply(messages, sample) for messages, sample in zip(batch, samples, strict=True)]

    def _reply(self, messages: list[dict[str, str]], sample: int) -> Reply:
        start = time.perf_counter()
        try:
            return Reply(self.answer(messages, sample), calls=1, seconds=time.perf_counter() - start)
        except Exception as error:  # a fork's caption that the rules cannot read must not end the training
            return Reply(error=clean(f"{type(error).__name__}: {error}", MAX_ERROR))

    def check(self) -> None:
        """Nothing can be wrong."""

    def close(self) -> None:
        """Nothing is open."""


class RulesGuide(OfflineGuide):
    """Stands in for an LLM: reads only the text of the messages and answers in the format that is asked of an LLM.

    Sample 0 is the rules' own answer. Later samples leave out one sub-goal, never the first: an order changes nothing
    downstream, and candidates that are all equal would leave A/B nothing to decide.
    """

    name = "rules"

    def answer(self, messages: list[dict[str, str]], sample: int) -> str:
        """Raises ValueError where the last message holds no caption."""
        text = messages[-1]["content"]
        analysis = text.partition("\nAnalysis: ")[2]
        sub_goals, because = advise(facts_of(read_caption(text)), vocab.sub_goals_in_text(analysis))
        if sample > 0 and len(sub_goals) > 1:
            sub_goals.pop(int(_generator(self.seed, messages, sample).integers(1, len(sub_goals))))
        return format_reply(sub_goals, because)


class RandomGuide(OfflineGuide):
    """Three random basic sub-goals; names no facts."""

    name = "random"

    def answer(self, messages: list[dict[str, str]], sample: int) -> str:
        drawn = _generator(self.seed, messages, sample).choice(vocab.NUM_BASIC, 3, replace=False)
        return format_reply(drawn.tolist(), ())


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_TOKENS = 300  # of a reply: the JSON object asked for has about 100
MAX_BODY = 4_000_000  # bytes of an HTTP body that are read: no server fills the memory
CHECK_MESSAGES = [{"role": "user", "content": "Reply with one word: ready"}]


def check_base_url(base_url: str) -> str:
    """The host of a usable base URL. Raises ValueError naming --llm-base-url."""
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        usable = usable and "@" not in url.netloc and not url.query  # secrets there would show in every log
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("--llm-base-url must look like http://127.0.0.1:8000/v1, without user, password or query")
    return str(url.hostname)


def api_key(host: str) -> str:
    """The key in OPENAI_API_KEY; a dummy for a server on this machine. Raises ValueError naming OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it again")
    if not key and host not in LOCAL_HOSTS:
        raise ValueError(f"--llm http needs a key for {clean(host, 80)}: set OPENAI_API_KEY in the environment")
    return key or "none"


def read_completion(body: bytes) -> tuple[str, int, int]:
    """(text, prompt tokens, completion tokens) of a chat completion. Raises ValueError for anything else."""
    try:
        answer = json.loads(body.decode("utf-8"))
        text = answer["choices"][0]["message"]["content"]
    except UnicodeDecodeError:
        raise ValueError("the body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    except (KeyError, IndexError, TypeError):
        raise ValueError("the body is not a chat completion with at least one choice") from None
    if text is not None and not isinstance(text, str):
        raise ValueError("the content is not text")
    usage = answer.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [0, 0]
    prompt, completion = (n if type(n) is int and 0 <= n < 10**9 else 0 for n in counts)
    return (text or "")[:MAX_REPLY], prompt, completion


class HttpGuide:
    """Any server with OpenAI's /chat/completions.

    timeout: seconds that one attempt may be silent; a whole request, with the SDK's retries, may take twice that.
    deadline: seconds that a whole pause may take; queries that are not answered by then fail.
    Temperature 1, as in the reference, so samples of the same messages differ.
    Raises ValueError, naming the flag or variable, where it cannot work at all.
    """

    def __init__(
        self, base_url: str, model: str, concurrency: int = 16, timeout: float = 60.0, retries: int = 3,
        deadline: float = 600.0,
    ) -> None:  # fmt: skip
        if not model.strip():
            raise ValueError("--llm http needs the name of a model: set --llm-model")
        host = check_base_url(base_url)
        try:
            import openai  # lazily: a second of start-up that other guides need not pay
        except ImportError:
            raise ValueError("--llm http needs the openai package: pip install -r requirements.txt") from None
        self._openai, self._key, self._local = openai, api_key(host), host in LOCAL_HOSTS
        self.name, self.base_url, self.model = f"http:{model}", base_url, model
        self.concurrency, self.timeout, self.retries, self.deadline = concurrency, timeout, retries, deadline
        self._limit_name = "max_tokens"

    def check(self) -> None:
        """One short chat. Raises ValueError where training would be in vain, warns on stderr where it may go well."""
        openai, where = self._openai, f"the LLM server at {self.base_url}"
        try:
            read_completion(asyncio.run(self._probe()))
        except (TimeoutError, openai.APITimeoutError):
            print(f"warning: {where} did not answer in time; going on", file=sys.stderr)
        except openai.APIStatusError as error:
            status, said = error.status_code, self._said(error)
            if status in (408, 409, 425, 429) or status >= 500:
                print(f"warning: {where} is not ready ({status}); going on: {said}", file=sys.stderr)
                return
            hints = {401: "OPENAI_API_KEY", 403: "OPENAI_API_KEY", 404: "--llm-base-url (/v1 at the end?), --llm-model"}
            hint = hints.get(status, "--llm-model, --llm-base-url")
            raise ValueError(f"{where} refused ({status}), check {hint}: {said}") from None
        except openai.APIConnectionError as error:
            raise ValueError(f"cannot reach {where}, check --llm-base-url: {self._said(error)}") from None
        except Exception as error:  # an answer that is no chat completion: a web page, another service
            raise ValueError(f"{where} is no chat server, check --llm-base-url: {self._said(error)}") from None

    def complete(self, batch: list[list[dict[str, str]]], samples: list[int]) -> list[Reply]:
        """All queries at once, at most `concurrency` at a time. `samples` need no care: the server draws them."""
        try:
            return asyncio.run(self._complete(batch))
        except Exception as error:  # the event loop itself failed
            return [Reply(error=self._said(error)) for _ in batch]

    def close(self) -> None:
        """Nothing is open: every pause has a client of its own, because it has an event loop of its own."""

    def _client(self, retries: int) -> Any:
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
                    text = self._redact(text)
                    try:
                        parse_reply(text)
                        break
                    except ValueError as reason:
                        if turn == 1 or not text.strip():  # nothing to repair in an empty reply
                            raise
                        messages = repair_messages(messages, text, str(reason))
        except Exception as failure:
            error = self._said(failure)
        return Reply(text, error, False, prompt_tokens, completion_tokens, time.perf_counter() - start, calls)

    async def _post(self, client: Any, messages: list[dict[str, str]]) -> bytes:
        """Body of the answer to one chat request. Read in pieces, so that its size and time are bounded by us."""
        body = bytearray()
        request = {"model": self.model, "messages": messages, "temperature": 1.0}
        request[self._limit_name] = MAX_TOKENS
        async with asyncio.timeout(2 * self.timeout):
            async with client.chat.completions.with_streaming_response.create(**request) as response:
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
    if llm == "rules":
        return RulesGuide(seed)
    if llm == "random":
        return RandomGuide(seed)
    if llm == "http":
        return HttpGuide(base_url, model)
    raise ValueError(f"--llm {clean(llm, 80)!r} is unknown: use rules, http or random")


# --- Embeddings


class HashEmbedding:
    """Text -> (D,) without a model: word 1-2-grams and character 3-5-grams in signed buckets. Sees shared words, not
    meaning, so it is for names from the closed vocabulary. The same in every process (crc32, not `hash`)."""

    def __init__(self, dim: int = 384) -> None:
        self.dim = dim
        self._cache: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) float32, rows of norm 1; a zero row for a text without words."""
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            if text not in self._cache:
                self._cache[text] = self._embed(text)
            row[:] = self._cache[text]
        return rows

    def _embed(self, text: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower())
        grams = [*words, *map(" ".join, zip(words, words[1:], strict=False))]
        for word in words:
            word = f"<{word}>"
            grams += [word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1)]
        hashes = np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams], np.int64)
        signs = np.where(hashes & 1, 1.0, -1.0)
        return _unit(np.bincount((hashes >> 1) % self.dim, weights=signs, minlength=self.dim))


def _unit(vector: np.ndarray) -> np.ndarray:
    """(D,) float32 of norm 1; zeros stay zeros."""
    norm = float(np.linalg.norm(vector))
    return (vector / norm if norm > 0 else vector).astype(np.float32)


def embed_sub_goals(embedding: HashEmbedding, indices: Sequence[int]) -> np.ndarray:
    """(D,) of a set of sub-goals: the normalised sum over their names, so order does not matter; zeros if empty."""
    return _unit(embedding.encode([vocab.SUB_GOALS[i] for i in indices]).sum(axis=0))
