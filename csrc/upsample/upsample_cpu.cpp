// upsampled_hem_loss on the CPU: what torch hands over, checked and cut into pieces for the kernels.
#include <tuple>

#include "../hem/hem_cpu_torch.h"
#include "upsample_cpu_pieces.h"
#include "upsample_torch.h"

namespace hem_ext {
std::tuple<Tensor, Tensor, Tensor> upsampled_forward_cpu(const Tensor& input, const Tensor& target,
                                                         const std::optional<Tensor>& margins, double margin,
                                                         const std::optional<Tensor>& weight,
                                                         int64_t ignore_index, int64_t reduction_code,
                                                         bool align_corners) {
  const UpsampledSizes sizes = upsampled_sizes(sizes_of(input), target);
  const ForwardCall call = upsampled_forward_call(sizes, input, target, margins, weight, reduction_code);
  UpsampledForwardArgs args{};
  args.hem = forward_args(call, input, input.numel(), margins, margin, weight, ignore_index);
  args.hem.block = block_size(sizes);
  std::vector<Partial> partials(num_blocks(sizes, args.hem.block));
  args.hem.partials = partials.data();
  const auto kernel = HEM_SELECTED(upsampled_kernels).forward[static_cast<int>(call.type)];
  with_axes(sizes, call.arithmetic == ScalarType::Double, align_corners,
            [&](const Axis& rows, const Axis& columns) {
              args.rows = rows;
              args.columns = columns;
              args.span = span_of(columns, args.hem.block);
              for_each_block(static_cast<int64_t>(partials.size()), args.hem.block * sizes.classes,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
            });
  finish_forward(call, args.hem, target, partials);
  return {call.loss, call.mask, call.denominator};
}

Tensor upsampled_backward_cpu(const Tensor& grad_loss, const Tensor& mask, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& denominator,
                              int64_t ignore_index, int64_t classes, int64_t height, int64_t width,
                              int64_t input_type_code, int64_t reduction_code, bool align_corners,
                              bool channels_last) {
  const UpsampledSizes sizes = upsampled_sizes({target.size(0), classes, height, width}, target);
  const Tensor grad_input = empty_upsampled_gradient(sizes, input_type_code, channels_last, mask);
  const BackwardCall call = backward_call(sizes.layout(), grad_input, grad_loss, mask, target, sizes.target(),
                                          weight, denominator, reduction_code);
  UpsampledBackwardArgs args{};
  args.hem = backward_args(call, grad_input, mask, weight, denominator, ignore_index);
  args.classes_innermost = channels_last;
  args.band = band_size(sizes);
  const int64_t bands = bands_per_image(sizes, args.band);
  const auto kernel = HEM_SELECTED(upsampled_kernels).backward[static_cast<int>(call.type)];
  with_axes(sizes, grad_input.scalar_type() == ScalarType::Double, align_corners,
            [&](const Axis& rows, const Axis& columns) {
              args.rows = rows;
              args.columns = columns;
              for_each_block(sizes.images * bands, classes * sizes.rows * sizes.columns / bands,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
            });
  return grad_input;
}

}  // namespace hem_ext

// The schemas are in hem_ext/upsample.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CPU, m) {
  m.impl("upsampled_hem_forward", TORCH_BOX(&hem_ext::upsampled_forward_cpu));
  m.impl("upsampled_hem_backward", TORCH_BOX(&hem_ext::upsampled_backward_cpu));
}
