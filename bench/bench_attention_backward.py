#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the CUDA backward beside softmax attention's, in one process.

    bench_attention_backward.py [--lib NAME=libparallax_bench.so ...] [--portable] [--rounds N]
                                [--only TEXT]

Baselines are cuDNN's and FlashAttention-2's backward, through torch's autograd; timed as
bench_attention.py times the forward. Parallax needs 8 matrix products per tile (ours executes 11)
where softmax attention needs 5.
"""
import argparse
import ctypes
import math

import torch
from bench_attention import ROWS, Call, Problem, Tensor, measure

GRADIENTS = ("dq", "dr", "dk", "dv")


class BackwardProblem(Problem):
    """A row's inputs, gradients, and what the forward saves, made by our forward."""

    def __init__(self, row, library, portable=False):
        super().__init__(row)
        self.d_o = torch.randn_like(self.q)
        self.v_bar = torch.empty_like(self.q)
        statistics = (self.q.shape[0], row.q_heads, self.tokens)
        self.lse = torch.empty(statistics, device="cuda")
        self.t_bar = torch.empty(statistics, device="cuda")
        for name in GRADIENTS:
            like = self.q if name in ("dq", "dr") else self.k
            setattr(self, name, torch.full_like(like, float("nan")))
        self.enqueue(library.parallax_forward, portable)()

    def enqueue(self, function, portable=False):
        """A function of no arguments that enqueues this call on the current stream."""
        row = self.row
        call = Call(batch=len(row.lengths) if row.lengths else row.batch, q_len=self.tokens,
                    kv_len=self.tokens, num_q_heads=row.q_heads, num_kv_heads=row.kv_heads,
                    head_dim=row.head_dim, window=row.window, scale=self.scale, causal=row.causal,
                    packed=bool(row.lengths), fp16=row.dtype == torch.float16,
                    portable=portable, device=torch.cuda.current_device(), lse=self.lse.data_ptr(),
                    t_bar=self.t_bar.data_ptr())
        for name in ("q", "r", "k", "v", "o", "v_bar", "d_o") + GRADIENTS:
            tensor = getattr(self, name)
            setattr(call, name, Tensor(tensor.data_ptr(), *tensor.stride()[:3]))
        if self.cu is not None:
            call.cu_seqlens_q = call.cu_seqlens_k = self.cu.data_ptr()

        def run():
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            if function(ctypes.byref(call), stream):
                raise RuntimeError(call.message.decode())

        run()  # says how much workspace it wants
        workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device="cuda")
        call.workspace = workspace.data_ptr()
        run.keep = workspace
        return run


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
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def backward(backend):
        leaves = [x.transpose(1, 2).detach().requires_grad_()
                  for x in (problem.q, problem.k, problem.v)]
        with sdpa_kernel(backend):
            o = torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=row.causal, enable_gqa=row.q_heads != row.kv_heads)
        d_o = problem.d_o.transpose(1, 2)
        return lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)

    found = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION),
                          ("FA2", SDPBackend.FLASH_ATTENTION)):
        try:
            found[name] = backward(backend)
        except RuntimeError as error:  # no kernel for this row
            print(f"  {name}: {str(error).splitlines()[0][:120]}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", action="append", metavar="NAME=PATH",
                        help="default: Parallax=build/libparallax_bench.so; may be repeated")
    parser.add_argument("--portable", action="store_true",
                        help="time the portable kernels too, those that GPUs other than Hopper take")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    libraries = {}
    for item in arguments.lib or ["Parallax=build/libparallax_bench.so"]:
        name, path = item.split("=", 1)
        libraries[name] = ctypes.CDLL(path)
    kinds = {name: (library, False) for name, library in libraries.items()}
    if arguments.portable:
        kinds |= {f"{name}, portable": (library, True) for name, library in libraries.items()}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; backward, ms; "
          "rows are batch,len,q heads,kv heads,head dim; bf16 causal unless said")
    for row in ROWS:
        if row.head_dim > 128 or arguments.only not in row.name():
            continue
        print(row.name())
        contestants, errors = {}, {}
        for name, (library, portable) in kinds.items():
            problem = BackwardProblem(row, library, portable)
            contestants[name] = problem.enqueue(library.parallax_backward, portable)
            contestants[name]()
            errors[name] = check(problem)
        contestants.update(baselines(problem))
        times = measure(contestants, arguments.rounds)
        for name, ms in times.items():
            text = f"  {name:18s} {ms:8.4f}"
            if "cuDNN" in times and name != "cuDNN":
                text += f"  {ms / times['cuDNN']:5.2f} of cuDNN"
            if name in errors:
                text += f"  {2 * row.flops() / ms * 1e-9:4.0f} TFLOP/s  error {errors[name]:.1e}"
            print(text, flush=True)
        del problem, contestants
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
