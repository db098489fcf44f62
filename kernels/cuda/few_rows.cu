// SPDX-License-Identifier: MIT
// Products of a few rows and what follows them: nothing, SwiGLU, a residual, the largest.
#include <cmath>
#include <string>

#include "cuda/argmax.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/launch.h"

namespace parallax {
namespace {

// What a lane finishes of y: one column of two rows, and of a second group another column.
template <class T>
struct Output {
  const FewRowsParams& params;
  int row, column;

  __device__ __forceinline__ bool there(int i) const {
    return row + i % 2 < params.rows && column + i / 2 * kGroupRows < params.out;
  }
  __device__ __forceinline__ std::int64_t offset(int i) const {
    return (row + i % 2) * params.args.y_stride + column + i / 2 * kGroupRows;
  }
  // Asked for before the sums are made.
  __device__ __forceinline__ T old(int i) const {
    const bool asked = params.form == FewRowsForm::kAdd && there(i);
    return asked ? __ldcg(static_cast<const T*>(params.args.y) + offset(i)) : T(0.0f);
  }
  __device__ __forceinline__ void write(int i, float x) const {
    if (!there(i)) return;
    if (params.form == FewRowsForm::kFloatProduct) {
      static_cast<float*>(params.args.y)[offset(i)] = x;
    } else {
      static_cast<T*>(params.args.y)[offset(i)] = rounded<T>(x);
    }
  }
};

// The same of argmax words: lanes of the same rows have other columns.
template <int kGroups>
struct ArgmaxOutput {
  const FewRowsParams& params;
  int row, column;

  __device__ __forceinline__ std::uint64_t* word(int i) const {
    return static_cast<std::uint64_t*>(params.args.y) + row + i;
  }
  // Asked for before the sums are made.
  __device__ __forceinline__ std::uint64_t seen(int i) const {
    const bool asked = params.form == FewRowsForm::kArgmax && row + i < params.rows;
    return asked ? __ldcg(word(i)) : 0;
  }
  __device__ __forceinline__ void write(int i, std::uint64_t seen,
                                        const float (&result)[2 * kGroups]) const {
    std::uint64_t largest = 0;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const int at = column + n * kGroupRows;
      if (at < params.out) largest = max(largest, argmax_word(result[2 * n + i], at));
    }
    largest = largest_of_lanes<4>(largest);
    const bool is_first = threadIdx.x % 32 < 4;
    if (is_first && row + i < params.rows) raise(word(i), largest, seen);
  }
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// What a lane finishes, whatever it is, with what is asked for before the sums are made.
template <class T, int kGroups>
struct Outputs {
  Output<T> output;
  ArgmaxOutput<kGroups> argmax;
  T old[2 * kGroups];
  std::uint64_t seen[2];

  __device__ __forceinline__ Outputs(const FewRowsParams& params, int row, int column)
      : output{params, row, column}, argmax{params, row, column} {
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) old[i] = output.old(i);
    seen[0] = argmax.seen(0);
    seen[1] = argmax.seen(1);
  }
  __device__ __forceinline__ void write(const float (&result)[2 * kGroups]) const {
    const FewRowsForm form = output.params.form;
    if (form == FewRowsForm::kArgmax) {
      argmax.write(0, seen[0], result);
      argmax.write(1, seen[1], result);
    } else if (kGroups == 2 && form == FewRowsForm::kSwiGlu) {
      output.write(0, silu(result[0]) * result[2 * kGroups - 2]);
      output.write(1, silu(result[1]) * result[2 * kGroups - 1]);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) output.write(i, to_float(old[i]) + result[i]);
    }
  }
};

// Registers: next to the CTAs of such a kernel those of the next one shall find room.
template <class T, int kTiles, int kGroups>
__global__ void __maxnreg__(kTiles == 1 ? 128 : 168)
    few_rows_kernel(const __grid_constant__ FewRowsParams params) {
  extern __shared__ __align__(16) std::uint8_t shared[];
  const int first_row = static_cast<int>(blockIdx.x) * params.advance;
  FewRowsCta<T, kTiles, kGroups> cta(params, shared, first_row);
  start_next_kernel();
  prefetch_next(params.args);
  wait_for_last_kernel();

  const Outputs<T, kGroups> outputs(params, cta.x_row(), first_row + cta.g());
  float result[2 * kGroups];
  cta.multiply(result);
  if (cta.finishes()) outputs.write(result);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTurnRegisters = 192;  // ptxas needs a few more there
#else
constexpr int kTurnRegisters = 168;  // three CTAs an SM
#endif

// Of many groups a CTA takes several, with the x that it has: copying x for each is what takes time
// where there are more rows of it than one.
template <class T, int kTiles, int kGroups>
__global__ void __maxnreg__(kTurnRegisters)
    few_rows_turns_kernel(const __grid_constant__ FewRowsParams params) {
  extern __shared__ __align__(16) std::uint8_t shared[];
  int row = static_cast<int>(blockIdx.x) * params.advance;
  FewRowsCta<T, kTiles, kGroups> cta(params, shared, row);
  start_next_kernel();
  prefetch_next(params.args);
  wait_for_last_kernel();

#pragma unroll 1
  for (int turn = 0; row < params.out; ++turn) {
    const Outputs<T, kGroups> outputs(params, cta.x_row(), row + cta.g());
    row += static_cast<int>(gridDim.x) * params.advance;
    float result[2 * kGroups];
    cta.multiply(result, turn, row < params.out ? row : -1);
    if (cta.finishes()) outputs.write(result);
  }
}

// Warps whose shared memory a CTA may have, whatever the number of rows: it settles the order of
// sums.
template <int kGroups>
int most_warps(const Device& device) {
  const int bytes = device.sm_shared_bytes - 1024;  // the hardware adds 1 KiB a CTA
  return std::clamp(bytes / FewRowsShape<2, kGroups>::shared_bytes(1, kMaxFewRows), 2, kMaxWarps);
}

template <class T, int kTiles, int kGroups>
Status launch(FewRowsParams params, const Device& device, cudaStream_t stream) {
  using Shape = FewRowsShape<kTiles, kGroups>;
  const bool is_swiglu = params.form == FewRowsForm::kSwiGlu;
  params.advance = kGroups == 1 || is_swiglu ? kGroupRows : 2 * kGroupRows;
  params.second_group = is_swiglu ? params.out : kGroupRows;
  const int warps = share_columns<Shape>(&params, most_warps<kGroups>(device));
  int shared_bytes = Shape::shared_bytes(warps, params.rows);
  int ctas = ceil_div(params.out, params.advance);
  auto* kernel = few_rows_kernel<T, kTiles, kGroups>;
  constexpr int kManyTurns = 8;  // of four CTAs an SM, which is more than are resident
  const bool turns = kGroups == 2 && params.rows > 1 && params.rounds == 1 &&
                     ctas >= kManyTurns * 4 * device.num_sms;
  if (turns) {
    kernel = few_rows_turns_kernel<T, kTiles, 2>;
    shared_bytes += Shape::turn_bytes(warps);
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (Status s = check_cuda(error, "few_rows: cudaFuncSetAttribute"); !s.ok()) return s;
  }
  if (turns) {
    int resident = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &resident, kernel, 32 * warps, static_cast<std::size_t>(shared_bytes));
    if (Status s = check_cuda(error, "few_rows: occupancy"); !s.ok()) return s;
    ctas = std::min(ctas, std::max(resident, 1) * device.num_sms);
  }
  return check_cuda(launch_kernel(takes_hopper_kernels(device), kernel, ctas, 32 * warps,
                                  shared_bytes, stream, params),
                    "few_rows: launch");
}

template <class T, int kTiles>
Status launch(const FewRowsParams& params, const Device& device, cudaStream_t stream) {
  // Groups of eight rows where pairs of them would leave multiprocessors without any.
  const bool pairs =
      params.form == FewRowsForm::kSwiGlu || ceil_div(params.out, 2 * kGroupRows) >= device.num_sms;
  return pairs ? launch<T, kTiles, 2>(params, device, stream)
               : launch<T, kTiles, 1>(params, device, stream);
}

template <class T>
Status launch(const FewRowsParams& params, const Device& device, cudaStream_t stream) {
  static_assert(kMaxFewRows == 2 * kTileRows);
  return params.rows <= kTileRows ? launch<T, 1>(params, device, stream)
                                  : launch<T, 2>(params, device, stream);
}

Status check_problem(const FewRowsProblem& problem) {
  const auto refuse = [](const char* name, const std::string& expected, std::int64_t value) {
    return Status::invalid_argument(std::string(name) + ": expected " + expected + ", got " +
                                    std::to_string(value));
  };
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return Status::unsupported("dtype: CUDA kernels take bf16 and fp16");
  }
  if (problem.rows < 1 || problem.rows > kMaxFewRows) {
    return refuse("rows", "1 to " + std::to_string(kMaxFewRows), problem.rows);
  }
  constexpr std::int64_t kMaxSize = 1 << 29;
  if (problem.in < 8 || problem.in % 8 != 0 || problem.in > kMaxSize) {
    return refuse("in", "a multiple of 8 from 8 to 2^29", problem.in);
  }
  if (problem.out < 1 || problem.out > kMaxSize) return refuse("out", "1 to 2^29", problem.out);
  return {};
}

Status check_args(const FewRowsArgs& args) {
  for (const auto& [name, data] : {std::pair{"x", args.x}, {"w", args.w}}) {
    if (data == nullptr) return Status::invalid_argument(std::string(name) + ": it is null");
  }
  for (const auto& [name, data] : {std::pair{"x", args.x}, {"w", args.w}, {"gain", args.gain}}) {
    if (reinterpret_cast<std::uintptr_t>(data) % 16 == 0) continue;
    return Status::invalid_argument(std::string(name) +
                                    ": its address must be a multiple of 16 bytes");
  }
  for (const auto& [name, stride] : {std::pair{"x", args.x_stride}, {"w", args.w_stride}}) {
    if (stride % 8 == 0) continue;
    return Status::invalid_argument(std::string(name) +
                                    ": its stride must be a multiple of 8 elements, got " +
                                    std::to_string(stride));
  }
  if (args.next_bytes < 0 || reinterpret_cast<std::uintptr_t>(args.next) % 16 != 0) {
    return Status::invalid_argument(
        "next: expected an address in multiples of 16 bytes and a size of at least 0");
  }
  if (args.gain != nullptr && !(args.eps >= 0 && std::isfinite(args.eps))) {
    return Status::invalid_argument("eps: expected a number of at least 0, got " +
                                    std::to_string(args.eps));
  }
  return {};
}

// Params without what depends on the grid.
Status params_of(const FewRowsProblem& problem, const FewRowsArgs& args, const Device& device,
                 FewRowsParams* params) {
  if (Status s = check_problem(problem); !s.ok()) return s;
  if (Status s = check_args(args); !s.ok()) return s;
  if (device.kind != Device::Kind::kCuda || device.compute_capability < 80) {
    return Status::unsupported("few_rows: it runs on GPUs of compute capability 8.0 and later");
  }
  *params = {};
  params->args = args;
  params->form = problem.form;
  params->rows = static_cast<int>(problem.rows);
  params->in = static_cast<int>(problem.in);
  params->out = static_cast<int>(problem.out);
  params->w_rows = problem.form == FewRowsForm::kSwiGlu ? 2 * params->out : params->out;
  params->one_over_in = 1.0f / static_cast<float>(problem.in);
  return {};
}

}  // namespace

Status few_rows(const FewRowsProblem& problem, const FewRowsArgs& args, const Device& device,
                Stream stream) {
  FewRowsParams params;
  if (Status s = params_of(problem, args, device, &params); !s.ok()) return s;
  if (args.y == nullptr) return Status::invalid_argument("y: it is null");
  const DeviceScope scope(device.index);
  if (!scope.status().ok()) return scope.status();
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  return problem.dtype == DType::kFloat16 ? launch<fp16>(params, device, cuda_stream)
                                          : launch<bf16>(params, device, cuda_stream);
}

}  // namespace parallax
