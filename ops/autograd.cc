// SPDX-License-Identifier: MIT
// Autograd and autocast of every operator. attention is differentiable once: its forward saves o,
// lse, t_bar and v_bar, its backward is attention_backward. Whatever else is asked to be
// differentiated is refused, by name, rather than cut out of the graph.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "ops/options.h"

namespace parallax::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardSignature = FourTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     bool);
using BackwardSignature = FourTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&);

const AttentionOperator<ForwardSignature>& forward_operator() {
  static const AttentionOperator<ForwardSignature> op("parallax::attention_forward", "");
  return op;
}

const AttentionOperator<BackwardSignature>& backward_operator() {
  static const AttentionOperator<BackwardSignature> op("parallax::attention_backward", "");
  return op;
}

bool needs_grad(std::initializer_list<std::reference_wrapper<const Tensor>> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& tensor : tensors) {
    if (tensor.requires_grad()) return true;
  }
  return false;
}

variable_list as_list(const FourTensors& tensors) {
  const auto& [a, b, c, d] = tensors;
  return {a, b, c, d};
}

FourTensors as_tuple(const variable_list& tensors) {
  return {tensors[0], tensors[1], tensors[2], tensors[3]};
}

// Options on their way through an AutogradContext: tensors are saved as variables, absent ones
// undefined.
variable_list option_tensors(const AttentionOptions& options) {
  return {options.cu_seqlens_q.value_or(Tensor()), options.cu_seqlens_k.value_or(Tensor()),
          options.kv_lens.value_or(Tensor()), options.kv_start.value_or(Tensor())};
}

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

void save_options(AutogradContext* ctx, const AttentionOptions& options) {
  ctx->saved_data["scale"] = options.scale;
  ctx->saved_data["causal"] = options.causal;
  ctx->saved_data["window"] = options.window;
}

AttentionOptions saved_options(const AutogradContext* ctx, const Tensor* tensors) {
  AttentionOptions options;
  options.scale = ctx->saved_data.at("scale").toOptional<double>();
  options.causal = ctx->saved_data.at("causal").toBool();
  options.window = ctx->saved_data.at("window").toOptional<std::int64_t>();
  options.cu_seqlens_q = if_defined(tensors[0]);
  options.cu_seqlens_k = if_defined(tensors[1]);
  options.kv_lens = if_defined(tensors[2]);
  options.kv_start = if_defined(tensors[3]);
  return options;
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& r,
                               const Tensor& k, const Tensor& v, const AttentionOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    variable_list outputs = as_list(forward_operator()(options, q, r, k, v, /*save_v_bar=*/true));
    variable_list saved{q, r, k, v};
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    const variable_list lengths = option_tensors(options);
    saved.insert(saved.end(), lengths.begin(), lengths.end());
    ctx->save_for_backward(saved);
    save_options(ctx, options);
    ctx->mark_non_differentiable({outputs[1], outputs[2], outputs[3]});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const AttentionOptions options = saved_options(ctx, &saved[8]);
    const Tensor &q = saved[0], &r = saved[1], &k = saved[2], &v = saved[3];
    const Tensor &o = saved[4], &lse = saved[5], &t_bar = saved[6], &v_bar = saved[7];
    // The engine hands over any strides: an expanded scalar's are all 0.
    const Tensor d_o = d_outputs[0].contiguous();
    variable_list gradients =
        as_list(backward_operator()(options, d_o, q, r, k, v, o, lse, t_bar, v_bar));
    gradients.emplace_back();  // of options
    return gradients;
  }
};

// Holds the place of a second derivative, and refuses it when it is asked for.
struct AttentionBackwardFunction : torch::autograd::Function<AttentionBackwardFunction> {
  static variable_list forward(AutogradContext* /*ctx*/, const Tensor& d_o, const Tensor& q,
                               const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& lse, const Tensor& t_bar, const Tensor& v_bar,
                               const AttentionOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return as_list(backward_operator()(options, d_o, q, r, k, v, o, lse, t_bar, v_bar));
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*d_gradients*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "parallax::attention: expected at most one differentiation, got a second "
        "(double backward); for second derivatives compose the formula from PyTorch operations");
  }
};

FourTensors attention_forward_autograd(const AttentionOptions& options, const Tensor& q,
                                       const Tensor& r, const Tensor& k, const Tensor& v,
                                       bool save_v_bar) {
  if (!needs_grad({q, r, k, v})) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward_operator()(options, q, r, k, v, save_v_bar);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!options.page_table,
                              "parallax::attention: page_table: expected None where q, r, k or v "
                              "requires grad (a paged cache serves forward only), got a tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(!options.k_scale,
                              "parallax::attention: k_scale: expected None where q, r, k or v "
                              "requires grad (an FP8 cache serves forward only), got a tensor");
  return as_tuple(AttentionFunction::apply(q, r, k, v, options));
}

FourTensors attention_backward_autograd(const AttentionOptions& options, const Tensor& d_o,
                                        const Tensor& q, const Tensor& r, const Tensor& k,
                                        const Tensor& v, const Tensor& o, const Tensor& lse,
                                        const Tensor& t_bar, const Tensor& v_bar) {
  return as_tuple(AttentionBackwardFunction::apply(d_o, q, r, k, v, o, lse, t_bar, v_bar, options));
}

void refuse_grad(const c10::FunctionSchema& schema, const std::string& argument,
                 const Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor.defined() || !tensor.requires_grad(), schema.name(), ": ", argument,
      ": expected a tensor without grad (the operator is not differentiable), got one that "
      "requires grad; call under torch.no_grad(), or detach() it");
}

// Autograd of the operators without a derivative.
void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/,
                        torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::vector<c10::IValue> inputs(stack->end() - arguments.size(), stack->end());
  for (std::size_t i = 0; at::GradMode::is_enabled() && i < inputs.size(); ++i) {
    if (inputs[i].isTensor()) {
      refuse_grad(op.schema(), arguments[i].name(), inputs[i].toTensor());
    } else if (inputs[i].isTensorList()) {
      for (const Tensor& tensor : inputs[i].toTensorVector()) {
        refuse_grad(op.schema(), arguments[i].name(), tensor);
      }
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
  }
  // Tensors written in place tell so to whoever saved them.
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias && alias->isWrite()) torch::autograd::impl::bump_version(inputs[i].toTensor());
  }
}

bool is_new_token(const std::string& argument) {
  return argument == "q" || argument == "r" || argument == "k" || argument == "v";
}

// Autocast of all operators: the new tokens q, r, k, v in the autocast dtype. Caches stay as they
// are, FP8 ones by whatever name: a cast would copy all of them, and lose what append_kv writes.
template <c10::DeviceType device_type>
void autocast(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/,
              torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device_type));
  const auto& arguments = op.schema().arguments();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device_type);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = *(stack->end() - arguments.size() + i);
    if (is_new_token(arguments[i].name()) && value.toTensor().scalar_type() != at::kFloat8_e4m3fn) {
      value = at::autocast::cached_cast(dtype, value.toTensor(), device_type);
    }
  }
  op.callBoxed(stack);
}

template <c10::DeviceType device_type>
void register_autocast(torch::Library& m) {
  for (const char* name : {"attention_forward", "decode.stats", "decode.out", "decode.state",
                           "append_kv", "append_kv.rotary"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&autocast<device_type>>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(parallax, Autograd, m) {
  m.impl("attention_forward", unpacked<&attention_forward_autograd>);
  m.impl("attention_backward", unpacked<&attention_backward_autograd>);
  for (const char* name : {"decode.stats", "decode.out", "decode.state", "decode_schedule",
                           "append_kv", "append_kv.rotary", "merge", "finalize"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&not_differentiable>());
  }
}

TORCH_LIBRARY_IMPL(parallax, AutocastCPU, m) { register_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(parallax, AutocastCUDA, m) { register_autocast<at::kCUDA>(m); }

}  // namespace parallax::ops
