import dataclasses

import pytest

from k2lab.core import slots
from k2lab.core.errors import DataError
from k2lab.gym.rewards.contains import Contains
from k2lab.gym.rewards.exact_match import ExactMatch
from k2lab.gym.rewards.numeric import Numeric
from k2lab.gym.rewards.well_formed import WellFormed

END = "<|im_end|>"


def scored(reward, answer, response):
    return reward.score({"answer": answer}, response)


@pytest.mark.parametrize(
    "reward, answer, response, wanted",
    [
        (ExactMatch(), "a b", " a \n b" + END, 1),
        (ExactMatch(), "a b", "a b", 1),
        (ExactMatch(), "a b", "a b.", 0),
        (ExactMatch(), "Yes", "yes", 0),
        (ExactMatch(), "a b", "a  b", 1),
        (ExactMatch(squeeze=False), "a b", "a  b", 0),
        (ExactMatch(ignore_case=True), "STRASSE", "straße", 1),
        (ExactMatch(strip=".!"), "Yes", "Yes.", 1),
        (ExactMatch(last_line=True), "42", "so it is\n42\n \n" + END, 1),
        (ExactMatch(last_line=True), "42", "42\nor not", 0),
        (ExactMatch(last_line=True), "42", "", 0),
        (ExactMatch(after="####"), "42", "6*7 #### 41 #### 42", 1),
        (ExactMatch(after="####"), "42", "42", 0),
        (ExactMatch(), "4", "<think>maybe 5</think>4" + END, 1),
        (ExactMatch(), "4", "<think>4" + END, 0),
        (Contains(), "json.dump", "Use `json.dump`: it" + END, 1),
        (Contains(), "json.dump", "json.dumps writes", 0),
        (Contains(), "path", "see os.path.join", 0),
        (Contains(), "path", "see shutil.path", 0),
        (Contains(), "path", "the path.", 1),
        (Contains(whole_name=False), "json.dump", "json.dumps writes", 1),
        (Contains(), "Path", "the path", 0),
        (Contains(ignore_case=True), "Path", "the path", 1),
        (Contains(), "a.b", "axb", 0),
        (Contains(), "", "anything", 0),
        (Numeric(), "42", "first 7, then 42." + END, 1),
        (Numeric(), "42", "42, no: 43", 0),
        (Numeric(), "1234567.5", "it is 1,234,567.5", 1),
        (Numeric(), "-3", "x = -3", 1),
        (Numeric(), "-3", "x = \u22123", 1),
        (Numeric(), "3", "8-3", 1),
        (Numeric(), "7", "7 and x2", 1),
        (Numeric(), "1e-3", "0.001", 1),
        (Numeric(), "0.5", ".5", 1),
        (Numeric(), "100", "100.4", 0),
        (Numeric(relative=0.01), "100", "100.4", 1),
        (Numeric(absolute=0.5), "100", "100.4", 1),
        (Numeric(), "3 + 4 = 7", "3 + 4 = 7", 1),
        (Numeric(), "1", "none", 0),
        (Numeric(), "1", "", 0),
        (WellFormed(), "", "ok" + END, 1),
        (WellFormed(), "", "ok", 0),
        (WellFormed(), "", "  " + END, 0),
        (WellFormed(), "", END, 0),
        (WellFormed(), "", "a" + END + END, 0),
        (WellFormed(), "", "a<|im_user|>b" + END, 0),
        (WellFormed(), "", "a[EOS]" + END, 0),
        (WellFormed(), "", "<think>a</think>b" + END, 0),
        (WellFormed(allowed=("<think>", "</think>")), "", "<think>a</think>b" + END, 1),
        (WellFormed(allowed=("<think>", "</think>")), "", "<think></think>" + END, 0),
    ],
)
def test_score(reward, answer, response, wanted):
    assert scored(reward, answer, response) == wanted


def test_a_numeric_task_without_a_number_is_an_error():
    with pytest.raises(DataError, match="no number"):
        scored(Numeric(), "seven", "7")


@pytest.mark.parametrize("name", ["contains", "exact_match", "numeric", "well_formed"])
def test_rewards_are_slots(name):
    assert name in slots.names("reward")
    cls = slots.load("reward", name)
    for example in cls.examples():
        assert dataclasses.is_dataclass(example)
        assert example.score({"answer": "12"}, "") == 0.0
