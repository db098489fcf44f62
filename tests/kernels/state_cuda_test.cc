// SPDX-License-Identifier: MIT
// merge_states and finalize_state on the GPU against the CPU's. The two exponentials differ in
// their last bits; where every m is the same, no exponential is left and the bits agree.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>

#include "tests/kernels/cpu_call.h"
#include "tests/kernels/cuda_call.h"

namespace parallax::tests {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class StateCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_gpu_for(Kernels::kPortable)) GTEST_SKIP() << "needs a GPU";
  }
};

// A state in device memory.
class DeviceState {
 public:
  explicit DeviceState(const OwnedState& host)
      : m_(bytes(host.m)), d1_(m_.size()), d2_(m_.size()), o1_(bytes(host.o1)), o2_(o1_.size()) {
    m_.upload(host.m.data(), m_.size());
    d1_.upload(host.d1.data(), m_.size());
    d2_.upload(host.d2.data(), m_.size());
    o1_.upload(host.o1.data(), o1_.size());
    o2_.upload(host.o2.data(), o1_.size());
  }
  StateView view() const {
    return {static_cast<float*>(m_.data()), static_cast<float*>(d1_.data()),
            static_cast<float*>(d2_.data()), static_cast<float*>(o1_.data()),
            static_cast<float*>(o2_.data())};
  }
  OwnedState download(const AttentionProblem& problem) const {
    OwnedState host(problem);
    m_.download(host.m.data(), m_.size());
    d1_.download(host.d1.data(), m_.size());
    d2_.download(host.d2.data(), m_.size());
    o1_.download(host.o1.data(), o1_.size());
    o2_.download(host.o2.data(), o1_.size());
    return host;
  }

 private:
  static std::size_t bytes(const std::vector<float>& values) {
    return values.size() * sizeof(float);
  }
  DeviceMemory m_, d1_, d2_, o1_, o2_;
};

// States of random rows; every fifth row of a state has met no key.
std::vector<OwnedState> random_states(const AttentionProblem& problem, int count, bool one_m) {
  std::mt19937 generator(11);
  std::normal_distribution<float> normal;
  std::vector<OwnedState> states;
  for (int n = 0; n < count; ++n) {
    OwnedState state(problem);
    for (std::size_t row = 0; row < state.m.size(); ++row) {
      const bool empty = generator() % 5 == 0;
      state.m[row] = empty ? -kInfinity : one_m ? 1.5f : 4 * normal(generator);
      state.d1[row] = empty ? 0 : 1 + std::abs(normal(generator));
      state.d2[row] = empty ? 0 : normal(generator);
      const auto q_len = static_cast<std::size_t>(problem.q_len);
      const auto heads = static_cast<std::size_t>(problem.num_q_heads);
      const auto head_dim = static_cast<std::size_t>(problem.head_dim);
      const std::size_t i = row % q_len, h = row / q_len % heads, b = row / q_len / heads;
      for (std::size_t d = 0; d < head_dim; ++d) {
        const std::size_t at = ((b * q_len + i) * heads + h) * head_dim + d;
        state.o1[at] = empty ? 0 : normal(generator);
        state.o2[at] = empty ? 0 : normal(generator);
      }
    }
    states.push_back(std::move(state));
  }
  return states;
}

OwnedState cpu_merge(const AttentionProblem& problem, std::vector<OwnedState> states) {
  std::vector<StateView> views;
  for (OwnedState& state : states) views.push_back(state.view());
  OwnedState merged(problem);
  const Status status = merge_states(problem, views.data(), static_cast<int>(views.size()),
                                     merged.view(), parallel_for(1));
  EXPECT_TRUE(status.ok()) << status.message();
  return merged;
}

OwnedState cuda_merge(const AttentionProblem& problem, const std::vector<OwnedState>& states,
                      bool into_first) {
  std::vector<std::unique_ptr<DeviceState>> device;
  std::vector<StateView> views;
  for (const OwnedState& state : states) {
    device.push_back(std::make_unique<DeviceState>(state));
    views.push_back(device.back()->view());
  }
  const DeviceState apart{OwnedState(problem)};
  const DeviceState& merged = into_first ? *device[0] : apart;
  const Status status = merge_states(problem, views.data(), static_cast<int>(views.size()),
                                     merged.view(), cuda_device(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  return merged.download(problem);
}

void expect_near(const std::vector<float>& ours, const std::vector<float>& expected,
                 double tolerance, const std::string& name) {
  EXPECT_LE(distance(Values(ours.begin(), ours.end()), Values(expected.begin(), expected.end())),
            tolerance)
      << name;
}

const AttentionProblem kProblems[] = {problem_of(DType::kBFloat16, 2, 3, 1, 5, 1, 64),
                                      problem_of(DType::kBFloat16, 1, 1, 1, 1, 1, 8),
                                      problem_of(DType::kBFloat16, 3, 2, 1, 4, 4, 120),
                                      problem_of(DType::kBFloat16, 2, 1, 1, 32, 8, 256)};

TEST_F(StateCuda, MergesLikeTheCpu) {
  for (const AttentionProblem& problem : kProblems) {
    for (int count : {0, 1, 2, 3, 64, 65, 150}) {
      for (bool into_first : {false, true}) {
        if (into_first && count == 0) continue;
        const std::vector<OwnedState> states = random_states(problem, count, false);
        const OwnedState ours = cuda_merge(problem, states, into_first);
        const OwnedState expected = cpu_merge(problem, states);
        const std::string name =
            std::to_string(count) + " states, head_dim " + std::to_string(problem.head_dim);
        const double tolerance = 1e-5 * (count + 1);
        EXPECT_EQ(ours.m, expected.m) << name;
        expect_near(ours.d1, expected.d1, tolerance, name);
        expect_near(ours.d2, expected.d2, tolerance, name);
        expect_near(ours.o1, expected.o1, tolerance, name);
        expect_near(ours.o2, expected.o2, tolerance, name);
      }
    }
  }
}

TEST_F(StateCuda, StatesOfOneMMergeToTheSameBits) {
  for (const AttentionProblem& problem : kProblems) {
    for (int count : {1, 2, 7, 100}) {
      const std::vector<OwnedState> states = random_states(problem, count, true);
      const OwnedState ours = cuda_merge(problem, states, true);
      const OwnedState expected = cpu_merge(problem, states);
      EXPECT_EQ(ours.m, expected.m);
      EXPECT_EQ(ours.d1, expected.d1);
      EXPECT_EQ(ours.d2, expected.d2);
      EXPECT_EQ(ours.o1, expected.o1);
      EXPECT_EQ(ours.o2, expected.o2);
    }
  }
}

TEST_F(StateCuda, FinalizesLikeTheCpu) {
  for (AttentionProblem problem : kProblems) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      problem.dtype = dtype;
      const OwnedState state = random_states(problem, 1, false)[0];
      const Results expected = cpu_finalize(problem, state);
      const DeviceState device(state);
      DeviceTensor o{Tensor(problem, false)};
      DeviceMemory lse(state.m.size() * sizeof(float)), t_bar(lse.size());
      const Status status =
          finalize_state(problem, device.view(), o.output(), static_cast<float*>(lse.data()),
                         static_cast<float*>(t_bar.data()), cuda_device(), nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      std::vector<float> our_lse(state.m.size()), our_t_bar(state.m.size());
      lse.download(our_lse.data(), lse.size());
      t_bar.download(our_t_bar.data(), t_bar.size());
      // No product is contracted and no exponential taken: o and t_bar are the CPU's bits.
      EXPECT_EQ(o.download().values(), expected.o) << name_of(dtype);
      EXPECT_EQ(Values(our_t_bar.begin(), our_t_bar.end()), expected.t_bar);
      EXPECT_LE(distance(Values(our_lse.begin(), our_lse.end()), expected.lse), 1e-5);
    }
  }
}

TEST_F(StateCuda, FinalizesOnlyWhatIsAskedFor) {
  const AttentionProblem problem = kProblems[0];
  const OwnedState state = random_states(problem, 1, false)[0];
  const DeviceState device(state);
  DeviceMemory lse(state.m.size() * sizeof(float));
  ASSERT_TRUE(finalize_state(problem, device.view(), {}, static_cast<float*>(lse.data()), nullptr,
                             cuda_device(), nullptr)
                  .ok());
  std::vector<float> our_lse(state.m.size());
  lse.download(our_lse.data(), lse.size());
  EXPECT_LE(distance(Values(our_lse.begin(), our_lse.end()), cpu_finalize(problem, state).lse),
            1e-5);
}

TEST_F(StateCuda, RefusesWhatItCannotTake) {
  AttentionProblem problem = kProblems[0];
  const DeviceState device{OwnedState(problem)};
  StateView view = device.view();
  view.d2 = nullptr;
  EXPECT_EQ(merge_states(problem, &view, 1, device.view(), cuda_device(), nullptr).message(),
            "states[0]: expected all of m, d1, d2, o1, o2, got a null pointer");
  view = device.view();
  view.o1 += 1;
  EXPECT_EQ(merge_states(problem, &view, 1, device.view(), cuda_device(), nullptr).message(),
            "states[0]: o1 and o2: their addresses must be multiples of 16 bytes");
  problem.dtype = DType::kFloat64;
  EXPECT_EQ(finalize_state(problem, device.view(), {}, nullptr, nullptr, cuda_device(), nullptr)
                .message(),
            "dtype: CUDA kernels give o in bf16, fp16 or float32");
}

}  // namespace
}  // namespace parallax::tests
