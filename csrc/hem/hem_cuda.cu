// HEM on CUDA: what torch hands over, and which kernel with which grid.
//
// Everything runs on the current stream of the logits' device, allocates through torch's caching allocator
// and never waits for the device: a call can be captured in a CUDA graph.
#include <algorithm>
#include <tuple>

#include "hem_cuda_torch.h"

namespace hem_ext {
namespace {

// --- which kernel ---

constexpr int kItems = 8;  // vectors a thread keeps of a wide row

template <class Storage>
constexpr int kPixelWidth = kVectorWidth<Storage> < 4 ? kVectorWidth<Storage> : 4;

enum class Plan { kNarrowRows, kWarpRows, kBlockRows, kPixels, kScalarPixels, kManyClassPixels };

// Whether kWidth adjacent pixels can be moved at once, everywhere.
bool is_aligned(const void* data, const Layout& layout, int width, size_t element_size) {
  return layout.inner % width == 0 && layout.class_stride % width == 0 &&
         (layout.outer == 1 || layout.outer_stride % width == 0) &&
         reinterpret_cast<uintptr_t>(data) % (width * element_size) == 0;
}

// A block's threads for a wide row: as few as keep all of it in registers.
template <class Storage>
int block_row_threads(int64_t classes) {
  int threads = 64;
  while (threads < kBlockRowThreads && int64_t{threads} * kItems * kVectorWidth<Storage> < classes)
    threads *= 2;
  return threads;
}

// Bytes of shared memory of a forward kernel on wide rows, `teams` rows a block.
template <class Storage>
size_t wide_shared_bytes(int64_t classes, int team, int teams) {
  return 64 * sizeof(double) +
         teams * wide_row_words(classes, kVectorWidth<Storage>, team) * sizeof(uint32_t);
}

template <class Storage>
Plan plan(const Layout& layout, const void* data) {
  const int64_t classes = layout.classes;
  if (layout.rows) {
    if (classes <= kNarrowClasses) return Plan::kNarrowRows;
    if (classes <= int64_t{kWarp} * kItems * kVectorWidth<Storage>) return Plan::kWarpRows;
    const size_t shared = wide_shared_bytes<Storage>(classes, kBlockRowThreads, 1);
    return shared <= 160 * 1024 ? Plan::kBlockRows : Plan::kManyClassPixels;
  }
  constexpr int kWidth = kPixelWidth<Storage>;
  if (classes <= pixel_max_classes(kWidth) && is_aligned(data, layout, kWidth, sizeof(Storage)))
    return Plan::kPixels;
  return classes <= pixel_max_classes(1) ? Plan::kScalarPixels : Plan::kManyClassPixels;
}

// Rows of millions of classes are images of one pixel: the mask lies alike.
Layout as_pixels(Layout layout) {
  if (!layout.rows) return layout;
  return {false, layout.inner, layout.classes, 1, layout.inner_stride, 1, 1};
}

template <class T, class Storage>
unsigned run_forward(const Device& device, CudaForwardArgs<T>& a) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, rows = layout.inner;
  const size_t tally = 2 * sizeof(double) * (1024 / kWarp);
  auto launch = [&](auto kernel, unsigned blocks, int threads, size_t shared) {
    device.launch(kernel, blocks, threads, std::max(shared, tally), a);
    return blocks;
  };
  auto pixels = [&](auto kernel, int width) {
    const int groups = pixel_groups(classes);
    const int units = std::max(1, kThreads / (kWarp * groups)), threads = kWarp * groups * units;
    const int64_t work = layout.outer * pixel_units_per_image(layout.inner, width);
    return launch(kernel, device.blocks(work, units), threads, pixel_shared_bytes<T>(threads, width));
  };
  constexpr int kWidth = kVectorWidth<Storage>;
  switch (plan<Storage>(layout, a.input)) {
    case Plan::kNarrowRows:
      return launch(hem_forward_narrow_rows<T, Storage>, device.blocks(rows, kNarrowRows), kNarrowRows,
                    narrow_shared_bytes<Storage>(classes));
    case Plan::kWarpRows: {
      constexpr int kTeams = kThreads / kWarp;
      return launch(hem_forward_wide_rows<T, Storage, true, kItems, kWidth>, device.blocks(rows, kTeams),
                    kThreads, wide_shared_bytes<Storage>(classes, kWarp, kTeams));
    }
    case Plan::kBlockRows: {
      const int threads = block_row_threads<Storage>(classes);
      return launch(hem_forward_wide_rows<T, Storage, false, kItems, kWidth>, device.blocks(rows, 1), threads,
                    wide_shared_bytes<Storage>(classes, threads, 1));
    }
    case Plan::kPixels:
      return pixels(hem_forward_pixels<T, Storage, kPixelWidth<Storage>>, kPixelWidth<Storage>);
    case Plan::kScalarPixels: return pixels(hem_forward_pixels<T, Storage, 1>, 1);
    case Plan::kManyClassPixels: break;
  }
  a.layout = as_pixels(layout);
  return launch(hem_forward_many_class_pixels<T, Storage>, device.blocks(a.layout.positions(), kThreads),
                kThreads, 0);
}

template <class T, class Storage>
void run_backward(const Device& device, CudaBackwardArgs<T>& a) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, rows = layout.inner;
  constexpr int kWidth = kVectorWidth<Storage>;
  const size_t team = kWarp * sizeof(int);
  auto pixels = [&](auto kernel, int width, int64_t per_thread) {
    const int64_t groups = (classes + per_thread - 1) / per_thread;
    const int64_t warps = a.layout.outer * pixel_units_per_image(a.layout.inner, width) * groups;
    device.launch(kernel, device.blocks(warps, kThreads / kWarp), kThreads, 0, a, per_thread);
  };
  switch (plan<Storage>(layout, a.grad_input)) {
    case Plan::kNarrowRows:
      return device.launch(hem_backward_narrow_rows<T, Storage>, device.blocks(rows, kNarrowRows),
                           kNarrowRows, narrow_shared_bytes<Storage>(classes), a);
    case Plan::kWarpRows:
      return device.launch(hem_backward_wide_rows<T, Storage, true, kWidth>,
                           device.blocks(rows, kThreads / kWarp), kThreads, team, a);
    case Plan::kBlockRows:
      return device.launch(hem_backward_wide_rows<T, Storage, false, kWidth>, device.blocks(rows, 1),
                           block_row_threads<Storage>(classes), team, a);
    case Plan::kPixels:
      return pixels(hem_backward_pixels<T, Storage, kPixelWidth<Storage>>, kPixelWidth<Storage>,
                    int64_t{kClassesPerThread});
    case Plan::kScalarPixels:
      return pixels(hem_backward_pixels<T, Storage, 1>, 1, int64_t{kClassesPerThread});
    case Plan::kManyClassPixels: break;
  }
  a.layout = as_pixels(layout);
  pixels(hem_backward_pixels<T, Storage, 1>, 1, classes);
}

void write_gradient(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                    const Tensor& target, const std::optional<Tensor>& weight, const Tensor& denominator,
                    int64_t ignore_index, int64_t reduction_code, bool rows) {
  const BackwardCall call =
      backward_call(grad_input, grad_loss, mask, target, weight, denominator, reduction_code, rows);
  write_gradient(call, grad_input, mask, weight, denominator, ignore_index, all_classes(call.layout));
}

}  // namespace

void write_gradient(const BackwardCall& call, const Tensor& grad_input, const Tensor& mask,
                    const std::optional<Tensor>& weight, const Tensor& denominator, int64_t ignore_index,
                    const ClassRange& range) {
  if (grad_input.numel() == 0) return;
  const Device device(mask);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    auto args = backward_args<T>(call, grad_input, mask, weight, denominator, ignore_index);
    args.range = range;
    run_backward<T, Storage>(device, args);
  });
}

std::tuple<Tensor, Tensor, Tensor> hem_forward_cuda(const Tensor& input, const Tensor& target,
                                                    const std::optional<Tensor>& margins, double margin,
                                                    const std::optional<Tensor>& weight, int64_t ignore_index,
                                                    int64_t reduction_code, bool rows) {
  const ForwardCall call = forward_call(input, target, margins, weight, reduction_code, rows);
  const Device device(input);
  with_storage(call.type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = Arithmetic<Storage>;
    auto args = forward_args<T>(call, input, margins, margin, weight, ignore_index);
    forward_and_reduce(device, call, &args, input, [&] { return run_forward<T, Storage>(device, args); });
  });
  return {call.loss, call.mask, call.denominator};
}

Tensor hem_backward_cuda(const Tensor& grad_loss, const Tensor& mask, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& denominator, int64_t ignore_index,
                         int64_t classes, int64_t input_type_code, int64_t reduction_code, bool rows) {
  const Tensor grad_input = empty_gradient(target, mask, classes, input_type_code, rows);
  write_gradient(grad_input, grad_loss, mask, target, weight, denominator, ignore_index, reduction_code,
                 rows);
  return grad_input;
}

void hem_backward_into_cuda(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                            const Tensor& target, const std::optional<Tensor>& weight,
                            const Tensor& denominator, int64_t ignore_index, int64_t reduction_code,
                            bool rows) {
  check_has_no_gaps(grad_input, rows);
  write_gradient(grad_input, grad_loss, mask, target, weight, denominator, ignore_index, reduction_code,
                 rows);
}

}  // namespace hem_ext

// The schemas are in hem_ext/hem.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CUDA, m) {
  m.impl("hem_forward", TORCH_BOX(&hem_ext::hem_forward_cuda));
  m.impl("hem_backward", TORCH_BOX(&hem_ext::hem_backward_cuda));
  m.impl("hem_backward_into", TORCH_BOX(&hem_ext::hem_backward_into_cuda));
}
