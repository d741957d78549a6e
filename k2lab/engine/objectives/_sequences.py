"""Sums over the sequences of a pack, and what the policy objectives share.

Axes: T packed tokens, S sequences, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from k2lab.core.types import Batch
from k2lab.models.losses import linear_logprobs

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it an importance ratio is as good as infinite, and its gradient would be NaN


# ---------------------------------------------------------------- sums over sequences, on the device


def sequence_sums(values_T: torch.Tensor, starts_S1: torch.Tensor) -> torch.Tensor:
    """Sum of the values of each sequence, [S], in fp64, with gradient and in a fixed order."""
    return torch.segment_reduce(values_T.double(), "sum", offsets=starts_S1)


def spread(values_S: torch.Tensor, starts_S1: torch.Tensor, size: int) -> torch.Tensor:
    """Each sequence's value at all its positions, [T]; `size` = T, which the host would else have to ask the device for."""
    return torch.repeat_interleave(values_S, starts_S1.diff(), output_size=size)


# ---------------------------------------------------------------- pairs and counts, on the host


def sides(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences that are chosen sides [P], the rejected side of the same pair of each [P]), on the batch's device, which is not
    waited for: how many there are is known on the host, where `to_device` leaves `pair_S` and `sign_S`."""
    by_pair_S = np.argsort(batch.pair_S, kind="stable")
    sign_S, device = batch.sign_S[by_pair_S], batch.starts_S1.device
    both_2P = torch.from_numpy(np.stack([by_pair_S[sign_S > 0], by_pair_S[sign_S < 0]]))
    if device.type == "cuda":
        both_2P = both_2P.pin_memory()
    chosen_P, rejected_P = both_2P.to(device, non_blocking=True)
    return chosen_P, rejected_P


def tokens_where(batch: Batch, mask_T: np.ndarray) -> int:
    """Trained tokens at which the mask holds."""
    return int(np.count_nonzero((batch.weight_T != 0) & mask_T))


def sequences_where(batch: Batch, mask_T: np.ndarray) -> int:
    """Sequences with a trained token at which the mask holds."""
    return int(np.count_nonzero(np.add.reduceat(((batch.weight_T != 0) & mask_T).astype(np.int64), batch.starts_S1[:-1])))


# ---------------------------------------------------------------- policies


@dataclass
class Policy:
    """What policy objectives compute with. `weight_T` is 0 on PTX tokens; `delta_T` = log pi - log pi_old there 0 too;
    `advantage_T`; `length_S` trained tokens (weights summed); `logp_T`; `ptx` the PTX term's sum; `starts_S1`."""

    weight_T: torch.Tensor
    delta_T: torch.Tensor
    advantage_T: torch.Tensor
    logp_T: torch.Tensor
    length_S: torch.Tensor
    starts_S1: torch.Tensor
    ptx: torch.Tensor

    def sums(self, values_T: torch.Tensor) -> torch.Tensor:
        """Weighted sums over sequences, [S]."""
        return sequence_sums(values_T * self.weight_T, self.starts_S1)

    def means(self, values_T: torch.Tensor) -> torch.Tensor:
        """Weighted means over sequences, [S]; 0 for a sequence without trained tokens."""
        return self.sums(values_T) / self.length_S.clamp(min=torch.finfo(self.length_S.dtype).tiny)


def policy(model: Any, batch: Batch, chunk: int) -> Policy:
    """Log-probabilities and log-ratios of the batch under the model, with gradient."""
    rows = batch.num_tokens or None
    logp_T = linear_logprobs(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T, chunk=chunk, rows=rows)
    ptx_T = batch.streams_T["ptx"]
    weight_T = torch.where(ptx_T == 0, batch.weight_T, 0.0)
    delta_T = torch.where(weight_T != 0, logp_T - batch.streams_T["logprobs"], 0.0)
    length_S = sequence_sums(weight_T, batch.starts_S1)
    ptx = -(logp_T * torch.where(ptx_T != 0, batch.weight_T, 0.0)).sum()
    return Policy(weight_T, delta_T, batch.streams_T["advantages"], logp_T, length_S, batch.starts_S1, ptx)


POLICY_TOKEN_METRICS = ("mismatch", "kl", "entropy")


def policy_counts(batch: Batch) -> dict[str, int]:
    """Counts of what `policy_metrics` gives and of the PTX term, and `tokens` and `sequences` of the policy."""
    ptx_T = batch.streams_T["ptx"] != 0
    tokens, sequences = tokens_where(batch, ~ptx_T), sequences_where(batch, ~ptx_T)
    return {
        "tokens": tokens,
        "sequences": sequences,
        "ptx": tokens_where(batch, ptx_T),
        "log_ratio": sequences,
        **dict.fromkeys(POLICY_TOKEN_METRICS, tokens),
    }


@torch.no_grad()
def policy_metrics(parts: Policy) -> dict[str, torch.Tensor]:
    """Sums of what every policy objective reports, see `kimi.py`; `mismatch_max` is a largest value."""
    delta_T, there_T = parts.delta_T, parts.weight_T != 0
    zero = delta_T.new_zeros(1)
    return {
        "mismatch": delta_T.abs().sum(),
        "mismatch_max": torch.cat([delta_T.abs(), zero]).max(),
        "log_ratio": parts.sums(delta_T).sum(),
        "kl": (torch.expm1(delta_T) - delta_T).sum(),
        "entropy": -torch.where(there_T, parts.logp_T, 0.0).sum(),
    }
