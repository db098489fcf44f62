# SPDX-License-Identifier: MIT
"""parallax_cpp.decode, append_kv, merge, finalize."""

import pytest
import torch

import parallax_cpp
from formula import formula, inputs, int_tensor, normed_and_turned, rotary_table


def poisoned_caches(k, v, kv_lens):
    """Caches whose places beyond a sequence's length hold NaN."""
    beyond = torch.arange(k.shape[1]).view(1, -1, 1, 1) >= kv_lens.view(-1, 1, 1, 1)
    return k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_equals_attention(q_len, window):
    q, r, k, v = inputs(q_len=q_len, kv_len=9, heads=(6, 2))
    mask = dict(kv_lens=int_tensor([9, 5]), kv_start=int_tensor([1, 2]), window=window)
    caches = poisoned_caches(k, v, mask["kv_lens"])
    ours = parallax_cpp.decode(q, r, *caches, **mask, return_stats=True)
    torch.testing.assert_close(ours, formula(q, r, k, v, **mask))


def test_out_is_written_and_returned():
    q, r, k, v = inputs(q_len=1, kv_len=6, dtype=torch.float32)
    kv_lens = int_tensor([6, 4])
    expected = parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens)
    out = torch.full_like(q, torch.nan)
    assert parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="out: expected memory of its own, .* shared with q"):
        parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, out=q)
    with pytest.raises(ValueError, match=r"out: expected \[2, 1, 3, 8\]"):
        parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, out=out[:1])


def test_paged_appends_equal_a_contiguous_cache():
    q, r, k, v = inputs(q_len=2, kv_len=8, heads=(6, 2), dtype=torch.bfloat16)
    kv_lens = int_tensor([8, 8])
    k_pages = torch.full((4, 4, 2, 8), torch.nan, dtype=torch.bfloat16)
    v_pages = k_pages.clone()
    table = int_tensor([[2, 0], [3, 1]])
    for begin, end in ((0, 3), (3, 8)):
        parallax_cpp.append_kv(
            k[:, begin:end],
            v[:, begin:end],
            k_pages,
            v_pages,
            positions=int_tensor([begin, begin]),
            page_table=table,
        )
    paged = parallax_cpp.decode(q, r, k_pages, v_pages, kv_lens=kv_lens, page_table=table)
    assert torch.equal(paged, parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens))


def test_states_of_a_split_merge_to_the_whole():
    q, r, k, v = inputs(q_len=2, kv_len=9, heads=(6, 2), dtype=torch.float32)
    kv_lens = int_tensor([9, 6])
    whole = parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, return_stats=True)
    # The first 4 keys are visible to both queries, so no causal edge runs through them.
    prefix = parallax_cpp.State(
        *(
            torch.cat(parts, axis)
            for parts, axis in zip(
                zip(
                    *(
                        parallax_cpp.decode(
                            q[:, i : i + 1],
                            r[:, i : i + 1],
                            k[:, :4],
                            v[:, :4],
                            kv_lens=int_tensor([4, 4]),
                            return_state=True,
                        )
                        for i in range(2)
                    )
                ),
                (2, 2, 2, 1, 1),
            )
        )
    )
    rest = parallax_cpp.decode(
        q, r, k, v, kv_lens=kv_lens, kv_start=int_tensor([4, 4]), return_state=True
    )
    merged = parallax_cpp.merge([prefix, rest])
    torch.testing.assert_close(parallax_cpp.finalize(merged), whole, rtol=1e-5, atol=1e-5)
    assert parallax_cpp.finalize(merged, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def fp8_caches(k, v, capacity):
    """Caches of float8_e4m3fn that hold k and v from place 0 on, and their scales."""
    shape = (k.shape[0], capacity, *k.shape[2:])
    caches = [torch.full(shape, torch.nan).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = [x.abs().amax((0, 1, 3)).float() / 448 for x in (k, v)]
    scales[0][0] /= 2  # the first head of k saturates
    positions = torch.zeros(k.shape[0], dtype=torch.int32)
    parallax_cpp.append_kv(
        k, v, *caches, positions=positions, k_scale=scales[0], v_scale=scales[1]
    )
    return caches, scales


def test_fp8_cache_rounds_as_torch_does_and_decodes_what_it_holds():
    q, r, k, v = inputs(q_len=2, kv_len=9, heads=(6, 2), head_dim=32, dtype=torch.bfloat16)
    caches, scales = fp8_caches(k, v, capacity=12)
    stored = []
    for x, cache, scale in zip((k, v), caches, scales):
        scaled = x.float() / scale.view(-1, 1)
        expected = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(cache[:, :9].view(torch.uint8), expected.view(torch.uint8))
        assert cache[:, 9:].float().isnan().all()
        stored.append(expected.double() * scale.double().view(-1, 1))
    kv_lens = int_tensor([9, 5])
    options = dict(kv_lens=kv_lens, k_scale=scales[0], v_scale=scales[1])
    o = parallax_cpp.decode(q, r, *caches, **options)
    exact = formula(q.double(), r.double(), *stored, kv_lens=kv_lens)[0]
    torch.testing.assert_close(o.double(), exact, rtol=2**-7, atol=1e-3)
    state = parallax_cpp.decode(q, r, *caches, **options, return_state=True)
    torch.testing.assert_close(
        parallax_cpp.finalize(state, dtype=q.dtype)[0], o, rtol=2**-6, atol=1e-2
    )


def test_a_prompt_over_an_fp8_cache_meets_what_it_holds():
    """In chunks, as decode's tokens would: the cache's elements times their scales, in q's dtype."""
    q, r, k, v = inputs(q_len=7, kv_len=9, heads=(6, 2), head_dim=32, dtype=torch.bfloat16)
    caches, scales = fp8_caches(k, v, capacity=12)
    wide = [(x.float() * s.view(-1, 1)).to(q.dtype) for x, s in zip(caches, scales)]
    options = dict(kv_lens=int_tensor([9, 5]), kv_start=int_tensor([0, 2]), window=4)
    narrow_options = dict(options, k_scale=scales[0], v_scale=scales[1])
    expected = parallax_cpp.attention(q, r, *wide, **options, return_stats=True)
    ours = parallax_cpp.attention(q, r, *caches, **narrow_options, return_stats=True)
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)
    table = int_tensor([[5, 0, 3], [1, 4, 2]])
    pages = [x.new_empty(6, 4, 2, 32) for x in caches]
    for page, cache in zip(pages, caches):
        page.view(torch.uint8)[table.long()] = cache.view(torch.uint8).view(2, 3, 4, 2, 32)
    paged = parallax_cpp.attention(q, r, *pages, page_table=table, **narrow_options)
    assert torch.equal(paged, expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = parallax_cpp.attention(q.float(), r.float(), *caches, **narrow_options)
    assert torch.equal(o, expected[0])


def test_a_schedule_changes_nothing():
    q, r, k, v = inputs(q_len=1, kv_len=9, dtype=torch.float32)
    kv_lens = int_tensor([9, 5])
    schedule = parallax_cpp.decode_schedule(q, k, kv_lens=kv_lens)
    with_one = parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, schedule=schedule)
    assert torch.equal(with_one, parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens))
    with pytest.raises(ValueError, match="schedule: expected .* of this batch"):
        parallax_cpp.decode(q[:1], r[:1], k[:1], v[:1], kv_lens=kv_lens[:1], schedule=schedule)


@pytest.mark.parametrize("rotate_r", [True, False])
@pytest.mark.parametrize("left_padded", [False, True])
def test_append_after_norm_and_rope(rotate_r, left_padded):
    q, r, _, _ = inputs(q_len=3, kv_len=3, heads=(6, 2), head_dim=16)
    _, _, k, v = inputs(q_len=3, kv_len=3, heads=(6, 2), head_dim=16, seed=1)
    cos, sin = rotary_table(20, 16)
    gains = [torch.rand(16, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(3)]
    positions = int_tensor([4, 9])
    angles = int_tensor([1, 7]) if left_padded else None
    first = angles if left_padded else positions
    caches = [torch.zeros(2, 12, 2, 16, dtype=torch.float64) for _ in range(2)]
    new_q, new_r = parallax_cpp.append_kv_rotary(
        q, r, k, v, *caches, positions=positions, cos=cos, sin=sin, q_gain=gains[0],
        r_gain=gains[1], k_gain=gains[2], rotate_r=rotate_r, angles=angles,
    )
    r_cos, r_sin = (cos, sin) if rotate_r else (torch.ones_like(cos), torch.zeros_like(sin))
    torch.testing.assert_close(new_q, normed_and_turned(q, gains[0], cos, sin, first))
    torch.testing.assert_close(new_r, normed_and_turned(r, gains[1], r_cos, r_sin, first))
    expected_k = normed_and_turned(k, gains[2], cos, sin, first)
    for b, position in enumerate(positions):
        torch.testing.assert_close(caches[0][b, position : position + 3], expected_k[b])
        assert torch.equal(caches[1][b, position : position + 3], v[b])
        assert caches[0][b].any((1, 2)).sum() == caches[1][b].any((1, 2)).sum() == 3


def test_fp8_and_rotary_refusals():
    q, r, k, v = inputs(q_len=1, kv_len=4, heads=(6, 2), dtype=torch.float32)
    narrow = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    kv_lens, ones = int_tensor([4, 4]), torch.ones(2)
    scales = dict(k_scale=ones, v_scale=ones)
    with pytest.raises(ValueError, match="k_scale: expected float32 .* float8_e4m3fn cache"):
        parallax_cpp.decode(q, r, *narrow, kv_lens=kv_lens)
    with pytest.raises(ValueError, match="v_scale: expected float32 .* float8_e4m3fn cache"):
        parallax_cpp.decode(q, r, *narrow, kv_lens=kv_lens, k_scale=ones)
    with pytest.raises(ValueError, match="k_scale: expected None with a cache of float32"):
        parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, **scales)
    with pytest.raises(ValueError, match=r"k_scale: expected \[2\] \(\[num_kv_heads\]\)"):
        parallax_cpp.decode(q, r, *narrow, kv_lens=kv_lens, k_scale=torch.ones(3), v_scale=ones)
    with pytest.raises(ValueError, match=r"v_scale\[1\]: expected a finite number above 0"):
        bad = torch.tensor([1.0, 0.0])
        parallax_cpp.decode(q, r, *narrow, kv_lens=kv_lens, k_scale=ones, v_scale=bad)
    with pytest.raises(TypeError, match="k_scale: expected float32, got float64"):
        parallax_cpp.decode(q, r, *narrow, kv_lens=kv_lens, k_scale=ones.double(), v_scale=ones)
    with pytest.raises(TypeError, match="v_cache: expected float8_e4m3fn like k_cache"):
        parallax_cpp.decode(q, r, narrow[0], v, kv_lens=kv_lens, **scales)
    with pytest.raises(TypeError, match="k_cache: expected float64 like q, got float8_e4m3fn"):
        parallax_cpp.decode(q.double(), r.double(), *narrow, kv_lens=kv_lens, **scales)
    with pytest.raises(ValueError, match="k_scale: expected float32 .* float8_e4m3fn cache"):
        parallax_cpp.attention(q, r, *narrow)
    with pytest.raises(ValueError, match="k_scale: expected None with a cache of float32"):
        parallax_cpp.attention(q, r, k, v, **scales)
    with pytest.raises(NotImplementedError, match="k_scale: expected None where q, r, k or v"):
        parallax_cpp.attention(q.clone().requires_grad_(), r, *narrow, **scales)
    packed = dict(cu_seqlens_q=int_tensor([0, 1]), cu_seqlens_k=int_tensor([0, 4]))
    with pytest.raises(ValueError, match="k_scale: expected None in the packed layout"):
        parallax_cpp.attention(q[0], r[0], narrow[0][0], narrow[1][0], **packed, **scales)
    with pytest.raises(TypeError, match="k_cache: expected float32 like k, got float16"):
        parallax_cpp.append_kv(
            k[:, :1], v[:, :1], k.half(), v.half(), positions=int_tensor([0, 0])
        )
    cos, sin = rotary_table(4, 8)
    rotary = dict(positions=int_tensor([0, 3]), cos=cos, sin=sin)
    parallax_cpp.append_kv_rotary(q, r, k[:, :1], v[:, :1], k, v, **rotary)
    with pytest.raises(ValueError, match=r"sin: expected \[4, 4\]"):
        parallax_cpp.append_kv_rotary(
            q, r, k[:, :1], v[:, :1], k, v, **{**rotary, "sin": sin[:3]}
        )
    with pytest.raises(ValueError, match=r"angles\[0\]: expected 0 to 3"):
        parallax_cpp.append_kv_rotary(
            q, r, k[:, :1], v[:, :1], k, v, **rotary, angles=int_tensor([4, 0])
        )
    with pytest.raises(ValueError, match=r"k_gain: expected \[8\] \(\[head_dim\]\)"):
        parallax_cpp.append_kv_rotary(
            q, r, k[:, :1], v[:, :1], k, v, **rotary, k_gain=torch.ones(4)
        )
    with pytest.raises(ValueError, match="q: expected size 2 in axis 1 .the length of k."):
        parallax_cpp.append_kv_rotary(q, r, k[:, :2], v[:, :2], k, v, **rotary)


def test_refusals():
    q, r, k, v = inputs(q_len=1, kv_len=4)
    kv_lens = int_tensor([4, 4])
    with pytest.raises(ValueError, match="return_state: expected without out and return_stats"):
        parallax_cpp.decode(q, r, k, v, kv_lens=kv_lens, return_state=True, return_stats=True)
    with pytest.raises(ValueError, match="merge: states: expected at least one, got none"):
        parallax_cpp.merge([])
    with pytest.raises(NotImplementedError, match="k_cache: expected a tensor without grad"):
        parallax_cpp.decode(q, r, k.requires_grad_(), v, kv_lens=kv_lens)
    with pytest.raises(NotImplementedError, match="append_kv: k_cache: expected a tensor without"):
        parallax_cpp.append_kv(q[:, :, :1], r[:, :, :1], k, v, positions=int_tensor([0, 0]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"positions\[1\]: expected 0 to 3"):
        parallax_cpp.append_kv(q[:, :, :1], r[:, :, :1], k, v, positions=int_tensor([0, 4]))
