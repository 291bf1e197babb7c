// precast.argmax: the index of the first largest number of each row.
#include <algorithm>
#include <limits>
#include <string>

#include "ffi.h"
#include "ffi_util.h"
#include "ops.h"
#include "parallel.h"

namespace precast {
namespace {

// Rows with an index of `used` or above are padding: they are not read, and their results are 0.
ffi::Error Argmax(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, int64_t used, ffi::ResultBufferR1<ffi::S32> y) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  if (y->dimensions()[0] != rows || width < 1 || width > std::numeric_limits<int32_t>::max())
    return Bad("argmax: expected rows of 1 to 2^31 - 1 numbers and a result for each, found x " +
               Shape(x.dimensions()) + " and result " + Shape(y->dimensions()));
  if (used < 0 || used > rows)
    return Bad("argmax: expected 0 to " + std::to_string(rows) + " true rows, found " + std::to_string(used));
  const Ops& ops = CurrentOps();
  Team(pool).For(used, [&](int64_t row) {
    y->typed_data()[row] = static_cast<int32_t>(ops.argmax(x.typed_data() + row * width, width));
  });
  std::fill(y->typed_data() + used, y->typed_data() + rows, 0);
  return ffi::Error::Success();
}

ffi::Error ArgmaxHandlerV1(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::ResultBufferR1<ffi::S32> y) {
  return Argmax(pool, x, x.dimensions()[0], y);
}

ffi::Error ArgmaxHandler(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR0<ffi::S32> true_rows,
                         ffi::ResultBufferR1<ffi::S32> y) {
  return Argmax(pool, x, true_rows.typed_data()[0], y);
}

}  // namespace

// Artifacts of format 5 and earlier call version 1.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PrecastArgmaxV1, Guard<ArgmaxHandlerV1>::Call,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::BufferR2<ffi::F32>>().Ret<ffi::BufferR1<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastArgmaxV2, Guard<ArgmaxHandler>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>());

}  // namespace precast
