// The CUDA kernels of HEM as functions of numpy arrays, run by cuda_emulation.h.
#include "cuda_emulation.h"
//
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../../csrc/hem/hem_cuda_kernels.cuh"
#include "../../csrc/parallel/parallel_cuda_kernels.cuh"
#include "../../csrc/upsample/upsample_cuda_kernels.cuh"

namespace py = pybind11;
using namespace hem_ext;

namespace {

template <class T>
const T* pointer(const py::object& array) {
  return array.is_none() ? nullptr : static_cast<const T*>(py::cast<py::array>(array).data());
}

// f with a value of the type that the name says.
template <class F>
void with_storage(const std::string& name, const F& f) {
  if (name == "float32") return f(float{});
  if (name == "float64") return f(double{});
  if (name == "bfloat16") return f(DeviceBFloat16{});
  if (name == "float16") return f(DeviceFloat16{});
  throw std::invalid_argument(name);
}

TargetType target_type(const std::string& name) {
  if (name == "int64") return TargetType::kInt64;
  if (name == "int32") return TargetType::kInt32;
  if (name == "uint8") return TargetType::kUInt8;
  throw std::invalid_argument(name);
}

template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

Layout layout_of(const py::dict& d) {
  auto get = [&](const char* name) { return d[name].cast<int64_t>(); };
  return {d["rows"].cast<bool>(), get("outer"),        get("classes"),     get("inner"),
          get("outer_stride"),    get("class_stride"), get("inner_stride")};
}

// Of the upsampling kernels: from logits of one size to those of another.
struct Sizes {
  int64_t in_rows = 0, in_columns = 0, rows = 0, columns = 0;
  bool align_corners = false, channels_last = false;

  explicit Sizes(const py::dict& d) {
    if (!d.contains("in_rows")) return;
    auto get = [&](const char* name) { return d[name].cast<int64_t>(); };
    in_rows = get("in_rows"), in_columns = get("in_columns"), rows = get("rows"), columns = get("columns");
    align_corners = get("align_corners"), channels_last = get("channels_last");
  }
  template <class T>
  CudaUpsample<T> upsample() const {
    return {{in_rows, rows, align_corners}, {in_columns, columns, align_corners}};
  }
};

// The kernel of one shape and dtype by name, with `width` elements a load where that is a choice.
template <class T, class S>
void forward(const std::string& kernel, const Sizes& sizes, int width, int blocks, int threads,
             const CudaForwardArgs<T>& a) {
  constexpr int kWide = kVectorWidth<S>, kPixels = kWide < 4 ? kWide : 4;
  const int64_t classes = a.layout.classes;
  const size_t tally = 2 * sizeof(double) * threads / 32;
  auto larger = [&](size_t bytes) { return bytes > tally ? bytes : tally; };
  auto wide = [&](auto f, int w, bool warp_row) {
    const int team = warp_row ? 32 : threads, teams = threads / team;
    emulation::launch(f, blocks, threads, 64 * sizeof(double) + teams * wide_row_words(classes, w, team) * 4,
                      a);
  };
  py::gil_scoped_release release;
  if (kernel == "narrow_rows") {
    emulation::launch(hem_forward_narrow_rows<T, S>, blocks, kNarrowRows,
                      larger(narrow_shared_bytes<S>(classes)), a);
  } else if (kernel == "warp_rows") {
    if (width == 1) return wide(hem_forward_wide_rows<T, S, true, 2, 1>, 1, true);
    wide(hem_forward_wide_rows<T, S, true, 2, kWide>, kWide, true);
  } else if (kernel == "block_rows") {
    if (width == 1) return wide(hem_forward_wide_rows<T, S, false, 2, 1>, 1, false);
    wide(hem_forward_wide_rows<T, S, false, 2, kWide>, kWide, false);
  } else if (kernel == "pixels") {
    if (width == 1) {
      emulation::launch(hem_forward_pixels<T, S, 1>, blocks, threads,
                        larger(pixel_shared_bytes<T>(threads, 1)), a);
    } else {
      emulation::launch(hem_forward_pixels<T, S, kPixels>, blocks, threads,
                        larger(pixel_shared_bytes<T>(threads, kPixels)), a);
    }
  } else if (kernel == "many_class_pixels") {
    emulation::launch(hem_forward_many_class_pixels<T, S>, blocks, threads, tally, a);
  } else if (kernel == "upsampled") {
    emulation::launch(upsampled_forward_pixels<T, S>, blocks, threads, tally, a, sizes.upsample<T>());
  } else {
    throw std::invalid_argument(kernel);
  }
}

template <class T, class S>
void backward(const std::string& kernel, const Sizes& sizes, int width, int blocks, int threads,
              const CudaBackwardArgs<T>& a) {
  constexpr int kWide = kVectorWidth<S>, kPixels = kWide < 4 ? kWide : 4;
  const size_t team = 32 * sizeof(int);
  py::gil_scoped_release release;
  if (kernel == "narrow_rows") {
    emulation::launch(hem_backward_narrow_rows<T, S>, blocks, kNarrowRows,
                      narrow_shared_bytes<S>(a.layout.classes), a);
  } else if (kernel == "warp_rows") {
    emulation::launch(hem_backward_wide_rows<T, S, true, kWide>, blocks, threads, team, a);
  } else if (kernel == "block_rows") {
    emulation::launch(hem_backward_wide_rows<T, S, false, kWide>, blocks, threads, team, a);
  } else if (kernel == "pixels") {
    const int64_t per_thread = kClassesPerThread;
    if (width == 1) return emulation::launch(hem_backward_pixels<T, S, 1>, blocks, threads, 0, a, per_thread);
    emulation::launch(hem_backward_pixels<T, S, kPixels>, blocks, threads, 0, a, per_thread);
  } else if (kernel == "many_class_pixels") {
    emulation::launch(hem_backward_pixels<T, S, 1>, blocks, threads, 0, a, a.layout.classes);
  } else if (kernel == "upsampled") {
    emulation::launch(upsampled_backward<T, S>, blocks, threads, 0, a, sizes.upsample<T>(),
                      sizes.channels_last);
  } else {
    throw std::invalid_argument(kernel);
  }
}

bool run_forward(const std::string& kernel, const std::string& dtype, const std::string& target_dtype,
                 py::dict layout, int width, int blocks, int threads, py::array input, py::array target,
                 int64_t ignore_index, py::object margins, double margin, py::object weight, bool count_all,
                 bool divides, py::object losses, py::array mask, py::array loss, py::array denominator) {
  emulation::assertion_failed = false;
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    std::vector<double> partials(2 * blocks, NAN);
    CudaForwardArgs<T> a{layout_of(layout),
                         input.data(),
                         target.data(),
                         target_type(target_dtype),
                         ignore_index,
                         pointer<T>(margins),
                         static_cast<T>(margin),
                         pointer<T>(weight),
                         count_all,
                         const_cast<T*>(pointer<T>(losses)),
                         static_cast<uint32_t*>(mask.mutable_data()),
                         partials.data()};
    forward<T, S>(kernel, Sizes(layout), width, blocks, threads, a);
    emulation::launch(hem_reduce<T>, 1, 64, 2 * 2 * sizeof(double), partials.data(), blocks, divides,
                      losses.is_none(), static_cast<T*>(loss.mutable_data()),
                      static_cast<T*>(denominator.mutable_data()));
  });
  return !emulation::assertion_failed;
}

bool run_backward(const std::string& kernel, const std::string& dtype, const std::string& target_dtype,
                  py::dict layout, int width, int blocks, int threads, py::array target, int64_t ignore_index,
                  py::object weight, py::array grad_loss, bool per_sample, py::array denominator,
                  py::array mask, py::array grad_input, int64_t first, int64_t classes, py::object counts) {
  emulation::assertion_failed = false;
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    const Layout l = layout_of(layout);
    CudaBackwardArgs<T> a{l,
                          target.data(),
                          target_type(target_dtype),
                          ignore_index,
                          pointer<T>(weight),
                          static_cast<const T*>(grad_loss.data()),
                          per_sample,
                          static_cast<const T*>(denominator.data()),
                          static_cast<const uint32_t*>(mask.data()),
                          grad_input.mutable_data(),
                          {first, classes, pointer<int32_t>(counts), l.words(), 0}};
    backward<T, S>(kernel, Sizes(layout), width, blocks, threads, a);
  });
  return !emulation::assertion_failed;
}

// One look at the errors of some of the classes: the second one where there is a mask.
template <class T, class S>
void look(const std::string& kernel, int blocks, int threads, const CudaParallelArgs<T>& a) {
  const bool keeps = a.hem.mask != nullptr;
  py::gil_scoped_release release;
  auto launch = [&](auto f) { emulation::launch(f, blocks, threads, 32 * sizeof(T), a); };
  if (kernel == "warp_rows") {
    launch(keeps ? parallel_keep_rows<T, S, true> : parallel_errors_rows<T, S, true>);
  } else if (kernel == "block_rows") {
    launch(keeps ? parallel_keep_rows<T, S, false> : parallel_errors_rows<T, S, false>);
  } else if (kernel == "pixels") {
    launch(keeps ? parallel_keep_pixels<T, S> : parallel_errors_pixels<T, S>);
  } else {
    throw std::invalid_argument(kernel);
  }
}

bool run_look(const std::string& kernel, const std::string& dtype, const std::string& target_dtype,
              py::dict layout, int blocks, int threads, py::array input, py::array target,
              int64_t ignore_index, py::object margins, double margin, int64_t classes, int64_t first,
              py::array target_logits, py::array errors, py::object mask, py::object kept) {
  emulation::assertion_failed = false;
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    CudaParallelArgs<T> a{};
    a.hem.layout = layout_of(layout);
    a.hem.input = input.data();
    a.hem.target = target.data();
    a.hem.target_type = target_type(target_dtype);
    a.hem.ignore_index = ignore_index;
    a.hem.margins = pointer<T>(margins);
    a.hem.margin = static_cast<T>(margin);
    a.hem.mask = const_cast<uint32_t*>(pointer<uint32_t>(mask));
    a.classes = classes;
    a.first = first;
    a.target_logits = static_cast<const T*>(target_logits.data());
    a.errors = static_cast<T*>(errors.mutable_data());
    a.kept = const_cast<T*>(pointer<T>(kept));
    look<T, S>(kernel, blocks, threads, a);
  });
  return !emulation::assertion_failed;
}

}  // namespace

PYBIND11_MODULE(emulation, m) {
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
  m.def("look", &run_look);
  m.def("take_widened", [] { return emulation::widened.exchange(0); });  // since it was last asked
}
