// Half-precision storage types for host code, and their conversions.
//
// Included inside the includer's namespace (see cpu_isa.h), after <cstdint> and <cstring>.

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// No step makes a subnormal float, so the result does not depend on torch.set_flush_denormal.
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t body = x.bits & 0x7fffu;
  uint32_t bits;
  if (body >= 0x7c00u) {  // infinity, NaN
    bits = 0x7f800000u | (body << 13);
  } else if (body >= 0x0400u) {  // normal: the exponent bias goes from 15 to 127
    bits = (body << 13) + (112u << 23);
  } else {  // subnormal: 2^-14 * (1 + body / 1024) - 2^-14
    bits = bit_cast<uint32_t>(bit_cast<float>((body << 13) + (113u << 23)) - 0x1p-14f);
  }
  return bit_cast<float>(sign | bits);
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
template <class Storage, class Value>
Storage from_float(Value x);

template <>
inline double from_float<double, double>(double x) {
  return x;
}

template <>
inline float from_float<float, float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x0040u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16, float>(float x) {
  const uint32_t all = bit_cast<uint32_t>(x);
  const uint32_t sign = (all >> 16) & 0x8000u;
  const uint32_t bits = all & 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds past 65504: infinity
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f);
    return {uint16_t(sign | (rounded - 0x3f000000u))};
  }
  return {uint16_t(sign | ((bits - (112u << 23) + 0x0fffu + ((bits >> 13) & 1u)) >> 13))};
}
