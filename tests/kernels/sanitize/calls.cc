// Whole calls of linear and of attention, split into tasks for a pool whose threads start late, against plain loops.
#include <algorithm>
#include <vector>

#include "attention_call.h"
#include "check.h"
#include "linear_call.h"

using namespace precast;

namespace {

struct Around {
  bool norm, residual, bias;
  Gate gate;
};

// The product of a normalised row with weights, and the error allowed: the kernels round activations to `unit`.
struct Expected {
  double value, error;
};

Expected Dot(const std::vector<double>& x, double unit, const Weights& w, int64_t o, const Floats* bias) {
  double sum = 0, size = 0, weights = 0;
  for (int64_t k = 0; k < w.in; ++k) {
    const double a = x[static_cast<size_t>(k)];
    sum += a * w.At(o, k);
    weights += std::fabs(w.Scale(o, k) * w.Whole(o, k)) + std::fabs(w.Minimum(o, k));
    size += std::fabs(a) * (std::fabs(w.Scale(o, k) * w.Whole(o, k)) + std::fabs(w.Minimum(o, k)));
  }
  if (bias != nullptr) sum += (*bias)[o], size += std::fabs((*bias)[o]);
  return {sum, (static_cast<double>(w.in) / 2 + 40) * kUnit * size + (w.packed ? unit * weights * 0.51 : 0)};
}

// A call with a given team and arena, which the layers of a decoder share.
void CheckLinear(Team& team, Arena& arena, int64_t rows, int64_t in, const std::vector<int64_t>& outs,
                 const std::vector<Format>& formats, const Around& around) {
  Floats x = Floats::Normal(rows * in), norm = Floats::Normal(in), residual = Floats::Normal(rows * outs[0]);
  std::vector<Weights> weights;
  std::vector<Floats> biases, results;
  LinearCall call = {.rows = rows,
                     .in = in,
                     .x = x.get(),
                     .norm = around.norm ? norm.get() : nullptr,
                     .eps = 1e-3f,
                     .residual = around.residual ? residual.get() : nullptr,
                     .gate = around.gate};
  for (size_t i = 0; i < outs.size(); ++i) {
    weights.emplace_back(formats[i], outs[i], in);
    biases.push_back(Floats::Normal(outs[i]));
    results.emplace_back(around.gate == Gate::kNone || i == 0 ? rows * outs[i] : 0, -12345.0f);
  }
  for (size_t i = 0; i < outs.size(); ++i)
    call.parts.push_back(
        {.weight = weights[i].View(), .bias = around.bias ? biases[i].get() : nullptr, .y = results[i].get()});
  RunLinear(team, arena, call);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> row(x.get() + r * in, x.get() + (r + 1) * in);
    double squares = 0, top = 0;
    for (const double v : row) squares += v * v;
    for (int64_t k = 0; around.norm && k < in; ++k)
      row[static_cast<size_t>(k)] *=
          norm[k] / std::sqrt(squares / static_cast<double>(in) + static_cast<double>(1e-3f));
    for (const double v : row) top = std::max(top, std::fabs(v));
    // The unit to which activations are rounded, at most.
    const auto unit = [&](const Weights& w) { return top / (w.format == Format::kInt4 ? 127 : 32512); };
    for (size_t i = 0; i < call.results(); ++i)
      for (int64_t o = 0; o < outs[i]; ++o) {
        Expected e = Dot(row, unit(weights[i]), weights[i], o, around.bias ? &biases[i] : nullptr);
        if (around.gate != Gate::kNone) {
          const Expected up = outs.size() == 1
                                  ? Expected{1, 0}
                                  : Dot(row, unit(weights[1]), weights[1], o, around.bias ? &biases[1] : nullptr);
          const double gated = GateOf(around.gate, e.value);
          // Neither gate is steeper than 1.2 anywhere.
          e = {gated * up.value, 1.2 * e.error * (std::fabs(up.value) + up.error) + std::fabs(gated) * up.error +
                                     300 * kUnit * std::fabs(gated * up.value)};
        }
        if (around.residual)
          e.value += residual[r * outs[0] + o], e.error += kUnit * 2 * std::fabs(residual[r * outs[0] + o]);
        Near("linear call", results[i][r * outs[i] + o], e.value, e.error + kUnit * 4 * std::fabs(e.value) + 1e-30);
      }
  }
}

void CheckLinearCalls(xla::ffi::ThreadPool& pool) {
  for (Format format : kFormats) {
    Team team(pool);
    Arena arena;
    const std::vector<Format> three(3, format);
    for (int64_t rows : {0, 1, 3, 4, 5, 9, 26})
      CheckLinear(team, arena, rows, Between(1, 100), {Between(1, 40), Between(1, 90), 17}, three,
                  {rows % 2 == 0, false, rows % 3 == 0, Gate::kNone});
    // Several tasks of panels each; several chunks of rows.
    CheckLinear(team, arena, 1, 801, {333}, three, {true, true, true, Gate::kNone});
    CheckLinear(team, arena, 67, 2500, {35}, three, {false, true, false, Gate::kNone});
    for (int64_t rows : {1, 4, 6, 80})
      CheckLinear(team, arena, rows, 65, {70, 70}, three,
                  {rows > 1, rows % 4 == 0, rows != 6, rows % 2 ? Gate::kSilu : Gate::kGeluTanh});
    for (int64_t rows : {1, 70})
      CheckLinear(team, arena, rows, 65, {170}, three,
                  {rows > 1, rows > 1, true, rows > 1 ? Gate::kSilu : Gate::kGeluTanh});
  }
  Team team(pool);
  Arena arena;
  for (int64_t rows : {1, 4, 30})
    CheckLinear(team, arena, rows, 50, {33, 20, 7, 48}, {kFormats[0], kFormats[3], kFormats[1], kFormats[2]},
                {true, false, true, Gate::kNone});
  CheckLinear(team, arena, 3, 50, {33, 33}, {Format::kFloat32, Format::kInt4}, {true, true, false, Gate::kSilu});
  // Tasks of float weights begin at panels of packed weights.
  for (int64_t rows : {2, 9})
    CheckLinear(team, arena, rows, 2048, {150, 150}, {Format::kFloat32, Format::kInt8},
                {true, false, false, Gate::kSilu});
}

// A cache of keys or values with numbers in every row.
struct Cache {
  Cache(CacheType kind, int64_t rows, int64_t head_dim)
      : type(kind), H(head_dim), size(kind == CacheType::kFloat32    ? 4
                                      : kind == CacheType::kBfloat16 ? 2
                                                                     : 1),
        bytes(rows * H * size), scales(kind == CacheType::kInt8 ? rows : 0) {
    Floats x = Floats::Normal(rows * H), room(H);
    CurrentOps().store_rows({.x = x.get(),
                             .x_token = H,
                             .tokens = rows,
                             .head_dim = H,
                             .type = type,
                             .rows = bytes.get(),
                             .scales = Scales()},
                            room.get());
  }
  float* Scales() const { return scales.size == 0 ? nullptr : scales.get(); }
  CacheRows View() const { return {.type = type, .rows = bytes.get(), .scales = Scales()}; }
  double At(int64_t row, int64_t h) const {
    const char* at = bytes.get() + (row * H + h) * size;
    if (size == 1) return static_cast<double>(static_cast<signed char>(*at)) * scales[row];
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, at, static_cast<size_t>(size));
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
  CacheType type;
  int64_t H, size;
  Array<char> bytes;
  Floats scales;
};

struct Call {
  AttentionShape d;
  CacheType type;
  std::vector<int32_t> slots, starts, lengths;
  int64_t window;
};

// Number h of head `head` of a token, with its rotary pair rotated.
double Rotated(const Floats& x, const Floats& cos, const Floats& sin, int64_t token, int64_t heads, int64_t head,
               int64_t h, const AttentionShape& d) {
  const float* row = x.get() + (token * heads + head) * d.H;
  if (h >= 2 * d.P) return row[h];
  const int64_t angle = token * d.P + h % d.P;
  const double c = cos[angle], s = sin[angle];
  return h < d.P ? row[h] * c - row[h + d.P] * s : row[h] * c + row[h - d.P] * s;
}

void CheckAttention(Team& team, const Call& c) {
  const AttentionShape& d = c.d;
  const int64_t tokens = d.R * d.T, rows = d.L * d.B * d.K * d.S, layer = d.L - 1;
  Floats q = Floats::Normal(tokens * d.N * d.H), k = Floats::Normal(tokens * d.K * d.H),
         v = Floats::Normal(tokens * d.K * d.H), cos = Floats::Normal(tokens * d.P), sin = Floats::Normal(tokens * d.P),
         out(tokens * d.N * d.H, NAN);
  const Cache keys(c.type, rows, d.H), values(c.type, rows, d.H);
  std::vector<double> before;
  for (int64_t row = 0; row < rows; ++row) before.push_back(keys.At(row, 0));
  std::vector<char> written(static_cast<size_t>(rows), 0);
  const AttentionCall call = {.d = d,
                              .q = q.get(),
                              .k = k.get(),
                              .v = v.get(),
                              .cos = cos.get(),
                              .sin = sin.get(),
                              .keys = keys.View(),
                              .values = values.View(),
                              .layer = layer,
                              .slots = c.slots.data(),
                              .starts = c.starts.data(),
                              .lengths = c.lengths.data(),
                              .out = out.get(),
                              .scale = 0.3f,
                              .window = c.window};
  if (const std::string wrong = CheckAttention(call); !wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    std::exit(1);
  }
  RunAttention(team, call);
  const double stored = c.type == CacheType::kFloat32 ? 4 * kUnit : c.type == CacheType::kBfloat16 ? 1.0 / 250 : 0;
  for (int64_t r = 0; r < d.R; ++r)
    for (int64_t t = 0; t < d.T; ++t) {
      const auto i = static_cast<size_t>(r);
      const int64_t token = r * d.T + t, last = c.starts[i] + t;
      for (int64_t n = 0; n < d.N; ++n) {
        const float* answer = out.get() + (token * d.N + n) * d.H;
        if (t >= c.lengths[i]) {
          for (int64_t h = 0; h < d.H; ++h) Near("padding's answer", answer[h], 0, 0);
          continue;
        }
        const int64_t head = n / (d.N / d.K), row = call.CacheRow(c.slots[i], head), place = row + last % d.S;
        written[static_cast<size_t>(place)] = 1;
        for (int64_t h = 0; h < d.H; ++h) {
          const double key = Rotated(k, cos, sin, token, d.K, head, h, d), value = v[(token * d.K + head) * d.H + h];
          const double step = c.type == CacheType::kInt8 ? 0.5001 : 0;
          Near("appended key", keys.At(place, h), key,
               stored * 8 + stored * std::fabs(key) + (step > 0 ? step * keys.scales[place] : 0));
          Near("appended value", values.At(place, h), value,
               stored * std::fabs(value) + (step > 0 ? step * values.scales[place] : 0));
        }
        const int64_t from = c.window > 0 ? std::max<int64_t>(0, last + 1 - c.window) : 0;
        std::vector<double> scores;
        double top = -INFINITY, mass = 0;
        for (int64_t s = from; s <= last; ++s) {
          double score = 0;
          for (int64_t h = 0; h < d.H; ++h)
            score += Rotated(q, cos, sin, token, d.N, n, h, d) * keys.At(row + s % d.S, h) * 0.3;
          top = std::max(top, score);
          scores.push_back(score);
        }
        for (double& score : scores) mass += score = std::exp(score - top);
        for (int64_t h = 0; h < d.H; ++h) {
          double sum = 0, size = 0;
          for (int64_t s = from; s <= last; ++s) {
            sum += scores[static_cast<size_t>(s - from)] * values.At(row + s % d.S, h);
            size += scores[static_cast<size_t>(s - from)] * std::fabs(values.At(row + s % d.S, h));
          }
          Near("attention call", answer[h], sum / mass, 2e-5 * size / mass + 1e-30);
        }
      }
    }
  for (int64_t row = 0; row < rows; ++row)
    if (!written[static_cast<size_t>(row)])
      Near("a row that no token wrote", keys.At(row, 0), before[static_cast<size_t>(row)], 0);
}

void CheckAttentionCalls(xla::ffi::ThreadPool& pool) {
  for (CacheType type : {CacheType::kFloat32, CacheType::kBfloat16, CacheType::kInt8}) {
    Team team(pool);
    // R, T, N, K, H, P, L, B, S: too little to split, ragged, blocks of tokens, and spans of positions.
    CheckAttention(team, {{1, 1, 2, 1, 5, 2, 1, 1, 1}, type, {0}, {0}, {1}, 0});
    CheckAttention(team, {{3, 4, 6, 2, 12, 6, 2, 4, 30}, type, {2, 0, 3}, {5, 26, 0}, {4, 4, 0}, 0});
    CheckAttention(team, {{1, 70, 6, 3, 33, 16, 2, 2, 90}, type, {1}, {20}, {70}, 0});
    CheckAttention(team, {{2, 1, 8, 2, 40, 20, 1, 2, 1000}, type, {1, 0}, {999, 300}, {1, 1}, 0});
    CheckAttention(team, {{2, 3, 8, 2, 40, 0, 1, 2, 700}, type, {1, 0}, {650, 10}, {3, 2}, 300});
    CheckAttention(team, {{1, 2, 4, 4, 3, 1, 1, 1, 9}, type, {0}, {0}, {0}, 0});
    // Rings: the shortest possible, a chunk across the end, blocks of tokens, and spans of positions.
    CheckAttention(team, {{1, 1, 2, 1, 5, 2, 1, 1, 1}, type, {0}, {9}, {1}, 1});
    CheckAttention(team, {{3, 4, 6, 2, 12, 6, 2, 4, 30}, type, {2, 0, 3}, {58, 1000, 0}, {4, 4, 0}, 27});
    CheckAttention(team, {{1, 70, 6, 3, 33, 16, 2, 2, 90}, type, {1}, {200}, {70}, 21});
    CheckAttention(team, {{2, 3, 8, 2, 40, 0, 1, 2, 400}, type, {1, 0}, {798, 10}, {3, 2}, 300});
    CheckAttention(team, {{1, 2, 12, 1, 8, 4, 1, 1, 301}, type, {0}, {600}, {2}, 300});
  }
}

}  // namespace

void CheckCalls(int64_t threads) {
  xla::ffi::ThreadPool pool(threads);
  CheckLinearCalls(pool);
  CheckAttentionCalls(pool);
  CheckNormsAndExperts(pool);
}
