// Norms and mixtures of experts, split into tasks for a pool whose threads start late, against plain loops.
#include <algorithm>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "check.h"
#include "experts_call.h"
#include "norm_call.h"

using namespace precast;

namespace {

// The expected result of one piece, without residual.
std::vector<double> Normed(const float* x, int64_t n, const Floats& weight, const Floats* bias, double eps) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n && bias != nullptr; ++i) mean += x[i] / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  std::vector<double> y;
  for (int64_t i = 0; i < n; ++i)
    y.push_back((x[i] - mean) / std::sqrt(squares / static_cast<double>(n) + eps) * weight[i] +
                (bias == nullptr ? 0 : (*bias)[i]));
  return y;
}

void CheckNorm(Team& team, int64_t rows, int64_t pieces, int64_t n, bool biased, bool added) {
  const int64_t width = pieces * n;
  Floats x = Floats::Normal(rows * width), residual = Floats::Normal(rows * width), y(rows * width, NAN);
  Floats weight = Floats::Normal(n), bias = Floats::Normal(n);
  RunNorm(team, {.rows = rows,
                 .width = width,
                 .piece = n,
                 .x = x.get(),
                 .weight = weight.get(),
                 .bias = biased ? bias.get() : nullptr,
                 .residual = added ? residual.get() : nullptr,
                 .eps = 0.25f,
                 .y = y.get()});
  for (int64_t at = 0; at < rows * width; at += n) {
    const std::vector<double> expected = Normed(x.get() + at, n, weight, biased ? &bias : nullptr, 0.25);
    for (int64_t i = 0; i < n; ++i)
      Near("norm call", y[at + i], expected[static_cast<size_t>(i)] + (added ? residual[at + i] : 0), 2e-4);
  }
}

// The weights of all experts, one after another. Weights that the call must not read are poisoned.
struct ExpertStack {
  ExpertStack(Format format, int64_t count, int64_t outs, int64_t in)
      : all(Make(format, count, outs, in)), values(count * all[0].values.size), scale(count * all[0].scale.size),
        minimum(count * all[0].minimum.size) {
    for (int64_t i = 0; i < count; ++i) {
      Copy(all[static_cast<size_t>(i)].values, i, values);
      Copy(all[static_cast<size_t>(i)].scale, i, scale);
      Copy(all[static_cast<size_t>(i)].minimum, i, minimum);
    }
  }
  WeightStack View() const {
    const Weights& one = all[0];
    WeightStack stack = {.format = one.format, .outs = one.outs};
    stack.values = {.base = reinterpret_cast<const char*>(values.get()), .stride = one.values.size};
    if (one.packed) stack.scale = {.base = scale.get(), .stride = one.scale.size};
    if (one.format == Format::kInt4) stack.minimum = {.base = minimum.get(), .stride = one.minimum.size};
    return stack;
  }
  void Allow(int64_t i, bool readable) const {
    Allow(values, i, readable), Allow(scale, i, readable), Allow(minimum, i, readable);
  }

  std::vector<Weights> all;
  Array<unsigned char> values;
  Array<uint16_t> scale, minimum;

 private:
  static std::vector<Weights> Make(Format format, int64_t count, int64_t outs, int64_t in) {
    std::vector<Weights> all;
    for (int64_t i = 0; i < count; ++i) all.emplace_back(format, outs, in);
    return all;
  }
  template <typename T>
  static void Copy(const Array<T>& from, int64_t i, Array<T>& to) {
    std::copy(from.get(), from.get() + from.size, to.get() + i * from.size);
  }
  template <typename T>
  void Allow(const Array<T>& of, int64_t i, bool readable) const {
#if defined(__SANITIZE_ADDRESS__)
    const auto size = static_cast<size_t>(of.size) / all.size();
    const T* at = of.get() + size * static_cast<size_t>(i);
    readable ? __asan_unpoison_memory_region(at, size * sizeof(T)) : __asan_poison_memory_region(at, size * sizeof(T));
#else
    static_cast<void>(of), static_cast<void>(i), static_cast<void>(readable);
#endif
  }
};

struct Mixture {
  int64_t rows, width, ff, experts, chosen;
  bool norm, residual, renormalised;
  Gate gate;
};

// The share of each expert in a row, zero for experts that the row did not choose.
std::vector<double> SharesOf(const float* scores, const Mixture& m) {
  std::vector<double> shares;
  double total = 0, kept = 0;
  for (int64_t e = 0; e < m.experts; ++e) total += std::exp(static_cast<double>(scores[e]));
  for (int64_t e = 0; e < m.experts; ++e) {
    int64_t better = 0;
    for (int64_t o = 0; o < m.experts; ++o) better += scores[o] > scores[e] || (scores[o] == scores[e] && o < e);
    shares.push_back(better < m.chosen ? std::exp(static_cast<double>(scores[e])) / total : 0);
    kept += shares.back();
  }
  for (double& share : shares) share /= m.renormalised ? kept : 1;
  return shares;
}

// A product, and the sum of the magnitudes of its terms, to which the rounding error of x is proportional.
struct Product {
  double value, size;
};

Product Dot(const Weights& w, int64_t o, const std::vector<double>& x) {
  Product p = {0, 0};
  for (int64_t k = 0; k < w.in; ++k) {
    const double term = w.At(o, k) * x[static_cast<size_t>(k)];
    p.value += term, p.size += std::fabs(term);
  }
  return p;
}

void CheckExperts(Team& team, Arena& linear, Arena& own, Format format, const Mixture& m) {
  constexpr int64_t kLayers = 2, kLayer = 1;
  const int64_t count = kLayers * m.experts, D = m.width;
  const ExpertStack gates(format, count, m.ff, D), ups(format, count, m.ff, D), downs(format, count, D, m.ff);
  Floats x = Floats::Normal(m.rows * D), norm = Floats::Normal(D), residual = Floats::Normal(m.rows * D);
  Floats scores = Floats::Normal(m.rows * m.experts), y(m.rows * D, NAN);
  // Equal scores: the first experts win.
  for (int64_t e = 0; e < m.experts && m.rows > 2; ++e) scores[2 * m.experts + e] = 0.5f;
  std::vector<std::vector<double>> shares;
  for (int64_t r = 0; r < m.rows; ++r) shares.push_back(SharesOf(scores.get() + r * m.experts, m));
  const auto allow = [&](bool all) {
    for (int64_t i = 0; i < count; ++i) {
      const auto chosen = [&](const auto& row) {
        return i / m.experts == kLayer && row[static_cast<size_t>(i % m.experts)] > 0;
      };
      const bool readable = all || std::any_of(shares.begin(), shares.end(), chosen);
      gates.Allow(i, readable), ups.Allow(i, readable), downs.Allow(i, readable);
    }
  };
  allow(false);
  RunExperts(team, linear, own,
             {.rows = m.rows,
              .width = D,
              .ff = m.ff,
              .experts = m.experts,
              .chosen = m.chosen,
              .first = kLayer * m.experts,
              .x = x.get(),
              .scores = scores.get(),
              .norm = m.norm ? norm.get() : nullptr,
              .residual = m.residual ? residual.get() : nullptr,
              .eps = 0.25f,
              .renormalised = m.renormalised,
              .gate = m.gate,
              .gates = gates.View(),
              .ups = ups.View(),
              .downs = downs.View(),
              .y = y.get()});
  allow(true);
  const double lost = format == Format::kInt4 ? 0.1 : format == Format::kInt8 ? 4e-3 : 2e-4;
  for (int64_t r = 0; r < m.rows; ++r) {
    std::vector<double> row(x.get() + r * D, x.get() + (r + 1) * D), sums(row.size(), 0), sizes(row.size(), 0);
    if (m.norm) row = Normed(x.get() + r * D, D, norm, nullptr, 0.25);
    for (int64_t e = 0; e < m.experts; ++e) {
      const double share = shares[static_cast<size_t>(r)][static_cast<size_t>(e)];
      if (share == 0) continue;
      const auto at = static_cast<size_t>(kLayer * m.experts + e);
      std::vector<double> gated, size;
      for (int64_t f = 0; f < m.ff; ++f) {
        const Product gate = Dot(gates.all[at], f, row), up = Dot(ups.all[at], f, row);
        const double opened = GateOf(m.gate, gate.value);
        gated.push_back(opened * up.value);
        // The error of each factor is multiplied by the other factor. No gate is steeper than 1.2.
        size.push_back(std::fabs(opened) * up.size + 1.2 * gate.size * std::fabs(up.value));
      }
      const double most = *std::max_element(size.begin(), size.end());
      for (int64_t d = 0; d < D; ++d) {
        sums[static_cast<size_t>(d)] += share * Dot(downs.all[at], d, gated).value;
        for (int64_t f = 0; f < m.ff; ++f)
          sizes[static_cast<size_t>(d)] += share * std::fabs(downs.all[at].At(d, f)) * most;
      }
    }
    for (int64_t d = 0; d < D; ++d)
      Near("experts call", y[r * D + d], sums[static_cast<size_t>(d)] + (m.residual ? residual[r * D + d] : 0),
           lost * sizes[static_cast<size_t>(d)] + 1e-5);
  }
}

// Scores that are NaN or infinite must not choose an expert that does not exist.
void CheckOddScores(Team& team, Arena& linear, Arena& own) {
  const ExpertStack gates(Format::kFloat32, 3, 5, 4), ups(Format::kFloat32, 3, 5, 4), downs(Format::kFloat32, 3, 4, 5);
  for (float odd : {NAN, INFINITY, -INFINITY})
    for (int64_t chosen : {1, 2, 3})
      for (int64_t at : {0, 2}) {
        Floats x = Floats::Normal(8), scores(6, 0.0f), y(8);
        scores[3 + at] = odd;
        RunExperts(team, linear, own,
                   {.rows = 2,
                    .width = 4,
                    .ff = 5,
                    .experts = 3,
                    .chosen = chosen,
                    .first = 0,
                    .x = x.get(),
                    .scores = scores.get(),
                    .norm = nullptr,
                    .residual = nullptr,
                    .eps = 0.0f,
                    .renormalised = true,
                    .gate = Gate::kSilu,
                    .gates = gates.View(),
                    .ups = ups.View(),
                    .downs = downs.View(),
                    .y = y.get()});
        for (int64_t d = 0; d < 4; ++d)
          if (!std::isfinite(y[d]) || std::isfinite(y[4 + d]) != (odd == -INFINITY)) Fail("odd scores", y[4 + d], odd);
      }
}

}  // namespace

void CheckNormsAndExperts(xla::ffi::ThreadPool& pool) {
  Team team(pool);
  for (bool biased : {false, true})
    for (bool added : {false, true}) {
      for (int64_t rows : {0, 1, 3}) CheckNorm(team, rows, rows + 1, Between(1, 90), biased, added);
      CheckNorm(team, 70, 6, 33, biased, added);
      CheckNorm(team, 7, 1, 5000, biased, added);
    }
  Arena linear, own;
  for (Format format : kFormats) {
    for (int64_t rows : {0, 1, 3, 9})
      CheckExperts(team, linear, own, format, {rows, 34, 18, 6, 2, true, rows != 3, rows != 9, Gate::kSilu});
    CheckExperts(team, linear, own, format, {40, 66, 20, 5, 1, false, true, false, Gate::kGeluTanh});
    CheckExperts(team, linear, own, format, {5, 18, 40, 3, 3, true, false, true, Gate::kSilu});
  }
  // Rows split among threads, and experts that no row chooses.
  CheckExperts(team, linear, own, Format::kFloat32, {140, 66, 6, 30, 3, true, true, true, Gate::kSilu});
  CheckOddScores(team, linear, own);
}
