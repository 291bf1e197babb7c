// Calls one instruction set's kernels, under sanitizers, on buffers that end where their contents end, and compares
// with plain loops in double. Usage: driver avx2. Ends with 1 and a line on stderr at the first wrong number.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "ops.h"

namespace precast {
const Ops& WideOps();
}

namespace {

using namespace precast;

constexpr double kUnit = 1.0 / (1 << 24);
std::mt19937 generator(20240229);

int64_t Between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Exactly n floats of their own allocation: the byte before the first and the one behind the last are poisoned.
struct Floats {
  explicit Floats(int64_t n) : size(n), data(new float[static_cast<size_t>(n)]) {}
  static Floats Normal(int64_t n) {
    Floats floats(n);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) floats[i] = normal(generator);
    return floats;
  }
  float& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  float* get() { return data.get(); }
  int64_t size;
  std::unique_ptr<float[]> data;
};

[[noreturn]] void Fail(const char* what, double found, double expected) {
  std::fprintf(stderr, "%s: found %.9g, expected %.9g\n", what, found, expected);
  std::exit(1);
}

void Near(const char* what, double found, double expected, double tolerance) {
  if (!(std::fabs(found - expected) <= tolerance)) Fail(what, found, expected);
}

void CheckMatmul(const Ops& ops, int64_t rows, int64_t in, int64_t outs, int64_t gap) {
  Floats x = Floats::Normal(rows * in), w = Floats::Normal(outs * in);
  const int64_t y_row = outs + gap;
  Floats y((rows - 1) * y_row + outs);
  for (int64_t i = 0; i < y.size; ++i) y[i] = -12345.0f;
  ops.matmul(x.get(), rows, in, w.get(), outs, y.get(), y_row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < y_row && r * y_row + o < y.size; ++o) {
      if (o >= outs) {
        Near("matmul wrote between its rows", y[r * y_row + o], -12345.0, 0);
        continue;
      }
      double sum = 0, size = 0;
      for (int64_t i = 0; i < in; ++i) {
        const double term = static_cast<double>(x[r * in + i]) * w[o * in + i];
        sum += term;
        size += std::fabs(term);
      }
      Near("matmul", y[r * y_row + o], sum, (static_cast<double>(in) / 4 + 8) * kUnit * size);
    }
}

struct Case {
  int64_t tokens, group, H, start, token, from, to;
};

// `tokens` of a call from `token` on, against positions [from, to); the cache ends with the last token's position.
void CheckAttention(const Ops& ops, const Case& c) {
  const int64_t N = c.group + Between(0, 2), rows = c.tokens * c.group, filled = c.start + c.token + c.tokens;
  const float scale = 0.3f;
  // Of the last token, only the heads of the group are there.
  Floats q = Floats::Normal((c.token + c.tokens - 1) * N * c.H + c.group * c.H);
  Floats keys = Floats::Normal(filled * c.H), values = Floats::Normal(filled * c.H);
  Floats out(rows * c.H), peak(rows), mass(rows), scratch(AttentionScratch(rows, c.H));
  ops.attention({q.get(), N * c.H, keys.get(), values.get(), c.group, c.H, c.start, scale},
                {c.token, c.tokens, c.from, c.to}, {out.get(), peak.get(), mass.get()}, scratch.get());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = c.token + r / c.group, last = c.start + t + 1, end = c.to < last ? c.to : last;
    const float* query = q.get() + t * N * c.H + r % c.group * c.H;
    double top = -INFINITY, sum = 0, bound = 0;
    auto score = [&](int64_t s) {
      double dot = 0, size = 0;
      for (int64_t h = 0; h < c.H; ++h) {
        const double term = static_cast<double>(query[h]) * keys[s * c.H + h] * scale;
        dot += term;
        size += std::fabs(term);
      }
      bound = std::fmax(bound, size * (static_cast<double>(c.H) / 4 + 12) * kUnit);
      return dot;
    };
    for (int64_t s = c.from; s < end; ++s) top = std::fmax(top, score(s));
    if (c.from >= end) {
      if (peak[r] != -INFINITY || mass[r] != 0.0f) Fail("mass of a row that sees nothing", mass[r], 0);
      for (int64_t h = 0; h < c.H; ++h) Near("answer of a row that sees nothing", out[r * c.H + h], 0, 0);
      continue;
    }
    for (int64_t s = c.from; s < end; ++s) sum += std::exp(score(s) - top);
    const double relative = 4 * bound + (static_cast<double>(end - c.from) + 32) * kUnit;
    Near("attention's peak", peak[r], top, bound + kUnit);
    Near("attention's mass", mass[r], sum, sum * relative);
    for (int64_t h = 0; h < c.H; ++h) {
      double answer = 0, size = 0;
      for (int64_t s = c.from; s < end; ++s) {
        const double term = std::exp(score(s) - top) * values[s * c.H + h];
        answer += term;
        size += std::fabs(term);
      }
      Near("attention", out[r * c.H + h], answer, size * relative);
    }
  }
}

// exp(x) to 3 units in the last place and its rounding, through an attention of one number a head: of scores 0, x, x, ... the last
// but one (in whole vectors) or the second (in what is left) alone has a value, 1.
void CheckExp(const Ops& ops, float x, int64_t positions, int64_t at) {
  Floats keys(positions), values(positions), q(1), out(1), peak(1), mass(1), scratch(AttentionScratch(1, 1));
  for (int64_t s = 0; s < positions; ++s) keys[s] = s ? x : 0.0f, values[s] = s == at ? 1.0f : 0.0f;
  q[0] = 1.0f;
  ops.attention({q.get(), 1, keys.get(), values.get(), 1, 1, positions - 1, 1.0f}, {0, 1, 0, positions},
                {out.get(), peak.get(), mass.get()}, scratch.get());
  const double expected = x < -87.0f ? 0.0 : std::exp(static_cast<double>(x));
  const double ulp = std::ldexp(1.0, std::ilogb(std::fmax(expected, 1e-37)) - 23);
  Near("exp", out[0], expected, x < -87.0f ? 0.0 : 3.5 * ulp);
}

void CheckAllExp(const Ops& ops) {
  for (float x = 0.0f; x > -90.0f; x -= 0.0371f) {
    CheckExp(ops, x, 2, 1);
    CheckExp(ops, x, 17, 15);
  }
  for (float x : {-0.0f, -1e-45f, -1e-38f, -1e-7f, -0.34657359f, -0.3465736f, -86.99999f, -87.0f, -87.00001f, -1e4f,
                  -1e30f, -INFINITY})
    for (int64_t positions : {2, 17}) CheckExp(ops, x, positions, 1);
}

void CheckAll(const Ops& ops) {
  for (int64_t in : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 769, 1537})
    for (int64_t rows = 1; rows <= 13; ++rows) CheckMatmul(ops, rows, in, Between(1, in > 99 ? 9 : 34), rows % 3);
  CheckMatmul(ops, 130, 33, 17, 0);
  for (int i = 0; i < 300; ++i) {
    Case c;
    c.group = Between(1, 7);
    c.tokens = Between(1, 13);
    const int64_t dims[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 80, 100};
    c.H = dims[Between(0, 15)];
    c.start = Between(0, i % 4 ? 40 : 200);
    c.token = i % 3 ? 0 : Between(0, 5);
    const int64_t filled = c.start + c.token + c.tokens;
    // From the start, from somewhere, or behind what most of the tokens see; to the end, short of it, or past it.
    c.from = i % 2 ? 0 : Between(0, filled);
    c.to = c.from + Between(1, filled + 70);
    CheckAttention(ops, c);
  }
  CheckAllExp(ops);
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments != 2) return 2;
  const bool wide = std::strcmp(argument[1], "wide") == 0;
  const Ops* ops = wide ? &WideOps() : FindOps(argument[1]);
  if (ops == nullptr) {
    std::fprintf(stderr, "this CPU has no kernels for '%s'\n", argument[1]);
    return 2;
  }
  CheckAll(*ops);
}
