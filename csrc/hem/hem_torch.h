// What the CPU and the CUDA glue of HEM share: everything but the kernels, which ForwardCall and BackwardCall
// lead up to. The checks here come first for a call that needs no conversion, and keep it inside its memory;
// what they refuse, hem_ext/arguments.py puts into the words that users see.
#pragma once

#include "../common/torch_glue.h"
#include "hem_layout.h"

namespace hem_ext {

inline InputType input_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return InputType::kFloat32;
    case ScalarType::Double: return InputType::kFloat64;
    case ScalarType::BFloat16: return InputType::kBFloat16;
    case ScalarType::Half: return InputType::kFloat16;
    default: raise<std::runtime_error>("hem_ext: logits of this dtype are not supported");
  }
}

inline Reduction reduction_of(int64_t code) {
  if (code < 0 || code > static_cast<int64_t>(Reduction::kBatchMean)) {
    raise<std::runtime_error>("hem_ext: there is no reduction of code ", code);
  }
  return static_cast<Reduction>(code);
}

inline ScalarType dtype_of(int64_t input_type_code) {
  const bool known = input_type_code >= 0 && input_type_code < kInputTypeCount;
  switch (static_cast<InputType>(known ? input_type_code : kInputTypeCount)) {
    case InputType::kFloat32: return ScalarType::Float;
    case InputType::kFloat64: return ScalarType::Double;
    case InputType::kBFloat16: return ScalarType::BFloat16;
    case InputType::kFloat16: return ScalarType::Half;
  }
  raise<std::runtime_error>("hem_ext: there is no type of logits of code ", input_type_code);
}

inline ScalarType arithmetic_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline TargetType target_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long: return TargetType::kInt64;
    case ScalarType::Int: return TargetType::kInt32;
    case ScalarType::Byte: return TargetType::kUInt8;
    default: raise<std::runtime_error>("hem_ext: targets of this dtype are not supported");
  }
}

// The layout of (C,), (N, C) or (N, C, d1..dk) logits; raises where `rows` does not fit their strides.
inline Layout layout_of(const Tensor& input, bool rows) {
  const auto sizes = input.sizes();
  const auto strides = input.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  if (dims == 0) raise<std::runtime_error>("hem_ext: logits need at least one dimension");
  const int64_t class_dim = dims == 1 ? 0 : 1;
  const int64_t classes = sizes[class_dim];
  if (classes <= 0 || classes > INT32_MAX) {
    raise<std::runtime_error>("hem_ext: the class dimension of ", to_string(sizes.data(), dims),
                              " must hold between 1 and 2**31 - 1 classes");
  }

  if (input.numel() == 0) {
    int64_t pixels = 1;
    for (int64_t d = 2; d < dims; ++d) pixels *= sizes[d];
    const bool one_image = rows || dims <= 2;
    return {rows, one_image ? 1 : sizes[0], classes, one_image ? 0 : pixels, 0, 1, 1};
  }

  // Positions from dimension `from` on, folded into one dimension of this length and stride.
  int64_t length = 1, stride = 1;
  auto fold = [&](int64_t from) {
    bool first = true;
    for (int64_t d = dims - 1; d >= from; --d) {
      if (d == class_dim || sizes[d] == 1) continue;
      if (first) {
        stride = strides[d];
      } else if (strides[d] != length * stride) {
        return false;
      }
      length *= sizes[d];
      first = false;
    }
    return true;
  };

  if (rows) {
    const bool one_stride = fold(0);
    if (one_stride && (classes == 1 || strides[class_dim] == 1)) {
      return {true, 1, classes, length, 0, 1, length == 1 ? classes : stride};
    }
  } else if (dims >= 2) {
    const bool one_image = dims == 2;
    const bool one_stride = fold(one_image ? 0 : 2);
    if (one_stride && (length == 1 || stride == 1)) {
      return {false, one_image ? 1 : sizes[0], classes, length, one_image ? 0 : strides[0], strides[1], 1};
    }
  }
  raise<std::runtime_error>("hem_ext: logits of sizes ", to_string(sizes.data(), dims), " and strides ",
                            to_string(strides.data(), dims), " do not lie in memory as ",
                            rows ? "rows" : "pixels");
}

// Elements from the first one in memory to the last.
inline int64_t extent_of(const Layout& l) {
  if (l.positions() == 0) return 0;
  return (l.outer - 1) * l.outer_stride + (l.classes - 1) * l.class_stride + (l.inner - 1) * l.inner_stride +
         1;
}

// Of the logits that `target` belongs to: () and (C,), else (N, d1..dk) and (N, C, d1..dk).
inline std::vector<int64_t> logits_sizes(const Tensor& target, int64_t classes) {
  std::vector<int64_t> sizes = sizes_of(target);
  sizes.insert(sizes.begin() + (sizes.empty() ? 0 : 1), classes);
  return sizes;
}

// Dense, in the order of the layout: classes innermost in rows, positions innermost in pixels.
inline std::vector<int64_t> gradient_strides(const std::vector<int64_t>& sizes, bool rows) {
  const size_t dims = sizes.size();
  std::vector<int64_t> strides(dims, 1);
  int64_t next = 1;
  auto place = [&](size_t d) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  };
  if (dims == 2 && !rows) {
    place(0);
    place(1);
    return strides;
  }
  const bool classes_innermost = rows && dims > 2;
  if (classes_innermost) place(1);
  for (size_t d = dims; d-- > 0;) {
    if (!(classes_innermost && d == 1)) place(d);
  }
  return strides;
}

inline std::vector<int64_t> mask_sizes(const Layout& layout) {
  if (layout.rows) return {layout.inner, layout.words()};
  return {layout.outer, layout.words(), layout.inner};
}

// No kernel may be handed memory it cannot read.
inline void check_device(const Tensor& t, const Tensor& logits) {
  if (device_of(t) != device_of(logits)) {
    raise<std::runtime_error>("hem_ext: every tensor must be on the device of the logits");
  }
}

inline void check_class_tensor(const char* what, const std::optional<Tensor>& values, const Layout& layout,
                               ScalarType arithmetic, const Tensor& logits) {
  if (!values.has_value()) return;
  check_device(*values, logits);
  if (values->numel() != layout.classes || values->dim() != 1 || !values->is_contiguous() ||
      values->scalar_type() != arithmetic) {
    raise<std::runtime_error>("hem_ext: ", what, " must be contiguous, of shape [", layout.classes,
                              "], and of the type the loss is computed in");
  }
}

// Of the targets of logits, or of their gradient: () for (C,), else their shape without the classes.
inline std::vector<int64_t> target_sizes(const Tensor& logits) {
  std::vector<int64_t> sizes = sizes_of(logits);
  sizes.erase(sizes.begin() + (sizes.size() > 1));
  return sizes;
}

// One target per position, in the order of positions.
inline Tensor checked_target(const Tensor& target, const std::vector<int64_t>& expected,
                             const Tensor& logits) {
  check_device(target, logits);
  const std::vector<int64_t> given = sizes_of(target);
  if (given != expected) {
    raise<std::runtime_error>("hem_ext: expected targets of sizes ", to_string(expected), ", got ",
                              to_string(given));
  }
  return as_contiguous("target", target);
}

// What a forward call is on every device, once its arguments are checked: where it works, and what it
// returns.
struct ForwardCall {
  Layout layout;
  InputType type;
  ScalarType arithmetic;
  Reduction reduction;
  Tensor target;  // contiguous
  Tensor loss, mask, denominator;

  bool per_sample() const { return reduction == Reduction::kNone; }
  bool divides() const { return reduction == Reduction::kMean || reduction == Reduction::kBatchMean; }
};

// `layout` is that of the logits the loss is of; `input` has their type and their device.
inline ForwardCall forward_call(const Layout& layout, const Tensor& input, const Tensor& target,
                                const std::vector<int64_t>& expected_target,
                                const std::optional<Tensor>& margins, const std::optional<Tensor>& weight,
                                int64_t reduction_code) {
  const ScalarType dtype = input.scalar_type(), arithmetic = arithmetic_type(dtype);
  const Reduction reduction = reduction_of(reduction_code);
  check_class_tensor("margin", margins, layout, arithmetic, input);
  check_class_tensor("weight", weight, layout, arithmetic, input);
  const Tensor labels = checked_target(target, expected_target, input);
  const bool per_sample = reduction == Reduction::kNone;
  return {layout,
          input_type(dtype),
          arithmetic,
          reduction,
          labels,
          empty(per_sample ? sizes_of(target) : std::vector<int64_t>{}, arithmetic, input),
          empty(mask_sizes(layout), ScalarType::Int, input),
          empty({}, arithmetic, input)};
}

inline ForwardCall forward_call(const Tensor& input, const Tensor& target,
                                const std::optional<Tensor>& margins, const std::optional<Tensor>& weight,
                                int64_t reduction_code, bool rows) {
  const Layout layout = layout_of(input, rows);  // first: it refuses what has no targets
  return forward_call(layout, input, target, target_sizes(input), margins, weight, reduction_code);
}

inline void check_saved(const Tensor& grad_loss, const Tensor& mask, const Tensor& denominator,
                        const Layout& layout, ScalarType arithmetic, bool per_sample,
                        const Tensor& grad_input) {
  for (const Tensor* t : {&grad_loss, &mask, &denominator}) check_device(*t, grad_input);
  const std::vector<int64_t> sizes = mask_sizes(layout);
  if (sizes_of(mask) != sizes || mask.scalar_type() != ScalarType::Int || !mask.is_contiguous()) {
    raise<std::runtime_error>("hem_ext: the mask must be contiguous int32 of sizes ", to_string(sizes));
  }
  if (grad_loss.scalar_type() != arithmetic || denominator.scalar_type() != arithmetic ||
      grad_loss.numel() != (per_sample ? layout.positions() : 1) || denominator.numel() != 1) {
    raise<std::runtime_error>("hem_ext: grad_loss and denominator do not fit the loss");
  }
}

// The same of a backward call.
struct BackwardCall {
  Layout layout;
  InputType type;
  bool per_sample;
  Tensor target, grad_loss;  // contiguous
};

// Memory for the gradient of the logits that `target` and `mask` belong to.
inline Tensor empty_gradient(const Tensor& target, const Tensor& mask, int64_t classes,
                             int64_t input_type_code, bool rows) {
  const std::vector<int64_t> size = logits_sizes(target, classes);
  return empty_strided(size, gradient_strides(size, rows), dtype_of(input_type_code), mask);
}

// For memory that comes from elsewhere: that of the logits.
inline void check_has_no_gaps(const Tensor& grad_input, bool rows) {
  const std::vector<int64_t> sizes = sizes_of(grad_input), expected = gradient_strides(sizes, rows);
  for (size_t d = 0; d < sizes.size() && grad_input.numel() > 0; ++d) {
    if (sizes[d] > 1 && grad_input.stride(static_cast<int64_t>(d)) != expected[d]) {
      raise<std::runtime_error>("hem_ext: the gradient needs memory of its own without gaps");
    }
  }
}

inline BackwardCall backward_call(const Layout& layout, const Tensor& grad_input, const Tensor& grad_loss,
                                  const Tensor& mask, const Tensor& target,
                                  const std::vector<int64_t>& expected_target,
                                  const std::optional<Tensor>& weight, const Tensor& denominator,
                                  int64_t reduction_code) {
  const ScalarType dtype = grad_input.scalar_type(), arithmetic = arithmetic_type(dtype);
  const bool per_sample = reduction_of(reduction_code) == Reduction::kNone;
  check_class_tensor("weight", weight, layout, arithmetic, grad_input);
  check_saved(grad_loss, mask, denominator, layout, arithmetic, per_sample, grad_input);
  const Tensor labels = checked_target(target, expected_target, grad_input);
  return {layout, input_type(dtype), per_sample, labels, as_contiguous("grad_loss", grad_loss)};
}

inline BackwardCall backward_call(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                                  const Tensor& target, const std::optional<Tensor>& weight,
                                  const Tensor& denominator, int64_t reduction_code, bool rows) {
  const Layout layout = layout_of(grad_input, rows);
  return backward_call(layout, grad_input, grad_loss, mask, target, target_sizes(grad_input), weight,
                       denominator, reduction_code);
}

}  // namespace hem_ext
