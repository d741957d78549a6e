"""Absorbed decoding for multi-head latent attention: attend to the cached latents instead of expanding them at every step.

With k_t = W_k c_t and v_t = W_v c_t, q . k_t = (W_k^T q) . c_t and sum_t p_t v_t = W_v sum_t p_t c_t (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2). For one query per row this replaces the expansion of all T cached latents, T*L*H*(N+V)
multiply-adds, by two products with the query and the output, L*H*(N+V). The function is the same; rounding differs.

Axes: B rows, T cached tokens, H heads, N no-position head width, R rotary head width, V value head width, L latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

IMPLEMENTATION = "k2lab_absorbed"


@contextmanager
def absorbed_decoding(model: Any, enabled: bool = True) -> Iterator[bool]:
    """Within this context, single-token forwards of `model` with a cache use absorbed attention; yields whether they do.

    Applies if every latent-attention layer of the model is transformers' own class or derives from it (its cache holds normalised
    latents and rotated keys, and `expand_kv` turns them into keys and values) with a plain linear expansion; other models are
    left as they are. Prefill must happen outside of this context.
    """
    layers = _latent_layers(model) if enabled else []
    if not layers:
        yield False
        return
    _register()
    config = layers[0].config
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    for layer in layers:
        layer.expand_kv = _keep_latents  # shadows the class's method
    try:
        yield True
    finally:
        for layer in layers:
            del layer.expand_kv
        config._attn_implementation = before


def _latent_layers(model: Any) -> list[Any]:
    layers = [module for module in model.modules() if hasattr(module, "kv_b_proj")]
    for layer in layers:
        known = any("expand_kv" in vars(cls) and cls.__module__.startswith("transformers.models.") for cls in type(layer).__mro__)
        # More parameters than a weight (a bias, an adapter) would be left out by the folding.
        plain = isinstance(layer.kv_b_proj, nn.Linear) and [name for name, _ in layer.kv_b_proj.named_parameters()] == ["weight"]
        hooked = layer.kv_b_proj._forward_hooks or layer.kv_b_proj._forward_pre_hooks
        if not known or not plain or hooked or layer.config is not layers[0].config:
            return []
    return layers


def _keep_latents(latents_B1TL: torch.Tensor, rotary_B1TR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_B1TR, latents_B1TL


def _attend(
    module: Any,
    query_BHQC: torch.Tensor,
    rotary_B1TR: torch.Tensor,
    latents_B1TL: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query per row over latents; the signature is that of transformers' attention registry.

    `query_BHQC` [B, H, 1, N + R]; mask bool [B, 1, 1, T] (True = attend) or None. Returns [B, 1, H, V].
    """
    assert query_BHQC.shape[2] == 1, "absorbed attention decodes one token at a time"
    assert latents_B1TL.shape[1] == 1 and latents_B1TL.shape[-1] == module.kv_lora_rank, "the cache must hold latents"
    latents_BTL, rotary_BTR = latents_B1TL[:, 0], rotary_B1TR[:, 0]
    num_nope, num_v = module.qk_nope_head_dim, module.v_head_dim
    weight_HCL = module.kv_b_proj.weight.view(-1, num_nope + num_v, module.kv_lora_rank)
    query_BHC = query_BHQC[:, :, 0]
    query_BHL = torch.matmul(query_BHC[..., :num_nope].transpose(0, 1), weight_HCL[:, :num_nope]).transpose(0, 1)
    scores_BHT = query_BHL @ latents_BTL.transpose(1, 2) + query_BHC[..., num_nope:] @ rotary_BTR.transpose(1, 2)
    scores_BHT = scores_BHT.float() * scaling
    if attention_mask is not None:
        scores_BHT = scores_BHT.masked_fill(~attention_mask[:, 0], float("-inf"))
    probs_BHT = scores_BHT.softmax(dim=-1).to(latents_BTL.dtype)
    mixed_BHL = probs_BHT @ latents_BTL
    out_HBV = torch.matmul(mixed_BHL.transpose(0, 1), weight_HCL[:, num_nope:].transpose(1, 2))
    return out_HBV.transpose(0, 1)[:, None], None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
