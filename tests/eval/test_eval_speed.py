"""Times per generated token, on samplers that move a clock of the test."""

import pytest

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Completion, StopReason
from k2lab.eval import speed


class Clocked:
    """A sampler whose batch takes `setup` seconds and `each` seconds per further token and row."""

    def __init__(self, clock, log, name, setup, each, window=1000):
        self.clock, self.log, self.name, self.setup, self.each, self.window = clock, log, name, setup, each, window

    def sample(self, prompts, params, keys):
        assert params.temperature == 0 and params.stop_tokens == () and len(set(keys)) == len(prompts)
        tokens = min(params.max_tokens, self.window)
        self.log.append((self.name, tokens))
        self.clock[0] += self.setup + self.each * (tokens - 1) * len(prompts)
        stop = StopReason.LENGTH if tokens == params.max_tokens else StopReason.CONTEXT
        return [Completion((1,) * tokens, (0.0,) * tokens, stop) for _ in prompts]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def test_prompts_and_setting_up_are_no_part_of_a_tokens_time(clock):
    log = []
    samplers = [Clocked(clock, log, "big", 3.0, 0.5), Clocked(clock, log, "small", 0.1, 0.2)]
    rows = [[1, 2], [3], [4, 5, 6]]
    big, small = speed.decode_times(samplers, [rows, rows], tokens=9, repeats=4)
    assert big == pytest.approx([0.5] * 4) and small == pytest.approx([0.2] * 4)
    turn = [("big", 1), ("big", 9), ("small", 1), ("small", 9)]
    assert log == turn * 5  # a warm-up, then in turns


def test_the_middle_of_repeats_stands_in_their_range():
    found = speed.middle([0.3, 0.1, 0.2, 9.0])
    assert (found.value, found.low, found.high, found.n) == (0.25, 0.1, 9.0, 4) and "4 repeats" in found.method


def test_models_that_stop_early_cannot_be_compared(clock):
    with pytest.raises(DataError, match="6 of 9 tokens"):
        speed.decode_times([Clocked(clock, [], "m", 0.0, 1.0, window=6)], [[[1]]], tokens=9)
    with pytest.raises(RecipeError, match="at least 2 tokens"):
        speed.decode_times([], [], tokens=1)
