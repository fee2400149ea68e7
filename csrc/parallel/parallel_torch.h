// What the CPU and the CUDA glue of class_parallel_hem_loss share.
#pragma once

#include "../hem/hem_torch.h"

namespace hem_ext {

// A call of one process, which has the logits of some classes: their layout, and where they are among all.
struct ParallelCall {
  Layout layout;
  InputType type;
  ScalarType arithmetic;
  Tensor target;  // contiguous
  int64_t classes, first;
};

inline void check_share(int64_t here, int64_t classes, int64_t first) {
  if (classes > INT32_MAX || first < 0 || here > classes || first > classes - here) {
    raise<std::runtime_error>("hem_ext: ", here, " classes from class ", first, " on are no share of ",
                              classes);
  }
}

// One number for each sample, or `rows` of them: contiguous, of the type the loss is computed in.
inline void check_per_sample(const char* what, const Tensor& x, int64_t rows, const ParallelCall& call,
                             const Tensor& input) {
  check_device(x, input);
  if (x.numel() != rows * call.layout.positions() || x.scalar_type() != call.arithmetic ||
      !x.is_contiguous()) {
    raise<std::runtime_error>("hem_ext: ", what, " must be contiguous, ", rows,
                              " for each sample, of the type the loss is computed in");
  }
  data_of(what, x);
}

inline ParallelCall parallel_call(const Tensor& input, const Tensor& target, const Tensor& target_logits,
                                  const std::optional<Tensor>& margins, int64_t classes, int64_t first,
                                  bool rows) {
  const Layout layout = layout_of(input, rows);
  const ScalarType arithmetic = arithmetic_type(input.scalar_type());
  check_share(layout.classes, classes, first);
  Layout all = layout;
  all.classes = classes;
  check_class_tensor("margin", margins, all, arithmetic, input);
  const ParallelCall call{layout,     input_type(input.scalar_type()),
                          arithmetic, checked_target(target, target_sizes(input), input),
                          classes,    first};
  check_per_sample("target_logits", target_logits, 1, call, input);
  return call;
}

// Two numbers for each sample: `target`'s sizes behind a dimension of 2.
inline Tensor empty_pairs(const ParallelCall& call, const Tensor& input) {
  std::vector<int64_t> sizes = sizes_of(call.target);
  sizes.insert(sizes.begin(), 2);
  return empty(sizes, call.arithmetic, input);
}

// The gradient of a share, and what backward of hem_loss is told of it.
struct ParallelBackwardCall {
  Tensor grad_input;
  Tensor denominator;  // of nothing: every sample has a gradient of its own
  BackwardCall hem;
  ClassRange range;
};

inline ParallelBackwardCall parallel_backward_call(const Tensor& grad_loss, const Tensor& mask,
                                                   const Tensor& counts, const Tensor& target,
                                                   int64_t classes, int64_t first, int64_t here,
                                                   int64_t input_type_code, bool rows) {
  check_share(here, classes, first);
  const Tensor grad_input = empty_gradient(target, mask, here, input_type_code, rows);
  const Tensor denominator = empty({}, arithmetic_type(grad_input.scalar_type()), mask);
  const BackwardCall hem = backward_call(grad_input, grad_loss, mask, target, std::nullopt, denominator,
                                         static_cast<int64_t>(Reduction::kNone), rows);
  check_device(counts, mask);
  if (counts.numel() != hem.layout.positions() || counts.scalar_type() != ScalarType::Int ||
      !counts.is_contiguous()) {
    raise<std::runtime_error>("hem_ext: counts must be contiguous int32, one for each sample");
  }
  const int32_t* kept = static_cast<const int32_t*>(data_of("counts", counts, counts.numel()));
  return {grad_input, denominator, hem, {first, classes, kept, hem.layout.words(), 0}};
}

}  // namespace hem_ext
