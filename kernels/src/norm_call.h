// A normalisation with everything checked: of pieces of rows, each by itself.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace precast {

struct NormCall {
  int64_t rows, width, piece;  // width is a multiple of piece
  const float* x;              // [rows, width]
  const float* weight;         // [piece]
  const float* bias;           // [piece]: then the mean is subtracted first; or null
  const float* residual;       // [rows, width], or null
  float eps;
  float* y;                    // [rows, width]
};

void RunNorm(Team& team, const NormCall& call);

}  // namespace precast
