# SPDX-License-Identifier: MIT
"""Parallax attention composed from PyTorch operations, and inputs for it."""

import torch


def int_tensor(values):
    return torch.tensor(values, dtype=torch.int32)


def inputs(q_len, kv_len, heads=(3, 1), batch=2, head_dim=8, dtype=torch.float64, seed=0):
    """q, r, k, v: random, keys and values with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)

    def random(length, num_heads, mean):
        shape = (batch, length, num_heads, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).add_(mean).to(dtype)

    num_q_heads, num_kv_heads = heads
    return [
        random(q_len, num_q_heads, 0.0),
        random(q_len, num_q_heads, 0.3),
        random(kv_len, num_kv_heads, 1.0),
        random(kv_len, num_kv_heads, 1.0),
    ]


def rotary_table(num_angles, head_dim, theta=1e4):
    """cos and sin of position * theta^(-2i / head_dim), float32 [num_angles, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(num_angles, dtype=torch.float64), theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def normed_and_turned(x, gain, cos, sin, first, eps=1e-6):
    """x [batch, len, heads, head_dim] after RMSNorm and RoPE; token i of b has row first[b] + i."""
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.to(x.dtype)
    rows = first.long().view(-1, 1) + torch.arange(x.shape[1], device=x.device)
    cos, sin = (table[rows].unsqueeze(2).to(x.dtype) for table in (cos, sin))
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def visible_keys(q, k, causal=True, window=None, kv_lens=None, kv_start=None):
    """bool [batch, 1, q_len, kv_len]"""
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    end = torch.full((batch,), kv_len, device=q.device) if kv_lens is None else kv_lens
    begin = torch.zeros(batch, device=q.device) if kv_start is None else kv_start
    end, begin = end.view(-1, 1, 1, 1), begin.view(-1, 1, 1, 1)
    key = torch.arange(kv_len, device=q.device)
    last = end - q_len + torch.arange(q_len, device=q.device).view(-1, 1)
    visible = (key >= begin) & (key < end) & (last == last)
    if causal:
        visible = visible & (key <= last)
    if window is not None:
        visible = visible & (key > last - window)
    return visible


def formula(q, r, k, v, scale=None, **mask):
    """o, lse, t_bar; rows that see no key: 0, -inf, 0."""
    visible = visible_keys(q, k, **mask)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = torch.einsum("bihd,bjhd->bhij", q, k).mul(scale).masked_fill(~visible, -torch.inf)
    t = torch.einsum("bihd,bjhd->bhij", r, k)
    lse = s.logsumexp(-1)
    p = torch.where(visible, (s - lse.unsqueeze(-1)).exp(), 0.0)
    t_bar = (p * t).sum(-1)
    o = torch.einsum("bhij,bjhd->bihd", p * (1 + t_bar.unsqueeze(-1) - t), v)
    return o, lse, t_bar
