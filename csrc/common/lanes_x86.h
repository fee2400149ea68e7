// Sixteen float32 with AVX2 or AVX-512. Included by lanes.h.

// Four float32 from memory.
inline __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load_four(const BFloat16* p) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}
inline __m128 load_four(const Float16* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
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

  template <class Storage>
  static Vectors<Lanes, 4> load_across(const Storage* p, int64_t stride) {
    // Row 4 i + k in quarter i of vector k, whose quarters are transposed.
    const __m512 a = every_fourth(p, stride), b = every_fourth(p + stride, stride);
    const __m512 c = every_fourth(p + 2 * stride, stride), d = every_fourth(p + 3 * stride, stride);
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                  cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d AB = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                  CD = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    return {{_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd))},
            {_mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd))},
            {_mm512_castpd_ps(_mm512_unpacklo_pd(AB, CD))},
            {_mm512_castpd_ps(_mm512_unpackhi_pd(AB, CD))}};
  }

  using Places = __m512i;
  static Places places(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Lanes pick(const float* p, Places at) { return {_mm512_permutexvar_ps(at, _mm512_loadu_ps(p))}; }

  static Mask mask_from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static uint32_t bits(Mask m) { return m; }

  void store_exactly(float* p, bool streamed) const {
    if (streamed) {
      _mm512_stream_ps(p, v);
    } else {
      _mm512_storeu_ps(p, v);
    }
  }
  void store_exactly(BFloat16* p, bool streamed) const {
    store_halves(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)), streamed);
  }
  void store_exactly(Float16* p, bool streamed) const {
    store_halves(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), streamed);
  }

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Lanes from_ints(Ints a) { return {_mm512_cvtepi32_ps(a)}; }
  static Mask equal(Ints a, int32_t b) { return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(b)); }
  static Mask has_bit(Ints a, uint32_t bit) {
    return _mm512_test_epi32_mask(a, _mm512_set1_epi32(static_cast<int32_t>(bit)));
  }
  static Ints add_bits(Ints count, Ints a) {
    const __m512i of_nibble =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_set1_epi8(0x0f);
    const __m512i in_bytes =
        _mm512_add_epi8(_mm512_shuffle_epi8(of_nibble, _mm512_and_si512(a, low)),
                        _mm512_shuffle_epi8(of_nibble, _mm512_and_si512(_mm512_srli_epi16(a, 4), low)));
    const __m512i in_pairs = _mm512_maddubs_epi16(in_bytes, _mm512_set1_epi8(1));
    return _mm512_add_epi32(count, _mm512_madd_epi16(in_pairs, _mm512_set1_epi16(1)));
  }
  static void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
  static Ints or_bit(Mask m, Ints a, uint32_t bit) {
    return _mm512_mask_or_epi32(a, m, a, _mm512_set1_epi32(static_cast<int32_t>(bit)));
  }

 private:
  template <class Storage>
  static __m512 every_fourth(const Storage* p, int64_t stride) {
    __m512 v = _mm512_castps128_ps512(load_four(p));
    v = _mm512_insertf32x4(v, load_four(p + 4 * stride), 1);
    v = _mm512_insertf32x4(v, load_four(p + 8 * stride), 2);
    return _mm512_insertf32x4(v, load_four(p + 12 * stride), 3);
  }
  static void store_halves(void* p, __m256i halves, bool streamed) {
    if (streamed) {
      _mm256_stream_si256(static_cast<__m256i*>(p), halves);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
    }
  }
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
inline Lanes<float> drop(Lanes<float>::Mask m, Lanes<float> a) { return keep(static_cast<__mmask16>(~m), a); }
inline Lanes<float> select(Lanes<float>::Mask m, Lanes<float> a, Lanes<float> b) {
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
}
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

  template <class Storage>
  static Vectors<Lanes, 4> load_across(const Storage* p, int64_t stride) {
    const Four lo = transposed(p, stride), hi = transposed(p + 8 * stride, stride);
    return {{lo.a, hi.a}, {lo.b, hi.b}, {lo.c, hi.c}, {lo.d, hi.d}};
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

  void store_exactly(float* p, bool streamed) const {
    if (streamed) {
      _mm256_stream_ps(p, lo);
      _mm256_stream_ps(p + 8, hi);
    } else {
      store(p);
    }
  }
  void store_exactly(BFloat16* p, bool streamed) const {
    const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(lo), 16);
    const __m256i b = _mm256_srli_epi32(_mm256_castps_si256(hi), 16);
    store_halves(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8), streamed);
  }
  void store_exactly(Float16* p, bool streamed) const {
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    store_halves(p, _mm256_set_m128i(_mm256_cvtps_ph(hi, kRounding), _mm256_cvtps_ph(lo, kRounding)),
                 streamed);
  }

  static Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Ints load_ints(const int32_t* p) {
    const __m256i* eights = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(eights), _mm256_loadu_si256(eights + 1)};
  }
  static Lanes from_ints(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static Mask equal(Ints a, int32_t b) {
    const __m256i all = _mm256_set1_epi32(b);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lo, all)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.hi, all))};
  }
  static Mask has_bit(Ints a, uint32_t bit) {
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bit));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.lo, all), all)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.hi, all), all))};
  }
  static Ints add_bits(Ints count, Ints a) {
    return {_mm256_add_epi32(count.lo, bits_of(a.lo)), _mm256_add_epi32(count.hi, bits_of(a.hi))};
  }
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
  struct Four {
    __m256 a, b, c, d;
  };
  // Four numbers of each of eight rows.
  template <class Storage>
  static Four transposed(const Storage* p, int64_t stride) {
    // Row 4 i + k in half i of vector k, whose halves are transposed.
    const __m256 a = every_fourth(p, stride), b = every_fourth(p + stride, stride);
    const __m256 c = every_fourth(p + 2 * stride, stride), d = every_fourth(p + 3 * stride, stride);
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)),
                  cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d AB = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)),
                  CD = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    return {_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpacklo_pd(AB, CD)), _mm256_castpd_ps(_mm256_unpackhi_pd(AB, CD))};
  }
  template <class Storage>
  static __m256 every_fourth(const Storage* p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(p)), load_four(p + 4 * stride), 1);
  }
  static void store_halves(void* p, __m256i halves, bool streamed) {
    if (streamed) {
      _mm256_stream_si256(static_cast<__m256i*>(p), halves);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
    }
  }
  static __m256i bits_of(__m256i a) {
    const __m256i of_nibble =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_set1_epi8(0x0f);
    const __m256i in_bytes =
        _mm256_add_epi8(_mm256_shuffle_epi8(of_nibble, _mm256_and_si256(a, low)),
                        _mm256_shuffle_epi8(of_nibble, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(in_bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
  }
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
inline Lanes<float> drop(Lanes<float>::Mask m, Lanes<float> a) {
  return {_mm256_andnot_ps(m.lo, a.lo), _mm256_andnot_ps(m.hi, a.hi)};
}
inline Lanes<float> select(Lanes<float>::Mask m, Lanes<float> a, Lanes<float> b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline Lanes<float> accumulate(Lanes<float>::Mask m, Lanes<float> sum, Lanes<float> a) {
  return sum + keep(m, a);
}
inline __m256 low_half(Lanes<float> a) { return a.lo; }
inline __m256 high_half(Lanes<float> a) { return a.hi; }

#endif

// The trees of lanes.h, in registers.
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
