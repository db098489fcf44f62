// SPDX-License-Identifier: MIT
#include "tests/kernels/cuda_decode.h"

#include <gtest/gtest.h>

#include <limits>

#include "parallax/mask.h"
#include "parallax/step.h"

namespace parallax::tests {
namespace {

std::size_t rows_of(const AttentionProblem& problem) {
  return static_cast<std::size_t>(problem.batch * problem.q_len * problem.num_q_heads);
}

std::size_t elements_of(const AttentionProblem& problem) {
  return rows_of(problem) * static_cast<std::size_t>(problem.head_dim);
}

std::size_t newest_bytes(const AttentionProblem& problem) {
  return static_cast<std::size_t>(problem.batch * problem.q_len * problem.num_kv_heads *
                                  problem.head_dim * 2);
}

std::vector<float> floats(const DeviceMemory& memory) {
  std::vector<float> values(memory.size() / sizeof(float));
  memory.download(values.data(), values.size() * sizeof(float));
  return values;
}

DecodePlan plan_of(const Case& c, const CudaDecodeHow& how) {
  Device device = cuda_device(how.kernels);
  if (how.num_sms > 0) device.num_sms = how.num_sms;
  DecodePlan result;
  const Status status = plan(c.problem, device, &result);
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  return result;
}

std::optional<PagedCache> pages_of(const Case& c, const CudaDecodeHow& how) {
  if (how.page_size == 0) return {};
  return PagedCache(c.problem, how.page_size, 7);
}

Tensor cache_of(const Case& c, const std::optional<PagedCache>& pages, const Values& values,
                const std::vector<float>& scale) {
  const Tensor contiguous = keys(c, values, scale);
  return pages ? pages->scatter(contiguous) : contiguous;
}

// Entries of pages that hold no visible token become what is no page.
void spoil(const Case& c, PagedCache* pages) {
  for (std::int64_t b = 0; b < c.problem.batch; ++b) {
    const Mask mask = sequence_at(c.problem, c.lengths.view(), b).mask;
    const Range keys = mask.keys({0, mask.q_len});
    for (std::int64_t i = 0; i < pages->max_pages; ++i) {
      const std::int64_t first = i * pages->page_size;
      if (first < keys.end && first + pages->page_size > keys.begin) continue;
      pages->entries[static_cast<std::size_t>(b * pages->max_pages + i)] =
          i % 2 ? -1 : std::numeric_limits<std::int32_t>::max();
    }
  }
}

}  // namespace

CudaDecode::CudaDecode(const Case& c, const CudaDecodeHow& how)
    : case_(c),
      how_(how),
      plan_(plan_of(c, how)),
      pages_(pages_of(c, how)),
      q_(queries(c, c.inputs.q)),
      r_(queries(c, c.inputs.r)),
      k_(cache_of(c, pages_, c.inputs.k, c.k_scale)),
      v_(cache_of(c, pages_, c.inputs.v, c.v_scale)),
      o_(Tensor(c.problem, false)),
      lengths_(c.lengths),
      lse_(rows_of(c.problem) * sizeof(float)),
      t_bar_(rows_of(c.problem) * sizeof(float)),
      table_(pages_ ? pages_->entries.size() * sizeof(std::int32_t) : 0),
      k_scale_(c.k_scale.size() * sizeof(float)),
      v_scale_(c.v_scale.size() * sizeof(float)),
      workspace_(workspace_bytes(plan_)),
      schedule_(schedule_bytes(plan_)),
      m_(rows_of(c.problem) * sizeof(float)),
      d1_(m_.size()),
      d2_(m_.size()),
      o1_(elements_of(c.problem) * sizeof(float)),
      o2_(o1_.size()),
      newest_k_(newest_bytes(c.problem)),
      newest_v_(newest_k_.size()),
      positions_(static_cast<std::size_t>(c.problem.batch) * sizeof(std::int32_t)) {
  k_scale_.upload(c.k_scale.data(), k_scale_.size());
  v_scale_.upload(c.v_scale.data(), v_scale_.size());
  if (!pages_) return;
  if (how.bad_pages) spoil(c, &*pages_);
  table_.upload(pages_->entries.data(), table_.size());
}

DecodeArgs CudaDecode::args() {
  DecodeArgs args;
  args.q = q_.view();
  args.r = r_.view();
  args.k_cache = k_.view();
  args.v_cache = v_.view();
  args.k_scale = static_cast<const float*>(k_scale_.data());
  args.v_scale = static_cast<const float*>(v_scale_.data());
  args.sequences = lengths_.view();
  if (pages_) {
    args.pages = pages_->table();
    args.pages.table = static_cast<const std::int32_t*>(table_.data());
  }
  if (how_.with_state) {
    const auto memory = [](DeviceMemory& of) { return static_cast<float*>(of.data()); };
    args.state = {memory(m_), memory(d1_), memory(d2_), memory(o1_), memory(o2_)};
  } else {
    args.o = o_.output();
  }
  if (how_.with_statistics) {
    args.lse = lse_.data();
    args.t_bar = t_bar_.data();
  }
  if (!how_.own_schedule) args.schedule = schedule_.data();
  return args;
}

Status CudaDecode::schedule(cudaStream_t stream) {
  return parallax::schedule(plan_, lengths_.view(), schedule_.data(), static_cast<Stream>(stream));
}

Status CudaDecode::run(cudaStream_t stream) {
  return parallax::run(plan_, args(), workspace_.data(), static_cast<Stream>(stream));
}

Status CudaDecode::run_settled(cudaStream_t stream) {
  return parallax::run_settled(plan_, args(), workspace_.data(), static_cast<Stream>(stream));
}

void CudaDecode::withhold_newest() {
  const AttentionProblem& problem = case_.problem;
  const auto row = static_cast<std::size_t>(problem.head_dim) * 2;
  const auto heads = static_cast<std::size_t>(problem.num_kv_heads);
  std::vector<std::int32_t> positions;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    positions.push_back(static_cast<std::int32_t>(kv_len_of(case_, b) - problem.q_len));
    for (const auto& [cache, newest] : {std::pair{&k_, &newest_k_}, {&v_, &newest_v_}}) {
      const View view = cache->output();
      for (std::int64_t i = 0; i < problem.q_len; ++i) {
        char* from = static_cast<char*>(view.data) +
                     2 * (b * view.batch_stride + (positions.back() + i) * view.len_stride);
        char* to = static_cast<char*>(newest->data()) +
                   static_cast<std::size_t>(b * problem.q_len + i) * heads * row;
        const auto pitch = static_cast<std::size_t>(2 * view.head_stride);
        ASSERT_EQ(cudaMemcpy2D(to, row, from, pitch, row, heads, cudaMemcpyDeviceToDevice),
                  cudaSuccess);
        ASSERT_EQ(cudaMemset2D(from, pitch, 0xff, row, heads), cudaSuccess);
      }
    }
  }
  positions_.upload(positions.data(), positions_.size());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

Status CudaDecode::append(cudaStream_t stream) {
  const AttentionProblem& problem = case_.problem;
  AppendArgs args;
  const auto newest = [&](DeviceMemory& memory) {
    ConstView view;
    view.data = memory.data();
    view.head_stride = problem.head_dim;
    view.len_stride = problem.num_kv_heads * view.head_stride;
    view.batch_stride = problem.q_len * view.len_stride;
    return view;
  };
  args.k = newest(newest_k_);
  args.v = newest(newest_v_);
  args.k_cache = k_.output();
  args.v_cache = v_.output();
  args.positions = static_cast<const std::int32_t*>(positions_.data());
  return append_kv(problem, args, cuda_device(), static_cast<Stream>(stream));
}

void CudaDecode::set_lengths(const Lengths& lengths) {
  std::vector<std::int32_t> all = lengths.kv_lens;
  all.insert(all.end(), lengths.kv_start.begin(), lengths.kv_start.end());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  ASSERT_EQ(all.size() * sizeof(std::int32_t), lengths_.memory.size());
  lengths_.memory.upload(all.data(), lengths_.memory.size());
}

void CudaDecode::poison_outputs() {
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  o_.memory.poison();
  for (DeviceMemory* memory : {&lse_, &t_bar_, &workspace_, &m_, &d1_, &d2_, &o1_, &o2_}) {
    memory->poison();
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

Results CudaDecode::results() const {
  const auto values = [](const DeviceMemory& memory) {
    const std::vector<float> all = floats(memory);
    return Values(all.begin(), all.end());
  };
  Results results;
  results.o = o_.download().values();
  results.lse = values(lse_);
  results.t_bar = values(t_bar_);
  return results;
}

OwnedState CudaDecode::state() const {
  OwnedState state(case_.problem);
  state.m = floats(m_);
  state.d1 = floats(d1_);
  state.d2 = floats(d2_);
  state.o1 = floats(o1_);
  state.o2 = floats(o2_);
  return state;
}

Results cuda_decode(const Case& c, const CudaDecodeHow& how) {
  CudaDecode call(c, how);
  if (!how.own_schedule) {
    const Status status = call.schedule(nullptr);
    EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  }
  const Status status = call.run(nullptr);
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  return call.results();
}

}  // namespace parallax::tests
