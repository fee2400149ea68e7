#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

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
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2")) {
    isas.push_back(CpuIsa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      isas.push_back(CpuIsa::kAvx512);
    }
  }
#endif
  return isas;
}

CpuIsa selected_isa() { return current().load(std::memory_order_relaxed); }

void select_isa(const std::string& isa_name) {
  current().store(find_isa(isa_name), std::memory_order_relaxed);
}

}  // namespace hem_ext
