// precast.argmax: the index of the first largest number of each row.
#include <limits>
#include <string>

#include "ffi.h"
#include "ffi_util.h"
#include "ops.h"
#include "parallel.h"

namespace precast {
namespace {

ffi::Error ArgmaxHandler(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::ResultBufferR1<ffi::S32> y) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  if (y->dimensions()[0] != rows || width < 1 || width > std::numeric_limits<int32_t>::max())
    return Bad("argmax: expected rows of 1 to 2^31 - 1 numbers and a result for each, found x " +
               Shape(x.dimensions()) + " and result " + Shape(y->dimensions()));
  const Ops& ops = CurrentOps();
  Team(pool).For(rows, [&](int64_t row) {
    y->typed_data()[row] = static_cast<int32_t>(ops.argmax(x.typed_data() + row * width, width));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PrecastArgmaxV1, Guard<ArgmaxHandler>::Call,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::BufferR2<ffi::F32>>().Ret<ffi::BufferR1<ffi::S32>>());

}  // namespace precast
