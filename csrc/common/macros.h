// Marks what both the host and the device compile.
#pragma once

#if defined(__CUDACC__)
#define HEM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HEM_HOST_DEVICE inline
#endif
