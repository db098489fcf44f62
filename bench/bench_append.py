#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""append_kv, append_kv_rotary and merge on a GPU: microseconds a call in a CUDA graph, median of
rounds, beside the same work in LibTorch's operations. Needs PARALLAX_LIBRARY or a build.

    PYTHONPATH=python python bench/bench_append.py
"""

import torch

import parallax_cpp
from contest import announce, captured, medians

HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, PAGE_SIZE = 128, 8, 16, 16
ROUNDS, CALLS = 15, 20


def microseconds(calls):
    """Medians of {name: function}, a graph of CALLS calls each, taken in turn."""
    replays = {name: captured([call] * CALLS) for name, call in calls.items()}
    return {name: ms * 1e3 / CALLS for name, ms in medians(replays, ROUNDS).items()}


class Step:
    """New tokens of a batch and the paged caches that they go into, bf16 and FP8."""

    def __init__(self, batch, length):
        random = lambda heads: torch.randn(
            batch, length, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16
        )
        self.k, self.v = random(NUM_KV_HEADS), random(NUM_KV_HEADS)
        self.q, self.r = random(NUM_Q_HEADS), random(NUM_Q_HEADS)
        pages = -(-length // PAGE_SIZE) + 1
        shape = (batch * pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.caches = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
        self.narrow = [cache.to(torch.float8_e4m3fn) for cache in self.caches]
        self.scale = torch.full((NUM_KV_HEADS,), 0.01, device="cuda")
        order = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        first = torch.full((batch,), 5, dtype=torch.int32, device="cuda")
        self.where = dict(positions=first, page_table=order)
        # The same places for index_put: page and row of each token.
        places = first.view(-1, 1) + torch.arange(length, device="cuda")
        self.pages = order.gather(1, (places // PAGE_SIZE).long()).long()
        self.rows = (places % PAGE_SIZE).long()
        angle = torch.outer(
            torch.arange(length + 5, device="cuda").float(),
            1e4 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM),
        )
        self.cos, self.sin = angle.cos(), angle.sin()
        self.gain = torch.rand(HEAD_DIM, device="cuda") + 0.5

    def append(self):
        parallax_cpp.append_kv(self.k, self.v, *self.caches, **self.where)

    def append_fp8(self):
        parallax_cpp.append_kv(
            self.k, self.v, *self.narrow, **self.where, k_scale=self.scale, v_scale=self.scale
        )

    def append_rotary(self):
        parallax_cpp.append_kv_rotary(
            self.q, self.r, self.k, self.v, *self.caches, **self.where, cos=self.cos,
            sin=self.sin, q_gain=self.gain, r_gain=self.gain, k_gain=self.gain,
        )  # fmt: skip

    def torch_append(self, k=None):
        for cache, x in zip(self.caches, (self.k if k is None else k, self.v)):
            cache[self.pages, self.rows] = x

    def torch_rotary(self):
        rows = slice(5, 5 + self.q.shape[1])
        cos, sin = (table[rows].bfloat16().unsqueeze(1) for table in (self.cos, self.sin))
        gain = self.gain.bfloat16()

        def turned(x):
            x = torch.nn.functional.rms_norm(x, (HEAD_DIM,), gain, 1e-6)
            low, high = x.chunk(2, -1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        turned(self.q), turned(self.r)
        self.torch_append(turned(self.k))


def print_appends():
    for batch, length in ((1, 1), (64, 1), (32, 4), (1, 32768), (32, 1024)):
        step = Step(batch, length)
        names = ["append", "append_fp8", "torch_append", "append_rotary", "torch_rotary"]
        times = microseconds({name: getattr(step, name) for name in names})
        moved = 2 * 2 * step.k.numel() * 2  # k and v, read and written, bf16
        text = "  ".join(f"{name} {time:8.1f}" for name, time in times.items())
        rate = moved / times["append"] / 1e6
        print(f"batch {batch:3} x {length:5} tokens: {text}  ({rate:.2f} TB/s)")


def print_merges():
    for batch, heads, count in ((1, 32, 8), (32, 32, 8), (32, 32, 2)):
        states = [
            parallax_cpp.State(
                *(torch.rand(batch, heads, 1, device="cuda") for _ in range(3)),
                *(torch.rand(batch, 1, heads, HEAD_DIM, device="cuda") for _ in range(2)),
            )
            for _ in range(count)
        ]
        times = microseconds({
            "merge": lambda: parallax_cpp.merge(states),
            "finalize": lambda: parallax_cpp.finalize(states[0], dtype=torch.bfloat16),
        })
        text = "  ".join(f"{name} {time:.1f}" for name, time in times.items())
        print(f"{count} states of {batch} x {heads} rows: {text}")


if __name__ == "__main__":
    torch.manual_seed(0)
    announce("us a call")
    print_appends()
    print_merges()
