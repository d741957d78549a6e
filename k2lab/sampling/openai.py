"""Answers from an OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, hosted services), with the standard library only.

Requests run in threads. What passes (429, 5xx, time-outs, broken answers) is tried again with growing pauses; what is wrong with
one request is recorded in its answer; what is wrong with all of them (address, model, key) ends the run with one paragraph. The
key is held in memory only: it is never written, and cut out of every message that a server sends back.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.errors import MachineError, RecipeError
from k2lab.core.rng import derive, rng
from k2lab.core.types import SampleParams, StopReason

PASSING = (408, 409, 425, 429)  # worth another try, like all of 5xx
FOR_ALL = (401, 402, 403, 404, 405)  # no request will do better
LONGEST_PAUSE_S = 60.0
SILENT_FAILURES = 3  # requests in a row that fail after all tries: the server is taken to be down
_STOPS = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "content_filter": StopReason.ABORTED}


@dataclass(frozen=True)
class Answer:
    """What an endpoint answered. `text` and `reasoning` as the server splits them; `tokens` ids if it tells them (else empty),
    with `logprobs` and `top` as in `core.types.Completion`; `error` says why there is no answer, `passing` that it may come."""

    text: str = ""
    reasoning: str = ""
    stop: StopReason = StopReason.ERROR
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()
    usage: dict[str, int] = field(default_factory=dict)
    error: str = ""
    passing: bool = False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ChatEndpoint:
    """`url` is the base, ending in /v1; `model` the name that the server knows. `key` goes into the Authorization header.

    `concurrency` requests at a time, at most `per_minute` of them begun in a minute (0 = any number), each given `timeout_s`
    between two packets and tried `retries` times again, after `pause_s`, 2 `pause_s`, 4 `pause_s`, ... or as the server says.
    `token_ids` asks for ids in the log-probabilities (vLLM's `return_tokens_as_token_ids`); `extra` goes into every request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 6,
        concurrency: int = 8,
        per_minute: float = 0.0,
        token_ids: bool = False,
        extra: dict[str, Any] | None = None,
        pause_s: float = 1.0,
    ) -> None:
        check_url(url)
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.timeout_s, self.retries, self.concurrency = model, timeout_s, retries, concurrency
        self.token_ids, self.extra, self.pause_s = token_ids, dict(extra or {}), pause_s
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._gate = _Gate(60.0 / per_minute if per_minute > 0 else 0.0)

    # ------------------------------------------------------------ many requests

    def ask_all(
        self, requests: Iterable[tuple[str, Sequence[dict[str, Any]]]], params: SampleParams
    ) -> Iterator[tuple[str, Answer]]:
        """(key, answer) of every request (key, messages), in the order in which they come back.

        Raises MachineError when the server refuses all requests, or `SILENT_FAILURES` in a row fail after all tries.
        """
        todo = iter(requests)
        lock, stopped = threading.Lock(), threading.Event()
        done: queue.Queue[tuple[str, Answer] | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                while not stopped.is_set():
                    with lock:
                        item = next(todo, None)
                    if item is None:
                        break
                    done.put((item[0], self.ask(item[1], params, item[0], stopped)))
            except BaseException as error:
                done.put(error)
            done.put(None)

        for _ in range(self.concurrency):
            threading.Thread(target=work, daemon=True, name="k2-endpoint").start()
        working, failed = self.concurrency, 0
        try:
            while working:
                found = done.get()
                if found is None:
                    working -= 1
                elif isinstance(found, BaseException):
                    raise found
                else:
                    yield found
                    failed = failed + 1 if found[1].passing else 0
                    if failed >= SILENT_FAILURES:
                        raise self._down(found[1].error)
        finally:
            stopped.set()

    def _down(self, error: str) -> MachineError:
        return MachineError(
            f"{SILENT_FAILURES} requests in a row failed, each {self.retries + 1} times",
            where=self.url,
            got=error,
            next="Look after the server and give the same command again; finished requests are kept and not repeated",
        )

    # ------------------------------------------------------------ one request

    def ask(
        self, messages: Sequence[dict[str, Any]], params: SampleParams, key: str, stopped: threading.Event | None = None
    ) -> Answer:
        """The answer to one conversation (OpenAI form); `key` and `params.seed` give the server its seed. A request that fails
        for its own reasons, or after all tries, is an Answer with `error`. Raises MachineError for what no request can pass."""
        body = json.dumps(self._body(messages, params, key)).encode()
        error = ""
        for attempt in range(self.retries + 1):
            self._gate.wait()
            try:
                return self._parse(self._post(body))
            except _Passing as passing:
                error, pause = str(passing), passing.pause
            except _Own as own:
                return Answer(error=str(own))
            if attempt < self.retries:
                jitter = 0.5 + 0.5 * float(rng(params.seed, "pause", key, attempt).random())
                pause = pause if pause is not None else self.pause_s * 2**attempt * jitter
                pause = min(pause, LONGEST_PAUSE_S)
                if stopped.wait(pause) if stopped is not None else time.sleep(pause):
                    break
        return Answer(error=error, passing=True)

    def _body(self, messages: Sequence[dict[str, Any]], params: SampleParams, key: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": derive(params.seed, "endpoint", key) % 2**31,
        }
        if params.top_k_logprobs or self.token_ids:
            body |= {"logprobs": True, "top_logprobs": params.top_k_logprobs}
        if self.token_ids:
            body["return_tokens_as_token_ids"] = True
        return body | self.extra

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "k2lab"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and broken connections among them
            reason = getattr(error, "reason", None) or error
            late = isinstance(reason, (TimeoutError, socket.timeout))
            raise _Passing(f"no answer within {self.timeout_s:g} s" if late else f"{type(reason).__name__}: {reason}") from None
        try:
            return json.loads(raw)
        except ValueError:
            raise _Passing(f"the answer is not JSON: {self._clean(raw)}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = self._clean(error.read(4096))
        except (OSError, http.client.HTTPException):
            said = ""
        text = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in PASSING or error.code >= 500:
            return _Passing(text, _retry_after(error.headers.get("Retry-After")))
        if error.code in FOR_ALL or error.code < 400:
            hints = {401: "Set the variable that key_env names to a valid key", 404: "Check url (it ends in /v1) and model"}
            return MachineError("the endpoint refuses every request", where=self.url, got=text, next=hints.get(error.code))
        return _Own(text)

    def _clean(self, raw: bytes) -> str:
        text = " ".join(raw[:400].decode("utf-8", "replace").split())
        return text.replace(self._key, "***") if self._key else text

    def _parse(self, value: Any) -> Answer:
        try:
            choice = value["choices"][0]
            message = choice["message"]
            text, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            if not isinstance(text, (str, type(None))) or not isinstance(reasoning, (str, type(None))):
                raise TypeError("content is no text")
            tokens, logprobs, top = _tokens(choice.get("logprobs"), self.token_ids)
            usage = value.get("usage") or {}
            counts = {name: number for name, number in usage.items() if isinstance(number, int)}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise _Passing(f"the answer has not the expected form: {self._clean(json.dumps(value).encode())}") from None
        stop = _STOPS.get(choice.get("finish_reason"), StopReason.ERROR)
        return Answer(text or "", reasoning or "", stop, tokens, logprobs, top, counts)


def check_url(url: str) -> None:
    """RecipeError unless `url` is an http address without a user, password or query, which would end up in recipes."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError("not the address of an endpoint", where="url", got=url, allowed="http://host:port/v1 or https://...")
    if parts.username or parts.password or parts.query:
        raise RecipeError(
            "an address holds no user, password or query", where="url", next="Put the key into a variable and name it in key_env"
        )


def _tokens(
    logprobs: Any, as_ids: bool
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]]:
    """Ids, log-probabilities and most probable tokens of a choice's `logprobs`; ids only where they were asked for as such."""
    content = (logprobs or {}).get("content") or []
    values = tuple(float(entry["logprob"]) for entry in content)
    if not as_ids or not content:
        return (), values, ()
    top = []
    for entry in content:
        best = sorted(entry.get("top_logprobs") or [], key=lambda other: -float(other["logprob"]))
        top.append((tuple(_id(other["token"]) for other in best), tuple(float(other["logprob"]) for other in best)))
    return tuple(_id(entry["token"]) for entry in content), values, tuple(top)


def _id(token: str) -> int:
    head, _, number = token.partition(":")
    if head != "token_id":
        raise ValueError("no token id")
    return int(number)


def _retry_after(header: str | None) -> float | None:
    """Seconds that the server asks to wait, from a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


class _Passing(Exception):
    """Worth another try, after `pause` seconds if the server said so."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


class _Own(Exception):
    """This request is refused, others may pass."""


class _Gate:
    """Lets one request through every `every` seconds."""

    def __init__(self, every: float) -> None:
        self.every, self._next, self._lock = every, 0.0, threading.Lock()

    def wait(self) -> None:
        if not self.every:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self.every
        time.sleep(at - now)
