"""What autograd keeps of each part of a model, and which parts to compute again instead: rules of shapes alone.

Legend: `D` width, `H` heads, `N` no-position head width, `R` rotary head width, `V` value head width, `Q` query latent,
`L` key-value latent, `K` experts per token, `F` expert hidden width, `d` KDA head width, `P` KDA channels.
"""

from __future__ import annotations

from k2lab.specs.spec import ModelSpec

KDA_MEMORY_CHUNK = 32  # chunk length of our KDA


def activation_bytes(spec: ModelSpec, element: int = 4) -> dict[str, float]:
    """Bytes per token that autograd keeps for the backward pass with checkpointing off, by part of the model. `element` is the
    size of the weights' type; what our modules keep in fp32 in any case is counted with 4 bytes (marked *). It follows our
    kernels for packs on the CPU in fp32; in bf16, and on a GPU, where other kernels run, it is an estimate. Packing changes
    nothing here (a pack is one sequence of its length), but that KDA pads every document to whole chunks of C = 32. Copies that
    do not grow with tokens are left out, and attention probabilities are a term of their own (`probability_bytes`).

    embedding                  8 token id
    rotation                   2 d cosines and sines, once for all layers; only with ordinary attention
    norm of width n            (n + 1)* normalised and scale, n output
    MLA                        norm(D) + norm(Q) if queries are compressed + norm(L) + 2 H (N+R) queries and keys
                               + H (N+V) expanded + H V output + R* rotation (none without positions)
    ordinary attention         norm(D) + 3 H d queries, keys and values (repeated to all heads) + H d output
    KDA                        norm(D) + 7 P inputs and sums of three convolutions, and output, P = heads x d channels
                               + 2 d low-rank gates + heads rates
                               + 18 P*: 2 decay gate, 2 unit queries and keys, 5 exponentials and what they multiply, 2 sides
                               and 2 solutions of the triangular systems, 3 of the scan over chunks and its output, 2 gated norm
                               + heads (3 C among a chunk's positions, d^2 / C states, 3 d / C decays of chunks, 5 scales)*
    MLP of width n             norm(D) + 3 n: gate, up, product; 4 n in dense models, where silu(gate) is kept, too
    experts                    norm(D) + 2 K F gate and up + 3 F per shared expert + router (`_router_bytes`)
    end                        norm(D) after the last layer
    """
    D, H = spec.hidden_size, spec.num_attention_heads

    def norm(width: int) -> float:
        return 4 * (width + 1) + element * width

    parts: dict[str, float] = {"embedding": 8}
    mla = len(spec.layers_of("mla"))
    if mla:
        wide = 2 * H * spec.qk_head_dim + H * (spec.qk_nope_head_dim + spec.v_head_dim) + H * spec.v_head_dim
        latents = norm(spec.kv_lora_rank) + (norm(spec.q_lora_rank) if spec.q_lora_rank else 0)
        parts["mla"] = mla * (norm(D) + latents + element * wide + (0 if spec.nope else 4 * spec.qk_rope_head_dim))
    full = len(spec.layers_of("attention"))
    if full:
        parts["rotation"] = 2 * spec.head_dim * element
        parts["attention"] = full * (norm(D) + 4 * H * spec.head_dim * element)
    kda = len(spec.layers_of("kda"))
    if kda:
        heads, d, C = spec.linear_num_heads, spec.linear_head_dim, KDA_MEMORY_CHUNK
        inside = 18 * heads * d + heads * (3 * C + d * d / C + 3 * d / C + 5)
        parts["kda"] = kda * (norm(D) + element * (7 * heads * d + 2 * d + heads) + 4 * inside)
    moe = len(spec.moe_layers())
    dense = spec.num_layers - moe
    if dense:
        parts["mlp"] = dense * (norm(D) + element * (4 if spec.family == "dense" else 3) * spec.intermediate_size)
    if moe:
        F, K = spec.moe_intermediate_size, spec.num_experts_per_tok
        parts["experts"] = moe * (norm(D) + element * F * (2 * K + 3 * spec.n_shared_experts) + _router_bytes(spec, element))
    parts["end"] = norm(D)
    return parts


def _router_bytes(spec: ModelSpec, element: int) -> float:
    """Bytes per token that one router and the sorting of tokens by expert keep:

    E* scores + K i64 chosen + 2 K i64 token and place in sorted order + K sorted weights + (K + 1)* weights and their sum where
    these are normalised + D* the input in fp32 where it is not fp32 already
    """
    K = spec.num_experts_per_tok
    normalised = 4 * (K + 1) if spec.norm_topk_prob else 0
    copied = 4 * spec.hidden_size if element < 4 else 0
    return 4 * spec.n_routed_experts + 3 * 8 * K + element * K + normalised + copied
