// SPDX-License-Identifier: MIT
#include "tests/kernels/cuda_call.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <utility>

#include "parallax/mask.h"
#include "tests/kernels/cpu_call.h"

namespace parallax::tests {
namespace {

void expect_success(cudaError_t error) {
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

std::size_t rows_of(const AttentionProblem& problem) {
  return static_cast<std::size_t>((problem.packed ? 1 : problem.batch) * problem.q_len *
                                  problem.num_q_heads);
}

Values floats(const DeviceMemory& memory, std::size_t count) {
  std::vector<float> values(count);
  memory.download(values.data(), count * sizeof(float));
  return Values(values.begin(), values.end());
}

ForwardPlan plan_of(const Case& c, const CudaHow& how) {
  ForwardPlan result;
  const Status status = plan(c.problem, cuda_device(how.kernels), &result);
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  return result;
}

// Whether the driver compiles all kernels from PTX, which the Hopper kernels have none of: what is
// one source for every GPU then runs as GPUs that there is no machine code for run it.
bool from_ptx() {
  const char* asked = std::getenv("CUDA_FORCE_PTX_JIT");
  return asked != nullptr && *asked == '1';
}

}  // namespace

bool has_gpu_for(Kernels kernels) {
  Device device;
  if (!query_device(0, &device).ok()) return false;
  return kernels == Kernels::kHopper ? device.compute_capability == 90 && !from_ptx()
                                     : device.compute_capability >= 80;
}

Device cuda_device(Kernels kernels) {
  Device device;
  const Status status = query_device(0, &device);
  EXPECT_TRUE(status.ok()) << status.message();
  device.portable = kernels == Kernels::kPortable || from_ptx();
  return device;
}

DeviceMemory::DeviceMemory(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  expect_success(cudaMalloc(&data_, bytes));
  poison();
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

void DeviceMemory::upload(const void* source, std::size_t bytes) {
  if (bytes > 0) expect_success(cudaMemcpy(data_, source, bytes, cudaMemcpyHostToDevice));
}

void DeviceMemory::download(void* destination, std::size_t bytes) const {
  expect_success(cudaDeviceSynchronize());
  if (bytes > 0) expect_success(cudaMemcpy(destination, data_, bytes, cudaMemcpyDeviceToHost));
}

void DeviceMemory::poison() {
  if (size_ == 0) return;
  expect_success(cudaMemset(data_, 0xff, size_));
  expect_success(cudaDeviceSynchronize());  // streams that do not block would not wait for it
}

void DeviceMemory::swap(DeviceMemory* other) {
  std::swap(data_, other->data_);
  std::swap(size_, other->size_);
}

DeviceTensor::DeviceTensor(Tensor tensor) : host(std::move(tensor)), memory(host.bytes().size()) {
  memory.upload(host.bytes().data(), host.bytes().size());
}

ConstView DeviceTensor::view() const {
  ConstView view = host.const_view();
  view.data = memory.data();
  return view;
}

View DeviceTensor::output() {
  View view = host.view();
  view.data = memory.data();
  return view;
}

void DeviceTensor::exchange_memory(DeviceTensor* other) {
  memory.swap(&other->memory);
  for (DeviceTensor* tensor : {this, other}) {
    tensor->memory.upload(tensor->host.bytes().data(), tensor->host.bytes().size());
  }
}

Tensor DeviceTensor::download() const {
  Tensor tensor = host;
  memory.download(tensor.bytes().data(), tensor.bytes().size());
  EXPECT_TRUE(tensor.gaps_intact());
  return tensor;
}

DeviceLengths::DeviceLengths(const Lengths& lengths)
    : host(lengths),
      memory(4 * (host.cu_seqlens_q.size() + host.cu_seqlens_k.size() + host.kv_lens.size() +
                  host.kv_start.size())) {
  std::vector<std::int32_t> all;
  for (const auto* array :
       {&host.cu_seqlens_q, &host.cu_seqlens_k, &host.kv_lens, &host.kv_start}) {
    all.insert(all.end(), array->begin(), array->end());
  }
  memory.upload(all.data(), 4 * all.size());
}

Sequences DeviceLengths::view() const {
  const auto* next = static_cast<const std::int32_t*>(memory.data());
  const auto take = [&](const std::vector<std::int32_t>& array) {
    const std::int32_t* start = array.empty() ? nullptr : next;
    next += array.size();
    return start;
  };
  Sequences sequences;
  sequences.cu_seqlens_q = take(host.cu_seqlens_q);
  sequences.cu_seqlens_k = take(host.cu_seqlens_k);
  sequences.kv_lens = take(host.kv_lens);
  sequences.kv_start = take(host.kv_start);
  return sequences;
}

namespace {

// Entries of pages that hold no visible token become no pages.
std::vector<std::int32_t> visible_entries(const Case& c, const PagedCache& paged) {
  std::vector<std::int32_t> entries(paged.entries.size(), -1);
  for (std::int64_t b = 0; b < c.problem.batch; ++b) {
    const Mask mask = sequence_at(c.problem, c.lengths.view(), b).mask;
    const Range seen = mask.q_len > 0 ? mask.keys({0, mask.q_len}) : Range{};
    for (int j = seen.begin; j < seen.end; ++j) {
      const auto entry = static_cast<std::size_t>(b * paged.max_pages + j / paged.page_size);
      entries[entry] = paged.entries[entry];
    }
  }
  return entries;
}

Tensor cache_of(const Case& c, const std::optional<PagedCache>& paged, const Values& values,
                const std::vector<float>& scale) {
  const Tensor contiguous = keys(c, values, scale);
  return paged ? paged->scatter(contiguous) : contiguous;
}

}  // namespace

CudaForward::CudaForward(const Case& c, const CudaHow& how)
    : case_(c),
      how_(how),
      plan_(plan_of(c, how)),
      paged_(how.page_size > 0 ? std::optional(PagedCache(c.problem, how.page_size, 5))
                               : std::nullopt),
      q_(queries(c, c.inputs.q)),
      r_(queries(c, c.inputs.r)),
      k_(cache_of(c, paged_, c.inputs.k, c.k_scale)),
      v_(cache_of(c, paged_, c.inputs.v, c.v_scale)),
      o_(Tensor(c.problem, false)),
      v_bar_(Tensor(c.problem, false)),
      lengths_(c.lengths),
      lse_(rows_of(c.problem) * sizeof(float)),
      t_bar_(rows_of(c.problem) * sizeof(float)),
      workspace_(workspace_bytes(plan_)),
      page_table_(paged_ ? 4 * paged_->entries.size() : 0),
      k_scale_(c.k_scale.size() * sizeof(float)),
      v_scale_(c.v_scale.size() * sizeof(float)) {
  k_scale_.upload(c.k_scale.data(), k_scale_.size());
  v_scale_.upload(c.v_scale.data(), v_scale_.size());
  if (paged_) page_table_.upload(visible_entries(c, *paged_).data(), page_table_.size());
  if ((r_.memory.data() < q_.memory.data()) != how.r_below_q) q_.exchange_memory(&r_);
}

Status CudaForward::run(cudaStream_t stream) {
  ForwardArgs args;
  args.q = q_.view();
  args.r = r_.view();
  args.k = k_.view();
  args.v = v_.view();
  args.k_scale = static_cast<const float*>(k_scale_.data());
  args.v_scale = static_cast<const float*>(v_scale_.data());
  args.sequences = lengths_.view();
  if (paged_) {
    args.pages = paged_->table();
    args.pages.table = static_cast<const std::int32_t*>(page_table_.data());
  }
  args.o = o_.output();
  if (how_.with_statistics) {
    args.v_bar = v_bar_.output();
    args.lse = lse_.data();
    args.t_bar = t_bar_.data();
  }
  return parallax::run(plan_, args, workspace_.data(), static_cast<Stream>(stream));
}

void CudaForward::poison_outputs() {
  expect_success(cudaDeviceSynchronize());
  o_.memory.poison();
  v_bar_.memory.poison();
  lse_.poison();
  t_bar_.poison();
  workspace_.poison();
  expect_success(cudaDeviceSynchronize());
}

Results CudaForward::results() const {
  Results results;
  results.o = o_.download().values();
  if (how_.with_statistics) {
    results.v_bar = v_bar_.download().values();
    results.lse = floats(lse_, rows_of(case_.problem));
    results.t_bar = floats(t_bar_, rows_of(case_.problem));
  }
  return results;
}

Results cuda_forward(const Case& c, const CudaHow& how) {
  CudaForward call(c, how);
  const Status status = call.run(nullptr);
  EXPECT_TRUE(status.ok()) << c.name << ": " << status.message();
  return call.results();
}

}  // namespace parallax::tests
