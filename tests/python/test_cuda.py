# SPDX-License-Identifier: MIT
"""The operators on a GPU: values, gradients, streams, graphs. A pass that a build has no CUDA
kernel for must say so, and its tests are skipped with its words."""

import importlib.util
import shutil

import pytest
import torch

import parallax_cpp
from formula import formula, inputs, int_tensor, normed_and_turned, rotary_table

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
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
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


def test_a_training_step_runs_in_a_graph(skip_without_kernel):
    tensors, mask = case("window", 64, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    d_o = torch.randn_like(tensors[0])

    def step():
        o = parallax_cpp.attention(*leaves, **mask)
        return [o, *torch.autograd.grad(o, leaves, d_o)]

    side = torch.cuda.Stream()  # as PyTorch wants it: warmed up beside the default stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        skip_without_kernel(step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(skip_without_kernel, dtype):
    tensors, mask = case("causal", 64, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast("cuda", dtype=dtype):
        o = skip_without_kernel(lambda: parallax_cpp.attention(*leaves, **mask))
    assert o.dtype == dtype
    assert torch.equal(o, parallax_cpp.attention(*(leaf.to(dtype) for leaf in leaves), **mask))
    o.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.any() for leaf in leaves)


HAS_INDUCTOR = importlib.util.find_spec("triton") is not None and shutil.which("gcc") is not None


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not HAS_INDUCTOR, reason="needs triton and gcc")
        ),
    ],
)
def test_compiles_whole(skip_without_kernel, backend):
    torch._dynamo.reset()
    tensors, mask = case("window", 64, torch.bfloat16)
    d_o = torch.randn_like(tensors[0])

    def mixer(q, r, k, v):
        return parallax_cpp.attention(q * 2, r, k, v, **mask).mul(0.5)

    skip_without_kernel(lambda: mixer(*tensors))
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    # Powers of two are exact, so that the order of roundings does not show.
    ours, eager = (with_gradients(function, tensors, d_o) for function in (compiled, mixer))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager))


def test_strides_change_no_bit(skip_without_kernel):
    """Heads before tokens, and slices of one projection, as models have them."""
    tensors, mask = case("causal", 64, torch.bfloat16)
    d_o = torch.randn_like(tensors[0])

    def results(strided):
        return with_gradients(lambda *x: parallax_cpp.attention(*x, **mask), strided, d_o)

    expected = skip_without_kernel(lambda: results(tensors))
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    sizes = [tensor.shape[2] for tensor in tensors]
    projection = torch.cat(tensors, 2).flatten(2)
    slices = [
        part.unflatten(-1, (size, 64))
        for part, size in zip(projection.split([64 * size for size in sizes], -1), sizes)
    ]
    for strided in (heads_first, slices):
        assert not strided[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(results(strided), expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu(skip_without_kernel):
    """While the first is current: kernels, allocations and streams are the tensors' GPU's."""
    tensors, mask = case("lengths", 64, torch.bfloat16)
    d_o = torch.randn_like(tensors[0])
    there = [tensor.to("cuda:1") for tensor in tensors]
    mask_there = {name: value.to("cuda:1") for name, value in mask.items()}

    def results(tensors, mask, d_o):
        return with_gradients(lambda *x: parallax_cpp.attention(*x, **mask), tensors, d_o)

    expected = skip_without_kernel(lambda: results(tensors, mask, d_o))
    ours = results(there, mask_there, d_o.to("cuda:1"))
    q, r, k, v = (tensor[:, -1:] if i < 2 else tensor for i, tensor in enumerate(there))
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    positions = torch.zeros(2, dtype=torch.int32, device="cuda:1")
    parallax_cpp.append_kv(k, v, *caches, positions=positions)
    schedule = parallax_cpp.decode_schedule(q, caches[0], **mask_there)
    o = parallax_cpp.decode(q, r, *caches, **mask_there, schedule=schedule)
    state = parallax_cpp.decode(q, r, *caches, **mask_there, return_state=True)
    through = parallax_cpp.finalize(parallax_cpp.merge([state]), dtype=q.dtype)[0]
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in (*ours, schedule, o, through))
    assert all(torch.equal(a, b.cpu()) for a, b in zip((x.cpu() for x in ours), expected))
    here = [x.to("cuda:0") for x in (q, r, k, v)]
    assert torch.equal(o.cpu(), parallax_cpp.decode(*here, **mask).cpu())
    torch.testing.assert_close(through, o, rtol=2**-6, atol=1e-2)


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


def decode_case(q_len=1, kv_len=700, heads=(6, 2), head_dim=128, dtype=torch.bfloat16):
    """q, r, k, v and lengths on the GPU; the caches hold NaN beyond the lengths."""
    q, r, k, v = (
        tensor.cuda().to(dtype)
        for tensor in inputs(q_len=q_len, kv_len=kv_len, heads=heads, head_dim=head_dim, batch=3)
    )
    kv_lens = int_tensor([kv_len, 1 + q_len, kv_len // 3]).cuda()
    return q, r, k, v, kv_lens


def poisoned(cache, kv_lens):
    places = torch.arange(cache.shape[1], device="cuda").view(1, -1, 1, 1)
    return cache.masked_fill(places >= kv_lens.view(-1, 1, 1, 1), torch.nan)


def paged(cache, page_size):
    """The cache in pages in a random order, and the table."""
    batch, length = cache.shape[:2]
    pages = cache.reshape(batch * length // page_size, page_size, *cache.shape[2:])
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).cuda()
    scattered = torch.empty_like(pages)
    scattered[order] = pages
    return scattered, order.int().view(batch, -1)


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("q_len, heads", [(1, (6, 2)), (4, (8, 1)), (8, (3, 3))])
def test_decode_holds_the_error_rule(skip_without_kernel, q_len, heads, head_dim, window):
    q, r, k, v, kv_lens = decode_case(q_len, heads=heads, head_dim=head_dim)
    caches = poisoned(k, kv_lens), poisoned(v, kv_lens)
    mask = dict(kv_lens=kv_lens, window=window)
    o, lse, t_bar = skip_without_kernel(
        lambda: parallax_cpp.decode(q, r, *caches, **mask, return_stats=True)
    )
    exact = formula(*(x.double() for x in (q, r, k, v)), **mask)
    eager = formula(q, r, k, v, **mask)[0]
    assert_error_rule([o], [eager], [exact[0]], o.double(), k, v)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t_bar.double(), exact[2], rtol=1e-3, atol=1e-3)


def test_decode_reads_pages_and_writes_out(skip_without_kernel):
    q, r, k, v, kv_lens = decode_case(kv_len=768)
    caches = poisoned(k, kv_lens), poisoned(v, kv_lens)
    expected = skip_without_kernel(lambda: parallax_cpp.decode(q, r, *caches, kv_lens=kv_lens))
    for page_size in (1, 16, 64, 256):
        (k_pages, table), (v_pages, _) = (paged(cache, page_size) for cache in caches)
        out = torch.full_like(q, torch.nan)
        parallax_cpp.decode(
            q, r, k_pages, v_pages, kv_lens=kv_lens, page_table=table, out=out
        )
        assert torch.equal(out, expected), page_size


def test_decode_step_in_a_graph_with_changed_lengths(skip_without_kernel):
    """Append, schedule and two layers' decode, captured once, replayed as the lengths grow."""
    q, r, k, v, _ = decode_case(kv_len=513)
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    positions = torch.zeros(3, dtype=torch.int32, device="cuda")
    new_k, new_v = k[:, :1].clone(), v[:, :1].clone()

    def step():
        parallax_cpp.append_kv(new_k, new_v, *caches, positions=positions)
        kv_lens = positions + 1
        schedule = parallax_cpp.decode_schedule(q, caches[0], kv_lens=kv_lens)
        layer = dict(kv_lens=kv_lens, schedule=schedule)
        first = parallax_cpp.decode(q, r, *caches, **layer)
        return first, parallax_cpp.decode(first, r, *caches, **layer)

    skip_without_kernel(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for places in ([0, 0, 0], [1, 1, 1], [2, 300, 511], [3, 301, 512]):
        positions.copy_(int_tensor(places))
        rows = torch.arange(3, device="cuda"), positions.long()
        # What the steps before this one have appended.
        for cache, full in zip(caches, (k, v)):
            cache.copy_(poisoned(full, positions))
        new_k.copy_(k[rows].unsqueeze(1))
        new_v.copy_(v[rows].unsqueeze(1))
        graph.replay()
        expected = parallax_cpp.decode(q, r, k, v, kv_lens=positions + 1)
        assert torch.equal(results[0], expected), places
        again = parallax_cpp.decode(expected, r, k, v, kv_lens=positions + 1)
        assert torch.equal(results[1], again), places


def test_decode_follows_a_second_stream(skip_without_kernel):
    q, r, k, v, kv_lens = decode_case()
    expected = skip_without_kernel(lambda: parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [tensor.clone() for tensor in (q, r, k, v)]
        parallax_cpp.append_kv(*late[2:], *caches, positions=torch.zeros_like(kv_lens))
        o = parallax_cpp.decode(*late[:2], *caches, kv_lens=kv_lens)
    stream.synchronize()
    assert torch.equal(o, expected)


def test_decode_states_merge_to_the_whole(skip_without_kernel):
    q, r, k, v, kv_lens = decode_case()
    whole = skip_without_kernel(
        lambda: parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, return_stats=True)
    )
    cuts = torch.stack([torch.zeros_like(kv_lens), kv_lens // 3, kv_lens // 2, kv_lens])
    states = [
        parallax_cpp.decode(q, r, k, v, kv_lens=end, kv_start=start, return_state=True)
        for start, end in zip(cuts, cuts[1:])
    ]
    o, lse, t_bar = parallax_cpp.finalize(parallax_cpp.merge(states), dtype=q.dtype)
    exact = formula(*(x.double() for x in (q, r, k, v)), kv_lens=kv_lens)[0]
    eager = formula(q, r, k, v, kv_lens=kv_lens)[0]
    assert_error_rule([o], [eager], [exact], o.double(), k, v)
    torch.testing.assert_close(lse, whole[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t_bar, whole[2], rtol=1e-3, atol=1e-3)


def test_states_merge_as_on_the_cpu():
    _, _, _, _, kv_lens = decode_case()
    on_cpu = [
        parallax_cpp.State(
            *(torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(5 * n + i)).abs() + 0.5
              for i in range(3)),
            *(torch.randn(3, 2, 6, 64, generator=torch.Generator().manual_seed(5 * n + i))
              for i in (3, 4)),
        )
        for n in range(3)
    ]  # fmt: skip
    on_gpu = [parallax_cpp.State(*(x.to(kv_lens.device) for x in state)) for state in on_cpu]
    expected, ours = (parallax_cpp.merge(states) for states in (on_cpu, on_gpu))
    torch.testing.assert_close([x.cpu() for x in ours], list(expected), rtol=1e-5, atol=1e-5)
    finals = parallax_cpp.finalize(expected), parallax_cpp.finalize(ours)
    torch.testing.assert_close([x.cpu() for x in finals[1]], list(finals[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [None, 16])
def test_fp8_cache_is_written_as_on_the_cpu_and_read(skip_without_kernel, dtype, page_size):
    q, r, k, v, kv_lens = decode_case(kv_len=528, dtype=dtype)
    scales = [(x.abs().amax((0, 1, 3)) / 300).float() for x in (k, v)]
    options = dict(k_scale=scales[0], v_scale=scales[1])
    shape = k.shape if page_size is None else (3 * 528 // page_size, page_size, *k.shape[2:])
    caches = [torch.full(shape, torch.nan, device="cuda").to(torch.float8_e4m3fn) for _ in "kv"]
    on_cpu = [cache.cpu() for cache in caches]
    table = None
    if page_size is not None:
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
        table = order.int().view(3, -1).cuda()
    positions = torch.zeros(3, dtype=torch.int32, device="cuda")

    def append(device, caches):
        def there(x):
            return None if x is None else x.to(device)

        parallax_cpp.append_kv(
            there(k), there(v), *caches, positions=there(positions), page_table=there(table),
            k_scale=there(scales[0]), v_scale=there(scales[1]),
        )  # fmt: skip

    append("cuda", caches)
    append("cpu", on_cpu)
    for ours, expected in zip(caches, on_cpu):
        assert torch.equal(ours.cpu().view(torch.uint8), expected.view(torch.uint8))
    o = skip_without_kernel(
        lambda: parallax_cpp.decode(q, r, *caches, kv_lens=kv_lens, page_table=table, **options)
    )
    stored = [
        (x.float() / s.view(-1, 1)).to(torch.float8_e4m3fn).double() * s.double().view(-1, 1)
        for x, s in zip((k, v), scales)
    ]
    exact = formula(q.double(), r.double(), *stored, kv_lens=kv_lens)[0]
    assert (o - exact).abs().max() <= 1e-2 * exact.abs().max()
    prompt = parallax_cpp.attention(q, r, *caches, kv_lens=kv_lens, page_table=table, **options)

    def held(cache, scale):
        rows = cache.view(torch.uint8)
        rows = rows if table is None else rows[table.long()]
        elements = rows.reshape(k.shape).view(torch.float8_e4m3fn)
        return (elements.float() * scale.view(-1, 1)).to(dtype)

    wide = [held(cache, scale) for cache, scale in zip(caches, scales)]
    assert torch.equal(prompt, parallax_cpp.attention(q, r, *wide, kv_lens=kv_lens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_append_equals_the_composition(dtype):
    q, r, k, v, _ = decode_case(q_len=5, kv_len=5, dtype=dtype)
    positions = int_tensor([0, 7, 90]).cuda()
    cos, sin = (table.cuda() for table in rotary_table(128, 128))
    gains = [torch.rand(128, device="cuda") + 0.5 for _ in range(3)]
    caches = [torch.zeros(3, 100, 2, 128, dtype=dtype, device="cuda") for _ in "kv"]
    new_q, new_r = parallax_cpp.append_kv_rotary(
        q, r, k, v, *caches, positions=positions, cos=cos, sin=sin,
        q_gain=gains[0], r_gain=gains[1], k_gain=gains[2],
    )  # fmt: skip
    rounding = dict(rtol=torch.finfo(dtype).eps, atol=1e-3)
    for ours, x, gain in ((new_q, q, gains[0]), (new_r, r, gains[1])):
        exact = normed_and_turned(x.double(), gain.double(), cos, sin, positions)
        torch.testing.assert_close(ours.double(), exact, **rounding)
    exact = normed_and_turned(k.double(), gains[2].double(), cos, sin, positions)
    for b, position in enumerate(positions.tolist()):
        torch.testing.assert_close(
            caches[0][b, position : position + 5].double(), exact[b], **rounding
        )
        assert torch.equal(caches[1][b, position : position + 5], v[b])
    assert caches[1].any(-1).any(-1).sum() == 15


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
