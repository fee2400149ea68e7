// The CPU kernels of upsampled_hem_loss, compiled once per instruction set by
// upsample_cpu_{baseline,avx2,avx512}.cpp, which include this file after hem_cpu_samples.inl inside a
// namespace and a target region of their own. No includes in here.
//
// Forward takes a stretch of pixels of one row. The two rows of the input it lies between are blended once,
// for all classes; from these [C, columns] numbers sixteen pixels at a time are picked, blended, and solved
// as hem_loss solves them. Backward takes the rows of the input band by band. A pixel's bits are its classes
// side by side: lanes are classes, and each pixel is added to the sums of the two columns it lies between,
// those of a row of pixels to the two rows that it lies between. Pixels without a bit, most of them late in
// training, cost a look at their words.

// out[j, k] = top[j, k] * (1 - weight) + bottom[j, k] * weight, for `count` columns of all classes.
template <class T, class Storage>
void blend_rows(const Storage* top, const Storage* bottom, T weight, int64_t classes, int64_t class_stride,
                int64_t count, T* out, int64_t out_stride) {
  using V = Lanes<T>;
  const V below = V::broadcast(weight), above = V::broadcast(T(1) - weight);
  for (int64_t j = 0; j < classes; ++j) {
    const Storage* a = top + j * class_stride;
    const Storage* b = bottom + j * class_stride;
    T* to = out + j * out_stride;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) (above * V::load(a + k) + below * V::load(b + k)).store(to + k);
    if (k < count) {
      const int rest = static_cast<int>(count - k);
      (above * V::load_first(a + k, rest) + below * V::load_first(b + k, rest)).store(to + k);
    }
  }
}

// The errors [C, 16] of the pixels at columns x to x + 16, the block's from pixel `at` on, and their stats.
// `blended` begins with input column `first`.
template <class T>
ErrorStats<Lanes<T>> upsampled_errors(const Axis& columns, int64_t x, int64_t first, const T* blended,
                                      int64_t stride, int64_t classes, const Samples<T>& samples, int64_t at,
                                      T* errors) {
  using V = Lanes<T>;
  const V y = V::load(samples.target_logit + at), m = V::load(samples.margin + at);
  const typename V::Ints target = V::load_ints(samples.target + at);
  const V right = V::load(static_cast<const T*>(columns.weight) + x), left = V::broadcast(1) - right;
  const int64_t base = columns.index[x];
  int32_t near[kLanes];
  for (int i = 0; i < kLanes; ++i) near[i] = static_cast<int32_t>(columns.index[x + i] - base);
  const T* from = blended + base - first;
  const int behind = columns.keeps() ? 0 : 1;
  auto solve = [&](auto pick) {
    for (int64_t j = 0; j < classes; ++j, from += stride) {
      const V all = error(left * pick(from) + right * pick(from + behind), y, m);
      drop(V::equal(target, static_cast<int32_t>(j)), all).store(errors + j * kLanes);
    }
  };
  if (columns.enlarges) {
    const typename V::Places places = V::places(near);
    solve([places](const T* p) { return V::pick(p, places); });
  } else {
    solve([&near](const T* p) {
      T lane[kLanes];
      for (int i = 0; i < kLanes; ++i) lane[i] = p[near[i]];
      return V::load(lane);
    });
  }
  return stats_of(errors, classes);
}

template <class T, class Storage>
void upsampled_forward(const UpsampledForwardArgs& a, int64_t begin, int64_t end) {
  const int64_t classes = a.hem.layout.classes, height = a.rows.out, width = a.columns.out;
  const int64_t plane = a.rows.in * a.columns.in;
  const int64_t per_row = (width + a.hem.block - 1) / a.hem.block;
  // Sixteen numbers are stored, and picked from, wherever one of them is wanted.
  const int64_t stride = (a.span + kLanes - 1) / kLanes * kLanes + kLanes;
  AlignedBuffer<T, 4096> blended(classes * stride);
  AlignedBuffer<T, 1024> errors(classes * kLanes);
  Samples<T> samples;

  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n / per_row, x = n % per_row * a.hem.block;
    const int64_t image = row / height, y = row % height;
    const int64_t left = width - x;
    const Block block{image, y * width + x, left < a.hem.block ? left : a.hem.block, row * width + x};

    const int64_t above = a.rows.index[y],
                  below = a.rows.keeps() || above + 1 == a.rows.in ? above : above + 1;
    const int64_t first = a.columns.index[x], last = a.columns.index[x + block.count - 1] + 1;
    const int64_t count = (last < a.columns.in ? last + 1 : a.columns.in) - first;
    const Storage* from = static_cast<const Storage*>(a.hem.input) + image * classes * plane + first;
    blend_rows<T>(from + above * a.columns.in, from + below * a.columns.in,
                  static_cast<const T*>(a.rows.weight)[y], classes, plane, count, blended.data(), stride);
    if (last == a.columns.in) {  // the input behind the last one counts as that
      for (int64_t j = 0; j < classes; ++j)
        blended.data()[j * stride + count] = blended.data()[j * stride + count - 1];
    }

    Partial partial{0, 0, -1};
    samples.read(
        a.hem, block, classes,
        [&](int64_t i, int64_t t) {
          const T right = static_cast<const T*>(a.columns.weight)[x + i];
          const T* at = blended.data() + t * stride + a.columns.index[x + i] - first;
          return (T(1) - right) * at[0] + right * at[a.columns.keeps() ? 0 : 1];
        },
        &partial);
    BlockSums<T> sums;
    for (int64_t at = 0; at < block.count; at += kLanes) {
      const auto stats = upsampled_errors(a.columns, x + at, first, blended.data(), stride, classes, samples,
                                          at, errors.data());
      finish_tile(a.hem, block, samples, at, errors.data(), stats, tile_words(a.hem, block, at), &sums);
    }
    sums.write(&partial);
    a.hem.partials[n] = partial;
  }
}

// One row of pixels, on its way to the two input rows around it.
template <class T>
struct PixelRow {
  const int32_t* words;  // [words, P], at the row's first pixel
  int64_t word_stride;
  const T* left;   // [width]: what a kept bit adds to the column before the pixel
  const T* right;  // ... and to the one behind it
};

// Adds a row's word w, of classes 32 * w to 32 * w + 16 * kHalves, to the sums [columns + 1, padded] of the
// input rows above and below it.
template <class T, int kHalves>
void add_word(const PixelRow<T>& row, const Axis& columns, int64_t w, T above_weight, T below_weight,
              T* above, T* below, int64_t padded) {
  using V = Lanes<T>;
  const V zero = V::broadcast(0), to_above = V::broadcast(above_weight),
          to_below = V::broadcast(below_weight);
  V left[kHalves], right[kHalves];  // of the columns `column` and the one behind it
  for (int h = 0; h < kHalves; ++h) left[h] = right[h] = zero;
  int32_t column = columns.index[0];
  bool left_is_zero = true, right_is_zero = true;
  auto flush = [&](int64_t to, const V* sums) {
    for (int h = 0; h < kHalves; ++h) {
      const int64_t at = to * padded + 32 * w + h * kLanes;
      (V::load(above + at) + to_above * sums[h]).store(above + at);
      (V::load(below + at) + to_below * sums[h]).store(below + at);
    }
  };
  const int32_t* words = row.words + w * row.word_stride;
  for (int64_t x = 0; x < columns.out; ++x) {
    const uint32_t word = static_cast<uint32_t>(words[x]);
    if (word == 0) continue;
    if (columns.index[x] != column) {
      const bool is_next = columns.index[x] == column + 1;
      if (!left_is_zero) flush(column, left);
      if (!right_is_zero && !is_next) flush(column + 1, right);
      for (int h = 0; h < kHalves; ++h) {
        left[h] = is_next ? right[h] : zero;
        right[h] = zero;
      }
      left_is_zero = !is_next || right_is_zero;
      column = columns.index[x];
    }
    const V to_left = V::broadcast(row.left[x]), to_right = V::broadcast(row.right[x]);
    for (int h = 0; h < kHalves; ++h) {
      const auto bits = V::mask_from_bits(word >> (h * kLanes) & 0xffffu);
      left[h] = accumulate(bits, left[h], to_left);
      right[h] = accumulate(bits, right[h], to_right);
    }
    left_is_zero = right_is_zero = false;
  }
  if (!left_is_zero) flush(column, left);
  if (!right_is_zero) flush(column + 1, right);
}

template <class T, class Storage>
void upsampled_backward(const UpsampledBackwardArgs& a, int64_t begin, int64_t end) {
  const Layout& layout = a.hem.layout;
  const int64_t classes = layout.classes, num_words = layout.words(), padded = 32 * num_words;
  const int64_t height = a.rows.in, width = a.columns.in, row_sums = (width + 1) * padded;
  const int64_t bands = (height + a.band - 1) / a.band, pixels = a.columns.out;
  const GradScale<T> scale(a.hem);
  AlignedBuffer<T, 1024> sums(2 * row_sums);  // input row i at i % 2
  AlignedBuffer<T, 1024> coefficients(3 * pixels);
  AlignedBuffer<int32_t, 512> targets(pixels);
  T* left = coefficients.data();
  T* right = left + pixels;
  T* target_value = right + pixels;

  for (int64_t n = begin; n < end; ++n) {
    const int64_t image = n / bands, first = n % bands * a.band;
    const int64_t last = first + a.band < height ? first + a.band : height;
    Storage* out = static_cast<Storage*>(a.hem.grad_input) + image * classes * height * width;
    // Writes input row i, if it is one of the band's, and makes room for the next but one.
    auto finish = [&](int64_t i) {
      T* from = sums.data() + i % 2 * row_sums;
      // The column behind the last one counts as that.
      for (int64_t j = 0; j < classes; ++j) from[(width - 1) * padded + j] += from[width * padded + j];
      if (i >= first && a.classes_innermost) {
        for (int64_t k = 0; k < width; ++k) {
          Storage* to = out + (i * width + k) * classes;
          for (int64_t j = 0; j < classes; ++j) to[j] = from_float<Storage>(from[k * padded + j]);
        }
      } else if (i >= first) {
        for (int64_t j = 0; j < classes; ++j) {
          Storage* to = out + (j * height + i) * width;
          for (int64_t k = 0; k < width; ++k) to[k] = from_float<Storage>(from[k * padded + j]);
        }
      }
      memset(from, 0, row_sums * sizeof(T));
    };
    memset(sums.data(), 0, 2 * row_sums * sizeof(T));

    int64_t above = first > 0 ? first - 1 : 0;
    int64_t y = 0;
    while (y < a.rows.out && a.rows.index[y] < above) ++y;
    for (; y < a.rows.out && a.rows.index[y] < last; ++y) {
      for (; above < a.rows.index[y]; ++above) finish(above);
      const T below_weight = static_cast<const T*>(a.rows.weight)[y], above_weight = T(1) - below_weight;
      const Block block{image, y * pixels, pixels, (image * a.rows.out + y) * pixels};
      const int32_t* words = a.hem.mask + image * num_words * layout.inner + y * pixels;
      read_targets(a.hem.targets, block, classes, targets.data(), nullptr);

      bool is_finished = true;
      for (int64_t x = 0; x < pixels; ++x) {
        const int64_t count = count_kept(words + x, num_words, layout.inner);
        const int32_t t = targets.data()[x];
        Coefficients<T> c{};
        if (count != 0 && t >= 0) {
          const uint32_t target_word = static_cast<uint32_t>(words[t / 32 * layout.inner + x]);
          c = scale(block.position + x, t, count, (target_word >> (t % 32)) & 1u);
          is_finished = false;
        } else {
          targets.data()[x] = -1;
        }
        const T w = static_cast<const T*>(a.columns.weight)[x];
        left[x] = (T(1) - w) * c.kept;
        right[x] = a.columns.keeps() ? T(0) : w * c.kept;
        target_value[x] = c.target;
      }
      if (is_finished) continue;

      T* sums_above = sums.data() + above % 2 * row_sums;
      const bool is_alone = a.rows.keeps() || above + 1 == height;
      T* sums_below = is_alone ? sums_above : sums.data() + (above + 1) % 2 * row_sums;
      const PixelRow<T> row{words, layout.inner, left, right};
      for (int64_t w = 0; w < num_words; ++w) {
        const auto add = classes - 32 * w > kLanes ? add_word<T, 2> : add_word<T, 1>;
        add(row, a.columns, w, above_weight, below_weight, sums_above, sums_below, padded);
      }
      for (int64_t x = 0; x < pixels; ++x) {
        const int32_t t = targets.data()[x];
        if (t < 0) continue;
        const T w = static_cast<const T*>(a.columns.weight)[x];
        const T at_left = (T(1) - w) * target_value[x];
        const T at_right = a.columns.keeps() ? T(0) : w * target_value[x];
        const int64_t at = a.columns.index[x] * padded + t;
        sums_above[at] += above_weight * at_left;
        sums_above[at + padded] += above_weight * at_right;
        sums_below[at] += below_weight * at_left;
        sums_below[at + padded] += below_weight * at_right;
      }
    }
    for (; above < last; ++above) finish(above);
  }
}

// In the order of InputType.
extern const UpsampledCpuKernels upsampled_kernels;
const UpsampledCpuKernels upsampled_kernels = {
    {upsampled_forward<float, float>, upsampled_forward<double, double>, upsampled_forward<float, BFloat16>,
     upsampled_forward<float, Float16>},
    {upsampled_backward<float, float>, upsampled_backward<double, double>,
     upsampled_backward<float, BFloat16>, upsampled_backward<float, Float16>},
};
