// HEM on the CPU: what torch hands over, checked and cut into blocks for the kernels.
#include <tuple>

#include "hem_cpu_torch.h"

namespace hem_ext {
namespace {

void write_gradient(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                    const Tensor& target, const std::optional<Tensor>& weight, const Tensor& denominator,
                    int64_t ignore_index, int64_t reduction_code, bool rows) {
  const BackwardCall call =
      backward_call(grad_input, grad_loss, mask, target, weight, denominator, reduction_code, rows);
  BackwardArgs args = backward_args(call, grad_input, mask, weight, denominator, ignore_index);
  args.streamed = is_streamed(grad_input, call.layout);
  run_backward(args, call.type);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> hem_forward_cpu(const Tensor& input, const Tensor& target,
                                                   const std::optional<Tensor>& margins, double margin,
                                                   const std::optional<Tensor>& weight, int64_t ignore_index,
                                                   int64_t reduction_code, bool rows) {
  const ForwardCall call = forward_call(input, target, margins, weight, reduction_code, rows);
  ForwardArgs args = forward_args(call, input, extent_of(call.layout), margins, margin, weight, ignore_index);
  args.block = block_size(call.layout);
  std::vector<Partial> partials(num_blocks(call.layout, args.block));
  args.partials = partials.data();
  const ForwardKernel kernel = HEM_SELECTED(kernels).forward[static_cast<int>(call.type)];
  for_each_block(static_cast<int64_t>(partials.size()), args.block * call.layout.classes,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  finish_forward(call, args, target, partials);
  return {call.loss, call.mask, call.denominator};
}

Tensor hem_backward_cpu(const Tensor& grad_loss, const Tensor& mask, const Tensor& target,
                        const std::optional<Tensor>& weight, const Tensor& denominator, int64_t ignore_index,
                        int64_t classes, int64_t input_type_code, int64_t reduction_code, bool rows) {
  const Tensor grad_input = empty_gradient(target, mask, classes, input_type_code, rows);
  advise_huge_pages(grad_input);
  write_gradient(grad_input, grad_loss, mask, target, weight, denominator, ignore_index, reduction_code,
                 rows);
  return grad_input;
}

void hem_backward_into_cpu(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                           const Tensor& target, const std::optional<Tensor>& weight,
                           const Tensor& denominator, int64_t ignore_index, int64_t reduction_code,
                           bool rows) {
  check_has_no_gaps(grad_input, rows);
  data_of("the gradient", grad_input, grad_input.numel());
  write_gradient(grad_input, grad_loss, mask, target, weight, denominator, ignore_index, reduction_code,
                 rows);
}

Tensor hem_count_cpu(const Tensor& mask) {
  const std::vector<int64_t> sizes = sizes_of(mask);
  if (sizes.size() != 2 || mask.scalar_type() != ScalarType::Int || !mask.is_contiguous()) {
    raise<std::runtime_error>("hem_ext: the mask of rows must be contiguous int32 of two dimensions");
  }
  const Tensor counts = empty({sizes[0]}, ScalarType::Int, mask);
  const int32_t* words = static_cast<const int32_t*>(data_of("the mask", mask));
  int32_t* to = static_cast<int32_t*>(counts.mutable_data_ptr());
  for_each_block(sizes[0], 32 * sizes[1], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = count_kept(words + i * sizes[1], sizes[1], 1);
  });
  return counts;
}

void hem_backward_range_cpu(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                            const Tensor& counts, const Tensor& target, const std::optional<Tensor>& weight,
                            const Tensor& denominator, int64_t ignore_index, int64_t classes, int64_t first,
                            int64_t reduction_code) {
  const Layout layout = layout_of(grad_input, true);
  check_has_no_gaps(grad_input, true);
  data_of("the gradient", grad_input, grad_input.numel());
  const bool has_whole_words =
      first % 32 == 0 && (layout.classes % 32 == 0 || first + layout.classes == classes);
  if (grad_input.dim() != 2 || first < 0 || first > classes - layout.classes || !has_whole_words) {
    raise<std::runtime_error>("hem_ext: ", layout.classes, " classes from class ", first,
                              " on are no range of ", classes, " in whole words of the mask");
  }
  check_device(counts, grad_input);
  if (sizes_of(counts) != std::vector<int64_t>{layout.inner} || counts.scalar_type() != ScalarType::Int ||
      !counts.is_contiguous()) {
    raise<std::runtime_error>("hem_ext: counts must be contiguous int32, one for each row");
  }
  const Layout all{true, 1, classes, layout.inner, 0, 1, classes};
  const BackwardCall call = backward_call(all, grad_input, grad_loss, mask, target, {layout.inner}, weight,
                                          denominator, reduction_code);
  BackwardArgs args = backward_args(call, grad_input, mask, weight, denominator, ignore_index);
  args.layout = layout;
  args.range = {first, classes, static_cast<const int32_t*>(data_of("counts", counts)), all.words(),
                first / 32};
  run_backward(args, call.type);
}

}  // namespace hem_ext

// The schemas are in hem_ext/hem.py, the last two in hem_ext/linear.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CPU, m) {
  m.impl("hem_forward", TORCH_BOX(&hem_ext::hem_forward_cpu));
  m.impl("hem_backward", TORCH_BOX(&hem_ext::hem_backward_cpu));
  m.impl("hem_backward_into", TORCH_BOX(&hem_ext::hem_backward_into_cpu));
  m.impl("hem_count", TORCH_BOX(&hem_ext::hem_count_cpu));
  m.impl("hem_backward_range", TORCH_BOX(&hem_ext::hem_backward_range_cpu));
}
