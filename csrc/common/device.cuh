// Device-side pieces that every CUDA kernel here uses. No torch and no launches: nvcc compiles this for the
// GPU, and tests/emulation for the host, where a header defines the handful of CUDA names used below first.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>

#define HEM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// The assertion that torch's own kernels raise, whatever NDEBUG says.
extern "C" __device__ void __assertfail(const char* assertion, const char* file, unsigned int line,
                                        const char* function, size_t char_size);
#define HEM_DEVICE_ASSERT(condition, text)                                            \
  do {                                                                                \
    if (!(condition)) __assertfail(text, __FILE__, __LINE__, __func__, sizeof(char)); \
  } while (0)
#endif

namespace hem_ext {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// --- storage types ---

struct alignas(2) DeviceBFloat16 {
  uint16_t bits;
};
struct alignas(2) DeviceFloat16 {
  uint16_t bits;
};

template <class To, class From>
__device__ __forceinline__ To device_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(DeviceBFloat16 x) {
  return device_bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(DeviceFloat16 x) {
  return __half2float(device_bit_cast<__half>(x.bits));
}

template <class Storage>
struct Narrow;
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double from(double x) { return x; }
};
template <>
struct Narrow<DeviceBFloat16> {
  // Round to nearest, ties to even; NaN stays NaN.
  static __device__ __forceinline__ DeviceBFloat16 from(float x) {
    const uint32_t bits = device_bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<DeviceFloat16> {
  static __device__ __forceinline__ DeviceFloat16 from(float x) {
    return {device_bit_cast<uint16_t>(__float2half_rn(x))};
  }
};

// --- vectors of up to sixteen bytes, moved by one instruction ---

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "what one instruction moves");
  T at[N];
};

template <class T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// Elements by which p lies past a sixteen-byte boundary.
template <class T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// --- scalar formulas' vocabulary (hem_math.h) ---

template <class T>
__device__ __forceinline__ T positive_part(T x) {
  return x < 0 ? T(0) : x;  // NaN stays NaN
}
template <class T>
__device__ __forceinline__ T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a > b ? a : b;
}

// --- a warp ---

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = maximum(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

}  // namespace hem_ext
