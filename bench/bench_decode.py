#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the CUDA decode beside softmax attention's best kernels, in one process.

    bench_decode.py [--lib NAME=libparallax_bench.so ...] [--portable] [--rounds N] [--only TEXT]
                    [--json FILE]

Rows are batch,kv_len,q heads,kv heads and what differs. Caches take turns so that at least 150 MB
lie between two uses of one (the L2 cache is cold), a CUDA graph replays one call on each, and
contestants take turns too: medians of microseconds a call, every launch of a call included.
"ours" finds its own schedule in every call; "layer" is handed one, as all layers but the first of a
step are. Baselines that are not installed are left out: FlashAttention-3 (package fa3-fwd), cuDNN
and FlashAttention-2 (through torch); they compute softmax attention over the same cache.
"""
import ctypes
import math
import random
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from contest import (SDPA_BACKENDS, Tensor, able, announce, arguments_of, captured, enqueue,
                     kinds_of, medians, milliseconds, sdpa, write_json)

COLD_BYTES = 150e6


class Call(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in
         ("batch", "q_len", "kv_len", "num_q_heads", "num_kv_heads", "head_dim", "window",
          "max_pages", "num_pages", "page_size")]
        + [("scale", ctypes.c_double)]
        + [(name, ctypes.c_int32) for name in ("fp16", "fp8", "device", "portable")]
        + [(name, Tensor) for name in ("q", "r", "k_cache", "v_cache", "o")]
        + [(name, ctypes.c_void_p) for name in
           ("k_scale", "v_scale", "kv_lens", "page_table", "schedule", "workspace")]
        + [(name, ctypes.c_int64) for name in ("workspace_bytes", "schedule_bytes")]
        + [("message", ctypes.c_char * 256)]
    )


@dataclass(frozen=True)
class Row:
    batch: int
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    q_len: int = 1
    page: int = 0
    fp8: bool = False
    ragged: bool = False  # lengths 1 to 32k, of mean `length`

    def name(self):
        text = f"{self.batch},{self.length},{self.q_heads},{self.kv_heads}"
        text += f" D={self.head_dim}" if self.head_dim != 128 else ""
        text += f" q_len {self.q_len}" if self.q_len > 1 else ""
        text += f" page {self.page}" if self.page else ""
        return text + (" fp8" if self.fp8 else "") + (" ragged" if self.ragged else "")

    def lengths(self):
        if not self.ragged:
            return [self.length] * self.batch
        generator = random.Random(5)
        lengths = [1, 32768] + [int(2 ** generator.uniform(6, 13.5)) for _ in range(self.batch - 2)]
        scale = (self.batch * self.length - lengths[0] - lengths[1]) / sum(lengths[2:])
        return lengths[:2] + [max(1, int(n * scale)) for n in lengths[2:]]

    def bytes(self):
        return 2 * sum(self.lengths()) * self.kv_heads * self.head_dim * (1 if self.fp8 else 2)


TABLE = [Row(1, 512, 8, 8), Row(1, 4096, 8, 8), Row(1, 16384, 8, 8), Row(32, 512, 8, 8),
         Row(32, 4096, 8, 8), Row(32, 16384, 8, 8), Row(32, 4096, 32, 8), Row(128, 4096, 32, 8),
         Row(8, 32768, 32, 8), Row(1, 131072, 32, 8)]
EXTRAS = [Row(1, 4096, 16, 8, page=64), Row(32, 4096, 32, 8, page=1), Row(32, 4096, 32, 8, page=16),
          Row(32, 4096, 32, 8, page=64), Row(32, 4096, 32, 8, ragged=True),
          Row(32, 16384, 8, 8, fp8=True), Row(128, 4096, 32, 8, fp8=True),
          Row(32, 4096, 64, 8), Row(32, 4096, 64, 8, q_len=4),
          Row(32, 4096, 32, 8, head_dim=64), Row(32, 4096, 16, 4, head_dim=256)]


class Problem:
    """The inputs of a row and as many caches as keep L2 cold."""

    def __init__(self, row):
        torch.manual_seed(1)
        self.row = row
        self.kv_lens = torch.tensor(row.lengths(), dtype=torch.int32, device="cuda")
        self.capacity = max(row.lengths())
        shape = (row.batch, row.q_len, row.q_heads, row.head_dim)
        self.q = torch.randn(shape, device="cuda").bfloat16()
        self.r = (torch.randn(shape, device="cuda") * 0.1).bfloat16()
        self.o = torch.empty_like(self.q)
        self.scale = row.head_dim ** -0.5
        self.table = None
        cache = (row.batch, self.capacity, row.kv_heads, row.head_dim)
        if row.page:
            self.max_pages = -(-self.capacity // row.page)
            pages = torch.randperm(row.batch * self.max_pages, device="cuda", dtype=torch.int32)
            self.table = pages.view(row.batch, self.max_pages)
            cache = (row.batch * self.max_pages, row.page, row.kv_heads, row.head_dim)
        self.scales = torch.full((row.kv_heads,), 0.05, device="cuda")
        dtype = torch.float8_e4m3fn if row.fp8 else torch.bfloat16

        def filled():
            x = torch.empty(cache, device="cuda", dtype=torch.bfloat16).normal_()
            return (x / 0.05).clamp(-448, 448).to(dtype) if row.fp8 else x

        count = min(96, int(COLD_BYTES / row.bytes()) + 2)
        self.caches = [(filled(), filled()) for _ in range(count)]

    def tokens(self, cache, b):
        """Entry b's keys or values, [length, heads, head_dim], float64."""
        n = self.kv_lens[b].item()
        if self.table is None:
            x = cache[b, :n]
        else:
            x = cache[self.table[b].long()].flatten(0, 1)[:n]
        return x.double() * (0.05 if self.row.fp8 else 1.0)


def parallax(library, problem, with_schedule, portable=False):
    """A function of a cache that enqueues our decode on the current stream."""
    row = problem.row
    call = Call(batch=row.batch, q_len=row.q_len, kv_len=problem.capacity,
                num_q_heads=row.q_heads, num_kv_heads=row.kv_heads, head_dim=row.head_dim,
                scale=problem.scale, fp8=row.fp8, device=torch.cuda.current_device(),
                portable=portable, kv_lens=problem.kv_lens.data_ptr())
    if problem.table is not None:
        call.page_table = problem.table.data_ptr()
        call.max_pages, call.page_size = problem.max_pages, row.page
        call.num_pages = row.batch * problem.max_pages
    if row.fp8:
        call.k_scale = call.v_scale = problem.scales.data_ptr()

    def run(cache):
        for name, tensor in (("q", problem.q), ("r", problem.r), ("k_cache", cache[0]),
                             ("v_cache", cache[1]), ("o", problem.o)):
            setattr(call, name, Tensor.of(tensor))
        enqueue(library.parallax_decode, call)

    run(problem.caches[0])  # says how much workspace it wants
    run.keep = [torch.empty(n, dtype=torch.uint8, device="cuda")
                for n in (call.workspace_bytes, call.schedule_bytes)]
    call.workspace = run.keep[0].data_ptr()
    if with_schedule:
        call.schedule = run.keep[1].data_ptr()
        enqueue(library.parallax_decode_schedule, call)
    return run


def check(problem, cache):
    """Relative error of o, on some entries and heads, against float64."""
    row = problem.row
    off = size = 0.0
    for b in {0, 1 % row.batch, row.batch - 1}:
        k, v = (problem.tokens(x, b) for x in cache)
        n = k.shape[0]
        for head in {0, row.q_heads - 1}:
            key_head = head * row.kv_heads // row.q_heads
            q, r = (x[b, :, head].double() for x in (problem.q, problem.r))
            s, t = q @ k[:, key_head].T * problem.scale, r @ k[:, key_head].T
            j = torch.arange(n, device="cuda")
            i = torch.arange(row.q_len, device="cuda")[:, None]
            p = s.masked_fill(j > n - row.q_len + i, -math.inf).softmax(-1).nan_to_num()
            exact = (p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v[:, key_head]
            off += (problem.o[b, :, head].double() - exact).square().sum().item()
            size += exact.square().sum().item()
    return math.sqrt(off / size)


def baselines(problem):
    row, found = problem.row, {}
    if row.fp8 or row.page:
        return found
    q = problem.q
    try:
        import fa3_fwd_interface as fa3
        if hasattr(fa3, "flash_attn_with_kvcache"):
            found["FA3 lens"] = lambda cache: fa3.flash_attn_with_kvcache(
                q, *cache, cache_seqlens=problem.kv_lens, causal=row.q_len > 1)
        if not row.ragged:
            found["FA3"] = lambda cache: fa3.flash_attn_func(q, *cache, causal=row.q_len > 1,
                                                             num_splits=0)
    except ImportError:
        pass
    if row.ragged or row.q_len > 1:
        return found

    def softmax(backend, cache):
        sdpa(backend, q.transpose(1, 2), *(x.transpose(1, 2) for x in cache), causal=False)

    for name, backend in SDPA_BACKENDS.items():
        found[name] = partial(softmax, backend)
    return found


def measure(contestants, problem, rounds):
    """Median microseconds of a call of each, taking turns. One that refuses is left out."""
    caches = problem.caches
    # Some milliseconds of work a replay.
    calls = len(caches) * max(1, min(8, int(3e9 / (len(caches) * problem.row.bytes()))))
    replays = able(contestants, lambda run: captured(
        [partial(run, caches[i % len(caches)]) for i in range(calls)]))
    return {name: ms * 1e3 / calls for name, ms in medians(replays, rounds).items()}


def ceilings():
    """TB/s of a device copy (read and written) and of a read-only sum."""
    x = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda").view(torch.float32).normal_()
    y = torch.empty_like(x)

    def rate(run, bytes_):
        return bytes_ / statistics.median(milliseconds(run) for _ in range(7)) * 1e-9

    return rate(lambda: y.copy_(x), 2 * x.nbytes), rate(lambda: x.sum(), x.nbytes)


def main():
    parser = arguments_of(__doc__, rounds=11, library="ours", portable=True)
    parser.add_argument("--rows", choices=("table", "extras", "all"), default="all")
    arguments = parser.parse_args()
    ours = kinds_of(arguments, "ours")
    copy, read = ceilings()
    announce(f"decode, us a call; device copy {copy:.2f}, read {read:.2f} TB/s")
    figures = []
    rows = {"table": TABLE, "extras": EXTRAS, "all": TABLE + EXTRAS}[arguments.rows]
    for row in rows:
        if arguments.only not in row.name():
            continue
        problem = Problem(row)
        contestants, errors = {}, {}
        for name, (library, portable) in ours.items():
            for label, with_schedule in ((name, False), (name + " layer", True)):
                try:
                    run = parallax(library, problem, with_schedule, portable)
                    problem.o.fill_(float("nan"))
                    run(problem.caches[0])
                    errors[label] = check(problem, problem.caches[0])
                    contestants[label] = run
                except RuntimeError as error:
                    print(f"  {label}: {error}")
        contestants.update(baselines(problem))
        times = measure(contestants, problem, arguments.rounds)
        softmax = [us for name, us in times.items() if name not in errors]
        best = min(softmax) if softmax else None
        text = f"{row.name():28s} {row.bytes() / 1e6:7.1f} MB"
        for name, us in times.items():
            text += f"  {name} {us:.1f}"
            if name in errors:
                text += f" ({row.bytes() / us * 1e-6:.2f} TB/s"
                text += f", {us / best:.3f} of best)" if best else ")"
        print(text + f"  error {max(errors.values(), default=0):.1e}", flush=True)
        figures.append({"row": row.name(), "bytes": row.bytes(), "us": times, "error": errors})
        del problem, contestants
        torch.cuda.empty_cache()
    write_json(arguments, figures, copy=copy, read=read)


if __name__ == "__main__":
    main()
