// Shared by the checks: random numbers, stored weights, and comparisons that end the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "ops.h"
#include "parallel.h"

constexpr double kUnit = 1.0 / (1 << 24);
inline std::mt19937 generator(20240229);

inline int64_t Between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Exactly n numbers in a separate allocation, with poisoned memory on both sides.
template <typename T>
struct Array {
  explicit Array(int64_t n) : size(n), data(new T[static_cast<size_t>(n)]) {}
  Array(int64_t n, T value) : Array(n) {
    for (int64_t i = 0; i < n; ++i) data[static_cast<size_t>(i)] = value;
  }
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
  T* get() const { return data.get(); }
  int64_t size;
  std::unique_ptr<T[]> data;
};

struct Floats : Array<float> {
  using Array<float>::Array;
  static Floats Normal(int64_t n) {
    Floats floats(n);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) floats[i] = normal(generator);
    return floats;
  }
};

[[noreturn]] inline void Fail(const char* what, double found, double expected) {
  std::fprintf(stderr, "%s: found %.9g, expected %.9g\n", what, found, expected);
  std::exit(1);
}

inline void Near(const char* what, double found, double expected, double tolerance) {
  if (!(std::fabs(found - expected) <= tolerance)) Fail(what, found, expected);
}

// The value of a finite number in IEEE half precision.
inline double HalfValue(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half & 0x8000 ? -size : size;
}

// Random weights of one layer in any format. Padding values are random too; padding scales and minima are zero.
struct Weights {
  Weights(precast::Format format, int64_t outs, int64_t in, bool symmetric = false);

  // Weight (o, k); in packed formats a scale times a whole number, plus a minimum.
  double At(int64_t o, int64_t k) const { return Scale(o, k) * Whole(o, k) + Minimum(o, k); }
  double Whole(int64_t o, int64_t k) const;
  double Scale(int64_t o, int64_t k) const { return packed ? HalfValue(scale[Shared(o, k)]) : 1.0; }
  double Minimum(int64_t o, int64_t k) const {
    if (format != precast::Format::kInt4) return 0.0;
    return symmetric ? -8.0 * Scale(o, k) : HalfValue(minimum[Shared(o, k)]);
  }
  precast::Weight View() const {
    return {.format = format,
            .values = values.get(),
            .scale = packed ? scale.get() : nullptr,
            .minimum = format == precast::Format::kInt4 && !symmetric ? minimum.get() : nullptr,
            .outs = outs};
  }

  precast::Format format;
  bool packed, symmetric;  // symmetric: int4 without minima
  int64_t outs, in, pad, panels;
  Array<unsigned char> values;
  Array<uint16_t> scale, minimum;

 private:
  int64_t Shared(int64_t o, int64_t k) const {
    return (o / precast::kPanel * (pad / precast::kGroup) + k / precast::kGroup) * precast::kPanel +
           o % precast::kPanel;
  }
};

constexpr precast::Format kFormats[] = {precast::Format::kFloat32, precast::Format::kBfloat16, precast::Format::kInt8,
                                        precast::Format::kInt4};

// A gate applied to a number.
double GateOf(precast::Gate gate, double x);

void CheckLinearOps(const precast::Ops& ops);

void CheckNormsAndExperts(xla::ffi::ThreadPool& pool);

// Check whole calls with the instruction set in use, on a pool of this many threads.
void CheckCalls(int64_t threads);
