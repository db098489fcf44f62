// SPDX-License-Identifier: MIT
#include "lm/config.h"

#include <toml++/toml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <type_traits>
#include <utility>

#include "lm/error.h"

namespace parallax::lm {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a value may be. Numbers: [min, max]; strings: one of `choices`, or anything if empty.
struct Rule {
  double min = -kInfinity;
  double max = kInfinity;
  std::vector<std::string> choices = {};
};

Rule at_least(double min) { return {.min = min}; }
Rule between(double min, double max) { return {.min = min, .max = max}; }
Rule one_of(std::vector<std::string> choices) { return {.choices = std::move(choices)}; }

// The list: visit(section, key, value, rule, help) for every field, in file order.
template <class C, class Visitor>
void visit_model(C& c, Visitor&& visit) {
  const char* s = "model";
  visit(s, "mixer", c.mixer, one_of({"parallax", "softmax"}), "attention of every layer");
  visit(s, "vocab_size", c.vocab_size, at_least(2), "tokens; 257 for bytes");
  visit(s, "hidden_size", c.hidden_size, at_least(1), "width of the residual stream");
  visit(s, "num_layers", c.num_layers, at_least(1), "decoder layers");
  visit(s, "num_q_heads", c.num_q_heads, at_least(1), "query heads");
  visit(s, "num_kv_heads", c.num_kv_heads, at_least(1), "key/value heads; divides num_q_heads");
  visit(s, "head_dim", c.head_dim, at_least(1), "width of a head: a multiple of 8, at most 256");
  visit(s, "ffn_size", c.ffn_size, at_least(1), "width of the SwiGLU FFN");
  visit(s, "tie_embeddings", c.tie_embeddings, Rule{}, "the head is the embedding");
  visit(s, "rope_theta", c.rope_theta, at_least(1), "base of RoPE's frequencies");
  visit(s, "rms_norm_eps", c.rms_norm_eps, at_least(0), "added to the mean square");
  visit(s, "init_std", c.init_std, at_least(0), "standard deviation of all matrices at the start");
  visit(s, "r_norm", c.r_norm, Rule{}, "RMSNorm on r (parallax)");
  visit(s, "r_rope", c.r_rope, Rule{}, "RoPE on r (parallax)");
  visit(s, "match_to", c.match_to, Rule{}, "config whose parameters or compute to match");
  visit(s, "match", c.match, one_of({"", "parameters", "compute"}), "what to match");
}

template <class C, class Visitor>
void visit_data(C& c, Visitor&& visit) {
  const char* s = "data";
  visit(s, "path", c.path, Rule{}, "folder written by `parallax tokenize`");
  visit(s, "seq_len", c.seq_len, at_least(1), "tokens of a training sequence");
  visit(s, "seed", c.seed, at_least(0), "of the order of the sequences");
}

template <class C, class Visitor>
void visit_optimizer(C& c, Visitor&& visit) {
  const char* s = "optimizer";
  visit(s, "name", c.name, one_of({"muon", "adamw"}), "of the hidden matrices");
  visit(s, "lr", c.lr, at_least(0), "learning rate of the hidden matrices");
  visit(s, "weight_decay", c.weight_decay, at_least(0), "of the hidden matrices, decoupled");
  visit(s, "momentum", c.momentum, between(0, 1), "Muon's momentum");
  visit(s, "nesterov", c.nesterov, Rule{}, "Muon looks one momentum step ahead");
  visit(s, "ns_steps", c.ns_steps, between(1, 64), "Newton-Schulz iterations");
  visit(s, "ns_coefficients", c.ns_coefficients, Rule{}, "a, b, c for all steps, or for each");
  visit(s, "ns_dtype", c.ns_dtype, one_of({"float32", "bfloat16"}), "Newton-Schulz runs in it");
  visit(s, "scaling", c.scaling, one_of({"keller_jordan", "rms_matched"}),
        "max(1, rows/cols)^0.5, or 0.2 max(rows, cols)^0.5");
  visit(s, "orthogonalize", c.orthogonalize, one_of({"fused", "projection", "head"}),
        "q|k|v|r and gate|up as one matrix, each matrix, or each head's rows");
  visit(s, "adamw_lr", c.adamw_lr, at_least(0), "learning rate of embedding, head and gains");
  visit(s, "adamw_weight_decay", c.adamw_weight_decay, at_least(0), "of embedding and head");
  visit(s, "beta1", c.beta1, between(0, 1), "AdamW's decay of the first moment");
  visit(s, "beta2", c.beta2, between(0, 1), "AdamW's decay of the second moment");
  visit(s, "eps", c.eps, at_least(0), "AdamW's denominator");
}

template <class C, class Visitor>
void visit_schedule(C& c, Visitor&& visit) {
  const char* s = "schedule";
  visit(s, "name", c.name, one_of({"wsd", "cosine", "constant"}), "of the learning rate");
  visit(s, "warmup_steps", c.warmup_steps, at_least(0), "0: warmup_fraction decides");
  visit(s, "warmup_fraction", c.warmup_fraction, between(0, 1), "of all steps");
  visit(s, "decay_fraction", c.decay_fraction, between(0, 1), "of all steps, the last (wsd)");
  visit(s, "decay_shape", c.decay_shape, one_of({"linear", "sqrt", "cosine"}),
        "1 - x, 1 - sqrt x, or half a cosine (wsd)");
  visit(s, "min_lr_ratio", c.min_lr_ratio, between(0, 1), "where the decay ends");
  visit(s, "wd_anneal_gamma", c.wd_anneal_gamma, at_least(0),
        "weight decay times (1 - x)^gamma in the decay");
}

template <class C, class Visitor>
void visit_train(C& c, Visitor&& visit) {
  const char* s = "train";
  visit(s, "steps", c.steps, at_least(1), "optimizer steps");
  visit(s, "batch_size", c.batch_size, at_least(1), "sequences a forward pass");
  visit(s, "accumulate", c.accumulate, at_least(1), "forward passes a step");
  visit(s, "grad_clip", c.grad_clip, at_least(0), "largest global gradient norm; 0: no clipping");
  visit(s, "seed", c.seed, at_least(0), "of the initial weights");
  visit(s, "device", c.device, one_of({"auto", "cpu", "cuda"}), "auto: a GPU where there is one");
  visit(s, "dtype", c.dtype, one_of({"float32", "bfloat16"}),
        "of activations; weights and their gradients stay float32");
  visit(s, "eval_every", c.eval_every, at_least(0), "steps; 0: only at the end");
  visit(s, "eval_batches", c.eval_batches, at_least(1), "validation batches an evaluation");
  visit(s, "checkpoint_every", c.checkpoint_every, at_least(0), "steps; 0: only at the end");
  visit(s, "keep_last", c.keep_last, at_least(1), "checkpoints kept besides the trunk's");
  visit(s, "trunk_steps", c.trunk_steps, at_least(1), "steps whose checkpoints are never deleted");
  visit(s, "nonfinite", c.nonfinite, one_of({"stop", "skip"}),
        "a loss or gradient that is not finite ends the run, or its step is left out");
  visit(s, "log_every", c.log_every, at_least(1), "steps between lines of metrics");
}

template <class C, class Visitor>
void visit_fields(C& config, Visitor&& visit) {
  visit_model(config.model, visit);
  visit_data(config.data, visit);
  visit_optimizer(config.optimizer, visit);
  visit_schedule(config.schedule, visit);
  visit_train(config.train, visit);
}

[[noreturn]] void fail(const std::string& name, const std::string& key, const std::string& expected,
                       const std::string& got) {
  throw Error(name + ": " + key + ": expected " + expected + ", got " + got);
}

// ---- values as TOML

std::string toml_text(bool value) { return value ? "true" : "false"; }
std::string toml_text(std::int64_t value) { return std::to_string(value); }
std::string toml_text(double value) {
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  std::string text(buffer, end);
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}
std::string toml_text(const std::string& value) {
  std::string text = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04X", static_cast<unsigned>(c));
      text += escape;
    } else {
      text += c;
    }
  }
  return text + '"';
}
template <class T>
std::string toml_text(const std::vector<T>& values) {
  std::string text = "[";
  for (std::size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + toml_text(values[i]);
  }
  return text + "]";
}

template <class T>
constexpr const char* kTypeName = nullptr;
template <>
constexpr const char* kTypeName<bool> = "true or false";
template <>
constexpr const char* kTypeName<std::int64_t> = "an integer";
template <>
constexpr const char* kTypeName<double> = "a number";
template <>
constexpr const char* kTypeName<std::string> = "a string";
template <>
constexpr const char* kTypeName<std::vector<double>> = "a list of numbers";
template <>
constexpr const char* kTypeName<std::vector<std::int64_t>> = "a list of integers";

std::string describe(const toml::node& node) {
  std::ostringstream text;
  node.visit([&](const auto& typed) {
    if constexpr (toml::is_table<decltype(typed)>) {
      text << "a table";
    } else if constexpr (toml::is_string<decltype(typed)>) {
      text << toml_text(std::string(typed.get()));
    } else {
      text << typed;
    }
  });
  return text.str();
}

bool assign(const toml::node& node, bool& field) {
  const auto value = node.value_exact<bool>();
  if (value) field = *value;
  return value.has_value();
}
bool assign(const toml::node& node, std::int64_t& field) {
  const auto value = node.value_exact<std::int64_t>();
  if (value) field = *value;
  return value.has_value();
}
bool assign(const toml::node& node, double& field) {
  if (!node.is_number()) return false;
  field = *node.value<double>();
  return true;
}
bool assign(const toml::node& node, std::string& field) {
  const auto value = node.value_exact<std::string>();
  if (value) field = *value;
  return value.has_value();
}
template <class T>
bool assign(const toml::node& node, std::vector<T>& field) {
  const toml::array* array = node.as_array();
  if (!array) return false;
  std::vector<T> values;
  for (const toml::node& element : *array) {
    if (!assign(element, values.emplace_back())) return false;
  }
  field = std::move(values);
  return true;
}

// ---- unknown keys

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row[b.size()];
}

std::vector<std::string> known_keys() {
  std::vector<std::string> keys;
  Config config;
  visit_fields(config, [&](const char* section, const char* key, auto&, const Rule&, const char*) {
    keys.push_back(std::string(section) + "." + key);
  });
  return keys;
}

[[noreturn]] void fail_unknown(const std::string& name, const std::string& key) {
  std::string nearest;
  std::size_t best = std::numeric_limits<std::size_t>::max();
  for (const std::string& known : known_keys()) {
    // A right key in the wrong section, or in none, is as good as found.
    const std::string_view known_leaf = std::string_view(known).substr(known.find('.') + 1);
    const std::string_view leaf = std::string_view(key).substr(key.find('.') + 1);
    const std::size_t distance =
        std::min(edit_distance(key, known), edit_distance(leaf, known_leaf) + 1);
    if (distance < best) {
      best = distance;
      nearest = known;
    }
  }
  throw Error(name + ": unknown key " + key + ", did you mean " + nearest + "?");
}

void check_known(const toml::table& file, const std::string& name) {
  const std::vector<std::string> known = known_keys();
  for (const auto& [section, node] : file) {
    const std::string prefix(section.str());
    const toml::table* table = node.as_table();
    if (!table) fail_unknown(name, prefix);
    const bool section_known = std::any_of(known.begin(), known.end(), [&](const std::string& key) {
      return key.substr(0, key.find('.')) == prefix;
    });
    if (!section_known && table->empty()) {
      throw Error(name + ": unknown section [" + prefix +
                  "], expected [model], [data], [optimizer], [schedule] or [train]");
    }
    for (const auto& entry : *table) {
      const std::string key = prefix + "." + std::string(entry.first.str());
      if (std::find(known.begin(), known.end(), key) == known.end()) fail_unknown(name, key);
    }
  }
}

// ---- reading

void read_file_fields(const toml::table& file, const std::string& name, Config& config) {
  check_known(file, name);
  visit_fields(
      config, [&](const char* section, const char* key, auto& field, const Rule&, const char*) {
        const auto node = file[section][key];
        if (node && !assign(*node.node(), field)) {
          fail(name, std::string(section) + "." + key,
               kTypeName<std::remove_reference_t<decltype(field)>>, describe(*node.node()));
        }
      });
}

template <class T>
bool assign_text(const std::string& text, T& field) {
  if constexpr (std::is_same_v<T, std::string>) {
    if (text.empty() || (text.front() != '"' && text.front() != '\'')) {
      field = text;
      return true;
    }
  }
  try {
    return assign(*toml::parse("value = " + text).get("value"), field);
  } catch (const toml::parse_error&) {
    return false;
  }
}

void apply_override(const std::string& text, Config& config) {
  const std::string name = "override " + text;
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos) throw Error(name + ": expected section.key=value");
  const std::string wanted = text.substr(0, equals);
  const std::string value = text.substr(equals + 1);
  bool found = false;
  visit_fields(config,
               [&](const char* section, const char* key, auto& field, const Rule&, const char*) {
                 if (std::string(section) + "." + key != wanted) return;
                 found = true;
                 if (!assign_text(value, field)) {
                   fail(name, wanted, kTypeName<std::remove_reference_t<decltype(field)>>, value);
                 }
               });
  if (!found) fail_unknown(name, wanted);
}

// ---- checking

std::string number(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

void check_value(const std::string& name, const std::string& key, double value, const Rule& rule) {
  if (value >= rule.min && value <= rule.max && std::isfinite(value)) return;
  const std::string expected = rule.max < kInfinity
                                   ? "a value from " + number(rule.min) + " to " + number(rule.max)
                               : rule.min > -kInfinity ? "at least " + number(rule.min)
                                                       : "a finite number";
  fail(name, key, expected, number(value));
}

void check_value(const std::string& name, const std::string& key, const std::string& value,
                 const Rule& rule) {
  if (rule.choices.empty() ||
      std::find(rule.choices.begin(), rule.choices.end(), value) != rule.choices.end()) {
    return;
  }
  std::string expected;
  for (const std::string& choice : rule.choices) {
    if (!choice.empty()) expected += (expected.empty() ? "" : " or ") + toml_text(choice);
  }
  fail(name, key, expected, toml_text(value));
}

template <class T>
void check_value(const std::string& name, const std::string& key, const std::vector<T>& values,
                 const Rule& rule) {
  for (const T value : values) check_value(name, key, static_cast<double>(value), rule);
}

void check_shapes(const Config& config, const std::string& name) {
  const ModelConfig& model = config.model;
  if (model.num_q_heads % model.num_kv_heads != 0) {
    fail(name, "model.num_q_heads",
         "a multiple of num_kv_heads = " + std::to_string(model.num_kv_heads),
         std::to_string(model.num_q_heads));
  }
  if (model.head_dim % 8 != 0 || model.head_dim > 256) {
    fail(name, "model.head_dim", "a multiple of 8, at most 256", std::to_string(model.head_dim));
  }
  if (model.match_to.empty() != model.match.empty()) {
    throw Error(name + ": model.match_to and model.match belong together: set both or neither");
  }
  const OptimizerConfig& optimizer = config.optimizer;
  const std::size_t count = optimizer.ns_coefficients.size();
  if (count != 3 && count != static_cast<std::size_t>(3 * optimizer.ns_steps)) {
    fail(name, "optimizer.ns_coefficients",
         "3 numbers, or 3 for each of the " + std::to_string(optimizer.ns_steps) + " ns_steps",
         std::to_string(count));
  }
}

toml::table parse_toml(std::string_view text, const std::string& name) {
  try {
    return toml::parse(text, name);
  } catch (const toml::parse_error& error) {
    throw Error(name + ": line " + std::to_string(error.source().begin.line) + ": " +
                std::string(error.description()));
  }
}

}  // namespace

void validate(const Config& config, const std::string& name) {
  visit_fields(config, [&](const char* section, const char* key, const auto& field,
                           const Rule& rule, const char*) {
    using Field = std::remove_cvref_t<decltype(field)>;
    const std::string full_key = std::string(section) + "." + key;
    if constexpr (std::is_same_v<Field, std::int64_t> || std::is_same_v<Field, double>) {
      check_value(name, full_key, static_cast<double>(field), rule);
    } else if constexpr (!std::is_same_v<Field, bool>) {
      check_value(name, full_key, field, rule);
    }
  });
  check_shapes(config, name);
}

Config parse_config(std::string_view text, const std::string& name,
                    const std::vector<std::string>& overrides) {
  Config config;
  read_file_fields(parse_toml(text, name), name, config);
  std::filesystem::path match_to = config.model.match_to;
  if (!match_to.empty() && match_to.is_relative()) {
    match_to = std::filesystem::path(name).parent_path() / match_to;
    config.model.match_to = match_to.lexically_normal().string();
  }
  for (const std::string& text_override : overrides) apply_override(text_override, config);
  validate(config, name);
  return config;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    throw Error(path + ": cannot read this config: no such file, or not readable");
  }
  std::ostringstream text;
  text << file.rdbuf();
  return parse_config(text.str(), path, overrides);
}

std::string to_toml(const Config& config) {
  std::string text;
  std::string current;
  visit_fields(config, [&](const char* section, const char* key, const auto& field, const Rule&,
                           const char*) {
    if (current != section) {
      text += (current.empty() ? "[" : "\n[") + std::string(section) + "]\n";
      current = section;
    }
    text += std::string(key) + " = " + toml_text(field) + "\n";
  });
  return text;
}

std::vector<FieldHelp> config_fields() {
  std::vector<FieldHelp> fields;
  const Config defaults;
  visit_fields(defaults, [&](const char* section, const char* key, const auto& field, const Rule&,
                             const char* help) {
    fields.push_back({std::string(section) + "." + key, toml_text(field), help});
  });
  return fields;
}

}  // namespace parallax::lm
