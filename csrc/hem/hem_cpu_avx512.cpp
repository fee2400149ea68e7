// The CPU kernels for processors with AVX-512 F, BW, DQ and VL.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "../common/macros.h"
#include "hem_cpu_kernels.h"

#if HEM_X86_TARGETS
#include <immintrin.h>

#define HEM_LANES_AVX512
HEM_TARGET_BEGIN(HEM_AVX512_FEATURES)
namespace hem_ext::avx512 {
#include "../common/half.h"
#include "../common/aligned_buffer.h"
#include "../common/lanes.h"
#include "../common/lines.h"
#include "hem_math.h"
#include "hem_cpu_samples.inl"
#include "hem_cpu_errors.inl"
#include "hem_cpu_kernels.inl"
}  // namespace hem_ext::avx512
HEM_TARGET_END

#endif  // HEM_X86_TARGETS
