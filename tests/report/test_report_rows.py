"""`summary`: one row per trained stage and metric, with the value of the model before; verdicts need intervals."""

from __future__ import annotations

import json

import pytest
import report_fixture as fixture

from k2lab.report import rows
from k2lab.report.collect import collect
from k2lab.report.measures import evaluation, merge
from k2lab.report.verdict import sentences

SMALL = {"pretrain": 30, "sft": 10}
KEYS = {"stage", "metric", "before", "after", "low", "high", "n", "seconds", "peak_rss_mb"}


def make(tmp_path, **options):
    return fixture.make(tmp_path / "run", steps=SMALL, **options)


def row_of(found, stage, metric):
    (row,) = [row for row in found["rows"] if row["stage"] == stage and row["metric"] == metric]
    return row


def test_rows_of_a_whole_run(tmp_path):
    found = rows.summary(make(tmp_path))
    assert set(found) == {"total_seconds", "rows"}
    assert found["total_seconds"] == pytest.approx(208.0)
    assert all(set(row) >= KEYS for row in found["rows"])
    assert len(found["rows"]) == 5 + 2 * 4
    row = row_of(found, "sft", "bits_per_byte/docstrings")
    assert (row["before"], row["after"], row["low"], row["high"], row["n"]) == (1.684, 1.731, 1.708, 1.754, 519)
    assert (row["seconds"], row["peak_rss_mb"], row["unit"], row["better"]) == (37.5, 1911.0, "bits/byte", "lower")
    assert row["change"] == pytest.approx(0.047) and row["change_low"] < row["change"] < row["change_high"]
    assert row_of(found, "pretrain", "exact_match")["before"] == 0.0  # the untrained model, not null
    json.dumps(found)


def test_stages_without_metrics_keep_their_cost(tmp_path):
    found = rows.summary(make(tmp_path))
    row = row_of(found, "tokenizer", None)
    assert row == {
        "stage": "tokenizer",
        **dict.fromkeys(KEYS - {"stage"}),
        "seconds": 1.0,
        "peak_rss_mb": 212.0,
        "headline": True,
    }


def test_unfinished_run_has_a_row_for_every_stage(tmp_path):
    found = rows.summary(fixture.make(tmp_path / "run", upto="pretrain", cut=10))
    assert [row["stage"] for row in found["rows"]] == list(fixture.ORDER)
    assert found["rows"][-1]["seconds"] is None and found["rows"][4]["peak_rss_mb"] > 1000


def test_before_needs_a_chain(tmp_path):
    results = fixture.example_results()
    results["chain"] = [["pretrain", "sft"]]
    found = rows.summary(make(tmp_path, results=results))
    row = row_of(found, "pretrain", "exact_match")
    assert row["before"] is None and row["change"] is None and row["verdict"] == "unknown"
    assert row_of(found, "sft", "exact_match")["before"] == 0.01


def test_only_the_after_model_measured(tmp_path):
    results = fixture.example_results()
    results["models"] = results["models"][2:]
    found = rows.summary(make(tmp_path, results=results))
    assert row_of(found, "sft", "exact_match")["before"] is None
    assert row_of(found, "pretrain", None)["seconds"] == 141.0


def test_missing_optional_keys(tmp_path):
    results = {
        "models": [{"name": "m", "stage": "sft", "metrics": [{"metric": "score", "value": 3}, {"metric": "bad", "value": "nan"}]}]
    }
    found = rows.summary(make(tmp_path, results=results))
    row = row_of(found, "sft", "score")
    assert (row["after"], row["low"], row["n"], row["verdict"]) == (3.0, None, None, "unknown")
    assert not [row for row in found["rows"] if row["metric"] == "bad"]


def test_later_evaluation_wins_and_new_metrics_are_added(tmp_path):
    again = {
        "models": [
            {
                "name": "sft",
                "stage": "sft",
                "metrics": [
                    fixture.metric("exact_match", 0.4, 0.36, 0.44, 600),
                    fixture.metric("valid_json", 0.9, 0.8, 0.95, 60),
                ],
            }
        ]
    }
    found = rows.summary(make(tmp_path, again=again))
    assert row_of(found, "sft", "exact_match")["after"] == 0.4
    assert row_of(found, "sft", "valid_json")["before"] is None
    assert row_of(found, "again", None)["seconds"] == 5.0


def test_other_settings_are_another_row_and_are_marked(tmp_path):
    again = {
        "models": [
            {"name": "sft", "stage": "sft", "metrics": [fixture.metric("exact_match", 0.5, 0.4, 0.6, 600, settings="sampled")]}
        ]
    }
    found = rows.summary(make(tmp_path, again=again))
    both = [row for row in found["rows"] if row["stage"] == "sft" and row["metric"] == "exact_match"]
    assert [row["settings"] for row in both] == ["greedy, max 64 tokens", "sampled"]
    assert both[1]["settings_before"] == "greedy, max 64 tokens"


@pytest.mark.parametrize(
    "better, before, after, change, expected",
    [
        ("lower", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), (-0.5, -0.6, -0.4), "better"),
        ("higher", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), (-0.5, -0.6, -0.4), "worse"),
        ("lower", (2.0, 1.9, 2.1), (1.95, 1.8, 2.1), (-0.05, -0.2, 0.1), "unclear"),
        ("lower", (2.0, 1.9, 2.1), (1.95, 1.8, 2.1), (-0.05, -0.06, -0.04), "better"),  # the paired interval decides
        ("lower", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), None, "better"),
        ("higher", (2.0, 1.9, 2.1), (2.15, 2.05, 2.25), None, "unclear"),  # own intervals overlap
        ("lower", (2.0, None, None), (1.5, 1.4, 1.6), None, "unclear"),
        ("", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), None, "unknown"),
    ],
)
def test_verdicts(tmp_path, better, before, after, change, expected):
    def model(name, stage, value, low, high):
        entry = {"metric": "x", "better": better, "value": value, "low": low, "high": high, "n": 9}
        return {"name": name, "stage": stage, "metrics": [entry]}

    results = {"models": [model("a", None, *before), model("b", "sft", *after)], "chain": [["a", "b"]]}
    if change:
        results["changes"] = [dict(zip(("change", "low", "high"), change), before="a", after="b", metric="x")]
    assert row_of(rows.summary(make(tmp_path, results=results)), "sft", "x")["verdict"] == expected


# ---------------------------------------------------------------- terminal tables


def test_text_table_has_every_stage_and_is_plain(tmp_path):
    text = rows.summary_text(make(tmp_path))
    assert text.isascii()
    for name in fixture.ORDER:
        assert f"\n{name} " in text
    assert "1.684" in text and "+30.8" in text and "-1.899" in text and "total: 3 min 28 s" in text


def test_text_table_cannot_command_a_terminal(tmp_path):
    results = fixture.example_results()
    results["models"][2]["metrics"][0]["metric"] = "a\x1b[2Jb\nc"
    text = rows.summary_text(make(tmp_path, results=results))
    assert "\x1b" not in text and "a?[2Jb?c" in text


def test_results_text_lists_models_and_baselines():
    text = rows.results_text(fixture.example_results())
    assert text.index("untrained") < text.index("pretrained\x20") < text.index("fine-tuned") < text.index("trigram")
    assert "28.2 to 35.6" in text and "2.10" in text
    assert rows.results_text({}).count("\n") == 2  # heads and rule only


# ---------------------------------------------------------------- the sentences


def said(tmp_path, **options):
    run = collect(make(tmp_path, **options))
    found = evaluation(run)
    return [text.replace("\u202f", " ") for text in sentences(run, found, rows.rows(run, found))]


def with_baselines(*values, name="bits_per_byte/docstrings"):
    items = [{"name": f"b{i}", "metric": name, "value": value} for i, value in enumerate(values)]
    return {**fixture.example_results(), "baselines": items}


def test_each_trained_stage_gets_a_sentence_with_its_price(tmp_path):
    first, second = said(tmp_path)
    assert first.startswith(
        "Pretraining on 1.77 MB of text lowered bits per byte on docstrings (lower is better) from 3.58 to 1.68"
    )
    assert second == (
        "Supervised fine-tuning raised the share of exact answers from 1.0 % to 31.8 %; "
        "the price: bits per byte on docstrings went from 1.68 to 1.73."
    )


@pytest.mark.parametrize(
    "values, expected",
    [
        ((2.1,), ", below b0 at 2.10."),
        ((2.4, 1.5), ", below b0 at 2.40 but still above b1 at 1.50."),
        ((1.5, 1.2), ", still above b1 at 1.20."),
        ((1.69,), ", level with b0 at 1.69."),  # inside the interval
        ((), " to 1.68."),
    ],
)
def test_baselines_are_compared_honestly(tmp_path, values, expected):
    assert said(tmp_path, results=with_baselines(*values))[0].endswith(expected)


def test_no_claim_against_a_baseline_of_unknown_data(tmp_path):
    assert said(tmp_path, results=with_baselines(5.0, name="bits_per_byte"))[0].endswith("to 1.68.")


def test_baseline_without_slice_counts_if_there_is_only_one_slice():
    results = with_baselines(5.0, name="bits_per_byte")
    for model in results["models"]:
        model["metrics"] = model["metrics"][:1]
    assert merge({"evaluate": results}).comparable("bits_per_byte/docstrings")[1] is True


def test_stage_that_changed_nothing_is_not_praised(tmp_path):
    results = fixture.example_results()
    results["models"][2]["metrics"] = results["models"][1]["metrics"]
    results["changes"] = results["changes"][:4]
    assert said(tmp_path, results=results)[1] == (
        "Supervised fine-tuning changed none of its 4 measured figures by more than chance would."
    )


def test_stage_that_made_things_worse_is_told(tmp_path):
    results = fixture.example_results()
    results["models"] = [{**model, "metrics": model["metrics"][:1]} for model in results["models"]]
    assert said(tmp_path, results=results)[1] == (
        "Supervised fine-tuning raised bits per byte on docstrings from 1.68 to 1.73, which is worse."
    )
