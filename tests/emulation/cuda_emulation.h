// Runs the project's CUDA kernels on the host, one std::thread per CUDA thread: the very same source, under
// sanitizers and against an oracle, without a GPU. It proves indexing, tails, reductions and synchronisation;
// it says nothing about time, and half arithmetic is the host's.
//
// Modelled: one-dimensional launches, dynamic shared memory (of exactly the size asked for, filled with a
// pattern),
// __syncthreads, __syncwarp, full-warp shuffles by xor and votes. Anything else aborts or does not compile.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace emulation {
#include "../../csrc/common/half.h"

constexpr unsigned kWarpSize = 32;

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  std::barrier<> barrier;
  uint64_t mailbox[kWarpSize];
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> shared;

  Block(unsigned threads, size_t shared_bytes) : barrier(threads), shared(new unsigned char[shared_bytes]) {
    std::memset(shared.get(), 0xCD, shared_bytes);
    for (unsigned t = 0; t < threads; t += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(threads - t < kWarpSize ? threads - t : kWarpSize));
    }
  }
};

struct Index {
  unsigned x = 0;
};

inline thread_local Block* block = nullptr;
inline std::atomic<bool> assertion_failed{false};
inline std::atomic<int64_t> widened{0};  // numbers of half precision: every look at a logit of it

}  // namespace emulation

inline thread_local emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }

// Runs the blocks one after another, their threads at once. A thread that returns stops being waited for.
template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, const Args&... args) {
  for (unsigned b = 0; b < blocks; ++b) {
    Block state(threads, shared_bytes);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        block = &state;
        threadIdx.x = t;
        blockIdx.x = b;
        blockDim.x = threads;
        gridDim.x = blocks;
        kernel(args...);
        warp().barrier.arrive_and_drop();
        state.barrier.arrive_and_drop();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

#define HEM_DYNAMIC_SHARED(name) unsigned char* name = emulation::block->shared.get()
#define HEM_DEVICE_ASSERT(condition, text)                \
  do {                                                    \
    if (!(condition)) emulation::assertion_failed = true; \
  } while (0)

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }
inline void __syncwarp() { emulation::warp().barrier.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  emulation::Warp& warp = emulation::warp();
  const unsigned lane = threadIdx.x % emulation::kWarpSize;
  if (mask != 0xffffffffu || blockDim.x % emulation::kWarpSize != 0) {
    std::fputs("cuda_emulation.h: only shuffles of a full warp are modelled\n", stderr);
    std::abort();
  }
  static_assert(sizeof(T) <= sizeof(uint64_t), "one mailbox a lane");
  std::memcpy(&warp.mailbox[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.mailbox[lane ^ static_cast<unsigned>(lane_mask)], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = predicate != 0 ? 1u << threadIdx.x % emulation::kWarpSize : 0;
  for (unsigned step = emulation::kWarpSize / 2; step > 0; step /= 2)
    votes |= __shfl_xor_sync(mask, votes, step);
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) {
  unsigned any = predicate != 0;
  for (unsigned step = emulation::kWarpSize / 2; step > 0; step /= 2) any |= __shfl_xor_sync(mask, any, step);
  return static_cast<int>(any);
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  emulation::widened.fetch_add(1, std::memory_order_relaxed);
  return emulation::to_float(emulation::Float16{x.bits});
}
inline __half __float2half_rn(float x) { return {emulation::from_float<emulation::Float16>(x).bits}; }
