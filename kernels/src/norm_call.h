// A checked call of RMSNorm or LayerNorm, which normalises each piece of a row separately.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace precast {

struct NormCall {
  int64_t rows, width, piece;       // width is a multiple of piece
  const float* x = nullptr;         // [rows, width]
  const float* weight = nullptr;    // [piece]
  const float* bias = nullptr;      // [piece] for LayerNorm, null for RMSNorm
  const float* residual = nullptr;  // [rows, width], or null
  float eps;
  float* y = nullptr;  // [rows, width]
};

void RunNorm(Team& team, const NormCall& call);

}  // namespace precast
