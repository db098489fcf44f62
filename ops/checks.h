// SPDX-License-Identifier: MIT
// Every precondition of every operator, checked once, here. A failed check raises c10::Error
// (ValueError, TypeError or NotImplementedError in Python) that reads
// "parallax::<operator>: <argument>: expected ..., got ...". Sizes are symbolic, so the same checks
// serve Meta tensors with dynamic shapes. The contents of lengths, offsets and page tables are the
// kernel room's to check: it reads them on the CPU, and never on a GPU, where that would stall.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>

#include "ops/parallax_ops.h"
#include "parallax/attention.h"

namespace parallax::ops {

// The sizes of a call that passed its checks. kv_len is the capacity of a cache.
struct CallShape {
  c10::SymInt batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim;
  bool packed = false;

  c10::SymDimVector stats() const;  // of lse, t_bar, m, d1, d2
};

CallShape check_attention(const char* op, const at::Tensor& q, const at::Tensor& r,
                          const at::Tensor& k, const at::Tensor& v,
                          const AttentionOptions& options);

// What backward gets beyond the forward's arguments: all like q, the statistics as forward gave
// them.
void check_saved(const char* op, const CallShape& shape, const at::Tensor& q, const at::Tensor& d_o,
                 const at::Tensor& o, const at::Tensor& v_bar, const at::Tensor& lse,
                 const at::Tensor& t_bar);

CallShape check_decode(const char* op, const at::Tensor& q, const at::Tensor& r,
                       const at::Tensor& k_cache, const at::Tensor& v_cache,
                       const at::Tensor& kv_lens, const DecodeOptions& options);

// `out` of decode: like q, sharing memory with none of the inputs.
void check_out(const char* op, const at::Tensor& out, const at::Tensor& q, const at::Tensor& r,
               const at::Tensor& k_cache, const at::Tensor& v_cache);

// What decode_schedule looks at.
CallShape check_decode_schedule(const char* op, const at::Tensor& q, const at::Tensor& k_cache,
                                const at::Tensor& kv_lens, const DecodeOptions& options);

// Bytes of a schedule of this batch on any GPU, so that Meta tensors know them too.
c10::SymInt schedule_size(const c10::SymInt& batch);

// What a schedule needs on the GPU at hand.
void check_schedule_fits(const char* op, const at::Tensor& schedule, const DecodePlan& plan);

CallShape check_append_kv(const char* op, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& k_cache, const at::Tensor& v_cache,
                          const at::Tensor& positions, const std::optional<at::Tensor>& page_table,
                          const std::optional<at::Tensor>& k_scale,
                          const std::optional<at::Tensor>& v_scale);

// What append_kv.rotary takes beyond append_kv's arguments. Puts q's heads into *shape.
void check_rotary(const char* op, const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                  const at::Tensor& cos, const at::Tensor& sin, const RotaryOptions& options,
                  CallShape* shape);

// The five tensors of one partial state; `like` is the first state of a merge, or the state itself.
CallShape check_state(const char* op, const DecodeState& state, const DecodeState& like);

// The dtype asked of finalize.
void check_output_dtype(const char* op, const at::Tensor& o);

// Raises what a kernel reported.
void check_status(const char* op, const Status& status);

DType kernel_dtype(const at::Tensor& tensor);

}  // namespace parallax::ops
