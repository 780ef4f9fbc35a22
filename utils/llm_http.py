"""One chat with any server that has OpenAI's /chat/completions, and what it costs.

`Chat` sends messages and returns the text of the answer. It finds out which fields a server takes, tries again where
that may help, waits no longer and reads no more than it was told to, and never shows the key. `Budget` bounds what all
chats of a run take. Nothing in here knows what is asked: `llm_client` does.
"""

import asyncio
import email.utils
import ipaddress
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MAX_TOKENS = 300  # of a reply: the JSON object asked for has about 100
MAX_REPLY = 20_000  # characters of a reply that are looked at
MAX_BODY = 4_000_000  # bytes of an HTTP body that are read: no server fills the memory
MAX_ERROR = 300  # characters of an error message

Messages = list[dict[str, str]]

_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def clean(text: str, limit: int) -> str:
    """Returns text that is safe to show or log: one line, no control characters, at most `limit` characters."""
    text = " ".join(_ESCAPES.sub("", text[: 4 * limit + 1_000]).split())  # the rest would be cut off anyway
    text = "".join(c for c in text if c.isprintable())  # drops bidi overrides and lone surrogates, too
    return " ".join(text.split())[:limit].rstrip()


# -------------------------------------------------------------------------------------------- money


class BudgetSpent(ValueError):
    """One more call could pass --llm-max-calls or --llm-max-cost."""


class Budget:
    """Counts calls and money, those reserved for calls under way included. None means no limit.

    Prices are per million tokens, in any currency.
    """

    def __init__(
        self,
        max_calls: int | None = None,
        max_cost: float | None = None,
        price_in: float = 0,
        price_out: float = 0,
    ) -> None:
        if max_cost is not None and not price_in + price_out > 0:
            prices = "--llm-price-in and --llm-price-out, the prices of a million tokens"
            raise ValueError(f"--llm-max-cost needs {prices}")
        self.max_calls, self.max_cost = max_calls, max_cost
        self.price_in, self.price_out = price_in, price_out
        self.calls, self.cost = 0, 0.0

    def price(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.price_in * prompt_tokens + self.price_out * completion_tokens) / 1e6

    def estimate(self, calls: int, chats: list[Messages]) -> str:
        """Says what so many calls take, the longest of these chats each time."""
        calls = calls if self.max_calls is None else min(calls, self.max_calls)
        prompt = calls * max((estimate_tokens(messages) for messages in chats), default=0)
        completion = calls * MAX_TOKENS
        return (
            f"at most {calls} calls, without repairs; about {prompt} prompt tokens, at most {completion} completion "
            f"tokens; cost {self.price(prompt, completion):.2f} (--llm-price-in, --llm-price-out)"
        )

    def reserve(self, cost: float) -> None:
        """Sets one call aside that costs at most this. Raises BudgetSpent where that is more than is left."""
        if self.max_calls is not None and self.calls + 1 > self.max_calls:
            raise BudgetSpent("not asked: --llm-max-calls is spent")
        if self.max_cost is not None and self.cost + cost > self.max_cost:
            raise BudgetSpent("not asked: --llm-max-cost is spent")
        self.calls, self.cost = self.calls + 1, self.cost + cost

    def settle(self, reserved: float, calls: int, cost: float) -> None:
        """Counts what a call took that has ended, instead of what was reserved for it."""
        self.calls, self.cost = self.calls - 1 + calls, self.cost - reserved + cost


@dataclass
class Spending:
    """What one question has taken so far."""

    requests: int = 0  # all that were sent, those without an answer among them
    retries: int = 0  # those that were sent again, as the one before had failed
    timeouts: int = 0  # those that were given up, as the server had said nothing for too long
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0


def estimate_tokens(messages: Messages) -> int:
    """About what a chat counts as, rather too many: English has some four characters per token."""
    return sum(len(message["content"]) // 3 + 8 for message in messages)


# ------------------------------------------------------------------------------------------- a chat


class NotReady(ValueError):
    """A server that may answer later."""


class CutOff(ValueError):
    """A reply that has no answer yet where its tokens end."""


@dataclass(frozen=True)
class Form:
    """The form that replies are asked for in, where the server takes a JSON schema."""

    response_format: dict[str, Any]
    follows: Callable[[str], bool]  # is a text in this form? If not, the server ignored it


class Chat:
    """Asks one server for one model's replies.

    Args:
        timeout: seconds that one attempt may be silent; a request with its retries may take twice that
        structured: json_schema asks for the form, text does not, auto asks until the server refuses or ignores it

    Raises ValueError, naming the flag or variable, where it cannot work at all.
    """

    def __init__(self, base_url: str, model: str, timeout: float, structured: str, form: Form) -> None:
        if not model.strip():
            raise ValueError("--llm http needs the name of a model: set --llm-model")
        self._key, self._local = check_server(base_url)
        try:
            import openai  # lazily: a second of start-up that other guides need not pay
        except ImportError:
            raise ValueError("--llm http needs the openai package: pip install -r requirements.txt") from None
        self._openai, self.base_url, self.model = openai, base_url, model
        self.timeout, self.structured, self.form = timeout, structured, form
        # What the server takes, as far as is known: the name of the reply's limit, and whether a schema may be sent.
        self._dialect = ("max_tokens", structured != "text")

    @property
    def sends_schema(self) -> bool:
        """After `try_out`: does the server answer in the schema that it is asked for?"""
        return self._dialect[1]

    def open(self) -> Any:
        """Returns a client of the SDK for one event loop, that is, for one pause: a context manager."""
        # A proxy from the environment is of no use for a server on this machine, and often in the way.
        transport = self._openai.DefaultAsyncHttpxClient(trust_env=not self._local)
        common = {"api_key": self._key, "base_url": self.base_url, "timeout": self.timeout}
        return self._openai.AsyncOpenAI(**common, max_retries=0, http_client=transport)

    async def ask(
        self,
        client: Any,
        messages: Messages,
        spent: Spending,
        budget: Budget,
        retries: int,
    ) -> str:
        """Returns the text of one answer, within a budget, and adds what it took to `spent`.

        Raises what the SDK raises, BudgetSpent, and ValueError for what is no completion.
        """
        worst = budget.price(estimate_tokens(messages), MAX_TOKENS)
        budget.reserve(worst)
        calls = cost = 0
        try:
            body = await self._post(client, messages, spent, retries)
            calls, cost = 1, worst  # the price of an answer that does not say how long it is
            text, prompt, completion, cut_off = read_completion(body)
            if prompt or completion:
                cost = budget.price(prompt, completion)
            spent.prompt_tokens += prompt
            spent.completion_tokens += completion
            if cut_off and not answer_of(text).strip():
                way = "choose a --llm-model that does not think, or tell its server to switch that off"
                raise CutOff(f"the reply was cut off after {MAX_TOKENS} tokens, while the model was thinking: {way}")
        finally:
            spent.calls += calls
            spent.cost += cost
            budget.settle(worst, calls, cost)
        return self._redact(text)[:MAX_REPLY]  # in this order: half a key would not be found

    def check(self, messages: Messages) -> None:
        """`try_out` before training: warns on stderr where other questions may be answered."""
        try:
            self.try_out(messages)
        except (NotReady, CutOff) as error:
            print(f"warning: {error}; training starts all the same", file=sys.stderr)

    def try_out(self, messages: Messages) -> tuple[str, Spending]:
        """Returns the answer to one chat, asked without retries, and what it took.

        Raises ValueError, one line that names the flag to look at; NotReady where the same may go well later; CutOff
        where another answer may be shorter.
        """
        openai, where = self._openai, f"the LLM server at {self.base_url}"
        try:
            return asyncio.run(self._probe(messages))
        except CutOff as error:
            raise CutOff(f"{where} answers, but {error}") from None
        except Exception as error:
            status = getattr(error, "status_code", 0)
            hint = "--llm-base-url (/v1 at the end?), --llm-model"
            lost = isinstance(error, TimeoutError | ConnectionError | openai.APITimeoutError)
            if lost or is_transient(status):
                raise NotReady(f"{where} is not ready: {self.said(error)}") from None
            if status in (401, 403):
                hint = "OPENAI_API_KEY"
            elif status in (400, 413, 422):
                roles, tokens = " and ".join(message["role"] for message in messages), estimate_tokens(messages)
                sent = f"{roles} messages of some {tokens} tokens (its chat template, its context)"
                hint = f"that --llm-model takes {sent}, --llm-base-url"
                hint += ", or use --llm-structured auto" if self.structured == "json_schema" else ""
            elif isinstance(error, openai.APIConnectionError):
                hint = "--llm-base-url, and that the server runs"
            elif self.structured == "json_schema":
                hint += ", or use --llm-structured auto"
            raise ValueError(f"cannot use {where}: check {hint}: {self.said(error)}") from None

    async def _probe(self, messages: Messages) -> tuple[str, Spending]:
        """`try_out`, with the SDK's exceptions. With structured auto this settles whether a schema is sent from now on:
        one is where the reply has its form."""
        spent, start = Spending(), time.perf_counter()
        async with self.open() as client:
            try:
                text = await self.ask(client, messages, spent, Budget(), retries=0)
            except self._openai.APIStatusError as error:
                # Some servers answer a schema with 500. Of the others the same question would have the same answer.
                if error.status_code < 500 or self.structured != "auto" or not self.sends_schema:
                    raise
                text = ""
            if self.sends_schema and self.structured == "auto" and not self.form.follows(text):
                before, self._dialect = self._dialect, (self._dialect[0], False)
                try:
                    text = await self.ask(client, messages, spent, Budget(), retries=0)
                except Exception:
                    self._dialect = before  # it says nothing about schemas
                    raise
        spent.seconds = time.perf_counter() - start
        return text, spent

    async def _post(self, client: Any, messages: Messages, spent: Spending, retries: int) -> bytes:
        """Returns the body of the answer to one request, asked again without what the server refused to take."""
        known = dialect = self._dialect
        while True:
            try:
                body = await self._send_patiently(client, messages, dialect, spent, retries)
                if dialect != known:
                    self._dialect = dialect
                return body
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                refused, dialect = dialect, self._simpler(dialect, described(error))
                if dialect == refused:
                    raise

    def _simpler(self, dialect: tuple[str, bool], said: str) -> tuple[str, bool]:
        """Newer OpenAI models take the reply's limit only under another name, older servers take no schema."""
        limit, schema = dialect
        if limit == "max_tokens" and "max_completion_tokens" in said:
            return "max_completion_tokens", schema
        return limit, schema and self.structured != "auto"

    async def _send_patiently(
        self, client: Any, messages: Messages, dialect: tuple[str, bool], spent: Spending, retries: int
    ) -> bytes:
        """`_send` with retries. Not the SDK's: they miss an answer that breaks off, and a wait that is longer than the
        time that is left would end as a time-out, without the reason."""
        clock = asyncio.get_running_loop().time
        until = clock() + 2 * self.timeout
        async with asyncio.timeout_at(until):
            attempt = 0
            while True:
                spent.requests, spent.retries = spent.requests + 1, spent.retries + (attempt > 0)
                try:
                    return await self._send(client, messages, *dialect)
                except asyncio.CancelledError:  # the time is over, of this question or of the pause
                    spent.timeouts += 1
                    raise
                except (self._openai.APIError, ConnectionError, TimeoutError) as error:
                    spent.timeouts += isinstance(error, self._openai.APITimeoutError | TimeoutError)
                    status = getattr(error, "status_code", 503)  # none: the connection failed
                    wait = retry_delay(error, attempt)
                    if attempt >= retries or clock() + wait >= until or not is_transient(status):
                        raise
                await asyncio.sleep(wait)
                attempt += 1

    async def _send(self, client: Any, messages: Messages, limit_name: str, schema: bool) -> bytes:
        """Returns the body of the answer to one request. Reads it in pieces, so that its size and time are bounded."""
        request = {"messages": messages, "temperature": 1.0, limit_name: MAX_TOKENS}
        if schema:
            request["response_format"] = self.form.response_format
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
                    kind = TimeoutError if "Timeout" in type(error).__name__ else ConnectionError
                    raise kind(f"the answer broke off: {error}") from None
        raise ValueError(f"the reply is longer than {MAX_BODY} bytes")

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) > 4 else text  # the dummy key is no secret

    def said(self, error: BaseException) -> str:
        """An exception in one line, never empty, never with the key: redacted after cleaning, before the cut."""
        message = "time-out" if isinstance(error, TimeoutError) else described(error)
        return self._redact(clean(message, MAX_REPLY))[:MAX_ERROR]


def described(error: BaseException) -> str:
    """What an exception says, with its cause, and with what the server said of it: the SDK quotes one form only."""
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    body = getattr(error, "body", None)
    quoted = body is None or (isinstance(body, dict) and isinstance(body.get("message"), str))
    status = str(getattr(error, "status_code", ""))
    code = "" if status in str(error) else f"Error code: {status} - "  # older versions of the SDK leave it out
    return f"{type(error).__name__}: {code}{error}{cause}" + ("" if quoted else f" - {error.response.text}")


def is_this_machine(host: str) -> bool:
    """Does a host's name or address mean the machine that we run on? 0.0.0.0 does, where a client asks for it."""
    if host.rstrip(".").rpartition(".")[2] == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def check_server(base_url: str) -> tuple[str, bool]:
    """Returns (key, whether the server is on this machine, where none is needed).

    Raises ValueError naming the flag or variable.
    """
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        usable = usable and "@" not in url.netloc and not url.query  # secrets there would show in every log
    except ValueError:
        usable = False
    if not usable:
        form = "like http://127.0.0.1:8000/v1, without user, password or query"
        raise ValueError(f"--llm-base-url must look {form}")
    key, local = os.environ.get("OPENAI_API_KEY", "").strip(), is_this_machine(url.hostname)
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it again")
    if not key and not local:
        where = f"--llm-base-url {clean(base_url, 80)}"
        raise ValueError(f"{where} needs a key: set OPENAI_API_KEY in the environment")
    return key or "none", local


def answer_of(text: str) -> str:
    """Returns a reply without what a reasoning model writes between <think> and </think>."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def text_of(content: Any) -> str:
    """Returns the text of a message, whose content may be a list of parts, thoughts among them. Raises ValueError."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") in ("text", "output_text")]
        return "".join(text for text in texts if isinstance(text, str))
    if content is not None and not isinstance(content, str):
        raise ValueError("the content is not text")
    return content or ""


def read_completion(body: bytes) -> tuple[str, int, int, bool]:
    """Returns (text, prompt tokens, completion tokens, whether the text was cut off) of a chat completion.

    Raises ValueError for anything else.
    """
    try:
        answer = json.loads(body.decode("utf-8-sig"))  # a byte order mark may come first
        choice = answer["choices"][0]
        cut_off = choice.get("finish_reason") == "length"
        message = {"content": None} | choice["message"] if cut_off else choice["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("the body is not a chat completion with at least one choice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not {'UTF-8' if isinstance(error, UnicodeError) else 'JSON'}") from None
    text = text_of(content)
    usage = answer.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) for name in names] if isinstance(usage, dict) else [0, 0]
    prompt, completion = (n if type(n) is int and 0 <= n < 10**9 else 0 for n in counts)
    return text, prompt, completion, cut_off


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
