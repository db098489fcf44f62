# SPDX-License-Identifier: MIT
"""parallax_cpp.attention: values, gradients, masks, autocast, and what it refuses."""

import pytest
import torch

import parallax_cpp
from formula import formula, inputs, int_tensor

CASES = {
    "causal": dict(q_len=5, kv_len=5),
    "full": dict(q_len=3, kv_len=6, causal=False),
    "group of 3, more keys than queries": dict(q_len=3, kv_len=7, heads=(6, 2)),
    "window": dict(q_len=6, kv_len=6, window=2),
    "window of one": dict(q_len=4, kv_len=4, window=1),
    "scale": dict(q_len=4, kv_len=4, scale=0.12),
    "kv_lens": dict(q_len=3, kv_len=6, kv_lens=[6, 4]),
    "kv_lens and kv_start": dict(q_len=4, kv_len=7, kv_lens=[7, 3], kv_start=[2, 1], window=3),
}


def case(name):
    options = dict(CASES[name])
    tensors = inputs(
        q_len=options.pop("q_len"), kv_len=options.pop("kv_len"), heads=options.pop("heads", (3, 1))
    )
    for lengths in ("kv_lens", "kv_start"):
        if lengths in options:
            options[lengths] = int_tensor(options[lengths])
    return tensors, options


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(name):
    tensors, options = case(name)
    ours = parallax_cpp.attention(*tensors, **options, return_stats=True)
    expected = formula(*tensors, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[0], parallax_cpp.attention(*tensors, **options))


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    tensors, options = case(name)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *args: parallax_cpp.attention(*args, **options), leaves, fast_mode=True
    )


def test_gradcheck_packed():
    q, r, k, v = (tensor[0].requires_grad_() for tensor in inputs(q_len=5, kv_len=6))
    offsets = dict(cu_seqlens_q=int_tensor([0, 2, 5]), cu_seqlens_k=int_tensor([0, 2, 6]))
    assert torch.autograd.gradcheck(
        lambda *args: parallax_cpp.attention(*args, window=4, **offsets), (q, r, k, v)
    )


def test_packed_equals_batched():
    q, r, k, v = inputs(q_len=5, kv_len=8, heads=(6, 2))
    packed = [tensor.flatten(0, 1) for tensor in (q, r, k, v)]
    o, lse, t_bar = parallax_cpp.attention(
        *packed,
        cu_seqlens_q=int_tensor([0, 5, 10]),
        cu_seqlens_k=int_tensor([0, 8, 16]),
        return_stats=True,
    )
    expected_o, expected_lse, expected_t_bar = formula(q, r, k, v)
    torch.testing.assert_close(o.view_as(q), expected_o)
    for ours, expected in ((lse, expected_lse), (t_bar, expected_t_bar)):
        torch.testing.assert_close(ours.view(6, 2, 5).transpose(0, 1), expected)


def test_softmax_without_a_probe():
    q, _, k, v = inputs(q_len=6, kv_len=6, heads=(4, 4))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(parallax_cpp.attention(q, torch.zeros_like(q), k, v), expected)


def test_one_visible_key_is_its_value_exactly():
    q, r, k, v = (tensor.requires_grad_() for tensor in inputs(q_len=4, kv_len=4, heads=(2, 2)))
    o = parallax_cpp.attention(q, r, k, v, window=1)
    assert torch.equal(o, v)
    o.sin().sum().backward()
    assert not q.grad.any() and not r.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(dtype):
    leaves = [tensor.float().requires_grad_() for tensor in inputs(q_len=5, kv_len=5)]
    with torch.autocast("cpu", dtype=dtype):
        o = parallax_cpp.attention(*leaves)
    assert o.dtype == dtype
    assert torch.equal(o, parallax_cpp.attention(*(leaf.to(dtype) for leaf in leaves)))
    o.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_double_backward_is_refused():
    leaves = [tensor.requires_grad_() for tensor in inputs(q_len=3, kv_len=3)]
    o = parallax_cpp.attention(*leaves)
    (dq,) = torch.autograd.grad(o.sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="parallax::attention: .*double backward"):
        dq.sum().backward()


def test_statistics_are_not_differentiable():
    leaves = [tensor.requires_grad_() for tensor in inputs(q_len=3, kv_len=3)]
    _, lse, t_bar = parallax_cpp.attention(*leaves, return_stats=True)
    assert not lse.requires_grad and not t_bar.requires_grad


REFUSALS = {
    "strides": (
        lambda q, r, k, v: dict(q=q.transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError,
        r"parallax::attention: q: expected a contiguous last axis \(stride 1\), got strides .*; "
        r"pass q.contiguous\(\)",
    ),
    "dtype": (
        lambda q, r, k, v: dict(v=v.half()),
        TypeError,
        "parallax::attention: v: expected float64 like k, got float16",
    ),
    "heads": (
        lambda q, r, k, v: dict(k=k.repeat(1, 1, 2, 1), v=v.repeat(1, 1, 2, 1)),
        ValueError,
        "q: expected a number of heads that is a multiple of the 2 heads of k, got 3",
    ),
    "window": (
        lambda q, r, k, v: dict(window=0),
        ValueError,
        "window: expected at least 1",
    ),
    "lengths": (
        lambda q, r, k, v: dict(kv_lens=torch.tensor([3, 3])),
        TypeError,
        "kv_lens: expected int32, got int64",
    ),
    "packed": (
        lambda q, r, k, v: dict(cu_seqlens_q=int_tensor([0, 3])),
        ValueError,
        "cu_seqlens_k: expected together with cu_seqlens_q, got None",
    ),
    "device": (
        lambda q, r, k, v: dict(r=r.to("meta")),
        ValueError,
        "r: expected device cpu like q, got meta",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_argument(name):
    change, error, message = REFUSALS[name]
    arguments = dict(zip("qrkv", inputs(q_len=3, kv_len=3)))
    arguments.update(change(**arguments))
    tensors = [arguments.pop(name) for name in "qrkv"]
    with pytest.raises(error, match=message):
        parallax_cpp.attention(*tensors, **arguments)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="softcap"):
        parallax_cpp.attention(*inputs(q_len=3, kv_len=3), softcap=30.0)
