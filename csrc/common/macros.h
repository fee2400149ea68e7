// Marks what both the host and the device compile, and what has to be inlined on the host.
#pragma once

// Sixteen lanes are many vectors where these are short: too much to inline, by a compiler's own measure, but
// in memory where it is not.
#define HEM_INLINE __attribute__((always_inline)) inline

#if defined(__CUDACC__)
#define HEM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HEM_HOST_DEVICE HEM_INLINE
#endif
