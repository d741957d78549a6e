"""teacher_data with an HTTP endpoint: what is kept, what is recorded, and that a resumed stage asks nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small_run import environment

from k2lab import runner
from k2lab.core import recipe as recipes
from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.data import shards
from k2lab.stages._teacher import Teacher
from k2lab.text.tokenizer import train_bpe

KEY = "sk-notForAnyFile"
RECIPE = """
seed = 3

[[stage]]
name = "prompts"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/prompts.jsonl", kind = "task" }}]
valid_share = 0.1

[[stage]]
type = "teacher_data"
prompts = ["prompts"]
valid_share = 0.3
{fields}

[stage.endpoint]
type = "openai"
url = "{url}"
model = "kimi"
key_env = "TEST_ENDPOINT_KEY"
license = "the service's terms"
concurrency = 2
pause_s = 0.01
retries = {retries}
timeout_s = 5
{more}
"""


class Service:
    """A chat service whose answer to a prompt is made by `reply(prompt, number of times it was asked)`."""

    def __init__(self, reply, delay=0.0):
        self.asked, self.lock, self.bodies = {}, threading.Lock(), []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with service.lock:
                    service.bodies.append((body, self.headers["Authorization"]))
                    count = service.asked[prompt] = service.asked.get(prompt, 0) + 1
                time.sleep(delay)
                status, value = reply(prompt, count)
                raw = json.dumps(value).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # the client was killed

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve():
    services = []

    def make(reply, delay=0.0):
        services.append(Service(reply, delay))
        return services[-1]

    yield make
    for service in services:
        service.http.shutdown()
        service.http.server_close()


def said(text, finish="stop", **message):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}]}


def recipe(folder, service, fields="", retries=2, more="", count=40):
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "r.toml"
    path.write_text(RECIPE.format(folder=folder, url=service.url, fields=fields, retries=retries, more=more))
    return path


def run(path, folder, monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", KEY)
    return runner.run(recipes.load(str(path)), folder / "run", say=lambda _: None).done["teacher_data"]


def made(artifact):
    return [record for split in ("train", "valid") for record in shards.read_records(artifact.path, split)]


def test_verified_answers_with_thoughts(serve, tmp_path, monkeypatch):
    def reply(prompt, count):
        number = int(prompt.split()[0])
        if number % 5 == 0:
            return said(str(number), reasoning_content="a wrong way")  # off by one
        if number % 7 == 0:
            return said("and so", finish="length")
        return said(str(number + 1), reasoning_content=f"{number} and one")

    service = serve(reply)
    artifact = run(recipe(tmp_path, service, "verify = true"), tmp_path, monkeypatch)
    found = made(artifact)
    asked = {r["prompt"] for r in shards.read_records(next((tmp_path / "run/stages").glob("prompts-*")), "train")}
    right = {prompt for prompt in asked if int(prompt.split()[0]) % 5 and int(prompt.split()[0]) % 7}
    assert {record["prompt"] for record in found} == right
    one = found[0]
    number = int(one["prompt"].split()[0])
    assert one["response"] == f"<think>{number} and one</think>{number + 1}" and one["answer"] == str(number + 1)
    assert artifact.manifest["licences"] == ["the service's terms"] and artifact.manifest["errors"] == 0
    assert all(key == f"Bearer {KEY}" for _, key in service.bodies)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_requests_that_are_refused_are_recorded_and_the_rest_is_kept(serve, tmp_path, monkeypatch):
    def reply(prompt, count):
        if prompt.startswith("1"):
            return 400, {"error": {"message": "content policy"}}
        return said("fine") if count > 1 else (500, {})  # everything fails once

    artifact = run(recipe(tmp_path, serve(reply)), tmp_path, monkeypatch)
    assert {record["prompt"][0] for record in made(artifact)} == set("023456789")
    entries = [json.loads(line) for line in (artifact.path / "answers.jsonl").open()]
    errors = [entry for entry in entries if entry["error"]]
    assert len(errors) == artifact.manifest["errors"] > 3 and all("content policy" in entry["error"] for entry in errors)


def test_what_fails_is_asked_again_by_the_same_command_and_nothing_else_is(serve, tmp_path, monkeypatch):
    healed = []

    def reply(prompt, count):
        return said("fine") if healed or not prompt.startswith("7 ") else (503, {})

    service = serve(reply)
    path = recipe(tmp_path, service)
    if "7 + 1" not in json.dumps(list(shards_prompts(path, tmp_path, monkeypatch))):
        pytest.skip("the prompt is held out with this seed")
    with pytest.raises(MachineError, match="1 of .* requests failed after 3 tries"):
        run(path, tmp_path, monkeypatch)
    assert service.asked["7 + 1"] == 3
    healed.append(True)
    run(path, tmp_path, monkeypatch)
    assert service.asked.pop("7 + 1") == 4 and set(service.asked.values()) == {1}


def shards_prompts(path, folder, monkeypatch):
    runner.run(recipes.load(str(path)), folder / "run", only="prompts", say=lambda _: None)
    for record in shards.read_records(next((folder / "run/stages").glob("prompts-*")), "train"):
        yield record["prompt"]


def test_killed_in_the_middle_no_finished_request_is_repeated(serve, tmp_path, monkeypatch):
    service = serve(lambda prompt, count: said(f"{prompt} is fine"), delay=0.05)
    path = recipe(tmp_path, service, count=60)
    command = [sys.executable, "-m", "k2lab", "run", str(path), "--quiet", "--run-dir", str(tmp_path / "run")]
    kills = 0
    for _ in range(2):
        before = len(service.bodies)
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment(TEST_ENDPOINT_KEY=KEY), stdout=quiet, stderr=quiet)
        while process.poll() is None and len(service.bodies) < before + 12:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    artifact = run(path, tmp_path, monkeypatch)
    assert {record["prompt"] for record in made(artifact)} == set(shards_prompts(path, tmp_path, monkeypatch))
    # at a kill at most the two requests that were in flight are lost
    assert sum(count - 1 for count in service.asked.values()) <= 2 * kills


def test_token_ids_of_a_server_make_rows_for_distillation(serve, tmp_path, monkeypatch):
    tokenizer = train_bpe(["1 + 1 is two and so on " * 9] * 3, 300, 32)
    tokenizer.save(tmp_path / "tokenizer")

    def reply(prompt, count):
        ids = [*tokenizer.encode("two"), tokenizer.im_end_id]
        content = [
            {
                "token": f"token_id:{token}",
                "logprob": -0.1,
                "top_logprobs": [{"token": "token_id:1", "logprob": -4.0}, {"token": f"token_id:{token}", "logprob": -0.1}],
            }
            for token in ids
        ]
        status, value = said("two")
        value["choices"][0]["logprobs"] = {"content": content}
        return status, value

    fields = f'top_k = 2\ntokenizer = "{tmp_path}/tok"'
    from k2lab.core.artifacts import finish

    (tmp_path / "tokenizer").rename(tmp_path / "tok.partial")
    finish(tmp_path / "tok.partial", tmp_path / "tok", {"kind": "tokenizer", "name": "tok", "identity": "t" * 64})
    artifact = run(recipe(tmp_path, serve(reply), fields, more="token_ids = true"), tmp_path, monkeypatch)
    record = made(artifact)[0]
    assert tokenizer.decode(record["response_tokens"]) == "two<|im_end|>" and record["tokenizer"] == tokenizer.fingerprint()
    ids, logprobs = Teacher(artifact.path).rows(record)
    assert ids[:, 0].tolist() == record["response_tokens"] and ids[:, 1].tolist() == [1] * len(ids)
    assert logprobs[0].tolist() == pytest.approx([-0.1, -4.0], abs=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        (("endpoint]", "endpoint]\nkey = 'x'"), "key_env"),
        (('type = "openai"', 'type = "anthropic"'), "endpoint.type"),
        (("prompts = [", 'teacher = "nowhere/model"\nprompts = ['), "either `teacher` or `endpoint`"),
        (("valid_share = 0.3", "valid_share = 0.3\ntop_k = 4"), "needs token ids"),
        (('url = "http://', 'url = "http://me:secret@'), "no user, password or query"),
    ],
)
def test_tables_that_make_no_sense(serve, tmp_path, change, words):
    path = recipe(tmp_path, serve(lambda prompt, count: said("fine")))
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(RecipeError) as caught:
        recipes.load(str(path))
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_a_variable_that_is_not_set_and_answers_that_are_all_useless(serve, tmp_path, monkeypatch):
    path = recipe(tmp_path, serve(lambda prompt, count: said("<think>" if count else "", finish="length")))
    monkeypatch.delenv("TEST_ENDPOINT_KEY", raising=False)
    with pytest.raises(RecipeError, match="TEST_ENDPOINT_KEY is not set"):
        runner.run(recipes.load(str(path)), tmp_path / "run", say=lambda _: None)
    with pytest.raises(DataError, match="no answer is left"):
        run(path, tmp_path, monkeypatch)
