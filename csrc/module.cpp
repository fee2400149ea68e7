// hem_ext._C: importing it registers the kernels of the ops with torch; what it holds is about the build.
//
// It keeps to CPython's limited API, as the ops do to libtorch's stable ABI: one build serves every CPython
// from 3.10 on. pybind11 cannot.
#ifdef Py_LIMITED_API  // what torch's build sets is the oldest CPython of that torch; the wheel says cp310
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <stdexcept>

#include "common/cpu_isa.h"

#define HEM_STRINGIZE_(x) #x
#define HEM_STRINGIZE(x) HEM_STRINGIZE_(x)

#if defined(__GLIBC__)
// std::shared_ptr counts without atomics where glibc, from 2.32 on, says here that there is one thread. This
// answer, of the library's own, is always right, and lets the library load with an older glibc too.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

namespace {

// What the ops are given and return: their schemas and codes, and the layout of a mask. Another one, another
// number, here and in hem_ext/_native.py, which takes no library of another.
constexpr int kInterface = 1;

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(hem_ext::name(hem_ext::selected_isa()));
}

PyObject* available_cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (hem_ext::CpuIsa isa : hem_ext::available_isas()) {
    PyObject* name = PyUnicode_FromString(hem_ext::name(isa));
    const bool added = names != nullptr && name != nullptr && PyList_Append(names, name) == 0;
    Py_XDECREF(name);
    if (!added) {
      Py_XDECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* select_cpu_isa(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(arguments, "s:select_cpu_isa", &name)) return nullptr;
  try {
    hem_ext::select_isa(name);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

int fill(PyObject* module) {
  try {
    hem_ext::selected_isa();
  } catch (const std::invalid_argument& error) {  // an unusable HEM_EXT_CPU_ISA
    PyErr_SetString(PyExc_ImportError, error.what());
    return -1;
  }

#if defined(__clang__)
  const char* compiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
  const char* compiler = "GCC " __VERSION__;
#else
  const char* compiler = "unknown";
#endif
#if defined(HEM_EXT_WITH_CUDA)
  PyObject* cuda = Py_True;
#else
  PyObject* cuda = Py_False;
#endif
  PyObject* build =
      Py_BuildValue("{s:s, s:s, s:O, s:i}", "compiler", compiler, "torch",
                    HEM_STRINGIZE(HEM_EXT_TORCH_VERSION), "cuda", cuda, "interface", kInterface);
  const int failed = PyModule_AddObjectRef(module, "build", build);
  Py_XDECREF(build);
  return failed;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
    {"available_cpu_isas", available_cpu_isas, METH_NOARGS, nullptr},
    {"select_cpu_isa", select_cpu_isa, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&fill)}, {0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "hem_ext._C",
    "Kernels of hem_ext. Private: use the functions of the package.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
