// upsampled_hem_loss on CUDA: what torch hands over, and the grids. As hem_cuda.cu it never waits for the
// device.
#include <tuple>

#include "../hem/hem_cuda_torch.h"
#include "upsample_cuda_kernels.cuh"
#include "upsample_torch.h"

namespace hem_ext {
namespace {

template <class T>
CudaUpsample<T> upsample_of(const UpsampledSizes& s, bool align_corners) {
  return {{s.in_rows, s.rows, align_corners}, {s.in_columns, s.columns, align_corners}};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> upsampled_forward_cuda(const Tensor& input, const Tensor& target,
                                                          const std::optional<Tensor>& margins, double margin,
                                                          const std::optional<Tensor>& weight,
                                                          int64_t ignore_index, int64_t reduction_code,
                                                          bool align_corners) {
  const UpsampledSizes sizes = upsampled_sizes(sizes_of(input), target);
  const ForwardCall call = upsampled_forward_call(sizes, input, target, margins, weight, reduction_code);
  const Device device(input);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    auto args = forward_args<T>(call, input, margins, margin, weight, ignore_index);
    forward_and_reduce(device, call, &args, input, [&] {
      const unsigned blocks = device.blocks(call.layout.positions(), kThreads);
      device.launch(upsampled_forward_pixels<T, Storage>, blocks, kThreads,
                    2 * sizeof(double) * (kThreads / kWarp), args, upsample_of<T>(sizes, align_corners));
      return blocks;
    });
  });
  return {call.loss, call.mask, call.denominator};
}

Tensor upsampled_backward_cuda(const Tensor& grad_loss, const Tensor& mask, const Tensor& target,
                               const std::optional<Tensor>& weight, const Tensor& denominator,
                               int64_t ignore_index, int64_t classes, int64_t height, int64_t width,
                               int64_t input_type_code, int64_t reduction_code, bool align_corners,
                               bool channels_last) {
  const UpsampledSizes sizes = upsampled_sizes({target.size(0), classes, height, width}, target);
  const Tensor grad_input = empty_upsampled_gradient(sizes, input_type_code, channels_last, mask);
  const BackwardCall call = backward_call(sizes.layout(), grad_input, grad_loss, mask, target, sizes.target(),
                                          weight, denominator, reduction_code);
  if (grad_input.numel() == 0) return grad_input;
  const Device device(mask);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    const auto args = backward_args<T>(call, grad_input, mask, weight, denominator, ignore_index);
    const int64_t work = sizes.images * call.layout.words() * height * width;
    device.launch(upsampled_backward<T, Storage>, device.blocks(work, kThreads), kThreads, 0, args,
                  upsample_of<T>(sizes, align_corners), channels_last);
  });
  return grad_input;
}

}  // namespace hem_ext

// The schemas are in hem_ext/upsample.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CUDA, m) {
  m.impl("upsampled_hem_forward", TORCH_BOX(&hem_ext::upsampled_forward_cuda));
  m.impl("upsampled_hem_backward", TORCH_BOX(&hem_ext::upsampled_backward_cuda));
}
