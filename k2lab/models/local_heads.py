"""Heads that look a fixed number of tokens back from the first step on.

A small model spends most of a short run on finding its neighbours, because a head can tell positions apart only through a
direction that all tokens share, and at the usual random start there is none. Here the embeddings get one (the vector u below),
and the first heads of layer 0 turn it into rotary queries and keys whose score peaks at the wanted distance. Nothing is fixed:
these are initial values, trained like all others. A form of mimetic initialization (arXiv 2305.09828) for latent attention.

With x the normalised input, x . u-hat = sqrt(D / 2). Shared key part: k_i = KEY on the real axis of each rotary pair i whose
angle per token f_i is at least SLOWEST; query of head h: q_i = exp(-i f_i distance_h) times what makes one pair's logit PAIR at
its peak. Rotated by their places, their score is PAIR x sum_i cos(f_i (distance - distance_h)). Slower pairs are left out: they
would only add a constant to all distances. (YaRN leaves quick pairs nearly as they are, so they are taken unscaled there, too.)

Dense models with attention biases (Qwen2) need no shared direction: the same queries and keys are written into the biases. Their
rotary pairs are dimensions i and i + R/2.

Legend: `D` hidden width, `Q` query rank, `N` no-position width, `R` rotary width, `H` heads, `G` key-value heads.
"""

from __future__ import annotations

import math

import torch

from k2lab.core.rng import rng
from k2lab.specs import ModelSpec

KEY = 2.1  # length of each rotary pair of the shared key
PAIR = 1.1  # logit that one pair contributes at the wanted distance
SLOWEST = 1 / 64  # radians per token


@torch.no_grad()
def begin(tensor: torch.Tensor, name: str, seed: int, spec: ModelSpec) -> None:
    """Adds the local heads of `spec.local_heads` to a freshly drawn parameter, in place; other parameters stay as they are."""
    if spec.family == "dense":
        _begin_biases(tensor, name, spec)
        return
    D, Q, N, R = spec.hidden_size, spec.q_lora_rank, spec.qk_nope_head_dim, spec.qk_rope_head_dim
    u_D = torch.from_numpy(rng(seed, "init", "local_heads").standard_normal(D)).to(tensor)
    along_D = u_D / u_D.norm()
    shared = math.sqrt(D / 2)  # x . u-hat where u is as long as what tells tokens apart
    if name == "model.embed_tokens.weight":
        tensor += spec.initializer_range * u_D
        return
    if not name.startswith("model.layers.0.self_attn."):
        return
    f, used = _turns(spec.rope_theta, R)
    query = PAIR * math.sqrt(N + R) / KEY
    part = name.rsplit(".", 2)[-2]
    if part == "kv_a_proj_with_mqa":
        real = torch.zeros(R, dtype=torch.float64)
        real[0::2] = used * KEY / shared
        tensor[spec.kv_lora_rank :] += real.to(tensor)[:, None] * along_D
    elif part == "q_a_proj":
        tensor[0] = along_D  # one feature that all tokens share; the norm after it makes `feature` of it (see below)
    elif part in ("q_b_proj", "q_proj"):
        rows = tensor.view(spec.num_attention_heads, N + R, -1)
        for head, distance in enumerate(spec.local_heads):
            pairs = torch.polar(used * query, -f * distance)
            turned = torch.view_as_real(pairs).flatten().to(tensor)
            if part == "q_proj":
                rows[head, N:] += (turned / shared)[:, None] * along_D
            else:
                assert Q is not None
                spread = D * spec.initializer_range**2  # variance of the other features before the norm
                feature = shared / math.sqrt((shared**2 + (Q - 1) * spread) / Q)
                rows[head, N:, 0] = turned / feature


def _turns(theta: float, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(angle per token of each rotary pair [R/2], 1 for those that are used and 0 for those too slow), fp64."""
    f = theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    return f, (f >= SLOWEST).to(f)


def _begin_biases(tensor: torch.Tensor, name: str, spec: ModelSpec) -> None:
    """The same for queries and keys that are biases of layer 0: [H R] and [G R]."""
    R = spec.head_dim
    f, used = _turns(spec.rope_theta, R)
    if name == "model.layers.0.self_attn.k_proj.bias":
        tensor.view(-1, R)[:, : R // 2] += (used * KEY).to(tensor)
    elif name == "model.layers.0.self_attn.q_proj.bias":
        rows = tensor.view(-1, R)
        for head, distance in enumerate(spec.local_heads):
            pairs = torch.polar(used * PAIR * math.sqrt(R) / KEY, -f * distance)
            rows[head] += torch.cat([pairs.real, pairs.imag]).to(tensor)
