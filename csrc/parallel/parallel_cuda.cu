// class_parallel_hem_loss on CUDA: what torch hands over, and the grids. As hem_cuda.cu it never waits for
// the device.
#include <tuple>

#include "../hem/hem_cuda_torch.h"
#include "parallel_cuda_kernels.cuh"
#include "parallel_torch.h"

namespace hem_ext {
namespace {

template <class T>
CudaParallelArgs<T> parallel_args(const ParallelCall& call, const Tensor& input, const Tensor& target_logits,
                                  const std::optional<Tensor>& margins, double margin, int64_t ignore_index,
                                  const Tensor& errors) {
  CudaParallelArgs<T> args{};
  args.hem.layout = call.layout;
  args.hem.input = data_of("input", input);
  args.hem.target = data_of("target", call.target);
  args.hem.target_type = target_type(call.target.scalar_type());
  args.hem.ignore_index = ignore_index;
  args.hem.margins = static_cast<const T*>(data_or_null("margin", margins));
  args.hem.margin = static_cast<T>(margin);
  args.classes = call.classes;
  args.first = call.first;
  args.target_logits = static_cast<const T*>(data_of("target_logits", target_logits));
  args.errors = static_cast<T*>(errors.mutable_data_ptr());
  return args;
}

// A block a row where a warp would go over it many times, `of_rows(true)` being the kernel of the latter.
template <class T, class OfRows, class OfPixels>
void run_forward(const Device& device, const CudaParallelArgs<T>& args, const OfRows& of_rows,
                 const OfPixels& of_pixels) {
  const Layout& layout = args.hem.layout;
  if (layout.positions() == 0) return;
  const size_t shared = kWarp * sizeof(T);
  if (!layout.rows) {
    device.launch(of_pixels, device.blocks(layout.positions(), kThreads), kThreads, 0, args);
  } else if (layout.classes <= 1024) {
    device.launch(of_rows(std::true_type{}), device.blocks(layout.inner, kThreads / kWarp), kThreads, shared,
                  args);
  } else {
    device.launch(of_rows(std::false_type{}), device.blocks(layout.inner, 1), kThreads, shared, args);
  }
}

}  // namespace

Tensor parallel_errors_cuda(const Tensor& input, const Tensor& target, const Tensor& target_logits,
                            const std::optional<Tensor>& margins, double margin, int64_t ignore_index,
                            int64_t classes, int64_t first, bool rows) {
  const ParallelCall call = parallel_call(input, target, target_logits, margins, classes, first, rows);
  const Tensor errors = empty_pairs(call, input);
  const Device device(input);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    const auto args = parallel_args<T>(call, input, target_logits, margins, margin, ignore_index, errors);
    run_forward(
        device, args, [](auto is_warp) { return parallel_errors_rows<T, Storage, decltype(is_warp)::value>; },
        parallel_errors_pixels<T, Storage>);
  });
  return errors;
}

std::tuple<Tensor, Tensor> parallel_keep_cuda(const Tensor& input, const Tensor& target,
                                              const Tensor& target_logits, const Tensor& errors,
                                              const std::optional<Tensor>& margins, double margin,
                                              int64_t ignore_index, int64_t classes, int64_t first,
                                              bool rows) {
  const ParallelCall call = parallel_call(input, target, target_logits, margins, classes, first, rows);
  check_per_sample("errors", errors, 2, call, input);
  const Tensor mask = empty(mask_sizes(call.layout), ScalarType::Int, input), kept = empty_pairs(call, input);
  const Device device(input);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    auto args = parallel_args<T>(call, input, target_logits, margins, margin, ignore_index, errors);
    args.hem.mask = static_cast<uint32_t*>(mask.mutable_data_ptr());
    args.kept = static_cast<T*>(kept.mutable_data_ptr());
    run_forward(
        device, args, [](auto is_warp) { return parallel_keep_rows<T, Storage, decltype(is_warp)::value>; },
        parallel_keep_pixels<T, Storage>);
  });
  return {mask, kept};
}

Tensor parallel_backward_cuda(const Tensor& grad_loss, const Tensor& mask, const Tensor& counts,
                              const Tensor& target, int64_t ignore_index, int64_t classes, int64_t first,
                              int64_t here, int64_t input_type_code, bool rows) {
  const ParallelBackwardCall call =
      parallel_backward_call(grad_loss, mask, counts, target, classes, first, here, input_type_code, rows);
  write_gradient(call.hem, call.grad_input, mask, std::nullopt, call.denominator, ignore_index, call.range);
  return call.grad_input;
}

}  // namespace hem_ext

// The schemas are in hem_ext/parallel.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CUDA, m) {
  m.impl("class_parallel_hem_errors", TORCH_BOX(&hem_ext::parallel_errors_cuda));
  m.impl("class_parallel_hem_keep", TORCH_BOX(&hem_ext::parallel_keep_cuda));
  m.impl("class_parallel_hem_backward", TORCH_BOX(&hem_ext::parallel_backward_cuda));
}
