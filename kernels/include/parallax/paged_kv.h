// SPDX-License-Identifier: MIT
// Where the keys and values of a sequence lie: one rule for contiguous and paged caches, usable in
// device code. Page tables are data: whoever reads them checks num_pages first (attention.h).
#pragma once

#include <cstdint>

#include "parallax/mask.h"

namespace parallax {

// The tokens of one sequence in k or v.
struct KvRows {
  const std::int32_t* pages = nullptr;  // the sequence's row of the page table; null: contiguous
  int page_shift = 0;                   // log2 of page_size
  std::int64_t page_stride = 0;
  std::int64_t len_stride = 0;
  std::int64_t origin = 0;  // of token 0 where contiguous

  // Offset in elements of token j's head 0.
  PARALLAX_HOST_DEVICE std::int64_t offset(std::int64_t j) const {
    if (pages == nullptr) return origin + j * len_stride;
    const std::int64_t slot = j & ((std::int64_t{1} << page_shift) - 1);
    return pages[j >> page_shift] * page_stride + slot * len_stride;
  }
};

PARALLAX_HOST_DEVICE inline KvRows kv_rows(std::int64_t batch_stride, std::int64_t len_stride,
                                           const PageTable& pages, const Sequence& sequence) {
  KvRows rows;
  rows.len_stride = len_stride;
  if (pages.table == nullptr) {
    rows.origin = sequence.kv_row(batch_stride, len_stride, 0);
    return rows;
  }
  rows.pages = pages.table + sequence.batch_idx * pages.max_pages;
  while ((1 << rows.page_shift) < pages.page_size) ++rows.page_shift;
  rows.page_stride = batch_stride;
  return rows;
}

}  // namespace parallax
