# SPDX-License-Identifier: MIT
"""What the benchmarks of CUDA kernels share: contestants take turns on one GPU, each call is timed by
events behind a sleep of the GPU, so that enqueueing never shows, and medians are kept."""
import argparse
import ctypes
import json
import statistics
import sys

import torch

LIBRARY = "build/libparallax_bench.so"
SLEEP_CYCLES = 6_000_000  # about 3 ms: longer than it takes to enqueue a call


class Tensor(ctypes.Structure):
    """A tensor [batch, len, heads, head_dim] as attention_abi.cc takes it."""

    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "len_stride", "head_stride")
    ]

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


def enqueue(function, call):
    """Calls attention_abi.cc on the current stream."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if function(ctypes.byref(call), stream):
        raise RuntimeError(call.message.decode())


def sdpa(backend, q, k, v, causal):
    """PyTorch's softmax attention by that backend alone, heads before lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


SDPA_BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "FA2": "FLASH_ATTENTION"}


def arguments_of(doc, rounds, library, portable=False):
    """A parser with the options that the scripts share; `library`: what --lib calls ours."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", action="append", metavar="NAME=PATH",
                        help=f"default: {library}={LIBRARY}; may be repeated")
    if portable:
        parser.add_argument("--portable", action="store_true", help="time the portable kernels too,"
                            " those that GPUs other than Hopper take")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", help="write the figures here too")
    return parser


def libraries(arguments, default):
    """{name: library} of --lib. Ends the program where one cannot be loaded, or there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]}: torch {torch.__version__} sees no GPU on this machine")
    found = {}
    for item in arguments.lib or [f"{default}={LIBRARY}"]:
        name, equals, path = item.partition("=")
        if not equals:
            sys.exit(f"{sys.argv[0]}: --lib takes NAME=PATH, got {item!r}")
        try:
            found[name] = ctypes.CDLL(path)
        except OSError as error:
            sys.exit(f"{sys.argv[0]}: cannot load {path} ({error}): `make build` makes {LIBRARY}")
    return found


def kinds_of(arguments, default):
    """{name: (library, portable)} of the contestants that are ours."""
    kinds = {name: (library, False) for name, library in libraries(arguments, default).items()}
    if arguments.portable:
        kinds |= {f"{name}, portable": (library, True) for name, (library, _) in kinds.items()}
    return kinds


def announce(what):
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {what}", flush=True)


def refused(name, error):
    """Says that a contestant has no kernel for a row."""
    print(f"  {name}: {(str(error).splitlines() or [repr(error)])[0][:120]}")


def milliseconds(run):
    """Of one call, however long it takes to enqueue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def able(contestants, prepare):
    """{name: prepare(run)} without those that refuse, which a line is printed for."""
    prepared = {}
    for name, run in contestants.items():
        try:
            prepared[name] = prepare(run)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001: a baseline without a kernel for this row
            prepared.pop(name, None)
            torch.cuda.synchronize()
            refused(name, error)
    return prepared


def warmed(run):
    run(), run()
    return run


def captured(runs):
    """The replay of a graph of these calls, after the first and the last have run once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[0](), runs[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def medians(contestants, rounds):
    """Median milliseconds of a call of each, taking turns."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(taken) for name, taken in times.items()}


def write_json(arguments, rows, **more):
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **more,
                       "rows": rows}, file, indent=1)
            file.write("\n")
