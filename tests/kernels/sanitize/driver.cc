// Calls one instruction set's kernels under sanitizers, on buffers without spare room, and compares the results with
// plain loops in double. Usage: driver avx2, or driver avx2 calls for whole calls alone. Exits with 1 and a line on
// stderr at the first wrong number.
#include "check.h"

namespace precast {
const Ops& WideOps();
}

namespace {

using namespace precast;

struct Case {
  int64_t tokens, group, H, P, start, token, from, to, window;
  float cap;
  CacheType type;
};

// Keys or values that a kernel stored from floats, each in a separate allocation.
struct Stored {
  Stored(const Ops& ops, CacheType type, int64_t rows, int64_t H)
      : size(type == CacheType::kFloat32    ? 4
             : type == CacheType::kBfloat16 ? 2
                                            : 1),
        bytes(new char[static_cast<size_t>(rows * H * size)]), scales(type == CacheType::kInt8 ? rows : 0) {
    Floats x = Floats::Normal(rows * H), room(H);
    ops.store_rows({.x = x.get(),
                    .x_token = H,
                    .tokens = rows,
                    .head_dim = H,
                    .type = type,
                    .rows = bytes.get(),
                    .scales = Scales()},
                   room.get());
    for (int64_t i = 0; i < rows * H; ++i) {
      const double error = size == 4 ? 0 : size == 2 ? std::fabs(x[i]) / 256 : scales[i / H] * 0.50001;
      Near("stored", At(i / H, i % H, H), x[i], error);
    }
  }
  float* Scales() const { return scales.size == 0 ? nullptr : scales.get(); }
  double At(int64_t row, int64_t h, int64_t H) {
    const char* at = bytes.get() + (row * H + h) * size;
    if (size == 1) return static_cast<double>(static_cast<signed char>(*at)) * scales[row];
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, at, static_cast<size_t>(size));  // little-endian
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
  int64_t size;
  std::unique_ptr<char[]> bytes;
  Floats scales;
};

double CapOf(double score, float cap) { return cap > 0 ? cap * std::tanh(score / cap) : score; }

// `tokens` of a call from `token` on, against positions [from, to); the cache ends with the last token's position, or,
// with a window, is a ring.
void CheckAttention(const Ops& ops, const Case& c) {
  const int64_t N = c.group + Between(0, 2), rows = c.tokens * c.group, filled = c.start + c.token + c.tokens;
  const float scale = 0.3f;
  // The last token has only the heads of the group.
  Floats q = Floats::Normal((c.token + c.tokens - 1) * N * c.H + c.group * c.H);
  Floats cos = Floats::Normal((c.token + c.tokens) * c.P), sin = Floats::Normal((c.token + c.tokens) * c.P);
  const int64_t places = c.window > 0 ? Between(c.window + c.tokens - 1, c.window + c.tokens + 40) : filled;
  Stored keys(ops, c.type, places, c.H), values(ops, c.type, places, c.H);
  Floats out(rows * c.H), peak(rows), mass(rows), scratch(AttentionScratch(rows, c.H));
  const AttentionHead head = {.q = q.get(),
                              .q_token = N * c.H,
                              .cos = cos.get(),
                              .sin = sin.get(),
                              .pairs = c.P,
                              .type = c.type,
                              .keys = keys.bytes.get(),
                              .values = values.bytes.get(),
                              .key_scales = keys.Scales(),
                              .value_scales = values.Scales(),
                              .group = c.group,
                              .head_dim = c.H,
                              .places = places,
                              .start = c.start,
                              .window = c.window,
                              .scale = scale,
                              .soft_cap = c.cap};
  ops.attention(head, {.token = c.token, .tokens = c.tokens, .from = c.from, .to = c.to},
                {.out = out.get(), .peak = peak.get(), .mass = mass.get()}, scratch.get());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = c.token + r / c.group, last = c.start + t + 1, end = c.to < last ? c.to : last;
    const int64_t from = c.window > 0 && last - c.window > c.from ? last - c.window : c.from;
    const float* query = q.get() + t * N * c.H + r % c.group * c.H;
    double top = -INFINITY, sum = 0, bound = 0;
    auto rotated = [&](int64_t h, bool size) -> double {
      if (h >= 2 * c.P) return size ? std::fabs(query[h]) : query[h];
      const int64_t i = h % c.P;
      const double a = static_cast<double>(query[h]) * cos[t * c.P + i];
      const double b = static_cast<double>(query[h < c.P ? h + c.P : i]) * sin[t * c.P + i];
      return size ? std::fabs(a) + std::fabs(b) : h < c.P ? a - b : a + b;
    };
    auto score = [&](int64_t s) {
      double dot = 0, size = 0;
      for (int64_t h = 0; h < c.H; ++h) {
        dot += rotated(h, false) * keys.At(s % places, h, c.H) * scale;
        size += rotated(h, true) * std::fabs(keys.At(s % places, h, c.H)) * scale;
      }
      bound = std::fmax(bound, size * (static_cast<double>(c.H) / 4 + 16) * kUnit);
      return CapOf(dot, c.cap);
    };
    if (from >= end) {
      if (peak[r] != -INFINITY || mass[r] != 0.0f) Fail("mass of a row that sees nothing", mass[r], 0);
      for (int64_t h = 0; h < c.H; ++h) Near("answer of a row that sees nothing", out[r * c.H + h], 0, 0);
      continue;
    }
    std::unique_ptr<double[]> weights(new double[static_cast<size_t>(end - from)]);
    for (int64_t s = from; s < end; ++s) top = std::fmax(top, weights[static_cast<size_t>(s - from)] = score(s));
    for (int64_t s = from; s < end; ++s) {
      double& weight = weights[static_cast<size_t>(s - from)];
      sum += weight = std::exp(weight - top);
    }
    const double relative = 4 * bound + (static_cast<double>(end - from) + 32) * kUnit;
    Near("attention's peak", peak[r], top, bound + kUnit);
    Near("attention's mass", mass[r], sum, sum * relative);
    for (int64_t h = 0; h < c.H; ++h) {
      double answer = 0, size = 0;
      for (int64_t s = from; s < end; ++s) {
        const double term = weights[static_cast<size_t>(s - from)] * values.At(s % places, h, c.H);
        answer += term;
        size += std::fabs(term);
      }
      Near("attention", out[r * c.H + h], answer, size * relative);
    }
  }
}

// Rows of tokens with a stride, rotated and written side by side.
void CheckStore(const Ops& ops, CacheType type, int64_t tokens, int64_t H, int64_t P) {
  const int64_t apart = H + Between(0, 9), size = type == CacheType::kFloat32    ? 4
                                                  : type == CacheType::kBfloat16 ? 2
                                                                                 : 1;
  Floats x = Floats::Normal((tokens - 1) * apart + H), cos = Floats::Normal(tokens * P),
         sin = Floats::Normal(tokens * P);
  Floats room(H), scales(tokens);
  std::unique_ptr<char[]> rows(new char[static_cast<size_t>(tokens * H * size)]);
  ops.store_rows({.x = x.get(),
                  .x_token = apart,
                  .cos = cos.get(),
                  .sin = sin.get(),
                  .pairs = P,
                  .tokens = tokens,
                  .head_dim = H,
                  .type = type,
                  .rows = rows.get(),
                  .scales = scales.get()},
                 room.get());
  if (type != CacheType::kFloat32) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < H; ++h) {
      const float* row = x.get() + t * apart;
      double a = row[h], b = 0;
      if (h < 2 * P) a *= cos[t * P + h % P], b = static_cast<double>(row[h < P ? h + P : h - P]) * sin[t * P + h % P];
      float found;
      std::memcpy(&found, rows.get() + (t * H + h) * 4, sizeof found);
      Near("rotated", found, h < P ? a - b : a + b, 3 * kUnit * (std::fabs(a) + std::fabs(b)));
    }
}

// Partials of several spans, some without a visible position; the tokens of the answer have a stride.
void CheckMerge(const Ops& ops, int64_t spans, int64_t tokens, int64_t group, int64_t H) {
  const int64_t rows = tokens * group, stride = rows * (H + 2), apart = (group + 1) * H;
  Floats partials = Floats::Normal(spans * stride), out((tokens - 1) * apart + group * H);
  float *peak = partials.get() + rows * H, *mass = peak + rows;
  for (int64_t s = 0; s < spans; ++s)
    for (int64_t r = 0; r < rows; ++r) {
      float& m = mass[s * stride + r];
      m = std::fabs(m) + 0.5f;
      if (spans == 1 || (s + r) % 3 > 0) continue;
      m = 0.0f, peak[s * stride + r] = -INFINITY;
      for (int64_t h = 0; h < H; ++h) partials[s * stride + r * H + h] = 0.0f;
    }
  // The merge changes the first span.
  Floats merged(partials.size);
  std::memcpy(merged.get(), partials.get(), static_cast<size_t>(partials.size) * sizeof(float));
  float* own = merged.get() + rows * H;
  ops.merge_spans({merged.get(), own, own + rows}, stride, spans, rows, group, H, out.get(), apart);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < H; ++h) {
      double sum = 0, size = 0, all = 0;
      for (int64_t s = 0; s < spans; ++s) {
        const double share = std::exp(static_cast<double>(peak[s * stride + r]));
        sum += share * partials[s * stride + r * H + h];
        size += std::fabs(share * partials[s * stride + r * H + h]);
        all += share * mass[s * stride + r];
      }
      Near("merged", out[r / group * apart + r % group * H + h], sum / all, size / all * 40 * kUnit);
    }
}

// exp(x) to 3 units in the last place plus rounding, through attention with a head dimension of 1. The scores are
// 0, x, x, ...; all values are 0 except one 1, which is the last but one (whole vectors) or the second (partial
// vectors).
void CheckExp(const Ops& ops, float x, int64_t positions, int64_t at) {
  Floats keys(positions), values(positions), q(1), out(1), peak(1), mass(1), scratch(AttentionScratch(1, 1));
  for (int64_t s = 0; s < positions; ++s) keys[s] = s ? x : 0.0f, values[s] = s == at ? 1.0f : 0.0f;
  q[0] = 1.0f;
  const AttentionHead head = {.q = q.get(),
                              .q_token = 1,
                              .cos = nullptr,
                              .sin = nullptr,
                              .pairs = 0,
                              .type = CacheType::kFloat32,
                              .keys = keys.get(),
                              .values = values.get(),
                              .key_scales = nullptr,
                              .value_scales = nullptr,
                              .group = 1,
                              .head_dim = 1,
                              .places = positions,
                              .start = positions - 1,
                              .window = 0,
                              .scale = 1.0f,
                              .soft_cap = 0.0f};
  ops.attention(head, {.token = 0, .tokens = 1, .from = 0, .to = positions},
                {.out = out.get(), .peak = peak.get(), .mass = mass.get()}, scratch.get());
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

void CheckAttentions(const Ops& ops) {
  const int64_t dims[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 80, 100};
  for (int i = 0; i < 600; ++i) {
    Case c;
    c.type = static_cast<CacheType>(i % 3);
    c.group = Between(1, 7);
    c.tokens = Between(1, i % 4 ? 5 : 13);
    c.H = dims[Between(0, 15)];
    c.P = Between(0, c.H / 2);
    c.start = Between(0, i % 4 ? 40 : i % 20 ? 200 : 600);
    c.token = i % 3 ? 0 : Between(0, 5);
    c.window = i % 5 ? 0 : Between(1, 90);
    c.cap = i % 7 ? 0.0f : 0.8f;
    const int64_t filled = c.start + c.token + c.tokens;
    // From the start, from anywhere, or after the positions that most tokens see; to the end, before it, or past it.
    c.from = i % 2 ? 0 : Between(0, filled);
    c.to = c.from + Between(1, filled + 70);
    CheckAttention(ops, c);
  }
  for (CacheType type : {CacheType::kFloat32, CacheType::kBfloat16, CacheType::kInt8})
    for (int64_t H : dims) CheckStore(ops, type, Between(1, 5), H, Between(0, H / 2));
  for (int64_t spans : {1, 2, 3, 9})
    for (int64_t H : dims) CheckMerge(ops, spans, Between(1, 4), Between(1, 5), H);
  CheckAllExp(ops);
}

// Argmax against a plain loop, with ties, NaN and infinities.
void CheckArgmax(const Ops& ops) {
  for (int i = 0; i < 2000; ++i) {
    const int64_t n = Between(1, i % 4 ? 80 : 3000);
    Floats x = Floats::Normal(n);
    for (int64_t k = 0; i % 3 == 0 && k < n; ++k) x[k] = static_cast<float>(Between(-2, 2));
    if (i % 5 == 0) x[Between(0, n - 1)] = INFINITY;
    if (i % 7 == 0) x[Between(0, n - 1)] = NAN;
    for (int64_t k = 0; i % 11 == 0 && k < n; ++k) x[k] = -INFINITY;
    int64_t expected = 0;
    for (int64_t k = 1; k < n && !std::isnan(x[expected]); ++k)
      if (std::isnan(x[k]) || x[k] > x[expected]) expected = k;
    Near("argmax", static_cast<double>(ops.argmax(x.get(), n)), static_cast<double>(expected), 0.0);
  }
}

}  // namespace

int main(int arguments, char** argument) {
  const bool calls = arguments == 3 && std::strcmp(argument[2], "calls") == 0;
  if (arguments != 2 && !calls) return 2;
  const bool wide = std::strcmp(argument[1], "wide") == 0;
  const Ops* ops = wide ? &WideOps() : FindOps(argument[1]);
  if (ops == nullptr) {
    std::fprintf(stderr, "this CPU has no kernels for '%s'\n", argument[1]);
    return 2;
  }
  if (!calls) CheckLinearOps(*ops);
  if (!calls) CheckAttentions(*ops);
  if (!calls) CheckArgmax(*ops);
  ForceOps(ops);
  for (int64_t threads : {0, 1, 4}) CheckCalls(threads);
}
