// HEM on the CPU: what torch hands over, checked and cut into blocks for the kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <limits>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/torch_glue.h"
#include "hem_cpu_kernels.h"
#include "hem_torch.h"

namespace hem_ext {
namespace {

// Less than this many logits a thread is not worth waking it for.
constexpr int64_t kLogitsPerThread = 32768;

const CpuKernels& selected_kernels() {
#if HEM_X86_TARGETS
  switch (selected_isa()) {
    case CpuIsa::kAvx512: return avx512::kernels;
    case CpuIsa::kAvx2: return avx2::kernels;
    case CpuIsa::kBaseline: break;
  }
#endif
  return baseline::kernels;
}

// Depends on the shape alone: so do the partial sums, whatever the number of threads.
int64_t block_size(const Layout& layout) {
  constexpr int64_t kScratch = 64 * 1024;  // errors a block: 256 KiB of float32, half an L2 cache
  const int64_t fitting = kScratch / layout.classes / 16 * 16;
  const int64_t present = (layout.inner + 15) / 16 * 16;
  return std::clamp<int64_t>(std::min(fitting, present), 16, kMaxBlock);
}

template <class Run>
void for_each_block(const Layout& layout, int64_t block, const Run& run) {
  const int64_t blocks = num_blocks(layout, block);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / (block * layout.classes));
  if (blocks <= grain) {
    run(0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, grain, run);
  }
}

template <class T>
void check_class_values(const char* what, const std::optional<Tensor>& values) {
  if (!values.has_value()) return;
  const T* v = static_cast<const T*>(values->const_data_ptr());
  for (int64_t c = 0; c < values->numel(); ++c) {
    if (!(v[c] >= 0 && v[c] <= std::numeric_limits<T>::max())) {
      raise<std::invalid_argument>(what, " must be finite and not negative, but ", what, "[", c, "] is ",
                                   v[c]);
    }
  }
}

[[noreturn]] void raise_bad_target(const Tensor& target, const Targets& targets, int64_t position,
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
  raise<std::out_of_range>("target", to_string(index.data(), index.size()), " is ", value,
                           ", which is neither a class in [0, ", classes, ") nor ignore_index (",
                           targets.ignore_index, ")");
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

void write_gradient(const Tensor& grad_input, const Tensor& grad_loss, const Tensor& mask,
                    const Tensor& target, const std::optional<Tensor>& weight, const Tensor& denominator,
                    int64_t ignore_index, int64_t reduction_code, bool rows) {
  const BackwardCall call =
      backward_call(grad_input, grad_loss, mask, target, weight, denominator, reduction_code, rows);
  BackwardArgs args{};
  args.layout = call.layout;
  args.targets = {call.target.const_data_ptr(), target_type(call.target.scalar_type()), ignore_index};
  args.weight = data_or_null(weight);
  args.grad_loss = call.grad_loss.const_data_ptr();
  args.grad_per_sample = call.per_sample;
  args.denominator = denominator.const_data_ptr();
  args.mask = static_cast<const int32_t*>(mask.const_data_ptr());
  args.block = block_size(call.layout);
  args.grad_input = grad_input.mutable_data_ptr();
  const BackwardKernel kernel = selected_kernels().backward[static_cast<int>(call.type)];
  for_each_block(call.layout, args.block, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> hem_forward_cpu(const Tensor& input, const Tensor& target,
                                                   const std::optional<Tensor>& margins, double margin,
                                                   const std::optional<Tensor>& weight, int64_t ignore_index,
                                                   int64_t reduction_code, bool rows) {
  const ForwardCall call = forward_call(input, target, margins, weight, reduction_code, rows);
  if (call.arithmetic == ScalarType::Double) {
    check_class_values<double>("margin", margins);
    check_class_values<double>("weight", weight);
  } else {
    check_class_values<float>("margin", margins);
    check_class_values<float>("weight", weight);
  }

  const int64_t block = block_size(call.layout);
  std::vector<Partial> partials(num_blocks(call.layout, block));
  ForwardArgs args{};
  args.layout = call.layout;
  args.input = input.const_data_ptr();
  args.targets = {call.target.const_data_ptr(), target_type(call.target.scalar_type()), ignore_index};
  args.margins = data_or_null(margins);
  args.margin = margin;
  args.weight = data_or_null(weight);
  args.count_all = call.reduction == Reduction::kBatchMean;
  args.block = block;
  args.losses = call.per_sample() ? call.loss.mutable_data_ptr() : nullptr;
  args.mask = static_cast<int32_t*>(call.mask.mutable_data_ptr());
  args.partials = partials.data();
  const ForwardKernel kernel = selected_kernels().forward[static_cast<int>(call.type)];
  for_each_block(call.layout, block, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  for (const Partial& p : partials) {
    if (p.bad_target >= 0) raise_bad_target(target, args.targets, p.bad_target, call.layout.classes);
  }
  if (call.arithmetic == ScalarType::Double) {
    reduce<double>(partials, call);
  } else {
    reduce<float>(partials, call);
  }
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
  write_gradient(grad_input, grad_loss, mask, target, weight, denominator, ignore_index, reduction_code,
                 rows);
}

}  // namespace hem_ext

// The schemas are in hem_ext/hem.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CPU, m) {
  m.impl("hem_forward", TORCH_BOX(&hem_ext::hem_forward_cpu));
  m.impl("hem_backward", TORCH_BOX(&hem_ext::hem_backward_cpu));
  m.impl("hem_backward_into", TORCH_BOX(&hem_ext::hem_backward_into_cpu));
}
