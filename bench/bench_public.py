#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the official Parallax kernels beside ours, in one process.

    bench_public.py [--public FOLDER] [--passes forward backward decode] [--only TEXT] [--every-row]
                    [--rounds N] [--jobs N] [--errors] [--json FILE] [--lib NAME=PATH ...]

The official package (github.com/Yifei-Zuo/Parallax, parallax-kernel in Python's registry) is no part
of this project. FOLDER is a checkout of it, or what `pip install --no-deps --target FOLDER` made;
left out: the `parallax` that Python finds. It needs Triton, which comes with torch, and a C compiler;
its CuTeDSL decode needs nvidia-cutlass-dsl 4.1.0 and cuda-python, and is left out without them.

Its training kernels try 36 variants for every new shape, which takes minutes: two shapes are timed
unless --every-row asks for all that it supports. The variants are compiled N at a time here, and
then chosen from as always. --errors takes the first variant and times nothing: it prints the errors,
of the training kernels on shifted data too (keys of mean 3, values of mean 1, r of mean 0.15).
Times are taken as in bench_attention.py (ms) and bench_decode.py (us); "first" is the first call on a
shape, compiling and choosing included. The official forward always writes what its backward needs;
ours is timed with and without that.
"""
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_attention
import bench_attention_backward
import bench_decode
import torch
from contest import announce, arguments_of, libraries, refused, write_json

TWO_SHAPES = ("8,2048,16,16,128", "2,8192,16,16,128")
TWO_CACHES = ("1,4096,8,8", "32,4096,32,8")


def load_public(folder):
    """The official package. Ends the program where it, Triton or a C compiler is missing."""
    def stop(what):
        sys.exit(f"{sys.argv[0]}: {what}")

    if folder and not (Path(folder) / "parallax" / "__init__.py").is_file():
        stop(f"no Parallax in {folder}: there is no {folder}/parallax/__init__.py; name a checkout of "
             "github.com/Yifei-Zuo/Parallax")
    if folder:
        sys.path.insert(0, str(Path(folder).resolve()))
    try:
        import triton  # noqa: F401
    except ImportError as error:
        stop(f"the official kernels need Triton ({error}): torch for Linux brings it along")
    if not shutil.which(os.environ.get("CC", "gcc")) and not shutil.which("clang"):
        stop("Triton needs a C compiler: install gcc, or name one in CC")
    try:
        import parallax
        import parallax.triton
        return parallax
    except ImportError as error:
        stop(f"cannot import the official package ({error}): name a checkout of "
             "github.com/Yifei-Zuo/Parallax with --public")


def watch_tuning(jobs, first_only):
    """From now on Triton's autotuner says what it is at, and has its candidates compiled `jobs` at a
    time before it measures them, or with `first_only` takes the first of them."""
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    measure = Autotuner._bench
    tuned = None

    def compile_all(tuner, args, meta):
        configs = tuner.prune_configs(meta)
        print(f"  {tuner.base_fn.__name__}: compiling {len(configs)} variants", end="", flush=True)
        start = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                tuner.fn.run(*args, **{**meta, "warmup": True}, **config.all_kwargs())
        print(f", {time.monotonic() - start:.0f} s; measuring them", flush=True)

    def watched(tuner, *args, config, **meta):
        nonlocal tuned
        if tuned is not tuner.nargs:  # its first candidate for this shape
            tuned = tuner.nargs
            compile_all(tuner, args, meta)
        return measure(tuner, *args, config=config, **meta)

    Autotuner._bench = watched
    if first_only:
        Autotuner.prune_configs = lambda tuner, meta: tuner.configs[:1]


def first_calls(contestants, *args):
    """{name: seconds of its first call}, without those that refuse."""
    seconds = {}
    for name, run in contestants.items():
        torch.cuda.synchronize()
        start = time.monotonic()
        try:
            run(*args)
            torch.cuda.synchronize()
            seconds[name] = time.monotonic() - start
        except Exception as error:  # noqa: BLE001: no kernel for this row
            refused(name, error)
    return seconds


def figures_of(name, unit, times, first, errors):
    """Prints a row, the contestants in terms of the fastest of ours. -> the same for the JSON file."""
    print(name)
    ours = min((time for who, time in times.items() if not who.startswith("official")), default=None)
    for who, error in errors.items():
        text = f"  {who:24s}"
        if who in times:
            text += f" {times[who]:9.4f} {unit}  {times[who] / ours:6.2f} of ours "
            if who.startswith("official"):
                text += f" first {first[who]:.1f} s "
        print(f"{text} error {error:.1e}", flush=True)
    theirs = {who: first[who] for who in errors if who.startswith("official")}
    return {"row": name, unit: times, "first_s": theirs, "error": errors}


def folded(tensor):
    """[batch, len, heads, head_dim] as the official kernels take it, [batch * heads, len, head_dim]."""
    return tensor.transpose(1, 2).flatten(0, 1).contiguous()


class OfficialTraining:
    """The official forward and backward of a problem, heads folded into the batch beforehand."""

    def __init__(self, public, problem):
        self.public, self.problem = public, problem
        self.inputs = [folded(getattr(problem, name)) for name in "qrkv"]
        self.d_o = folded(problem.d_o)
        self.group = problem.row.q_heads // problem.row.kv_heads

    def forward(self):
        self.saved = self.public.parallax_fwd(*self.inputs, self.problem.scale, self.group)

    def backward(self):
        self.gradients = self.public.parallax_bwd(*self.inputs, *self.saved, self.d_o,
                                                  self.problem.scale, self.group)

    def hand_over(self, which):
        """Puts the results of a pass into the problem, where check() looks."""
        results = {"o": self.saved[0]}
        if which == "backward":
            results = dict(zip(bench_attention_backward.GRADIENTS, self.gradients))
        for name, result in results.items():
            place = getattr(self.problem, name)
            place.copy_(result.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))


def time_training(public, library, row, arguments, shifted=False):
    """-> rows for the JSON file."""
    ours, theirs = (bench_attention_backward.BackwardProblem(row, library, shifted=shifted)
                    for _ in range(2))
    official = OfficialTraining(public, theirs)
    passes = {"forward": {"Parallax": bench_attention.parallax(library, ours),
                          "Parallax with statistics": ours.forward,
                          "official Triton": official.forward},
              "backward": {"Parallax": ours.backward, "official Triton": official.backward}}
    check = {"forward": bench_attention.check, "backward": bench_attention_backward.check}
    figures = []
    for which in [name for name in passes if name in arguments.passes]:
        if which == "backward" and not hasattr(official, "saved"):
            official.forward()
        first = first_calls(passes[which])
        official.hand_over(which)
        errors = {name: check[which](theirs if name.startswith("official") else ours)
                  for name in first}
        able = {name: passes[which][name] for name in first if not arguments.errors}
        times = bench_attention.measure(able, arguments.rounds)
        name = f"{which} {row.name()}" + (" shifted" if shifted else "")
        figures.append(figures_of(name, "ms", times, first, errors))
    return figures


def official_decodes(public, problem):
    """{name: function of a cache}, those whose parts are installed."""
    q, r, scale = problem.q, problem.r, problem.scale
    found = {"official Triton": lambda cache: public.triton.parallax_decode(q, r, *cache, scale)}
    if public.cute_decode_available:
        found["official CuTeDSL"] = lambda cache: public.parallax_attn_with_kvcache(
            q, r, *cache, scale=scale, out=problem.o)
    return found


def time_decode(public, library, row, arguments):
    """-> rows for the JSON file."""
    problem = bench_decode.Problem(row)
    contestants = {name: bench_decode.parallax(library, problem, with_schedule)
                   for name, with_schedule in (("Parallax", False), ("Parallax, a layer", True))}
    contestants |= official_decodes(public, problem)
    cache = problem.caches[0]
    first = first_calls(contestants, cache)
    errors = {}
    for name in first:
        o = contestants[name](cache)
        if o is not None:
            problem.o.copy_(o)
        errors[name] = bench_decode.check(problem, cache)
    able = {name: contestants[name] for name in first if not arguments.errors}
    times = bench_decode.measure(able, problem, arguments.rounds)
    return [figures_of(f"decode {row.name()}", "us", times, first, errors)]


def chosen(rows, default, arguments):
    rows = [row for row in rows if arguments.every_row or row.name() in default]
    return [row for row in rows if arguments.only in row.name()]


def main():
    parser = arguments_of(__doc__, rounds=11, library="Parallax")
    parser.add_argument("--public", metavar="FOLDER", help="a checkout of the official package")
    parser.add_argument("--passes", nargs="+", default=["forward", "backward", "decode"],
                        choices=("forward", "backward", "decode"))
    parser.add_argument("--every-row", action="store_true", help="every shape that it supports")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                        help="variants compiled at a time")
    parser.add_argument("--errors", action="store_true", help="errors instead of times")
    arguments = parser.parse_args()
    (library, *_) = libraries(arguments, "Parallax").values()
    public = load_public(arguments.public)
    watch_tuning(arguments.jobs, first_only=arguments.errors)
    announce(f"official package {public.__version__}")
    if "decode" in arguments.passes and not public.cute_decode_available:
        print("  official CuTeDSL decode left out: nvidia-cutlass-dsl 4.1.0 and cuda-python are not "
              "both here, or do not work here")
    figures = []
    if {"forward", "backward"} & set(arguments.passes):
        # Causal, dense, bf16: what the official training kernels are right for.
        rows = [row for row in bench_attention.ROWS if row.causal and not row.lengths
                and not row.window and row.dtype == torch.bfloat16 and row.head_dim <= 128]
        for row in chosen(rows, TWO_SHAPES, arguments):
            for shifted in (False, True) if arguments.errors else (False,):
                figures += time_training(public, library, row, arguments, shifted)
                torch.cuda.empty_cache()
    if "decode" in arguments.passes:
        for row in chosen(bench_decode.TABLE, TWO_CACHES, arguments):
            figures += time_decode(public, library, row, arguments)
            torch.cuda.empty_cache()
    write_json(arguments, figures, official=public.__version__)


if __name__ == "__main__":
    main()
