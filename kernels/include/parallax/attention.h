// SPDX-License-Identifier: MIT
// Parallax attention: the public calls of the kernel room.
//
//   o_i = sum_j p_ij (1 + t_bar_i - t_ij) v_j,   p = softmax_j(scale q_i.k_j),  t_ij = r_i.k_j,
//   t_bar_i = sum_j p_ij t_ij                    (arXiv 2605.29157; docs/math.md section 1)
//
// Each pass has three verbs: plan(problem, device, &plan) checks the problem and decides everything
// that depends on shapes alone; workspace_bytes(plan) says how much scratch to bring; run(plan,
// args, workspace, ...) does the work. The caller allocates all memory. Nothing allocates device
// memory, synchronises, prints or throws; a CUDA run only enqueues on the given stream and may be
// captured in a graph. A plan is a plain value: copy it, keep it, use it from many threads.
//
// What a call means, on every device:
// - Query head h reads key/value head h / (num_q_heads / num_kv_heads); any whole group size.
// - Keys visible to sequence b are [kv_start[b], kv_lens[b]): an end index, not a count. Absent
//   arrays mean 0 and kv_len. Values outside [0, kv_len] are clamped.
// - causal: query i of q_len sees keys j <= kv_lens[b] - q_len + i (bottom-right alignment).
// - window W > 0 (causal only): a query sees its last W keys, its own among them.
// - A row that sees no key: o = 0, v_bar = 0, t_bar = 0, lse = -inf, no gradient. A row that sees
//   one key: o is its v, dq = dr = 0, exactly.
// - Memory beyond a sequence's visible keys never reaches a result, whatever it holds.
// - Results are bitwise repeatable, and on the CPU independent of the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "parallax/status.h"
#include "parallax/types.h"

namespace parallax {

// The shape of a call. In the packed layout (`packed`), sequences lie end to end: q_len and kv_len
// are then the total numbers of query and key tokens, and `batch` the number of sequences.
struct AttentionProblem {
  DType dtype = DType::kFloat32;  // of q r k v o; CPU: all four, CUDA: bf16 and fp16
  std::int64_t batch = 0;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;  // cache capacity where kv_lens says how much of it is used
  std::int64_t num_q_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  // multiple of 8, at most 256 (CUDA backward: 128)
  double scale = 1.0;         // of q.k (CUDA backward: not below 0); r.k is never scaled
  bool causal = true;
  std::int64_t window = 0;  // 0: no window
  bool packed = false;
  // Of a cache, k and v; absent: dtype. Forward (but packed), decode and append_kv take kFloat8E4M3
  // too, with any dtype but float64.
  std::optional<DType> kv_dtype;
};

inline DType cache_dtype(const AttentionProblem& problem) {
  return problem.kv_dtype.value_or(problem.dtype);
}

// Per-sequence lengths, int32, in memory the device can read. Null: absent. Packed calls need both
// cu_seqlens arrays and take no other; [batch + 1] offsets, ascending from 0 to the number of
// tokens (q_len, kv_len).
struct Sequences {
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t* cu_seqlens_k = nullptr;
  const std::int32_t* kv_lens = nullptr;   // [batch]
  const std::int32_t* kv_start = nullptr;  // [batch]
};

// Where the tokens of a paged cache lie: token j of sequence b is row j % page_size of page
// table[b * max_pages + j / page_size]. `table` null: the cache is contiguous. The problem's kv_len
// is at most max_pages * page_size. Entries of visible tokens must be pages, 0 to num_pages - 1:
// the CPU refuses others; a GPU's contents cannot be refused without waiting for it, and what such
// an entry gives there is not defined. Other entries are not read.
struct PageTable {
  const std::int32_t* table = nullptr;  // [batch, max_pages]
  std::int64_t max_pages = 0;
  std::int64_t num_pages = 0;
  int page_size = 0;  // a power of two, 1 to 256
};

// Row statistics are [batch, num_q_heads, q_len], packed [num_q_heads, tokens], contiguous, in
// float (double where dtype is float64). Natural logarithm.

struct ForwardArgs {
  ConstView q, r, k, v;
  Sequences sequences;
  PageTable pages;  // of k and v
  // As in DecodeArgs. What a cache of kFloat8E4M3 holds is first written out in dtype (element
  // times scale, rounded), the tokens that some query sees: the workspace has room for kv_len of
  // them.
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  View o;
  View v_bar;             // optional: the plain softmax output, in dtype; backward needs it
  void* lse = nullptr;    // optional: m + ln d1
  void* t_bar = nullptr;  // optional: d2 / d1
};

struct BackwardArgs {
  ConstView q, r, k, v, o, v_bar, d_o;
  const void* lse = nullptr;
  const void* t_bar = nullptr;
  Sequences sequences;
  View dq, dr, dk, dv;  // every element is written, rows and keys that saw nothing with 0
};

// The uncentred online state of state.h, float: m (natural units), d1, d2 are [batch, num_q_heads,
// q_len]; o1, o2 are [batch, q_len, num_q_heads, head_dim]. All contiguous; on CUDA o1 and o2
// aligned to 16 bytes.
struct StateView {
  float* m = nullptr;
  float* d1 = nullptr;
  float* d2 = nullptr;
  float* o1 = nullptr;
  float* o2 = nullptr;
};

// Attention of a few new tokens over a cache. kv_lens counts the new tokens too: append first. A
// prefix that sequences share can be read on its own, as a state: causal = false and kv_lens its
// length; what follows then has it as kv_start, and merge_states() joins the two.
struct DecodeArgs {
  ConstView q, r, k_cache, v_cache;
  // [num_kv_heads], finite and above 0: an element of a kFloat8E4M3 cache stands for itself times
  // its head's scale. Required with such a cache, refused with others.
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  Sequences sequences;  // kv_lens required; kv_start optional; never packed
  PageTable pages;
  View o;                 // null where the state is asked for instead
  void* lse = nullptr;    // optional
  void* t_bar = nullptr;  // optional
  StateView state;        // all five or none
  // Of schedule(), on CUDA; null: each run() finds its own. The CPU does not look at it.
  void* schedule = nullptr;
};

struct ForwardPlan {
  AttentionProblem problem;
  Device device;
  std::int64_t num_tasks = 0;
  std::size_t workspace_bytes = 0;
};

struct BackwardPlan {
  AttentionProblem problem;
  Device device;
  std::int64_t num_tasks = 0;
  std::size_t workspace_bytes = 0;
};

struct DecodePlan {
  AttentionProblem problem;
  Device device;
  std::int64_t num_splits = 1;  // parts that the keys are cut into, at most
  std::size_t workspace_bytes = 0;
  std::size_t schedule_bytes = 0;
};

// Errors: kInvalidArgument names the field that contradicts the contract above, kUnsupported names
// what this device has no kernel for. *plan is untouched unless ok.
Status plan(const AttentionProblem& problem, const Device& device, ForwardPlan* plan);
Status plan(const AttentionProblem& problem, const Device& device, BackwardPlan* plan);
Status plan(const AttentionProblem& problem, const Device& device, DecodePlan* plan);

inline std::size_t workspace_bytes(const ForwardPlan& plan) { return plan.workspace_bytes; }
inline std::size_t workspace_bytes(const BackwardPlan& plan) { return plan.workspace_bytes; }
inline std::size_t workspace_bytes(const DecodePlan& plan) { return plan.workspace_bytes; }
// 0 on the CPU.
inline std::size_t schedule_bytes(const DecodePlan& plan) { return plan.schedule_bytes; }

// CPU. `workspace` holds workspace_bytes(plan) bytes aligned to 64 (null if 0), contents ignored.
// REQUIRES: plan.device.kind == kCpu.
Status run(const ForwardPlan& plan, const ForwardArgs& args, void* workspace,
           const ParallelFor& parallel_for);
Status run(const BackwardPlan& plan, const BackwardArgs& args, void* workspace,
           const ParallelFor& parallel_for);
Status run(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
           const ParallelFor& parallel_for);

// CUDA (defined where the build has it, PARALLAX_CUDA): enqueues on `stream`, a stream of device
// plan.device.index, and returns. All pointers in args and workspace are device memory; workspace
// holds workspace_bytes(plan) bytes aligned to 256 and stays untouched by others until the stream
// has passed this call. Errors: kInvalidArgument names a view that the copy engine cannot take
// (addresses and strides in multiples of 16 bytes), kDeviceError carries the runtime's words.
// REQUIRES: plan.device.kind == kCuda.
Status run(const ForwardPlan& plan, const ForwardArgs& args, void* workspace, Stream stream);
Status run(const BackwardPlan& plan, const BackwardArgs& args, void* workspace, Stream stream);
Status run(const DecodePlan& plan, const DecodeArgs& args, void* workspace, Stream stream);

// CUDA. Who computes which keys, from the lengths in `sequences`: once a step, then handed to the
// run() of every layer with the same plan and lengths (DecodeArgs::schedule). `schedule` is device
// memory of schedule_bytes(plan) bytes aligned to 256, which runs only read.
Status schedule(const DecodePlan& plan, const Sequences& sequences, void* schedule, Stream stream);

// Fills *device with CUDA device `index`: what plan() needs to know of it.
Status query_device(int index, Device* device);

// What happens to a head of q, r or k between its projection and attention, in this order
// (Qwen3's): RMSNorm, x / sqrt(mean(x^2) + eps) * gain over head_dim, and RoPE, the pairs (x_i,
// x_{i + head_dim / 2}) turned by the angles of their token. In float (double where dtype is
// float64) and rounded once, at the end.
struct HeadPrologue {
  const float* gain = nullptr;  // [head_dim]; null: no norm
  bool rotate = false;
};

// Queries on their way to decode, [batch, q_len, num_q_heads, head_dim]. `out` may be `in`.
struct QueryPrologue {
  ConstView in;  // null: none
  View out;
  HeadPrologue head;
};

struct AppendPrologue {
  HeadPrologue k;
  QueryPrologue q, r;
  double eps = 1e-6;
  const float* cos = nullptr;  // [num_angles, head_dim / 2]
  const float* sin = nullptr;
  std::int64_t num_angles = 0;
  // [batch]: token i of sequence b turns by row angles[b] + i; null: by its place in the cache.
  const std::int32_t* angles = nullptr;
};

// Writes new tokens k, v [batch, q_len, num_kv_heads, head_dim] into a cache: token i of sequence b
// goes to place positions[b] + i. Places at or beyond the cache's capacity (kv_len, or max_pages *
// page_size) and pages outside [0, num_pages) are refused before anything is written on the CPU,
// and skipped on CUDA, like rows to be turned by angles outside the table. A kFloat8E4M3 cache
// takes x / scale, rounded to nearest even, what lies beyond 448 to 448.
struct AppendArgs {
  ConstView k, v;
  const float* k_scale = nullptr;  // as in DecodeArgs
  const float* v_scale = nullptr;
  const std::int32_t* positions = nullptr;  // [batch]
  PageTable pages;
  View k_cache, v_cache;
  AppendPrologue prologue;  // optional
};
// problem: dtype, kv_dtype, batch, q_len (new tokens), kv_len (capacity), num_kv_heads, head_dim
// are read, and num_q_heads where the prologue has queries. CUDA as run(): device memory, enqueued
// on a stream of `device`; bf16 and fp16, addresses in multiples of 16 bytes and strides of 8
// elements. Both devices write the same bits.
Status append_kv(const AttentionProblem& problem, const AppendArgs& args,
                 const ParallelFor& parallel_for);
Status append_kv(const AttentionProblem& problem, const AppendArgs& args, const Device& device,
                 Stream stream);

// Merges num_states partial states of the same rows, in order, into `merged` (may alias the first).
// Rows: batch * q_len * num_q_heads of the problem, on CUDA at most 2^26; the identity is m = -inf,
// zeros. The array of states is host memory, on CUDA too; what they point to is the device's.
Status merge_states(const AttentionProblem& problem, const StateView* states, int num_states,
                    const StateView& merged, const ParallelFor& parallel_for);
Status merge_states(const AttentionProblem& problem, const StateView* states, int num_states,
                    const StateView& merged, const Device& device, Stream stream);

// o, lse and t_bar (each optional) of a state. o in problem.dtype; CUDA: bf16, fp16, float32.
Status finalize_state(const AttentionProblem& problem, const StateView& state, const View& o,
                      float* lse, float* t_bar, const ParallelFor& parallel_for);
Status finalize_state(const AttentionProblem& problem, const StateView& state, const View& o,
                      float* lse, float* t_bar, const Device& device, Stream stream);

}  // namespace parallax
