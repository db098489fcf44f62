# SPDX-License-Identifier: MIT
"""The operators on a GPU: values, gradients, streams, graphs. A pass that a build has no CUDA
kernel for must say so, and its tests are skipped with its words."""

import pytest
import torch

import parallax_cpp
from formula import formula, inputs, int_tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = {
    "causal": dict(q_len=300, kv_len=300),
    "full, more keys": dict(q_len=130, kv_len=257, causal=False),
    "window": dict(q_len=333, kv_len=333, window=70),
    "lengths": dict(q_len=70, kv_len=200, kv_lens=[200, 131], kv_start=[3, 64]),
}


@pytest.fixture
def skip_without_kernel():
    """Runs a call; skips where the build refuses it for want of a kernel."""

    def run(call):
        try:
            return call()
        except NotImplementedError as error:
            if "this build has no" in str(error):
                pytest.skip(str(error))
            raise

    return run


def case(name, head_dim, dtype, shifted=False):
    mask = dict(SHAPES[name])
    q, r, k, v = inputs(
        q_len=mask.pop("q_len"), kv_len=mask.pop("kv_len"), heads=(6, 2), head_dim=head_dim
    )
    if shifted:
        r, k = r * 0.5, k + 2.0
    for lengths in ("kv_lens", "kv_start"):
        if lengths in mask:
            mask[lengths] = int_tensor(mask[lengths]).cuda()
    return [tensor.cuda().to(dtype) for tensor in (q, r, k, v)], mask


def with_gradients(function, tensors, d_o):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, d_o.to(o.dtype))]


def assert_error_rule(ours, eager, exact, d_o, k, v):
    product = max(1.0, (d_o.abs().max() * v.abs().max() * k.abs().max()).item())
    for name, a, b, c in zip(("o", "dq", "dr", "dk", "dv"), ours, eager, exact):
        error, allowed = (a - c).abs().max().item(), (b - c).abs().max().item()
        assert error <= 2 * allowed + 1e-5 * product, name


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_error_rule(skip_without_kernel, name, head_dim, dtype, shifted):
    torch.manual_seed(0)
    tensors, mask = case(name, head_dim, dtype, shifted)
    o = skip_without_kernel(lambda: parallax_cpp.attention(*tensors, **mask))
    exact = formula(*(tensor.double() for tensor in tensors), **mask)[0]
    eager = formula(*tensors, **mask)[0]
    assert_error_rule([o], [eager], [exact], o.double(), *tensors[2:])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_error_rule_of_gradients(skip_without_kernel, name, head_dim, shifted):
    torch.manual_seed(0)
    tensors, mask = case(name, head_dim, torch.bfloat16, shifted)
    d_o = torch.randn_like(tensors[0])

    def ours():
        return with_gradients(lambda *x: parallax_cpp.attention(*x, **mask), tensors, d_o)

    def composed(*x):
        return formula(*x, **mask)[0]

    gradients = skip_without_kernel(ours)
    exact = with_gradients(composed, [tensor.double() for tensor in tensors], d_o)
    eager = with_gradients(composed, tensors, d_o)
    assert_error_rule(gradients, eager, exact, d_o, *tensors[2:])
    assert all(torch.equal(a, b) for a, b in zip(gradients, ours()))


def test_follows_the_current_stream(skip_without_kernel):
    tensors, _ = case("causal", 64, torch.bfloat16)
    expected = skip_without_kernel(lambda: parallax_cpp.attention(*tensors))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs below are ready long after the launch
        late = [tensor.clone() for tensor in tensors]
        o = parallax_cpp.attention(*late)
    stream.synchronize()
    assert torch.equal(o, expected)


def test_runs_in_a_graph(skip_without_kernel):
    tensors, mask = case("lengths", 64, torch.bfloat16)
    skip_without_kernel(lambda: parallax_cpp.attention(*tensors, **mask))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = parallax_cpp.attention(*tensors, **mask)
    tensors[0].normal_()
    mask["kv_lens"].copy_(int_tensor([90, 200]))
    graph.replay()
    assert torch.equal(o, parallax_cpp.attention(*tensors, **mask))


def test_decode_equals_attention(skip_without_kernel):
    q, r, k, v = (
        tensor.cuda().bfloat16()
        for tensor in inputs(q_len=1, kv_len=500, heads=(6, 2), head_dim=128)
    )
    kv_lens = int_tensor([500, 77]).cuda()
    beyond = torch.arange(500, device="cuda").view(1, -1, 1, 1) >= kv_lens.view(-1, 1, 1, 1)
    caches = k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)
    o = skip_without_kernel(lambda: parallax_cpp.decode(q, r, *caches, kv_lens=kv_lens))
    exact = formula(*(x.double() for x in (q, r, k, v)), kv_lens=kv_lens)[0]
    eager = formula(q, r, k, v, kv_lens=kv_lens)[0]
    assert_error_rule([o], [eager], [exact], o.double(), k, v)


def test_packed_equals_batched(skip_without_kernel):
    (q, r, k, v), _ = case("causal", 64, torch.bfloat16)
    offsets = int_tensor([0, 300, 600]).cuda()
    packed = skip_without_kernel(
        lambda: parallax_cpp.attention(
            *(tensor.flatten(0, 1) for tensor in (q, r, k, v)),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
        )
    )
    torch.testing.assert_close(packed.view_as(q), parallax_cpp.attention(q, r, k, v))


def test_refusals():
    (q, r, k, v), _ = case("causal", 64, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="parallax::attention: "):
        parallax_cpp.attention(q.float(), r.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="k: expected device cuda:0 like q, got cpu"):
        parallax_cpp.attention(q, r, k.cpu(), v)
    with pytest.raises(ValueError, match="kv_lens: expected device cuda:0 like q, got cpu"):
        parallax_cpp.attention(q, r, k, v, kv_lens=int_tensor([300, 300]))
