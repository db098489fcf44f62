// SPDX-License-Identifier: MIT
// Keys and values of the tokens a model has seen, for generation, in pages that sequences take from
// one pool and give back (paged attention: Kwon et al., arXiv 2309.06180). r is used where its
// token is the query and never cached, so both mixers keep the same cache.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "lm/config.h"
#include "lm/error.h"
#include "lm/layers.h"

namespace parallax::lm {

struct KvCacheShape {
  std::int64_t batch = 1;       // rows: sequences held at once
  std::int64_t max_len = 0;     // tokens that one sequence may have
  std::int64_t page_size = 64;  // tokens; a power of two from 1 to 256
  std::int64_t num_pages = 0;   // of the pool; 0: enough for every row to be full
};

// Some rows of a cache: [first, first + count).
struct RowRange {
  std::int64_t first = 0;
  std::int64_t count = 1;
  bool operator==(const RowRange&) const = default;
};

// Row b holds one sequence, or is idle (length 0, no pages). The tensors below keep their addresses
// for the life of the cache, so a captured CUDA graph that reads them can be replayed after any of
// the calls that change their contents. Not thread safe; the device work of a call is queued on the
// current stream.
class KvCache {
 public:
  // Throws Error where the shape is impossible.
  KvCache(const ModelConfig& config, const KvCacheShape& shape, at::TensorOptions options = {});
  KvCache(KvCache&&) = default;
  KvCache& operator=(KvCache&&) = default;

  // Takes the pages that row needs for new_tokens more, a copy of a shared page that they would
  // begin in among them; later appends of so many tokens cannot fail, unless the row is forked in
  // between. Throws Error, changing nothing, where the pool has too few free pages or the sequence
  // would be longer than max_len.
  void reserve(std::int64_t row, std::int64_t new_tokens);

  // Counts new_tokens more in each of the rows; a mixer then writes their keys and values. Reserves
  // what is not reserved yet; throws as reserve does, for all rows or none.
  void append(RowRange rows, std::int64_t new_tokens);
  // The same for one token in each row from `first_row` on, tokens[i] in row first_row + i, which
  // newest() then tells the device.
  void append(std::int64_t first_row, const std::vector<std::int32_t>& tokens);

  // The device has counted, or will before anything that is queued after this call, a token more in
  // each of the rows that is not idle, and knows which (ops::next_tokens).
  void let_device_count(RowRange rows) { counted_ = rows; }
  // Counts it here too: nothing but new pages goes to the device. Throws as append does, and where
  // the device has not counted these rows or has been told other lengths since.
  void append_counted(RowRange rows);

  // Lets the idle row `to` hold what `from` holds, or the first len tokens of it, in the same
  // pages. Whoever appends first to a page that is shared copies it.
  void fork(std::int64_t from, std::int64_t to);
  void fork(std::int64_t from, std::int64_t to, std::int64_t len);

  // Gives up the row's sequence: pages that nobody else holds are free again.
  void release(std::int64_t row);

  std::int64_t len(std::int64_t row) const { return lens_.at(row); }
  const std::vector<std::int32_t>& pages(std::int64_t row) const { return pages_.at(row); }
  std::int64_t num_free_pages() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t num_pages() const { return static_cast<std::int64_t>(references_.size()); }
  std::int64_t page_size() const { return shape_.page_size; }
  std::int64_t batch() const { return shape_.batch; }
  // Tokens that one row of the page table spans: max_len, rounded up to pages.
  std::int64_t capacity() const { return max_pages_ * shape_.page_size; }
  // Whether each of the rows holds so many tokens.
  bool all_have(RowRange rows, std::int64_t len) const;
  // Whether each row's tokens lie in one piece, its pages being neighbours in the pool.
  bool in_one_piece(RowRange rows) const;

  // Where the newest tokens of each row begin and where they end, int32 [count]. An idle row ends
  // at 0, and what is written there goes to a place that no other row sees.
  at::Tensor positions(RowRange rows) const;
  at::Tensor kv_lens(RowRange rows) const;
  at::Tensor page_table(RowRange rows) const;  // int32 [count, max_pages]
  // The token that append() was last told for each row, int32 [count, 1]; 0 at first.
  at::Tensor newest(RowRange rows) const;
  // Where each row's first page begins among the tokens of all pages, and one entry more: int32
  // [count + 1]. For kernels that read rows in one piece.
  at::Tensor origins(RowRange rows) const;

  // RoPE's angles of every place in a row, as append_kv takes them: float32 (float64 beside float64
  // keys) [capacity, head_dim / 2].
  const Rope& angles() const { return angles_; }

  // A layer's pages, [pages, page_size, num_kv_heads, head_dim]; beyond the pool's own there are
  // those of the idle rows.
  at::Tensor& k(std::int64_t layer) { return k_.at(layer); }
  at::Tensor& v(std::int64_t layer) { return v_.at(layer); }
  // The pages of one row as [1, len(row), num_kv_heads, head_dim]: a view where they lie in one
  // piece, else a copy.
  at::Tensor row_of(const at::Tensor& pages, std::int64_t row) const;

 private:
  std::int64_t table_begin() const { return 4 * shape_.batch + 1; }
  std::int64_t pages_for(std::int64_t tokens) const;
  bool writes_shared_page(std::int64_t row) const;
  void check_row(std::int64_t row) const;
  void check_room(RowRange rows, std::int64_t new_tokens) const;
  void take(std::int64_t row, std::int64_t new_tokens);
  void own_last_page(std::int64_t row);
  std::int32_t take_page();
  void drop(std::int32_t page);
  // Counts new_tokens more in each of the rows. -> whether their pages are others now.
  bool count(RowRange rows, std::int64_t new_tokens);
  void write_row(std::int64_t row);
  void upload_all();
  void upload_lens();  // and all else but the page table
  void upload_pages();
  void upload(std::int64_t begin, std::int64_t end);

  KvCacheShape shape_;
  std::int64_t max_pages_ = 0;
  std::vector<std::vector<std::int32_t>> pages_;  // of each row
  std::vector<std::int64_t> lens_;                // of each row
  std::vector<std::int32_t> references_;          // to each page
  std::set<std::int32_t> free_;                   // the lowest is taken first
  std::optional<RowRange> counted_;               // by the device, ahead of lens_
  // int32: positions [batch], kv_lens [batch], origins [batch + 1], newest [batch], page_table
  // [batch, max_pages]. On a CPU the two are one.
  at::Tensor host_tables_, tables_;
  at::Tensor storage_;  // [num_layers, 2, pages, page_size, num_kv_heads, head_dim]
  std::vector<at::Tensor> k_, v_;
  Rope angles_;
};

}  // namespace parallax::lm
