"""A chat server on a real socket that does what it is told, and trainings in this process, for the tests."""

import json
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from utils import runs

KEY = "sk-test-0123456789abcdef"
GOOD = '{"sub_goals": {"chop tree": ["tree in view"], "drink water": ["water in view"]}}'


def chat(content: object) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": {"prompt_tokens": 9}}


class Handler(socketserver.BaseRequestHandler):
    """One connection; each request is answered by what the server's `fault` says at that moment."""

    def handle(self) -> None:
        with self.request.makefile("rb") as file:
            while line := file.readline():
                length = 0
                while line not in (b"\r\n", b"\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                    line = file.readline()
                self.body = file.read(length).decode()
                with self.server.lock:
                    self.server.requests += 1
                    self.server.last = self.body
                if self.server.fault(self) is False:
                    return

    def send(self, body: object, status: str = "200 OK", *headers: str, length: int | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}"]
        self.request.sendall("\r\n".join([*head, "content-type: application/json", *headers, "", ""]).encode() + body)


class ChatServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock, self.requests, self.fault, self.stopped = threading.Lock(), 0, good, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None: ...  # the client has gone: no traceback

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def stop(self) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()


def good(h: Handler) -> None:
    h.send(chat(GOOD))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet_runs(patch: pytest.MonkeyPatch) -> list[runs.StopRequest]:
    """Trainings leave the compilation cache and Ctrl-C to the tests. Returns what Ctrl-C would reach, per training."""
    stops: list[runs.StopRequest] = []
    patch.setattr(runs, "use_compilation_cache", lambda: None)
    patch.setattr(runs.StopRequest, "listen", lambda self, console: stops.append(self))
    return stops


def after_each_phase(patch: pytest.MonkeyPatch, call: Callable[[int], object]) -> None:
    """Has trainings call this with the number of each phase that is logged."""
    original = runs.Log.metrics

    def metrics(self: runs.Log, record: dict) -> None:
        original(self, record)
        call(record["phase"])

    patch.setattr(runs.Log, "metrics", metrics)
