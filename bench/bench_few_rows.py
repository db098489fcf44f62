#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The products of a decoder layer for a few new tokens (Qwen3-0.6B's shape) on a GPU: microseconds,
median of rounds, in a CUDA graph over 28 layers' weights of their own, so that the L2 cache is cold;
beside LibTorch's norm, product, SwiGLU and addition, and beside the time that the weights take at
the rate of a sum over 4 GiB.

    python bench/bench_few_rows.py [--lib NAME=build/libparallax_bench.so] [--only head]
"""
import ctypes

import torch

from contest import able, announce, arguments_of, captured, enqueue, libraries, medians, milliseconds, write_json

HIDDEN, QUERIES, KEYS, INNER, VOCABULARY, LAYERS = 1024, 2048, 1024, 3072, 151936, 28
PRODUCT, FLOAT_PRODUCT, SWIGLU, ADD = range(4)
EPS = 1e-6


class Call(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_int64) for n in ("rows", "in", "out", "x_stride", "w_stride", "y_stride")]
        + [("eps", ctypes.c_double)]
        + [(n, ctypes.c_int32) for n in ("form", "fp16", "device")]
        + [(n, ctypes.c_void_p) for n in ("x", "w", "gain", "y")]
        + [("message", ctypes.c_char * 256)]
    )


class Product:
    """One product of one layer: how ours and LibTorch's do it."""

    def __init__(self, form, x, w, y, gain=None):
        self.form, self.x, self.w, self.y, self.gain = form, x, w, y, gain

    def ours(self, library):
        gain = None if self.gain is None else self.gain.data_ptr()
        call = Call(self.x.shape[0], self.x.shape[1], self.y.shape[1], self.x.stride(0),
                    self.w.stride(0), self.y.stride(0), EPS, self.form, 0, 0, self.x.data_ptr(),
                    self.w.data_ptr(), gain, self.y.data_ptr())
        return lambda: enqueue(library.parallax_few_rows, call)

    def torch(self):
        x = self.x
        if self.gain is not None:
            x = torch.nn.functional.rms_norm(x, (HIDDEN,), self.gain, EPS)
        if self.form == ADD:
            self.y.addmm_(x, self.w.t())
            return
        y = torch.nn.functional.linear(x, self.w)
        if self.form == SWIGLU:
            gate, up = y.chunk(2, -1)
            torch.nn.functional.silu(gate).mul_(up)
        if self.form == FLOAT_PRODUCT:
            y.float()


def random(*shape, scale=1.0):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def layer(rows, x):
    """q, r, k, v; o; gate, up; down: each with weights of its own. The residual stream is x."""
    mixed, o = random(rows, 2 * QUERIES + 2 * KEYS), random(rows, QUERIES)
    inner = random(rows, INNER)
    weight = lambda out, size: random(out, size, scale=0.02)
    gain = lambda: 1 + random(HIDDEN, scale=0.1)
    return {
        "q, r, k, v": Product(PRODUCT, x, weight(2 * QUERIES + 2 * KEYS, HIDDEN), mixed, gain()),
        "o": Product(ADD, o, weight(HIDDEN, QUERIES), x),
        "gate, up": Product(SWIGLU, x, weight(2 * INNER, HIDDEN), inner, gain()),
        "down": Product(ADD, inner, weight(HIDDEN, INNER), x),
    }


def read_rate():
    """Bytes a millisecond."""
    data = torch.ones(1 << 30, device="cuda")
    return data.nbytes / min(milliseconds(data.sum) for _ in range(8))


def rows_of_table(rows):
    x = random(rows, HIDDEN)
    layers = [layer(rows, x) for _ in range(LAYERS)]
    for name in layers[0]:
        yield name, [one[name] for one in layers], LAYERS
    yield "a layer's four", [product for one in layers for product in one.values()], LAYERS
    gain, logits = 1 + random(HIDDEN, scale=0.1), torch.empty(rows, VOCABULARY, device="cuda")
    heads = [Product(FLOAT_PRODUCT, x, random(VOCABULARY, HIDDEN, scale=0.02), logits, gain)
             for _ in range(2)]
    yield "head", heads, len(heads)


def main():
    arguments = arguments_of(__doc__, rounds=15, library="ours").parse_args()
    found = libraries(arguments, "ours")
    torch.manual_seed(0)
    rate = read_rate()
    announce(f"reads {rate / 1e6:.0f} GB/s; us a call")
    table = []
    for rows in (1, 8, 16):
        for name, products, calls in rows_of_table(rows):
            if arguments.only not in name:
                continue
            runs = {lib: [p.ours(library) for p in products] for lib, library in found.items()}
            runs["LibTorch"] = [p.torch for p in products]
            replays = able(runs, captured)
            times = {key: 1e3 * ms / calls for key, ms in medians(replays, arguments.rounds).items()}
            floor = 1e3 * sum(p.w.nbytes for p in products) / rate / calls
            table.append({"rows": rows, "product": name, "floor": floor, **times})
            text = "  ".join(f"{key} {us:6.1f} ({us / floor:4.2f})" for key, us in times.items())
            print(f"{rows:3} rows  {name:15} floor {floor:6.1f}  {text}", flush=True)
    write_json(arguments, table, bytes_per_ms=rate)


if __name__ == "__main__":
    main()
