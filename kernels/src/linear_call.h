// A checked linear call: y = norm(x) W^T + b, with a gate applied or a residual added.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "parallel.h"

namespace precast {

inline int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that is reused from call to call.
class Arena {
 public:
  // Release all arrays and reserve this many bytes, plus the padding of up to eight arrays.
  void Reset(int64_t bytes) {
    const int64_t needed = bytes + 9 * kAlignment;
    if (needed > size_) {
      memory_.reset(new char[static_cast<size_t>(needed)]);
      size_ = needed;
    }
    used_ = RoundUp(reinterpret_cast<int64_t>(memory_.get()), kAlignment) - reinterpret_cast<int64_t>(memory_.get());
  }
  template <typename T>
  T* Take(int64_t n) {
    T* taken = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += RoundUp(n * static_cast<int64_t>(sizeof(T)), kAlignment);
    return taken;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0, used_ = 0;
};

// One product of a call.
struct LinearPart {
  Weight weight;
  const float* bias = nullptr;  // [outs], or null
  float* y = nullptr;           // [rows, outs]
};

struct LinearCall {
  int64_t rows, in;
  const float* x = nullptr;     // [rows, in]
  const float* norm = nullptr;  // [in], or null
  float eps = 0.0f;
  const float* residual = nullptr;  // [rows, outs] for a call with one result, or null
  Gate gate = Gate::kNone;          // gates the first part; the second part, if any, multiplies it
  std::vector<LinearPart> parts = {};

  size_t results() const { return gate == Gate::kNone ? parts.size() : 1; }
};

void RunLinear(Team& team, Arena& arena, const LinearCall& call);

}  // namespace precast
