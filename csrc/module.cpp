// hem_ext._C: importing it registers the kernels of the ops with torch; what it holds is about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

#define HEM_STRINGIZE_(x) #x
#define HEM_STRINGIZE(x) HEM_STRINGIZE_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of hem_ext. Private: use the functions of the package.";
  hem_ext::selected_isa();  // an unusable HEM_EXT_CPU_ISA fails the import, and says why

  m.def("cpu_isa", [] { return std::string(hem_ext::name(hem_ext::selected_isa())); });
  m.def("available_cpu_isas", [] {
    std::vector<std::string> names;
    for (hem_ext::CpuIsa isa : hem_ext::available_isas()) names.emplace_back(hem_ext::name(isa));
    return names;
  });
  m.def("select_cpu_isa", &hem_ext::select_isa, py::arg("name"));

  py::dict build;
#if defined(__clang__)
  build["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
  build["compiler"] = "GCC " __VERSION__;
#else
  build["compiler"] = "unknown";
#endif
  build["torch"] = HEM_STRINGIZE(HEM_EXT_TORCH_VERSION);
#if defined(HEM_EXT_WITH_CUDA)
  build["cuda"] = true;
#else
  build["cuda"] = false;
#endif
  m.attr("build") = build;
}
