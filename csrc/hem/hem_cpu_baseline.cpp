// The CPU kernels for any processor of this architecture.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "../common/macros.h"
#include "hem_cpu_kernels.h"

namespace hem_ext::baseline {
#include "../common/half.h"
#include "../common/aligned_buffer.h"
#include "../common/lanes.h"
#include "../common/lines.h"
#include "hem_math.h"
#include "hem_cpu_samples.inl"
#include "hem_cpu_errors.inl"
#include "hem_cpu_kernels.inl"
}  // namespace hem_ext::baseline
