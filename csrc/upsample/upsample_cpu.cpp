// upsampled_hem_loss on the CPU: what torch hands over, checked and cut into pieces for the kernels.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "../hem/hem_cpu_torch.h"
#include "upsample_cpu_kernels.h"
#include "upsample_torch.h"

namespace hem_ext {
namespace {

#include "upsample_math.h"

// What an Axis points to.
template <class T>
struct AxisTables {
  std::vector<int32_t> index;
  std::vector<T> weight;
  Axis axis;

  AxisTables(int64_t in, int64_t out, bool align_corners) {
    const Resize<T> resize{in, out, align_corners};
    const int64_t padded = (out + 15) / 16 * 16;
    bool enlarges = true;
    for (int64_t i = 0; i < padded; ++i) {
      const Source<T> source = resize.source(std::min(i, out - 1));
      enlarges &= i == 0 || source.index - index.back() <= 1;
      index.push_back(static_cast<int32_t>(source.index));
      weight.push_back(source.weight);
    }
    axis = {in, out, index.data(), weight.data(), enlarges};
  }
};

// f with the tables of rows and columns, of the arithmetic's type.
template <class F>
void with_axes(const UpsampledSizes& s, ScalarType arithmetic, bool align_corners, const F& f) {
  auto run = [&](auto t) {
    using T = decltype(t);
    const AxisTables<T> rows(s.in_rows, s.rows, align_corners),
        columns(s.in_columns, s.columns, align_corners);
    f(rows.axis, columns.axis);
  };
  if (arithmetic == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

// Inputs that the columns of a block touch, at most.
int64_t span_of(const Axis& columns, int64_t block) {
  int64_t span = 0;
  for (int64_t x = 0; x < columns.out; x += block) {
    const int64_t last = std::min(x + block, columns.out) - 1;
    span = std::max<int64_t>(span, columns.index[last] - columns.index[x] + 2);
  }
  return span;
}

// Pixels a block: depends on the shape alone, and so do the partial sums.
int64_t block_size(const UpsampledSizes& s) {
  constexpr int64_t kScratch = 64 * 1024;  // blended logits a block: 256 KiB of float32
  int64_t block = std::min<int64_t>((s.columns + 15) / 16 * 16, kMaxBlock);
  while (block > 16 && (block * s.in_columns / s.columns + 2) * s.classes > kScratch) block = block / 32 * 16;
  return block;
}

// Rows of the input a piece of backward: a piece computes one more, which is not its own.
int64_t band_size(const UpsampledSizes& s) {
  constexpr int64_t kPieces = 32;
  return std::clamp<int64_t>(s.images * s.in_rows / kPieces, 4, 32);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> upsampled_forward_cpu(const Tensor& input, const Tensor& target,
                                                         const std::optional<Tensor>& margins, double margin,
                                                         const std::optional<Tensor>& weight,
                                                         int64_t ignore_index, int64_t reduction_code,
                                                         bool align_corners) {
  const UpsampledSizes sizes = upsampled_sizes(sizes_of(input), target);
  const ForwardCall call = upsampled_forward_call(sizes, input, target, margins, weight, reduction_code);
  UpsampledForwardArgs args{};
  args.hem = forward_args(call, input, margins, margin, weight, ignore_index);
  args.hem.block = block_size(sizes);
  const int64_t per_row = (sizes.columns + args.hem.block - 1) / args.hem.block;
  std::vector<Partial> partials(sizes.images * sizes.rows * per_row);
  args.hem.partials = partials.data();
  const auto kernel = HEM_SELECTED(upsampled_kernels).forward[static_cast<int>(call.type)];
  with_axes(sizes, call.arithmetic, align_corners, [&](const Axis& rows, const Axis& columns) {
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
  const int64_t bands = (height + args.band - 1) / args.band;
  const auto kernel = HEM_SELECTED(upsampled_kernels).backward[static_cast<int>(call.type)];
  with_axes(sizes, arithmetic_type(grad_input.scalar_type()), align_corners,
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
