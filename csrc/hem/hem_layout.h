// How the logits lie in memory, and what a call is told besides them. Shared by every device; no torch here.
//
// Two layouts cover the usual tensors without a copy:
//   rows    [R, C]     classes side by side: (N, C), and (N, C, d1..dk) in channels_last
//   pixels  [A, C, P]  positions side by side: (N, C, d1..dk) contiguous (A = N, P = d1*..*dk), and a
//                      transposed (N, C) (A = 1, P = N)
// A position is one sample: R positions in rows, A * P in pixels, numbered as `target` lies in memory.
//
// The kept bits of a position are ceil(C / 32) words, class j at bit j % 32 of word j / 32:
//   rows    [R, words]      pixels  [A, words, P]
// A finished or ignored position has no bit set. The target's own bit is never set, except where the
// loss is not finite: there every bit is set, and backward writes NaN.
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace hem_ext {

enum class InputType { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kInputTypeCount = 4;

enum class TargetType { kInt64, kInt32, kUInt8 };

// The numbers that Python passes: REDUCTIONS in hem_ext/arguments.py.
enum class Reduction { kNone = 0, kMean = 1, kSum = 2, kBatchMean = 3 };

// Every class bit of one word of the mask.
HEM_HOST_DEVICE uint32_t all_bits(int64_t classes, int64_t word) {
  const int64_t left = classes - 32 * word;
  return left >= 32 ? ~0u : (1u << left) - 1u;
}

// How many bits are set in the words of one position, which lie so far apart.
HEM_INLINE int32_t count_kept(const int32_t* words, int64_t num_words, int64_t stride) {
  int32_t count = 0;
  for (int64_t w = 0; w < num_words; ++w)
    count += __builtin_popcount(static_cast<uint32_t>(words[w * stride]));
  return count;
}

struct Layout {
  bool rows;
  int64_t outer;         // A; 1 in rows
  int64_t classes;       // C
  int64_t inner;         // P; R in rows
  int64_t outer_stride;  // between images, in elements
  int64_t class_stride;  // between classes; 1 in rows
  int64_t inner_stride;  // between positions; 1 in pixels

  HEM_HOST_DEVICE int64_t words() const { return (classes + 31) / 32; }
  HEM_HOST_DEVICE int64_t positions() const { return outer * inner; }
};

// The classes of a gradient that is laid out as `layout` says: all there are, or some of them side by side.
struct ClassRange {
  int64_t first;          // class that is written
  int64_t of;             // so many classes there are: targets and counts are of all of them
  const int32_t* counts;  // [positions] kept, and `of` where the loss is not finite; null: as the mask has it
  int64_t words;          // of the mask, for each position
  int64_t first_word;     // among these, and its lowest bit is that of `first`
};

HEM_HOST_DEVICE ClassRange all_classes(const Layout& layout) {
  return {0, layout.classes, nullptr, layout.words(), 0};
}

}  // namespace hem_ext
