// class_parallel_hem_loss on the CPU: what torch hands over, checked and cut into blocks for the kernels.
#include <tuple>

#include "../hem/hem_cpu_torch.h"
#include "parallel_cpu_kernels.h"
#include "parallel_torch.h"

namespace hem_ext {
namespace {

ParallelForwardArgs parallel_args(const ParallelCall& call, const Tensor& input, const Tensor& target_logits,
                                  const std::optional<Tensor>& margins, double margin, int64_t ignore_index,
                                  const Tensor& errors) {
  const int64_t positions = call.layout.positions();
  ParallelForwardArgs args{};
  args.hem.layout = call.layout;
  args.hem.input = data_of("input", input, extent_of(call.layout));
  args.hem.targets = {data_of("target", call.target, positions), target_type(call.target.scalar_type()),
                      ignore_index};
  args.hem.margins = data_or_null("margin", margins);
  args.hem.margin = margin;
  args.hem.block = block_size(call.layout);
  args.classes = call.classes;
  args.first = call.first;
  args.target_logits = data_of("target_logits", target_logits, positions);
  char* sums = static_cast<char*>(errors.mutable_data_ptr());
  args.error_sum = sums;
  args.largest = sums + positions * errors.element_size();
  return args;
}

void run_blocks(ParallelForwardKernel kernel, const ParallelForwardArgs& args) {
  for_each_block(num_blocks(args.hem.layout, args.hem.block), args.hem.block * args.hem.layout.classes,
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

Tensor parallel_errors_cpu(const Tensor& input, const Tensor& target, const Tensor& target_logits,
                           const std::optional<Tensor>& margins, double margin, int64_t ignore_index,
                           int64_t classes, int64_t first, bool rows) {
  const ParallelCall call = parallel_call(input, target, target_logits, margins, classes, first, rows);
  const Tensor errors = empty_pairs(call, input);
  run_blocks(HEM_SELECTED(parallel_kernels).errors[static_cast<int>(call.type)],
             parallel_args(call, input, target_logits, margins, margin, ignore_index, errors));
  return errors;
}

std::tuple<Tensor, Tensor> parallel_keep_cpu(const Tensor& input, const Tensor& target,
                                             const Tensor& target_logits, const Tensor& errors,
                                             const std::optional<Tensor>& margins, double margin,
                                             int64_t ignore_index, int64_t classes, int64_t first,
                                             bool rows) {
  const ParallelCall call = parallel_call(input, target, target_logits, margins, classes, first, rows);
  check_per_sample("errors", errors, 2, call, input);
  const Tensor mask = empty(mask_sizes(call.layout), ScalarType::Int, input), kept = empty_pairs(call, input);
  ParallelForwardArgs args = parallel_args(call, input, target_logits, margins, margin, ignore_index, errors);
  args.hem.mask = static_cast<int32_t*>(mask.mutable_data_ptr());
  char* sums = static_cast<char*>(kept.mutable_data_ptr());
  args.kept_sum = sums;
  args.kept_count = sums + call.layout.positions() * kept.element_size();
  run_blocks(HEM_SELECTED(parallel_kernels).keep[static_cast<int>(call.type)], args);
  return {mask, kept};
}

Tensor parallel_backward_cpu(const Tensor& grad_loss, const Tensor& mask, const Tensor& counts,
                             const Tensor& target, int64_t ignore_index, int64_t classes, int64_t first,
                             int64_t here, int64_t input_type_code, bool rows) {
  const ParallelBackwardCall call =
      parallel_backward_call(grad_loss, mask, counts, target, classes, first, here, input_type_code, rows);
  advise_huge_pages(call.grad_input);
  BackwardArgs args =
      backward_args(call.hem, call.grad_input, mask, std::nullopt, call.denominator, ignore_index);
  args.range = call.range;
  args.streamed = is_streamed(call.grad_input, call.hem.layout);
  run_backward(args, call.hem.type);
  return call.grad_input;
}

}  // namespace hem_ext

// The schemas are in hem_ext/parallel.py.
STABLE_TORCH_LIBRARY_IMPL(hem_ext, CPU, m) {
  m.impl("class_parallel_hem_errors", TORCH_BOX(&hem_ext::parallel_errors_cpu));
  m.impl("class_parallel_hem_keep", TORCH_BOX(&hem_ext::parallel_keep_cpu));
  m.impl("class_parallel_hem_backward", TORCH_BOX(&hem_ext::parallel_backward_cpu));
}
