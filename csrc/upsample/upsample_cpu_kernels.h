// What the CPU kernels of upsampled_hem_loss take, and the table that holds them. No torch here.
#pragma once

#include "../hem/hem_cpu_kernels.h"

namespace hem_ext {

// One dimension: output i is inputs index[i] and the one behind it, weighed by 1 - weight[i] and weight[i]
// (upsample_math.h).
struct Axis {
  int64_t in, out;
  const int32_t* index;  // [out], and its last number repeated up to a multiple of sixteen
  const void* weight;    // the same, of the arithmetic's type
  bool enlarges;         // no two neighbours in `index` differ by more than one

  bool keeps() const { return in == out; }  // no input but its own counts, and those beside it may be NaN
};

struct UpsampledForwardArgs {
  ForwardArgs hem;  // of the upsampled logits; `input` is the others, [N, C, rows.in, columns.in]
  Axis rows, columns;
  int64_t span;  // the most inputs that the columns of a block touch
};

struct UpsampledBackwardArgs {
  BackwardArgs hem;  // of the upsampled logits; `grad_input` is that of the others
  Axis rows, columns;
  int64_t band;            // rows of the input that are one piece of work
  bool classes_innermost;  // grad_input is channels_last
};

// Forward runs blocks of hem.block pixels of one row, backward bands.
struct UpsampledCpuKernels {
  void (*forward[kInputTypeCount])(const UpsampledForwardArgs&, int64_t begin, int64_t end);
  void (*backward[kInputTypeCount])(const UpsampledBackwardArgs&, int64_t begin, int64_t end);
};

namespace baseline {
extern const UpsampledCpuKernels upsampled_kernels;
}
#if HEM_X86_TARGETS
namespace avx2 {
extern const UpsampledCpuKernels upsampled_kernels;
}
namespace avx512 {
extern const UpsampledCpuKernels upsampled_kernels;
}
#endif

}  // namespace hem_ext
