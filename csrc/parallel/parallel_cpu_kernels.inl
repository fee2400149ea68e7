// The CPU kernels of class_parallel_hem_loss, compiled once per instruction set by
// parallel_cpu_{baseline,avx2,avx512}.cpp, which include this file after hem_cpu_errors.inl inside a
// namespace and a target region of their own. No includes in here.
//
// As forward of hem_loss, in two calls: `errors` takes the first look at those of a share of the classes,
// `keep` the second one, when it is known what all of them come to. Wide rows that are finished by then, and
// tiles of which every sample is, are not looked at again. Backward is that of hem_loss.

// Of the samples of a block: what their classes here are compared with. A target elsewhere is past them all.
template <class T>
void read_samples(const ParallelForwardArgs& a, const Block& block, Samples<T>* samples) {
  const T* logits = static_cast<const T*>(a.target_logits) + block.position;
  samples->read(a.hem, block, a.classes, [&](int64_t i, int64_t) { return logits[i]; }, nullptr);
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t own = samples->target[i] - a.first;
    const bool is_here = own >= 0 && own < a.hem.layout.classes;
    if (samples->target[i] >= 0) samples->target[i] = is_here ? static_cast<int32_t>(own) : INT32_MAX;
  }
}

// A block's part of the numbers for each sample, with zeros behind it up to a multiple of sixteen.
template <class T>
struct PerSample {
  alignas(64) T at[kMaxBlock];

  void read(const void* from, const Block& block) {
    memcpy(at, static_cast<const T*>(from) + block.position, block.count * sizeof(T));
    for (int64_t i = block.count; i % kLanes != 0; ++i) at[i] = T(0);
  }
  void write(void* to, const Block& block) const {
    memcpy(static_cast<T*>(to) + block.position, at, block.count * sizeof(T));
  }
};

template <class T, class Storage>
void first_look(const ParallelForwardArgs& a, int64_t begin, int64_t end) {
  using V = Lanes<T>;
  const Layout& layout = a.hem.layout;
  const int64_t classes = layout.classes;
  const bool is_wide = layout.rows && classes > kNarrowClasses;
  AlignedBuffer<T, 4096> errors(is_wide ? 1 : kSets * kLanes * classes);
  Samples<T> samples;
  PerSample<T> sum, largest;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.hem.block, n);
    const Storage* first = static_cast<const Storage*>(a.hem.input) + block.outer * layout.outer_stride +
                           block.inner * layout.inner_stride;
    read_samples(a, block, &samples);
    if (is_wide) {
      for (int64_t i = 0; i < block.count; ++i) {
        RowStats<T> stats{T(0), T(0)};
        if (samples.target[i] >= 0) {
          stats = wide_row_stats(first + i * layout.inner_stride, classes, samples.target[i],
                                 samples.target_logit[i], samples.margin[i]);
        }
        sum.at[i] = stats.sum;
        largest.at[i] = stats.largest;
      }
    } else {
      for_each_tile(
          layout, first, block, a.hem.block, samples, errors.data(), [](int64_t, int64_t) { return false; },
          [&](int64_t at, const T*, ErrorStats<V> stats) {
            const auto ignored = V::equal(V::load_ints(samples.target + at), -1);
            drop(ignored, stats.sum).store(sum.at + at);
            drop(ignored, stats.largest).store(largest.at + at);
          });
    }
    sum.write(a.error_sum, block);
    largest.write(a.largest, block);
  }
}

template <class T, class Storage>
void second_look(const ParallelForwardArgs& a, int64_t begin, int64_t end) {
  using V = Lanes<T>;
  const Layout& layout = a.hem.layout;
  const int64_t classes = layout.classes, num_words = layout.words();
  const bool is_wide = layout.rows && classes > kNarrowClasses;
  AlignedBuffer<T, 4096> errors(is_wide ? 1 : kSets * kLanes * classes);
  Samples<T> samples;
  PerSample<T> sum, largest, kept_sum, kept_count;

  for (int64_t n = begin; n < end; ++n) {
    const Block block = nth_block(layout, a.hem.block, n);
    const Storage* first = static_cast<const Storage*>(a.hem.input) + block.outer * layout.outer_stride +
                           block.inner * layout.inner_stride;
    read_samples(a, block, &samples);
    sum.read(a.error_sum, block);
    largest.read(a.largest, block);
    if (is_wide) {
      for (int64_t i = 0; i < block.count; ++i) {
        int32_t* words = a.hem.mask + (block.inner + i) * num_words;
        Kept<T> kept{T(0), T(0)};
        if (samples.target[i] >= 0 && largest.at[i] > 0) {
          kept = keep_of_wide_row(first + i * layout.inner_stride, classes, samples.target[i],
                                  samples.target_logit[i], samples.margin[i],
                                  cutoff_of(sum.at[i], T(a.classes), largest.at[i]), words);
        } else {
          memset(words, 0, num_words * sizeof(int32_t));
        }
        kept_sum.at[i] = kept.sum;
        kept_count.at[i] = kept.count;
      }
    } else {
      for_each_tile(
          layout, first, block, a.hem.block, samples, errors.data(),
          [&](int64_t begin_at, int64_t count) {
            for (int64_t at = begin_at; at < begin_at + count; at += kLanes) {
              if (V::bits(V::load(largest.at + at) > V::broadcast(0)) != 0) return false;
            }
            for (int64_t at = begin_at; at < begin_at + count; at += kLanes) {
              const TileWords words = tile_words(a.hem, block, at);
              for (int64_t w = 0; w < num_words; ++w) store_word<V>(words, w, V::zero_ints());
              V::broadcast(0).store(kept_sum.at + at);
              V::broadcast(0).store(kept_count.at + at);
            }
            return true;
          },
          [&](int64_t at, const T* tile, ErrorStats<V>) {
            const V thr =
                threshold(V::load(sum.at + at), V::broadcast(T(a.classes)), V::load(largest.at + at));
            const auto kept =
                keep_of_tile<T>(tile, classes, cutoff(thr, V::broadcast(smallest_positive<T>())),
                                tile_words(a.hem, block, at));
            kept.sum.store(kept_sum.at + at);
            V::from_ints(kept.count).store(kept_count.at + at);
          });
    }
    kept_sum.write(a.kept_sum, block);
    kept_count.write(a.kept_count, block);
  }
}

// In the order of InputType.
extern const ParallelCpuKernels parallel_kernels;
const ParallelCpuKernels parallel_kernels = {
    {first_look<float, float>, first_look<double, double>, first_look<float, BFloat16>,
     first_look<float, Float16>},
    {second_look<float, float>, second_look<double, double>, second_look<float, BFloat16>,
     second_look<float, Float16>},
};
