// How a call of upsampled_hem_loss is cut into pieces for the CPU kernels, and what it hands them of its
// axes. No torch here.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "upsample_cpu_kernels.h"
#include "upsample_layout.h"

namespace hem_ext {

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
void with_axes(const UpsampledSizes& s, bool is_double, bool align_corners, const F& f) {
  auto run = [&](auto t) {
    using T = decltype(t);
    const AxisTables<T> rows(s.in_rows, s.rows, align_corners),
        columns(s.in_columns, s.columns, align_corners);
    f(rows.axis, columns.axis);
  };
  if (is_double) {
    run(double{});
  } else {
    run(float{});
  }
}

// Inputs that the columns of a block touch, at most.
inline int64_t span_of(const Axis& columns, int64_t block) {
  int64_t span = 0;
  for (int64_t x = 0; x < columns.out; x += block) {
    const int64_t last = std::min(x + block, columns.out) - 1;
    span = std::max<int64_t>(span, columns.index[last] - columns.index[x] + 2);
  }
  return span;
}

// Pixels a block: depends on the shape alone, and so do the partial sums.
inline int64_t block_size(const UpsampledSizes& s) {
  constexpr int64_t kScratch = 64 * 1024;  // blended logits a block: 256 KiB of float32
  int64_t block = std::min<int64_t>((s.columns + 15) / 16 * 16, kMaxBlock);
  while (block > 16 && (block * s.in_columns / s.columns + 2) * s.classes > kScratch) block = block / 32 * 16;
  return block;
}
inline int64_t num_blocks(const UpsampledSizes& s, int64_t block) {
  return s.images * s.rows * ((s.columns + block - 1) / block);
}

// Rows of the input a piece of backward: a piece computes one more, which is not its own.
inline int64_t band_size(const UpsampledSizes& s) {
  constexpr int64_t kPieces = 32;
  return std::clamp<int64_t>(s.images * s.in_rows / kPieces, 4, 32);
}
inline int64_t bands_per_image(const UpsampledSizes& s, int64_t band) {
  return (s.in_rows + band - 1) / band;
}

}  // namespace hem_ext
