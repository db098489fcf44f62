# SPDX-License-Identifier: MIT
"""parallax_cpp.decode, append_kv, merge, finalize."""

import pytest
import torch

import parallax_cpp
from formula import formula, inputs, int_tensor


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
