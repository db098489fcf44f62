// SPDX-License-Identifier: MIT
#include "lm/model.h"

#include <ATen/CPUGeneratorImpl.h>

#include "lm/error.h"
#include "lm/layers.h"

namespace parallax::lm {

class FeedForward : public torch::nn::Module {
 public:
  explicit FeedForward(const ModelConfig& config) {
    const auto weight = [this](const char* name, at::IntArrayRef shape) {
      return register_module(name, std::make_shared<Weight>(shape));
    };
    gate_proj_ = weight("gate_proj", {config.ffn_size, config.hidden_size});
    up_proj_ = weight("up_proj", {config.ffn_size, config.hidden_size});
    down_proj_ = weight("down_proj", {config.hidden_size, config.ffn_size});
  }

  void prepare_for_inference(at::ScalarType dtype) {
    join_weights({gate_proj_, up_proj_}, dtype);
    join_weights({down_proj_}, dtype);
  }

  at::Tensor forward(const at::Tensor& x) {
    return project(swiglu(project(x, {gate_proj_->weight, up_proj_->weight})),
                   {down_proj_->weight});
  }
  // residual, whose memory may serve, plus the same of the normed residual.
  at::Tensor forward_cached(const at::Tensor& residual, const Norm& norm) {
    const at::Tensor inner = swiglu_normed(residual, norm, gate_proj_->weight, up_proj_->weight);
    return project_onto(residual, inner, down_proj_->weight);
  }
  // What that reads first, where it is a kernel of few_rows_weight's kind.
  at::Tensor first_weights(const at::Tensor& residual) const {
    return few_rows_weight(residual, {gate_proj_->weight, up_proj_->weight});
  }

 private:
  std::shared_ptr<Weight> gate_proj_, up_proj_, down_proj_;
};

class DecoderLayer : public torch::nn::Module {
 public:
  explicit DecoderLayer(const ModelConfig& config) : eps_(config.rms_norm_eps) {
    const at::IntArrayRef width(config.hidden_size);
    input_norm_ = register_module("input_layernorm", std::make_shared<Weight>(width));
    mixer_ = register_module("self_attn", make_mixer(config));
    ffn_norm_ = register_module("post_attention_layernorm", std::make_shared<Weight>(width));
    ffn_ = register_module("mlp", std::make_shared<FeedForward>(config));
  }

  at::Tensor forward(const at::Tensor& x, const Rope& rope) {
    return feed_forward(x + mixer_->forward(mixer_input(x), rope));
  }
  void begin_cached(CachedForward& call, std::int64_t len) const {
    mixer_->begin_cached(call, len);
  }
  at::Tensor forward_cached(const at::Tensor& x, CachedForward& call, std::int64_t layer) {
    call.next = ffn_->first_weights(x);
    const at::Tensor y = mixer_->forward_cached(x, {input_norm_->weight, eps_}, call, layer);
    return ffn_->forward_cached(y, {ffn_norm_->weight, eps_});
  }
  void prepare_for_inference(at::ScalarType dtype) {
    for (const auto& norm : {input_norm_, ffn_norm_}) join_weights({norm}, dtype);
    mixer_->prepare_for_inference(dtype);
    ffn_->prepare_for_inference(dtype);
  }
  AttentionInputs attention_inputs(const at::Tensor& x, const Rope& rope) {
    return mixer_->attention_inputs(mixer_input(x), rope);
  }

  // forward() in the steps of CausalLm::trace; `name`: of the layer.
  at::Tensor trace(const at::Tensor& x, const Rope& rope, const std::string& name,
                   const CausalLm::Visit& visit) {
    const at::Tensor normed = mixer_input(x);
    visit(name + ".input_layernorm", normed);
    const AttentionInputs inputs = mixer_->attention_inputs(normed, rope);
    visit(name + ".self_attn.q", inputs.q);
    if (inputs.r.defined()) visit(name + ".self_attn.r", inputs.r);
    visit(name + ".self_attn.k", inputs.k);
    visit(name + ".self_attn.v", inputs.v);
    const at::Tensor mixed = mixer_->forward(normed, rope);
    visit(name + ".self_attn", mixed);
    const at::Tensor y = x + mixed;
    const at::Tensor ffn_input = rms_norm(y, ffn_norm_->weight, eps_);
    visit(name + ".post_attention_layernorm", ffn_input);
    const at::Tensor ffn = ffn_->forward(ffn_input);
    visit(name + ".mlp", ffn);
    visit(name, y + ffn);
    return y + ffn;
  }

 private:
  at::Tensor mixer_input(const at::Tensor& x) { return rms_norm(x, input_norm_->weight, eps_); }
  at::Tensor feed_forward(const at::Tensor& x) {
    return x + ffn_->forward(rms_norm(x, ffn_norm_->weight, eps_));
  }

  double eps_;
  std::shared_ptr<Weight> input_norm_, ffn_norm_;
  std::shared_ptr<Mixer> mixer_;
  std::shared_ptr<FeedForward> ffn_;
};

namespace {

// The seed of a tensor's own stream: FNV-1a over its name, then a mix with the run's seed
// (splitmix64's finisher), so that no tensor's values depend on which others there are.
std::uint64_t stream_seed(std::uint64_t seed, const std::string& name) {
  std::uint64_t h = 0xcbf29ce484222325;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  h += (seed + 1) * 0x9e3779b97f4a7c15;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
  h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
  return h ^ (h >> 31);
}

void initialise(const torch::OrderedDict<std::string, at::Tensor>& parameters, double std,
                std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  for (const auto& parameter : parameters) {
    at::Tensor tensor = parameter.value();
    if (tensor.dim() == 1) {
      tensor.fill_(1);
    } else {
      tensor.normal_(0, std, at::detail::createCPUGenerator(stream_seed(seed, parameter.key())));
    }
  }
}

}  // namespace

CausalLm::CausalLm(const ModelConfig& config, std::uint64_t seed) : config_(config) {
  if (!config.match_to.empty()) {
    throw Error("model.match_to: the sizes that match " + config.match_to + " are not solved yet");
  }
  const auto model = register_module("model", std::make_shared<torch::nn::Module>());
  const at::DimVector table{config.vocab_size, config.hidden_size};
  embed_tokens_ = model->register_module("embed_tokens", std::make_shared<Weight>(table));
  const auto layers = model->register_module("layers", std::make_shared<torch::nn::Module>());
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    layers_.push_back(
        layers->register_module(std::to_string(layer), std::make_shared<DecoderLayer>(config)));
  }
  norm_ = model->register_module("norm", std::make_shared<Weight>(config.hidden_size));
  if (!config.tie_embeddings)
    lm_head_ = register_module("lm_head", std::make_shared<Weight>(table));
  initialise(named_parameters(), config.init_std, seed);
}

void CausalLm::compute_in(at::ScalarType dtype) { compute_dtype_ = dtype; }

at::Device CausalLm::device() const { return norm_->weight.device(); }

const at::Tensor& CausalLm::head_weight() const {
  return (lm_head_ ? lm_head_ : embed_tokens_)->weight;
}

at::Tensor CausalLm::embed(const at::Tensor& tokens) const {
  return at::embedding(embed_tokens_->weight, tokens).to(compute_dtype_);
}

Rope CausalLm::rope(const at::Tensor& positions) const {
  return make_rope(positions, config_.head_dim, config_.rope_theta, compute_dtype_);
}

at::Tensor CausalLm::final_norm(const at::Tensor& x) const {
  return rms_norm(x, norm_->weight, config_.rms_norm_eps);
}

at::Tensor CausalLm::hidden(const at::Tensor& tokens) {
  const Rope angles = rope(at::arange(tokens.size(1), tokens.options()));
  at::Tensor x = embed(tokens);  // [batch, len, hidden_size]
  for (const auto& layer : layers_) x = layer->forward(x, angles);
  return final_norm(x);
}

at::Tensor CausalLm::logits(const at::Tensor& hidden) {
  const at::Tensor logits = project(hidden, {head_weight()});
  return logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
}

at::Tensor CausalLm::loss(const at::Tensor& tokens, const at::Tensor& targets,
                          Reduction reduction) {
  const at::Tensor rows = hidden(tokens).flatten(0, 1);
  if (reduction == Reduction::kMean) {
    return linear_cross_entropy(rows, head_weight(), targets.flatten());
  }
  return linear_cross_entropy_rows(rows, head_weight(), targets.flatten()).view(targets.sizes());
}

at::Tensor CausalLm::forward_cached(const at::Tensor& tokens, KvCache& cache,
                                    std::int64_t first_row) {
  const RowRange rows{first_row, tokens.size(0)};
  cache.append(rows, tokens.size(1));
  return decode(tokens, cache, rows);
}

at::Tensor CausalLm::decode(const at::Tensor& tokens, KvCache& cache, RowRange rows) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = decode_hidden(tokens, cache, rows);
  const at::ScalarType dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return project_normed(x, {norm_->weight, config_.rms_norm_eps}, {head_weight()}, dtype);
}

void CausalLm::decode_argmax(const at::Tensor& tokens, KvCache& cache, RowRange rows,
                             std::int64_t num_tokens, const at::Tensor& words) {
  const at::NoGradGuard no_grad;
  argmax_normed(decode_hidden(tokens, cache, rows), {norm_->weight, config_.rms_norm_eps},
                head_weight().narrow(0, 0, num_tokens), words);
}

at::Tensor CausalLm::decode_hidden(const at::Tensor& tokens, KvCache& cache, RowRange rows) {
  CachedForward call{cache, rows, {}, {}, {}};
  if (tokens.size(1) >= kPrefillLen) {
    const at::Tensor steps = at::arange(tokens.size(1), tokens.options().dtype(at::kInt));
    call.rope = rope(cache.positions(rows).unsqueeze(1) + steps);  // [count, len]
  }
  if (!layers_.empty()) layers_.front()->begin_cached(call, tokens.size(1));
  at::Tensor x = embed(tokens);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    x = layers_[layer]->forward_cached(x, call, static_cast<std::int64_t>(layer));
  }
  return x.select(1, -1);
}

void CausalLm::prepare_for_inference() {
  for (const auto& alone : {embed_tokens_, norm_, lm_head_}) {
    if (alone) join_weights({alone}, compute_dtype_);
  }
  for (const auto& layer : layers_) layer->prepare_for_inference(compute_dtype_);
}

AttentionInputs CausalLm::attention_inputs(const at::Tensor& tokens, std::int64_t layer) {
  const Rope angles = rope(at::arange(tokens.size(1), tokens.options()));
  at::Tensor x = embed(tokens);
  for (std::int64_t below = 0; below < layer; ++below) x = layers_[below]->forward(x, angles);
  return layers_.at(layer)->attention_inputs(x, angles);
}

void CausalLm::trace(const at::Tensor& tokens, const Visit& visit) {
  const at::NoGradGuard no_grad;
  const Rope angles = rope(at::arange(tokens.size(1), tokens.options()));
  at::Tensor x = embed(tokens);
  visit("model.embed_tokens", x);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    x = layers_[layer]->trace(x, angles, "model.layers." + std::to_string(layer), visit);
  }
  x = final_norm(x);
  visit("model.norm", x);
  for (std::int64_t b = 0; b < x.size(0); ++b) visit("lm_head", logits(x[b]));
}

KvCache CausalLm::make_cache(const KvCacheShape& shape) const {
  return KvCache(config_, shape, at::TensorOptions(compute_dtype_).device(device()));
}

}  // namespace parallax::lm
