// The errors of the samples of a block, and what decides which are kept: shared by the CPU kernels of
// hem_loss and of class_parallel_hem_loss, which include this after hem_cpu_samples.inl inside a namespace
// and a target region of their own. No includes in here.
//
//   pixels, narrow rows  sixteen samples side by side in the lanes: their errors go into a scratch tile
//                        [C, 16] that stays in cache (logits of one pixel lie a power of two apart in NCHW
//                        and would evict each other), for a second look. Of pixels the first one is taken
//                        while the errors are made, several tiles beside each other
//   wide rows            sixteen classes of one sample in the lanes: the row itself stays in cache

// Rows of at most this many classes are solved sixteen at a time.
constexpr int64_t kNarrowClasses = 64;
// Rows of fewer classes are a few groups of lanes, and which holds the target is guessed wrong too often.
constexpr int64_t kPredictable = 512;

inline Block nth_block(const Layout& layout, int64_t block_size, int64_t n) {
  const int64_t per_image = blocks_per_image(layout, block_size);
  const int64_t outer = n / per_image, inner = n % per_image * block_size;
  const int64_t left = layout.inner - inner;
  return {outer, inner, left < block_size ? left : block_size, outer * layout.inner + inner};
}

// Sixteen pixels on the way through their logits. Not in arrays, which GCC 12 keeps in memory.
template <class T>
struct PixelSet {
  using V = Lanes<T>;
  V y, m, sum, largest;
  typename V::Ints target;

  HEM_INLINE PixelSet(const Samples<T>& samples, int64_t at)
      : y(V::load(samples.target_logit + at)),
        m(V::load(samples.margin + at)),
        sum(V::broadcast(0)),
        largest(V::broadcast(0)),
        target(V::load_ints(samples.target + at)) {}

  HEM_INLINE void visit(V logits, int64_t j, T* to) {
    const V e = drop(V::equal(target, static_cast<int32_t>(j)), error(logits, y, m));
    e.store(to);
    sum = sum + e;
    largest = maximum(e, largest);
  }
};

// The errors [kCount, C, 16] of kCount times sixteen pixels of a block, from pixel `at` on, and their stats.
// `load(p)` are sixteen logits, or those of them that there are; what lies `ahead` of them is wanted in a
// while.
template <int kCount, class T, class Storage, class Load>
void pixel_errors(const Layout& layout, const Storage* first, const Samples<T>& samples, int64_t at,
                  int64_t ahead, const Load& load, T* errors, ErrorStats<Lanes<T>>* stats) {
  const int64_t classes = layout.classes, set = classes * kLanes;
  constexpr int kLast = kCount - 1;
  PixelSet<T> a(samples, at), b(samples, at + (kLast > 0 ? kLanes : 0));
  PixelSet<T> c(samples, at + (kLast > 1 ? 2 * kLanes : 0)), d(samples, at + (kLast > 2 ? 3 * kLanes : 0));
  TreeSum<Lanes<T>> trees[kCount];
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t end = classes - begin < kChunk ? classes : begin + kChunk;
    const Storage* row = first + begin * layout.class_stride + at;
    T* to = errors + begin * kLanes;
    for (int64_t j = begin; j < end; ++j, row += layout.class_stride, to += kLanes) {
      for (int k = 0; k < kCount; ++k) __builtin_prefetch(row + k * kLanes + ahead, 0, 2);
      a.visit(load(row), j, to);
      if constexpr (kCount > 1) b.visit(load(row + kLanes), j, to + set);
      if constexpr (kCount > 2) c.visit(load(row + 2 * kLanes), j, to + 2 * set);
      if constexpr (kCount > 3) d.visit(load(row + 3 * kLanes), j, to + 3 * set);
    }
    if (classes <= kChunk) break;
    auto push = [](PixelSet<T>& pixels, TreeSum<Lanes<T>>& tree) {
      tree.push(pixels.sum);
      pixels.sum = Lanes<T>::broadcast(0);
    };
    push(a, trees[0]);
    if constexpr (kCount > 1) push(b, trees[1]);
    if constexpr (kCount > 2) push(c, trees[2]);
    if constexpr (kCount > 3) push(d, trees[3]);
  }
  auto stats_of_set = [classes](const PixelSet<T>& pixels, const TreeSum<Lanes<T>>& tree) {
    return ErrorStats<Lanes<T>>{classes > kChunk ? tree.total() : pixels.sum, pixels.largest};
  };
  stats[0] = stats_of_set(a, trees[0]);
  if constexpr (kCount > 1) stats[1] = stats_of_set(b, trees[1]);
  if constexpr (kCount > 2) stats[2] = stats_of_set(c, trees[2]);
  if constexpr (kCount > 3) stats[3] = stats_of_set(d, trees[3]);
}

// The same of sixteen narrow rows, or of those there are: four classes of all of them are loaded across.
template <class T, class Storage>
ErrorStats<Lanes<T>> narrow_row_errors(const Layout& layout, const Storage* first, const Block& block,
                                       const Samples<T>& samples, int64_t at, T* errors) {
  using V = Lanes<T>;
  constexpr int64_t kColumns = 4;
  const int64_t classes = layout.classes;
  const Storage* rows = first + at * layout.inner_stride;
  int64_t stride = layout.inner_stride;
  Storage copies[kLanes * kNarrowClasses];
  if (block.count - at < kLanes || classes < kColumns) {
    for (int i = 0; i < kLanes; ++i) {
      // Past the last row and the last class: any numbers do, nobody looks at them.
      const Storage* from = at + i < block.count ? rows + i * stride : rows;
      for (int64_t j = 0; j < classes || j < kColumns; ++j) {
        copies[i * kNarrowClasses + j] = from[j < classes ? j : 0];
      }
    }
    rows = copies;
    stride = kNarrowClasses;
  }
  PixelSet<T> set(samples, at);
  int64_t j = 0;
  for (; j + kColumns <= classes; j += kColumns) {
    visit_vectors([&](int k, V logits)
                      __attribute__((always_inline)) { set.visit(logits, j + k, errors + (j + k) * kLanes); },
                  V::load_across(rows + j, stride));
  }
  if (j < classes) {
    // With those before them, of which there are none in less than four classes.
    const int64_t last = classes < kColumns ? 0 : classes - kColumns;
    visit_vectors(
        [&](int k, V logits) __attribute__((always_inline)) {
          if (last + k >= j && last + k < classes) set.visit(logits, last + k, errors + (last + k) * kLanes);
        },
        V::load_across(rows + last, stride));
  }
  return {set.sum, set.largest};
}

// All tiles of a block, whose logits begin at `first`: `finish(at, errors, stats)` gets the errors [C, 16] of
// the samples from `at` on, and their stats. None are made of those, so many from `at` on, that `skip(at,
// count)` leaves out. `errors` holds kSets tiles.
template <class T, class Storage, class Skip, class Finish>
HEM_INLINE void for_each_tile(const Layout& layout, const Storage* first, const Block& block,
                              int64_t block_size, const Samples<T>& samples, T* errors, const Skip& skip,
                              const Finish& finish) {
  using V = Lanes<T>;
  const int64_t classes = layout.classes;
  int64_t at = 0;
  if (!layout.rows) {
    // A row of logits is a page or more away from that of the next class, and hardware foresees none of it.
    // Into the second level of caches, which holds what all classes have ahead.
    const int64_t ahead = (classes <= 256 ? 1024 : 512) / static_cast<int64_t>(sizeof(Storage));
    ErrorStats<V> stats[kSets];
    auto load = [](const Storage* p) { return V::load(p); };
    for (; at + kSets * kLanes <= block.count; at += kSets * kLanes) {
      if (skip(at, kSets * kLanes)) continue;
      pixel_errors<kSets>(layout, first, samples, at, ahead, load, errors, stats);
      for (int k = 0; k < kSets; ++k) finish(at + k * kLanes, errors + k * classes * kLanes, stats[k]);
    }
    for (; at < block.count; at += kLanes) {
      const int rest = block.count - at < kLanes ? static_cast<int>(block.count - at) : kLanes;
      if (skip(at, rest)) continue;
      auto load_rest = [rest](const Storage* p) { return V::load_first(p, rest); };
      pixel_errors<1>(layout, first, samples, at, ahead, load_rest, errors, stats);
      finish(at, errors, stats[0]);
    }
  }
  for (; at < block.count; at += kLanes) {
    if (skip(at, block.count - at < kLanes ? block.count - at : kLanes)) continue;
    if (layout.inner_stride == classes) {
      // The same rows of the next block: those with its targets are the first that are looked for.
      const char* next = reinterpret_cast<const char*>(first + (at + block_size) * classes);
      const int64_t bytes = kLanes * classes * static_cast<int64_t>(sizeof(Storage));
      for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(next + k, 0, 2);
    }
    finish(at, errors, narrow_row_errors(layout, first, block, samples, at, errors));
  }
}

// One row, sixteen classes in the lanes. `visit(group, v, e)` gets the signed errors of classes
// 64 * group + 16 * v + [0, 16), 0 at the target and past the last class; `done(group)` ends a group.
// Inlined, so that what the two of them add up stays in registers.
template <class T, class Storage, class Visit, class Done>
HEM_INLINE void for_each_error(const Storage* row, int64_t classes, int64_t target, T target_logit, T margin,
                               Visit visit, Done done) {
  using V = Lanes<T>;
  constexpr int64_t kGroup = 4 * kLanes;
  const V y = V::broadcast(target_logit), m = V::broadcast(margin);
  for (int64_t first = 0, group = 0; first < classes; first += kGroup, ++group) {
    const int64_t left = classes - first;
    const uint64_t at_target = static_cast<uint64_t>(target - first);
    const bool has_target = at_target < kGroup;
    if (left >= kGroup && !has_target && classes >= kPredictable) {
      for (int v = 0; v < 4; ++v) visit(group, v, signed_error(V::load(row + first + v * kLanes), y, m));
    } else {
      const uint64_t rivals = ~(has_target ? uint64_t{1} << at_target : 0);
      auto visit_rivals = [&](int v, V logits, int n) {
        const uint32_t bits = static_cast<uint32_t>(rivals >> (v * kLanes)) & ((1u << n) - 1u);
        visit(group, v, keep(V::mask_from_bits(bits), signed_error(logits, y, m)));
      };
      if (left >= kGroup) {
        for (int v = 0; v < 4; ++v) visit_rivals(v, V::load(row + first + v * kLanes), kLanes);
      } else {
        for (int v = 0; v < 4 && v * kLanes < left; ++v) {
          const int n = left - v * kLanes < kLanes ? static_cast<int>(left - v * kLanes) : kLanes;
          visit_rivals(v, V::load_first(row + first + v * kLanes, n), n);
        }
      }
    }
    done(group);
  }
}

// What decides which errors of a wide row are kept.
template <class T>
struct RowStats {
  T sum, largest;
};

template <class T, class Storage>
RowStats<T> wide_row_stats(const Storage* row, int64_t classes, int64_t target, T target_logit, T margin) {
  using V = Lanes<T>;
  ErrorSum<V> sum;
  for_each_error<T>(
      row, classes, target, target_logit, margin,
      [&](int64_t, int v, V signed_e) __attribute__((always_inline)) {
        sum.add(v, positive_part(signed_e));
        sum.largest = maximum(signed_e, sum.largest);
      },
      [&](int64_t group) {
        if ((group + 1) % (kChunk / 4) == 0) sum.end_chunk();
      });
  return {sum_of_lanes(sum.total()), max_of_lanes(sum.largest)};
}

// What is kept of one sample.
template <class T>
struct Kept {
  T sum, count;
};

// The errors of a wide row that are `cut` at least; writes their bits.
template <class T, class Storage>
Kept<T> keep_of_wide_row(const Storage* row, int64_t classes, int64_t target, T target_logit, T margin, T cut,
                         int32_t* words) {
  using V = Lanes<T>;
  const int64_t num_words = (classes + 31) / 32;
  const V least = V::broadcast(cut);
  ErrorSum<V> kept_sum;
  int64_t count = 0;
  uint64_t word_pair = 0;
  for_each_error<T>(
      row, classes, target, target_logit, margin,
      [&](int64_t, int v, V signed_e) __attribute__((always_inline)) {
        const auto k = signed_e >= least;
        kept_sum.add_kept(v, k, signed_e);
        word_pair |= uint64_t{V::bits(k)} << (kLanes * v);
      },
      [&](int64_t group) {
        if ((group + 1) % (kChunk / 4) == 0) kept_sum.end_chunk();
        count += __builtin_popcountll(word_pair);
        words[2 * group] = static_cast<int32_t>(static_cast<uint32_t>(word_pair));
        if (2 * group + 1 < num_words) words[2 * group + 1] = static_cast<int32_t>(word_pair >> 32);
        word_pair = 0;
      });
  return {sum_of_lanes(kept_sum.total()), T(count)};
}

// ... as hem_math.h has it, of one sample.
template <class T>
T cutoff_of(T error_sum, T num_classes, T largest) {
  const T mean = error_sum / num_classes, smallest = smallest_positive<T>();
  const T thr = mean < largest ? mean : largest;
  return thr > smallest ? thr : smallest;
}
