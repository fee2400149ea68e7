// The CPU kernels of hem_loss, compiled once per instruction set by hem_cpu_{baseline,avx2,avx512}.cpp, which
// include this file after hem_cpu_samples.inl inside a namespace and a target region of their own. No
// includes in here.
//
// Forward takes two looks at the errors of a sample: one for their mean, one to keep those above it.
//   pixels, narrow rows  sixteen samples side by side in the lanes: their errors go into a scratch tile
//                        [C, 16] that stays in cache (logits of one pixel lie a power of two apart in NCHW
//                        and would evict each other), for the second look. Of pixels the first one is taken
//                        while the errors are made, several tiles beside each other
//   wide rows            sixteen classes of one sample in the lanes: the row itself stays in cache
// Backward reads no logits: kept bits, targets and one coefficient per sample.

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

template <class T, class Storage>
void forward_tiles(const ForwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, num_words = layout.words();
  using V = Lanes<T>;
  // A row of logits is a page or more away from that of the next class, and hardware foresees none of it.
  // Into the second level of caches, which holds what all classes have ahead.
  const int64_t ahead = (classes <= 256 ? 1024 : 512) / static_cast<int64_t>(sizeof(Storage));
  AlignedBuffer<T, 4096> errors(kSets * kLanes * classes);
  Samples<T> samples;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    Partial partial{0, 0, -1};
    const Storage* first = static_cast<const Storage*>(a.input) + block.outer * layout.outer_stride +
                           block.inner * layout.inner_stride;
    samples.read(
        a, block,
        [&](int64_t i, int64_t t) {
          return to_float(first[i * layout.inner_stride + t * layout.class_stride]);
        },
        &partial);
    BlockSums<T> sums;
    auto finish = [&](int64_t at, int set, ErrorStats<V> stats) {
      TileWords words = pixel_words(a, block, at);
      if (layout.rows) words = {a.mask + (block.inner + at) * num_words, 1, num_words, words.lanes};
      finish_tile(a, block, samples, at, errors.data() + set * classes * kLanes, stats, words, &sums);
    };
    int64_t at = 0;
    if (!layout.rows) {
      ErrorStats<V> stats[kSets];
      auto load = [](const Storage* p) { return V::load(p); };
      for (; at + kSets * kLanes <= block.count; at += kSets * kLanes) {
        pixel_errors<kSets>(layout, first, samples, at, ahead, load, errors.data(), stats);
        for (int k = 0; k < kSets; ++k) finish(at + k * kLanes, k, stats[k]);
      }
      for (; at < block.count; at += kLanes) {
        const int rest = block.count - at < kLanes ? static_cast<int>(block.count - at) : kLanes;
        auto load_rest = [rest](const Storage* p) { return V::load_first(p, rest); };
        pixel_errors<1>(layout, first, samples, at, ahead, load_rest, errors.data(), stats);
        finish(at, 0, stats[0]);
      }
    }
    for (; at < block.count; at += kLanes) {
      if (layout.inner_stride == classes) {
        // The same rows of the next block: those with its targets are the first that are looked for.
        const char* next = reinterpret_cast<const char*>(first + (at + a.block) * classes);
        const int64_t bytes = kLanes * classes * static_cast<int64_t>(sizeof(Storage));
        for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(next + k, 0, 2);
      }
      finish(at, 0, narrow_row_errors(layout, first, block, samples, at, errors.data()));
    }
    sums.write(&partial);
    a.partials[n] = partial;
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

template <class T, class Storage>
T solve_wide_row(const Storage* row, int64_t classes, int32_t target, T margin, int32_t* words) {
  using V = Lanes<T>;
  const T target_logit = to_float(row[target]);
  const int64_t num_words = (classes + 31) / 32;

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
  const T error_sum = sum_of_lanes(sum.total());
  const T largest = max_of_lanes(sum.largest);
  const bool is_nan = error_sum != error_sum || target_logit != target_logit;
  T loss = T(0);

  if (largest > 0 && !is_nan) {
    const T mean = error_sum / T(classes);
    const T thr = mean < largest ? mean : largest;
    const T smallest = smallest_positive<T>();
    const V cut = V::broadcast(thr > smallest ? thr : smallest);
    ErrorSum<V> kept_sum;
    int64_t count = 0;
    uint64_t word_pair = 0;
    for_each_error<T>(
        row, classes, target, target_logit, margin,
        [&](int64_t, int v, V signed_e) __attribute__((always_inline)) {
          const auto k = signed_e >= cut;
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
    loss = sum_of_lanes(kept_sum.total()) / T(count);
  } else {
    memset(words, 0, num_words * sizeof(int32_t));
  }
  if (is_nan || !(loss <= largest_finite<T>())) {
    loss = T(__builtin_nan(""));
    for (int64_t w = 0; w < num_words; ++w) words[w] = static_cast<int32_t>(all_bits(classes, w));
  }
  return loss;
}

template <class T, class Storage>
void forward_wide_rows(const ForwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  const int64_t num_words = layout.words();
  const T* margins = static_cast<const T*>(a.margins);
  const T* weights = static_cast<const T*>(a.weight);
  int32_t targets[kMaxBlock];

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    Partial partial{0, 0, -1};
    read_targets(a.targets, block, layout.classes, targets, &partial);
    for (int64_t i = 0; i < block.count; ++i) {
      const int32_t target = targets[i];
      int32_t* words = a.mask + (block.inner + i) * num_words;
      T weighted = T(0);
      if (target < 0) {
        memset(words, 0, num_words * sizeof(int32_t));
      } else {
        const Storage* row = static_cast<const Storage*>(a.input) + (block.inner + i) * layout.inner_stride;
        const T margin = margins == nullptr ? T(a.margin) : margins[target];
        const T loss = solve_wide_row<T>(row, layout.classes, target, margin, words);
        const T weight = weights == nullptr ? T(1) : weights[target];
        weighted = weight * loss;
        partial.loss += weighted;
        if (a.count_all || loss > 0) partial.weight += weight;
      }
      if (a.losses != nullptr) static_cast<T*>(a.losses)[block.position + i] = weighted;
    }
    a.partials[n] = partial;
  }
}

template <class T, class Storage>
void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
  if (a.layout.rows && a.layout.classes > kNarrowClasses) {
    forward_wide_rows<T, Storage>(a, begin, end);
  } else {
    forward_tiles<T, Storage>(a, begin, end);
  }
}

// What backward writes for sixteen samples: `kept` where a bit is set, `target` at the target.
template <class T>
struct SampleCoefficients {
  Lanes<T> kept, target;
  typename Lanes<T>::Ints label;
  bool finished;
};

// Of samples from `position` on that keep so many of their classes.
template <class T, class Storage>
SampleCoefficients<T> coefficients_of(const GradScale<T>& scale, int64_t position, const int32_t* targets,
                                      typename Lanes<T>::Ints count, int64_t classes) {
  using V = Lanes<T>;
  const V counts = V::from_ints(count), none = V::broadcast(0);
  const typename V::Ints label = V::load_ints(targets);
  const auto active = counts > none;
  if (V::bits(active) == 0) return {none, none, label, true};
  T kept[kLanes], target[kLanes];
  const V gradient = scale.lanes(position, targets);
  // Every bit, the target's own included: the loss is not finite.
  const auto broken = V::equal(count, static_cast<int32_t>(classes));
  const V nan = V::broadcast(T(__builtin_nan("")));
  select(broken, nan, keep(active, gradient / maximum(counts, V::broadcast(1)))).store(kept);
  select(broken, nan, keep(active, none - gradient)).store(target);
  for (int i = 0; i < kLanes; ++i) {
    kept[i] = to_float(from_float<Storage>(kept[i]));
    target[i] = to_float(from_float<Storage>(target[i]));
  }
  return {V::load(kept), V::load(target), label, false};
}

// Of the pixels of a block from pixel `at` on, whose words begin at `words`.
template <class T, class Storage>
SampleCoefficients<T> pixel_coefficients(const GradScale<T>& scale, const Layout& layout, const Block& block,
                                         const int32_t* targets, const int32_t* words, int64_t at) {
  using V = Lanes<T>;
  typename V::Ints count = V::zero_ints();
  for (int64_t w = 0; w < layout.words(); ++w) {
    count = V::add_bits(count, V::load_ints(words + w * layout.inner + at));
  }
  return coefficients_of<T, Storage>(scale, block.position + at, targets + at, count, layout.classes);
}

// Writes the gradient of kCount times sixteen pixels of a block, from pixel `at` on.
template <int kCount, class T, class Storage, class Store>
void write_pixels(const Layout& layout, const SampleCoefficients<T>* c, const int32_t* words, Storage* to,
                  const Store& store) {
  using V = Lanes<T>;
  bool finished = true;
  for (int k = 0; k < kCount; ++k) finished &= c[k].finished;
  if (finished) {
    for (int64_t j = 0; j < layout.classes; ++j) {
      for (int k = 0; k < kCount; ++k) store(to + j * layout.class_stride + k * kLanes, V::broadcast(0));
    }
    return;
  }
  for (int64_t first = 0; first < layout.classes; first += 32) {
    typename V::Ints word[kCount];
    for (int k = 0; k < kCount; ++k) word[k] = V::load_ints(words + first / 32 * layout.inner + k * kLanes);
    const int in_word = layout.classes - first < 32 ? static_cast<int>(layout.classes - first) : 32;
    for (int b = 0; b < in_word; ++b) {
      const int64_t j = first + b;
      for (int k = 0; k < kCount; ++k) {
        const V kept = keep(V::has_bit(word[k], 1u << b), c[k].kept);
        store(to + j * layout.class_stride + k * kLanes,
              select(V::equal(c[k].label, static_cast<int32_t>(j)), c[k].target, kept));
      }
    }
  }
}

template <class T, class Storage>
void backward_pixels(const BackwardArgs& a, int64_t begin, int64_t end) {
  using V = Lanes<T>;
  const Layout& layout = a.layout;
  const GradScale<T> scale(a);
  alignas(64) int32_t targets[kMaxBlock];
  const bool streamed = a.streamed;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    read_targets(a.targets, block, layout.classes, targets, nullptr);
    const int32_t* words = a.mask + block.outer * layout.words() * layout.inner + block.inner;
    Storage* first = static_cast<Storage*>(a.grad_input) + block.outer * layout.outer_stride + block.inner;
    SampleCoefficients<T> c[kSets];
    int64_t at = 0;
    for (; at + kSets * kLanes <= block.count; at += kSets * kLanes) {
      for (int k = 0; k < kSets; ++k) {
        c[k] = pixel_coefficients<T, Storage>(scale, layout, block, targets, words, at + k * kLanes);
      }
      auto put = [streamed](Storage* p, V v) { v.store_exactly(p, streamed); };
      write_pixels<kSets>(layout, c, words + at, first + at, put);
    }
    for (; at < block.count; at += kLanes) {
      const int64_t rest = block.count - at < kLanes ? block.count - at : kLanes;
      // Words and targets for sixteen: those past the last pixel are 0, and ignored.
      alignas(64) int32_t labels[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) labels[i] = i < rest ? targets[at + i] : -1;
      AlignedBuffer<int32_t, 64 * kLanes> copied(layout.words() * kLanes);
      for (int64_t w = 0; w < layout.words(); ++w) {
        for (int64_t i = 0; i < kLanes; ++i) {
          copied.data()[w * kLanes + i] = i < rest ? words[w * layout.inner + at + i] : 0;
        }
      }
      Layout copy = layout;
      copy.inner = kLanes;  // between words
      Block tail = block;
      tail.position += at;
      c[0] = pixel_coefficients<T, Storage>(scale, copy, tail, labels, copied.data(), 0);
      auto put = [rest](Storage* p, V v) {
        Storage lane[kLanes];
        v.store_exactly(lane, false);
        memcpy(p, lane, rest * sizeof(Storage));
      };
      write_pixels<1>(copy, c, copied.data(), first + at, put);
    }
  }
  if (streamed) end_streaming();
}

// Writes `kept` where bits of a row are set, else 0, kCount numbers: sixteen in lanes, or a word's of halves,
// which compilers make two bytes wide.
template <class T, int kCount, class Storage>
HEM_INLINE void write_bits(uint32_t bits, T kept, Storage* to) {
  using V = Lanes<T>;
  if constexpr (kCount == kLanes) {
    keep(V::mask_from_bits(bits), V::broadcast(kept)).store_exactly(to, false);
  } else {
    const uint16_t value = from_float<Storage>(kept).bits;
    for (int b = 0; b < kCount; ++b) to[b].bits = (bits & (1u << b)) != 0 ? value : uint16_t{0};
  }
}

// The same of a whole row, and zeros behind it as far as there is `room`: less than kCount of them.
template <class T, class Storage>
HEM_INLINE void write_row(const int32_t* words, int64_t classes, int64_t room, T kept, Storage* to) {
  constexpr int kCount = sizeof(Storage) == 2 ? 2 * kLanes : kLanes;
  for (int64_t j = 0; j < classes; j += kCount) {
    const uint32_t bits = static_cast<uint32_t>(words[j / 32]) >> (j % 32);
    if (room - j >= kCount) {
      write_bits<T, kCount>(bits, kept, to + j);
    } else {
      Storage some[kCount];
      write_bits<T, kCount>(bits, kept, some);
      memcpy(to + j, some, (classes - j < kCount ? classes - j : kCount) * sizeof(Storage));
    }
  }
}

template <class T, class Storage>
void backward_rows(const BackwardArgs& a, int64_t begin, int64_t end) {
  using V = Lanes<T>;
  const int64_t classes = a.layout.classes;
  const ClassRange range = a.range != nullptr ? *a.range : ClassRange{0, classes, nullptr};
  const int64_t num_words = (range.of + 31) / 32;
  const GradScale<T> scale(a);
  alignas(64) int32_t targets[kMaxBlock];
  // Rows lie one behind the other. Those from `finished` to `to` are 0, and not written yet.
  Storage* to = static_cast<Storage*>(a.grad_input) + begin * a.block * classes;
  Storage* finished = to;
  auto finish = [&] { write_zeros(finished, (to - finished) * sizeof(Storage), a.streamed); };

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(a.layout, a.block, n);
    read_targets(a.targets, block, range.of, targets, nullptr);
    for (int64_t i = block.count; i % kLanes != 0; ++i) targets[i] = -1;
    for (int64_t at = 0; at < block.count; at += kLanes) {
      const int rows = block.count - at < kLanes ? static_cast<int>(block.count - at) : kLanes;
      const int64_t first = block.inner + at;
      const int32_t* words = a.mask + first * num_words;
      alignas(64) int32_t counts[kLanes] = {};
      int unfinished = 0;
      for (int i = 0; i < rows; ++i) {
        counts[i] = range.counts != nullptr ? range.counts[first + i]
                                            : count_kept(words + i * num_words, num_words, 1);
        unfinished += counts[i] != 0;
      }
      if (unfinished == 0) {
        to += rows * classes;
        continue;
      }
      const SampleCoefficients<T> c = coefficients_of<T, Storage>(scale, block.position + at, targets + at,
                                                                  V::load_ints(counts), range.of);
      T kept[kLanes], target[kLanes];
      c.kept.store(kept);
      c.target.store(target);

      const bool cleared = classes <= kNarrowClasses && unfinished <= kLanes / 2;
      if (cleared) {
        finish();
        memset(to, 0, rows * classes * sizeof(Storage));
      }
      for (int i = 0; i < rows; ++i, to += classes) {
        if (counts[i] == 0) continue;
        if (!cleared && finished != to) finish();
        write_row<T>(words + i * num_words + range.first / 32, classes, (rows - i) * classes, kept[i], to);
        const int64_t at_target = targets[at + i] - range.first;
        if (at_target >= 0 && at_target < classes) to[at_target] = from_float<Storage>(target[i]);
        finished = to + classes;
      }
      if (cleared) finished = to;
    }
  }
  finish();
  if (a.streamed) end_streaming();
}

template <class T, class Storage>
void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.layout.rows) {
    backward_rows<T, Storage>(a, begin, end);
  } else {
    backward_pixels<T, Storage>(a, begin, end);
  }
}

// In the order of InputType.
extern const CpuKernels kernels;
const CpuKernels kernels = {
    {forward<float, float>, forward<double, double>, forward<float, BFloat16>, forward<float, Float16>},
    {backward<float, float>, backward<double, double>, backward<float, BFloat16>, backward<float, Float16>},
};
