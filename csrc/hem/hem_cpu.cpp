// HEM on the CPU: what torch hands over, checked and cut into blocks for the kernels.
#include <algorithm>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "hem_cpu_torch.h"

namespace hem_ext {
namespace {

// Depends on the shape alone: so do the partial sums, whatever the number of threads.
int64_t block_size(const Layout& layout) {
  constexpr int64_t kScratch = 64 * 1024;  // errors a block: 256 KiB of float32, half an L2 cache
  const int64_t fitting = kScratch / layout.classes / 16 * 16;
  const int64_t present = (layout.inner + 15) / 16 * 16;
  return std::clamp<int64_t>(std::min(fitting, present), 16, kMaxBlock);
}

// Fresh pages cost more than the gradient's values: ask for large ones before the first touch.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < int64_t{2} * int64_t{kHuge}) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#else
  (void)data;
  (void)bytes;
#endif
}

// What no cache holds until it is read again need not be read before it is written.
bool is_streamed(const Tensor& grad_input, const Layout& layout) {
  constexpr int64_t kFewest = 16 << 20;  // bytes
  constexpr int64_t kLine = 64;
  const int64_t size = static_cast<int64_t>(grad_input.element_size());
  const auto lies_well = [&](int64_t stride) { return stride * size % kLine == 0; };
  const bool in_lines = lies_well(layout.class_stride) && lies_well(layout.outer_stride) &&
                        reinterpret_cast<uintptr_t>(grad_input.const_data_ptr()) % kLine == 0;
  return grad_input.numel() * size >= kFewest && (layout.rows || in_lines);  // of rows those that are 0
}

void run_backward(BackwardArgs& args, InputType type) {
  args.block = block_size(args.layout);
  const BackwardKernel kernel = HEM_SELECTED(kernels).backward[static_cast<int>(type)];
  for_each_block(num_blocks(args.layout, args.block), args.block * args.layout.classes,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

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
  advise_huge_pages(grad_input.mutable_data_ptr(),
                    grad_input.numel() * static_cast<int64_t>(grad_input.element_size()));
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
  const ClassRange range{first, classes, static_cast<const int32_t*>(data_of("counts", counts))};
  args.layout = layout;
  args.range = &range;
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
