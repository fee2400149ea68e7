// The sizes of a call of upsampled_hem_loss. Shared by every device; no torch here.
#pragma once

#include <vector>

#include "../hem/hem_layout.h"

namespace hem_ext {

// Logits (N, C, h, w), contiguous; the loss is of them at (N, C, H, W), which exist nowhere.
struct UpsampledSizes {
  int64_t images, classes, in_rows, in_columns, rows, columns;

  Layout layout() const {
    const int64_t pixels = rows * columns;
    return {false, images, classes, pixels, classes * pixels, pixels, 1};
  }
  std::vector<int64_t> target() const { return {images, rows, columns}; }
};

}  // namespace hem_ext
