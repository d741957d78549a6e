"""The report of the whole life cycle: rewards, preferences, distillation, tries, tools, what leads and what is folded."""

from __future__ import annotations

import json
import re

import life_fixture as life
import pytest
import report_fixture as fixture
from test_report_drawing import boxes
from test_report_page import HOSTILE, Page, assert_sound, read

from k2lab.report import headlines, lineage, rows, story, students, training
from k2lab.report.collect import StageView, collect
from k2lab.report.measures import evaluation, merge
from k2lab.report.verdict import DETAIL, sentences
from k2lab.report.words import metric_help, metric_label

THIN = "\u202f"
REASON = "no sandbox works on this machine"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = life.make_life(tmp_path_factory.mktemp("runs") / "life")
    return run_dir, *read(run_dir)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    run_dir = life.make_life(tmp_path_factory.mktemp("runs") / "skipped", skipped=REASON)
    return run_dir, *read(run_dir)


def part(text: str, key: str) -> str:
    """The HTML of one section."""
    return re.search(rf'<section id="{key}">.*?</section>', text, re.S)[0]


def shown(text: str) -> str:
    return Page(text.replace("<", " <")).shown


def charts(text: str) -> dict[str, str]:
    """{title of a drawing: what is said about its lines}."""
    return dict(re.findall(r"<title id=\"[^\"]+\">([^<]*)</title><desc id=\"[^\"]+\">([^<]*)</desc>", text))


def training_of(run_dir, name: str) -> dict[str, str]:
    return charts(training.curves(collect(run_dir).stage(name)))


def test_page_is_sound_and_has_every_section(whole):
    _, text, page = whole
    assert_sound(text, page)
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["gains", "students", "preferences", "tries", "tools", "baselines", "samples", "training", "difficulty",
                        "lineage", "cost", "recipe", "licences"]  # fmt: skip
    assert len(text.encode()) < 700_000


def test_earlier_runs_have_no_new_sections(tmp_path):
    text, page = read(fixture.make(tmp_path / "run", steps={"pretrain": 20, "sft": 10}))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["gains", "baselines", "samples", "training", "data", "lineage", "cost", "recipe", "licences"]
    assert 'class="story"' not in text and "Learning rate, gradients" not in page.shown  # nothing is folded for two stages


# ---------------------------------------------------------------- curves


def test_reinforcement_curves(whole):
    found = training_of(whole[0], "rl")
    assert found.keys() >= {
        "Length of answers",
        "What carries no signal",
        "Temperature",
        "New fact",
        "Trainer and sampler disagree by",
        "Change by training on its own answers",
        "Log-ratio of a response",
        "Variety of answers (entropy)",
        "Objective of reinforcement learning",
        "Loss on examples mixed in",
        "Tokens held back by clipping",
    }
    assert "Reward and pass rate" in found and "Pass rate" not in found  # rewards of 0 or 1: one chart
    assert "temperature: 1.19 at 1, 0.800 at 60" in found["Temperature"]
    assert "tasks without a signal" in found["What carries no signal"] and "6.00 at 1" in found["What carries no signal"]
    assert list(found)[0] == "Reward and pass rate"


def test_pass_rate_has_its_own_chart_where_rewards_are_no_passes():
    steps = [{"step": s, "rollout": {"reward": 0.5 + s / 100, "pass_rate": s / 100}} for s in range(1, 9)]
    found = charts(training.curves(StageView("rl", "rl", "done", steps=steps)))
    assert "right answers: 1.00 at 1, 8.00 at 8" in found["Pass rate"] and "reward: 0.510 at 1" in found["Reward"]


def test_failed_rollouts_are_drawn_and_counted(whole, tmp_path):
    assert "Answers left out" not in training_of(whole[0], "rl")
    assert "Left out: 0 answers with an error" in whole[2].shown
    run_dir = life.make_life(tmp_path / "run", errors=2, steps=20)
    assert "with an error: 2.00 at 1" in training_of(run_dir, "rl")["Answers left out"]
    assert "Left out: 40 answers with an error and 0 that were too long, of 2600." in shown(part(read(run_dir)[0], "training"))


def test_mean_of_steps_does_not_lag_behind_a_slope():
    steps = [{"step": s, "rollout": {"reward": s / 100}} for s in range(1, 61)]
    found = charts(training.curves(StageView("rl", "rl", "done", steps=steps)))
    assert "reward, mean of 10 steps: 0.0100 at 1, 0.600 at 60" in found["Reward"]


def test_preference_curves_hold_training_and_held_out(whole):
    found = training_of(whole[0], "dpo")
    wins = found["Pairs in which the better answer wins"]
    assert "held out, gained more than the other: 56.7 at 20, 70.0 at 60" in wins
    assert "training, is the more likely one" in wins
    assert "held out: 0.167 at 20" in found["Margin between better and worse"]
    assert "held out, worse answer: \u221217.0" in found["Log-probability of whole answers"]
    assert "validation: 0.567 at 20, 0.500 at 60" in found["Preference loss"]
    assert "Loss on the better answers" in found and not any(title.startswith("Validation") for title in found)


def test_each_loss_of_distillation_has_its_chart(whole):
    found = training_of(whole[0], "distill")
    assert "validation: 0.333 at 20, 0.200 at 60" in found["Distance from the teacher"]
    assert "validation: 0.900 at 20, 0.700 at 60" in found["Loss on text"]


def test_unknown_metrics_of_an_objective_are_drawn():
    stage = StageView("x", "rl", "done", steps=[{"step": s, "losses": {"mine": 2.0}, "metrics": {"odd": s}} for s in (1, 2)])
    found = charts(training.curves(stage))
    assert "odd: 1.00 at 1, 2.00 at 2" in found["Odd"] and "Loss in training" in found


def test_machinery_is_folded_only_in_long_runs(whole):
    stage = collect(whole[0]).stage("dpo")
    folded, plain = training.curves(stage, fold=True), training.curves(stage)
    assert charts(folded) == charts(plain)
    assert "Learning rate" in charts(folded.partition("<details>")[2]) and "<details>" not in plain
    assert "Preference loss" in charts(folded.partition("<details>")[0])


# ---------------------------------------------------------------- preferences, tries, difficulty


def test_preference_report_becomes_rows_with_a_verdict(whole):
    table = rows.summary(whole[0])["rows"]
    by_metric = {row["metric"]: row for row in table if row["stage"] == "dpo"}
    row = by_metric["preference/logprob_accuracy"]
    assert (row["before"], row["after"], row["n"], row["verdict"], row["headline"]) == (0.56, 0.66, 420, "better", True)
    assert (row["change_low"], row["change_high"]) == pytest.approx((0.07, 0.13)) and row["seconds"] == 25.0
    assert by_metric["preference/reward_accuracy"]["before"] is None
    assert by_metric["preference/logprob_accuracy/length_matched"]["n"] == 210
    assert not by_metric["preference/logprob_accuracy/length_matched"]["headline"]


def test_preference_section_shows_both_halves(whole):
    text = shown(part(whole[1], "preferences"))
    assert "420 pairs, sides differ by 3.20 tokens in all pairs, sides differ by 0.400 tokens in pairs of similar length" in text
    assert "56 \u2192 66 %" in text and "56 \u2192 64 %" in text and "61 to 71, n = 420" in text


def test_damaged_preference_report_does_not_stop_the_page(tmp_path):
    run_dir = life.make_life(tmp_path / "run", steps=3)
    next(run_dir.glob("stages/dpo-*/preference.json")).write_text('{"all": {"reward_accuracy": 3, "logprob_accuracy_after": {}}}')
    next(run_dir.glob("stages/rl-*/pass_rates.jsonl")).write_text('{"pass_rate": 0.5}\n[]\n')
    text, page = read(run_dir)
    assert_sound(text, page)
    assert "preferences" not in [attrs.get("id") for _, attrs in page.tags]
    assert "cannot be read" in page.shown and "1 tasks; on average 50" in page.shown


def test_several_tries_are_curves_over_k(whole):
    text = part(whole[1], "tries")
    found = charts(text)
    assert list(found)[0] == "Solved: all tasks" and len(found) == 4
    assert "rl: 75.0 at 1, " in found["Solved: all tasks"] and " at 4" in found["Solved: all tasks"]
    assert re.findall(r'text-anchor="(?:middle|end)">([124])</text>', text)[:3] == ["1", "2", "4"]
    assert "600 tasks" in shown(text)


def test_one_point_is_no_curve(tmp_path):
    results = {"models": [{"name": "m", "stage": "sft", "metrics": [life.metric("a/avg@1", 0.5), life.metric("b/pass@4", 0.7)]}]}
    assert "tries" not in re.findall(
        r'section id="(\w+)"', read(fixture.make(tmp_path, results=results, steps={"pretrain": 3, "sft": 3}))[0]
    )


def test_histogram_of_pass_rates_marks_what_is_used(whole):
    run = collect(whole[0])
    rates = run.stage("rl").pass_rates
    text = part(whole[1], "difficulty")
    found = charts(text)
    assert f"never: {rates.count(0.0)}; " in found["rl: tasks by share of right answers"]
    assert found["rl: tasks by share of right answers"].endswith(f"always: {rates.count(1.0)}")
    used, some = sum(0.2 <= rate <= 0.8 for rate in rates), sum(0 < rate < 1 for rate in run.stage("pairs").pass_rates)
    assert f"Blue: the {used} tasks that were used, solved in 20 to 80 % of tries." in shown(text)
    assert f"Blue: the {some} tasks that were solved sometimes, but not always." in shown(text)


# ---------------------------------------------------------------- teacher and student


def test_student_beside_its_teacher(whole):
    run = collect(whole[0])
    found = evaluation(run)
    assert students.teachers(run) == {"distill": "rl"}
    kept = students.kept(run, found, "distill")
    assert kept["right"] == pytest.approx(0.69 / 0.75) and kept["time"] == pytest.approx(1.1 / 2.3)
    sizes = [students.size_of(run.stage(name))["active"] for name in ("rl", "distill")]
    assert kept["active"] == pytest.approx(sizes[1] / sizes[0]) and 0 < kept["active"] < 0.7
    text = shown(part(whole[1], "students"))
    assert "The student distill keeps 92 % of its teacher\u2019s right answers (69 against 75 %) with" in text
    assert "1.20 M 500 k (42 %)" in text and "ms/token one answer at a time 2.3 1.0 to 2.4 1.1 (48 %)" in text


def test_row_of_a_student_shows_its_teacher_not_a_false_before(whole):
    row = next(r for r in rows.summary(whole[0])["rows"] if r["stage"] == "distill" and r["metric"] == "answered/avg@4")
    assert row["before"] is None and row["verdict"] == "unknown"
    assert "teacher: 75.0" in shown(part(whole[1], "gains"))


def test_size_is_left_out_where_the_shape_is_unknown(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "somebody_else"}')
    stage = StageView("m", "sft", "done", directory=tmp_path, manifest={"parameters": 7})
    assert students.size_of(stage) == {"total": 7.0} and students.size_of(None) == {}


# ---------------------------------------------------------------- tools


def test_tools_with_and_without(whole):
    text = part(whole[1], "tools")
    seen = shown(text)
    assert "without tools 2.0 % with tools 93 %" in seen
    assert "95 of 100" in seen and "97 3 of them failed" in seen and "40 ms" in seen
    assert f"The sandbox: {life.BOX}." in seen and "Sandbox bubblewrap 0.8.0" in shown(whole[1])
    row = next(r for r in rows.summary(whole[0])["rows"] if r["stage"] == "agent" and r["metric"] == "chain_sum/avg@1")
    assert (row["before"], row["after"], row["change"], row["verdict"]) == (0.02, 0.93, 0.91, "better")


def test_tool_conversations_are_shown_as_such_and_only_there(whole):
    text = part(whole[1], "tools")
    assert '<div class="part call"><b>calls python</b><pre>print(48213377 + 90211245)</pre></div>' in text
    assert '<div class="part result"><b>python returns</b><pre>138424622</pre></div>' in text
    assert '<div class="part think"><b>thinks</b><pre>too long for my head</pre></div>' in text
    assert "tool_call" not in text and "im_end" not in text
    assert "48213377" not in part(whole[1], "samples")


def test_stage_that_was_not_run_is_said_everywhere(skipped):
    run_dir, text, page = skipped
    assert_sound(text, page)
    seen = shown(text)
    assert f"The stage agent was not run. {REASON}" in seen and "Not run: agent (see below)." in seen
    assert f"agent was not run. {REASON}" in shown(part(text, "tools"))
    assert f"Not run. {REASON}" in shown(part(text, "gains"))
    assert "16 of 17 stages, measured" in seen and "agent, not run" in part(text, "lineage")
    assert "was given a tool" not in seen and "Sandbox" not in shown(text.partition("<main>")[0])
    assert "agent (not run)" in rows.summary_text(run_dir)


# ---------------------------------------------------------------- what leads


def test_few_rows_lead_and_none_is_lost(whole):
    table = rows.summary(whole[0])["rows"]
    for name in life.STAGES:
        mine = [row for row in table if row["stage"] == name]
        assert 1 <= sum(row["headline"] for row in mine) <= headlines.MAX_LEADING + 1
    folded = re.findall(r'<tr class="rest">.*?</details></td></tr>', part(whole[1], "gains"), re.S)
    assert len(folded) == 7  # every measured stage
    hidden = sum(text.count('<th scope="row">') for text in folded)
    in_all = part(whole[1], "gains").count('<th scope="row">')
    assert in_all == sum(row["metric"] is not None for row in table) and hidden == sum(not row["headline"] for row in table)


def test_leading_rows_are_the_whole_and_the_clearest_kinds(whole):
    lead = [row["metric"] for row in rows.summary(whole[0])["rows"] if row["stage"] == "dpo" and row["headline"]]
    assert lead == ["preference/logprob_accuracy", "preference/reward_accuracy", "bits_per_byte", "answered/avg@4",
                    "chain_sum/avg@4", "letter_counting/avg@4"]  # fmt: skip


def row(metric, before, after, verdict="unclear", stage="s", **more):
    change = None if before is None else after - before
    table = {"stage": stage, "metric": metric, "before": before, "after": after, "low": after - 0.1, "high": after + 0.1}
    more = {"change_low": None, "change_high": None, "settings": "", "unit": "", **more}
    return {**table, "change": change, "verdict": verdict, **more}


def test_what_became_worse_always_leads():
    table = [row("bits_per_byte", 2.0, 1.0, "better"), row("a/avg@1", 0.1, 0.9, "better"), row("a/eos_rate", 0.9, 0.1, "worse")]
    headlines.mark(table)
    assert [r["headline"] for r in table] == [True, True, True]
    table[2]["verdict"] = "unclear"
    headlines.mark(table)
    assert [r["headline"] for r in table] == [True, True, False]


def test_measures_of_ones_own_lead_and_minor_ones_do_if_alone():
    table = [row("sparkle", None, 3.0, "unknown"), row("x/eos_rate", 0.1, 0.2)]
    headlines.mark(table)
    assert [r["headline"] for r in table] == [True, False]
    headlines.mark(table[1:])
    assert table[1]["headline"]


def test_many_families_without_a_whole_are_cut_to_the_ones_that_moved():
    table = [row(f"family{i}/avg@1", 0.5, 0.5 + i / 100) for i in range(9)]
    headlines.mark(table)
    assert [r["metric"] for r in table if r["headline"]] == [f"family{i}/avg@1" for i in (5, 6, 7, 8)]


def test_terminal_table_leads_and_tells_where_the_rest_is(whole):
    text = rows.summary_text(whole[0])
    table = rows.summary(whole[0])["rows"]
    lines = text.splitlines()
    assert len(lines) < 50 and text.isascii()
    hidden = sum(not row["headline"] for row in table)
    assert lines[-1] == f'{hidden} more measures: k2 report {whole[0]} --json, or "all measures" on the page'
    assert "answered/avg@4" in text and "eos_rate" not in text


def test_printing_opens_what_is_folded(whole):
    assert re.search(r"@media print \{.*details::details-content \{ content-visibility: visible", whole[1], re.S)


# ---------------------------------------------------------------- several evaluations


def results(**values):
    """results.json of two models with one metric each: {name: (value, n)}; the second came from the first."""
    names = list(values)
    models = [{"name": name, "stage": name, "metrics": [life.metric("answered/avg@1", v, n)]} for name, (v, n) in values.items()]
    change = {"before": names[0], "after": names[-1], "metric": "answered/avg@1", "n": 9, "low": 0.0}
    delta = values[names[-1]][0] - values[names[0]][0]
    return {
        "models": models,
        "chain": [names] if len(names) == 2 else [],
        "changes": [{**change, "change": delta, "high": 2 * delta}],
    }


def test_same_question_about_other_examples_is_another_measure():
    found = merge({"first": results(sft=(0.1, 100), rl=(0.4, 100)), "second": results(sft=(0.2, 500), rl=(0.3, 500))})
    measures = list(found.models["rl"].measures.values())
    assert [(m.value, m.n, m.source) for m in measures] == [(0.4, 100, "first"), (0.3, 500, "second")]
    assert measures[1].settings.endswith("in second")
    start = found.models["sft"].find("answered/avg@1", measures[1].settings)
    assert start.value == 0.2  # compared within one evaluation
    assert [found.change("sft", "rl", m)["change"] for m in measures] == pytest.approx([0.3, 0.1])


def test_change_of_one_evaluation_is_not_told_of_another():
    found = merge({"first": results(sft=(0.1, 100), rl=(0.4, 100)), "second": results(rl=(0.35, 100))})
    (measure,) = found.models["rl"].measures.values()
    assert (measure.value, measure.source) == (0.35, "second") and found.change("sft", "rl", measure) == {}


def test_models_of_several_reports_stand_in_one_table(whole):
    table = [row for row in rows.summary(whole[0])["rows"] if row["metric"]]
    assert {row["stage"] for row in table} == {*life.RIGHT, "agent"}
    order = list(dict.fromkeys(row["stage"] for row in table))
    assert order == [name for name in life.STAGES if name in order]


# ---------------------------------------------------------------- the story


def said(run_dir):
    run = collect(run_dir)
    found = evaluation(run)
    return [text.replace(THIN, " ") for text in sentences(run, found, rows.rows(run, found))]


def test_story_tells_gains_prices_and_each_stage(whole):
    lead, price, *each = said(whole[0])
    assert lead.startswith(
        "In 8 min 00 s and 6 stages of training, the model learned to predict text (bits per byte 3.90 \u2192 2.05)"
    )
    assert "learned to think before it answers (right answers 8.0 \u2192 64.0 %)" in lead  # of all tasks, not of the best kind
    assert (
        "keeps 92 % of its teacher\u2019s right answers" in lead
        and "was given a tool (right answers on chain sum 2 \u2192 93 %)" in lead
    )
    assert price == (
        "The price: in sft, bits per byte 2.05 \u2192 2.60; in reasoning_sft, bits per byte 2.60 \u2192 2.90; "
        "in dpo, right answers on letter counting 60 \u2192 55 %."
    )
    assert len(each) == 7 and all(text.startswith(DETAIL) for text in each)
    assert f"<li>{each[4].removeprefix(DETAIL)}".split("%")[0] in whole[1].replace(THIN, " ")


def test_one_family_that_gained_is_no_story():
    table = [
        row("answered/avg@1", 0.5, 0.51),
        row("lucky/avg@1", 0.2, 0.4, "better"),
        row("preference/logprob_accuracy", 0.5, 0.6, "better"),
    ]
    assert [r["metric"] for r in headlines.whole(table)] == ["answered/avg@1", "preference/logprob_accuracy"]
    assert headlines.whole(table[1:]) == table[1:]


def test_story_without_gains_claims_none(tmp_path):
    run = collect(life.make_life(tmp_path / "run", steps=2))
    chief = dict.fromkeys(("sft", "dpo", "rl"), None)
    text = story.lead(run, merge({}), chief, lambda row: "x")
    assert text == "None of the measured stages (sft, dpo and rl) brought a clear gain in what the model can do."
    manners = row("x/eos_rate", 0.1, 0.9, "better")
    assert "learned to answer" not in story.lead(run, merge({}), {"sft": manners}, lambda row: "x")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "metric, label",
    [
        ("chain_sum/avg@4", "Right answers: chain sum"),
        ("answered/avg@1", "Right answers: all tasks"),
        ("answered/pass@4", "Problems solved in 4 tries: all tasks"),
        ("answered/avg@4 (k=4, temperature 1)", "Right answers: all tasks (k=4, temperature 1)"),
        ("bits_per_byte/docs", "Bits per byte: docs"),
        ("preference/logprob_accuracy/length_matched", "Pairs ranked right: pairs of similar length"),
        ("python/tool_used", "Answers that used a tool: python"),
        ("my_own/thing", "My own: thing"),
    ],
)
def test_labels_in_plain_words(metric, label):
    assert metric_label(metric) == label and metric_help(metric, "higher")


# ---------------------------------------------------------------- lineage


def test_lineage_of_many_stages_keeps_lines_off_boxes(whole):
    svg = lineage.lineage_svg(collect(whole[0]))
    drawn = boxes(svg)
    assert len(drawn) == len(life.STAGES)
    for i, (_, x, y, w, h) in enumerate(drawn):
        for _, x2, y2, w2, h2 in drawn[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    edges = re.findall(
        r'class="edge c\d" d="M([\d.]+) ([\d.]+)H[\d.]+Q([\d.]+) [\d. ]+V[\d.]+Q[\d.]+ ([\d.]+) [\d. ]+H([\d.]+)"',
        svg,
    )
    assert len(edges) == sum(len(set(parents.values())) for _, _, parents, _ in life.STAGES.values())
    for x0, y0, line, y1, x1 in (map(float, edge) for edge in edges):
        low, high = sorted((y0, y1))
        for _, x, y, w, h in drawn:
            assert not (x < line < x + w and y < high and low < y + h)  # the long way down runs between the lanes
            for at, ends in ((y0, sorted((x0, line))), (y1, sorted((line, x1)))):
                assert not (y < at < y + h and ends[0] < x + w - 9 and ends[1] > x + 9)
    width = int(re.search(r'class="dag" width="(\d+)"', svg)[1])
    assert width <= 1032  # as wide as the page's text


def test_lines_of_one_gap_do_not_share_a_place(whole):
    svg = lineage.lineage_svg(collect(whole[0]))
    spans = {}
    for name, line, y0, y1 in re.findall(
        r"<title>[^<]*= (\w+)</title><path class=\"edge c\d\" d=\"M[\d.]+ [\d.]+H[\d.]+Q([\d.]+) ([\d.]+) .*?Q[\d.]+ ([\d.]+) ",
        svg,
    ):
        low, high = sorted((float(y0), float(y1)))
        old = spans.get((line, name), (low, high))
        spans[line, name] = (min(low, old[0]), max(high, old[1]))
    for (line, name), (low, high) in spans.items():
        for (line2, name2), (low2, high2) in spans.items():
            assert name == name2 or line != line2 or high < low2 or high2 < low


# ---------------------------------------------------------------- hostile text


def test_hostile_transcripts_do_nothing(tmp_path):
    text, page = read(life.make_life(tmp_path / "run", hostile=f"<think>{HOSTILE}</think>{HOSTILE}", steps=3))
    assert_sound(text, page)
    assert page.shown.count("<script>alert(1)</script>") >= 8
    assert not set("\x00\x1b\u202e") & set(text)


def test_hostile_names_in_rollouts_and_metrics(tmp_path):
    run_dir = life.make_life(tmp_path / "run", steps=3)
    events = run_dir / "events" / "rank0.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for event in lines:
        if event["kind"] == "step" and event["stage"] == "rl":
            event["rollout"][HOSTILE] = event["metrics"][HOSTILE] = float(event["step"])
            event["losses"][HOSTILE] = 1.0
        if event["kind"] == "note":
            event["text"] = f"tools run in {HOSTILE}"
    events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    assert_sound(*read(run_dir))
