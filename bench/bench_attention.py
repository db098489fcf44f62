#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the CUDA forward beside softmax attention's best kernels, in one process.

    bench_attention.py [--lib NAME=libparallax_bench.so ...] [--portable] [--rounds N] [--only TEXT]
                       [--json FILE]

Baselines that are not installed are left out: FlashAttention-3 (package fa3-fwd), cuDNN and
FlashAttention-2 (through torch). Contestants take turns; before every call the GPU sleeps about
3 ms, so that enqueueing never shows; medians of CUDA events. Parallax does 4 matrix products per
tile where softmax attention does 2.
"""
import ctypes
import math
from dataclasses import dataclass
from functools import partial

import torch
from contest import (SDPA_BACKENDS, Tensor, able, announce, arguments_of, enqueue, kinds_of,
                     medians, sdpa, warmed, write_json)


class Call(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in
         ("batch", "q_len", "kv_len", "num_q_heads", "num_kv_heads", "head_dim", "window")]
        + [("scale", ctypes.c_double)]
        + [(name, ctypes.c_int32) for name in ("causal", "packed", "fp16", "portable", "device")]
        + [(name, Tensor) for name in
           ("q", "r", "k", "v", "o", "v_bar", "d_o", "dq", "dr", "dk", "dv")]
        + [(name, ctypes.c_void_p) for name in
           ("cu_seqlens_q", "cu_seqlens_k", "lse", "t_bar", "workspace")]
        + [("workspace_bytes", ctypes.c_int64), ("message", ctypes.c_char * 256)]
    )


@dataclass
class Row:
    batch: int
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    window: int = 0
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple = ()  # packed

    def name(self):
        text = f"{self.batch},{self.length},{self.q_heads},{self.kv_heads},{self.head_dim}"
        if self.lengths:
            text = f"packed {sum(self.lengths)} in {len(self.lengths)},{self.q_heads}," \
                   f"{self.kv_heads},{self.head_dim}"
        text += "" if self.causal else " full"
        text += f" window {self.window}" if self.window else ""
        return text + (" fp16" if self.dtype == torch.float16 else "")

    def flops(self):
        """Of Parallax's 4 products, over the pairs that the mask leaves."""
        pairs = 0
        for n in self.lengths or (self.length,) * self.batch:
            if not self.causal:
                pairs += n * n
            elif self.window and self.window < n:
                pairs += self.window * n - self.window * self.window / 2
            else:
                pairs += n * n / 2
        return 8 * pairs * self.q_heads * self.head_dim


LONG_TAIL = (8192, 4096, 2048, 2048) + (1024,) * 6 + (512,) * 12 + (256,) * 16

ROWS = [
    Row(8, 2048, 16, 16, 128),
    Row(4, 4096, 16, 16, 128),
    Row(2, 8192, 16, 16, 128),
    Row(1, 16384, 16, 16, 128),
    Row(4, 4096, 32, 32, 64),
    Row(4, 4096, 32, 8, 128),
    Row(4, 4096, 16, 16, 128, causal=False),
    Row(2, 8192, 16, 16, 128, window=1024),
    Row(1, 0, 16, 16, 128, lengths=LONG_TAIL[::-1]),
    Row(4, 4096, 8, 8, 256),
    Row(4, 4096, 16, 16, 128, dtype=torch.float16),
    Row(4, 4096, 32, 32, 64, causal=False),
]


class Problem:
    """The inputs of a row; q and r are two tensors, as a model has them. With `shifted` keys have mean
    3, values mean 1, and r = (normal + 0.3) / 2, as a trained model may have them."""

    def __init__(self, row, shifted=False):
        torch.manual_seed(1)
        self.row = row
        self.tokens = sum(row.lengths) if row.lengths else row.length
        batch = 1 if row.lengths else row.batch

        def normal(heads, scale=1.0, mean=0.0):
            shape = (batch, self.tokens, heads, row.head_dim)
            x = torch.randn(shape, device="cuda") * scale
            return (x + mean if shifted else x).to(row.dtype)

        self.q, self.r = normal(row.q_heads), normal(row.q_heads, 0.5 if shifted else 0.1, 0.15)
        self.k, self.v = normal(row.kv_heads, mean=3.0), normal(row.kv_heads, mean=1.0)
        self.o = torch.full_like(self.q, float("nan"))
        self.scale = row.head_dim ** -0.5
        self.cu = None
        if row.lengths:
            ends = torch.tensor((0,) + row.lengths, dtype=torch.int32).cumsum(0)
            self.cu = ends.to(device="cuda", dtype=torch.int32)

    def call(self, names, portable=False):
        """A call with the tensors of these names."""
        row = self.row
        call = Call(batch=len(row.lengths) if row.lengths else row.batch, q_len=self.tokens,
                    kv_len=self.tokens, num_q_heads=row.q_heads, num_kv_heads=row.kv_heads,
                    head_dim=row.head_dim, window=row.window, scale=self.scale, causal=row.causal,
                    packed=bool(row.lengths), fp16=row.dtype == torch.float16, portable=portable,
                    device=torch.cuda.current_device())
        for name in names:
            setattr(call, name, Tensor.of(getattr(self, name)))
        if self.cu is not None:
            call.cu_seqlens_q = call.cu_seqlens_k = self.cu.data_ptr()
        return call


def ready(function, call):
    """A function of no arguments that enqueues the call on the current stream."""
    enqueue(function, call)  # says how much workspace it wants
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device="cuda")
    call.workspace = workspace.data_ptr()

    def run():
        enqueue(function, call)

    run.keep = workspace
    return run


def parallax(library, problem, portable=False):
    """The same of our forward."""
    return ready(library.parallax_forward, problem.call("qrkvo", portable))


def check(problem):
    """Relative error of o, on some query heads and rows, against float32 with float64 sums."""
    row = problem.row
    ends = (problem.cu.tolist() if row.lengths else [0, problem.tokens])
    spans = sorted(zip(ends[:-1], ends[1:]), key=lambda span: span[0] - span[1])[:2]
    off = size = 0.0
    for head in {0, row.q_heads - 1}:
        for begin, end in spans:
            pick = torch.arange(end - begin, device="cuda")
            pick = torch.cat([pick[:64], pick[-64:], pick[64:-64:max(1, len(pick) // 64)]])
            key_head = head * row.kv_heads // row.q_heads
            q, r = (getattr(problem, n)[-1, begin:end, head][pick].double() for n in "qr")
            k, v = (getattr(problem, n)[-1, begin:end, key_head].double() for n in "kv")
            s, t = q @ k.T * problem.scale, r @ k.T
            j, i = torch.arange(end - begin, device="cuda"), pick[:, None]
            if row.causal:
                s = s.masked_fill(j > i, -math.inf)
            if row.window:
                s = s.masked_fill(j <= i - row.window, -math.inf)
            p = s.softmax(-1)
            exact = (p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v
            ours = problem.o[-1, begin:end, head][pick].double()
            off += (ours - exact).square().sum().item()
            size += exact.square().sum().item()
    return math.sqrt(off / size)


def baselines(problem):
    row, found = problem.row, {}
    q, k, v = problem.q, problem.k, problem.v
    try:
        import fa3_fwd_interface as fa3
        window = (row.window - 1, 0) if row.window else (-1, -1)
        if row.lengths:
            longest = max(row.lengths)
            found["FA3"] = lambda: fa3.flash_attn_varlen_func(
                q[0], k[0], v[0], problem.cu, problem.cu, longest, longest, causal=True)
        else:
            found["FA3"] = lambda: fa3.flash_attn_func(q, k, v, causal=row.causal,
                                                       window_size=window)
    except ImportError:
        pass
    if row.lengths or row.window:
        return found
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for name, backend in SDPA_BACKENDS.items():
        found[name] = partial(sdpa, backend, *heads_first, row.causal)
    return found


def measure(contestants, rounds):
    """Median milliseconds of each, taking turns. One that refuses is left out."""
    return medians(able(contestants, warmed), rounds)


def print_times(times, errors, baseline, flops):
    """A line for each contestant: milliseconds, against the baseline, and of ours the rest."""
    for name, ms in times.items():
        text = f"  {name:18s} {ms:8.4f}"
        if baseline in times and name != baseline:
            text += f"  {ms / times[baseline]:5.2f} of {baseline}"
        if name in errors:
            text += f"  {flops / ms * 1e-9:4.0f} TFLOP/s  error {errors[name]:.1e}"
        print(text, flush=True)


def main():
    arguments = arguments_of(__doc__, rounds=15, library="Parallax", portable=True).parse_args()
    kinds = kinds_of(arguments, "Parallax")
    announce("forward, ms; rows are batch,len,q heads,kv heads,head dim; bf16 causal unless said")
    figures = []
    for row in ROWS:
        if arguments.only not in row.name():
            continue
        problem = Problem(row)
        contestants, errors = {}, {}
        for name, (library, portable) in kinds.items():
            contestants[name] = parallax(library, problem, portable)
            problem.o.fill_(float("nan"))
            contestants[name]()
            errors[name] = check(problem)
        contestants.update(baselines(problem))
        times = measure(contestants, arguments.rounds)
        print(row.name())
        print_times(times, errors, "FA3", row.flops())
        figures.append({"row": row.name(), "ms": times, "error": errors})
        del problem, contestants
        torch.cuda.empty_cache()
    write_json(arguments, figures)


if __name__ == "__main__":
    main()
