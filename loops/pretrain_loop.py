"""Pretraining a small Kimi-K2-shaped model in one flat file: no k2lab, only torch and transformers.

This is documentation that runs. It shows every idea of `k2 run tiny`'s pretraining stage where you can see all of it at once:
packed documents, MuonClip (Muon, AdamW for the rest, QK-Clip), the aux-loss-free router bias, a WSD schedule, bits per byte.
What it leaves out, and the library has: resume, several processes, fast kernels, a trained tokenizer, a report.

    python loops/pretrain_loop.py --steps 60              # the standard library's language reference, bytes as tokens
    python loops/pretrain_loop.py my.txt other.txt        # your own text, one document a file
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BOS, EOS, VOCAB = 256, 257, 320  # bytes, two marks, and room up to a multiple of 64
TAU = 100.0  # QK-Clip: no scaled attention logit of any head may stay above this


# ---------------------------------------------------------------- data: documents -> rows of exactly seq_len + 1 tokens


def documents(paths: list[str]) -> list[bytes]:
    if paths:
        return [Path(path).read_bytes() for path in paths]
    from pydoc_data import topics  # on every machine that has Python

    return [text.encode() for _, text in sorted(topics.topics.items())]


def rows(docs: list[bytes], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents laid end to end and cut into rows; `doc_ids` says which document each token belongs to."""
    tokens, ids = [], []
    for number, text in enumerate(docs):
        tokens += [BOS, *text, EOS]
        ids += [number] * (len(text) + 2)
    count = (len(tokens) - 1) // seq_len
    starts = range(0, count * seq_len, seq_len)
    return (
        torch.tensor([tokens[s : s + seq_len + 1] for s in starts]),
        torch.tensor([ids[s : s + seq_len + 1] for s in starts]),
    )


# ---------------------------------------------------------------- model: transformers' own classes, with one attention function


max_logits: dict[int, torch.Tensor] = {}  # layer -> largest scaled logit per head since the last clear()


def attention_with_maxima(module, query, key, value, attention_mask, scaling, **kwargs):
    """Plain attention [B, H, T, d] that also notes each head's largest logit, which QK-Clip needs."""
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    if module.training:
        seen = scores.detach().amax(dim=(0, 2, 3))
        old = max_logits.get(module.layer_idx, seen)
        max_logits[module.layer_idx] = torch.maximum(old, seen)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def build_model(seed: int) -> DeepseekV3ForCausalLM:
    ALL_ATTENTION_FUNCTIONS.register("with_maxima", attention_with_maxima)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        q_lora_rank=128,
        kv_lora_rank=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        max_position_embeddings=4096,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config)
    model.set_attn_implementation("with_maxima")
    model.set_experts_implementation("grouped_mm")  # sorts tokens by expert; the default is many times slower on a CPU
    return model


def document_mask(doc_ids: torch.Tensor) -> torch.Tensor:
    """True where a query may look: backwards, and only inside its own document."""
    length = doc_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]


def loss_sum(model, tokens: torch.Tensor, doc_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed nats, number of predicted tokens). A document's first token is never predicted from another document."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    same = doc_ids[:, :-1] == doc_ids[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    logits = model(input_ids=inputs, attention_mask=document_mask(doc_ids[:, :-1]), position_ids=positions).logits
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (nats * same).sum(), same.sum()


# ---------------------------------------------------------------- optimizer: Muon for matrices, AdamW for the rest, QK-Clip


def newton_schulz(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of g [..., rows, cols] (quintic iteration of Keller Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


def split_parameters(model) -> tuple[dict, dict]:
    """Muon: 2-D matrices and stacked experts [E, out, in]. AdamW: embedding, head, norms."""
    muon, adamw = {}, {}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name
        (muon if matrix else adamw)[name] = parameter
    return muon, adamw


@torch.no_grad()
def muon_step(muon: dict, momentum: dict, lr: float, mu: float = 0.95, decay: float = 0.1) -> None:
    for name, parameter in muon.items():
        m = momentum.setdefault(name, torch.zeros_like(parameter))
        m.mul_(mu).add_(parameter.grad)
        update = parameter.grad + mu * m  # Nesterov
        # An expert's gate and up projections are stored as one tensor and are two matrices.
        halves = update.chunk(2, dim=1) if name.endswith("gate_up_proj") else (update,)
        for view, half in zip(parameter.chunk(len(halves), dim=1 if len(halves) == 2 else 0), halves, strict=True):
            # 0.2 * sqrt(max(rows, cols)) gives the update the root mean square of an AdamW update.
            scale = 0.2 * math.sqrt(max(half.shape[-2:]))
            view.mul_(1 - lr * decay).add_(newton_schulz(half), alpha=-lr * scale)


@torch.no_grad()
def qk_clip(model) -> int:
    """Scales the query and key rows of heads whose logits exceeded TAU, so that the same inputs would give TAU; heads clipped."""
    config, clipped = model.config, 0
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    for layer, maxima in max_logits.items():
        attention = model.model.layers[layer].self_attn
        q = attention.q_b_proj.weight.view(config.num_attention_heads, nope + rope, -1)
        kv = attention.kv_b_proj.weight.view(config.num_attention_heads, nope + v, -1)
        for head, value in enumerate(maxima.tolist()):
            if value > TAU:
                gamma = TAU / value
                q[head, :nope] *= gamma**0.5
                kv[head, :nope] *= gamma**0.5
                q[head, nope:] *= gamma  # the rotary key is shared by all heads and stays untouched
                clipped += 1
    max_logits.clear()
    return clipped


def wsd(step: int, total: int, warmup: int = 10, decay: float = 0.4) -> float:
    """Warm up, stay, decay to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / (decay * total)))


# ---------------------------------------------------------------- router bias: balance experts without an auxiliary loss


def count_experts(model) -> dict:
    counts: dict = {}

    def hook(module, args, output):
        if module.training:
            counts[module] = counts.get(module, 0) + torch.bincount(output[2].flatten(), minlength=module.num_experts)

    for module in model.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.register_forward_hook(hook)
    return counts


@torch.no_grad()
def update_router_bias(counts: dict, rate: float = 1e-3) -> None:
    """Experts with more tokens than the mean become a little less likely to be chosen, and the other way round."""
    for router, tokens in counts.items():
        bias = router.e_score_correction_bias
        bias += rate * torch.sign(tokens.float().mean() - tokens)
        bias -= bias.mean()
    counts.clear()


# ---------------------------------------------------------------- the loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", help="text files; none = Python's language reference")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    docs = documents(args.paths)
    held_out = docs[::20] if len(docs) >= 20 else docs[-1:]
    train = [doc for doc in docs if doc not in held_out] or docs
    tokens, ids = rows(train, args.seq_len)
    valid_tokens, valid_ids = rows(held_out, args.seq_len)
    model = build_model(args.seed)
    muon, adamw = split_parameters(model)
    momentum: dict = {}
    optimizer = torch.optim.AdamW(adamw.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    counts = count_experts(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {tokens.numel() / 1e6:.2f} M training tokens")

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            total, number = loss_sum(model, valid_tokens[:16], valid_ids[:16])
        model.train()
        return float(total / number) / math.log(2)

    print(f"bits per byte before: {validate():.3f}")
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(args.seed))
    began = time.perf_counter()
    model.train()
    for step in range(args.steps):
        chosen = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        total, number = loss_sum(model, tokens[chosen], ids[chosen])
        loss = total / number
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = args.lr * wsd(step, args.steps)
        muon_step(muon, momentum, lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        highest = max(float(values.max()) for values in max_logits.values())
        clipped = qk_clip(model)
        update_router_bias(counts)
        model.zero_grad(set_to_none=True)
        if step % 10 == 9 or step + 1 == args.steps:
            rate = (step + 1) * args.batch * args.seq_len / (time.perf_counter() - began)
            print(
                f"step {step + 1:4d}  loss {loss:.4f}  norm {norm:.3f}  lr {lr:.2e}  max logit {highest:.1f}"
                f"  clipped {clipped}  {rate:,.0f} tok/s"
            )
    print(f"bits per byte after: {validate():.3f}")


if __name__ == "__main__":
    main()
