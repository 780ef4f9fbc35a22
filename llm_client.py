"""The guide's side of the method: questions to an LLM, and replies read back into advice.

    caption, previous sub-goals, analysis -> build_messages -> Guide.ask -> utils.replies -> advice

Advice is a sub-goal with its reasons. A guide gives it:

    rules    the decision list of the game itself: offline, free, a stand-in for an LLM
    random   three random basic sub-goals: what any context at all is worth
    http     any OpenAI-compatible server; the key comes from OPENAI_API_KEY only
    replay   what the guide of an earlier run said, from its guidance.jsonl

    python llm_client.py --llm http --llm-base-url http://127.0.0.1:8000/v1 --llm-model NAME --prompt "hi"

asks a server once and shows what came back. Plain Python and numpy, no jax. What the game is comes from its
`envs.game.Game`; how a chat goes over HTTP is in utils/llm_http.py. docs/llm.md says how to start servers.
"""

import asyncio
import functools
import hashlib
import json
import lzma
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from envs import make_env
from envs.game import Game, Literals
from utils.cli import exit_code
from utils.llm_cache import Cache, NoCache, open_cache
from utils.llm_http import (
    MAX_ERROR,
    MAX_TOKENS,
    Budget,
    BudgetSpent,
    Chat,
    Form,
    Messages,
    Spending,
    clean,
)
from utils.replies import MAX_SUB_GOALS, follows_schema, is_usable, parse_reply, read_reply

MAX_ANALYSIS = 1_000  # characters of the adapter's analysis that are passed on
HEEDED = 0.75  # share of the analyses that `rules` with other knowledge follows; SmolLM2's share: docs/adapter.md
DEADLINE = 600.0  # seconds that all calls of one pause may take
MANY_SITUATIONS = 4  # different ones in a pause from which a guide that has one answer to all is warned of
MANY_TIMEOUTS = 0.1  # share of a pause's requests that time out from which a warning says so


# -------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class LlmArgs:
    """Flags of the guide."""

    llm: Literal["rules", "http", "random", "shuffled", "echo", "replay"] = "rules"
    """the guide that gives advice. rules: an offline stand-in that is no LLM; http: any OpenAI-compatible server;
    random: a control; shuffled: a control, rules with its sub-goals exchanged; echo: a control, what the analysis says
    and no more; replay: what another run's guide said"""
    rules_knowledge: Literal["expert", "minecraft"] = "expert"
    """what --llm rules knows. expert: the game; minecraft: another game, an experiment: what an LLM that does not know
    the task is worth, and what the adapter's analyses add"""
    llm_model: str = ""
    """name of the model for --llm http"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address of the server for --llm http; the key comes from OPENAI_API_KEY"""
    llm_structured: Literal["auto", "json_schema", "text"] = "auto"
    """ask for replies in a JSON schema: json_schema always, text never, auto until the server refuses or ignores it"""
    llm_concurrency: int = 32
    """requests to the server that are under way at a time"""
    llm_timeout: float = 60.0
    """seconds that the server may be silent; a call may take twice that with its retries"""
    llm_max_calls: int | None = None
    """calls of the guide that the run may make, the check before training left out; after that it goes on with the
    guidance it has"""
    llm_max_cost: float | None = None
    """money that the run may spend on calls of the guide, in the currency of --llm-price-in and --llm-price-out"""
    llm_price_in: float = 0.0
    """price of a million prompt tokens, in any currency"""
    llm_price_out: float = 0.0
    """price of a million completion tokens, in any currency"""
    llm_cache: Path | None = None
    """file of replies that are not asked for again; default llm.sqlite in $RLADAPTER_CACHE; none: no cache"""
    llm_replay: Path | None = None
    """folder of the run that --llm replay repeats, or its guidance.jsonl, which may be packed: guidance.jsonl.xz"""
    llm_async: bool = False
    """ask the guide while the device trains; answers are used one phase later"""

    @property
    def knows_the_game(self) -> bool:
        """Does the guide need nothing that an adapter could learn?"""
        return self.llm == "rules" and self.rules_knowledge == "expert"


LIMITS = {
    "llm_concurrency": (1, 4096),
    "llm_timeout": (0.01, 10**6),
    "llm_max_calls": (0, 10**9),
    "llm_max_cost": (0, 10**9),
    "llm_price_in": (0, 10**6),
    "llm_price_out": (0, 10**6),
}


# ---------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Reply:
    """What became of one question. Where `error` is empty, `text` holds a reply that `parse_reply` reads."""

    text: str = ""
    error: str = ""
    cached: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    calls: int = 0  # requests that the guide answered: 2 with a repair; retries do not count
    requests: int = 0  # all that were sent
    retries: int = 0  # of these, those that were sent again
    timeouts: int = 0  # of these, those that were given up
    cost: float = 0.0  # in the currency of --llm-price-in
    skipped: bool = False  # not asked: the budget is spent; `error` says so, but it is no failure of the guide


@dataclass(eq=False)
class Question:
    """One question of a pause, from being chosen to its line in guidance.jsonl."""

    obs: np.ndarray  # (O,) uint8
    situation: np.ndarray  # (P,) bool, the facts
    sub_goals: list[int]  # what the guidance table advises there so far
    comprehension: float | None  # how well that advice is understood
    sample: int = 0  # how often it was asked about before
    caption: str = ""  # set when it is chosen
    adapter_prompt: str = ""  # set by the adapter, and so is:
    analysis: str = ""
    messages: Messages = field(default_factory=list)  # set by Guide.ask
    reply: Reply = Reply()  # set by Pause.wait, and so are:
    advice: tuple[tuple[int, Literals], ...] = ()  # what the reply says: sub-goals with reasons; empty: see error
    error: str = ""  # why there is no advice
    dropped: int = 0  # reasons in the reply that are no facts
    rows: dict[int, int] = field(default_factory=dict)  # sub-goal -> row of the table; set by HostTable.store, so is:
    because: list[list[str]] = field(default_factory=list)  # the reasons of each row, as they are stored

    def log_line(self, game: Game, model: str) -> dict[str, Any]:
        """Returns its line in guidance.jsonl, but for phase and step. `model` is the name of the guide."""
        return {
            "situation": game.reasons_text(self.situation, self.situation),  # the facts that are true
            "rows": list(self.rows.values()),
            "caption": self.caption,
            "adapter_prompt": self.adapter_prompt,
            "analysis": self.analysis,
            "messages": self.messages,
            "sample": self.sample,
            "model": model,
            "reply": self.reply.text,
            "sub_goals": [game.sub_goals[i] for i in self.rows],
            "because": self.because,
            "error": self.error,
            "reasons_dropped": self.dropped,
            "skipped": self.reply.skipped,
            "cached": self.reply.cached,
            "calls": self.reply.calls,
            "prompt_tokens": self.reply.prompt_tokens,
            "completion_tokens": self.reply.completion_tokens,
            "cost": self.reply.cost,
            "seconds": self.reply.seconds,
        }


# ------------------------------------------------------------------------------------------ prompts

SYSTEM_PROMPT = """{about_the_game}

Sub-goals, the only ones that exist: {sub_goals}.

Facts, the only ones that exist: {facts}.

You are told what the player sees, what it was advised to do before ("Previous sub-goals"), and, at the end
("Analysis"), what an adviser says who has watched this player. Put the sub-goals that the adviser suggests first.

Reply with one JSON object and nothing else, without white space, in this form:
{form}
SUB-GOAL stands for a sub-goal from the list, FACT for a fact from the list. Name at most {max_sub_goals} sub-goals, the
most urgent first, each with the facts that it rests on, "not " in front of one that must be false. A sub-goal will be
advised in every situation in which its facts are so, so leave out what does not matter to it, and leave out nothing
that does."""

# Placeholders, no example: small models repeat an example whatever they are asked.
PLACEHOLDERS = "FACT", "not FACT"

REPAIR_PROMPT = "Your reply could not be used: {reason}. Reply with only the JSON object, with names from the lists."

# Small models heed an analysis only in the form of the reply, and where the reply begins (docs/adapter.md).
BEGIN_PROMPT = "Begin the object with the sub-goals that the analysis names: {form}"


@functools.cache
def system_prompt(game: Game) -> str:
    """Returns the first message of every question about a game: its rules, its names, the form of a reply."""
    sub_goals = ", ".join(game.basic_sub_goals)
    if game.composite_sub_goals:
        sub_goals += ";\nand wider ones: " + ", ".join(game.composite_sub_goals)
    return SYSTEM_PROMPT.format(
        about_the_game=game.prompt,
        sub_goals=sub_goals,
        facts=", ".join(game.facts),
        form=in_form([("SUB-GOAL", PLACEHOLDERS)]),
        max_sub_goals=MAX_SUB_GOALS,
    )


def build_messages(game: Game, caption: str, sub_goals: Sequence[int], analysis: str) -> Messages:
    """Returns the chat of one question: the rules of the game, then caption, previous sub-goals and analysis.

    The analysis is put on one line, so whatever an adapter writes cannot pass for a line of the caption. What it names
    stands in the form of the reply behind it, with what it says that this takes, as reasons.
    """
    lines = [caption.strip(), f"Previous sub-goals: {game.sub_goals_text(sub_goals)}."]
    if analysis := clean(analysis, MAX_ANALYSIS):
        lines.append(f"Analysis: {analysis}")
        if heard := game.heard_in_text(analysis):
            named = [(game.sub_goals[i], takes or PLACEHOLDERS) for i, takes in heard.items()]
            lines.append(BEGIN_PROMPT.format(form=in_form(named)))
    return [{"role": "system", "content": system_prompt(game)}, {"role": "user", "content": "\n".join(lines)}]


def check_messages(game: Game) -> Messages:
    """Returns a question as training asks them, and about as long: a server may take short ones only, and one that is
    much longer leaves a small context no room for a reply."""
    caption = f"You see: {', '.join(game.facts)}."
    analysis = f"The player may {', '.join(game.basic_sub_goals[:3])}."  # each comes back in the form of a reply
    return build_messages(game, caption, range(len(game.sub_goals)), analysis)


@functools.cache
def reply_schema(game: Game) -> dict[str, Any]:
    """Returns the JSON schema of a reply.

    A list, not an object with the sub-goals as keys: servers that compile a schema to a grammar fix the order of keys,
    and here the most urgent comes first. Lists are bounded: small models never end them.
    """
    reasons = [f"{sign}{fact}" for fact in game.facts for sign in ("", "not ")]
    item = _closed_object(
        name={"type": "string", "enum": list(game.sub_goals)},
        because={"type": "array", "maxItems": 4, "items": {"type": "string", "enum": reasons}},
    )
    return _closed_object(sub_goals={"type": "array", "minItems": 1, "maxItems": MAX_SUB_GOALS, "items": item})


def _closed_object(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    required = list(properties)
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


@functools.cache
def reply_form(game: Game) -> Form:
    """Returns the form that a server is asked for which takes a JSON schema."""
    named = {"name": "sub_goals", "strict": True, "schema": reply_schema(game)}
    return Form(
        response_format={"type": "json_schema", "json_schema": named},
        follows=functools.partial(follows_schema, game),
    )


def format_reply(game: Game, advice: Iterable[tuple[int, Iterable[str]]]) -> str:
    """Returns the JSON text that the system prompt asks for, from sub-goals and their reasons in words."""
    return in_form((game.sub_goals[i], reasons) for i, reasons in advice)


def in_form(advice: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Returns names with reasons in the form of a reply."""
    items = [{"name": name, "because": list(reasons)} for name, reasons in advice]
    return json.dumps({"sub_goals": items}, separators=(",", ":"))


# ------------------------------------------------------------------------------------------- guides


class Guide:
    """What all guides share. A simple one has `answer`, one that asks many at once has `complete` instead."""

    name = ""
    may_copy = True  # may it repeat its prompt, whatever the situation? A list of rules can't

    def __init__(self, game: Game, seed: int = 0) -> None:
        self.game, self.seed = game, seed
        self.warned: set[str] = set()  # kinds of warnings that were printed

    def check(self) -> None:
        """Called before training. Raises ValueError, one line, where the guide cannot work."""

    def answer(self, question: Question) -> str:
        """Returns the text of a reply, which depends on the question and the seed alone."""
        raise NotImplementedError

    def heard(self, question: Question) -> dict[int, tuple[str, ...]]:
        """Returns the sub-goals that the analysis names, each with what it says that this takes."""
        return self.game.heard_in_text(clean(question.analysis, MAX_ANALYSIS))

    def complete(self, questions: list[Question]) -> list[Reply]:
        """Returns a reply to each question of a pause. Never raises: what fails is in Reply.error."""
        return [self._reply(question) for question in questions]

    def ask(self, questions: list[Question], background: bool = False) -> "Pause":
        """Writes the messages of all questions and asks them, in the background without waiting for the replies."""
        for question in questions:
            question.messages = build_messages(self.game, question.caption, question.sub_goals, question.analysis)
        return Pause(self, questions, background)

    def generator(self, question: Question) -> np.random.Generator:
        """Returns a generator that draws the same for a question in any process."""
        drawing = json.dumps([self.seed, question.sample, question.messages])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(drawing.encode()).digest()[:16], "big"))

    def resume(self, questions: int, calls: int, cost: float) -> None:
        """Takes note of the questions, calls and money of a run that goes on."""

    def close(self) -> None:
        """Lets go of files."""

    def watch(self, questions: list[Question]) -> None:
        """Warns on stderr where a pause brought nothing at all, or was slow; once of each kind."""
        asked = [question for question in questions if not question.reply.skipped]
        if asked and all(question.error for question in asked):
            error = clean(asked[0].error, MAX_ERROR)
            kind = re.split(r"[:'\"(]", error.removeprefix("ValueError: "))[0]  # without what differs each time
            what = f"{len(asked)} of {len(asked)} questions of a pause failed"
            self.warn(kind, f"{what}, so the guidance stays as it was: {error}")
        requests, timeouts = (sum(getattr(q.reply, name) for q in asked) for name in ("requests", "timeouts"))
        if timeouts > MANY_TIMEOUTS * requests:
            way = "lower --llm-concurrency to what the server works on at a time, or raise --llm-timeout"
            self.warn("time-outs", f"{timeouts} of {requests} requests of a pause timed out; {way}")
        self.watch_for_parrots([question for question in asked if not question.error])

    def watch_for_parrots(self, answered: list[Question]) -> None:
        """Warns where a pause asked about many situations and was given one answer: that guide copies its prompt."""
        situations, replies = {question.caption for question in answered}, {q.reply.text for q in answered}
        if self.may_copy and len(situations) >= MANY_SITUATIONS and len(replies) == 1:
            said = clean(replies.pop(), MAX_ERROR)
            way = "it may repeat its prompt; try a larger model"
            self.warn("repeats", f"the guide gave one answer to {len(situations)} situations of a pause, {way}: {said}")

    def warn(self, kind: str, message: str) -> None:
        """Prints a warning, unless there was one of its kind before."""
        if kind not in self.warned:
            print(f"warning: {message}", file=sys.stderr)
        self.warned.add(kind)

    def _reply(self, question: Question) -> Reply:
        start = time.perf_counter()
        try:
            return Reply(self.answer(question), calls=1, seconds=time.perf_counter() - start)
        except Exception as error:  # rules of a fork that raise must not end the training
            return Reply(error=clean(f"{type(error).__name__}: {error}", MAX_ERROR))


class Pause:
    """The questions of one pause, and a guide at work on them."""

    def __init__(self, guide: Guide, questions: list[Question], background: bool) -> None:
        self.questions = questions
        self._guide, self._replies, self._seconds_waited = guide, [], 0.0
        self._thread = None
        if background and questions:
            self._thread = threading.Thread(target=self._complete, daemon=True)  # a second Ctrl-C need not wait
            self._thread.start()
        else:
            start = time.perf_counter()
            self._complete()
            self._seconds_waited = time.perf_counter() - start

    def _complete(self) -> None:
        self._replies = self._guide.complete(self.questions)

    def wait(self) -> list[Question]:
        """Waits for the guide. Returns the questions with their replies, and with advice where a reply can be used."""
        if self._thread is not None:
            start = time.perf_counter()
            self._thread.join()
            self._seconds_waited += time.perf_counter() - start
        for question, reply in zip(self.questions, self._replies, strict=True):
            question.reply, question.error = reply, reply.error
            try:
                if not reply.error:
                    question.advice, question.dropped = read_reply(self._guide.game, reply.text)
            except ValueError as problem:
                question.error = str(problem)
        self._guide.watch(self.questions)
        return self.questions

    def metrics(self) -> dict[str, float]:
        """Returns what asking took and brought, after `wait`."""
        replies = [question.reply for question in self.questions]
        errors = sum(bool(question.error) for question in self.questions)
        skipped = sum(reply.skipped for reply in replies)
        metrics = {
            "llm/calls": sum(reply.calls for reply in replies),
            "llm/cache_hits": sum(reply.cached for reply in replies),
            "llm/failures": errors - skipped,
            "llm/skipped": skipped,
            "llm/retries": sum(reply.retries for reply in replies),
            "llm/timeouts": sum(reply.timeouts for reply in replies),
            "llm/prompt_tokens": sum(reply.prompt_tokens for reply in replies),
            "llm/completion_tokens": sum(reply.completion_tokens for reply in replies),
            "llm/cost": sum(reply.cost for reply in replies),
            "llm/seconds": sum(reply.seconds for reply in replies),
            "guidance/valid_replies": len(replies) - errors,
            "guidance/reasons_dropped": sum(question.dropped for question in self.questions),
            "time/llm_wait": self._seconds_waited,
        }
        if seconds := [reply.seconds for reply in replies if reply.calls]:
            quantiles = np.quantile(seconds, (0.5, 0.95, 1.0)).tolist()
            metrics |= zip(("llm/seconds_p50", "llm/seconds_p95", "llm/seconds_max"), quantiles, strict=True)
        return metrics


class NoGuide(Guide):
    """Is asked by nobody: for runs without guidance, and for processes that leave asking to another one."""

    name = "none"

    def complete(self, questions: list[Question]) -> list[Reply]:
        return [Reply(error="there is no guide to ask") for _ in questions]


class RulesGuide(Guide):
    """Stands in for an LLM: follows the rules of the game, and heeds sub-goals that the analysis names.

    Or follows the rules of another game, and an analysis as often as a real model was seen to. Raises ValueError, one
    line, where nobody has written down what that other game is like.
    """

    name = "rules"
    may_copy = False

    def __init__(self, game: Game, seed: int = 0, knowledge: str = "expert") -> None:
        super().__init__(game, seed)
        known = {"expert": game.advise, **game.believers}
        if knowledge not in known:
            raise ValueError(f"--rules-knowledge: {game.name} has no rules {knowledge!r}; use {' or '.join(known)}")
        self.advise, self.heeded = known[knowledge], 1.0 if knowledge == "expert" else HEEDED
        if knowledge != "expert":
            self.name = f"rules ({knowledge})"

    def answer(self, question: Question) -> str:
        heard = self.heard(question)
        if self.heeded < 1 and self.generator(question).random() >= self.heeded:
            heard = {}
        advice = self.advise(self.game.truths(question.situation), heard)
        return format_reply(self.game, advice[:MAX_SUB_GOALS])


class ShuffledGuide(RulesGuide):
    """A control: what `rules` says, in its order and for its reasons, but with other sub-goals, exchanged once."""

    name = "shuffled"

    def answer(self, question: Question) -> str:
        others = np.random.default_rng(self.seed).permutation(self.game.num_basic)
        said = json.loads(super().answer(question))["sub_goals"]
        numbers = (int(others[self.game.sub_goal_numbers[item["name"]]]) for item in said)
        return format_reply(self.game, zip(numbers, (item["because"] for item in said), strict=True))


class RandomGuide(Guide):
    """Gives three random basic sub-goals (all, where there are fewer), each for two random facts of the situation."""

    name = "random"

    def answer(self, question: Question) -> str:
        generator = self.generator(question)
        everything = np.ones(len(self.game.facts), bool)
        reasons = self.game.reasons_text(everything, question.situation)
        drawn = generator.choice(self.game.num_basic, min(3, self.game.num_basic), replace=False).tolist()
        return format_reply(self.game, [(i, generator.choice(reasons, 2, replace=False).tolist()) for i in drawn])


class EchoGuide(Guide):
    """A control: gives as advice what the analysis names, for what it says that this takes: what an LLM adds lacks.

    An analysis that names nothing fails its question. A sub-goal of which it says nothing rests on what the game says
    that it needs, as with any guide (`Game.needs`).
    """

    name = "echo"

    def answer(self, question: Question) -> str:
        heard = self.heard(question)
        if not heard:
            raise ValueError("the analysis names no sub-goal")
        return format_reply(self.game, list(heard.items())[:MAX_SUB_GOALS])


class ReplayGuide(Guide):
    """Says what an earlier run's guide said, in the same order, failures included.

    The same flags give the same training, bit for bit, without a server. Where a run with other flags asks something
    else, the answer to the same messages is looked up; where there is none, that question fails.

    Takes a run's folder or its guidance.jsonl, which may be packed (.xz). Raises ValueError, one line, if there is no
    guidance in it.
    """

    name = "replay"

    def __init__(self, game: Game, folder: Path | None) -> None:
        super().__init__(game)
        if folder is None:
            raise ValueError("--llm replay needs the folder of a run: set --llm-replay")
        self.records: list[tuple[str, Reply]] = []
        try:
            # Not splitlines, which also splits at the line ends that JSON allows within a string.
            path = folder / "guidance.jsonl" if folder.is_dir() else folder
            data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            for line in data.decode("utf-8").rstrip("\n").split("\n"):
                record = json.loads(line)
                text, error, skipped = record["reply"], record["error"], record.get("skipped", False)
                if not (isinstance(text, str) and isinstance(error, str) and isinstance(skipped, bool)):
                    raise TypeError
                reply = Reply(text, error, cached=not error, skipped=skipped)
                self.records.append((json.dumps(record["messages"]), reply))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, lzma.LZMAError):
            pass  # a kill may have cut the last line off
        if not self.records:
            raise ValueError(f"--llm-replay: {folder} has or is no readable guidance.jsonl")
        self.by_messages = {messages: reply for messages, reply in reversed(self.records) if not reply.error}
        self.position = 0

    def complete(self, questions: list[Question]) -> list[Reply]:
        missing = Reply(error="the replayed run was not asked this")
        replies = []
        for messages in (json.dumps(question.messages) for question in questions):
            said = self.records[self.position : self.position + 1]
            self.position += 1
            in_order = bool(said) and said[0][0] == messages
            replies.append(said[0][1] if in_order else self.by_messages.get(messages, missing))
        return replies

    def resume(self, questions: int, calls: int, cost: float) -> None:
        self.position = questions


class HttpGuide(Guide):
    """Asks any server with OpenAI's /chat/completions (`utils.llm_http.Chat`).

    Temperature 1, as in the reference, so samples of the same messages differ.

    Args:
        concurrency: requests under way at a time
        timeout: seconds that one attempt may be silent; a whole request, with its retries, may take twice that
        deadline: seconds that a whole pause may take; questions that are not answered by then fail
        structured: json_schema asks for `reply_schema`, text does not, auto until the server refuses or ignores it

    Raises ValueError, naming the flag or variable, where it cannot work at all.
    """

    def __init__(
        self,
        game: Game,
        base_url: str,
        model: str,
        concurrency: int = 32,
        timeout: float = 60,
        retries: int = 3,
        deadline: float = DEADLINE,
        structured: str = "text",
        cache: Cache | NoCache | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(game)
        self.chat = Chat(base_url, model, timeout, structured, reply_form(game))
        self.name = f"http:{model}"
        self.concurrency, self.retries, self.deadline = concurrency, retries, deadline
        self.cache, self.budget = cache or NoCache(), budget or Budget()

    def check(self) -> None:
        """Asks one question as training does, twice where the server does not answer in the schema that
        --llm-structured auto asks for.

        Raises ValueError where training would be in vain, warns on stderr where it may go well.
        """
        self.chat.check(check_messages(self.game))

    def complete(self, questions: list[Question]) -> list[Reply]:
        """Asks all questions at once, `concurrency` at a time; none that is in the cache, and none twice.

        The server draws the samples. Their index only tells the cache that another answer is wanted.
        """
        keys = [self.cache_key(question.messages, question.sample) for question in questions]
        found = {key: Reply(text, cached=True) for key in keys if (text := self.cache.read(key)) is not None}
        new = {key: q.messages for key, q in zip(keys, questions, strict=True) if key not in found}
        try:
            found |= asyncio.run(self._complete(new)) if new else {}
        except Exception as error:  # the event loop itself failed
            found |= {key: Reply(error=self.chat.said(error)) for key in new}
        replies = []
        for key in keys:
            reply = found[key]
            replies.append(reply)
            found[key] = Reply(reply.text, reply.error, not reply.error, skipped=reply.skipped)  # took nothing again
        return replies

    def cache_key(self, messages: Messages, sample: int) -> str:
        """Returns a hash of all that decides a reply; the key of the API is no part of it."""
        form = self.chat.form
        schema = form.response_format["json_schema"]["schema"]
        request = {
            "base_url": self.chat.base_url,
            "model": self.chat.model,
            "messages": messages,
            "sample": sample,
            "temperature": 1.0,
            "max_tokens": MAX_TOKENS,
            "structured": self.chat.structured,
            "schema": None if self.chat.structured == "text" else schema,
        }
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def resume(self, questions: int, calls: int, cost: float) -> None:
        self.budget.calls, self.budget.cost = calls, cost

    def close(self) -> None:
        self.cache.close()

    async def _complete(self, new: dict[str, Messages]) -> dict[str, Reply]:
        until = asyncio.get_running_loop().time() + self.deadline
        gate = asyncio.Semaphore(self.concurrency)
        async with self.chat.open() as client:
            asked = (self._ask(client, gate, until, key, messages) for key, messages in new.items())
            return dict(zip(new, await asyncio.gather(*asked), strict=True))

    async def _ask(self, client: Any, gate: asyncio.Semaphore, until: float, key: str, messages: Messages) -> Reply:
        """Asks one question, with at most one repair turn. A failure ends in Reply.error, with what it took so far."""
        text, error, spent, skipped = "", "", Spending(), False
        start = time.perf_counter()
        try:
            async with asyncio.timeout_at(until), gate:
                start = time.perf_counter()
                for turn in range(2):
                    text = await self.chat.ask(client, messages, spent, self.budget, self.retries)
                    try:
                        parse_reply(self.game, text)
                        text = self.cache.keep(key, text)  # at once: it is paid for
                        break
                    except ValueError as reason:
                        if turn == 1 or not text.strip():  # nothing to repair in an empty reply
                            raise
                        repair = REPAIR_PROMPT.format(reason=reason)
                        turns = (("assistant", clean(text, 2_000)), ("user", repair))
                        messages = messages + [{"role": role, "content": content} for role, content in turns]
        except Exception as failure:
            error = self.chat.said(failure)
            skipped = isinstance(failure, BudgetSpent) and not spent.calls
        spent.seconds = time.perf_counter() - start
        return Reply(text, error, skipped=skipped, **vars(spent))


def make_budget(args: LlmArgs) -> Budget:
    return Budget(args.llm_max_calls, args.llm_max_cost, args.llm_price_in, args.llm_price_out)


def estimate(args: LlmArgs, calls: int, questions: list[Question]) -> str:
    """Says what so many calls about questions like these take, for --dry-run."""
    return make_budget(args).estimate(calls, [question.messages for question in questions])


def make_guide(args: LlmArgs, game: Game, seed: int) -> Guide:
    """Makes the guide that --llm names. Raises ValueError, one line, where that guide cannot work."""
    if args.llm == "rules":
        return RulesGuide(game, seed, args.rules_knowledge)
    controls = {"random": RandomGuide, "shuffled": ShuffledGuide, "echo": EchoGuide}
    if args.llm in controls:
        return controls[args.llm](game, seed)
    if args.llm == "replay":
        return ReplayGuide(game, args.llm_replay)
    if args.llm != "http":
        raise ValueError(f"--llm {clean(args.llm, 80)!r} is unknown: use rules, http, {', '.join(controls)} or replay")
    guide = HttpGuide(
        game,
        args.llm_base_url,
        args.llm_model,
        concurrency=args.llm_concurrency,
        timeout=args.llm_timeout,
        structured=args.llm_structured,
        budget=make_budget(args),
    )
    from utils.compilation import cache_folder  # late: it imports jax

    path = args.llm_cache or cache_folder() / "llm.sqlite"
    guide.cache = open_cache(path, functools.partial(is_usable, game))  # last: nothing is written for flags that fail
    return guide


# ------------------------------------------------------------------------------------ check command


@dataclass(frozen=True)
class CheckArgs:
    """Ask a guide once, to see whether server, model and key work, and show what came back."""

    llm: Literal["http"] = "http"
    """the guide to ask; the others have no server to check"""
    llm_model: str = ""
    """name of the model"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address of the server; the key comes from OPENAI_API_KEY"""
    llm_structured: Literal["auto", "json_schema", "text"] | None = None
    """ask for the reply in a JSON schema; default auto, which finds out whether the server takes one, but text with
    --prompt"""
    prompt: str | None = None
    """what to ask instead of the check that training begins with; the answer is free text"""
    env_id: str = "Craftax-Classic-Symbolic-v1"
    """the environment whose sub-goals and facts a JSON schema names"""


def main() -> None:
    """Asks and shows. Raises ValueError, one line, where the server cannot be used."""
    args = tyro.cli(CheckArgs)
    structured = args.llm_structured or ("auto" if args.prompt is None else "text")
    game = make_env(args.env_id, num_envs=1).game
    guide = HttpGuide(game, args.llm_base_url, args.llm_model, structured=structured)
    asked = check_messages(game) if args.prompt is None else [{"role": "user", "content": args.prompt}]
    if re.search("[\ud800-\udfff]", args.prompt or ""):  # what is no UTF-8 on the command line
        raise ValueError("--prompt: is no UTF-8 text")
    text, spent = guide.chat.try_out(asked)
    print(f"reply: {clean(text, 2_000)}")
    print(f"tokens: {spent.prompt_tokens} prompt, {spent.completion_tokens} completion, of {spent.calls} chats")
    print(f"latency: {spent.seconds / spent.calls:.2f} seconds a chat")
    tried = "yes" if guide.chat.sends_schema else "no"
    print(f"structured output (JSON schema): {'not asked for' if structured == 'text' else tried}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
