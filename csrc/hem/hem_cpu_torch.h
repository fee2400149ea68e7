// What the CPU glue of every op shares: torch's tensors as the arguments of kernels, blocks on torch's
// threads, and partial sums to the loss.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <limits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/torch_glue.h"
#include "hem_cpu_kernels.h"
#include "hem_torch.h"

// The table of that name of the instruction set in use.
#if HEM_X86_TARGETS
#define HEM_SELECTED(table)                          \
  (selected_isa() == CpuIsa::kAvx512 ? avx512::table \
   : selected_isa() == CpuIsa::kAvx2 ? avx2::table   \
                                     : baseline::table)
#else
#define HEM_SELECTED(table) baseline::table
#endif

namespace hem_ext {

template <class T>
inline void check_class_values(const char* what, const std::optional<Tensor>& values) {
  if (!values.has_value()) return;
  const int64_t count = values->numel();
  const T* v = static_cast<const T*>(data_of(what, *values, count));
  for (int64_t c = 0; c < count; ++c) {
    if (!(v[c] >= 0 && v[c] <= std::numeric_limits<T>::max())) {
      raise<std::invalid_argument>(what, " must be finite and not negative, but ", what, "[", c, "] is ",
                                   v[c]);
    }
  }
}

[[noreturn]] inline void raise_bad_target(const Tensor& target, const Targets& targets, int64_t position,
                                          int64_t classes) {
  int64_t value = 0;
  switch (targets.type) {
    case TargetType::kInt64: value = static_cast<const int64_t*>(targets.data)[position]; break;
    case TargetType::kInt32: value = static_cast<const int32_t*>(targets.data)[position]; break;
    case TargetType::kUInt8: value = static_cast<const uint8_t*>(targets.data)[position]; break;
  }
  std::vector<int64_t> index = sizes_of(target);
  for (size_t d = index.size(); d-- > 0;) {
    const int64_t size = index[d];
    index[d] = position % size;
    position /= size;
  }
  raise<std::out_of_range>("target", to_string(index), " is ", value, ", which is neither a class in [0, ",
                           classes, ") nor ignore_index (", targets.ignore_index, ")");
}

// What a forward call has in common with every other one; raises for a margin or weight that cannot be. Of
// `input` so many elements are read.
inline ForwardArgs forward_args(const ForwardCall& call, const Tensor& input, int64_t extent,
                                const std::optional<Tensor>& margins, double margin,
                                const std::optional<Tensor>& weight, int64_t ignore_index) {
  if (call.arithmetic == ScalarType::Double) {
    check_class_values<double>("margin", margins);
    check_class_values<double>("weight", weight);
  } else {
    check_class_values<float>("margin", margins);
    check_class_values<float>("weight", weight);
  }
  ForwardArgs args{};
  args.layout = call.layout;
  args.input = data_of("input", input, extent);
  args.targets = {data_of("target", call.target, call.layout.positions()),
                  target_type(call.target.scalar_type()), ignore_index};
  args.margins = data_or_null("margin", margins);
  args.margin = margin;
  args.weight = data_or_null("weight", weight);
  args.count_all = call.reduction == Reduction::kBatchMean;
  args.losses = call.per_sample() ? call.loss.mutable_data_ptr() : nullptr;
  args.mask = static_cast<int32_t*>(call.mask.mutable_data_ptr());
  return args;
}

inline BackwardArgs backward_args(const BackwardCall& call, const Tensor& grad_input, const Tensor& mask,
                                  const std::optional<Tensor>& weight, const Tensor& denominator,
                                  int64_t ignore_index) {
  const Layout& layout = call.layout;
  BackwardArgs args{};
  args.layout = layout;
  args.targets = {data_of("target", call.target, layout.positions()), target_type(call.target.scalar_type()),
                  ignore_index};
  args.weight = data_or_null("weight", weight);
  args.grad_loss = data_of("grad_loss", call.grad_loss, call.per_sample ? layout.positions() : 1);
  args.grad_per_sample = call.per_sample;
  args.denominator = data_of("the denominator", denominator, 1);
  args.mask = static_cast<const int32_t*>(data_of("the mask", mask, layout.words() * layout.positions()));
  args.grad_input = grad_input.mutable_data_ptr();
  args.range = all_classes(layout);
  return args;
}

// run(begin, end) for all of `count` pieces of work of so many logits each, on torch's threads.
template <class Run>
void for_each_block(int64_t count, int64_t logits, const Run& run) {
  // Less than this many a thread is not worth waking it for.
  constexpr int64_t kLogitsPerThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(logits, 1));
  if (count <= grain) {
    run(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, run);
  }
}

// Depends on the shape alone: so do the partial sums, whatever the number of threads.
inline int64_t block_size(const Layout& layout) {
  constexpr int64_t kScratch = 64 * 1024;  // errors a block: 256 KiB of float32, half an L2 cache
  const int64_t fitting = kScratch / layout.classes / 16 * 16;
  const int64_t present = (layout.inner + 15) / 16 * 16;
  return std::clamp<int64_t>(std::min(fitting, present), 16, kMaxBlock);
}

// Fresh pages cost more than the gradient's values: ask for large ones before the first touch.
inline void advise_huge_pages(const Tensor& gradient) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const void* data = gradient.mutable_data_ptr();
  const int64_t bytes = gradient.numel() * static_cast<int64_t>(gradient.element_size());
  if (bytes < int64_t{2} * int64_t{kHuge}) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#else
  (void)gradient;
#endif
}

// What no cache holds until it is read again need not be read before it is written.
inline bool is_streamed(const Tensor& grad_input, const Layout& layout) {
  constexpr int64_t kFewest = 16 << 20;  // bytes
  constexpr int64_t kLine = 64;
  const int64_t size = static_cast<int64_t>(grad_input.element_size());
  const auto lies_well = [&](int64_t stride) { return stride * size % kLine == 0; };
  const bool in_lines = lies_well(layout.class_stride) && lies_well(layout.outer_stride) &&
                        reinterpret_cast<uintptr_t>(grad_input.const_data_ptr()) % kLine == 0;
  return grad_input.numel() * size >= kFewest && (layout.rows || in_lines);  // of rows those that are 0
}

inline void run_backward(BackwardArgs& args, InputType type) {
  args.block = block_size(args.layout);
  args.by_line = args.streamed && writes_lines_faster();
  const BackwardKernel kernel = HEM_SELECTED(kernels).backward[static_cast<int>(type)];
  for_each_block(num_blocks(args.layout, args.block), args.block * args.layout.classes,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class T>
void reduce(const std::vector<Partial>& partials, const ForwardCall& call) {
  Partial total{0, 0, -1};
  for (const Partial& p : partials) {
    total.loss += p.loss;
    total.weight += p.weight;
  }
  T* denominator = static_cast<T*>(call.denominator.mutable_data_ptr());
  *denominator = call.divides() ? static_cast<T>(total.weight) : T(1);
  if (call.per_sample()) return;
  // Nothing counted: the sum is 0, or NaN where the only losses are.
  T* loss = static_cast<T*>(call.loss.mutable_data_ptr());
  *loss = static_cast<T>(call.divides() && total.weight > 0 ? total.loss / total.weight : total.loss);
}

// Raises for a target that is none, else writes the loss and what it was divided by.
inline void finish_forward(const ForwardCall& call, const ForwardArgs& args, const Tensor& target,
                           const std::vector<Partial>& partials) {
  for (const Partial& p : partials) {
    if (p.bad_target >= 0) raise_bad_target(target, args.targets, p.bad_target, call.layout.classes);
  }
  if (call.arithmetic == ScalarType::Double) {
    reduce<double>(partials, call);
  } else {
    reduce<float>(partials, call);
  }
}

}  // namespace hem_ext
