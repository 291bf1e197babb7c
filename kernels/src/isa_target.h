// Macros that permit further instruction sets in a part of a file: PRECAST_BEGIN_TARGET("avx2,fma") …
// PRECAST_END_TARGET. Other headers must be included before this part, so that their code runs on any CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "ops.h"

#define PRECAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PRECAST_BEGIN_TARGET(features) \
  PRECAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PRECAST_END_TARGET PRECAST_PRAGMA(clang attribute pop)
#else
#define PRECAST_BEGIN_TARGET(features) PRECAST_PRAGMA(GCC push_options) PRECAST_PRAGMA(GCC target(features))
#define PRECAST_END_TARGET PRECAST_PRAGMA(GCC pop_options)
#endif
