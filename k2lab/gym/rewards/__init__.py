"""Reward slots: each a frozen dataclass with `score(task, response) -> float` between 0 and 1.

`response` is the decoded text of what the model produced, special tokens included, so a complete answer ends with `<|im_end|>`.
Rewards about content look at the final answer only: without that end, and behind `</think>` if the model thought first.
"""
