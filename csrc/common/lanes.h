// Sixteen numbers side by side. Every instruction set has the same sixteen lanes, so sums are taken in
// the same order and the results are the same bits on all of them.
//
// Included by hem_cpu_*.cpp in a namespace of its own per instruction set, after <cstdint>, <cstring>,
// <immintrin.h> and half.h.

constexpr int kLanes = 16;

// --- portable: arrays that the compiler vectorises; also float64 on every instruction set ---

template <class T>
struct Lanes {
  using Scalar = T;
  using Mask = uint32_t;  // bit i: lane i
  struct Ints {
    int32_t lane[kLanes];
  };

  T lane[kLanes];

  static Lanes broadcast(T x) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
    return r;
  }
  template <class Storage>
  static Lanes load(const Storage* p) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  // The first n lanes from memory, the rest 0; touches nothing past p[n - 1].
  template <class Storage>
  static Lanes load_first(const Storage* p, int n) {
    Lanes r = broadcast(0);
    for (int i = 0; i < n; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = lane[i];
  }

  // Lane i is p[places[i]]. The places ascend from 0, by at most one a lane; sixteen numbers are read.
  using Places = const int32_t*;
  static Places places(const int32_t* p) { return p; }
  static Lanes pick(const T* p, Places at) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = p[at[i]];
    return r;
  }

  static Mask mask_from_bits(uint32_t bits) { return bits; }
  static uint32_t bits(Mask m) { return m; }

  static Ints zero_ints() {
    Ints r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = 0;
    return r;
  }
  static void store_ints(int32_t* p, Ints a) {
    for (int i = 0; i < kLanes; ++i) p[i] = a.lane[i];
  }
  // a | bit where the mask is set.
  static Ints or_bit(Mask m, Ints a, uint32_t bit) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] |= (m >> i) & 1 ? int32_t(bit) : 0;
    return a;
  }
};

// Free functions: GCC 12 does not compile friends that are defined in a class for the selected target.
template <class T>
Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
template <class T>
Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}
template <class T>
Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
template <class T>
Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] /= b.lane[i];
  return a;
}
// max(0, x), NaN stays NaN.
template <class T>
Lanes<T> positive_part(Lanes<T> a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] < 0 ? T(0) : a.lane[i];
  return a;
}
// b where a is NaN.
template <class T>
Lanes<T> maximum(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
template <class T>
Lanes<T> minimum(Lanes<T> a, Lanes<T> b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
template <class T>
uint32_t operator>=(Lanes<T> a, Lanes<T> b) {
  uint32_t m = 0;
  for (int i = 0; i < kLanes; ++i) m |= uint32_t(a.lane[i] >= b.lane[i]) << i;
  return m;
}
template <class T>
uint32_t operator>(Lanes<T> a, Lanes<T> b) {
  uint32_t m = 0;
  for (int i = 0; i < kLanes; ++i) m |= uint32_t(a.lane[i] > b.lane[i]) << i;
  return m;
}
// sum + a where the mask is set.
template <class T>
Lanes<T> accumulate(uint32_t m, Lanes<T> sum, Lanes<T> a) {
  for (int i = 0; i < kLanes; ++i) sum.lane[i] += (m >> i) & 1 ? a.lane[i] : T(0);
  return sum;
}
template <class T>
uint32_t is_nan(Lanes<T> a) {
  uint32_t m = 0;
  for (int i = 0; i < kLanes; ++i) m |= uint32_t(a.lane[i] != a.lane[i]) << i;
  return m;
}
// a where the mask is set, 0 elsewhere.
template <class T>
Lanes<T> keep(uint32_t m, Lanes<T> a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = (m >> i) & 1 ? a.lane[i] : T(0);
  return a;
}

#if defined(HEM_LANES_AVX512)

template <>
struct Lanes<float> {
  using Scalar = float;
  using Mask = __mmask16;
  using Ints = __m512i;

  __m512 v;

  static Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
  }
  static Lanes load(const Float16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
  }
  static Lanes load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Lanes load_first(const BFloat16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), p);
  }
  static Lanes load_first(const Float16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  using Places = __m512i;
  static Places places(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Lanes pick(const float* p, Places at) { return {_mm512_permutexvar_ps(at, _mm512_loadu_ps(p))}; }

  static Mask mask_from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static uint32_t bits(Mask m) { return m; }

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
  static Ints or_bit(Mask m, Ints a, uint32_t bit) {
    return _mm512_mask_or_epi32(a, m, a, _mm512_set1_epi32(static_cast<int32_t>(bit)));
  }

 private:
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Lanes widen(__m256i halves, const BFloat16*) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  static Lanes widen(__m256i halves, const Float16*) { return {_mm512_cvtph_ps(halves)}; }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes<float> operator/(Lanes<float> a, Lanes<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
// The instruction returns its second operand when either is NaN.
inline Lanes<float> positive_part(Lanes<float> a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
inline Lanes<float> maximum(Lanes<float> a, Lanes<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes<float> minimum(Lanes<float> a, Lanes<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes<float>::Mask operator>=(Lanes<float> a, Lanes<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
}
inline Lanes<float>::Mask operator>(Lanes<float> a, Lanes<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
inline Lanes<float>::Mask is_nan(Lanes<float> a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Lanes<float> keep(Lanes<float>::Mask m, Lanes<float> a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
inline Lanes<float> accumulate(Lanes<float>::Mask m, Lanes<float> sum, Lanes<float> a) {
  return {_mm512_mask_add_ps(sum.v, m, sum.v, a.v)};
}
inline __m256 low_half(Lanes<float> a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Lanes<float> a) { return _mm512_extractf32x8_ps(a.v, 1); }

#elif defined(HEM_LANES_AVX2)

template <>
struct Lanes<float> {
  using Scalar = float;
  struct Mask {
    __m256 lo, hi;
  };
  struct Ints {
    __m256i lo, hi;
  };

  __m256 lo, hi;

  static Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes load(const BFloat16* p) { return {widen(p), widen(p + 8)}; }
  static Lanes load(const Float16* p) { return {widen(p), widen(p + 8)}; }
  static Lanes load_first(const float* p, int n) {
    const Mask m = mask_from_bits((1u << n) - 1u);
    return {_mm256_maskload_ps(p, _mm256_castps_si256(m.lo)),
            _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi))};
  }
  template <class Storage>
  static Lanes load_first(const Storage* p, int n) {
    if (n == kLanes) return load(p);
    Storage copy[kLanes];
    memset(copy, 0, sizeof(copy));
    memcpy(copy, p, n * sizeof(Storage));
    return load(copy);
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }

  struct Places {
    __m256i lo, hi;
    int32_t first_of_hi;
  };
  static Places places(const int32_t* p) {
    const __m256i* eights = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(eights),
            _mm256_sub_epi32(_mm256_loadu_si256(eights + 1), _mm256_set1_epi32(p[8])), p[8]};
  }
  static Lanes pick(const float* p, Places at) {
    return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), at.lo),
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(p + at.first_of_hi), at.hi)};
  }

  static Mask mask_from_bits(uint32_t bits) {
    const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i high = _mm256_slli_epi32(low, 8);
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
  }
  static uint32_t bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi))
                                                                 << 8;
  }

  static Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static void store_ints(int32_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
  }
  static Ints or_bit(Mask m, Ints a, uint32_t bit) {
    const __m256i one = _mm256_set1_epi32(static_cast<int32_t>(bit));
    return {_mm256_or_si256(a.lo, _mm256_and_si256(_mm256_castps_si256(m.lo), one)),
            _mm256_or_si256(a.hi, _mm256_and_si256(_mm256_castps_si256(m.hi), one))};
  }

 private:
  static __m256 widen(const BFloat16* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static __m256 widen(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes<float> operator/(Lanes<float> a, Lanes<float> b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
// The instruction returns its second operand when either is NaN.
inline Lanes<float> positive_part(Lanes<float> a) {
  return {_mm256_max_ps(_mm256_setzero_ps(), a.lo), _mm256_max_ps(_mm256_setzero_ps(), a.hi)};
}
inline Lanes<float> maximum(Lanes<float> a, Lanes<float> b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Lanes<float> minimum(Lanes<float> a, Lanes<float> b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Lanes<float>::Mask operator>=(Lanes<float> a, Lanes<float> b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}
inline Lanes<float>::Mask operator>(Lanes<float> a, Lanes<float> b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Lanes<float>::Mask is_nan(Lanes<float> a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline Lanes<float> keep(Lanes<float>::Mask m, Lanes<float> a) {
  return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)};
}
inline Lanes<float> accumulate(Lanes<float>::Mask m, Lanes<float> sum, Lanes<float> a) {
  return sum + keep(m, a);
}
inline __m256 low_half(Lanes<float> a) { return a.lo; }
inline __m256 high_half(Lanes<float> a) { return a.hi; }

#endif

// Adds the sixteen lanes as a tree.
template <class V>
inline typename V::Scalar sum_of_lanes(V x) {
  typename V::Scalar lane[kLanes];
  x.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <class V>
inline typename V::Scalar max_of_lanes(V x) {
  typename V::Scalar lane[kLanes];
  x.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

#if defined(HEM_LANES_AVX512) || defined(HEM_LANES_AVX2)
// The same trees, in registers.
inline float sum_of_lanes(Lanes<float> x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_of_lanes(Lanes<float> x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

// Sums a long sequence of vectors as a binary tree over groups, so that the rounding error grows with
// the logarithm of the length: a serial float32 mean of 128k equal errors exceeds every one of them.
template <class V>
class TreeSum {
 public:
  bool empty() const { return count_ == 0; }
  void push(V x) {
    int level = 0;
    for (uint32_t n = count_++; n & 1u; n >>= 1) x = levels_[level++] + x;
    levels_[level] = x;
  }
  V total() const {
    V sum = V::broadcast(0);
    int level = 0;
    for (uint32_t n = count_; n != 0; n >>= 1, ++level) {
      if (n & 1u) sum = levels_[level] + sum;
    }
    return sum;
  }

 private:
  uint32_t count_ = 0;
  V levels_[32];
};
