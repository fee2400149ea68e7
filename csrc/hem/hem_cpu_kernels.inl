// The CPU kernels of hem_loss, compiled once per instruction set by hem_cpu_{baseline,avx2,avx512}.cpp, which
// include this file after hem_cpu_samples.inl inside a namespace and a target region of their own. No
// includes in here.
//
// Forward takes two looks at the errors of a sample: one for their mean, one to keep those above it.
//   pixels, narrow rows  sixteen samples side by side in the lanes: their errors go into a scratch tile
//                        [C, 16] that stays in cache (logits of one pixel lie a power of two apart in
//                        NCHW and would evict each other), and both looks read the tile
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

// The errors of a block of pixels, [tiles, C, 16].
template <class T, class Storage>
void pixel_errors(const Layout& layout, const Storage* first, const Block& block, const Samples<T>& samples,
                  T* errors) {
  using V = Lanes<T>;
  const int64_t classes = layout.classes;
  const int64_t full = block.count / kLanes;
  const int rest = static_cast<int>(block.count % kLanes);
  for (int64_t j = 0; j < classes; ++j) {
    const Storage* row = first + j * layout.class_stride;
    for (int64_t tile = 0; tile < full; ++tile) {
      const int64_t at = tile * kLanes;
      __builtin_prefetch(row + at + block.count);  // the next block, which hardware does not foresee
      error(V::load(row + at), V::load(samples.target_logit + at), V::load(samples.margin + at))
          .store(errors + (tile * classes + j) * kLanes);
    }
    if (rest != 0) {
      const int64_t at = full * kLanes;
      error(V::load_first(row + at, rest), V::load(samples.target_logit + at), V::load(samples.margin + at))
          .store(errors + (full * classes + j) * kLanes);
    }
  }
}

// The errors of a block of narrow rows, [tiles, C, 16]: the same tile, loaded across.
template <class T, class Storage>
void narrow_row_errors(const Layout& layout, const Storage* first, const Block& block,
                       const Samples<T>& samples, T* errors) {
  using V = Lanes<T>;
  const int64_t classes = layout.classes;
  for (int64_t at = 0; at < block.count; at += kLanes) {
    T* tile = errors + at * classes;
    for (int i = 0; i < kLanes; ++i) {
      // Past the last row: any numbers do, the lane is ignored.
      const int64_t row = at + i < block.count ? at + i : at;
      const Storage* from = first + row * layout.inner_stride;
      for (int64_t j = 0; j < classes; ++j) tile[j * kLanes + i] = to_float(from[j]);
    }
    const V target_logit = V::load(samples.target_logit + at), margin = V::load(samples.margin + at);
    for (int64_t j = 0; j < classes; ++j) {
      T* e = tile + j * kLanes;
      error(V::load(e), target_logit, margin).store(e);
    }
  }
}

template <class T, class Storage>
void forward_tiles(const ForwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, num_words = layout.words();
  AlignedBuffer<T, 4096> errors((a.block + kLanes - 1) / kLanes * kLanes * classes);
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
    if (layout.rows) {
      narrow_row_errors(layout, first, block, samples, errors.data());
    } else {
      pixel_errors(layout, first, block, samples, errors.data());
    }

    BlockSums<T> sums;
    for (int64_t at = 0; at < block.count; at += kLanes) {
      TileWords words = pixel_words(a, block, at);
      if (layout.rows) words = {a.mask + (block.inner + at) * num_words, 1, num_words, words.lanes};
      finish_tile(a, block, samples, at, errors.data() + at * classes, words, &sums);
    }
    sums.write(&partial);
    a.partials[n] = partial;
  }
}

// One row, sixteen classes in the lanes. `visit(group, v, e)` gets the signed errors of classes
// 64 * group + 16 * v + [0, 16), 0 at the target and past the last class; `done(group)` ends a group.
// Inlined, so that what the two of them add up stays in registers.
template <class T, class Storage, class Visit, class Done>
__attribute__((always_inline)) inline void for_each_error(const Storage* row, int64_t classes, int64_t target,
                                                          T target_logit, T margin, Visit visit, Done done) {
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
      [&](int64_t, int v, V signed_e) {
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
        [&](int64_t, int v, V signed_e) {
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

template <class T, class Storage, class Bits>
void backward_pixels(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, num_words = layout.words();
  const GradScale<T> scale(a);
  alignas(64) int32_t targets[kMaxBlock];
  alignas(64) Bits kept_value[kMaxBlock];
  alignas(64) Bits target_value[kMaxBlock];

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    read_targets(a.targets, block, classes, targets, nullptr);
    const int32_t* words = a.mask + block.outer * num_words * layout.inner + block.inner;
    for (int64_t i = 0; i < block.count; ++i) {
      int64_t count = 0;
      for (int64_t w = 0; w < num_words; ++w) {
        count += __builtin_popcount(static_cast<uint32_t>(words[w * layout.inner + i]));
      }
      const int32_t t = targets[i];
      Coefficients<Storage> c{};
      if (count != 0 && t >= 0) {
        const uint32_t target_word = static_cast<uint32_t>(words[t / 32 * layout.inner + i]);
        c = scale.template operator()<Storage>(block.position + i, t, count, (target_word >> (t % 32)) & 1u);
      }
      kept_value[i] = bit_cast<Bits>(c.kept);
      target_value[i] = bit_cast<Bits>(c.target);
    }
    // Plain enough for the compiler to vectorise it, also where Bits is narrower than a word.
    Bits* first = static_cast<Bits*>(a.grad_input) + block.outer * layout.outer_stride + block.inner;
    for (int64_t j = 0; j < classes; ++j) {
      const int32_t* word = words + j / 32 * layout.inner;
      const int shift = static_cast<int>(j % 32);
      Bits* out = first + j * layout.class_stride;
      for (int64_t i = 0; i < block.count; ++i) {
        const uint32_t kept = (static_cast<uint32_t>(word[i]) >> shift) & 1u;
        out[i] = kept_value[i] & static_cast<Bits>(Bits(0) - static_cast<Bits>(kept));
      }
    }
    for (int64_t i = 0; i < block.count; ++i) {
      if (targets[i] >= 0) first[targets[i] * layout.class_stride + i] = target_value[i];
    }
  }
}

template <class T, class Storage, class Bits>
void backward_rows(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.layout;
  const int64_t classes = layout.classes, num_words = layout.words();
  const GradScale<T> scale(a);
  int32_t targets[kMaxBlock];

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.block, n);
    read_targets(a.targets, block, classes, targets, nullptr);
    for (int64_t i = 0; i < block.count; ++i) {
      const int32_t* words = a.mask + (block.inner + i) * num_words;
      Bits* out = static_cast<Bits*>(a.grad_input) + (block.inner + i) * layout.inner_stride;
      int64_t count = 0;
      for (int64_t w = 0; w < num_words; ++w) count += __builtin_popcount(static_cast<uint32_t>(words[w]));
      const int32_t t = targets[i];
      if (count == 0 || t < 0) {
        memset(out, 0, classes * sizeof(Bits));
        continue;
      }
      const bool broken = (static_cast<uint32_t>(words[t / 32]) >> (t % 32)) & 1u;
      const Coefficients<Storage> c =
          scale.template operator()<Storage>(block.position + i, t, count, broken);
      const Bits value = bit_cast<Bits>(c.kept);
      int64_t w = 0;
      for (; 32 * (w + 1) <= classes; ++w) {
        const uint32_t word = static_cast<uint32_t>(words[w]);
        for (int b = 0; b < 32; ++b) out[32 * w + b] = (word & (1u << b)) != 0 ? value : Bits(0);
      }
      for (int64_t j = 32 * w; j < classes; ++j) {
        out[j] = ((static_cast<uint32_t>(words[w]) >> (j % 32)) & 1u) != 0 ? value : Bits(0);
      }
      out[t] = bit_cast<Bits>(c.target);
    }
  }
}

template <class T, class Storage, class Bits>
void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.layout.rows) {
    backward_rows<T, Storage, Bits>(a, begin, end);
  } else {
    backward_pixels<T, Storage, Bits>(a, begin, end);
  }
}

// In the order of InputType.
extern const CpuKernels kernels;
const CpuKernels kernels = {
    {forward<float, float>, forward<double, double>, forward<float, BFloat16>, forward<float, Float16>},
    {backward<float, float, uint32_t>, backward<double, double, uint64_t>,
     backward<float, BFloat16, uint16_t>, backward<float, Float16, uint16_t>},
};
