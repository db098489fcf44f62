# SPDX-License-Identifier: MIT
"""What torch.compile, functionalization and fake tensors need of the operators."""

import shutil

import pytest
import torch

import parallax_cpp
from formula import inputs, int_tensor, rotary_table

ops = torch.ops.parallax
KV_LENS = int_tensor([6, 4])


def caches():
    return inputs(q_len=2, kv_len=6, heads=(6, 2))


def state():
    return parallax_cpp.decode(*caches(), kv_lens=KV_LENS, return_state=True)


def leaves():
    return [tensor.requires_grad_() for tensor in caches()]


def backward_arguments():
    q, r, k, v = caches()
    return (torch.ones_like(q), q, r, k, v, *ops.attention_forward(q, r, k, v, True))


def rotary():
    cos, sin = rotary_table(6, 8)
    return dict(cos=cos, sin=sin)


OPERATORS = {
    "attention": lambda: (ops.attention.default, leaves(), dict(window=3)),
    "attention.stats": lambda: (ops.attention.stats, leaves(), dict(kv_lens=KV_LENS)),
    "attention_forward": lambda: (ops.attention_forward.default, leaves(), dict(causal=False)),
    "attention_backward": lambda: (ops.attention_backward.default, backward_arguments(), {}),
    "decode": lambda: (ops.decode.default, caches(), dict(kv_lens=KV_LENS)),
    "decode.stats": lambda: (ops.decode.stats, caches(), dict(kv_lens=KV_LENS, window=2)),
    "decode.out": lambda: (
        ops.decode.out,
        caches(),
        dict(kv_lens=KV_LENS, out=torch.zeros_like(caches()[0])),
    ),
    "decode.state": lambda: (ops.decode.state, caches(), dict(kv_lens=KV_LENS)),
    "append_kv": lambda: (
        ops.append_kv.default,
        (caches()[2][:, :2], caches()[3][:, :2], *caches()[2:]),
        dict(positions=KV_LENS - 2),
    ),
    "decode_schedule": lambda: (
        ops.decode_schedule.default,
        (caches()[0], caches()[2]),
        dict(kv_lens=KV_LENS),
    ),
    "append_kv.rotary": lambda: (
        ops.append_kv.rotary,
        (*caches()[:2], caches()[2][:, :2], caches()[3][:, :2], *caches()[2:]),
        dict(positions=KV_LENS - 2, k_gain=torch.ones(8), **rotary()),
    ),
    "merge": lambda: (ops.merge.default, tuple([part, part] for part in state()), {}),
    "finalize": lambda: (ops.finalize.default, tuple(state()), dict(dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    op, args, kwargs = OPERATORS[name]()
    torch.library.opcheck(op, tuple(args), kwargs)


def test_every_operator_is_checked():
    names = {
        schema.name.removeprefix("parallax::") + ("." + schema.overload_name).rstrip(".")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("parallax::")
    }
    assert names == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA"])
def test_every_operator_has_its_keys(name, key):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"parallax::{name}", key)


def block(q, r, k, v):
    """A little work around the operator, so that the compiler has layouts to choose."""
    return parallax_cpp.attention(q * 1.5, r.sin(), k, v + 1, window=4).cos()


def results(function, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    o = function(*leaves)
    return (o.detach(), *torch.autograd.grad(o.sum(), leaves))


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((4, 10), (3, 7), (5, 12)):  # no two sizes equal at first
        tensors = inputs(q_len=length, kv_len=length + 1, heads=(6, 2), batch=batch)
        torch.testing.assert_close(results(compiled, tensors), results(block, tensors))
    assert counter.frame_count == 1


def decode_step(q, r, k, v, k_cache, v_cache, positions):
    parallax_cpp.append_kv(k, v, k_cache, v_cache, positions=positions)
    return parallax_cpp.decode(q, r, k_cache, v_cache, kv_lens=positions + 1).mul(2)


def test_compiles_a_decode_step_that_mutates_its_cache():
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True, dynamic=True, backend="aot_eager")
    q, r, k, v = inputs(q_len=1, kv_len=1, heads=(6, 2))
    caches = {name: torch.zeros(2, 2, 9, 2, 8, dtype=torch.float64) for name in ("ours", "theirs")}
    for position in range(3):
        positions = int_tensor([position, position + 2])
        ours = compiled(q, r, k + position, v, *caches["ours"], positions)
        theirs = decode_step(q, r, k + position, v, *caches["theirs"], positions)
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(caches["ours"], caches["theirs"]) and caches["ours"].any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
def test_inductor_equals_eager(monkeypatch):
    """Its layouts and its memory planning, with scalar code: that compiles soonest."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: [])
    torch._dynamo.reset()

    def mixer(q, r, k, v):
        return parallax_cpp.attention(q * 1.5, r.sin(), k, v + 1)

    compiled = torch.compile(mixer, fullgraph=True, options={"cpp_cache_precompile_headers": False})
    tensors = inputs(q_len=6, kv_len=6, heads=(6, 2))
    torch.testing.assert_close(compiled(*tensors), mixer(*tensors))


def test_autocast_compiles():
    torch._dynamo.reset()

    def cast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return parallax_cpp.attention(*tensors)

    tensors = inputs(q_len=6, kv_len=6, dtype=torch.float32)
    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    assert compiled(*tensors).dtype == torch.bfloat16
    assert torch.equal(compiled(*tensors), cast(*tensors))
