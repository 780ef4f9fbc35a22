"""A chat server that is no LLM: Crafter's rules behind OpenAI's HTTP interface, after a latency that is set.

    python benchmarks/chat_server.py --port 8123 --latency 0.1

For measurements and for trying `--llm http` without a model. Prints its address when it listens. It reads Crafter's
captions, answers in the schema where one is asked for, and counts characters / 4 as tokens.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from envs.crafter import CRAFTER
from envs.crafter.captions import read_caption, truths_of
from llm_client import MAX_SUB_GOALS, format_reply


@dataclass(frozen=True)
class Options:
    port: int = 8123
    """port on 127.0.0.1; 0 takes a free one"""
    latency: float = 0.1
    """seconds before each answer"""


def advise(text: str) -> list[tuple[int, tuple[str, ...]]]:
    """Returns what the rules advise in the situation that a message describes. Raises ValueError without a caption."""
    truths = truths_of(read_caption(text))
    named = CRAFTER.sub_goals_in_text(text.partition("\nAnalysis: ")[2].partition("\n")[0])
    return CRAFTER.advise(truths, named)[:MAX_SUB_GOALS]


def answer(request: dict) -> dict:
    """Returns a chat completion. Without a caption, as in the check before training, it says "ready"."""
    try:
        advice = advise(request["messages"][-1]["content"])
    except ValueError:
        advice = []
    if not advice and "response_format" in request:
        advice = [(0, ())]
    text = format_reply(CRAFTER, advice) if advice else "ready"
    characters = sum(len(message["content"]) for message in request["messages"])
    usage = {"prompt_tokens": characters // 4, "completion_tokens": len(text) // 4}
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float) -> None:
    """One connection: requests until the client closes it."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            until = asyncio.get_running_loop().time() + latency
            body = json.dumps(answer(json.loads(await reader.readexactly(length)))).encode()
            await asyncio.sleep(until - asyncio.get_running_loop().time())
            head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write((head % len(body)).encode() + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # it has gone
    finally:
        writer.close()


async def main(options: Options) -> None:
    handle = partial(serve, latency=options.latency)
    server = await asyncio.start_server(handle, "127.0.0.1", options.port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(tyro.cli(Options, description=__doc__)))
