// What the CPU kernels of every op share: targets, sixteen samples from their errors to their losses, and
// what backward writes for a sample. Included by *_cpu_{baseline,avx2,avx512}.cpp inside a namespace and a
// target region of their own, after lanes.h and hem_math.h. No includes in here.

// Vectors between two levels of the summation tree.
constexpr int64_t kChunk = 64;

// Consecutive samples of one image.
struct Block {
  int64_t outer, inner;  // of the first sample
  int64_t count;
  int64_t position;  // of the first sample, as targets and losses count them
};

template <class Int>
inline void copy_targets(const Int* from, int64_t ignore_index, const Block& block, int64_t classes,
                         int32_t* to, Partial* partial) {
  auto is_class = [classes](int64_t target) { return static_cast<uint64_t>(target) < uint64_t(classes); };
  int bad = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t target = static_cast<int64_t>(from[block.position + i]);
    const bool good = is_class(target), ignored = target == ignore_index;
    to[i] = (good & !ignored) ? static_cast<int32_t>(target) : -1;
    bad |= !good & !ignored;
  }
  if (bad == 0 || partial == nullptr) return;
  for (int64_t i = 0; i < block.count && partial->bad_target < 0; ++i) {
    const int64_t target = static_cast<int64_t>(from[block.position + i]);
    if (!is_class(target) && target != ignore_index) partial->bad_target = block.position + i;
  }
}

// The block's targets as classes, -1 for those to leave out.
inline void read_targets(const Targets& targets, const Block& block, int64_t classes, int32_t* to,
                         Partial* partial) {
  switch (targets.type) {
    case TargetType::kInt64:
      copy_targets(static_cast<const int64_t*>(targets.data), targets.ignore_index, block, classes, to,
                   partial);
      break;
    case TargetType::kInt32:
      copy_targets(static_cast<const int32_t*>(targets.data), targets.ignore_index, block, classes, to,
                   partial);
      break;
    case TargetType::kUInt8:
      copy_targets(static_cast<const uint8_t*>(targets.data), targets.ignore_index, block, classes, to,
                   partial);
      break;
  }
}

// What forward needs of each sample in a block; the tail up to a multiple of sixteen is ignored samples.
template <class T>
struct Samples {
  alignas(64) int32_t target[kMaxBlock];  // -1: ignored
  alignas(64) T target_logit[kMaxBlock];  // NaN where ignored: such a lane keeps nothing
  alignas(64) T margin[kMaxBlock];
  alignas(64) T weight[kMaxBlock];

  // Of so many classes; `logit_at(i, t)`: of sample i and class t.
  template <class LogitAt>
  void read(const ForwardArgs& a, const Block& block, int64_t classes, const LogitAt& logit_at,
            Partial* partial) {
    read_targets(a.targets, block, classes, target, partial);
    const T* margins = static_cast<const T*>(a.margins);
    const T* weights = static_cast<const T*>(a.weight);
    for (int64_t i = 0; i < block.count; ++i) {
      const int32_t t = target[i];
      target_logit[i] = t < 0 ? T(__builtin_nan("")) : T(logit_at(i, t));
    }
    for (int64_t i = 0; i < block.count; ++i) weight[i] = target[i] < 0 ? T(0) : T(1);
    for (int64_t i = 0; i < block.count; ++i) margin[i] = T(a.margin);
    for (int64_t i = 0; weights != nullptr && i < block.count; ++i) {
      if (target[i] >= 0) weight[i] = weights[target[i]];
    }
    for (int64_t i = 0; margins != nullptr && i < block.count; ++i) {
      if (target[i] >= 0) margin[i] = margins[target[i]];
    }
    for (int64_t i = block.count; i % kLanes != 0; ++i) {
      target[i] = -1;
      target_logit[i] = T(__builtin_nan(""));
      margin[i] = weight[i] = T(0);
    }
  }
};

template <class T>
inline T largest_finite();
template <>
inline float largest_finite<float>() {
  return __FLT_MAX__;
}
template <>
inline double largest_finite<double>() {
  return __DBL_MAX__;
}

// The least number that compares above 0: a subnormal one, unless torch.set_flush_denormal makes these 0.
template <class T>
inline T smallest_positive() {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const volatile T subnormal = kIsFloat ? T(__FLT_DENORM_MIN__) : T(__DBL_DENORM_MIN__);
  return subnormal > 0 ? subnormal : kIsFloat ? T(__FLT_MIN__) : T(__DBL_MIN__);
}

// Sum and largest of a sequence of errors, four running sums wide.
template <class V>
class ErrorSum {
 public:
  // Spelled out: GCC 12 compiles a constructor of its own making for the baseline, and calls it.
  HEM_INLINE ErrorSum() : largest(V::broadcast(0)) { clear(); }

  V largest;

  HEM_INLINE void add(int column, V e) { running_[column] = running_[column] + e; }
  template <class Mask>
  HEM_INLINE void add_kept(int column, Mask k, V e) {
    running_[column] = accumulate(k, running_[column], e);
  }
  HEM_INLINE void end_chunk() {
    tree_.push(running_total());
    clear();
  }
  HEM_INLINE V total() const { return tree_.empty() ? running_total() : tree_.total() + running_total(); }

 private:
  HEM_INLINE V running_total() const { return (running_[0] + running_[1]) + (running_[2] + running_[3]); }

  HEM_INLINE void clear() {
    for (V& r : running_) r = V::broadcast(0);
  }

  V running_[4];
  TreeSum<V> tree_;
};

// Where the words of one tile go: word w of lane i at data[w * word_stride + i * lane_stride].
struct TileWords {
  int32_t* data;
  int64_t word_stride, lane_stride;
  int lanes;
};

template <class V>
inline void store_word(const TileWords& to, int64_t w, typename V::Ints word) {
  if (to.lane_stride == 1 && to.lanes == kLanes) {
    V::store_ints(to.data + w * to.word_stride, word);
    return;
  }
  int32_t lane[kLanes];
  V::store_ints(lane, word);
  for (int i = 0; i < to.lanes; ++i) to.data[w * to.word_stride + i * to.lane_stride] = lane[i];
}

// What decides which errors of sixteen samples are kept.
template <class V>
struct ErrorStats {
  V sum, largest;
};

// Of errors [C, 16].
template <class T>
ErrorStats<Lanes<T>> stats_of(const T* errors, int64_t classes) {
  using V = Lanes<T>;
  ErrorSum<V> sum;
  for (int64_t j = 0; j < classes; sum.end_chunk()) {
    const int64_t end = classes - j < kChunk ? classes : j + kChunk;
    for (; j + 4 <= end; j += 4) {
      for (int k = 0; k < 4; ++k) {
        const V e = V::load(errors + (j + k) * kLanes);
        sum.add(k, e);
        sum.largest = maximum(e, sum.largest);
      }
    }
    for (int k = 0; j < end; ++j, ++k) {
      const V e = V::load(errors + j * kLanes);
      sum.add(k, e);
      sum.largest = maximum(e, sum.largest);
    }
  }
  return {sum.total(), sum.largest};
}

// What is kept of sixteen samples.
template <class V>
struct KeptLanes {
  V sum;
  typename V::Ints count;
};

// The errors [C, 16] of sixteen samples that are `cut` at least; writes their bits.
template <class T>
HEM_INLINE KeptLanes<Lanes<T>> keep_of_tile(const T* errors, int64_t classes, Lanes<T> cut,
                                            const TileWords& words) {
  using V = Lanes<T>;
  ErrorSum<V> sum;
  typename V::Ints count = V::zero_ints();
  for (int64_t w = 0; 32 * w < classes; ++w) {
    typename V::Ints word = V::zero_ints();
    const int64_t first = 32 * w;
    const int in_word = classes - first < 32 ? static_cast<int>(classes - first) : 32;
    auto look = [&](int b, int column) {
      const V e = V::load(errors + (first + b) * kLanes);
      const auto k = e >= cut;
      sum.add_kept(column, k, e);
      word = V::or_bit(k, word, 1u << b);
    };
    int b = 0;
    for (; b + 4 <= in_word; b += 4) {
      for (int column = 0; column < 4; ++column) look(b + column, column);
    }
    for (int column = 0; b < in_word; ++b, ++column) look(b, column);
    sum.end_chunk();
    count = V::add_bits(count, word);
    store_word<V>(words, w, word);
  }
  return {sum.total(), count};
}

// The losses of sixteen samples from their errors [C, 16], target's error 0; writes the kept bits.
template <class T>
Lanes<T> solve_tile(const T* errors, int64_t classes, ErrorStats<Lanes<T>> stats, const T* target_logit,
                    uint32_t valid, const TileWords& words) {
  using V = Lanes<T>;
  const V error_sum = stats.sum;
  const V y = V::load(target_logit);
  const uint32_t is_broken = (V::bits(is_nan(error_sum)) | V::bits(is_nan(y))) & valid;
  if ((V::bits(stats.largest > V::broadcast(0)) | is_broken) ==
      0) {  // all finished, as most are late in training
    for (int64_t w = 0; 32 * w < classes; ++w) store_word<V>(words, w, V::zero_ints());
    return V::broadcast(0);
  }
  const V cut = cutoff(threshold(error_sum, V::broadcast(T(classes)), stats.largest),
                       V::broadcast(smallest_positive<T>()));
  const KeptLanes<V> kept = keep_of_tile<T>(errors, classes, cut, words);
  V loss = kept.sum / maximum(V::from_ints(kept.count), V::broadcast(1));

  const uint32_t finite = V::bits(V::broadcast(largest_finite<T>()) >= loss);
  const uint32_t broken = is_broken | (~finite & valid);
  if (broken != 0) {
    T lane[kLanes];
    loss.store(lane);
    for (int i = 0; i < kLanes; ++i) {
      if (((broken >> i) & 1u) == 0) continue;
      lane[i] = T(__builtin_nan(""));
      for (int64_t w = 0; 32 * w < classes; ++w) {
        words.data[w * words.word_stride + i * words.lane_stride] =
            static_cast<int32_t>(all_bits(classes, w));
      }
    }
    loss = V::load(lane);
  }
  return loss;
}

// The sums of a block, a lane for every sixteenth sample.
template <class T>
struct BlockSums {
  using V = Lanes<T>;
  V loss, weight;

  HEM_INLINE BlockSums() : loss(V::broadcast(0)), weight(V::broadcast(0)) {}  // spelled out, as above

  void write(Partial* partial) const {
    partial->loss = sum_of_lanes(loss);
    partial->weight = sum_of_lanes(weight);
  }
};

// Sixteen samples of a block, from sample `at` on: their errors [C, 16] to their bits, losses and sums.
// `words` is where those of the first one go.
template <class T>
void finish_tile(const ForwardArgs& a, const Block& block, const Samples<T>& samples, int64_t at,
                 const T* errors, ErrorStats<Lanes<T>> stats, TileWords words, BlockSums<T>* sums) {
  using V = Lanes<T>;
  const uint32_t valid = ~V::bits(V::equal(V::load_ints(samples.target + at), -1));
  const V loss =
      solve_tile<T>(errors, a.layout.classes, stats, samples.target_logit + at, valid & 0xffffu, words);
  const V weight = V::load(samples.weight + at);
  const V weighted = weight * loss;
  sums->loss = sums->loss + weighted;
  sums->weight = sums->weight + (a.count_all ? weight : keep(loss > V::broadcast(0), weight));
  if (a.losses != nullptr) {
    T lane[kLanes];
    weighted.store(lane);
    memcpy(static_cast<T*>(a.losses) + block.position + at, lane, words.lanes * sizeof(T));
  }
}

// Where the words of sixteen samples of a block go, from sample `at` on.
inline TileWords tile_words(const ForwardArgs& a, const Block& block, int64_t at) {
  const int64_t left = block.count - at, num_words = a.layout.words(), inner = block.inner + at;
  const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
  if (a.layout.rows) return {a.mask + inner * num_words, 1, num_words, lanes};
  return {a.mask + block.outer * num_words * a.layout.inner + inner, a.layout.inner, 1, lanes};
}

// What backward writes for one sample: `kept` at its kept bits, `target` at its target, 0 elsewhere.
template <class T>
struct Coefficients {
  T kept, target;
};

template <class T>
class GradScale {
 public:
  explicit GradScale(const BackwardArgs& a)
      : grads_(static_cast<const T*>(a.grad_loss)),
        weights_(static_cast<const T*>(a.weight)),
        per_sample_(a.grad_per_sample) {
    if (per_sample_) return;
    const T denominator = *static_cast<const T*>(a.denominator);
    common_ = denominator > 0 ? grads_[0] / denominator : T(0);
  }

  // What reaches a sample of class `target`.
  T of(int64_t position, int32_t target) const {
    return (per_sample_ ? grads_[position] : common_) * (weights_ == nullptr ? T(1) : weights_[target]);
  }

  // What reaches sixteen samples, nothing where there is no class.
  Lanes<T> lanes(int64_t position, const int32_t* targets) const {
    using V = Lanes<T>;
    if (!per_sample_ && weights_ == nullptr) {
      return drop(V::equal(V::load_ints(targets), -1), V::broadcast(common_));
    }
    T g[kLanes];
    for (int i = 0; i < kLanes; ++i) g[i] = targets[i] < 0 ? T(0) : of(position + i, targets[i]);
    return V::load(g);
  }

  Coefficients<T> operator()(int64_t position, int32_t target, int64_t count, bool broken) const {
    const T g = of(position, target), nan = T(__builtin_nan(""));
    if (broken) return {nan, nan};
    return {g / T(count), -g};
  }

 private:
  const T* grads_;
  const T* weights_;
  bool per_sample_;
  T common_ = T(0);
};
