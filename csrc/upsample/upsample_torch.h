// What the CPU and the CUDA glue of upsampled_hem_loss share.
#pragma once

#include "../hem/hem_torch.h"
#include "upsample_layout.h"

namespace hem_ext {

inline UpsampledSizes upsampled_sizes(const std::vector<int64_t>& input, const Tensor& target) {
  const std::vector<int64_t> out = sizes_of(target);
  if (input.size() != 4 || out.size() != 3) {
    raise<std::runtime_error>("hem_ext: expected logits (N, C, h, w) and targets (N, H, W), got ",
                              to_string(input), " and ", to_string(out));
  }
  const UpsampledSizes s{input[0], input[1], input[2], input[3], out[1], out[2]};
  if (s.classes <= 0 || s.classes > INT32_MAX) {
    raise<std::runtime_error>("hem_ext: the class dimension of ", to_string(input),
                              " must hold between 1 and 2**31 - 1 classes");
  }
  for (int64_t size : {s.in_rows, s.in_columns, s.rows, s.columns}) {
    if (size <= 0 || size > INT32_MAX - 64) {
      raise<std::runtime_error>("hem_ext: cannot interpolate from ", s.in_rows, " x ", s.in_columns, " to ",
                                s.rows, " x ", s.columns);
    }
  }
  return s;
}

inline ForwardCall upsampled_forward_call(const UpsampledSizes& sizes, const Tensor& input,
                                          const Tensor& target, const std::optional<Tensor>& margins,
                                          const std::optional<Tensor>& weight, int64_t reduction_code) {
  if (!input.is_contiguous()) raise<std::runtime_error>("hem_ext: the logits must be contiguous");
  return forward_call(sizes.layout(), input, target, sizes.target(), margins, weight, reduction_code);
}

// The gradient of the logits: contiguous, or channels_last.
inline Tensor empty_upsampled_gradient(const UpsampledSizes& s, int64_t input_type_code, bool channels_last,
                                       const Tensor& like) {
  const int64_t h = s.in_rows, w = s.in_columns, c = s.classes;
  const std::vector<int64_t> strides = channels_last ? std::vector<int64_t>{h * w * c, 1, w * c, c}
                                                     : std::vector<int64_t>{c * h * w, h * w, w, 1};
  return empty_strided({s.images, c, h, w}, strides, dtype_of(input_type_code), like);
}

}  // namespace hem_ext
