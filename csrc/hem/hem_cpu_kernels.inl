// The CPU kernels of hem_loss, compiled once per instruction set by hem_cpu_{baseline,avx2,avx512}.cpp, which
// include this file after hem_cpu_errors.inl inside a namespace and a target region of their own. No includes
// in here.
//
// Forward takes two looks at the errors of a sample: one for their mean, one to keep those above it.
// Backward reads no logits: kept bits, targets and one coefficient per sample.

template <class T, class Storage>
void forward_tiles(const ForwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  AlignedBuffer<T, 4096> errors(kSets * kLanes * layout.classes);
  Samples<T> samples;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    Partial partial{0, 0, -1};
    const Storage* first = static_cast<const Storage*>(a.input) + block.outer * layout.outer_stride +
                           block.inner * layout.inner_stride;
    samples.read(
        a, block, layout.classes,
        [&](int64_t i, int64_t t) {
          return to_float(first[i * layout.inner_stride + t * layout.class_stride]);
        },
        &partial);
    BlockSums<T> sums;
    for_each_tile(
        layout, first, block, a.block, samples, errors.data(), [](int64_t, int64_t) { return false; },
        [&](int64_t at, const T* tile, ErrorStats<Lanes<T>> stats) {
          finish_tile(a, block, samples, at, tile, stats, tile_words(a, block, at), &sums);
        });
    sums.write(&partial);
    a.partials[n] = partial;
  }
}

template <class T, class Storage>
T solve_wide_row(const Storage* row, int64_t classes, int32_t target, T margin, int32_t* words) {
  const T target_logit = to_float(row[target]);
  const int64_t num_words = (classes + 31) / 32;
  const RowStats<T> stats = wide_row_stats(row, classes, target, target_logit, margin);
  const bool is_nan = stats.sum != stats.sum || target_logit != target_logit;
  T loss = T(0);

  if (stats.largest > 0 && !is_nan) {
    const T cut = cutoff_of(stats.sum, T(classes), stats.largest);
    const Kept<T> kept = keep_of_wide_row(row, classes, target, target_logit, margin, cut, words);
    loss = kept.sum / kept.count;
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
                                      typename Lanes<T>::Ints count, const ClassRange& range) {
  using V = Lanes<T>;
  const V counts = V::from_ints(count), none = V::broadcast(0);
  typename V::Ints label = V::load_ints(targets);
  if (range.first != 0) {
    int32_t own[kLanes];
    for (int i = 0; i < kLanes; ++i) own[i] = targets[i] - static_cast<int32_t>(range.first);
    label = V::load_ints(own);
  }
  const auto active = counts > none;
  if (V::bits(active) == 0) return {none, none, label, true};
  T kept[kLanes], target[kLanes];
  const V gradient = scale.lanes(position, targets);
  // Every bit, the target's own included: the loss is not finite.
  const auto broken = V::equal(count, static_cast<int32_t>(range.of));
  const V nan = V::broadcast(T(__builtin_nan("")));
  select(broken, nan, keep(active, gradient / maximum(counts, V::broadcast(1)))).store(kept);
  select(broken, nan, keep(active, none - gradient)).store(target);
  for (int i = 0; i < kLanes; ++i) {
    kept[i] = to_float(from_float<Storage>(kept[i]));
    target[i] = to_float(from_float<Storage>(target[i]));
  }
  return {V::load(kept), V::load(target), label, false};
}

// How many classes sixteen pixels keep, whose words lie `stride` apart.
template <class T>
HEM_INLINE typename Lanes<T>::Ints count_pixels(const int32_t* words, int64_t num_words, int64_t stride) {
  using V = Lanes<T>;
  typename V::Ints count = V::zero_ints();
  for (int64_t w = 0; w < num_words; ++w) count = V::add_bits(count, V::load_ints(words + w * stride));
  return count;
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
  const ClassRange& range = a.range;
  const int64_t inner = layout.inner;
  alignas(64) int32_t targets[kMaxBlock];
  const bool streamed = a.streamed;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    read_targets(a.targets, block, range.of, targets, nullptr);
    const int32_t* words = a.mask + (block.outer * range.words + range.first_word) * inner + block.inner;
    const int32_t* counts = range.counts == nullptr ? nullptr : range.counts + block.position;
    Storage* first = static_cast<Storage*>(a.grad_input) + block.outer * layout.outer_stride + block.inner;
    SampleCoefficients<T> c[kSets];
    int64_t at = 0;
    for (; at + kSets * kLanes <= block.count; at += kSets * kLanes) {
      for (int k = 0; k < kSets; ++k) {
        const int64_t i = at + k * kLanes;
        const auto count =
            counts == nullptr ? count_pixels<T>(words + i, range.words, inner) : V::load_ints(counts + i);
        c[k] = coefficients_of<T, Storage>(scale, block.position + i, targets + i, count, range);
      }
      auto put = [streamed](Storage* p, V v) { v.store_exactly(p, streamed); };
      write_pixels<kSets>(layout, c, words + at, first + at, put);
    }
    for (; at < block.count; at += kLanes) {
      const int64_t rest = block.count - at < kLanes ? block.count - at : kLanes;
      // Words and targets for sixteen: those past the last pixel are 0, and ignored.
      alignas(64) int32_t labels[kLanes], kept[kLanes];
      const int64_t num_words = layout.words();
      AlignedBuffer<int32_t, 64 * kLanes> copied(num_words * kLanes);
      for (int64_t i = 0; i < kLanes; ++i) {
        labels[i] = i < rest ? targets[at + i] : -1;
        kept[i] = counts != nullptr && i < rest ? counts[at + i] : 0;
        for (int64_t w = 0; w < num_words; ++w) {
          copied.data()[w * kLanes + i] = i < rest ? words[w * inner + at + i] : 0;
        }
      }
      Layout copy = layout;
      copy.inner = kLanes;  // between words
      const auto count =
          counts == nullptr ? count_pixels<T>(copied.data(), num_words, kLanes) : V::load_ints(kept);
      c[0] = coefficients_of<T, Storage>(scale, block.position + at, labels, count, range);
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
      for (int64_t b = 0; b < kCount && j + b < classes; ++b) to[j + b] = some[b];
    }
  }
}

// Rows lie one behind the other, and `Writer` puts them there.
template <class T, class Storage, class Writer>
void backward_rows(const BackwardArgs& a, int64_t begin, int64_t end) {
  using V = Lanes<T>;
  const int64_t classes = a.layout.classes;
  const ClassRange range = a.range;
  const int64_t num_words = range.words;
  const GradScale<T> scale(a);
  alignas(64) int32_t targets[kMaxBlock];
  Writer out(static_cast<Storage*>(a.grad_input) + begin * a.block * classes, a.streamed);

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
        out.zeros(rows * classes);
        continue;
      }
      const SampleCoefficients<T> c =
          coefficients_of<T, Storage>(scale, block.position + at, targets + at, V::load_ints(counts), range);
      T kept[kLanes], target[kLanes];
      c.kept.store(kept);
      c.target.store(target);

      // Classes [j, j + count) of a row, behind which there is room for so many numbers.
      auto write = [&](int i, int64_t j, int64_t count, int64_t room, Storage* to) {
        const int32_t* of_row = words + i * num_words + range.first_word;
        write_row<T>(of_row + j / 32, count, count + room, kept[i], to);
        const int64_t at_target = targets[at + i] - range.first - j;
        if (at_target >= 0 && at_target < count) to[at_target] = from_float<Storage>(target[i]);
      };
      if (classes <= kNarrowClasses) {
        Storage* to = out.room(rows * classes);
        const bool cleared = unfinished <= kLanes / 2;
        if (cleared) memset(to, 0, rows * classes * sizeof(Storage));
        for (int i = 0; i < rows; ++i, to += classes) {
          if (counts[i] != 0) {
            write(i, 0, classes, (rows - 1 - i) * classes + Writer::kBehind, to);
          } else if (!cleared) {
            memset(to, 0, classes * sizeof(Storage));
          }
        }
        out.add(rows * classes);
        continue;
      }
      for (int i = 0; i < rows; ++i) {
        if (counts[i] == 0) {
          out.zeros(classes);
          continue;
        }
        for (int64_t j = 0; j < classes; j += Writer::kMost) {
          const int64_t count = classes - j < Writer::kMost ? classes - j : Writer::kMost;
          const int64_t room = Writer::kBehind > 0 ? Writer::kBehind : (rows - 1 - i) * classes;
          write(i, j, count, room, out.room(count));
          out.add(count);
        }
      }
    }
  }
  out.finish();
  if (a.streamed) end_streaming();
}

template <class T, class Storage>
void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.layout.rows && a.by_line) {
    backward_rows<T, Storage, ByLine<Storage>>(a, begin, end);
  } else if (a.layout.rows) {
    backward_rows<T, Storage, InPlace<Storage>>(a, begin, end);
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
