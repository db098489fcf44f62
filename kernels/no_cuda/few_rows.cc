// SPDX-License-Identifier: MIT
// Stands for kernels/cuda/few_rows.cu in a build without it.
#include "parallax/step.h"

namespace parallax {

Status few_rows(const FewRowsProblem&, const FewRowsArgs&, const Device&, Stream) {
  return Status::unsupported("few_rows: this build has no CUDA kernel for it");
}

Status run_settled(const DecodePlan&, const DecodeArgs&, void*, Stream) {
  return Status::unsupported("decode: this build has no CUDA kernel for it");
}

}  // namespace parallax
