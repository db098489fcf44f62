// SPDX-License-Identifier: MIT
#include "lm/analysis.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>

#include "lm/error.h"

namespace parallax::lm {
namespace {

void check_text(const at::Tensor& tokens) {
  const std::int64_t len = tokens.numel();
  if (len < 2 || len > kMaxAnalyzedTokens) {
    throw Error("a text to analyze needs 2 to " + std::to_string(kMaxAnalyzedTokens) +
                " tokens, got " + std::to_string(len));
  }
}

// One head of a layer's inputs [1, len, heads, head_dim], float64 on the CPU.
at::Tensor one_head(const at::Tensor& x, std::int64_t head) {
  return x.defined() ? x[0].select(1, head).to(at::kCPU, at::kDouble) : x;
}

struct Head {
  at::Tensor q, r, k, v;  // [len, head_dim]
};

Head head_of(const AttentionInputs& inputs, std::int64_t head) {
  const std::int64_t group = inputs.q.size(2) / inputs.k.size(2);
  return {one_head(inputs.q, head), one_head(inputs.r, head), one_head(inputs.k, head / group),
          one_head(inputs.v, head / group)};
}

double median_of(const at::Tensor& x) { return x.median().item<double>(); }

}  // namespace

HeadWeights head_weights(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k) {
  const at::Tensor keys = k.to(at::kDouble);
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(1)));
  const at::Tensor hidden_keys =
      at::ones({q.size(0), k.size(0)}, at::kBool).triu(1);  // later than the query
  const at::Tensor s = (scale * q.to(at::kDouble).matmul(keys.t()))
                           .masked_fill(hidden_keys, -std::numeric_limits<double>::infinity());
  HeadWeights weights;
  weights.p = s.softmax(1);
  if (r.defined()) {
    const at::Tensor t = r.to(at::kDouble).matmul(keys.t());
    const at::Tensor t_bar = (weights.p * t).sum(1, /*keepdim=*/true);
    weights.correction = weights.p * (t_bar - t);
  } else {
    weights.correction = at::zeros_like(weights.p);
  }
  weights.combined = weights.p + weights.correction;
  return weights;
}

HeadStatistics head_statistics(const HeadWeights& weights, const at::Tensor& v,
                               std::int64_t first_query) {
  const at::Tensor p = weights.p.slice(0, first_query);
  const at::Tensor combined = weights.combined.slice(0, first_query);
  const at::Tensor values = v.to(at::kDouble);
  // sum_j p (t_bar - t) v_j = -Sigma_KV r
  const at::Tensor correction = weights.correction.slice(0, first_query).matmul(values);
  HeadStatistics statistics;
  statistics.sink_mass = median_of(p.select(1, 0));
  statistics.combined_sink_mass = median_of(combined.select(1, 0));
  statistics.entropy = median_of(-at::xlogy(p, p).sum(1));
  statistics.negativity = median_of((-combined).clamp_min(0).sum(1));
  statistics.total_variation = median_of(combined.abs().sum(1));
  statistics.cor = median_of(correction.norm(2, 1) / p.matmul(values).norm(2, 1));
  statistics.min_weight = combined.min().item<double>();
  statistics.max_weight = combined.max().item<double>();
  return statistics;
}

std::int64_t first_analyzed_query(std::int64_t len) { return std::min<std::int64_t>(64, len / 4); }

std::vector<HeadStatistics> analyze_heads(CausalLm& model, const at::Tensor& tokens) {
  const torch::NoGradGuard no_grad;
  check_text(tokens);
  const at::Tensor batch = tokens.to(model.device()).unsqueeze(0);  // [1, len]
  std::vector<HeadStatistics> heads;
  for (std::int64_t layer = 0; layer < model.config().num_layers; ++layer) {
    const AttentionInputs inputs = model.attention_inputs(batch, layer);
    for (std::int64_t head = 0; head < model.config().num_q_heads; ++head) {
      const Head one = head_of(inputs, head);
      HeadStatistics statistics = head_statistics(head_weights(one.q, one.r, one.k), one.v,
                                                  first_analyzed_query(tokens.numel()));
      statistics.layer = layer;
      statistics.head = head;
      heads.push_back(statistics);
    }
  }
  return heads;
}

HeadWeights weights_of_head(CausalLm& model, const at::Tensor& tokens, std::int64_t layer,
                            std::int64_t head) {
  const torch::NoGradGuard no_grad;
  check_text(tokens);
  const ModelConfig& config = model.config();
  if (layer < 0 || layer >= config.num_layers || head < 0 || head >= config.num_q_heads) {
    throw Error("no head " + std::to_string(head) + " in layer " + std::to_string(layer) +
                ": the model has layers 0 to " + std::to_string(config.num_layers - 1) +
                " with heads 0 to " + std::to_string(config.num_q_heads - 1));
  }
  const Head one =
      head_of(model.attention_inputs(tokens.to(model.device()).unsqueeze(0), layer), head);
  return head_weights(one.q, one.r, one.k);
}

std::vector<HeadStatistics> telling_heads(const std::vector<HeadStatistics>& heads,
                                          std::int64_t count) {
  struct Ranked {
    std::int64_t rank;  // by COR, within the layer
    HeadStatistics head;
  };
  std::vector<HeadStatistics> by_cor = heads;
  std::stable_sort(by_cor.begin(), by_cor.end(),
                   [](const auto& a, const auto& b) { return a.cor > b.cor; });
  std::map<std::int64_t, std::int64_t> ranked_of_layer;
  std::vector<Ranked> ranked;
  for (const HeadStatistics& head : by_cor) ranked.push_back({ranked_of_layer[head.layer]++, head});
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const Ranked& a, const Ranked& b) { return a.rank < b.rank; });
  std::vector<HeadStatistics> chosen;
  for (const Ranked& one : ranked) {
    if (static_cast<std::int64_t>(chosen.size()) < count) chosen.push_back(one.head);
  }
  std::sort(chosen.begin(), chosen.end(), [](const auto& a, const auto& b) {
    return std::tie(a.layer, a.head) < std::tie(b.layer, b.head);
  });
  return chosen;
}

std::string heads_json(const std::vector<HeadStatistics>& heads) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const HeadStatistics& head : heads) {
    json.push_back({{"layer", head.layer},
                    {"head", head.head},
                    {"cor", head.cor},
                    {"total_variation", head.total_variation},
                    {"negativity", head.negativity},
                    {"entropy", head.entropy},
                    {"sink_mass", head.sink_mass},
                    {"combined_sink_mass", head.combined_sink_mass},
                    {"min_weight", head.min_weight},
                    {"max_weight", head.max_weight}});
  }
  return json.dump(2);
}

}  // namespace parallax::lm
