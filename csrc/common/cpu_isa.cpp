#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if HEM_X86_TARGETS
#include <cpuid.h>
#endif

namespace hem_ext {
namespace {

constexpr const char* kNames[kCpuIsaCount] = {"baseline", "avx2", "avx512"};

CpuIsa find_isa(const std::string& isa_name) {
  std::string available;
  for (CpuIsa isa : available_isas()) {
    if (isa_name == name(isa)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("HEM_EXT_CPU_ISA='" + isa_name +
                              "' is not an instruction set of this processor; available: " + available);
}

CpuIsa initial_isa() {
  const char* wanted = std::getenv("HEM_EXT_CPU_ISA");
  return wanted == nullptr || *wanted == '\0' ? available_isas().back() : find_isa(wanted);
}

#if HEM_X86_TARGETS
// What Clang's __builtin_cpu_supports does not know by name.
bool has_f16c_and_lzcnt() {
  unsigned int a, b, c = 0, d, extended = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0 &&
         __get_cpuid(0x80000001u, &a, &b, &extended, &d) != 0 && (extended & (1u << 5)) != 0;
}
#endif

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* name(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<CpuIsa> available_isas() {
  std::vector<CpuIsa> isas{CpuIsa::kBaseline};
#if HEM_X86_TARGETS
  __builtin_cpu_init();
#define HEM_HAS(feature) (__builtin_cpu_supports(feature) != 0)
  const bool avx2 = HEM_HAS("avx2") && HEM_HAS("fma") && HEM_HAS("bmi") && HEM_HAS("bmi2") &&
                    HEM_HAS("popcnt") && has_f16c_and_lzcnt();
  const bool avx512 =
      avx2 && HEM_HAS("avx512f") && HEM_HAS("avx512bw") && HEM_HAS("avx512dq") && HEM_HAS("avx512vl");
#undef HEM_HAS
  if (avx2) isas.push_back(CpuIsa::kAvx2);
  if (avx512) isas.push_back(CpuIsa::kAvx512);
#endif
  return isas;
}

CpuIsa selected_isa() { return current().load(std::memory_order_relaxed); }

bool writes_lines_faster() {
#if HEM_X86_TARGETS
  static const bool is_intel = (__builtin_cpu_init(), __builtin_cpu_is("intel") != 0);
  return is_intel;
#else
  return false;
#endif
}

void select_isa(const std::string& isa_name) {
  current().store(find_isa(isa_name), std::memory_order_relaxed);
}

}  // namespace hem_ext
