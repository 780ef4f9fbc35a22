"""Cache, budget, replay, structured replies, retries, batches, asynchronous asking, command lines."""

import itertools
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tyro
from fault_server import GOOD, KEY, ChatServer, Handler, after_each_phase, chat, good, lines, quiet_runs

import llm_client
import rladapter_ppo as rl
from envs.crafter import CRAFTER
from envs.game import Game
from envs.toy import TOY, ToyEnv
from llm_client import (
    Guide,
    HttpGuide,
    Question,
    ReplayGuide,
    Reply,
    build_messages,
    follows_schema,
    is_usable,
    system_prompt,
)
from utils import llm_http
from utils.cli import exit_code
from utils.llm_cache import Cache
from utils.llm_http import Budget

ROOT = Path(__file__).parents[1]
TREE_IN_VIEW = np.zeros(2, np.uint8)
CAPTION = ToyEnv().to_text(TREE_IN_VIEW)
CRAFTER_CAPTION = """You see: tree (2 north), water (1 south, 3 west).
Facing: grass.
Inventory: nothing.
Vitals (of 9): health 9, food 7, drink 3, energy 8.
It is day. The player is awake.
Unlocked: nothing."""
SCHEMA_REPLY = '{"sub_goals": [{"name": "chop tree", "because": ["tree in view"]}]}'


def batch(n: int, sample: int = 0, game: Game = TOY, caption: str = CAPTION) -> list[Question]:
    """Different questions, with their messages."""
    situation = np.zeros(len(game.facts), bool)
    questions = [Question(TREE_IN_VIEW, situation, [], None, sample, caption, analysis=f"number {i}") for i in range(n)]
    for question in questions:
        question.messages = build_messages(game, caption, [], question.analysis)
    return questions


def ask(guide: Guide, questions: list[Question]) -> list[Reply]:
    return [question.reply for question in guide.ask(questions).wait()]


def toy_cache(path: Path) -> Cache:
    return Cache(path, partial(is_usable, TOY))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ChatServer()
    yield server
    server.stop()


def guide(server: ChatServer, **settings) -> HttpGuide:
    return HttpGuide(TOY, server.url, "tiny", **({"timeout": 5.0} | settings))


# ---- cache


def test_the_same_question_is_asked_once(server, tmp_path):
    path = tmp_path / "deep/llm.sqlite"
    client = guide(server, cache=toy_cache(path))
    first = ask(client, batch(3))
    assert server.requests == 3 and [r.cached for r in first] == [False] * 3
    again = ask(client, batch(3))
    assert server.requests == 3 and [(r.text, r.cached, r.calls) for r in again] == [(GOOD, True, 0)] * 3
    client.close()
    other = guide(server, cache=toy_cache(path))
    assert [r.cached for r in ask(other, [*batch(2), *batch(1, sample=1), *batch(4)[3:]])] == [True, True, False, False]
    assert server.requests == 5


def test_the_key_is_the_whole_request(server):
    base, messages = guide(server), batch(1)[0].messages
    keys = [base.cache_key(messages, 0), base.cache_key(messages, 1), base.cache_key(messages[::-1], 0)]
    keys += [guide(server, structured="auto").cache_key(messages, 0)]
    keys += [HttpGuide(TOY, url, model).cache_key(messages, 0) for url, model in
             ((server.url, "other"), ("http://127.0.0.1:9/v1", "tiny"))]  # fmt: skip
    assert len(set(keys)) == 6 and guide(server, timeout=9.0).cache_key(messages, 0) == keys[0]


def test_a_question_twice_in_one_pause_is_asked_once(server):
    replies = ask(guide(server), [*batch(1), *batch(1), *batch(1, sample=1)])
    assert server.requests == 2 and [(r.calls, r.cached) for r in replies] == [(1, False), (0, True), (1, False)]


def test_failures_are_not_cached(server, tmp_path):
    client = guide(server, cache=toy_cache(tmp_path / "c"), retries=0)
    server.fault = lambda h: h.send(chat("no idea"))
    assert ask(client, batch(1))[0].error
    server.fault = good
    (reply,) = ask(client, batch(1))
    assert (reply.error, reply.cached) == ("", False)


@pytest.mark.parametrize("damage", ["no database", "a damaged page", "empty"])
def test_a_damaged_cache_is_set_aside(tmp_path, capsys, damage):
    path = tmp_path / "llm.sqlite"
    cache = toy_cache(path)
    for i in range(200):
        cache.keep(f"key {i}", GOOD)
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(
        {"no database": b"hello" * 500, "empty": b"", "a damaged page": whole[:5000] + b"\xff" * 8000}[damage]
    )
    cache = toy_cache(path)
    warning = capsys.readouterr().err
    if damage != "empty":
        assert warning.count("\n") == 1 and "--llm-cache" in warning and len(list(tmp_path.glob("*.damaged-*"))) == 1
    assert cache.read("key 7") is None
    cache.keep("key 7", GOOD)
    assert cache.read("key 7") == GOOD


def test_damage_while_running_costs_no_more_than_the_replies(tmp_path, capsys):
    cache = toy_cache(tmp_path / "llm.sqlite")
    cache.keep("a", GOOD)
    cache._db.execute("DROP TABLE replies")  # an error that is no damage
    assert cache.read("a") is None and cache.keep("a", GOOD) == GOOD
    assert capsys.readouterr().err.count("warning") == 1 and not list(tmp_path.glob("*.damaged-*"))
    cache.close()
    (tmp_path / "llm.sqlite").write_bytes(b"x" * 5_000)
    cache = Cache.__new__(Cache)  # as if it had been damaged after it was opened
    cache.path, cache._warned, cache._db = tmp_path / "llm.sqlite", False, sqlite3.connect(tmp_path / "llm.sqlite")
    cache._usable = partial(is_usable, TOY)
    assert cache.read("a") is None and cache.keep("a", GOOD) == cache.read("a") == GOOD
    assert capsys.readouterr().err.count("set aside") == 1 and len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_odd_entries_are_no_replies(tmp_path):
    cache = toy_cache(tmp_path / "llm.sqlite")
    for key, text in (("a", "not json"), ("b", '"no sub-goals"'), ("c", "17"), ("d", "null")):
        cache._db.execute("INSERT INTO replies VALUES (?, ?)", (key, text))
        assert cache.read(key) is None
    cache.keep("e", GOOD + "\ud800")
    assert cache.keep("e", SCHEMA_REPLY) == GOOD + "\ud800"  # the first stays
    assert cache.read("e") == GOOD + "\ud800"


def test_an_impossible_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/llm.sqlite", tmp_path):
        with pytest.raises(ValueError, match="--llm-cache: can't use") as raised:
            toy_cache(path)
        assert "\n" not in str(raised.value)


WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
from utils.llm_cache import open_cache
cache = open_cache(sys.argv[2], lambda text: "chop tree" in text)
for i in range(10**6 if sys.argv[3] == "forever" else 300):
    cache.keep(f"{sys.argv[3]} {i}", '{"sub_goals": ["chop tree"]}')
    if i == 100: print("writing", flush=True)
"""


def test_processes_share_it_and_a_kill_leaves_it_readable(tmp_path, capsys):
    path = tmp_path / "llm.sqlite"
    start = lambda name: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", WRITER, str(ROOT), str(path), name], stdout=subprocess.PIPE, text=True
    )
    doomed, a, b = start("forever"), start("a"), start("b")
    assert doomed.stdout.readline() == "writing\n"
    doomed.send_signal(signal.SIGKILL)
    assert a.wait(60) == b.wait(60) == 0 and doomed.wait(10) == -signal.SIGKILL
    cache = toy_cache(path)
    assert not capsys.readouterr().err
    assert all(cache.read(f"{name} {i}") for name in "ab" for i in range(300)) and cache.read("forever 100")
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


# ---- budget


def test_no_more_calls_than_allowed(server):
    server.fault = lambda h: (time.sleep(0.05), good(h))[1]
    client = guide(server, budget=Budget(max_calls=5), concurrency=8)
    replies = ask(client, batch(12))
    assert server.requests == 5 and sum(not r.error for r in replies) == 5
    assert all("--llm-max-calls" in r.error and r.calls == 0 for r in replies if r.skipped)
    assert sum(r.skipped for r in replies) == 7


def test_a_repair_is_a_call_and_a_failed_request_is_none(server):
    server.fault = lambda h: h.send(chat("no idea"))
    client = guide(server, budget=Budget(max_calls=3), concurrency=1)
    a, b = ask(client, batch(2))
    assert (a.calls, b.calls, server.requests) == (2, 1, 3) and b.error and not b.skipped
    client = guide(server, budget=Budget(max_calls=1), retries=0)
    server.fault = lambda h: h.send({}, "500 Internal Server Error")
    ask(client, batch(1))
    server.fault = good
    assert not ask(client, batch(1))[0].error


def test_no_more_money_than_allowed(server):
    """Prices as usage says; a reservation keeps calls that are under way within the limit, too."""
    usage = {"prompt_tokens": 1_000, "completion_tokens": 100}
    server.fault = lambda h: h.send(chat(GOOD) | {"usage": usage})
    budget = Budget(max_cost=0.05, price_in=2.0, price_out=10.0)  # 0.003 a call
    client = HttpGuide(CRAFTER, server.url, "tiny", timeout=5.0, budget=budget)
    replies = [reply for pause in range(4) for reply in ask(client, batch(40, pause, CRAFTER))]
    answered = [r for r in replies if not r.error]
    assert all(r.cost == pytest.approx(0.003) for r in answered)
    assert 0.042 < sum(r.cost for r in replies) == pytest.approx(budget.cost) and budget.cost <= 0.05
    assert budget.calls == len(answered) == server.requests == 15


def test_an_answer_without_usage_has_a_price_all_the_same(server):
    server.fault = lambda h: h.send({"choices": chat(GOOD)["choices"]})
    budget = Budget(max_cost=1.0, price_in=1.0, price_out=1.0)
    (reply,) = ask(guide(server, budget=budget), batch(1))
    assert reply.cost == budget.cost > 0 and reply.prompt_tokens == 0


def test_a_limit_without_prices_is_an_error():
    with pytest.raises(ValueError, match="--llm-price-in"):
        Budget(max_cost=1.0)


# ---- structured replies


def structured(h: Handler) -> None:
    h.send(chat(SCHEMA_REPLY if "response_format" in h.body else GOOD))


def ignores(h: Handler) -> None:
    h.send(chat(GOOD))


def refuses(h: Handler) -> None:
    h.send(*(({"error": "response_format?"}, "400 Bad Request") if "response_format" in h.body else (chat(GOOD),)))


def crashes(h: Handler) -> None:
    h.send(*(({}, "500 Internal Server Error") if "response_format" in h.body else (chat(GOOD),)))


@pytest.mark.parametrize(
    ("behaviour", "sends"), [(structured, True), (ignores, False), (refuses, False), (crashes, False)]
)
def test_auto_finds_out_before_training(server, behaviour, sends):
    server.fault = behaviour
    client = guide(server, structured="auto", retries=0)
    client.check()
    assert client.chat.sends_schema == sends
    replies = ask(client, batch(3))
    assert not any(r.error for r in replies) and all(r.calls == 1 for r in replies)
    assert ("response_format" in server.last) == sends


def test_auto_finds_out_in_mid_run_too(server):
    """All requests of a pause are refused at once; each is asked again."""
    server.fault = refuses
    replies = ask(guide(server, structured="auto"), batch(6))
    assert not any(r.error for r in replies) and all(r.calls == 1 for r in replies)


def test_a_refusal_for_another_reason_does_not_end_the_schema(server):
    server.fault = lambda h: h.send({"error": "too long"}, "400 Bad Request") if "number 1" in h.body else structured(h)
    client = guide(server, structured="auto")
    assert [bool(r.error) for r in ask(client, batch(3))] == [False, True, False] and client.chat.sends_schema


def test_an_answer_that_breaks_off_before_training_is_a_warning(server, capsys):
    def breaks_off(h: Handler) -> bool:
        h.send(b"{", length=100)
        return False

    server.fault = breaks_off
    guide(server).check()
    assert capsys.readouterr().err.startswith("warning: ")


def said_by(server: ChatServer) -> list[dict]:
    """The messages of the newest request."""
    return json.loads(server.last)["messages"]


@pytest.mark.parametrize("mode", ["text", "auto", "json_schema"])
@pytest.mark.parametrize("game", [TOY, CRAFTER], ids=lambda game: game.name)
def test_the_check_sends_what_training_sends(server, game, mode):
    """It sent one word without a system prompt, which servers take that refuse everything else."""
    server.fault = structured
    client = HttpGuide(game, server.url, "tiny", timeout=5.0, structured=mode)
    client.check()
    first, last = said_by(server)
    assert ("response_format" in server.last) == (mode != "text")
    assert first == {"role": "system", "content": system_prompt(game)}
    assert last["role"] == "user" and "\nPrevious sub-goals: " in last["content"] and "\nAnalysis: " in last["content"]
    questions = batch(1, game=game, caption=CRAFTER_CAPTION if game is CRAFTER else CAPTION)
    assert len(last["content"]) > len(questions[0].messages[1]["content"])


REFUSED = {
    "system messages": lambda h: '"system"' in h.body,
    "long prompts": lambda h: len(h.body) > 700,
}


@pytest.mark.parametrize("mode", ["text", "auto", "json_schema"])
@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity", "413 Content Too Large"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_server_that_refuses_what_training_sends_is_found_out_before(server, what, status, mode):
    """The check passed, every question failed, and the run ended as if nothing were."""
    forms = {"text": f"no {what}", "auto": {"message": f"no {what}"}, "json_schema": {"detail": f"no {what}"}}
    server.fault = lambda h: h.send({"error": forms[mode]}, status) if REFUSED[what](h) else structured(h)
    with pytest.raises(ValueError, match=f"--llm-model.*no {what}") as raised:
        guide(server, structured=mode).check()
    assert "\n" not in str(raised.value) and "context" in str(raised.value)


def test_json_schema_insists(server):
    server.fault = refuses
    with pytest.raises(ValueError, match="--llm-structured auto"):
        guide(server, structured="json_schema").check()
    server.fault = ignores
    client = guide(server, structured="json_schema")
    client.check()
    assert client.chat.sends_schema and not ask(client, batch(1))[0].error  # text that reads as guidance will do


def test_the_schema_is_closed_and_the_prompt_in_front_is_always_the_same(server):
    server.fault = structured
    ask(guide(server, structured="json_schema"), batch(1))
    request = json.loads(server.last)
    form = request["response_format"]["json_schema"]
    assert form["strict"] and form["schema"]["required"] == ["sub_goals"]
    item = form["schema"]["properties"]["sub_goals"]["items"]
    assert item["required"] == list(item["properties"]) and not item["additionalProperties"]
    assert set(item["properties"]["name"]["enum"]) == set(TOY.sub_goals)
    assert request["messages"][0]["content"] == system_prompt(TOY)
    assert request["messages"][1:] == batch(1)[0].messages[1:]


@pytest.mark.parametrize("game", [TOY, CRAFTER], ids=lambda game: game.name)
def test_the_prompt_shows_what_the_schema_wants(game):
    form = next(line for line in system_prompt(game).splitlines() if line.startswith("{"))
    assert not follows_schema(game, form)  # placeholders: a copy is no reply
    form = form.replace("SUB-GOAL", game.sub_goals[0]).replace("FACT", game.facts[0])
    assert follows_schema(game, form.replace(f',"not {game.facts[0]}"', ""))
    assert follows_schema(game, form) and not is_usable(game, form)  # no schema forbids a fact and its contrary
    assert not follows_schema(game, form.replace(game.facts[0], "it is late"))
    assert not follows_schema(game, GOOD) and not follows_schema(game, '{"sub_goals": []}')
    assert not follows_schema(game, '{"sub_goals": [{"name": "fly", "because": []}]}')


# ---- retries and batches


def test_retry_after_is_honoured(server):
    times = []

    def busy_once(h: Handler) -> None:
        times.append(time.perf_counter())
        if len(times) == 1:
            h.send({}, "429 Too Many Requests", "retry-after: 1")
        else:
            good(h)

    server.fault = busy_once
    (reply,) = ask(guide(server), batch(1))
    assert not reply.error and times[1] - times[0] >= 1.0


def test_a_wait_beyond_the_deadline_is_not_begun(server):
    server.fault = lambda h: h.send({}, "429 Too Many Requests", "retry-after: 3600")
    start = time.perf_counter()
    (reply,) = ask(guide(server), batch(1))
    assert "429" in reply.error and time.perf_counter() - start < 2


def test_an_answer_that_breaks_off_is_asked_again(server):
    def broken_once(h: Handler) -> bool | None:
        if server.requests == 1:
            h.send(b'{"choices"', length=500)
            return False
        return good(h)

    server.fault = broken_once
    (reply,) = ask(guide(server), batch(1))
    assert not reply.error and server.requests == 2 and reply.calls == 1


def first_of(share: int, fault):
    """Does this to the first of so many requests, and answers the others."""
    numbers = itertools.count()
    return lambda h: good(h) if next(numbers) % share else fault(h)


def late(h: Handler) -> bool:
    """So late that the request is sent again."""
    h.server.stopped.wait(1.6)
    return False


def very_late(h: Handler) -> bool:
    """The same for a client with more patience: a busy machine must not make others late."""
    h.server.stopped.wait(4.5)
    return False


def busy(h: Handler) -> None:
    h.send({}, "503 Service Unavailable")


@pytest.fixture
def impatient(monkeypatch):
    """Sends again at once."""
    monkeypatch.setattr(llm_http, "retry_delay", lambda error, attempt: 0.01)


def test_retries_and_timeouts_are_counted(server, impatient):
    """17 of 61 requests timed out and were sent again, and nothing said so."""
    server.fault = first_of(1000, late)
    client = guide(server, timeout=1.0)
    pause = client.ask(batch(1))
    pause.wait()
    assert pause.metrics()["llm/retries"] == pause.metrics()["llm/timeouts"] == 1
    assert pause.metrics()["llm/failures"] == 0 and pause.metrics()["llm/calls"] == 1 and server.requests == 2
    server.fault = first_of(1000, busy)
    pause = client.ask(batch(3, 1))
    pause.wait()
    assert pause.metrics()["llm/retries"] == 1 and pause.metrics()["llm/timeouts"] == 0
    pause = client.ask(batch(3, 2))
    assert pause.wait() and pause.metrics()["llm/retries"] == pause.metrics()["llm/timeouts"] == 0


def silent(h: Handler) -> bool:
    h.server.stopped.wait(2)
    return False


def stalls(h: Handler) -> bool:
    """Begins to answer, and says no more."""
    h.send(b"{", length=100)
    h.server.stopped.wait(2)
    return False


def trickles(h: Handler) -> bool:
    h.send(b"", length=10_000)
    while not h.server.stopped.wait(0.05):
        h.request.sendall(b" ")
    return False


@pytest.mark.parametrize(
    ("fault", "timeout", "deadline", "requests", "timeouts"),
    [(silent, 0.2, 9, 2, 2), (stalls, 0.2, 9, 2, 2), (trickles, 0.2, 9, 1, 1), (silent, 5, 0.7, 1, 1)],
    ids=["silent", "in mid-answer", "never ready", "the pause's deadline"],
)  # fmt: skip
def test_every_kind_of_time_out_is_one(server, impatient, fault, timeout, deadline, requests, timeouts):
    server.fault = fault
    pause = guide(server, timeout=timeout, retries=1, deadline=deadline).ask(batch(1))
    pause.wait()
    assert pause.metrics()["llm/failures"] == 1 and server.requests == requests
    assert pause.metrics()["llm/timeouts"] == timeouts and pause.metrics()["llm/retries"] == requests - 1


def test_one_warning_of_a_server_that_is_too_slow(server, impatient, capsys):
    client = guide(server, timeout=3.0)
    server.fault = first_of(16, very_late)  # one of fifteen questions, of sixteen requests
    client.ask(batch(15)).wait()
    assert not capsys.readouterr().err
    server.fault = first_of(6, very_late)
    client.ask(batch(5, 1)).wait()
    err = capsys.readouterr().err
    assert err.startswith("warning: 1 of 6 requests of a pause timed out; ") and err.count("\n") == 1
    assert "--llm-concurrency" in err and "--llm-timeout" in err
    pause = client.ask(batch(5, 2))
    assert pause.wait() and pause.metrics()["llm/timeouts"] == 1 and not capsys.readouterr().err


# ---- pauses in which everything fails


def test_a_pause_in_which_all_questions_fail_says_so_once(server, capsys):
    client = guide(server, retries=0)
    no = {"error": {"message": f"no\nway \x1b[31m {KEY}"}}
    server.fault = lambda h: h.send(no | {"id": h.server.requests}, "400 Bad Request")
    client.ask(batch(3)).wait()
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and "3 of 3 questions" in err and "\x1b" not in err
    assert "BadRequestError: Error code: 400" in err and re.search(r"no(\\n| )way", err)
    client.ask(batch(3, 1)).wait()  # the same again
    server.fault = lambda h: good(h) if "number 1" in h.body else h.send({}, "401 Unauthorized")
    client.ask(batch(3, 2)).wait()  # one of three is answered
    client.ask([]).wait()
    assert not capsys.readouterr().err
    server.fault = lambda h: h.send({}, "401 Unauthorized")
    pause = client.ask(batch(2, 3), background=True)
    assert pause.wait() and pause.wait()
    assert capsys.readouterr().err.count("AuthenticationError") == 1
    server.fault = lambda h: h.send(chat(f"No idea {h.server.requests}."))
    for sample in (4, 5):
        client.ask(batch(2, sample)).wait()
    assert capsys.readouterr().err.count("no known sub-goal in the reply 'No idea") == 1


def test_a_spent_budget_is_no_failure_to_warn_of(server, capsys):
    client = guide(server, budget=Budget(max_calls=0))
    client.ask(batch(3)).wait()
    assert not capsys.readouterr().err
    server.fault = lambda h: h.send({}, "401 Unauthorized")
    client = guide(server, budget=Budget(max_calls=1), concurrency=1)
    client.ask(batch(3)).wait()  # a call that failed is not charged, so all three are asked
    assert "3 of 3 questions" in capsys.readouterr().err


def test_a_training_whose_questions_all_fail_says_so(toy, server, capsys):
    """Exit code 0, and nothing said: the run was one without guidance."""

    def too_long_but_for_the_check(h: Handler) -> None:
        h.send({"error": "too long"}, "400 Bad Request") if "You see: a " in h.body else good(h)

    server.fault = too_long_but_for_the_check
    folder = toy("a", *http(server))
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and "too long" in err
    metrics = lines(folder / "metrics.jsonl")
    assert len(metrics) == 6 and all(m["llm/failures"] > 0 == m["guidance/valid_replies"] for m in metrics)
    assert all(m["llm/retries"] == m["llm/timeouts"] == 0 for m in metrics)


@pytest.mark.parametrize("said", ["Wed, 21 Oct 2065 07:28:00 GMT", "2", "", "soon", "-3", "nan", "inf"])
def test_retry_delays(said):
    class Error(Exception):
        response = type("R", (), {"headers": {"retry-after": said}})

    delays = [llm_http.retry_delay(Error(), 2) for _ in range(50)]
    assert len(set(delays)) > 1 or said == "inf"  # jitter
    low, high = {"2": (2, 8 / 3), "inf": (1e9, float("inf"))}.get(said, (1e9, 1e10) if "GMT" in said else (1.5, 2))
    assert all(low <= delay <= high for delay in delays)


@pytest.fixture
def slow_server(request):
    command = [sys.executable, "benchmarks/chat_server.py", "--port", "0", "--latency", str(request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(10)


@pytest.mark.parametrize("slow_server", [0.1], indirect=True)
def test_256_prompts_take_little_more_than_their_latency(slow_server):
    """At most 1.5 times the ideal 0.8 s, on a machine that others keep busy as much longer as they make us wait."""
    client, ideal = HttpGuide(CRAFTER, slow_server, "rules", concurrency=32), 0.1 * 256 / 32
    asked = partial(batch, game=CRAFTER, caption=CRAFTER_CAPTION)
    ask(client, asked(8))  # imports
    for attempt in range(6):
        start = time.perf_counter()
        replies = ask(client, asked(256, attempt))
        ratio = (time.perf_counter() - start) / ideal
        assert not any(reply.error for reply in replies) and ratio >= 1
        if ratio <= 1.5 * max(1.0, os.getloadavg()[0] / os.cpu_count()):
            return
    pytest.fail(f"{ratio:.2f} times the ideal")


# ---- training: the same again, replay, budget, resume, asynchronous

TOY_FLAGS = (
    "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 --adapter none "
    "--updates-per-phase 2 --guidance-rows 8 --queries-per-phase 8 --eval-episodes 16 --total-timesteps 1400 "
    "--no-anneal-lr --lr-warmup 0".split()  # one program, whatever the number of steps
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("RLADAPTER_CACHE", str(tmp_path / "cache"))
    quiet_runs(monkeypatch)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(name: str, *flags: str) -> Path:
        assert rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / name), *flags]) == 0
        return tmp_path / name

    return run


def http(server: ChatServer) -> list[str]:
    return ["--llm", "http", "--llm-model", "tiny", "--llm-base-url", server.url]


def varied(h: Handler) -> None:
    """Another answer to every question, as a model at temperature 1 gives; now and then a useless one."""
    goals = {name: ["tree in view"] for name in ("chop tree", "drink water", "rest")[h.server.requests % 3 :]}
    h.send(chat(json.dumps({"sub_goals": goals}) if h.server.requests % 6 > 1 else "Hm."))


def training(folder: Path) -> list[dict]:
    """Metrics without what a clock measures and what the guide took."""
    drop = re.compile("time|SPS|seconds|llm/")
    return [{k: v for k, v in m.items() if not drop.search(k)} for m in lines(folder / "metrics.jsonl")]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_same_run_again_makes_no_calls(toy, server):
    server.fault = lambda h: h.send(chat(GOOD.replace("tree in view", ["tree in view", "dark"][server.requests % 2])))
    first = toy("a", *http(server))
    before = server.requests
    again = toy("b", *http(server))
    assert training(first) == training(again) and summary(first)["llm_calls"] > 0 == summary(again)["llm_calls"]
    assert summary(again)["llm_cache_hits"] == len(lines(again / "guidance.jsonl"))
    assert server.requests - before == 2  # the check before training, and whether it takes a schema


@pytest.mark.parametrize("cache", ["none", "its own"])
def test_replay_needs_no_server_and_trains_the_same(toy, server, tmp_path, cache):
    server.fault = varied
    flags = [] if cache == "its own" else ["--llm-cache", "none"]
    first = toy("a", *http(server), *flags)
    assert summary(first)["llm_failures"] > 0
    server.stop()
    again = toy("b", "--llm", "replay", "--llm-replay", str(first))
    assert training(first) == training(again)
    assert summary(again)["llm_calls"] == 0 and summary(again)["episodic_return"] == summary(first)["episodic_return"]
    assert summary(again)["llm_failures"] == summary(first)["llm_failures"]
    rows = [[r["rows"] for r in lines(f / "guidance.jsonl")] for f in (first, again)]
    assert rows[0] == rows[1] and any(rows[0])
    assert (tmp_path / "cache/llm.sqlite").exists() == (cache != "none")


def test_replay_of_something_else_looks_the_messages_up(tmp_path):
    replies = [("Hm.", "no sub-goal"), (GOOD, ""), (SCHEMA_REPLY, "")]
    questions = batch(4)
    records = [{"messages": question.messages, "reply": text, "error": error, "skipped": False}
               for question, (text, error) in zip(questions, replies, strict=False)]  # fmt: skip
    (tmp_path / "guidance.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"messa')
    client = ReplayGuide(TOY, tmp_path)
    assert [r.text for r in ask(client, questions[:2])] == ["Hm.", GOOD]  # in order: failures, too
    assert [r.text for r in ask(client, [*batch(2, sample=5)[1:], questions[2]])] == [GOOD, SCHEMA_REPLY]
    assert all("was not asked" in r.error for r in ask(client, [questions[0], questions[3]]))
    client.resume(1, 0, 0.0)
    assert ask(client, questions[1:2])[0].text == GOOD


@pytest.mark.parametrize("content", [None, "", "{broken", '{"phase": 1}\n'])
def test_replay_of_what_is_no_run(tmp_path, monkeypatch, capsys, content):
    quiet_runs(monkeypatch)
    if content is not None:
        (tmp_path / "guidance.jsonl").write_text(content)
    code = rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / "r"), "--llm", "replay", "--llm-replay", str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.startswith("error: --llm-replay: ")
    assert rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / "r"), "--llm", "replay"]) == 2


def test_when_the_budget_is_spent_training_goes_on(toy, server):
    folder = toy("a", *http(server), "--llm-max-calls", "3")
    metrics = lines(folder / "metrics.jsonl")
    assert summary(folder)["llm_calls"] == 3 == sum(m["llm/calls"] for m in metrics) and len(metrics) == 6
    assert summary(folder)["llm_failures"] == 0 < summary(folder)["llm_skipped"]
    assert metrics[-1]["guidance/coverage"] > 0.8 and metrics[-1]["llm/skipped"] > 0


def test_cost_and_latencies_are_in_the_metrics(toy, server):
    server.fault = lambda h: (time.sleep(0.05), h.send(chat(GOOD) | {"usage": {"prompt_tokens": 1_000}}))[1]
    folder = toy("a", *http(server), "--llm-price-in", "2", "--llm-price-out", "8")
    asked = [m for m in lines(folder / "metrics.jsonl") if m["llm/calls"]]
    assert all(0.05 < m["llm/seconds_p50"] <= m["llm/seconds_p95"] <= m["llm/seconds_max"] < 5 for m in asked)
    assert summary(folder)["llm_cost"] == pytest.approx(0.002 * summary(folder)["llm_calls"])
    assert summary(folder)["llm_prompt_tokens"] == 1_000 * summary(folder)["llm_calls"]


def stop_after(monkeypatch, phase: int, how) -> None:
    after_each_phase(monkeypatch, lambda logged: logged == phase and how())


class Killed(Exception):
    """Stands for kill -9: nothing is saved."""


@pytest.mark.parametrize("mode", ["", "--llm-async"])
def test_budget_and_totals_survive_a_kill_and_a_resume(toy, server, tmp_path, monkeypatch, mode):
    """Phases 0 and 1 are saved, phase 2 is lost. Its calls were paid for."""
    flags = [*http(server), "--llm-max-calls", "7", "--save-every", "2", "--llm-cache", "none"] + [mode] * bool(mode)
    with monkeypatch.context() as patched:
        stop_after(patched, 2, lambda: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / "a"), *flags])
    before = len(lines(tmp_path / "a/guidance.jsonl"))
    assert rl.cli(["--resume", str(tmp_path / "a")]) == 0
    assert summary(tmp_path / "a")["llm_calls"] == 7 > before
    assert server.requests == 7 + 4  # with two checks, of two chats each


@pytest.mark.parametrize("llm", ["rules", "http", "replay"])
def test_asynchronous_runs_resume_bit_for_bit(toy, server, tmp_path, monkeypatch, llm):
    server.fault = lambda h: h.send(chat(GOOD))
    flags = {"rules": [], "http": [*http(server), "--llm-cache", "none"]}.get(llm)
    if flags is None:
        flags = ["--llm", "replay", "--llm-replay", str(toy("source", "--llm-async"))]
    whole = toy("whole", *flags, "--llm-async")
    with monkeypatch.context() as patched:
        stops = quiet_runs(patched)
        stop_after(patched, 2, lambda: setattr(stops[-1], "asked", True))
        assert rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / "halves"), *flags, "--llm-async"]) == 130
    assert rl.cli(["--resume", str(tmp_path / "halves")]) == 0
    assert training(whole) == training(tmp_path / "halves")
    assert summary(whole)["episodic_return"] == summary(tmp_path / "halves")["episodic_return"]


def test_asynchronous_answers_serve_one_phase_later(toy):
    now, later = toy("now"), toy("later", "--llm-async")
    first, second = lines(later / "metrics.jsonl")[:2]
    assert lines(now / "metrics.jsonl")[0]["guidance/coverage"] > 0 == first["guidance/coverage"]
    assert second["guidance/coverage"] > 0 and first["guidance/valid_replies"] > 0


# ---- command lines


def cli(monkeypatch, capsys, *argv: str, key: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the check command, run in this process: starting another takes seconds."""
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    else:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["llm_client.py", *TOY_GAME, *argv])
    return (exit_code(llm_client.main), *capsys.readouterr())


def command(server: ChatServer) -> list[str]:
    return ["--llm", "http", "--llm-base-url", server.url, "--llm-model", "m"]


TOY_GAME = ("--env-id", "Toy-v0")  # imported in less time


@pytest.mark.parametrize(
    ("behaviour", "flags", "schema"),
    [(structured, [], "yes"), (ignores, ["--prompt", "hi", "--llm-structured", "auto"], "no")],
)
def test_the_client_checks_a_server(server, monkeypatch, capsys, behaviour, flags, schema):
    server.fault = behaviour
    code, out, err = cli(monkeypatch, capsys, *command(server), *flags, key=KEY)
    assert code == 0, err
    assert "chop tree" in out and "tokens" in out and "seconds" in out
    assert re.search(f"structured output.*{schema}", out) and KEY not in out + err
    assert said_by(server)[-1]["content"].startswith("hi" if flags else "You see: ")


def test_a_free_prompt_is_answered_freely(server):
    """A schema used to be sent with it, so that "hi" was answered with sub-goals."""
    server.fault = lambda h: h.send(chat(SCHEMA_REPLY if "response_format" in h.body else "Hello!"))
    environment = {"PATH": "/usr/bin", "COLUMNS": "200", "OPENAI_API_KEY": KEY}
    words = [sys.executable, "llm_client.py", *command(server), "--prompt", "hi"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "reply: Hello!\n" in done.stdout and "not asked for" in done.stdout and server.requests == 1
    assert json.loads(server.last)["messages"] == [{"role": "user", "content": "hi"}]


def test_a_prompt_that_is_no_text_is_one_line(server, monkeypatch, capsys):
    code, _, err = cli(monkeypatch, capsys, *command(server), "--prompt", "a\udcffb")
    assert code == 2 and err.startswith("error: --prompt: ") and err.count("\n") == 1 and not server.requests


def test_the_client_names_what_is_wrong(server, monkeypatch, capsys):
    server.fault = lambda h: h.send({"error": f"\x1b[31mbad key {KEY}"}, "401 Unauthorized")
    code, _, err = cli(monkeypatch, capsys, *command(server), key=KEY)
    assert code == 2 and err.count("\n") == 1 and "OPENAI_API_KEY" in err
    assert KEY not in err and "\x1b" not in err
    nowhere = ["--llm-base-url", "http://127.0.0.1:9/v1"]
    code, _, err = cli(monkeypatch, capsys, *command(server), *nowhere)
    assert code == 2 and "--llm-base-url" in err and "Traceback" not in err
    code, _, err = cli(monkeypatch, capsys, "--llm", "http")
    assert code == 2 and "--llm-model" in err


def test_the_documented_checks_parse():
    texts = (llm_client.__doc__, (ROOT / "docs/llm.md").read_text())
    commands = [words for text in texts for words in re.findall(r"python llm_client\.py(.*)", text)]
    assert len(commands) == 3
    for words in commands:
        assert tyro.cli(llm_client.CheckArgs, args=shlex.split(words)).llm_model == "NAME"


def test_the_client_says_that_a_model_thinks_too_long(server, monkeypatch, capsys):
    answer = chat(None)
    answer["choices"][0]["finish_reason"] = "length"
    server.fault = lambda h: h.send(answer)
    code, _, err = cli(monkeypatch, capsys, *command(server))
    assert code == 2 and err.count("\n") == 1 and "cut off" in err and "--llm-model" in err


@pytest.mark.parametrize("text", ['["a\u2028b\x85c"]', '"x"'])
def test_replay_of_a_run_with_any_white_space_in_it(tmp_path, text):
    (question,) = batch(1)
    record = {"messages": question.messages, "reply": GOOD + text, "error": ""}
    (tmp_path / "guidance.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert ask(ReplayGuide(TOY, tmp_path), [question])[0].text == GOOD + text


def test_dry_run(tmp_path, capsys, monkeypatch):
    quiet_runs(monkeypatch)
    flags = ["--llm", "http", "--llm-model", "m", "--llm-price-in", "1", "--dry-run"]  # no server is needed
    assert rl.cli([*TOY_FLAGS, "--run-dir", str(tmp_path / "r"), *flags]) == 0
    said = capsys.readouterr().out
    assert system_prompt(TOY) in said and "You see: a tree" in said and not (tmp_path / "r").exists()
    assert "in 6 pauses at most 48 calls" in said and re.search(r"cost 0\.0[1-9]", said)
    assert rl.cli([*TOY_FLAGS, *flags, "--llm-max-calls", "10"]) == 0
    assert "at most 10 calls" in capsys.readouterr().out
