// SPDX-License-Identifier: MIT
#include "lm/kv_cache.h"

#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <utility>

namespace parallax::lm {
namespace {

constexpr std::int64_t kMaxPageSize = 256;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

KvCacheShape checked(KvCacheShape shape) {
  const auto refuse = [](const std::string& what, std::int64_t value) {
    throw Error("key/value cache: " + what + ", got " + std::to_string(value));
  };
  if (shape.batch < 1) refuse("batch must be at least 1", shape.batch);
  if (shape.max_len < 1) refuse("max_len must be at least 1", shape.max_len);
  if (shape.page_size < 1 || shape.page_size > kMaxPageSize ||
      !std::has_single_bit(static_cast<std::uint64_t>(shape.page_size))) {
    refuse("page_size must be a power of two from 1 to 256", shape.page_size);
  }
  if (shape.num_pages < 0) refuse("num_pages must be 0 (enough) or more", shape.num_pages);
  if (shape.num_pages == 0) {
    shape.num_pages = shape.batch * divide_up(shape.max_len, shape.page_size);
  }
  return shape;
}

}  // namespace

KvCache::KvCache(const ModelConfig& config, const KvCacheShape& shape, at::TensorOptions options)
    : shape_(checked(shape)),
      max_pages_(divide_up(shape_.max_len, shape_.page_size)),
      pages_(shape_.batch),
      lens_(shape_.batch, 0),
      references_(shape_.num_pages, 0) {
  for (std::int32_t page = 0; page < shape_.num_pages; ++page) free_.insert(free_.end(), page);
  host_tables_ = at::zeros({table_begin() + shape_.batch * max_pages_}, at::kInt);
  tables_ = host_tables_.to(options.device());
  for (std::int64_t row = 0; row < shape_.batch; ++row) write_row(row);
  upload_all();
  // An idle row writes into a token of its own, in pages behind the pool.
  const std::int64_t all_pages = shape_.num_pages + divide_up(shape_.batch, shape_.page_size);
  storage_ = at::empty(
      {config.num_layers, 2, all_pages, shape_.page_size, config.num_kv_heads, config.head_dim},
      options);
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    k_.push_back(storage_[layer][0]);
    v_.push_back(storage_[layer][1]);
  }
  const at::ScalarType angle_dtype =
      storage_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor places =
      at::arange(capacity(), at::TensorOptions(at::kInt).device(options.device()));
  angles_ = make_rope(places, config.head_dim, config.rope_theta, angle_dtype);
  angles_ = {angles_.cos.squeeze(1), angles_.sin.squeeze(1)};
}

void KvCache::reserve(std::int64_t row, std::int64_t new_tokens) {
  check_room({row, 1}, new_tokens);
  take(row, new_tokens);
  write_row(row);
  upload_all();
}

void KvCache::append(RowRange rows, std::int64_t new_tokens) {
  check_room(rows, new_tokens);
  count(rows, new_tokens) ? upload_all() : upload_lens();
}

void KvCache::append_counted(RowRange rows) {
  if (counted_ != rows) {
    throw Error("key/value cache: the device has not counted a token more in rows " +
                std::to_string(rows.first) + " to " + std::to_string(rows.first + rows.count - 1) +
                ": append the tokens themselves");
  }
  check_room(rows, 1);
  if (count(rows, 1)) upload_pages();
}

bool KvCache::count(RowRange rows, std::int64_t new_tokens) {
  bool pages_changed = false;
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row) {
    const bool takes = writes_shared_page(row) || static_cast<std::int64_t>(pages_[row].size()) <
                                                      pages_for(lens_[row] + new_tokens);
    if (takes) take(row, new_tokens);
    pages_changed = pages_changed || takes || lens_[row] == 0;
    const std::int64_t begin = std::exchange(lens_[row], lens_[row] + new_tokens);
    write_row(row);
    host_tables_.mutable_data_ptr<std::int32_t>()[row] = static_cast<std::int32_t>(begin);
  }
  return pages_changed;
}

void KvCache::append(std::int64_t first_row, const std::vector<std::int32_t>& tokens) {
  const RowRange rows{first_row, static_cast<std::int64_t>(tokens.size())};
  check_room(rows, 1);
  auto* newest = host_tables_.mutable_data_ptr<std::int32_t>() + 3 * shape_.batch + 1;
  std::copy(tokens.begin(), tokens.end(), newest + first_row);
  append(rows, 1);
}

void KvCache::fork(std::int64_t from, std::int64_t to) {
  check_row(from);
  fork(from, to, lens_[from]);
}

void KvCache::fork(std::int64_t from, std::int64_t to, std::int64_t len) {
  check_row(from);
  check_row(to);
  if (len < 0 || len > lens_[from]) {
    throw Error("key/value cache: row " + std::to_string(from) + " holds " +
                std::to_string(lens_[from]) + " tokens, a fork of " + std::to_string(len) +
                " was asked for");
  }
  if (from == to || lens_[to] > 0 || !pages_[to].empty()) {
    throw Error("key/value cache: row " + std::to_string(to) +
                " holds a sequence: release it before another is forked into it");
  }
  // Reserved pages that hold nothing yet stay with their owner.
  const auto held = pages_[from].begin() + pages_for(len);
  pages_[to].assign(pages_[from].begin(), held);
  for (const std::int32_t page : pages_[to]) ++references_[page];
  lens_[to] = len;
  write_row(to);
  upload_all();
}

void KvCache::release(std::int64_t row) {
  check_row(row);
  for (const std::int32_t page : pages_[row]) drop(page);
  pages_[row].clear();
  lens_[row] = 0;
  write_row(row);
  upload_all();
}

bool KvCache::all_have(RowRange rows, std::int64_t len) const {
  const auto first = lens_.begin() + rows.first;
  return std::all_of(first, first + rows.count, [len](std::int64_t held) { return held == len; });
}

bool KvCache::in_one_piece(RowRange rows) const {
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row) {
    const auto gap = std::adjacent_find(pages_.at(row).begin(), pages_.at(row).end(),
                                        [](auto a, auto b) { return b != a + 1; });
    if (gap != pages_[row].end()) return false;
  }
  return true;
}

at::Tensor KvCache::positions(RowRange rows) const {
  return tables_.narrow(0, rows.first, rows.count);
}

at::Tensor KvCache::kv_lens(RowRange rows) const {
  return tables_.narrow(0, shape_.batch + rows.first, rows.count);
}

at::Tensor KvCache::page_table(RowRange rows) const {
  return tables_.narrow(0, table_begin() + rows.first * max_pages_, rows.count * max_pages_)
      .view({rows.count, max_pages_});
}

at::Tensor KvCache::newest(RowRange rows) const {
  return tables_.narrow(0, 3 * shape_.batch + 1 + rows.first, rows.count).unsqueeze(1);
}

at::Tensor KvCache::origins(RowRange rows) const {
  return tables_.narrow(0, 2 * shape_.batch + rows.first, rows.count + 1);
}

at::Tensor KvCache::row_of(const at::Tensor& pages, std::int64_t row) const {
  const std::int64_t count = pages_for(lens_.at(row));
  const at::Tensor held = in_one_piece({row, 1})
                              ? pages.narrow(0, count > 0 ? pages_[row].front() : 0, count)
                              : pages.index_select(0, page_table({row, 1})[0].narrow(0, 0, count));
  return held.flatten(0, 1).narrow(0, 0, lens_[row]).unsqueeze(0);
}

std::int64_t KvCache::pages_for(std::int64_t tokens) const {
  return divide_up(tokens, shape_.page_size);
}

// Whether the row's next token would change a page that another row sees.
bool KvCache::writes_shared_page(std::int64_t row) const {
  return lens_[row] % shape_.page_size != 0 &&
         references_[pages_[row][lens_[row] / shape_.page_size]] > 1;
}

void KvCache::check_row(std::int64_t row) const {
  if (row < 0 || row >= shape_.batch) {
    throw Error("key/value cache: no row " + std::to_string(row) + ", the rows are 0 to " +
                std::to_string(shape_.batch - 1));
  }
}

void KvCache::check_room(RowRange rows, std::int64_t new_tokens) const {
  check_row(rows.first);
  check_row(rows.first + rows.count - 1);
  std::int64_t needed = 0;
  std::map<std::int32_t, std::int32_t> copied;  // how many of the rows leave a shared page
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row) {
    const std::int64_t len = lens_[row] + new_tokens;
    if (len > shape_.max_len) {
      throw Error("key/value cache: room for " + std::to_string(shape_.max_len) + " tokens, " +
                  std::to_string(len) + " needed");
    }
    const auto held = static_cast<std::int64_t>(pages_[row].size());
    needed += std::max<std::int64_t>(pages_for(len) - held, 0);
    if (new_tokens == 0 || !writes_shared_page(row)) continue;
    const std::int32_t last = pages_[row][lens_[row] / shape_.page_size];
    if (references_[last] - copied[last] > 1) {  // the last to write keeps the page
      ++needed;
      ++copied[last];
    }
  }
  if (needed > num_free_pages()) {
    throw Error("key/value cache: " + std::to_string(needed) + " more pages of " +
                std::to_string(shape_.page_size) + " tokens needed, " +
                std::to_string(num_free_pages()) + " of " + std::to_string(num_pages()) +
                " are free");
  }
}

void KvCache::take(std::int64_t row, std::int64_t new_tokens) {
  if (new_tokens > 0 && writes_shared_page(row)) own_last_page(row);
  const std::int64_t wanted = pages_for(lens_[row] + new_tokens);
  while (static_cast<std::int64_t>(pages_[row].size()) < wanted) pages_[row].push_back(take_page());
}

void KvCache::own_last_page(std::int64_t row) {
  std::int32_t& last = pages_[row][lens_[row] / shape_.page_size];
  const std::int32_t copy = take_page();
  const at::NoGradGuard no_grad;
  storage_.select(2, copy).copy_(storage_.select(2, last));
  drop(last);
  last = copy;
}

std::int32_t KvCache::take_page() {
  const std::int32_t page = *free_.begin();
  free_.erase(free_.begin());
  references_[page] = 1;
  return page;
}

void KvCache::drop(std::int32_t page) {
  if (--references_[page] == 0) free_.insert(page);
}

// What the device shall know of a row whose newest tokens have not been counted.
void KvCache::write_row(std::int64_t row) {
  auto* tables = host_tables_.mutable_data_ptr<std::int32_t>();
  std::int32_t* table = tables + table_begin() + row * max_pages_;
  const bool idle = lens_[row] == 0;
  const auto idle_page = static_cast<std::int32_t>(num_pages() + row / shape_.page_size);
  tables[row] = static_cast<std::int32_t>(idle ? row % shape_.page_size : lens_[row]);
  tables[shape_.batch + row] = static_cast<std::int32_t>(lens_[row]);
  std::fill_n(table, max_pages_, idle_page);
  if (!idle) std::copy(pages_[row].begin(), pages_[row].end(), table);
  tables[2 * shape_.batch + row] = table[0] * static_cast<std::int32_t>(shape_.page_size);
}

void KvCache::upload_lens() {
  counted_.reset();
  upload(0, table_begin());
}

void KvCache::upload_all() {
  counted_.reset();
  upload(0, tables_.numel());
}

void KvCache::upload_pages() { upload(table_begin(), tables_.numel()); }

void KvCache::upload(std::int64_t begin, std::int64_t end) {
  if (tables_.is_same(host_tables_)) return;
  // Pageable memory: the copy has left it when this returns.
  tables_.narrow(0, begin, end - begin)
      .copy_(host_tables_.narrow(0, begin, end - begin), /*non_blocking=*/true);
}

}  // namespace parallax::lm
