// Sixteen numbers side by side. Every instruction set has the same sixteen lanes, so sums are taken in
// the same order and the results are the same bits on all of them.
//
// Here in the vector extensions of GCC and Clang, which are NEON on arm64 and whatever another processor has;
// float32 on x86-64 with AVX2 or AVX-512 is in lanes_x86.h.
//
// Included by *_cpu_*.cpp in a namespace of its own per instruction set, after <cstdint>, <cstring>,
// <immintrin.h>, macros.h and half.h.

constexpr int kLanes = 16;
// Bytes of a vector register, and sets of sixteen float32 that the registers hold beside each other, with all
// that belongs to them.
#if defined(HEM_LANES_AVX512)
constexpr int kVectorBytes = 64, kSets = 4;
#elif defined(HEM_LANES_AVX2)
constexpr int kVectorBytes = 32, kSets = 2;
#else
constexpr int kVectorBytes = 16, kSets = 1;
#endif

// GCC has it since its version 12.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HEM_HAS_SHUFFLE 1
#endif
#endif

// As many vectors as sixteen numbers take: members beside each other, as GCC 12 keeps arrays, and structures
// in structures, in memory.
template <class V, int kCount>
struct Vectors;
template <class V>
struct Vectors<V, 2> {
  V a, b;
};
template <class V>
struct Vectors<V, 4> {
  V a, b, c, d;
};
template <class V>
struct Vectors<V, 8> {
  V a, b, c, d, e, f, g, h;
};

// f(k) for vector k.
template <int kCount, class F>
HEM_INLINE auto make_vectors(F f) {
  using Result = Vectors<decltype(f(0)), kCount>;
  if constexpr (kCount == 2) {
    return Result{f(0), f(1)};
  } else if constexpr (kCount == 4) {
    return Result{f(0), f(1), f(2), f(3)};
  } else {
    return Result{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)};
  }
}

// f of every vector, or of those of several at the same place.
template <class F, int kCount, class... V>
HEM_INLINE auto each(F f, Vectors<V, kCount>... x) {
  using Result = Vectors<decltype(f(x.a...)), kCount>;
  if constexpr (kCount == 2) {
    return Result{f(x.a...), f(x.b...)};
  } else if constexpr (kCount == 4) {
    return Result{f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
  } else {
    return Result{f(x.a...), f(x.b...), f(x.c...), f(x.d...), f(x.e...), f(x.f...), f(x.g...), f(x.h...)};
  }
}

// f(k, v) for vector k.
template <class F, class V, int kCount>
HEM_INLINE void visit_vectors(F f, Vectors<V, kCount> x) {
  f(0, x.a), f(1, x.b);
  if constexpr (kCount >= 4) f(2, x.c), f(3, x.d);
  if constexpr (kCount == 8) f(4, x.e), f(5, x.f), f(6, x.g), f(7, x.h);
}

// Vectors of a number, and of integers as wide, for masks and labels.
template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UIntVector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VectorTypes<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVector __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UIntVector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 4)));
};

template <class T>
struct Lanes {
  using Scalar = T;
  using Int = typename VectorTypes<T>::Int;
  using Vector = typename VectorTypes<T>::Vector;
  using IntVector = typename VectorTypes<T>::IntVector;
  using UIntVector = typename VectorTypes<T>::UIntVector;
  using Int32Vector = typename VectorTypes<T>::Int32Vector;
  using Halves = typename VectorTypes<T>::Halves;
  static constexpr int kEach = kVectorBytes / sizeof(T), kVectors = kLanes / kEach;
  using Mask = Vectors<IntVector, kVectors>;  // a lane is all ones or all zeros
  using Ints = Vectors<IntVector, kVectors>;

  Vectors<Vector, kVectors> vectors;

  HEM_INLINE static Lanes broadcast(T x) {
    return {make_vectors<kVectors>([x](int) { return splat(x); })};
  }
  template <class Storage>
  HEM_INLINE static Lanes load(const Storage* p) {
    return {
        make_vectors<kVectors>([p](int k) __attribute__((always_inline)) { return widen(p + k * kEach); })};
  }
  // The first n lanes from memory, the rest 0; touches nothing past p[n - 1].
  template <class Storage>
  HEM_INLINE static Lanes load_first(const Storage* p, int n) {
    if (n == kLanes) return load(p);
    Storage copy[kLanes];
    memset(copy, 0, sizeof(copy));
    memcpy(copy, p, n * sizeof(Storage));
    return load(copy);
  }
  HEM_INLINE void store(T* p) const {
    visit_vectors([p](int k, Vector v) { memcpy(p + k * kEach, &v, sizeof(v)); }, vectors);
  }

  // Four numbers of each of sixteen rows, a vector for every column.
  template <class Storage>
  HEM_INLINE static Vectors<Lanes, 4> load_across(const Storage* p, int64_t stride) {
#if HEM_HAS_SHUFFLE
    if constexpr (kEach == 4) {
      const auto a = transposed(p, stride), b = transposed(p + 4 * stride, stride);
      const auto c = transposed(p + 8 * stride, stride), d = transposed(p + 12 * stride, stride);
      return {{{a.a, b.a, c.a, d.a}}, {{a.b, b.b, c.b, d.b}}, {{a.c, b.c, c.c, d.c}}, {{a.d, b.d, c.d, d.d}}};
    }
#endif
    T column[4][kLanes];
    for (int i = 0; i < kLanes; ++i, p += stride) {
      for (int k = 0; k < 4; ++k) column[k][i] = to_float(p[k]);
    }
    return {load(column[0]), load(column[1]), load(column[2]), load(column[3])};
  }

  // Lane i is p[places[i]]. The places ascend from 0, by at most one a lane; sixteen numbers are read.
  using Places = const int32_t*;
  static Places places(const int32_t* p) { return p; }
  HEM_INLINE static Lanes pick(const T* p, Places at) {
    T lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = p[at[i]];
    return load(lane);
  }

  HEM_INLINE static Mask mask_from_bits(uint32_t bits) {
    return make_vectors<kVectors>([bits](int k) {
      const IntVector own = bits_of_lanes(k);
      return IntVector((splat_int(static_cast<Int>(bits)) & own) == own);
    });
  }
  // Bit i: lane i.
  HEM_INLINE static uint32_t bits(Mask m) {
    IntVector all{};
    visit_vectors([&all](int k, IntVector v) { all |= v & bits_of_lanes(k); }, m);
    Int together = 0;
    for (int i = 0; i < kEach; ++i) together |= all[i];
    return static_cast<uint32_t>(together);
  }

  // Converts what the type in memory holds exactly; `streamed` past the caches, where there is a way and p is
  // aligned.
  template <class Storage>
  HEM_INLINE void store_exactly(Storage* p, bool /*streamed*/) const {
    visit_vectors([p](int k, Vector v) __attribute__((always_inline)) { narrow(v, p + k * kEach); }, vectors);
  }

  HEM_INLINE static Ints zero_ints() {
    return make_vectors<kVectors>([](int) { return IntVector{}; });
  }
  HEM_INLINE static Ints load_ints(const int32_t* p) {
    return make_vectors<kVectors>([p](int k) {
      Int32Vector v;
      memcpy(&v, p + k * kEach, sizeof(v));
      return __builtin_convertvector(v, IntVector);
    });
  }
  HEM_INLINE static void store_ints(int32_t* p, Ints a) {
    visit_vectors(
        [p](int k, IntVector v) {
          const Int32Vector narrow = __builtin_convertvector(v, Int32Vector);
          memcpy(p + k * kEach, &narrow, sizeof(narrow));
        },
        a);
  }
  HEM_INLINE static Lanes from_ints(Ints a) {
    return {each([](IntVector v) { return __builtin_convertvector(v, Vector); }, a)};
  }
  HEM_INLINE static Mask equal(Ints a, int32_t b) {
    return each([b](IntVector v) { return IntVector(v == splat_int(b)); }, a);
  }
  HEM_INLINE static Mask has_bit(Ints a, uint32_t bit) {
    return each(
        [bit](IntVector v) { return IntVector((v & splat_int(static_cast<Int>(bit))) != IntVector{}); }, a);
  }
  // count + how many bits of a are set.
  HEM_INLINE static Ints add_bits(Ints count, Ints a) {
    return each([](IntVector n, IntVector v) { return n + count_bits(v); }, count, a);
  }
  // a | bit where the mask is set.
  HEM_INLINE static Ints or_bit(Mask m, Ints a, uint32_t bit) {
    return each([bit](IntVector on, IntVector v) { return v | (on & splat_int(static_cast<Int>(bit))); }, m,
                a);
  }

 private:
  // A difference, as a sum would lose the sign of -0.
  HEM_INLINE static Vector splat(T x) { return x - Vector{}; }
  HEM_INLINE static IntVector splat_int(Int x) { return x - IntVector{}; }

  HEM_INLINE static IntVector bits_of_lanes(int k) {
    constexpr Int kBits[kLanes] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                   1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    IntVector v;
    memcpy(&v, kBits + k * kEach, sizeof(v));
    return v;
  }

  HEM_INLINE static IntVector count_bits(IntVector v) {
    UIntVector n = UIntVector(v);  // where it is wider, the sign above is masked away
    n = n - ((n >> 1) & 0x55555555u);
    n = (n & 0x33333333u) + ((n >> 2) & 0x33333333u);
    n = (n + (n >> 4)) & 0x0f0f0f0fu;
    n = n + (n >> 8);
    return IntVector((n + (n >> 16)) & 0x3fu);
  }

#if HEM_HAS_SHUFFLE
  // Four numbers of each of four rows.
  template <class Storage>
  HEM_INLINE static Vectors<Vector, 4> transposed(const Storage* p, int64_t stride) {
    const Vector a = widen(p), b = widen(p + stride), c = widen(p + 2 * stride), d = widen(p + 3 * stride);
    const Vector ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Vector AB = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                 CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
            __builtin_shufflevector(AB, CD, 0, 1, 4, 5), __builtin_shufflevector(AB, CD, 2, 3, 6, 7)};
  }
#endif

  HEM_INLINE static Vector widen(const T* p) {
    Vector v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  HEM_INLINE static void narrow(Vector v, T* p) { memcpy(p, &v, sizeof(v)); }

  // to_float() and from_float() of half.h; what these choose, chosen by masks.
  HEM_INLINE static UIntVector load_halves(const void* p) {
    Halves halves;
    memcpy(&halves, p, sizeof(halves));
    return __builtin_convertvector(halves, UIntVector);
  }
  HEM_INLINE static void store_halves(UIntVector v, void* p) {
    const Halves halves = __builtin_convertvector(v, Halves);
    memcpy(p, &halves, sizeof(halves));
  }
  HEM_INLINE static UIntVector choose(IntVector m, UIntVector a, UIntVector b) {
    return (UIntVector(m) & a) | (~UIntVector(m) & b);
  }
  HEM_INLINE static Vector widen(const BFloat16* p) { return Vector(load_halves(p) << 16); }
  HEM_INLINE static Vector widen(const Float16* p) {
    const UIntVector x = load_halves(p), body = x & 0x7fffu, moved = body << 13;
    const UIntVector tiny = UIntVector(Vector(moved + (113u << 23)) - 0x1p-14f);
    const UIntVector finite = choose(IntVector(IntVector(body) >= 0x0400), moved + (112u << 23), tiny);
    const UIntVector all = choose(IntVector(IntVector(body) >= 0x7c00), moved | 0x7f800000u, finite);
    return Vector(all | ((x & 0x8000u) << 16));
  }
  HEM_INLINE static void narrow(Vector v, BFloat16* p) { store_halves(UIntVector(v) >> 16, p); }
  HEM_INLINE static void narrow(Vector v, Float16* p) {
    const UIntVector x = UIntVector(v), body = x & 0x7fffffffu;
    const UIntVector tiny = UIntVector(Vector(body) + 0.5f) - 0x3f000000u;
    const UIntVector finite =
        choose(IntVector(IntVector(body) < 0x38800000), tiny, (body - (112u << 23)) >> 13);
    const UIntVector special =
        choose(IntVector(IntVector(body) > 0x7f800000), UIntVector{} + 0x7e00u, UIntVector{} + 0x7c00u);
    const UIntVector all = choose(IntVector(IntVector(body) >= 0x7f800000), special, finite);
    store_halves(all | ((x >> 16) & 0x8000u), p);
  }
};

// Free functions: GCC 12 does not compile friends that are defined in a class for the selected target.
template <class T, class F>
HEM_INLINE Lanes<T> each(F f, Lanes<T> a, Lanes<T> b) {
  return {each(f, a.vectors, b.vectors)};
}
template <class T>
HEM_INLINE Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x + y; }, a, b);
}
template <class T>
HEM_INLINE Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x - y; }, a, b);
}
template <class T>
HEM_INLINE Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x * y; }, a, b);
}
template <class T>
HEM_INLINE Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x / y; }, a, b);
}
// max(0, x), NaN stays NaN.
template <class T>
HEM_INLINE Lanes<T> positive_part(Lanes<T> a) {
  using M = typename Lanes<T>::IntVector;
  return {each([](auto x) { return decltype(x)(~M(x < 0) & M(x)); }, a.vectors)};
}
// b where a is NaN.
template <class T>
HEM_INLINE Lanes<T> maximum(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x > y ? x : y; }, a, b);
}
template <class T>
HEM_INLINE Lanes<T> minimum(Lanes<T> a, Lanes<T> b) {
  return each([](auto x, auto y) { return x < y ? x : y; }, a, b);
}
template <class T>
HEM_INLINE typename Lanes<T>::Mask operator>=(Lanes<T> a, Lanes<T> b) {
  using M = typename Lanes<T>::IntVector;
  return each([](auto x, auto y) { return M(x >= y); }, a.vectors, b.vectors);
}
template <class T>
HEM_INLINE typename Lanes<T>::Mask operator>(Lanes<T> a, Lanes<T> b) {
  using M = typename Lanes<T>::IntVector;
  return each([](auto x, auto y) { return M(x > y); }, a.vectors, b.vectors);
}
template <class T>
HEM_INLINE typename Lanes<T>::Mask is_nan(Lanes<T> a) {
  using M = typename Lanes<T>::IntVector;
  return each([](auto x) { return M(x != x); }, a.vectors);
}
// a where the mask is set, 0 elsewhere.
template <class T>
HEM_INLINE Lanes<T> keep(typename Lanes<T>::Mask m, Lanes<T> a) {
  using M = typename Lanes<T>::IntVector;
  return {each([](M on, auto x) { return decltype(x)(on & M(x)); }, m, a.vectors)};
}
// 0 where the mask is set, a elsewhere.
template <class T>
HEM_INLINE Lanes<T> drop(typename Lanes<T>::Mask m, Lanes<T> a) {
  using M = typename Lanes<T>::IntVector;
  return {each([](M off, auto x) { return decltype(x)(~off & M(x)); }, m, a.vectors)};
}
// a where the mask is set, b elsewhere.
template <class T>
HEM_INLINE Lanes<T> select(typename Lanes<T>::Mask m, Lanes<T> a, Lanes<T> b) {
  using M = typename Lanes<T>::IntVector;
  return {each([](M on, auto x, auto y) { return decltype(x)((on & M(x)) | (~on & M(y))); }, m, a.vectors,
               b.vectors)};
}
// sum + a where the mask is set.
template <class T>
HEM_INLINE Lanes<T> accumulate(typename Lanes<T>::Mask m, Lanes<T> sum, Lanes<T> a) {
  return sum + keep(m, a);
}

#if defined(HEM_LANES_AVX512) || defined(HEM_LANES_AVX2)
#include "lanes_x86.h"
#endif

// After the last streamed store, so that other threads see them in order.
inline void end_streaming() {
#if defined(HEM_LANES_AVX512) || defined(HEM_LANES_AVX2)
  _mm_sfence();
#endif
}

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
