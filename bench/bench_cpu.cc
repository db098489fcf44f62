// SPDX-License-Identifier: MIT
// `make bench-cpu`: attention on the CPU, ours and the baselines interleaved in one run.
//
//   bench_cpu [--json FILE] [--seconds S]
//
// Every round times each contestant once; a table gives the minimum and the median over the rounds
// of its shape (at least three, and as many as S seconds a shape allow). One thread is timed by its
// CPU time, several by the wall clock. Useful FLOPs: forward
// 8 B H T T D / 2, backward twice that; softmax attention counts 4 and 10 where a rate is given.
#include <ATen/Parallel.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "bench/cpu_decode.h"
#include "bench/fma_peak.h"
#include "kernels/cpu/backward.h"
#include "kernels/cpu/forward.h"
#include "parallax/attention.h"

namespace parallax::bench {
namespace {

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The smallest and the median of some times, in ms.
struct Times {
  double min = 0, median = 0;
};

Times summarize(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  return {seconds.front() * 1e3, seconds[seconds.size() / 2] * 1e3};
}

using Contestant = std::function<void()>;

using Clock = double (*)();

std::vector<Times> race(const std::vector<Contestant>& contestants, double budget_s, Clock clock) {
  constexpr std::size_t kMinRounds = 3, kMaxRounds = 30;
  for (const Contestant& contestant : contestants) contestant();
  std::vector<std::vector<double>> seconds(contestants.size());
  const double begin = wall_seconds();
  for (std::size_t round = 0; round < kMaxRounds; ++round) {
    if (round >= kMinRounds && wall_seconds() - begin > budget_s) break;
    for (std::size_t i = 0; i < contestants.size(); ++i) {
      const double start = clock();
      contestants[i]();
      seconds[i].push_back(clock() - start);
    }
  }
  std::vector<Times> times;
  for (const auto& s : seconds) times.push_back(summarize(s));
  return times;
}

ParallelFor torch_threads() {
  return [](std::int64_t num_tasks, const TaskBody& body) {
    std::atomic<std::int64_t> next{0};
    const std::int64_t workers = std::min<std::int64_t>(num_tasks, at::get_num_threads());
    at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) {
        for (std::int64_t task = next++; task < num_tasks; task = next++) {
          body(task, static_cast<int>(worker));
        }
      }
    });
  };
}

void check(const Status& status) { TORCH_CHECK(status.ok(), status.message()); }

// [1, len, heads, head_dim]
ConstView view_of(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
View mutable_view_of(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Our kernels on one shape, memory and all.
class Ours {
 public:
  Ours(std::int64_t len, std::int64_t heads, std::int64_t head_dim, at::ScalarType type) {
    const auto tensor = [&] { return at::randn({1, len, heads, head_dim}).to(type); };
    q = tensor(), r = tensor(), k = tensor(), v = tensor(), d_o = tensor();
    for (at::Tensor* x : {&o_, &v_bar_, &dq_, &dr_, &dk_, &dv_}) *x = at::empty_like(q);
    lse_ = at::empty({1, heads, len}, at::kFloat);
    t_bar_ = at::empty_like(lse_);
    AttentionProblem problem;
    problem.dtype = type == at::kFloat ? DType::kFloat32 : DType::kBFloat16;
    problem.batch = 1;
    problem.q_len = problem.kv_len = len;
    problem.num_q_heads = problem.num_kv_heads = heads;
    problem.head_dim = head_dim;
    problem.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    Device device;
    device.num_threads = at::get_num_threads();
    check(plan(problem, device, &forward_));
    check(plan(problem, device, &backward_));
    const std::size_t bytes = std::max(workspace_bytes(forward_), workspace_bytes(backward_));
    workspace_ = at::empty({static_cast<std::int64_t>(bytes) + 64}, at::kByte);
  }

  // On the best instruction set, or on `target`.
  void forward(const cpu::Target* target = nullptr) const {
    ForwardArgs args;
    args.q = view_of(q), args.r = view_of(r), args.k = view_of(k), args.v = view_of(v);
    args.o = mutable_view_of(o_), args.v_bar = mutable_view_of(v_bar_);
    args.lse = lse_.data_ptr(), args.t_bar = t_bar_.data_ptr();
    if (target) return cpu::forward(forward_, args, workspace(), torch_threads(), *target);
    check(run(forward_, args, workspace(), torch_threads()));
  }

  void backward(const cpu::Target* target = nullptr) const {
    BackwardArgs args;
    args.q = view_of(q), args.r = view_of(r), args.k = view_of(k), args.v = view_of(v);
    args.o = view_of(o_), args.v_bar = view_of(v_bar_), args.d_o = view_of(d_o);
    args.lse = lse_.data_ptr(), args.t_bar = t_bar_.data_ptr();
    args.dq = mutable_view_of(dq_), args.dr = mutable_view_of(dr_);
    args.dk = mutable_view_of(dk_), args.dv = mutable_view_of(dv_);
    if (target) return cpu::backward(backward_, args, workspace(), torch_threads(), *target);
    check(run(backward_, args, workspace(), torch_threads()));
  }

  std::size_t forward_bytes() const { return workspace_bytes(forward_); }
  std::size_t backward_bytes() const { return workspace_bytes(backward_); }

  at::Tensor q, r, k, v, d_o;

 private:
  void* workspace() const {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace_.data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

  at::Tensor o_, v_bar_, lse_, t_bar_, dq_, dr_, dk_, dv_, workspace_;
  ForwardPlan forward_;
  BackwardPlan backward_;
};

// A baseline in autograd: forward without a graph, and the backward of a graph made once.
struct Baseline {
  using Function = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

  Baseline(const std::vector<at::Tensor>& inputs, const at::Tensor& d_o, Function attention)
      : attention(std::move(attention)), d_o(d_o.transpose(1, 2).contiguous()) {
    for (const at::Tensor& x : inputs) {
      leaves.push_back(x.transpose(1, 2).contiguous().requires_grad_(true));
    }
    o = this->attention(leaves);
  }
  void forward() const {
    const at::NoGradGuard no_grad;
    attention(leaves);
  }
  void backward() const { torch::autograd::grad({o}, leaves, {d_o}, true); }

  Function attention;
  at::Tensor d_o, o;
  std::vector<at::Tensor> leaves;
};

at::Tensor softmax_attention(const std::vector<at::Tensor>& x) {
  return at::scaled_dot_product_attention(x[0], x[1], x[2], {}, 0.0, true);
}

// The formula as a user would write it with LibTorch.
at::Tensor composed_attention(const std::vector<at::Tensor>& x) {
  const at::Tensor &q = x[0], &r = x[1], &k = x[2], &v = x[3];
  const std::int64_t len = q.size(2);
  const at::Tensor hidden = at::ones({len, len}, at::kBool).triu(1);
  const at::Tensor key = k.transpose(2, 3);
  const at::Tensor s = at::matmul(q * std::pow(static_cast<double>(q.size(3)), -0.5), key);
  const at::Tensor p = at::softmax(s.masked_fill(hidden, -INFINITY), -1);
  const at::Tensor t = at::matmul(r, key);
  const at::Tensor t_bar = (p * t).sum(-1, true);
  return at::matmul(p * (1 + t_bar - t), v);
}

class Report {
 public:
  void add(const std::string& key, double value) {
    json_ += (json_.empty() ? "" : ",\n") + ("  \"" + key + "\": " + std::to_string(value));
  }
  void write(const std::string& path) const {
    std::ofstream file(path);
    file << "{\n" << json_ << "\n}\n";
    file.flush();
    TORCH_CHECK(file, "--json: cannot write ", path);
  }

 private:
  std::string json_;
};

constexpr std::int64_t kLen = 2048, kHeads = 4;

double useful_gflop(std::int64_t len, std::int64_t heads, std::int64_t head_dim) {
  return 4e-9 * static_cast<double>(heads * len * len * head_dim);
}

double measure_peak(Report* report) {
  double peak = 0, sgemm = 0;
  const at::Tensor a = at::randn({1024, 1024}), b = at::randn({1024, 1024});
  at::Tensor c = at::empty({1024, 1024});
  for (int round = 0; round < 12; ++round) {
    peak = std::max(peak, fma_gflops());
    const double start = thread_seconds();
    at::mm_out(c, a, b);
    sgemm = std::max(sgemm, 2.0 * 1024 * 1024 * 1024 * 1e-9 / (thread_seconds() - start));
  }
  std::printf("one core: FMA peak %.1f GFLOP/s (%d-lane vectors); LibTorch sgemm 1024^3 %.1f\n\n",
              peak, fma_lanes(), sgemm);
  report->add("fma_peak_gflops", peak);
  report->add("sgemm_gflops", sgemm);
  return peak;
}

struct Row {
  std::string name, key;
  Contestant forward, backward;
};

void print_race(const std::string& title, const std::vector<Row>& rows, int num_threads,
                double gflop, double peak, double budget_s, Report* report) {
  std::vector<Contestant> contestants;
  for (const Row& row : rows) {
    contestants.push_back(row.forward);
    contestants.push_back(row.backward);
  }
  const std::vector<Times> times =
      race(contestants, budget_s, num_threads == 1 ? thread_seconds : wall_seconds);
  std::printf("%s\n%-26s %9s %9s %9s %9s %7s %7s %7s %7s\n", title.c_str(), "ms", "fwd min",
              "median", "bwd min", "median", "fwd x", "bwd x", "fwd %", "bwd %");
  const Times &fwd_base = times[2], &bwd_base = times[3];  // the second row is softmax attention
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Times &fwd = times[2 * i], &bwd = times[2 * i + 1];
    std::printf("%-26s %9.2f %9.2f %9.2f %9.2f %7.2f %7.2f", rows[i].name.c_str(), fwd.min,
                fwd.median, bwd.min, bwd.median, fwd.min / fwd_base.min, bwd.min / bwd_base.min);
    if (i == 0 && peak > 0) {
      std::printf(" %7.1f %7.1f", 100 * gflop / fwd.min * 1e3 / peak,
                  100 * 2 * gflop / bwd.min * 1e3 / peak);
    }
    std::printf("\n");
    report->add(rows[i].key + "_forward_ms", fwd.min);
    report->add(rows[i].key + "_backward_ms", bwd.min);
  }
  std::printf("\n");
}

void compare(std::int64_t head_dim, at::ScalarType type, int num_threads, double peak,
             double budget_s, Report* report) {
  at::set_num_threads(num_threads);
  const Ours ours(kLen, kHeads, head_dim, type);
  const Baseline softmax({ours.q, ours.k, ours.v}, ours.d_o, softmax_attention);
  const std::string suffix = std::string(type == at::kFloat ? "float32" : "bf16") + "_d" +
                             std::to_string(head_dim) + "_threads" + std::to_string(num_threads);
  std::vector<Row> rows = {
      {"parallax", "parallax_" + suffix, [&] { ours.forward(); }, [&] { ours.backward(); }},
      {"LibTorch softmax", "softmax_" + suffix, [&] { softmax.forward(); },
       [&] { softmax.backward(); }}};
  const cpu::Targets targets = cpu::supported_targets();
  if (type == at::kBFloat16 && targets.list[0]->name == std::string("avx512bf16")) {
    const cpu::Target* float_inside = targets.list[1];
    rows.push_back({"parallax, no bf16 dots", "parallax_no_dots_" + suffix,
                    [&ours, float_inside] { ours.forward(float_inside); },
                    [&ours, float_inside] { ours.backward(float_inside); }});
  }
  std::optional<Baseline> composed;
  if (type == at::kFloat && num_threads == 1) {
    composed.emplace(std::vector{ours.q, ours.r, ours.k, ours.v}, ours.d_o, composed_attention);
    rows.push_back({"LibTorch composed formula", "composed_" + suffix, [&] { composed->forward(); },
                    [&] { composed->backward(); }});
  }
  const std::string title = std::string(type == at::kFloat ? "float32" : "bf16") +
                            ", D=" + std::to_string(head_dim) + ", B1 H4 T2048 causal, " +
                            std::to_string(num_threads) +
                            (num_threads == 1 ? " thread" : " threads");
  print_race(title, rows, num_threads, useful_gflop(kLen, kHeads, head_dim),
             type == at::kFloat && num_threads == 1 ? peak : 0, budget_s, report);
}

// Two threads against one, interleaved.
void compare_threads(std::int64_t head_dim, double budget_s, Report* report) {
  at::set_num_threads(1);
  const Ours one(kLen, kHeads, head_dim, at::kFloat);
  at::set_num_threads(2);
  const Ours two(kLen, kHeads, head_dim, at::kFloat);
  const auto with_threads = [](int num_threads, auto f) {
    return [num_threads, f] {
      at::set_num_threads(num_threads);
      f();
    };
  };
  const std::vector<Times> times =
      race({with_threads(1, [&] { one.forward(); }), with_threads(2, [&] { two.forward(); }),
            with_threads(1, [&] { one.backward(); }), with_threads(2, [&] { two.backward(); })},
           budget_s, wall_seconds);
  const double forward = times[0].min / times[1].min, backward = times[2].min / times[3].min;
  std::printf("two threads over one, float32, D=%d: forward %.2fx, backward %.2fx\n",
              static_cast<int>(head_dim), forward, backward);
  report->add("two_threads_forward_d" + std::to_string(head_dim), forward);
  report->add("two_threads_backward_d" + std::to_string(head_dim), backward);
}

void show_growth(Report* report) {
  at::set_num_threads(1);
  std::printf("\nfloat32, D=64, B1 H1 causal, 1 thread\n%8s %10s %10s %14s %14s %12s %12s\n", "T",
              "fwd ms", "bwd ms", "fwd work. MB", "bwd work. MB", "tensors MB", "T x T MB");
  for (std::int64_t len = 2048; len <= 32768; len *= 2) {
    const Ours ours(len, 1, 64, at::kFloat);
    const double start = thread_seconds();
    ours.forward();
    const double middle = thread_seconds();
    ours.backward();
    const double end = thread_seconds();
    const double mb = 1e-6, length = static_cast<double>(len);
    std::printf("%8d %10.1f %10.1f %14.2f %14.2f %12.2f %12.1f\n", static_cast<int>(len),
                (middle - start) * 1e3, (end - middle) * 1e3,
                static_cast<double>(ours.forward_bytes()) * mb,
                static_cast<double>(ours.backward_bytes()) * mb, 11 * length * 64 * 4 * mb,
                length * length * 4 * mb);
    report->add("backward_workspace_mb_t" + std::to_string(len),
                static_cast<double>(ours.backward_bytes()) * mb);
  }
}

int run_all(int argc, char** argv) {
  std::string json;
  double budget_s = 4.0;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (i + 1 < argc && option == "--json") {
      json = argv[++i];
    } else if (i + 1 < argc && option == "--seconds") {
      budget_s = std::stod(argv[++i]);
    } else {
      std::fprintf(stderr, "bench_cpu: unknown option %s; it takes --json FILE, --seconds S\n",
                   argv[i]);
      return 2;
    }
  }
  torch::manual_seed(1);
  at::set_num_threads(1);
  Report report;
  const double peak = measure_peak(&report);
  std::printf("x: time over LibTorch's softmax attention; %%: useful FLOPs, of the FMA peak\n\n");
  for (std::int64_t head_dim : {64, 128}) {
    compare(head_dim, at::kFloat, 1, peak, budget_s, &report);
  }
  for (std::int64_t head_dim : {64, 128}) {
    compare(head_dim, at::kBFloat16, 1, peak, budget_s, &report);
  }
  if (at::get_num_threads() > 1 || sysconf(_SC_NPROCESSORS_ONLN) > 1) {
    for (std::int64_t head_dim : {64, 128}) {
      compare(head_dim, at::kFloat, 2, peak, budget_s, &report);
    }
    for (std::int64_t head_dim : {64, 128}) compare_threads(head_dim, budget_s, &report);
  }
  show_growth(&report);
  for (int num_threads : {1, 2}) {
    if (num_threads > sysconf(_SC_NPROCESSORS_ONLN)) break;
    at::set_num_threads(num_threads);
    show_decode(torch_threads(), num_threads, budget_s / 2,
                [&](const std::string& key, double value) { report.add(key, value); });
  }
  if (!json.empty()) report.write(json);
  return 0;
}

}  // namespace
}  // namespace parallax::bench

int main(int argc, char** argv) { return parallax::bench::run_all(argc, argv); }
