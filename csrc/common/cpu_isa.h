// Instruction sets of the CPU kernels. One library holds every kernel once per instruction set and
// chooses when it is loaded, so the same build runs on every x86-64 (and, portably, elsewhere).
#pragma once

#include <string>
#include <vector>

namespace hem_ext {

enum class CpuIsa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kCpuIsaCount = 3;

// The name users see: "baseline", "avx2", "avx512".
const char* name(CpuIsa isa);

// The instruction sets this processor runs, slowest first.
std::vector<CpuIsa> available_isas();

// The one in use: the fastest available, or the one HEM_EXT_CPU_ISA names.
CpuIsa selected_isa();

// Replaces the choice. Throws std::invalid_argument when `isa_name` is unknown or not available here.
void select_isa(const std::string& isa_name);

// Whether whole lines are faster written past the caches than through them, where these do not hold what is
// written: on Intel's processors, by half of the time, but on AMD's zeros alone, as was measured on Zen 4.
bool writes_lines_faster();

}  // namespace hem_ext

// Between HEM_TARGET_BEGIN and HEM_TARGET_END a source file is compiled for the named instruction set. Two
// rules keep that code away from processors that cannot run it:
//   - everything in such a file lives in a namespace of its own, also the small headers it shares with the
//     others: of two inline functions or template instances with one name the linker keeps any;
//   - standard headers are included before, and nothing follows. GCC compiles template instances at the end
//   of
//     the file with the flags in force there, so there is no way back within a file.
#if defined(__x86_64__) && defined(__GNUC__)
#define HEM_X86_TARGETS 1
#else
#define HEM_X86_TARGETS 0
#endif

// available_isas() asks for exactly these.
#define HEM_AVX2_FEATURES "avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"
#if defined(__clang__)
#define HEM_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"
#else
#define HEM_AVX512_FEATURES \
  "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512"
#endif

#define HEM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HEM_TARGET_BEGIN(features) \
  HEM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HEM_TARGET_END HEM_PRAGMA(clang attribute pop)
#else
#define HEM_TARGET_BEGIN(features) HEM_PRAGMA(GCC target(features))
#define HEM_TARGET_END
#endif
