// SPDX-License-Identifier: MIT
// Stands for all of step.h in a build without CUDA.
#include "parallax/step.h"

namespace parallax {

Status few_rows(const FewRowsProblem&, const FewRowsArgs&, const Device&, Stream) {
  return Status::unsupported("few_rows: this build has no CUDA kernel for it");
}

Status argmax_of_rows(std::int64_t, std::int64_t, const float*, std::int64_t, std::uint64_t*,
                      const Device&, Stream) {
  return Status::unsupported("argmax_of_rows: this build has no CUDA kernel for it");
}

Status next_tokens(std::int64_t, const NextTokensArgs&, const Device&, Stream) {
  return Status::unsupported("next_tokens: this build has no CUDA kernel for it");
}

Status append_kv_settled(const AttentionProblem&, const AppendArgs&, const Device&, Stream) {
  return Status::unsupported("append_kv: this build has no CUDA kernel for it");
}

Status run_settled(const DecodePlan&, const DecodeArgs&, void*, Stream) {
  return Status::unsupported("decode: this build has no CUDA kernel for it");
}

}  // namespace parallax
