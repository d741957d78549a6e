"""Triton kernels of latent attention: keys are put together and rotary parts turned in one pass each way.

Rotary pairs are neighbours (x0, x1), (x2, x3), ... and stay so. Arithmetic is fp32; each result is rounded once.

Legend: `T` tokens, `H` heads, `N` no-position width, `R` rotary width, `V` value width, `C` = N + R.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turned(x, cos, sin):
    """Pairs of the last axis of x [rows, R], turned by angles [1, R / 2]; fp32."""
    a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (x.shape[0], x.shape[1]))


@triton.jit
def _assemble_kernel(
    q, kv, rot, cos, sin, k, rot_stride, angle_stride, H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """k = (kv's no-position part, turned rot) of one token and BH heads; q's rotary part is turned in place."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)[:, None]
    n, r, half = tl.arange(0, BN)[None, :], tl.arange(0, BR)[None, :], tl.arange(0, BR // 2)[None, :]
    of_n, of_r, row = (h < H) & (n < N), (h < H) & (r < R), t * H + h
    nope = tl.load(kv + row * (N + V) + n, of_n, 0.0)
    tl.store(k + row * (N + R) + n, nope, of_n)
    shared = tl.load(rot + t * rot_stride + r, r < R, 0.0)
    if TURN:
        c = tl.load(cos + t * angle_stride + half, half < R // 2, 0.0).to(tl.float32)
        s = tl.load(sin + t * angle_stride + half, half < R // 2, 0.0).to(tl.float32)
        shared = _turned(shared, c, s).to(k.dtype.element_ty)
        at = q + row * (N + R) + N + r
        turned = _turned(tl.load(at, of_r, 0.0), c, s)
        tl.store(at, turned.to(q.dtype.element_ty), of_r)
    tl.store(k + row * (N + R) + N + r, tl.broadcast_to(shared, (BH, BR)), of_r)


@triton.jit
def _gradients_kernel(
    grad_q, grad_k, cos, sin, grad_kv, grad_rot, angle_stride, H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The way back for one token: grad_q turned in place, grad_k taken apart into grad_kv and, summed over heads, grad_rot."""
    t = tl.program_id(0).to(tl.int64)
    n, r, half = tl.arange(0, BN)[None, :], tl.arange(0, BR)[None, :], tl.arange(0, BR // 2)[None, :]
    if TURN:
        c = tl.load(cos + t * angle_stride + half, half < R // 2, 0.0).to(tl.float32)
        s = -tl.load(sin + t * angle_stride + half, half < R // 2, 0.0).to(tl.float32)
    total = tl.zeros((BH, BR), tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)[:, None]
        of_n, of_r, row = (h < H) & (n < N), (h < H) & (r < R), t * H + h
        nope = tl.load(grad_k + row * (N + R) + n, of_n, 0.0)
        total += tl.load(grad_k + row * (N + R) + N + r, of_r, 0.0).to(tl.float32)
        tl.store(grad_kv + row * (N + V) + n, nope, of_n)
        if TURN:
            at = grad_q + row * (N + R) + N + r
            turned = _turned(tl.load(at, of_r, 0.0), c, s)
            tl.store(at, turned.to(grad_q.dtype.element_ty), of_r)
    shared = tl.sum(total, 0, keep_dims=True)
    if TURN:
        shared = _turned(shared, c, s)
    tl.store(grad_rot + t * R + r, shared.to(grad_rot.dtype.element_ty), r < R)


def _blocks(heads: int, N: int, R: int) -> dict[str, int]:
    return {
        "BH": min(16, triton.next_power_of_2(heads)),
        "BN": triton.next_power_of_2(N),
        "BR": max(2, triton.next_power_of_2(R)),
    }


def _angles(rotary: tuple[torch.Tensor, torch.Tensor] | None, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    if rotary is None:
        return of, of, 0
    cos, sin = rotary
    assert cos.stride() == sin.stride() and cos.stride(1) == 1, "cosines and sines lie alike"
    return cos, sin, cos.stride(0)


def assemble(
    q_THC: torch.Tensor,
    kv_THX: torch.Tensor,
    rot_TR: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    widths: tuple[int, int, int],
) -> torch.Tensor:
    """Keys [T, H, C] from kv [T, H, N + V] and the shared rotary key [T, R]; q [T, H, C] is turned in place.

    `rotary`: cosines and sines [T, >= R / 2], or None for no positions. `widths`: N, R, V.
    """
    (T, H, _), (N, R, V) = kv_THX.shape, widths
    cos, sin, angle_stride = _angles(rotary, rot_TR)
    assert kv_THX.is_contiguous() and q_THC.is_contiguous() and rot_TR.stride(1) == 1
    k_THC = kv_THX.new_empty(T, H, N + R)
    blocks = _blocks(H, N, R)
    _assemble_kernel[T, triton.cdiv(H, blocks["BH"])](
        q_THC, kv_THX, rot_TR, cos, sin, k_THC, rot_TR.stride(0), angle_stride, H, N, R, V,
        **blocks, TURN=rotary is not None, num_warps=4,
    )  # fmt: skip
    return k_THC


def gradients(
    grad_q_THC: torch.Tensor,
    grad_k_THC: torch.Tensor,
    grad_kv_THX: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    widths: tuple[int, int, int],
) -> torch.Tensor:
    """The way back of `assemble`: turns `grad_q_THC` back in place, writes the keys' part of `grad_kv_THX` (values' stays), and
    gives the gradient of the shared rotary key [T, R]."""
    (T, H, _), (N, R, V) = grad_k_THC.shape, widths
    grad_rot_TR = grad_k_THC.new_empty(T, R)
    cos, sin, angle_stride = _angles(rotary, grad_rot_TR)
    assert grad_q_THC.is_contiguous() and grad_k_THC.is_contiguous() and grad_kv_THX.is_contiguous()
    _gradients_kernel[T,](
        grad_q_THC, grad_k_THC, cos, sin, grad_kv_THX, grad_rot_TR, angle_stride, H, N, R, V,
        **_blocks(H, N, R), TURN=rotary is not None, num_warps=4,
    )  # fmt: skip
    return grad_rot_TR
