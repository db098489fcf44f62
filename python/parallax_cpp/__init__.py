# SPDX-License-Identifier: MIT
"""Parallax attention for PyTorch: the Python door to torch.ops.parallax.

    o_i = sum_j p_ij (1 + t_bar_i - t_ij) v_j,   p = softmax_j(scale q_i.k_j),  t_ij = r_i.k_j,
    t_bar_i = sum_j p_ij t_ij                    (arXiv 2605.29157)

r = 0 is softmax attention. Every function calls operators registered in C++ (schema, Meta shapes,
autograd, autocast), so torch.compile(fullgraph=True) and CUDA graphs take them as they are.

Shapes: q, r [batch, q_len, num_q_heads, head_dim]; k, v [batch, kv_len, num_kv_heads, head_dim];
packed: [tokens, heads, head_dim]. num_q_heads is any multiple of num_kv_heads, head_dim any
multiple of 8 up to 256, dtype bfloat16 or float16 (float32 and float64 too on the CPU). Strides are
free but for the last axis, which must be contiguous. Lengths, offsets, positions and page tables
are int32, on the device of q.

Errors name the argument, what was expected and what came: ValueError (shapes, strides, devices,
values), TypeError (dtypes), NotImplementedError (what has no kernel or no derivative).
"""

import os
from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

__all__ = [
    "State",
    "append_kv",
    "append_kv_rotary",
    "attention",
    "decode",
    "decode_schedule",
    "finalize",
    "merge",
]


def _load_library() -> None:
    package = Path(__file__).resolve().parent
    name = "libparallax_ops.so"
    chosen = os.environ.get("PARALLAX_LIBRARY")
    places = [Path(chosen)] if chosen else [package / name, package.parents[1] / "build" / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(str(place) for place in places)
        raise ImportError(
            f"parallax_cpp: no {name} (looked at {looked}): run `make build`, or set "
            f"PARALLAX_LIBRARY to its path"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"parallax_cpp: {path} does not load into torch {torch.__version__}; rebuild it "
            f"against this torch: {error}"
        ) from error


_load_library()
_ops = torch.ops.parallax


class State(NamedTuple):
    """The partial state of rows over some of their keys: float32, contiguous, uncentred.

    m (largest logit, natural units), d1, d2: [batch, num_q_heads, q_len];
    o1, o2: [batch, q_len, num_q_heads, head_dim].
    """

    m: Tensor
    d1: Tensor
    d2: Tensor
    o1: Tensor
    o2: Tensor


def attention(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: Optional[float] = None,
    causal: bool = True,
    window: Optional[int] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    kv_lens: Optional[Tensor] = None,
    kv_start: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    k_scale: Optional[Tensor] = None,
    v_scale: Optional[Tensor] = None,
    return_stats: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor, Tensor]]:
    """Parallax attention, differentiable (once) in q, r, k and v.

    scale multiplies q.k and never r.k; None means head_dim**-0.5. causal is aligned bottom-right:
    query i of q_len sees keys up to kv_lens[b] - q_len + i. window (causal only) keeps a query's
    last `window` keys, its own among them. Visible keys of sequence b are
    [kv_start[b], kv_lens[b]), int32 [batch]. cu_seqlens_q and cu_seqlens_k, int32 [batch + 1],
    select the packed layout. A page_table, int32 [batch, max_pages], makes k and v pages
    [num_pages, page_size, num_kv_heads, head_dim]; forward only. So are k and v of dtype
    float8_e4m3fn, a cache as in decode with k_scale and v_scale: its visible tokens are written out
    in q's dtype first, into scratch memory for the keys' whole length.

    Returns o like q; with return_stats (o, lse, t_bar), the statistics [batch, num_q_heads, q_len]
    (packed [num_q_heads, tokens]), float32 (float64 for float64), natural logarithm, not
    differentiable. A row that sees no key has o = 0, lse = -inf, t_bar = 0 and no gradient.
    """
    op = _ops.attention.stats if return_stats else _ops.attention.default
    return op(
        q,
        r,
        k,
        v,
        scale=scale,
        causal=causal,
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        kv_lens=kv_lens,
        kv_start=kv_start,
        page_table=page_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def decode(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    kv_lens: Tensor,
    kv_start: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    scale: Optional[float] = None,
    window: Optional[int] = None,
    k_scale: Optional[Tensor] = None,
    v_scale: Optional[Tensor] = None,
    schedule: Optional[Tensor] = None,
    return_stats: bool = False,
    return_state: bool = False,
    out: Optional[Tensor] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor, Tensor], State]:
    """Attention of a few new tokens over a cache; causal, not differentiable.

    q, r [batch, q_len, num_q_heads, head_dim]; caches [batch, capacity, num_kv_heads, head_dim], or
    pages with a page_table (see attention). kv_lens, int32 [batch], counts the new tokens too:
    append_kv first. What lies beyond kv_lens is never read into a result, NaN included. Caches of
    dtype float8_e4m3fn need k_scale and v_scale, float32 [num_kv_heads]: an element stands for
    itself times its head's scale. schedule: of decode_schedule.

    Returns o like q, written into `out` where given; with return_stats (o, lse, t_bar) as in
    attention; with return_state, instead, the State that merge and finalize take.
    """
    inputs = dict(
        kv_lens=kv_lens,
        kv_start=kv_start,
        page_table=page_table,
        scale=scale,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
        schedule=schedule,
    )
    if return_state:
        if out is not None or return_stats:
            raise ValueError(
                "parallax::decode: return_state: expected without out and return_stats "
                "(finalize(state) gives them), got both"
            )
        return State(*_ops.decode.state(q, r, k_cache, v_cache, **inputs))
    if out is None:
        o, lse, t_bar = _ops.decode.stats(q, r, k_cache, v_cache, **inputs)
    else:
        lse, t_bar = _ops.decode.out(q, r, k_cache, v_cache, **inputs, out=out)
        o = out
    return (o, lse, t_bar) if return_stats else o


def decode_schedule(
    q: Tensor,
    k_cache: Tensor,
    *,
    kv_lens: Tensor,
    kv_start: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    window: Optional[int] = None,
) -> Tensor:
    """Which part of a GPU reads which keys: once a step, for the decode of every layer.

    Hand it to decode calls of the same shapes and lengths, which only read it. q and k_cache give
    the shapes; their values are not read. Without a schedule each decode finds its own; the CPU
    needs none.
    """
    return _ops.decode_schedule(
        q, k_cache, kv_lens=kv_lens, kv_start=kv_start, page_table=page_table, window=window
    )


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    page_table: Optional[Tensor] = None,
    k_scale: Optional[Tensor] = None,
    v_scale: Optional[Tensor] = None,
) -> None:
    """Writes k, v [batch, len, num_kv_heads, head_dim] into the caches, in place.

    Token i of sequence b goes to place positions[b] + i (positions int32 [batch]); into caches of
    dtype float8_e4m3fn as k / k_scale and v / v_scale (float32 [num_kv_heads]), rounded to nearest
    even, what lies beyond 448 to 448. A place beyond the capacity, or a page outside the cache, is
    refused on the CPU before anything is written, and skipped on a GPU.
    """
    _ops.append_kv.default(
        k,
        v,
        k_cache,
        v_cache,
        positions=positions,
        page_table=page_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def append_kv_rotary(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Optional[Tensor] = None,
    r_gain: Optional[Tensor] = None,
    k_gain: Optional[Tensor] = None,
    rotate_r: bool = True,
    eps: float = 1e-6,
    angles: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    k_scale: Optional[Tensor] = None,
    v_scale: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """append_kv of k, v after norm and RoPE, and q, r ready for decode; on a GPU one kernel.

    q, r [batch, len, num_q_heads, head_dim]. Where there is a gain (float32 [head_dim]), a head x
    becomes x / sqrt(mean(x**2) + eps) * gain; then q, k (and r, unless rotate_r is False) have
    their pairs (x_i, x_{i + head_dim / 2}) turned by row positions[b] + i of cos and sin, float32
    [num_angles, head_dim / 2]; angles, int32 [batch], replaces positions there (left padding).
    In float32 (float64 for float64), rounded once. Returns the new q and r.
    """
    return _ops.append_kv.rotary(
        q,
        r,
        k,
        v,
        k_cache,
        v_cache,
        positions=positions,
        cos=cos,
        sin=sin,
        q_gain=q_gain,
        r_gain=r_gain,
        k_gain=k_gain,
        rotate_r=rotate_r,
        eps=eps,
        angles=angles,
        page_table=page_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def merge(states: Sequence[State]) -> State:
    """The State over the union of the keys of one or more states of the same rows."""
    return State(*_ops.merge(*([state[i] for state in states] for i in range(5))))


def finalize(
    state: State, *, dtype: Optional[torch.dtype] = None
) -> Tuple[Tensor, Tensor, Tensor]:
    """o (in dtype, default float32), lse and t_bar of a State, shaped as decode returns them."""
    return _ops.finalize(*state, dtype=dtype)
