"""What serve_parity.py needs of our side: a small checkpoint, prompts, and our own log-probabilities.

Legend: `T` packed tokens, `D` width, `W` vocabulary.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from k2lab.ckpt.folder import open_folder
from k2lab.core.rng import rng
from k2lab.core.types import Batch, Message
from k2lab.models import build
from k2lab.specs import ModelSpec
from k2lab.text import chat, tokenizer

# Kimi K2's parts and head geometry (latent 512 + 64 is the only one that vLLM's portable CPU kernel knows), YaRN included, on a
# model of 11 M parameters.
SPEC = ModelSpec(
    name="served-k2",
    family="kimi_k2",
    hidden_size=256,
    num_layers=4,
    vocab_size=4096,
    intermediate_size=512,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    routed_scaling_factor=2.0,
    num_attention_heads=4,
    q_lora_rank=256,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=50000.0,
    rope={
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    max_position_embeddings=512,
    initializer_range=0.03,
)
MESSAGES = [
    {"role": "system", "content": "You answer in one line."},
    {"role": "user", "content": "What does `math.isqrt` do?\n  Say it briefly."},
    {"role": "assistant", "content": "The integer square root."},
    {"role": "user", "content": "Of what? And naïve Bayes is 贝叶斯?"},
]


class Scored(NamedTuple):
    """Of an answer's tokens: our log p, the token that we would have chosen there, and the narrowest decision of any router on
    the way there (`router_gaps`); f64[n], i64[n], f32[n]."""

    logp: np.ndarray
    best: np.ndarray
    gap: np.ndarray


def docstrings() -> list[str]:
    """Module docstrings of this Python's standard library, by file name."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text:
            found.append(text)
    return found


def make(folder: Path, seed: int = 1, **changes: Any) -> None:
    """A checkpoint in fp32 with a tokenizer trained on the standard library. Random weights, but every layer matters, router
    biases are not zero and the head is sharp: an entropy of 5 to 6 nats over 4,096 tokens."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))]
    words = tokenizer.train_bpe(texts, SPEC.vocab_size)
    spec = SPEC.replace(bos_token_id=words.bos_id, eos_token_id=words.im_end_id, pad_token_id=words.pad_id, **changes)
    model = build.from_spec(spec, seed=seed)
    with torch.no_grad():
        model.head().mul_(5.0)
        for name, router in model.routers().items():
            draw = rng(seed, "bench", name).standard_normal(spec.n_routed_experts, dtype=np.float32)
            router.e_score_correction_bias.copy_(torch.from_numpy(0.05 * draw))
    build.save(model, folder)
    words.save(folder)


def prompts(folder: Path, count: int) -> list[list[int]]:
    """`count` beginnings of docstrings, 12, 20, 28 or 36 tokens long (several of a length, for engines that cannot pad)."""
    words = tokenizer.load(folder)
    found: list[list[int]] = []
    for ids in words.encode_batch(docstrings()):
        length = 12 + 8 * (len(found) % 4)
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == count:
            return found
    raise SystemExit(f"the standard library has docstrings for {len(found)} prompts only")


def our_chat(folder: Path) -> tuple[list[int], int]:
    """The tokens of MESSAGES with the header of an answer, and the token that ends a turn."""
    words = tokenizer.load(folder)
    messages = [Message.text(each["role"], each["content"]) for each in MESSAGES]
    return chat.render(messages, words, add_generation_prompt=True).tokens, words.im_end_id


def load(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """Our model of an exported folder, whatever its format."""
    return build.load(open_folder(folder), dtype=getattr(torch, dtype), device=device).eval()


@contextmanager
def router_gaps(model: Any) -> Iterator[list[torch.Tensor]]:
    """Per router f32[T]: by how much the last chosen expert of a token is ahead of the first that was not chosen."""
    found: list[torch.Tensor] = []

    def note(router: Any, _: Any, out: tuple[torch.Tensor, ...]) -> None:
        scores_TE = out[0].sigmoid() + router.e_score_correction_bias
        best = scores_TE.topk(router.top_k + 1, dim=-1)[0]
        found.append(best[:, -2] - best[:, -1])

    hooks = [router.register_forward_hook(note) for router in model.routers().values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def score(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """What our model makes of each (prompt, answer)."""
    sequences = [prompt + answer for prompt, answer in rows]
    starts = np.cumsum([0, *(len(each) for each in sequences)])
    tokens_T = torch.tensor([token for each in sequences for token in each])
    positions_T = torch.cat([torch.arange(len(each)) for each in sequences])
    with router_gaps(model) as gaps:
        hidden_TD = model.hidden(Batch(tokens_T, None, None, positions_T, torch.from_numpy(starts)))
    gap_T = torch.stack(gaps).amin(0).cpu().numpy()
    weight_WD = model.head()
    found = []
    for (prompt, answer), start, end in zip(rows, starts, starts[1:]):
        first = len(prompt) - 1
        logits = (hidden_TD[start + first : end - 1] @ weight_WD.T).float()
        chosen = torch.tensor(answer, device=logits.device)
        logp = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        # what a token's router does matters to all later tokens
        nearest = np.minimum.accumulate(gap_T[start : end - 1])[first:]
        found.append(Scored(logp.double().cpu().numpy(), logits.argmax(-1).cpu().numpy(), nearest))
    return found


def experts_apart(folder: Path, file: Path) -> tuple[int, int]:
    """(values that are not equal, values) between the experts that an engine multiplied by (`_engine_marlin.write`) and what our
    reader decodes from the folder, in bf16, bit by bit."""
    source, served = open_folder(folder), load_file(file)
    spec = ModelSpec.from_config(source.config())
    apart = number = 0
    for place, layer in enumerate(spec.moe_layers()):
        for expert in range(spec.n_routed_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            gate, up, down = (source.read(f"{prefix}{name}_proj.weight").bfloat16() for name in ("gate", "up", "down"))
            pairs = ((torch.cat([gate, up]), served[f"gate_up.{place}"][expert]), (down, served[f"down.{place}"][expert]))
            for ours, theirs in pairs:
                # -0 and 0 are one number
                apart += int(((ours + 0.0).view(torch.int16) != (theirs + 0.0).view(torch.int16)).sum())
                number += ours.numel()
    return apart, number


def environment() -> dict[str, str]:
    """For engines: no network, and one place for their caches."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
