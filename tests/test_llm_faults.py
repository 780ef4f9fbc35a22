"""What a server can do wrong, each on a real socket in the middle of a training, which goes on as if nothing were."""

import functools
import json
import time
from pathlib import Path

import pytest
from fault_server import GOOD, KEY, ChatServer, Handler, after_each_phase, chat, good, lines, quiet_runs

import rladapter_ppo as rl


def says(content: object, h: Handler) -> None:
    h.send(chat(content))


def sends(body: bytes, h: Handler) -> None:
    h.send(body)


def refuses(status: str, h: Handler, *headers: str) -> None:
    h.send({"error": {"message": f"no, {KEY}, \x1b[31mno"}}, status, *headers)


def first_refuses(h: Handler) -> None:
    """429 with Retry-After once; the retry is answered."""
    if h.server.requests % 2:
        refuses("429 Too Many Requests", h, "retry-after: 0.1")
    else:
        good(h)


def trickles(h: Handler) -> bool:
    h.send(b"", length=10_000)
    while not h.server.stopped.wait(0.05):
        h.request.sendall(b" ")
    return False


def hangs(h: Handler) -> bool:
    h.server.stopped.wait(3)
    return False


def resets(h: Handler) -> bool:
    h.send(json.dumps(chat(GOOD)).encode()[:50], length=5_000)
    return False


def huge(h: Handler) -> bool:
    h.send(b'{"choices": "', length=20_000_000)
    for _ in range(20):
        h.request.sendall(b"x" * 1_000_000)
    return False


# name -> (what the server does, words of the error in guidance.jsonl; none if no query is to fail)
FAULTS = {
    "401": (functools.partial(refuses, "401 Unauthorized"), "401"),
    "404 model": (functools.partial(refuses, "404 Not Found"), "404"),
    "429": (functools.partial(refuses, "429 Too Many Requests"), "429"),
    "429 once, Retry-After": (first_refuses, ""),
    "500": (functools.partial(refuses, "500 Internal Server Error"), "500"),
    "503": (functools.partial(refuses, "503 Service Unavailable"), "503"),
    "trickle": (trickles, "time-out"),
    "hang": (hangs, "ime"),
    "reset in mid-body": (resets, "broke off"),
    "empty choices": (functools.partial(sends, b'{"choices": []}'), "choice"),
    "null content": (functools.partial(says, None), "no known sub-goal"),
    "no JSON": (functools.partial(sends, b"<html>Hello</html>"), "not JSON"),
    "another shape": (functools.partial(sends, b'{"output": ["text"]}'), "not a chat completion"),
    "unknown sub-goals": (functools.partial(says, '{"sub_goals": {"fly": [], "swim": ["wet"]}}'), "no known sub-goal"),
    "20 MB": (huge, "longer than"),
    "invalid UTF-8": (functools.partial(sends, b'{"choices": "\xff\xfe\x00"}'), "not UTF-8"),
    "control characters": (functools.partial(says, f"\x1b]0;title\x07\x00\x1b[2J {KEY} \u202e"), "no known sub-goal"),
}


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


def train(patch: pytest.MonkeyPatch, folder: Path, server: ChatServer, phases: int, before_phase, *flags: str) -> int:
    """A short training of the toy game; before_phase(i) is called before phase i > 0. A learning rate of 0 keeps the
    advice little understood, so that every pause asks."""
    patch.setenv("OPENAI_API_KEY", KEY)
    patch.setenv("RLADAPTER_CACHE", str(folder.parent / "cache"))
    quiet_runs(patch)
    with pytest.MonkeyPatch.context() as hook:
        after_each_phase(hook, lambda phase: before_phase(phase + 1))
        toy = (
            "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 "
            "--save-every 100 --updates-per-phase 1 --guidance-rows 8 --queries-per-phase 8 --no-trials "
            "--eval-episodes 16 --adapter none --learning-rate 0 --no-anneal-lr --lr-warmup 0 --llm http "
            "--llm-model tiny --llm-timeout 0.4".split()
        )
        steps = str(128 * phases)
        return rl.cli(
            [*toy, "--llm-base-url", server.url, "--total-timesteps", steps, "--run-dir", str(folder), *flags]
        )


@pytest.fixture(scope="module")
def run(patch, tmp_path_factory):
    """One training in which the server goes through all faults: bad in every odd phase, good in the others."""
    folder, server, names = tmp_path_factory.mktemp("faults") / "run", ChatServer(), list(FAULTS)

    def before_phase(i: int) -> None:
        server.requests = 0
        server.fault = FAULTS[names[i // 2]][0] if i % 2 and i // 2 < len(names) else good

    start = time.perf_counter()
    code = train(patch, folder, server, 2 * len(names) + 1, before_phase)
    seconds = time.perf_counter() - start
    server.stop()
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    logs = {name: lines(folder / f"{name}.jsonl") for name in ("metrics", "guidance")}
    return {"folder": folder, "seconds": seconds, "summary": summary, **logs}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_counted_the_guidance_kept_and_the_server_asked_again(run, name):
    phase = 1 + 2 * list(FAULTS).index(name)
    before, during, after = run["metrics"][phase - 1 : phase + 2]
    asked = [record for record in run["guidance"] if record["phase"] == phase and not record["cached"]]
    said = FAULTS[name][1]
    assert asked and during["llm/failures"] == (len(asked) if said else 0)
    assert all(said in record["error"] and record["error"].isprintable() for record in asked) or not said
    assert all(not record["rows"] for record in asked) or not said
    assert during["guidance/coverage"] == before["guidance/coverage"] == after["guidance/coverage"] == 1.0
    assert during["guidance/rows"] == before["guidance/rows"] == 2
    assert after["llm/failures"] == 0 and after["llm/calls"] > 0 and after["guidance/valid_replies"] > 0
    assert during["time/llm_wait"] < 5


def test_the_totals_add_up(run):
    summary, metrics = run["summary"], run["metrics"]
    for name in ("calls", "failures", "prompt_tokens", "cache_hits", "skipped", "retries", "timeouts"):
        assert summary[f"llm_{name}"] == sum(m[f"llm/{name}"] for m in metrics), name
    assert summary["llm_failures"] >= len(FAULTS) - 1 and summary["llm_prompt_tokens"] >= 9
    assert len(metrics) == 2 * len(FAULTS) + 1 and run["seconds"] < 120


def test_the_key_is_nowhere(run):
    """The server repeats it in error messages and in a reply."""
    files = [path for path in run["folder"].parent.rglob("*") if path.is_file()]
    assert any("llm.sqlite" in path.name for path in files) and len(files) > 5
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert any("***" in record["error"] for record in run["guidance"])


@pytest.mark.parametrize("fault", ["refused", "401", "404 model"])
def test_a_server_that_is_lost_for_good_in_mid_run(patch, tmp_path, fault, capfd):
    server = ChatServer()

    def before_phase(i: int) -> None:
        if i == 2:
            server.stop() if fault == "refused" else setattr(server, "fault", FAULTS[fault][0])

    assert train(patch, tmp_path / "run", server, 5, before_phase) == 0
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [m["llm/failures"] > 0 for m in metrics] == [False, False, True, True, True]
    assert metrics[-1]["guidance/rows"] == 2 and metrics[-1]["guidance/coverage"] == 1.0
    shown = "".join(capfd.readouterr())
    assert KEY not in shown and "Traceback" not in shown
    if fault != "refused":
        server.stop()


@pytest.mark.parametrize("flags", [[], ["--llm-async"]], ids=["waiting", "asynchronous"])
def test_a_server_that_dies_and_comes_back(patch, tmp_path, flags):
    servers = [ChatServer()]

    def before_phase(i: int) -> None:
        if i == 2:
            servers[0].stop()
        if i == 4:
            servers.append(ChatServer(servers[0].server_address[1]))

    assert train(patch, tmp_path / "run", servers[0], 6, before_phase, *flags) == 0
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [m["llm/failures"] > 0 for m in metrics] == [False, False, True, True, False, False]
    assert metrics[-1]["guidance/valid_replies"] > 0
    servers[1].stop()
