"""The HTTP client against a small server on the loopback address."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from k2lab.core.errors import MachineError, RecipeError
from k2lab.core.types import SampleParams, StopReason
from k2lab.sampling.openai import ChatEndpoint


class Server:
    """Answers from `script`: a function of (number of the request, body) -> (status, headers, bytes) or None to say nothing."""

    def __init__(self, script):
        self.script, self.bodies, self.headers, self.lock = script, [], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                reply = outer.script(number, body)
                if reply is None:
                    outer.hold.wait(5)
                    return
                status, headers, raw = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.hold = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.hold.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def make(script):
        servers.append(Server(script))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def said(text="fine", **more):
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop", **more}]}).encode()


def endpoint(server, **more):
    settings = {"retries": 3, "concurrency": 2, "timeout_s": 5.0, "pause_s": 0.01, **more}
    return ChatEndpoint(server.url, "kimi", **settings)


ASK = [{"role": "user", "content": "Hello"}]
PARAMS = SampleParams(max_tokens=7, temperature=0.5, seed=3)


def test_request_and_answer(serve):
    server = serve(lambda n, body: said("4", message={"reasoning_content": "2 + 2"}))
    answer = endpoint(server, key="secret", extra={"min_p": 0.1}).ask(ASK, PARAMS, "q/0")
    assert (answer.text, answer.reasoning, answer.stop, answer.error) == ("4", "2 + 2", StopReason.EOS, "")
    body = server.bodies[0]
    assert (body["model"], body["messages"], body["max_tokens"], body["temperature"]) == ("kimi", ASK, 7, 0.5)
    assert body["min_p"] == 0.1 and "logprobs" not in body
    assert server.headers[0]["Authorization"] == "Bearer secret"
    again = endpoint(server).ask(ASK, PARAMS, "q/0"), endpoint(server).ask(ASK, PARAMS, "q/1")
    assert again[0].text == "4" and "Authorization" not in server.headers[1]
    assert server.bodies[1]["seed"] == body["seed"] != server.bodies[2]["seed"]


def test_token_ids_and_their_probabilities(serve):
    entry = {
        "token": "token_id:7",
        "logprob": -0.1,
        "top_logprobs": [{"token": "token_id:9", "logprob": -3.0}, {"token": "token_id:7", "logprob": -0.1}],
    }
    server = serve(lambda n, body: said(logprobs={"content": [entry, entry]}))
    params = SampleParams(max_tokens=7, top_k_logprobs=2)
    answer = endpoint(server, token_ids=True).ask(ASK, params, "q")
    assert answer.tokens == (7, 7) and answer.logprobs == (-0.1, -0.1)
    assert answer.top == (((7, 9), (-0.1, -3.0)),) * 2
    assert server.bodies[0]["top_logprobs"] == 2 and server.bodies[0]["return_tokens_as_token_ids"] is True


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, b'{"error": "slow down"}'),
        (500, {}, b"oops"),
        (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, b'{"error": {"message": "overloaded"}}'),
        (200, {}, b"[]"),
    ],
    ids=["429", "500", "503", "half-json", "error-in-200", "list"],
)
def test_what_passes_is_tried_again(serve, trouble):
    server = serve(lambda n, body: trouble if n < 2 else said())
    assert endpoint(server).ask(ASK, PARAMS, "q").text == "fine"
    assert len(server.bodies) == 3


def test_a_server_that_says_nothing_is_given_up_in_time(serve):
    server = serve(lambda n, body: None if n == 0 else said())
    assert endpoint(server, timeout_s=0.2).ask(ASK, PARAMS, "q").text == "fine"
    server = serve(lambda n, body: None)
    answer = endpoint(server, timeout_s=0.1, retries=1).ask(ASK, PARAMS, "q")
    assert answer.passing and "no answer within 0.1 s" in answer.error and len(server.bodies) == 2


def test_a_request_that_is_refused_for_its_own_reasons_does_not_stop_the_others(serve):
    def script(n, body):
        long = len(body["messages"][0]["content"]) > 20
        return (400, {}, b'{"error": {"message": "maximum context length"}}') if long else said()

    server = serve(script)
    asked = [(f"q/{n}", [{"role": "user", "content": "x" * (30 if n == 3 else 5)}]) for n in range(8)]
    found = dict(endpoint(server).ask_all(asked, PARAMS))
    assert len(found) == 8 and len(server.bodies) == 8
    assert "maximum context length" in found["q/3"].error and not found["q/3"].passing
    assert all(answer.text == "fine" for key, answer in found.items() if key != "q/3")


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_request_can_pass_ends_with_one_paragraph_without_the_key(serve, status):
    server = serve(lambda n, body: (status, {"Location": "http://127.0.0.1:1/"}, b"bad key sk-verysecret"))
    with pytest.raises(MachineError) as caught:
        dict(endpoint(server, key="sk-verysecret").ask_all([(str(n), ASK) for n in range(50)], PARAMS))
    text = str(caught.value)
    assert str(status) in text and "sk-verysecret" not in text and len(server.bodies) <= 4


def test_a_server_that_is_down_is_not_asked_for_ever(serve):
    server = serve(lambda n, body: (500, {}, b""))
    with pytest.raises(MachineError, match="3 requests in a row"):
        dict(endpoint(server, retries=1).ask_all([(str(n), ASK) for n in range(500)], PARAMS))
    assert len(server.bodies) <= 16
    server.close()
    with pytest.raises(MachineError, match="[Rr]efused|Connection"):
        dict(endpoint(server, retries=0).ask_all([(str(n), ASK) for n in range(50)], PARAMS))


def test_concurrency_and_rate_are_kept(serve):
    import time

    at, now = [0, 0], []
    lock = threading.Lock()

    def script(n, body):
        with lock:
            at[0] += 1
            at[1] = max(at)
            now.append(time.monotonic())
        time.sleep(0.02)
        with lock:
            at[0] -= 1
        return said()

    server = serve(script)
    asked = [(str(n), ASK) for n in range(12)]
    assert len(dict(endpoint(server, concurrency=3).ask_all(asked, PARAMS))) == 12
    assert 2 <= at[1] <= 3
    now.clear()
    dict(endpoint(server, concurrency=4, per_minute=1200).ask_all(asked, PARAMS))
    assert max(now) - min(now) >= 11 * 0.05 * 0.7  # twelve requests, one every 50 ms at most


@pytest.mark.parametrize("url", ["127.0.0.1:80/v1", "ftp://x/v1", "http://user:key@host/v1", "http://host/v1?key=1"])
def test_addresses_that_are_none_or_hold_secrets_are_refused(url):
    with pytest.raises(RecipeError):
        ChatEndpoint(url, "kimi")
