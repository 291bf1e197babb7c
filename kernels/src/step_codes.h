// The integers and numbers that encode the steps of a layer. exporter/models/steps.py has the same names in the same
// order; tests/kernels/test_step_codes.py compares the two.
#pragma once

#include <cstdint>
#include <cstring>

namespace precast {

// Integers of a step: its kind, then the fields of its code, then zeros.
constexpr int64_t kStepIntegers = 8;
// Floats of a step.
constexpr int64_t kStepNumbers = 2;

enum class StepKind : int64_t { kLinear, kAttention, kNorm, kExperts };

// The codes refer to arrays by number: 0 is the layer's input, and the results of each step take the next numbers. A
// residual of -1 means none. `has_norm` and `has_bias` are 0 or 1.

// Consumes `weights` entries of `outs`. Numbers: eps.
struct LinearCode {
  int64_t x, residual, has_norm, has_bias, gate, weights;
};

// Numbers: scale, soft_cap.
struct AttentionCode {
  int64_t q, k, v;
};

// Normalises each piece of `width` numbers separately. Numbers: eps.
struct NormCode {
  int64_t x, residual, width, has_bias;
};

// Consumes one entry of `outs`, the feed-forward width. Numbers: eps, and 1 if the shares are renormalised, else 0.
struct ExpertsCode {
  int64_t x, scores, residual, has_norm, gate, experts, chosen;
};

// Read the code of a step from its integers.
template <typename Code>
Code ReadCode(const int64_t* integers) {
  static_assert(sizeof(Code) <= (kStepIntegers - 1) * sizeof(int64_t));
  Code code;
  std::memcpy(&code, integers + 1, sizeof code);
  return code;
}

}  // namespace precast
