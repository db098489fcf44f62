#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the CUDA backward beside softmax attention's, in one process.

    bench_attention_backward.py [--lib NAME=libparallax_bench.so ...] [--portable] [--rounds N]
                                [--only TEXT] [--json FILE]

Baselines are cuDNN's and FlashAttention-2's backward, through torch's autograd; timed as
bench_attention.py times the forward. Parallax needs 8 matrix products per tile (ours executes 11)
where softmax attention needs 5.
"""
import math

import torch
from bench_attention import ROWS, Problem, measure, print_times, ready
from contest import SDPA_BACKENDS, announce, arguments_of, kinds_of, refused, sdpa, write_json

GRADIENTS = ("dq", "dr", "dk", "dv")


class BackwardProblem(Problem):
    """A row's inputs, gradients, and what the forward saves, made by our forward."""

    def __init__(self, row, library, portable=False, shifted=False):
        super().__init__(row, shifted)
        self.d_o = torch.randn_like(self.q)
        self.v_bar = torch.empty_like(self.q)
        statistics = (self.q.shape[0], row.q_heads, self.tokens)
        self.lse = torch.empty(statistics, device="cuda")
        self.t_bar = torch.empty(statistics, device="cuda")
        for name in GRADIENTS:
            like = self.q if name in ("dq", "dr") else self.k
            setattr(self, name, torch.full_like(like, float("nan")))
        forward = ("q", "r", "k", "v", "o", "v_bar")
        self.forward = ready(library.parallax_forward, self.call(forward, portable))
        self.forward()
        self.backward = ready(library.parallax_backward,
                              self.call(forward + ("d_o",) + GRADIENTS, portable))

    def call(self, names, portable=False):
        call = super().call(names, portable)
        call.lse, call.t_bar = self.lse.data_ptr(), self.t_bar.data_ptr()
        return call


def check(problem):
    """Largest relative error of a gradient, of the last key/value head over the shortest sequence,
    against the definition in float32."""
    row = problem.row
    ends = problem.cu.tolist() if row.lengths else [0, problem.tokens]
    begin, end = min(zip(ends[:-1], ends[1:]), key=lambda span: span[1] - span[0])
    group = row.q_heads // row.kv_heads
    i = torch.arange(end - begin, device="cuda")
    hidden = i[None] > i[:, None] if row.causal else torch.zeros_like(i[None] > i[:, None])
    if row.window:
        hidden |= i[None] <= i[:, None] - row.window
    off, size = [0.0] * 4, [0.0] * 4
    sums = [0.0, 0.0]
    for head in range(row.q_heads - group, row.q_heads):
        q, r, d_o = (getattr(problem, n)[-1, begin:end, head].float() for n in ("q", "r", "d_o"))
        k, v = (getattr(problem, n)[-1, begin:end, -1].float() for n in "kv")
        leaves = [x.requires_grad_() for x in (q, r, k, v)]
        p = (q @ k.T * problem.scale).masked_fill(hidden, -math.inf).softmax(-1)
        t = r @ k.T
        o = (p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v
        exact = torch.autograd.grad(o, leaves, d_o)
        del p, t, o
        for n in range(2):
            ours = getattr(problem, GRADIENTS[n])[-1, begin:end, head].float()
            off[n] += (ours - exact[n]).square().sum().item()
            size[n] += exact[n].square().sum().item()
            sums[n] = sums[n] + exact[2 + n]
    for n in range(2):
        ours = getattr(problem, GRADIENTS[2 + n])[-1, begin:end, -1].float()
        off[2 + n] = (ours - sums[n]).square().sum().item()
        size[2 + n] = sums[n].square().sum().item()
    return max(math.sqrt(a / b) for a, b in zip(off, size))


def baselines(problem):
    row = problem.row
    if row.lengths or row.window:
        return {}

    def backward(backend):
        leaves = [x.transpose(1, 2).detach().requires_grad_()
                  for x in (problem.q, problem.k, problem.v)]
        o = sdpa(backend, *leaves, row.causal)
        d_o = problem.d_o.transpose(1, 2)
        return lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)

    found = {}
    for name, backend in SDPA_BACKENDS.items():
        try:
            found[name] = backward(backend)
        except RuntimeError as error:  # no kernel for this row
            refused(name, error)
    return found


def main():
    arguments = arguments_of(__doc__, rounds=11, library="Parallax", portable=True).parse_args()
    kinds = kinds_of(arguments, "Parallax")
    announce("backward, ms; rows are batch,len,q heads,kv heads,head dim; bf16 causal unless said")
    figures = []
    for row in ROWS:
        if row.head_dim > 128 or arguments.only not in row.name():
            continue
        print(row.name())
        contestants, errors = {}, {}
        for name, (library, portable) in kinds.items():
            problem = BackwardProblem(row, library, portable)
            contestants[name] = problem.backward
            problem.backward()
            errors[name] = check(problem)
        contestants.update(baselines(problem))
        times = measure(contestants, arguments.rounds)
        print_times(times, errors, "cuDNN", 2 * row.flops())
        figures.append({"row": row.name(), "ms": times, "error": errors})
        del problem, contestants
        torch.cuda.empty_cache()
    write_json(arguments, figures)


if __name__ == "__main__":
    main()
