"""Kimi Delta Attention on CUDA through flash-linear-attention's Triton kernels, for packed documents and both gate forms.

The library's own entry builds the table of chunks on every call and tunes some kernels per number of tokens; here the tables are
built once per pack without waiting for the device, and unit vectors have a kernel of their own. States are per document, fp32.

Legend: `B` batch, `T` tokens, `H` heads, `D` head width, `S` documents, `M` chunks of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from k2lab.models import slower
from k2lab.models.kernels import kda_choices
from k2lab.models.pack import Pack

CHUNK = 64
VERSIONS = ("0.6",)  # of fla-core: the kernels below are its internals
SAFE_BOUND = -5.0  # gates in [-5, 0): the library's faster form of products within a chunk is exact enough
EXTRA = "pip install 'k2lab[gpu]'"


@slower.or_none("flash-linear-attention", f"Kimi Delta Attention takes the slower path of tensor operations. {EXTRA}")
def kernels() -> Any:
    """The library's kernels with the choices for this device. Raises ImportError for versions that were not tested."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
    from fla.ops.kda.chunk_bwd import chunk_kda_bwd_dAv
    from fla.ops.kda.chunk_fwd import chunk_kda_fwd
    from fla.ops.kda.gate import kda_gate_chunk_cumsum
    from fla.ops.kda.wy_fast import recompute_w_u_fwd
    from fla.ops.utils.constant import RCP_LN2

    from k2lab.models.kernels import kda_chunks_triton, kda_triton

    if not (found := version("fla-core")).startswith(VERSIONS):
        raise ImportError(f"fla-core {found} is not a tested version ({', '.join(VERSIONS)})")
    kda_choices.prime()
    return SimpleNamespace(
        forward=chunk_kda_fwd,
        cumulate_gate=kda_gate_chunk_cumsum,
        log2=RCP_LN2,
        solve=recompute_w_u_fwd,
        scan=chunk_gated_delta_rule_fwd_h,
        scan_backward=chunk_gated_delta_rule_bwd_dhu,
        inner_backward=chunk_kda_bwd_dAv,
        parts_backward=kda_chunks_triton.parts_backward,
        chunk_backward=kda_chunks_triton.chunk_backward,
        unit_forward=kda_triton.unit_forward,
    )


def takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """True if the kernels compute this; otherwise the slower path's reason has been said once."""
    if query.device.type != "cuda" or max(query.shape[-1], value.shape[-1]) > 256 or query.shape[-1] % 16 or value.shape[-1] % 16:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16):
        why = f"the kernels of Kimi Delta Attention would round products in {query.dtype} to tf32"
        slower.say(why, "the slower, exact path is taken; bfloat16 takes the fast one")
        return False
    return kernels() is not None


# ---------------------------------------------------------------- tables of a pack


@dataclass(frozen=True)
class Tables:
    """starts i32[S + 1]; chunks i32[M, 2]: document and number within it of each chunk; offsets i32[S + 1]: first chunk of each
    document."""

    starts: torch.Tensor
    chunks: torch.Tensor
    offsets: torch.Tensor


def tables(pack: Pack, chunk: int = CHUNK) -> Tables:
    """Kept on the pack, because every layer needs the same. One copy to the device, which nothing waits for."""
    known = pack.__dict__.setdefault("_kda_tables", {})
    if chunk not in known:
        starts = torch.tensor(pack.starts, dtype=torch.int32)
        counts = (starts.diff() + (chunk - 1)).div(chunk, rounding_mode="floor")
        offsets = torch.zeros_like(starts)
        offsets[1:] = counts.cumsum(0)
        S = len(counts)
        document = torch.arange(S, dtype=torch.int32).repeat_interleave(counts)
        number = torch.arange(len(document), dtype=torch.int32) - offsets[:-1].repeat_interleave(counts)
        # 16-byte alignment of each part keeps triton from compiling a second version of every kernel
        parts = [starts, torch.stack([document, number], 1).flatten(), offsets]
        places = [0]
        for part in parts:
            places.append(places[-1] + -(-len(part) // 4) * 4)
        table = torch.zeros(places[-1], dtype=torch.int32)
        for place, part in zip(places, parts):
            table[place : place + len(part)] = part
        if pack.device.type == "cuda":
            table = table.pin_memory().to(pack.device, non_blocking=True)
        a, b, c = (table[place : place + len(part)] for place, part in zip(places, parts))
        known[chunk] = Tables(a, b.view(-1, 2), c)
    return known[chunk]


# ---------------------------------------------------------------- the function


@dataclass(frozen=True)
class Options:
    """`raw`: g is the gate's input z, not the log-decay; `lower_bound` and `bounded` as in `gated_kda` and `chunk_kda`; `keep`:
    keep what the backward pass would otherwise compute again."""

    tables: Tables
    units: bool
    want_state: bool
    raw: bool = False
    lower_bound: float | None = None
    bounded: bool = False
    keep: bool = False
    chunk: int = CHUNK

    def where(self, offsets: bool = False) -> dict[str, Any]:
        """How a kernel finds the chunks."""
        found = {"cu_seqlens": self.tables.starts, "chunk_indices": self.tables.chunks, "chunk_size": self.chunk}
        return {**found, "chunk_offsets": self.tables.offsets} if offsets else found


class KDA(torch.autograd.Function):
    """query, key, g [1, T, H, D], value [1, T, H, V], beta f32[1, T, H], log_rate [H], bias [H D], state f32[S, H, D, V] ->
    (out [1, T, H, V], final states f32[S, H, D, V] or None)."""

    @staticmethod
    def forward(ctx, query, key, value, g, beta, log_rate, bias, state, options):
        found = kernels()
        ctx.set_materialize_grads(False)
        q, k, v, g, beta = (x.contiguous() for x in (query, key, value, g, beta))
        q_scale = k_scale = None
        with torch.cuda.device_of(q):
            if options.units:
                q, q_scale = found.unit_forward(q)
                k, k_scale = found.unit_forward(k)
            out, final, cumulated, Aqk, Akk, w, _, qg, kg, v_new, h, _ = found.forward(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                scale=q.shape[-1] ** -0.5,
                initial_state=state,
                output_final_state=options.want_state,
                use_gate_in_kernel=options.raw,
                A_log=log_rate,
                dt_bias=bias,
                lower_bound=options.lower_bound,
                safe_gate=options.bounded,
                disable_recompute=options.keep,
                **options.where(True),
            )
        raw, given = (g, None) if options.raw else (None, cumulated)
        ctx.save_for_backward(q, q_scale, k, k_scale, v, given, raw, beta, log_rate, bias, Aqk, Akk, state)
        # Neither inputs nor outputs; not among the saved tensors so that the backward pass can let go of each after its last use.
        ctx.kept = (cumulated, w, qg, kg, v_new, h) if options.keep else None
        ctx.options, ctx.g_dtype = options, g.dtype
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_final):
        q, q_scale, k, k_scale, v, given, raw, beta, log_rate, bias, Aqk, Akk, state = ctx.saved_tensors
        found, options, scale = kernels(), ctx.options, q.shape[-1] ** -0.5
        where = options.where()
        grad_out = torch.zeros_like(v) if grad_out is None else grad_out.contiguous()
        if grad_final is None and state is not None:
            grad_final = torch.zeros_like(state)
        with torch.cuda.device_of(q):
            kept, ctx.kept = ctx.kept, None
            g, w, qg, kg, v_new, h = kept or _again(found, options, q, k, v, given, raw, beta, log_rate, bias, Akk, state)
            del kept
            grad_Aqk, grad_v = found.inner_backward(q=q, k=k, v=v_new, do=grad_out, A=Aqk, scale=scale, **where)
            grad_h, grad_state, grad_v = found.scan_backward(
                q=qg, k=kg, w=w, gk=g, h0=state, dht=grad_final, do=grad_out, dv=grad_v, scale=scale, **options.where(True)
            )
            del w, qg, kg
            table = (options.tables.starts, options.tables.chunks, options.chunk)
            *grads, grad_v, grad_Akk = found.parts_backward(q, k, v, v_new, g, beta, Akk, h, grad_out, grad_h, grad_v, *table)
            del v_new, h, grad_h
            scales = (q_scale, k_scale) if options.units else None
            gate = (raw, log_rate, bias) if options.raw else None
            grad_q, grad_k, grad_g, grad_beta, grad_rate, grad_bias = found.chunk_backward(
                q, k, g, beta, grad_Aqk, grad_Akk, grads, scales, gate, options.lower_bound, *table
            )
        return (
            grad_q.to(q.dtype),
            grad_k.to(k.dtype),
            grad_v.to(v.dtype),
            grad_g.to(ctx.g_dtype),
            grad_beta.to(beta.dtype),
            grad_rate,
            grad_bias,
            grad_state,
            None,
        )


def _again(found, options, q, k, v, given, raw, beta, log_rate, bias, Akk, state):  # type: ignore[no-untyped-def]
    """What the forward pass had and did not keep: cumulated gates, solved keys, keys and queries with their decays, corrected
    values and the state before each chunk."""
    where = options.where()
    if options.raw:
        gate = {"A_log": log_rate, "dt_bias": bias, "lower_bound": options.lower_bound}
        given = found.cumulate_gate(g=raw, scale=found.log2, **gate, **where)
    table = {"cu_seqlens": options.tables.starts, "chunk_indices": options.tables.chunks}
    w, u, qg, kg = found.solve(q=q, k=k, v=v, beta=beta, A=Akk, gk=given, **table)
    h, v_new, _ = found.scan(k=kg, w=w, u=u, gk=given, initial_state=state, **options.where(True))
    return given, w, qg, kg, v_new, h


def _packed(B: int, T: int, pack: Pack | None, device: torch.device) -> Pack:
    pack = pack if pack is not None else Pack.rows(B, T, device)
    assert pack.num_tokens == B * T, "a pack describes exactly the tokens that are there"
    return pack


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = CHUNK,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    pack: Pack | None = None,
    bounded: bool = False,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `kda.chunk_kda`, by the library's kernels; chunk_size is 32 or 64. With `bounded` the caller says that every g lies in
    [-5, 0], for which there is a faster form."""
    B, T = key.shape[:2]
    pack = _packed(B, T, pack, key.device)
    options = Options(
        tables(pack, chunk_size), use_qk_l2norm_in_kernel, output_final_state, bounded=bounded, keep=keep, chunk=chunk_size
    )
    flat = [x.reshape(1, B * T, *x.shape[2:]) for x in (query, key, value, g, beta)]
    state = None if initial_state is None else initial_state.float().contiguous()
    out, final = KDA.apply(*flat, None, None, state, options)
    return out.view(B, T, *out.shape[2:]), final


def gated_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    z: torch.Tensor,
    beta: torch.Tensor,
    log_rate: torch.Tensor,
    bias: torch.Tensor,
    lower_bound: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    pack: Pack | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda` on unit queries and keys with the decay gate of `kda.decay_gate` computed within: z [B, T, H, D] is its input,
    log_rate (H numbers) and bias (H D numbers) its parameters."""
    B, T = key.shape[:2]
    pack = _packed(B, T, pack, key.device)
    safe = lower_bound is not None and SAFE_BOUND <= lower_bound < 0
    options = Options(tables(pack), True, output_final_state, raw=True, lower_bound=lower_bound, bounded=safe, keep=keep)
    flat = [x.reshape(1, B * T, *x.shape[2:]) for x in (query, key, value, z, beta)]
    state = None if initial_state is None else initial_state.float().contiguous()
    out, final = KDA.apply(*flat, log_rate.reshape(-1), bias.reshape(-1), state, options)
    return out.view(B, T, *out.shape[2:]), final
