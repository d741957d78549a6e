"""cuDNN's fused attention over packed documents, through NVIDIA's package `nvidia-cudnn-frontend` (imported lazily).

A document is an entry of a ragged batch: offsets into the packed tensors and lengths are read on the device, so documents of any
lengths share a plan. A plan (what cuDNN compiles for a shape) costs tens of milliseconds to build and is kept; it depends on
`Ragged.num_documents` and `Ragged.longest`, which are rounded up, and on strides, so values and their gradients may be parts of
wider tensors. Rows of one length take a plan of their own without offsets (`Ragged.even`), whose backward pass is a third faster.
The forward pass also gives the largest logit of every query, from registers, which costs next to nothing.

Legend: `T` packed tokens, `S` documents (empty ones at the end fill a plan's number), `H` heads, `C` query and key width,
`V` value width.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from k2lab.models.pack import Ragged

# First versions with packed layouts, unequal head widths and score maxima all together that were tested here.
MIN_BACKEND = 91900
# A plan has room for tokens in steps of this, so packs that are not quite full share one.
ROOM = 4096

_Q, _K, _V, _O, _LSE, _MAX, _SUM, _GRAD_O, _GRAD_Q, _GRAD_K, _GRAD_V = range(1, 12)
_LENGTHS, _AT_QK, _AT_K, _AT_V, _AT_O, _AT_ROW, _AT_GRAD_O, _AT_GRAD_V = range(12, 20)
_lock = threading.Lock()


@cache
def frontend() -> ModuleType | None:
    """The package, or None if it or a cuDNN of at least `MIN_BACKEND` is missing."""
    try:
        import cudnn

        return cudnn if cudnn.backend_version() >= MIN_BACKEND else None
    except (ImportError, OSError, RuntimeError):  # the package, or the library that it opens
        return None


@cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return frontend().create_handle()


@dataclass(frozen=True)
class Shape:
    """What a plan depends on. `strides`: (token, head) of q, k, v, out and, backwards, of the gradients of out and v."""

    device: int
    even: bool
    documents: int
    longest: int
    tokens: int
    heads: int
    qk: int
    v: int
    dtype: torch.dtype
    scale: float
    wide: bool
    strides: tuple[tuple[int, int], ...]
    flag: bool


class _Plan:
    """A built graph and the bytes that it needs beside its tensors."""

    def __init__(self, shape: Shape) -> None:
        self.cudnn, self.shape, self.handle = frontend(), shape, _handle(shape.device)
        kinds = {torch.bfloat16: self.cudnn.data_type.BFLOAT16, torch.float16: self.cudnn.data_type.HALF}
        single = self.cudnn.data_type.FLOAT
        self.graph = self.cudnn.pygraph(
            io_data_type=kinds[shape.dtype], intermediate_data_type=single, compute_data_type=single, handle=self.handle
        )
        self.kind, self.single = kinds[shape.dtype], single
        self.at: dict[int, Any] = {}

    def offsets(self, uid: int) -> Any:
        """First element of every document, [S + 1]."""
        if uid not in self.at:
            kind = self.cudnn.data_type.INT64 if self.shape.wide else self.cudnn.data_type.INT32
            self.at[uid] = self.graph.tensor(
                dim=[self.shape.documents + 1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, uid=uid
            )
        return self.at[uid]

    def masks(self) -> dict[str, Any]:
        found = {
            "attn_scale": self.shape.scale,
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }
        if self.shape.even:
            return found
        lengths = self.graph.tensor(
            dim=[self.shape.documents, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.cudnn.data_type.INT32, uid=_LENGTHS
        )
        return found | {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}

    def place(self, width: int, stride: tuple[int, int]) -> tuple[list[int], list[int]]:
        """cuDNN's dims and strides (documents, heads, places, width) of a packed tensor."""
        shape = self.shape
        return [shape.documents, shape.heads, shape.longest, width], [shape.longest * stride[0], stride[1], stride[0], 1]

    def rows(self) -> tuple[list[int], list[int]]:
        """The same of one number per query and head, see `_rows`."""
        shape = self.shape
        stride = [shape.heads * shape.longest, shape.longest, 1, 1] if shape.even else self.place(1, (shape.heads, 1))[1]
        return [shape.documents, shape.heads, shape.longest, 1], stride

    def input(self, uid: int, at: int, place: tuple[list[int], list[int]], kind: Any = None) -> Any:
        offsets = None if self.shape.even else self.offsets(at)
        return self.graph.tensor(dim=place[0], stride=place[1], data_type=kind or self.kind, ragged_offset=offsets, uid=uid)

    def output(self, tensor: Any, uid: int, at: int, place: tuple[list[int], list[int]], kind: Any = None) -> None:
        tensor.set_output(True).set_uid(uid).set_dim(place[0]).set_stride(place[1]).set_data_type(kind or self.kind)
        if not self.shape.even:
            tensor.set_ragged_offset(self.offsets(at))

    def qkv(self, q: tuple[int, int], k: tuple[int, int], v: tuple[int, int]) -> tuple[Any, Any, Any]:
        at_q, at_v = self.place(self.shape.qk, q), self.place(self.shape.v, v)
        return self.input(_Q, _AT_QK, at_q), self.input(_K, _AT_K, self.place(self.shape.qk, k)), self.input(_V, _AT_V, at_v)

    def build(self) -> _Plan:
        self.graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.bytes = max(1, self.graph.get_workspace_size())
        return self

    def run(self, tensors: dict[int, torch.Tensor]) -> None:
        with _lock:
            self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.shape.device).cuda_stream)
            work = torch.empty(self.bytes, dtype=torch.uint8, device=torch.device("cuda", self.shape.device))
            self.graph.execute({uid: tensor.data_ptr() for uid, tensor in tensors.items()}, work.data_ptr(), self.handle)


@cache
def _forward_plan(shape: Shape) -> _Plan:
    """`shape.flag`: the maxima are wanted."""
    plan = _Plan(shape)
    q, k, v, out = shape.strides
    extra: dict[str, Any] = {"generate_stats": not shape.flag}
    if shape.flag:
        extra["score_max"] = plan.input(_MAX, _AT_ROW, plan.rows(), plan.single).set_output(True)
        extra["score_sum_exp"] = plan.input(_SUM, _AT_ROW, plan.rows(), plan.single).set_output(True)
    o, lse = plan.graph.sdpa(*plan.qkv(q, k, v), **plan.masks(), **extra)
    plan.output(o, _O, _AT_O, plan.place(shape.v, out))
    if not shape.flag:
        plan.output(lse, _LSE, _AT_ROW, plan.rows(), plan.single)
    return plan.build()


@cache
def _backward_plan(shape: Shape) -> _Plan:
    """`shape.flag`: the same bits every time."""
    plan = _Plan(shape)
    q, k, v, out, grad_out, grad_v = shape.strides
    grad_q, grad_k, grad_v_ = plan.graph.sdpa_backward(
        *plan.qkv(q, k, v),
        plan.input(_O, _AT_O, plan.place(shape.v, out)),
        plan.input(_GRAD_O, _AT_GRAD_O, plan.place(shape.v, grad_out)),
        plan.input(_LSE, _AT_ROW, plan.rows(), plan.single),
        **plan.masks(),
        **({} if shape.even else {"max_total_seq_len_q": shape.tokens, "max_total_seq_len_kv": shape.tokens}),
        use_deterministic_algorithm=shape.flag,
    )
    dense = plan.place(shape.qk, (shape.heads * shape.qk, shape.qk))
    plan.output(grad_q, _GRAD_Q, _AT_QK, dense)
    plan.output(grad_k, _GRAD_K, _AT_K, dense)
    plan.output(grad_v_, _GRAD_V, _AT_GRAD_V, plan.place(shape.v, grad_v))
    return plan.build()


def _strides(*tensors: torch.Tensor) -> tuple[tuple[int, int], ...]:
    assert all(x.stride(2) == 1 for x in tensors), "the last axis has unit stride"
    return tuple((x.stride(0), x.stride(1)) for x in tensors)


def _shape(q: torch.Tensor, v: torch.Tensor, scale: float, ragged: Ragged, flag: bool, *tensors: torch.Tensor) -> Shape:
    strides = _strides(*tensors)
    room = -(-ragged.num_tokens // ROOM) * ROOM
    T, H, C = q.shape
    return Shape(
        q.device.index, ragged.even, ragged.num_documents, ragged.longest, room, H, C, v.shape[2], q.dtype, scale,
        T * max(token for token, _ in strides) >= 2**31, strides, flag,
    )  # fmt: skip


def _offsets(shape: Shape, ragged: Ragged, uids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Element offsets of documents for tensors of `shape.strides`, and of rows [T, H]."""
    if shape.even:
        return {}
    found = {uid: ragged.offsets(token, shape.wide) for uid, (token, _) in zip(uids, shape.strides)}
    return found | {_AT_ROW: ragged.offsets(shape.heads, shape.wide), _LENGTHS: ragged.lengths}


def _rows(ragged: Ragged, heads: int, device: torch.device) -> torch.Tensor:
    """Room for one fp32 number per query and head: [T, H], or [S, H, T / S] in a batch of even rows."""
    even = (ragged.num_documents, heads, ragged.longest)
    return torch.empty(even if ragged.even else (ragged.num_tokens, heads), dtype=torch.float32, device=device)


def forward(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, ragged: Ragged, want_max: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output [T, H, V], log-sum-exp (`_rows`) and, if wanted, the largest scaled logit of each head, fp32 [H]."""
    T, H, V = v_THV.shape
    out, lse = v_THV.new_empty(T, H, V), _rows(ragged, H, q_THC.device)
    shape = _shape(q_THC, v_THV, scale, ragged, want_max, q_THC, k_THC, v_THV, out)
    tensors = {_Q: q_THC, _K: k_THC, _V: v_THV, _O: out} | _offsets(shape, ragged, (_AT_QK, _AT_K, _AT_V, _AT_O))
    if not want_max:
        _forward_plan(shape).run(tensors | {_LSE: lse})
        return out, lse, None
    largest = torch.empty_like(lse)
    # cuDNN gives either the log-sum-exp or its two parts
    _forward_plan(shape).run(tensors | {_MAX: largest, _SUM: lse})
    return out, lse.log_().add_(largest), largest.amax((0, 2) if ragged.even else 0)


def backward(
    grad_THV: torch.Tensor,
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THV: torch.Tensor,
    out_THV: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    ragged: Ragged,
    grad_v_THV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and k, [T, H, C]; that of v goes into `grad_v_THV`, which may be a part of a wider tensor. Under
    `torch.use_deterministic_algorithms` the slower kernel runs that adds q's gradients in a fixed order."""
    grad_q, grad_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THC, k_THC))
    flag = torch.are_deterministic_algorithms_enabled()
    shape = _shape(q_THC, v_THV, scale, ragged, flag, q_THC, k_THC, v_THV, out_THV, grad_THV, grad_v_THV)
    tensors = {
        _Q: q_THC, _K: k_THC, _V: v_THV, _O: out_THV, _LSE: lse, _GRAD_O: grad_THV, _GRAD_Q: grad_q, _GRAD_K: grad_k,
        _GRAD_V: grad_v_THV,
    }  # fmt: skip
    tensors |= _offsets(shape, ragged, (_AT_QK, _AT_K, _AT_V, _AT_O, _AT_GRAD_O, _AT_GRAD_V))
    assert shape.strides[0] == shape.strides[1] == (q_THC.shape[1] * q_THC.shape[2], q_THC.shape[2]), "q and k are dense"
    _backward_plan(shape).run(tensors)
    return grad_q, grad_k
