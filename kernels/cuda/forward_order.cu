// SPDX-License-Identifier: MIT
// Packed calls: which sequence's query tiles come when. Longest first, so that the last tickets are
// short; one block, since a batch is small.
#include "cuda/forward.h"
#include "cuda/launch.h"
#include "cuda/schedule.h"

namespace parallax {
namespace {

constexpr int kRun = 1024;  // sequences sorted together, one a thread

__global__ void __launch_bounds__(kRun)
    forward_order_kernel(const AttentionProblem problem, const Sequences sequences,
                         int queries_per_tile, int* next_ticket, int* order, int* first_ticket) {
  __shared__ int kv_lens[kRun];
  __shared__ int tickets[kRun];  // by rank, then summed up to and including it
  const int thread = threadIdx.x;
  const int num_sequences = static_cast<int>(problem.batch);
  int before = 0;  // tickets of the runs done
  for (int run = 0; run < num_sequences; run += kRun) {
    const int count = min(kRun, num_sequences - run);
    const bool present = thread < count;
    int q_len = 0;
    if (present) {
      const Sequence sequence = sequence_at(problem, sequences, run + thread);
      kv_lens[thread] = sequence.kv_len;
      q_len = sequence.mask.q_len;
    }
    __syncthreads();
    int rank = thread;
    if (present) {
      const int own = kv_lens[thread];
      rank = 0;
      for (int i = 0; i < count; ++i) {
        rank += kv_lens[i] > own || (kv_lens[i] == own && i < thread) ? 1 : 0;
      }
      order[run + rank] = run + thread;
    }
    tickets[rank] = ceil_div(q_len, queries_per_tile) * static_cast<int>(problem.num_q_heads);
    __syncthreads();
    for (int step = 1; step < kRun; step *= 2) {
      const int left = thread >= step ? tickets[thread - step] : 0;
      __syncthreads();
      tickets[thread] += left;
      __syncthreads();
    }
    if (present) first_ticket[run + thread + 1] = before + tickets[thread];
    before += tickets[kRun - 1];
    __syncthreads();
  }
  if (thread == 0) {
    first_ticket[0] = 0;
    *next_ticket = 0;
  }
}

}  // namespace

Status launch_forward_order(const AttentionProblem& problem, const Sequences& sequences,
                            int queries_per_tile, int* next_ticket, int* order, int* first_ticket,
                            cudaStream_t stream) {
  forward_order_kernel<<<1, kRun, 0, stream>>>(problem, sequences, queries_per_tile, next_ticket,
                                               order, first_ticket);
  return check_cuda(cudaGetLastError(), "forward: ordering the sequences");
}

}  // namespace parallax
