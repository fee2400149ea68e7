// What the CPU kernels of class_parallel_hem_loss take, and the table that holds them. No torch here.
#pragma once

#include "../hem/hem_cpu_kernels.h"

namespace hem_ext {

// Some of the classes of every sample: the logits that one process has. What it does not see of a sample
// comes from the others, between two looks at the errors.
struct ParallelForwardArgs {
  ForwardArgs hem;            // of these logits; targets and margins are of all classes
  int64_t classes;            // so many
  int64_t first;              // of them that is here
  const void* target_logits;  // [positions] of the arithmetic's type, like all below
  void* error_sum;   // [positions] the first look writes it, the second one reads that of all classes
  void* largest;     // [positions] the same of the largest error
  void* kept_sum;    // [positions] the second look writes it
  void* kept_count;  // [positions] the same
};

// Each runs blocks [begin, end).
using ParallelForwardKernel = void (*)(const ParallelForwardArgs&, int64_t begin, int64_t end);

struct ParallelCpuKernels {
  ParallelForwardKernel errors[kInputTypeCount];
  ParallelForwardKernel keep[kInputTypeCount];
};

namespace baseline {
extern const ParallelCpuKernels parallel_kernels;
}
#if HEM_X86_TARGETS
namespace avx2 {
extern const ParallelCpuKernels parallel_kernels;
}
namespace avx512 {
extern const ParallelCpuKernels parallel_kernels;
}
#endif

}  // namespace hem_ext
