// The operations of a linear call, one by one.
#include "check.h"

using namespace precast;

Weights::Weights(Format kind, int64_t o, int64_t i, bool without_minima)
    : format(kind), packed(kind == Format::kInt8 || kind == Format::kInt4), symmetric(without_minima), outs(o), in(i),
      pad((i + kGroup - 1) / kGroup * kGroup), panels((o + kPanel - 1) / kPanel),
      values(kind == Format::kFloat32    ? o * i * 4
             : kind == Format::kBfloat16 ? o * i * 2
             : kind == Format::kInt8     ? panels * kPanel * pad
                                         : panels * kPanel * pad / 2),
      scale(packed ? panels * kPanel * pad / kGroup : 0, 0), minimum(symmetric ? 0 : scale.size, 0) {
  std::normal_distribution<float> normal;
  for (int64_t k = 0; packed && k < values.size; ++k) values[k] = static_cast<unsigned char>(Between(0, 255));
  for (int64_t k = 0; !packed && k < o * i; ++k) {
    const float number = normal(generator);
    const size_t size = format == Format::kFloat32 ? 4 : 2;
    std::memcpy(values.get() + k * static_cast<int64_t>(size), reinterpret_cast<const char*>(&number) + 4 - size, size);
  }
  for (int64_t row = 0; packed && row < outs; ++row)
    for (int64_t k = 0; k < pad; k += kGroup) {
      // From zero through subnormal halves up to about 1; minima of either sign.
      scale[Shared(row, k)] = static_cast<uint16_t>(Between(0, 9) ? Between(0, 0x3bff) : Between(0, 0x7ff));
      if (!symmetric) minimum[Shared(row, k)] = static_cast<uint16_t>(Between(0, 0x3fff) | Between(0, 1) << 15);
    }
}

double Weights::Whole(int64_t o, int64_t k) const {
  const int64_t panel = o / kPanel, lane = o % kPanel;
  if (format == Format::kInt8)
    return static_cast<signed char>(values[((panel * (pad / 2) + k / 2) * kPanel + lane) * 2 + k % 2]);
  if (format == Format::kInt4) {
    const int byte = values[((panel * (pad / 8) + k / 8) * kPanel + lane) * 4 + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
  }
  const int64_t size = format == Format::kFloat32 ? 4 : 2;
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, values.get() + (o * in + k) * size, static_cast<size_t>(size));
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

double GateOf(Gate gate, double x) {
  // 1 + tanh(u) = 2 / (1 + exp(-2u)), which keeps its precision far below zero.
  const double u = 0.79788456080286535588 * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(gate == Gate::kSilu ? -x : -2 * u));
}

namespace {

// Rows of activations in buffers of their exact sizes. Only the kind of arrays that the format needs exists.
struct Rows {
  Rows(const Ops& ops, const Floats& x, int64_t rows, int64_t in, Format format)
      : pad((in + kGroup - 1) / kGroup * kGroup), int4(format == Format::kInt4), q(int4 ? 0 : rows * pad, -77),
        bytes(int4 ? rows * pad : 0, -77), scale(int4 ? 0 : rows), unit(int4 ? rows : 0),
        group_scale(int4 ? rows * pad / kGroup : 0), sum(group_scale.size), pair_sums(group_scale.size) {
    if (int4)
      view = {.bytes = bytes.get(),
              .unit = unit.get(),
              .group_scale = group_scale.get(),
              .sums = sum.get(),
              .pair_sums = pair_sums.get(),
              .in_pad = pad};
    else
      view = {.q = q.get(), .scale = scale.get(), .in_pad = pad};
    for (int64_t row = rows; row-- > 0;) {
      Floats own(in);  // a separate buffer, so that a read past the row is caught
      std::memcpy(own.get(), x.get() + row * in, static_cast<size_t>(in) * sizeof(float));
      ops.linear.quantize(own.get(), in, row, view);
    }
    for (int64_t i = 0; i < rows * pad; ++i) {
      const int64_t row = i / pad, k = i % pad;
      const double step = Scale(row, k);
      if (k >= in)
        Near("quantised padding", Whole(row, k), 0, 0);
      else if (Finite(row))
        Near("quantised", At(row, k), x[row * in + k], 0.505 * step + 1e-30);
    }
    for (int64_t g = 0; g < sum.size; ++g) {
      double total = 0;
      for (int64_t k = 0; k < kGroup; ++k) total += bytes[g * kGroup + k];
      total *= group_scale[g];
      if (Finite(g * kGroup / pad) && std::fabs(total) < 3e38)
        Near("sum of a group", sum[g], total, 2 * kUnit * std::fabs(total));
      CheckPairs(bytes.get() + g * kGroup, pair_sums[g]);
    }
  }
  static void CheckPairs(const int8_t* group, const PairSums& found) {
    int sums[3][2] = {};
    for (int k = 0; k < kGroup; ++k)
      for (int part : {k / 16, 2}) sums[part][k % 4 / 2] += group[k];
    for (int part = 0; part < 3; ++part)
      for (int pair = 0; pair < 2; ++pair) Near("sum of pairs", found.sums[part][pair], sums[part][pair], 0);
  }
  double Whole(int64_t row, int64_t k) const { return int4 ? bytes[row * pad + k] : q[row * pad + k]; }
  double Scale(int64_t row, int64_t k) const {
    return int4 ? double{group_scale[(row * pad + k) / kGroup]} * unit[row] : scale[row];
  }
  double At(int64_t row, int64_t k) const { return Whole(row, k) * Scale(row, k); }
  bool Finite(int64_t row) const { return pad == 0 || !std::isnan(Scale(row, 0)); }

  int64_t pad;
  bool int4;
  Array<int16_t> q;
  Array<int8_t> bytes;
  Floats scale, unit, group_scale, sum;
  Array<PairSums> pair_sums;
  QuantizedRows view;
};

// Rows [row, row + rows) times outputs [from, from + outs) of larger arrays; rows of results are `gap` floats apart.
void CheckProduct(const Ops& ops, Format format, int64_t rows, int64_t in, int64_t outs, int64_t gap) {
  const bool packed = format == Format::kInt8 || format == Format::kInt4;
  const int64_t row = Between(0, 2), from = packed ? kPanel * Between(0, 2) : Between(0, 5);
  const Weights w(format, from + outs, in, Between(0, 1) == 1);
  Floats x = Floats::Normal((row + rows) * in), y((rows - 1) * (outs + gap) + outs, -12345.0f);
  const Rows quantized(ops, x, row + rows, in, format);
  ops.linear.product(w.View(), {packed ? nullptr : x.get(), in, quantized.view}, row, rows, from, outs, y.get(),
                     outs + gap);
  for (int64_t i = 0; i < y.size; ++i) {
    const int64_t r = i / (outs + gap), o = i % (outs + gap);
    if (o >= outs) {
      Near("product wrote between its rows", y[i], -12345.0, 0);
      continue;
    }
    double sum = 0, size = 0;
    for (int64_t k = 0; k < in; ++k) {
      const double a = packed ? quantized.At(row + r, k) : x[(row + r) * in + k];
      sum += a * w.At(from + o, k);
      size +=
          std::fabs(a) * (std::fabs(w.Scale(from + o, k) * w.Whole(from + o, k)) + std::fabs(w.Minimum(from + o, k)));
    }
    Near("product", y[i], sum, (static_cast<double>(in) / 4 + 16) * kUnit * size + 1e-37);
  }
}

// Random rows times random records of a block format, from panel `skipped` on. Each row alone has the same results;
// tests in Python compare them with decoded weights.
void CheckBlocks(const Ops& ops, const BlockFormat& format, int64_t rows, int64_t in, int64_t outs, int64_t skipped) {
  const int64_t pad = (in + kGroup - 1) / kGroup * kGroup, groups = pad / kGroup;
  const int64_t panels = skipped + (outs + kPanel - 1) / kPanel, bytes = format.RecordBytes(groups);
  Array<unsigned char> records(panels * bytes);
  for (int64_t i = 0; i < records.size; ++i) {
    const bool is_coefficient = i % bytes < format.CoefficientBytes(groups), is_upper_half = i % bytes % 2 == 1;
    // Halves below 2, or exponents of powers below 2^32.
    const int64_t kept = format.scales == Scales::kExponent ? 0x9f : is_upper_half ? 0xbb : 0xff;
    records[i] = static_cast<unsigned char>(Between(0, 255) & (is_coefficient ? kept : 0xff));
  }
  const Weight w = {
      .format = Format::kBlocks, .blocks = &format, .values = records.get(), .outs = kPanel * skipped + outs};
  const bool is_narrow = !w.IsWide() && !w.TakesFloats();
  Array<int16_t> q(w.IsWide() ? rows * pad : 0);
  Array<int8_t> quantised(is_narrow ? rows * pad : 0);
  Floats x = Floats::Normal(rows * in), scale(rows), unit(rows), group_scale(rows * groups);
  Floats sums(rows * groups);
  Floats y(rows * outs), alone(outs);
  Array<PairSums> pair_sums(is_narrow ? rows * groups : 0);
  const QuantizedRows view = {.q = w.IsWide() ? q.get() : nullptr,
                              .scale = scale.get(),
                              .bytes = is_narrow ? quantised.get() : nullptr,
                              .unit = unit.get(),
                              .group_scale = group_scale.get(),
                              .sums = sums.get(),
                              .pair_sums = is_narrow ? pair_sums.get() : nullptr,
                              .in_pad = pad};
  for (int64_t row = 0; row < rows; ++row) ops.linear.quantize(x.get() + row * in, in, row, view);
  const LinearRows all = {w.TakesFloats() ? x.get() : nullptr, in, view};
  ops.linear.product(w, all, 0, rows, kPanel * skipped, outs, y.get(), outs);
  for (int64_t row = 0; row < rows; ++row) {
    ops.linear.product(w, all, row, 1, kPanel * skipped, outs, alone.get(), outs);
    for (int64_t o = 0; o < outs; ++o) {
      if (!std::isfinite(y[row * outs + o])) Fail("product with blocks", y[row * outs + o], 0);
      Near("row of a product with blocks", y[row * outs + o], alone[o], 0);
    }
  }
  if (in == 0) return;
  // A row whose numbers are not finite has no finite results, and overflows no integer.
  for (int64_t k = 0; k < in; ++k) x[k] = k % 3 == 0 ? NAN : INFINITY;
  ops.linear.quantize(x.get(), in, 0, view);
  ops.linear.product(w, all, 0, 1, kPanel * skipped, outs, alone.get(), outs);
  for (int64_t o = 0; o < outs; ++o)
    if (std::isfinite(alone[o])) Fail("product of a row that is not finite", alone[o], NAN);
}

// RMSNorm; with a bias, LayerNorm.
void CheckNormalize(const Ops& ops, int64_t n, bool biased) {
  Floats x = Floats::Normal(n), weight = Floats::Normal(n), bias = Floats::Normal(n), y(n);
  ops.linear.normalize(x.get(), weight.get(), biased ? bias.get() : nullptr, 1e-3f, n, y.get());
  double squares = 0, mean = 0, size = 0;
  for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(x[i]) / static_cast<double>(n), size += std::fabs(x[i]);
  if (!biased) mean = 0;
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(1e-3f));
  for (int64_t i = 0; i < n; ++i) {
    const double terms = std::fabs(x[i] - mean) + (biased ? std::fabs(x[i]) + size : 0);
    Near("normed", y[i], (x[i] - mean) * scale * weight[i] + (biased ? bias[i] : 0),
         (terms * scale * std::fabs(weight[i]) + (biased ? std::fabs(bias[i]) : 0)) *
             (static_cast<double>(n) / 4 + 16) * kUnit);
  }
}

void CheckAddAndGate(const Ops& ops, int64_t n) {
  Floats a = Floats::Normal(n), y = Floats::Normal(n), before(n);
  std::memcpy(before.get(), y.get(), static_cast<size_t>(n) * sizeof(float));
  ops.linear.add(a.get(), n, y.get());
  for (int64_t i = 0; i < n; ++i) Near("added", y[i], before[i] + a[i], 0);
  for (Gate gate : {Gate::kSilu, Gate::kGeluTanh})
    for (bool alone : {false, true})
      for (float scale : {1e-30f, 1.0f, 12.0f, 300.0f}) {
        for (int64_t i = 0; i < n; ++i) y[i] = before[i] * scale;
        ops.linear.gate(gate, alone ? nullptr : a.get(), n, y.get());
        for (int64_t i = 0; i < n; ++i) {
          const double x = before[i] * scale, expected = GateOf(gate, x) * (alone ? 1.0f : a[i]);
          // The exponent of GELU is a polynomial; its rounding error grows with its magnitude.
          const double exponent = gate == Gate::kSilu ? std::fabs(x) : 2 * std::fabs(x + 0.05 * x * x * x);
          Near("gated", y[i], expected, std::fabs(expected) * (exponent * 8 + 40) * kUnit + 1e-33);
        }
      }
}

// Rows with NaN, infinities or tiny numbers, in whole and in partial vectors.
void CheckOddRows(const Ops& ops) {
  for (int64_t in : {1, 5, 32, 37, 64})
    for (float value : {NAN, INFINITY, -INFINITY, 0.0f, 1e-35f, 1e-42f, 3e38f})
      for (int64_t at : {int64_t{0}, in / 2, in - 1}) {
        Floats x(2 * in, value == 3e38f ? -3e38f : 0.0f);
        x[in + at] = value;
        for (Format format : {Format::kInt8, Format::kInt4})
          if (Rows(ops, x, 2, in, format).Finite(1) != std::isfinite(value)) Fail("scale of an odd row", in, value);
      }
}

}  // namespace

void CheckLinearOps(const Ops& ops) {
  for (Format format : kFormats) {
    for (int64_t in : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 769, 2081})
      for (int64_t rows = 1; rows <= 9; ++rows)
        CheckProduct(ops, format, rows, in, in > 99 ? Between(1, 9) : Between(1, 50), rows % 3);
    for (int64_t rows = 10; rows <= 25; ++rows) CheckProduct(ops, format, rows, 70, 33, 2);
    CheckProduct(ops, format, 130, 33, 17, 0);
  }
  for (const BlockFormat& format : kBlockFormats)
    for (int64_t in : {1, 31, 33, 255, 257, 769, 2081, 4100})
      for (int64_t rows : {1, 2, 7, 9, 17}) CheckBlocks(ops, format, rows, in, Between(1, 40), Between(0, 2));
  for (int64_t n = 1; n <= 70; ++n) {
    for (bool biased : {false, true}) CheckNormalize(ops, n, biased);
    CheckAddAndGate(ops, n);
  }
  for (bool biased : {false, true}) CheckNormalize(ops, 1537, biased);
  CheckOddRows(ops);
}
