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

}  // namespace hem_ext

// From HEM_TARGET_BEGIN on, a source file is compiled for the named instruction set. Two rules keep that
// code away from processors that cannot run it:
//   - everything in such a file lives in a namespace of its own, also the small headers it shares with the
//     others: of two inline functions or template instances with one name the linker keeps any;
//   - standard headers are included before. GCC compiles template instances at the end of the file with the
//     flags in force there, so there is no way back within a file.
//
// Other compilers than GCC build the baseline alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEM_X86_TARGETS 1
#else
#define HEM_X86_TARGETS 0
#endif

#define HEM_PRAGMA(text) _Pragma(#text)
#define HEM_TARGET_BEGIN(features) HEM_PRAGMA(GCC target(features))

// available_isas() asks for exactly these.
#define HEM_AVX2_FEATURES "avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"
#define HEM_AVX512_FEATURES \
  "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512"
