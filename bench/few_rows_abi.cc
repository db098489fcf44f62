// SPDX-License-Identifier: MIT
// Products of a few rows behind a C interface (bench_few_rows.py). Not a public interface.
#include <cstdio>

#include "parallax/attention.h"
#include "parallax/step.h"

extern "C" {

struct ParallaxFewRows {
  std::int64_t rows, in, out, x_stride, w_stride, y_stride;
  double eps;
  std::int32_t form, fp16, device;
  const void* x;
  const void* w;
  const void* gain;
  void* y;
  char message[256];
};

__attribute__((visibility("default"))) int parallax_few_rows(ParallaxFewRows* call, void* stream) {
  parallax::Device device;
  parallax::Status status = parallax::query_device(call->device, &device);
  if (status.ok()) {
    const parallax::FewRowsProblem problem{
        call->fp16 ? parallax::DType::kFloat16 : parallax::DType::kBFloat16, call->rows, call->in,
        call->out, static_cast<parallax::FewRowsForm>(call->form)};
    const parallax::FewRowsArgs args{call->x,    call->x_stride, call->w, call->w_stride,
                                     call->gain, call->eps,      call->y, call->y_stride};
    status = parallax::few_rows(problem, args, device, stream);
  }
  if (status.ok()) return 0;
  std::snprintf(call->message, sizeof(call->message), "%s", status.message().c_str());
  return 1;
}
}
