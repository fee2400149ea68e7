// Small helpers over libtorch's stable ABI for the *_cpu.cpp and *_cuda.cu files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../hem/hem_layout.h"

namespace hem_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch turns what an op throws into a Python exception: std::out_of_range into IndexError,
// std::invalid_argument into ValueError (before 2.15; since then hem_ext/_torch.py does it), anything else
// into RuntimeError.
template <class Exception, class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Exception(message.str());
}

// For the C functions of the stable ABI, whose own macro has another name in torch 2.10; torch prints what
// went wrong.
inline void check_status(AOTITorchError status, const char* what) {
  if (status != AOTI_TORCH_SUCCESS) raise<std::runtime_error>("hem_ext: ", what, " failed");
}

// "[2, 21, 8, 8]"
inline std::string to_string(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string to_string(const std::vector<int64_t>& sizes) {
  return to_string(sizes.data(), static_cast<int64_t>(sizes.size()));
}

// Type and index.
inline std::pair<int32_t, int32_t> device_of(const Tensor& t) {
  int32_t type;
  check_status(aoti_torch_get_device_type(t.get(), &type), "aoti_torch_get_device_type");
  return {type, t.get_device_index()};
}

// The uninitialised tensor of these sizes and strides, on the device of `like`.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype, const Tensor& like) {
  const auto [device_type, device_index] = device_of(like);
  AtenTensorHandle handle;
  check_status(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, device_index, &handle),
      "aoti_torch_empty_strided");
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  return empty_strided(sizes, strides, dtype, like);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Elements from the first one in memory to the last.
inline int64_t extent_of(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

// Raises where there is no memory for so many elements, as a storage may be resized under a tensor, or where
// they are not aligned, as in a buffer behind a header: to read one there is undefined.
inline const void* data_of(const char* what, const Tensor& t, int64_t extent) {
  int64_t held;
  check_status(aoti_torch_get_storage_size(t.get(), &held), "aoti_torch_get_storage_size");
  const int64_t size = static_cast<int64_t>(t.element_size());
  const int64_t needed = (t.storage_offset() + extent) * size;
  if (extent > 0 && needed > held) {
    raise<std::runtime_error>("hem_ext: the memory of ", what,
                              " is not allocated: its storage was resized to ", held, " bytes, and ", needed,
                              " are needed");
  }
  const void* data = t.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % size != 0) {
    raise<std::invalid_argument>("hem_ext: the memory of ", what, " is not aligned to its elements of ", size,
                                 " bytes: give a copy, .clone()");
  }
  return data;
}

inline const void* data_of(const char* what, const Tensor& t) { return data_of(what, t, extent_of(t)); }

// torch::stable::contiguous goes through the dispatcher, which costs as much as a small kernel.
inline Tensor as_contiguous(const char* what, const Tensor& t) {
  if (t.is_contiguous()) return t;
  data_of(what, t);
  return torch::stable::contiguous(t);
}

inline const void* data_or_null(const char* what, const std::optional<Tensor>& t) {
  return t.has_value() ? data_of(what, *t) : nullptr;
}

}  // namespace hem_ext
