// The CPU kernels for processors with AVX2, FMA and F16C.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "../common/macros.h"
#include "hem_cpu_kernels.h"

#if HEM_X86_TARGETS
#include <immintrin.h>

#define HEM_LANES_AVX2
HEM_TARGET_BEGIN(HEM_AVX2_FEATURES)
namespace hem_ext::avx2 {
#include "../common/half.h"
#include "../common/aligned_buffer.h"
#include "../common/lanes.h"
#include "../common/lines.h"
#include "hem_math.h"
#include "hem_cpu_samples.inl"
#include "hem_cpu_errors.inl"
#include "hem_cpu_kernels.inl"
}  // namespace hem_ext::avx2
HEM_TARGET_END

#endif  // HEM_X86_TARGETS
