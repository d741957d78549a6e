"""`k2 fetch` against a hub on this machine: checksums, resuming, refusals, and that the token stays where it belongs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from fake_hub import COMMIT, FakeHub

from k2lab import cli, fetch
from k2lab.core.errors import DataError, MachineError, RecipeError

WEIGHTS = bytes(range(256)) * 20_000  # 5.1 MB: several pieces
MODEL = {
    "config.json": b'{"model_type": "kimi_k2"}',
    "model-1-of-1.safetensors": WEIGHTS,
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",  # the same content as another file
    "LICENSE": b"Modified MIT",
    "modeling_kimi.py": b"print('not loaded')",
    "onnx/model.onnx_data.json": b"[]",
    "empty.txt": b"",
}
ITEM = fetch.Item(
    name="kimi-k2-base", kind="model", repo="moonshotai/Kimi-K2-Base", licence="MIT", licence_url="u", terms="show it"
)


def online(monkeypatch):
    """The suite runs with HF_HUB_OFFLINE=1, which the library reads when it is imported."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch):
    made = FakeHub(ITEM.repo, "model", MODEL)
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    online(monkeypatch)
    yield made
    made.close()


def get(to, item=ITEM, **options):
    said = []
    fetch.fetch(item, to, say=said.append, pause=0.001, **options)
    return "\n".join(said)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_wanted_file_arrives_and_is_checked(hub, tmp_path):
    to = tmp_path / "models" / "k2"
    said = get(to)
    wanted = {name: MODEL[name] for name in MODEL if not name.endswith(".py") and not name.startswith("onnx/")}
    found = files(to)
    manifest = json.loads(found.pop("fetched.json"))
    assert found == wanted
    assert manifest["revision"] == COMMIT and manifest["asked"] == "main" and manifest["repo"] == ITEM.repo
    assert manifest["files"]["model-1-of-1.safetensors"] == {
        "size": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }
    assert manifest["files"]["empty.txt"] == {"size": 0, "git-sha1": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"}  # git's own
    licence = said.index("licence: MIT (u); the hub's card says: modified-mit")
    assert said.index("its terms: show") > licence and said.index("complete: 6 files") > licence
    assert fetch.verify(to) == []


def test_a_second_call_asks_nobody(hub, tmp_path):
    get(tmp_path / "m")
    asked = len(hub.seen)
    assert "is complete" in get(tmp_path / "m")
    assert len(hub.seen) == asked
    (tmp_path / "m" / "LICENSE").write_bytes(b"other")
    get(tmp_path / "m")
    assert (tmp_path / "m" / "LICENSE").read_bytes() == MODEL["LICENSE"]
    assert len([row for row in hub.seen[asked:] if "resolve" in row[1]]) == 1  # the changed file alone


def test_config_comes_last_so_that_half_a_model_is_none(hub, tmp_path):
    get(tmp_path / "m")
    assert [row[1] for row in hub.seen if row[0] == "hub"][-1].endswith("/config.json")
    hub.status["model-1-of-1.safetensors"] = 404
    with pytest.raises(MachineError, match="HTTP 404"):
        get(tmp_path / "half")
    assert not (tmp_path / "half" / "config.json").exists() and not (tmp_path / "half" / "fetched.json").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_continued_where_it_broke(hub, tmp_path, ranges):
    name = "model-1-of-1.safetensors"
    hub.break_after[name], hub.breaks, hub.ranges = 1_500_000, 2, ranges
    get(tmp_path / "m")
    assert (tmp_path / "m" / name).read_bytes() == WEIGHTS
    asked = [row[3] for row in hub.seen if row[0] == "store"]
    assert asked[0] is None and all(asked[1:]) and len(asked) == 3
    if ranges:
        assert asked[1:] == ["bytes=1500000-", "bytes=3000000-"]


def test_a_killed_download_is_continued_by_the_next_command(hub, tmp_path):
    name = "model-1-of-1.safetensors"
    hub.break_after[name] = 0
    parts = tmp_path / "m" / ".k2fetch"
    with pytest.raises(MachineError, match="the connection broke.*continues there"):
        get(tmp_path / "m")
    (part,) = [path for path in parts.iterdir() if path.stat().st_size == 0]
    part.write_bytes(WEIGHTS[:2_000_000])  # as a process leaves it that was killed
    hub.break_after.clear()
    assert "continuing: 2.00 MB of" in get(tmp_path / "m")
    assert [row[3] for row in hub.seen if row[0] == "store"][-1] == "bytes=2000000-"
    assert (tmp_path / "m" / name).read_bytes() == WEIGHTS and not parts.exists()


@pytest.mark.parametrize("bad", [WEIGHTS[:-1] + b"x", WEIGHTS + b"x"])
def test_a_wrong_checksum_removes_that_file_only(hub, tmp_path, bad):
    name = "model-1-of-1.safetensors"
    hub.served[name] = bad
    with pytest.raises(DataError, match="sha256 is not what the hub says") as caught:
        get(tmp_path / "m")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "m" / name).exists() and (tmp_path / "m" / "LICENSE").exists()
    assert fetch.verify(tmp_path / "m")[0].endswith("the download is not complete")
    hub.served[name] = WEIGHTS
    get(tmp_path / "m")
    assert fetch.verify(tmp_path / "m") == []


def test_verify_names_what_was_changed(hub, tmp_path, capsys):
    to = tmp_path / "m"
    get(to)
    assert cli.main(["check", str(to)]) == 0 and "ok, as the hub gives it" in capsys.readouterr().out
    (to / "model-1-of-1.safetensors").write_bytes(b"x" + WEIGHTS[1:])
    (to / "LICENSE").unlink()
    assert cli.main(["check", str(to)]) == 2
    text = capsys.readouterr().out
    assert "LICENSE is missing" in text and "model-1-of-1.safetensors was changed" in text


def test_gated_repositories_need_the_token_and_it_stays_at_the_hub(hub, tmp_path, monkeypatch):
    hub.gated = True
    with pytest.raises(DataError, match="is gated, and no token was sent.*HF_TOKEN"):
        get(tmp_path / "m")
    monkeypatch.setenv("HF_TOKEN", "wrong-token")
    with pytest.raises(DataError, match="has no access yet") as caught:
        get(tmp_path / "m")
    assert "wrong-token" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.seen.clear()
    said = get(tmp_path / "m")
    assert "gated: its terms must be accepted" in said
    assert {row[2] for row in hub.seen if row[0] == "hub"} == {"Bearer secret"}
    assert {row[2] for row in hub.seen if row[0] == "store"} == {None}
    assert not [name for name, content in files(tmp_path).items() if b"secret" in content]
    assert "secret" not in said


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(DataError, match="no revision 'nowhere'"):
        get(tmp_path / "m", replace(ITEM, revision="nowhere"))
    with pytest.raises(DataError, match="the hub has no model 'some/body'.*HF_TOKEN"):
        get(tmp_path / "m", replace(ITEM, repo="some/body"))
    with pytest.raises(DataError, match=r"no file that is wanted.*\*\.gguf"):
        get(tmp_path / "m", replace(ITEM, files=("*.gguf",)))
    assert not (tmp_path / "m").exists()


def test_no_hub_is_one_paragraph(tmp_path, monkeypatch, capsys, hub):
    hub.close()
    assert cli.main(["fetch", "kimi-k2-base", "--to", str(tmp_path / "m"), "--quiet"]) == 3
    text = capsys.readouterr().err
    assert "did not answer" in text and "Traceback" not in text and text.strip().count("\n") == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError):
        fetch.ask(ITEM)


def test_offline_mode_is_one_paragraph(hub, tmp_path, monkeypatch):
    get(tmp_path / "m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE forbids it"):
        get(tmp_path / "other")
    assert "is complete" in get(tmp_path / "m")  # what is here needs no hub


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_loaded(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1_000_000))
    with pytest.raises(MachineError, match=r"5\.12 MB are still to be loaded and the disk has 1\.00 MB free"):
        get(tmp_path / "m")
    assert not [row for row in hub.seen if "resolve" in row[1]]


def test_a_full_disk_says_so(hub, tmp_path, monkeypatch):
    from pathlib import Path

    real = Path.open

    def full(self, mode="r", *args, **more):
        if self.suffix == ".partial" and mode in ("ab", "wb"):
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match="the disk"):
        get(tmp_path / "m")


def test_dry_run_lists_and_writes_nothing(hub, tmp_path):
    said = get(tmp_path / "m", dry_run=True)
    assert "5.12 MB  model-1-of-1.safetensors" in said and "licence" in said and "modeling" not in said
    assert not (tmp_path / "m").exists()


def test_another_repository_is_not_mixed_in(hub, tmp_path):
    get(tmp_path / "m")
    with pytest.raises(DataError, match="holds another repository"):
        get(tmp_path / "m", replace(ITEM, repo="some/body"))


def test_names_that_leave_the_folder_are_refused(hub, tmp_path):
    hub.files["../evil.json"] = b"{}"
    with pytest.raises(DataError, match="leaves its folder"):
        get(tmp_path / "m")
    assert not (tmp_path / "evil.json").exists()


def test_a_data_set_becomes_a_line_that_a_recipe_takes(monkeypatch, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet as parquet

    from k2lab.core import recipe

    monkeypatch.chdir(tmp_path)
    parquet.write_table(pyarrow.table({"question": ["2+2?"], "answer": ["#### 4"]}), "train-0.parquet")
    made = FakeHub("openai/gsm8k", "dataset", {"main/train-0.parquet": (tmp_path / "train-0.parquet").read_bytes(), "x.py": b""})
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    online(monkeypatch)
    assert cli.main(["fetch", "gsm8k", "--quiet"]) == 0
    made.close()
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("in a recipe:")).partition(":  ")[2]
    (tmp_path / "r.toml").write_text(f'[[stage]]\ntype = "corpus"\n{line}\n')
    source = recipe.load(str(tmp_path / "r.toml")).stage("corpus").config.sources[0]
    (record,) = source.records()
    assert record["question"] == "2+2?" and record["license"] == "MIT"
    assert not (tmp_path / "data" / "gsm8k" / "x.py").exists()


def test_a_fetched_model_is_a_start(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fetch", "kimi-k2-base", "--quiet"]) == 0
    assert 'start = "models/kimi-k2-base"' in capsys.readouterr().out
    from k2lab import runner

    first = runner.outside_identity("models/kimi-k2-base")
    assert runner.open_outside("models/kimi-k2-base", "checkpoint").path.name == "kimi-k2-base"
    shutil.rmtree("models")
    assert cli.main(["fetch", "kimi-k2-base", "--quiet"]) == 0
    assert runner.outside_identity("models/kimi-k2-base") == first  # fetched again, the same artifact


def test_any_repository_of_the_hub(monkeypatch):
    assert fetch.find("some/Body").name == "body" and fetch.find("some/Body").kind == "model"
    assert fetch.find("some/Body", dataset=True, revision="v2").revision == "v2"
    assert fetch.find("moonshotai/Kimi-K2-Thinking").name == "kimi-k2-thinking"  # known by its id, too
    with pytest.raises(RecipeError, match="Did you mean 'gsm8k'"):
        fetch.find("gms8k")


def test_the_shipped_table_states_licence_and_size(capsys):
    assert cli.main(["fetch", "--list"]) == 0
    text = capsys.readouterr().out
    for item in fetch.table().values():
        assert item.licence and item.licence_url.startswith("https://huggingface.co/"), item.name
        assert item.name in text
    sizes = {item.name: item.size() for item in fetch.table().values()}
    assert sizes["qwen2.5-7b"] == 2 * 7_615_616_512 and sizes["qwen2.5-32b"] == 2 * 32_763_876_352
    assert sizes["kimi-k2-thinking"] == pytest.approx(594e9, rel=0.005)


def test_recipe_lines_of_the_table_parse(tmp_path):
    from k2lab.core import recipe

    for item in fetch.table().values():
        if item.recipe:
            path = tmp_path / "r.toml"
            path.write_text(f'[[stage]]\ntype = "corpus"\n{fetch.paste(item, tmp_path)}\n')
            assert recipe.load(str(path)).stages, item.name


def test_your_own_table(tmp_path, capsys):
    own = tmp_path / "own.toml"
    own.write_text('[model.mine]\nrepo = "me/mine"\nlicence = "MIT"\n')
    assert cli.main(["fetch", "--list", "--table", str(own)]) == 0
    assert capsys.readouterr().out == "mine  model, me/mine, MIT\n"
    for text, message in (("[model.mine]\nrpeo = 1\n", "Did you mean 'repo'"), ("x = 1\n", "something else"), ("[", "TOML")):
        other = tmp_path / f"bad{len(text)}.toml"
        other.write_text(text)
        with pytest.raises(RecipeError, match=message):
            fetch.table(other)
