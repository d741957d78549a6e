"""The page: well-formed, self-contained, safe against hostile text, complete for whole runs and honest about unfinished ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_fixture as fixture

from k2lab.core.errors import DataError
from k2lab.report import html
from k2lab.report.collect import RunView, StageView, collect

VOID = {"meta", "br", "link", "img", "input", "hr", "source", "base"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\"><!-- ]]> &amp; ' \u202e\x00\x1b[31m"


class Page(HTMLParser):
    """Collects elements and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.faults: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if len({name for name, _ in attrs}) != len(attrs):
            self.faults.append(f"an attribute twice in {self.get_starttag_text()}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def handle_comment(self, data):
        self.faults.append("a comment")

    @property
    def shown(self) -> str:
        return " ".join("".join(self.text).split())


def read(run_dir: Path) -> tuple[str, Page]:
    text = html.write(run_dir).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str, Page]:
    run_dir = fixture.make(tmp_path_factory.mktemp("runs") / "whole", resume_at=120)
    return run_dir, *read(run_dir)


def assert_sound(text: str, page: Page) -> None:
    assert page.faults == [] and page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attrs if name.startswith("on")]
        assert "src" not in attrs and "srcset" not in attrs
        assert str(attrs.get("href", "#")).startswith("#")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not re.search(r"url\(|@import", text)


def test_page_is_well_formed_and_loads_nothing(whole):
    _, text, page = whole
    assert_sound(text, page)
    assert "http" not in text.replace("http-equiv", "")
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_script_matches_the_hash_in_the_policy(whole):
    import base64
    import hashlib

    _, text, _ = whole
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text


def test_every_section_is_there_and_linked(whole):
    _, _, page = whole
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["gains", "baselines", "samples", "training", "data", "lineage", "cost", "recipe", "licences"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{name}" for name in sections]


def test_references_inside_the_page_resolve(whole):
    _, _, page = whole
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for _, attrs in page.tags:
        for name in str(attrs.get("aria-labelledby") or "").split():
            assert name in ids


def test_every_drawing_has_a_title_or_is_hidden(whole):
    _, _, page = whole
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) > 15
    assert all("aria-labelledby" in attrs or attrs.get("aria-hidden") == "true" for attrs in drawings)


def test_plain_words_lead(whole):
    _, _, page = whole
    assert (
        "Pretraining on 1.77 MB of text lowered bits per byte on docstrings (lower is better) from 3.58 to 1.68, "
        "below all 3 baselines, the strongest being trigram (Witten-Bell) at 2.10."
    ) in page.shown


def test_samples_tell_why_they_ended(whole):
    _, _, page = whole
    assert "cut at the token limit" in page.shown and "ended by itself" in page.shown and "(nothing)" in page.shown


def test_funnel_shows_three_examples_with_reasons(whole):
    _, _, page = whole
    assert "38 characters, fewer than 40" in page.shown and "Close the sequence" in page.shown
    assert "a fourth example" not in page.shown


def test_clip_events_and_bound_are_drawn(tmp_path):
    run_dir = fixture.make(tmp_path / "run", stages={"pretrain": {"optim": {"type": "muonclip", "tau": 20.0}}})
    text, page = read(run_dir)
    assert "\u03c4 = 20.0" in page.shown
    assert "\u03c4 = 40.0" in page.shown and "Never clipped." in page.shown  # sft kept its own bound


def test_same_run_same_bytes(whole, tmp_path):
    run_dir, text, _ = whole
    other = html.write(run_dir, tmp_path / "again.html")
    assert other == tmp_path / "again.html" and other.read_text(encoding="utf-8") == text


def test_page_is_small(whole):
    run_dir, text, _ = whole
    assert len(text.encode()) < 400_000


def test_page_of_a_large_model_stays_small():
    layers, heads, experts, steps = 12, 16, 64, 200
    load = {f"layer {i}": [1 / experts] * experts for i in range(layers)}
    logits = {str(i): [float(i + h) for h in range(heads)] for i in range(layers)}
    log = [
        {"step": s, "losses": {"lm": 3 - s / steps}, "lr": 1e-4, "grad_norm": 1.0, "max_logits": logits, "expert_load": load}
        for s in range(1, steps + 1)
    ]
    stages = [StageView(f"stage {n}", "pretrain", "done", steps=log, seconds=1.0) for n in range(4)]
    run = RunView(Path("big"), "big", {}, "x" * 200_000, "y" * 200_000, {}, {}, stages, [], [])
    text = html.page(run)
    assert_sound(text, Page(text))
    assert len(text.encode()) < 1_500_000
    assert "The shaded range covers all heads" in text


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    run_dir = fixture.make(tmp_path / "run", hostile=HOSTILE)
    text, page = read(run_dir)
    assert_sound(text, page)
    assert page.shown.count("<script>alert(1)</script>") >= 8  # prompt, completions, labels, funnel, notes, licences, recipe
    assert not set("\x00\x1b\u202e") & set(text)


def test_half_a_character_does_not_stop_the_report(tmp_path):
    run_dir = fixture.make(tmp_path / "run", upto="evaluate", steps={"pretrain": 5, "sft": 5})
    path = next(run_dir.glob("stages/evaluate-*/results.json"))
    results = json.loads(path.read_text())
    results["models"][0]["samples"][0]["completion"] = "half \ud800 here"  # JSON can carry it, UTF-8 cannot
    path.write_text(json.dumps(results))
    text, _ = read(run_dir)
    assert "half ? here" in text


def test_hostile_names_of_metrics_and_stages(tmp_path):
    results = json.loads(json.dumps(fixture.example_results()))
    for model in results["models"]:
        model["metrics"][0].update(metric=f"bits_per_byte/{HOSTILE}", unit=HOSTILE, better=HOSTILE, settings={"k": HOSTILE})
        model["samples"][0]["stop"] = HOSTILE
    results["baselines"] = [{"name": HOSTILE, "metric": f"bits_per_byte/{HOSTILE}", "value": 2.0}]
    text, page = read(fixture.make(tmp_path / "run", results=results, recipe=HOSTILE.replace("/", "-")))
    assert_sound(text, page)


# ---------------------------------------------------------------- runs that are not whole


def test_unfinished_run_says_so(tmp_path):
    run_dir = fixture.make(tmp_path / "run", upto="sft", cut=40)
    text, page = read(run_dir)
    assert_sound(text, page)
    assert "The stage sft is not finished: it reached step 40 of 80." in page.shown
    assert "Not started: evaluate." in page.shown and "Time so far" in page.shown
    assert "no model has been measured yet" in page.shown
    assert not [attrs for tag, attrs in page.tags if tag == "section" and attrs["id"] in ("gains", "samples", "baselines")]
    assert "step 40 of 80" in page.shown


def test_failed_stage_says_why(tmp_path):
    run_dir = fixture.make(tmp_path / "run", upto="pretrain", cut=30)
    events = run_dir / "events" / "rank0.jsonl"
    last = json.loads(events.read_text().splitlines()[-1])
    with events.open("a") as file:
        file.write(json.dumps({**last, "seq": 9999, "kind": "stage_failed", "error": "loss is not finite <&>"}) + "\n")
    text, page = read(run_dir)
    assert_sound(text, page)
    assert "The stage pretrain failed. loss is not finite <&>" in page.shown


def test_non_finite_losses_are_gaps_and_are_counted(tmp_path):
    run_dir = fixture.make(tmp_path / "run", upto="pretrain", steps={"pretrain": 20})
    events = run_dir / "events" / "rank0.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for event in lines:
        if event["kind"] == "step" and event["step"] in (7, 8):
            event["losses"] = {"lm": "nan"}
    events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    text, page = read(run_dir)
    assert_sound(text, page)
    assert "No finite value at 2 steps, first at step 7." in page.shown


def test_run_that_has_just_begun(tmp_path):
    (tmp_path / "recipe.toml").write_text('[[stage]]\ntype = "corpus"\n')
    text, page = read(tmp_path)
    assert_sound(text, page)
    assert "Not started: corpus." in page.shown


def test_damaged_files_are_named_not_raised(tmp_path):
    run_dir = fixture.make(tmp_path / "run", upto="tokenizer")
    (run_dir / "env.json").write_text("{broken")
    next(run_dir.glob("stages/tokenizer-*/manifest.json")).write_text("[]")
    with (run_dir / "events" / "rank0.jsonl").open("a") as file:
        file.write('{"v":1,"kind":"step","torn')
    text, page = read(run_dir)
    assert_sound(text, page)
    assert "env.json in run is not JSON" in page.shown
    assert collect(run_dir).stage("tokenizer").status == "unfinished"


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run directory"):
        html.write(tmp_path)


def test_report_needs_nothing_but_the_standard_library():
    code = (
        "import sys, k2lab.report.html, k2lab.report.rows; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
