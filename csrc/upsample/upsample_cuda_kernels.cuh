// The CUDA kernels of upsampled_hem_loss. No torch and no launches in here: upsample_cuda.cu launches them,
// tests/emulation runs them on the host.
//
//   forward   a thread a pixel: each of its logits is made of four, which its neighbours read as well and
//   caches hold,
//             once for the mean of the errors and, where there are any, once more to keep those above it
//   backward  a thread a position of the input and 32 classes, a word of the mask: it adds up, in order, what
//   the pixels
//             that the position touches have for it. No two threads write to one place.
#pragma once

#include <cmath>

#include "../hem/hem_cuda_kernels.cuh"

namespace hem_ext {

#include "upsample_math.h"

template <class T>
struct CudaUpsample {
  Resize<T> rows, columns;
};

template <class T, class Storage>
__global__ void upsampled_forward_pixels(CudaForwardArgs<T> a, CudaUpsample<T> upsample) {
  HEM_DYNAMIC_SHARED(shared);
  const int64_t pixels = a.layout.inner, width = upsample.columns.out, in_width = upsample.columns.in;
  const int64_t plane = upsample.rows.in * in_width;
  Tally<T> tally;
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       position < a.layout.positions(); position += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t image = position / pixels, pixel = position % pixels;
    const Source<T> row = upsample.rows.source(pixel / width),
                    column = upsample.columns.source(pixel % width);
    const Storage* from = static_cast<const Storage*>(a.input) + image * a.layout.classes * plane +
                          row.index * in_width + column.index;
    const int64_t below = row.index + 1 < upsample.rows.in ? upsample.rows.step() * in_width : 0;
    const int64_t right = column.index + 1 < in_width ? upsample.columns.step() : 0;
    solve_pixel(
        a, position,
        [&](int64_t j) {
          const Storage* at = from + j * plane;
          const T above_weight = T(1) - row.weight, left_weight = T(1) - column.weight;
          const T left_value = above_weight * widen(at[0]) + row.weight * widen(at[below]);
          const T right_value = above_weight * widen(at[right]) + row.weight * widen(at[below + right]);
          return left_weight * left_value + column.weight * right_value;
        },
        &tally);
  }
  tally.write(a.partials, reinterpret_cast<double*>(shared));
}

// What input k, one of the two of an output, has of it: the last one stands for that behind it as well.
template <class T>
__device__ __forceinline__ T share_of(const Source<T>& source, int64_t k, int64_t in) {
  if (source.index != k) return source.weight;
  return k == in - 1 ? T(1) : T(1) - source.weight;
}

// `a.grad_input` is [A, C, rows.in, columns.in], or with classes innermost [A, rows.in, columns.in, C].
template <class T, class Storage>
__global__ void __launch_bounds__(256)
    upsampled_backward(CudaBackwardArgs<T> a, CudaUpsample<T> upsample, bool classes_innermost) {
  const int64_t classes = a.layout.classes, pixels = a.layout.inner, num_words = a.layout.words();
  const int64_t in_height = upsample.rows.in, in_width = upsample.columns.in, width = upsample.columns.out;
  const int64_t count = a.layout.outer * num_words * in_height * in_width;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t k = n % in_width, i = n / in_width % in_height;
    const int64_t w = n / in_width / in_height % num_words, image = n / in_width / in_height / num_words;
    const uint32_t* words = a.mask + image * num_words * pixels;
    T sums[32];
#pragma unroll
    for (int b = 0; b < 32; ++b) sums[b] = T(0);

    const Footprint rows = upsample.rows.footprint(i), columns = upsample.columns.footprint(k);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const Source<T> row = upsample.rows.source(y);
      if (row.index != i && row.index + upsample.rows.step() != i) continue;
      const T row_weight = share_of(row, i, in_height);
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        const Source<T> column = upsample.columns.source(x);
        if (column.index != k && column.index + upsample.columns.step() != k) continue;
        const int64_t pixel = y * width + x, position = image * pixels + pixel;
        int kept = 0;
        for (int64_t v = 0; v < num_words; ++v) kept += __popc(words[v * pixels + pixel]);
        if (kept == 0) continue;
        const auto c = coefficients<T, T>(a, position, kept);
        const uint32_t word = words[w * pixels + pixel];
        const int target_bit = c.own / 32 == w && c.own >= 0 ? static_cast<int>(c.own % 32) : -1;
        if (word == 0 && target_bit < 0) continue;
        const T weight = row_weight * share_of(column, k, in_width);
        const T kept_value = weight * c.kept, target_value = weight * c.target;
#pragma unroll
        for (int b = 0; b < 32; ++b) {
          if (b == target_bit) {
            sums[b] += target_value;
          } else if ((word >> b) & 1u) {
            sums[b] += kept_value;
          }
        }
      }
    }

    Storage* out = static_cast<Storage*>(a.grad_input) + image * classes * in_height * in_width;
    const int64_t at = i * in_width + k;
#pragma unroll
    for (int b = 0; b < 32; ++b) {
      const int64_t j = 32 * w + b;
      if (j < classes) {
        out[classes_innermost ? at * classes + j : j * in_height * in_width + at] =
            Narrow<Storage>::from(sums[b]);
      }
    }
  }
}

}  // namespace hem_ext
