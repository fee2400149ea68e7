// What the CPU kernels take, and the table that holds them, one row per instruction set. No torch here.
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "hem_layout.h"

namespace hem_ext {

struct Targets {
  const void* data;  // [positions]
  TargetType type;
  int64_t ignore_index;
};

// Positions are cut into blocks of a size that depends on the shape alone, and every block writes its
// own partial sums: results do not depend on the number of threads.
struct Partial {
  double loss;         // sum of w_i * loss_i
  double weight;       // sum of w_i over the samples the reduction counts
  int64_t bad_target;  // first position whose target is neither a class nor ignore_index, or -1
};

struct ForwardArgs {
  Layout layout;
  const void* input;
  Targets targets;
  const void* margins;  // [C] of the arithmetic's type, or null
  double margin;        // where margins is null
  const void* weight;   // [C] of the arithmetic's type, or null
  bool count_all;       // weight sums: every sample that is not ignored, or those with an error only
  int64_t block;        // positions a block
  void* losses;         // [positions] of the arithmetic's type, or null
  int32_t* mask;        // rows [R, words], pixels [A, words, P]
  Partial* partials;    // [blocks]
};

struct BackwardArgs {
  Layout layout;
  Targets targets;
  const void* weight;     // [C] of the arithmetic's type, or null
  const void* grad_loss;  // [positions] or one, of the arithmetic's type
  bool grad_per_sample;
  const void* denominator;  // one, of the arithmetic's type; not used per sample
  const int32_t* mask;
  int64_t block;
  void* grad_input;  // laid out as `layout` says
  bool streamed;     // write past the caches: what is larger than these; pixels are aligned then
  bool by_line;      // and of rows not zeros alone
  ClassRange range;
};

// Each runs blocks [begin, end).
using ForwardKernel = void (*)(const ForwardArgs&, int64_t begin, int64_t end);
using BackwardKernel = void (*)(const BackwardArgs&, int64_t begin, int64_t end);

struct CpuKernels {
  ForwardKernel forward[kInputTypeCount];
  BackwardKernel backward[kInputTypeCount];
};

namespace baseline {
extern const CpuKernels kernels;
}
#if HEM_X86_TARGETS
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

// Blocks of `block` positions; in pixels a block never spans two images.
inline int64_t blocks_per_image(const Layout& layout, int64_t block) {
  return (layout.inner + block - 1) / block;
}
inline int64_t num_blocks(const Layout& layout, int64_t block) {
  return layout.outer * blocks_per_image(layout, block);
}

// The largest block the kernels take.
constexpr int64_t kMaxBlock = 128;

}  // namespace hem_ext
