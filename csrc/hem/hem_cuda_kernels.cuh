// The CUDA kernels of HEM. No torch and no launches in here: hem_cuda.cu launches them, tests/emulation runs
// them on the host. Layouts and the mask are those of hem_layout.h.
//
//   narrow rows   C <= 64: a tile of rows is staged in shared memory by sixteen-byte loads, one thread a row
//   wide rows     a warp (C <= 1024) or a block a row: sixteen bytes a load, kept in registers for the second
//                 look at the errors; what does not fit is read again
//   pixels        a warp holds 32 * V adjacent pixels of sixteen classes in registers, and ceil(C / 16) warps
//                 hold all classes; above pixel_max_classes() a thread a pixel reads its logits twice
//
// A finished sample is not looked at twice. Backward writes zeros without decoding bits where a wide row is
// finished, or every pixel of a warp, which so stays together.
//
// Sums are trees or short serial runs, in an order that the launch alone decides: results are reproducible.
#pragma once

#include "../common/device.cuh"
#include "hem_layout.h"

namespace hem_ext {

#include "hem_math.h"

constexpr int kNarrowClasses = 64;
constexpr int kNarrowRows = 128;       // rows (and threads) a tile
constexpr int kClassesPerThread = 16;  // pixels

constexpr int kBlockRowThreads = 512;  // at most, a wide row

// A block of hem_forward_pixels: what its registers allow.
constexpr int pixel_max_threads(int width) { return width == 1 ? 512 : 384; }
// ... and the classes that its warps hold.
constexpr int pixel_max_classes(int width) { return pixel_max_threads(width) / 32 * kClassesPerThread; }

template <class T>
struct CudaForwardArgs {
  Layout layout;
  const void* input;
  const void* target;  // [positions]
  TargetType target_type;
  int64_t ignore_index;
  const T* margins;  // [C], or null
  T margin;          // where margins is null
  const T* weight;   // [C], or null
  bool count_all;    // weight sums: every sample that is not ignored, or those with an error only
  T* losses;         // [positions], or null
  uint32_t* mask;    // rows [R, words], pixels [A, words, P]
  double* partials;  // [gridDim.x, 2]: the block's sums of w_i * loss_i and of w_i
};

template <class T>
struct CudaBackwardArgs {
  Layout layout;
  const void* target;  // [positions]
  TargetType target_type;
  int64_t ignore_index;
  const T* weight;     // [C], or null
  const T* grad_loss;  // [positions] or one
  bool grad_per_sample;
  const T* denominator;  // one
  const uint32_t* mask;
  void* grad_input;  // laid out as `layout` says
  ClassRange range;
};

// --- one sample ---

// The target as one of so many classes, -1 for a sample to leave out.
template <class Args>
__device__ __forceinline__ int read_target(const Args& a, int64_t position, int64_t classes) {
  int64_t target;
  switch (a.target_type) {
    case TargetType::kInt64: target = static_cast<const int64_t*>(a.target)[position]; break;
    case TargetType::kInt32: target = static_cast<const int32_t*>(a.target)[position]; break;
    default: target = static_cast<const uint8_t*>(a.target)[position];
  }
  if (target == a.ignore_index) return -1;
  const bool is_class = target >= 0 && target < classes;
  HEM_DEVICE_ASSERT(is_class, "target is neither a class nor ignore_index");
  return is_class ? static_cast<int>(target) : -1;
}

template <class T>
__device__ __forceinline__ int read_target(const CudaForwardArgs<T>& a, int64_t position) {
  return read_target(a, position, a.layout.classes);
}
template <class T>
__device__ __forceinline__ int read_target(const CudaBackwardArgs<T>& a, int64_t position) {
  return read_target(a, position, a.range.of);
}

template <class T>
__device__ __forceinline__ T margin_of(const CudaForwardArgs<T>& a, int target) {
  return a.margins == nullptr ? a.margin : a.margins[target];
}

// The block's sums of two numbers, in a fixed order; thread 0 gets them. `scratch` holds two numbers a warp.
__device__ __forceinline__ void block_sums(double& a, double& b, double* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp * 2] = a;
    scratch[threadIdx.x / kWarp * 2 + 1] = b;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  a = b = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    a += scratch[2 * w];
    b += scratch[2 * w + 1];
  }
}

template <class T>
struct Tally {
  double loss = 0, weight = 0;

  // Books the loss of one sample; a sample that is not finite is NaN. Returns whether it is finite.
  __device__ __forceinline__ bool add(const CudaForwardArgs<T>& a, int64_t position, int target,
                                      T sample_loss) {
    const bool finite = sample_loss - sample_loss == 0;
    T weighted = T(0);
    if (target >= 0) {
      const T w = a.weight == nullptr ? T(1) : a.weight[target];
      weighted = finite ? w * sample_loss : T(NAN);
      loss += weighted;
      if (a.count_all || (finite && sample_loss > 0)) weight += w;
    }
    if (a.losses != nullptr) a.losses[position] = weighted;
    return finite;
  }

  // The block's sums; `scratch` as block_sums() wants it.
  __device__ __forceinline__ void write(double* partials, double* scratch) {
    block_sums(loss, weight, scratch);
    if (threadIdx.x == 0) {
      partials[2 * blockIdx.x] = loss;
      partials[2 * blockIdx.x + 1] = weight;
    }
  }
};

// What backward writes for one sample: `kept` at its kept bits, `target` at class `own` of those here, 0
// elsewhere.
template <class Storage>
struct DeviceCoefficients {
  Storage kept, target;
  int64_t own;
};

// Of a sample that keeps `count` of all classes: every one, its target too, where its loss is not finite.
template <class T, class Storage>
__device__ __forceinline__ DeviceCoefficients<Storage> coefficients(const CudaBackwardArgs<T>& a,
                                                                    int64_t position, int count) {
  using N = Narrow<Storage>;
  const int target = count == 0 ? -1 : read_target(a, position);
  if (target < 0) return {N::from(T(0)), N::from(T(0)), -1};
  const int64_t own = target - a.range.first;
  if (count == a.range.of) return {N::from(T(NAN)), N::from(T(NAN)), own};
  T g;
  if (a.grad_per_sample) {
    g = a.grad_loss[position];
  } else {
    const T denominator = *a.denominator;
    g = denominator > 0 ? *a.grad_loss / denominator : T(0);
  }
  if (a.weight != nullptr) g *= a.weight[target];
  return {N::from(g / T(count)), N::from(-g), own};
}

// --- the batch ---

// One block. The loss and what the reduction divided by, from the partial sums of `blocks` blocks.
template <class T>
__global__ void hem_reduce(const double* partials, int blocks, bool divides, bool writes_loss, T* loss,
                           T* denominator) {
  HEM_DYNAMIC_SHARED(shared);
  double sum = 0, weight = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    sum += partials[2 * i];
    weight += partials[2 * i + 1];
  }
  block_sums(sum, weight, reinterpret_cast<double*>(shared));
  if (threadIdx.x != 0) return;
  *denominator = divides ? static_cast<T>(weight) : T(1);
  // Nothing counted: the sum is 0, or NaN where the only losses are.
  if (writes_loss) *loss = static_cast<T>(divides && weight > 0 ? sum / weight : sum);
}

// --- narrow rows: a tile of rows in shared memory, one thread a row ---

// Bytes of shared memory for a tile: its elements, behind the misalignment of their source.
template <class Storage>
constexpr size_t narrow_shared_bytes(int64_t classes) {
  return (static_cast<size_t>(kNarrowRows) * classes * sizeof(Storage) + 31) / 16 * 16;
}

// The block copies n consecutive elements; `from` and `to` lie alike against a sixteen-byte boundary.
template <class Storage>
__device__ __forceinline__ void block_copy(Storage* to, const Storage* from, int n) {
  constexpr int kWidth = kVectorWidth<Storage>;
  const int past = misalignment(from);
  int head = past == 0 ? 0 : kWidth - past;
  if (head > n) head = n;
  const int vectors = (n - head) / kWidth;
  for (int i = threadIdx.x; i < head; i += blockDim.x) to[i] = from[i];
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    store_vector(to + head + i * kWidth, load_vector<Storage, kWidth>(from + head + i * kWidth));
  }
  for (int i = head + vectors * kWidth + threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

template <class T, class Storage>
__global__ void hem_forward_narrow_rows(CudaForwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const int classes = static_cast<int>(a.layout.classes), num_words = static_cast<int>(a.layout.words());
  const int64_t rows = a.layout.inner;
  Tally<T> tally;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kNarrowRows; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kNarrowRows) {
    const int count = static_cast<int>(rows - first < kNarrowRows ? rows - first : kNarrowRows);
    const Storage* from = static_cast<const Storage*>(a.input) + first * a.layout.inner_stride;
    Storage* tile = reinterpret_cast<Storage*>(shared);
    if (a.layout.inner_stride == classes) {
      tile += misalignment(from);
      block_copy(tile, from, count * classes);
    } else {
      for (int i = threadIdx.x; i < count * classes; i += blockDim.x) {
        tile[i] = from[i / classes * a.layout.inner_stride + i % classes];
      }
    }
    __syncthreads();

    const int64_t position = first + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < count) {
      const int target = read_target(a, position);
      uint64_t bits = 0;
      T loss = T(0);
      if (target >= 0) {
        const Storage* row = tile + threadIdx.x * classes;
        const T y = widen(row[target]), margin = margin_of(a, target);
        T sum[4] = {T(0), T(0), T(0), T(0)}, largest = T(0);
        for (int j = 0; j < classes; ++j) {
          const T e = j == target ? T(0) : error<T>(widen(row[j]), y, margin);
          sum[j & 3] += e;
          largest = maximum(e, largest);
        }
        const T error_sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (error_sum > 0) {  // else finished, or broken
          const T thr = threshold<T>(error_sum, T(classes), largest);
          T kept_sum[4] = {T(0), T(0), T(0), T(0)};
          for (int j = 0; j < classes; ++j) {
            const T e = j == target ? T(0) : error<T>(widen(row[j]), y, margin);
            if (kept(e, thr, T(0))) {
              kept_sum[j & 3] += e;
              bits |= uint64_t{1} << j;
            }
          }
          loss = ((kept_sum[0] + kept_sum[1]) + (kept_sum[2] + kept_sum[3])) / T(__popcll(bits));
        }
        if (error_sum != error_sum || y != y) loss = T(NAN);
      }
      const bool finite = tally.add(a, position, target, loss);
      uint32_t* words = a.mask + position * num_words;
      for (int w = 0; w < num_words; ++w) {
        words[w] = finite ? static_cast<uint32_t>(bits >> (32 * w)) : all_bits(classes, w);
      }
    }
    __syncthreads();
  }
  tally.write(a.partials, reinterpret_cast<double*>(shared));
}

template <class T, class Storage>
__global__ void hem_backward_narrow_rows(CudaBackwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const int classes = static_cast<int>(a.layout.classes), num_words = static_cast<int>(a.layout.words());
  const int64_t rows = a.layout.inner;
  const Storage zero = Narrow<Storage>::from(T(0));
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kNarrowRows; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kNarrowRows) {
    const int count = static_cast<int>(rows - first < kNarrowRows ? rows - first : kNarrowRows);
    Storage* to = static_cast<Storage*>(a.grad_input) + first * classes;  // a gradient is dense
    Storage* tile = reinterpret_cast<Storage*>(shared) + misalignment(to);
    if (static_cast<int>(threadIdx.x) < count) {
      const int64_t position = first + threadIdx.x;
      const uint32_t* words = a.mask + position * a.range.words + a.range.first_word;
      const uint64_t bits = words[0] | (num_words > 1 ? static_cast<uint64_t>(words[1]) << 32 : 0);
      const int count = a.range.counts == nullptr ? __popcll(bits) : a.range.counts[position];
      const auto c = coefficients<T, Storage>(a, position, count);
      Storage* row = tile + threadIdx.x * classes;
      for (int j = 0; j < classes; ++j) row[j] = j == c.own ? c.target : ((bits >> j) & 1u) ? c.kept : zero;
    }
    __syncthreads();
    // Alike against a boundary on both sides: block_copy looks at the source, which is the tile.
    block_copy(to, static_cast<const Storage*>(tile), count * classes);
    __syncthreads();
  }
}

// --- wide rows: a warp or a block a row ---

// The threads that share a row.
template <bool kWarpRow>
struct Team {
  int size, rank, index, count;  // threads, this thread among them, this team, teams a block

  __device__ __forceinline__ Team()
      : size(kWarpRow ? kWarp : static_cast<int>(blockDim.x)),
        rank(kWarpRow ? static_cast<int>(threadIdx.x % kWarp) : static_cast<int>(threadIdx.x)),
        index(kWarpRow ? static_cast<int>(threadIdx.x / kWarp) : 0),
        count(kWarpRow ? static_cast<int>(blockDim.x / kWarp) : 1) {}

  __device__ __forceinline__ void sync() const {
    if (kWarpRow) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Every thread gets the result; `scratch` holds 32 numbers.
  template <class T, class Combine>
  __device__ __forceinline__ T reduce(T x, T* scratch, Combine combine) const {
    x = combine(x);
    if (kWarpRow) return x;
    sync();
    if (rank % kWarp == 0) scratch[rank / kWarp] = x;
    sync();
    return combine(rank % kWarp < size / kWarp ? scratch[rank % kWarp] : T(0));
  }
  template <class T>
  __device__ __forceinline__ T sum(T x, T* scratch) const {
    return reduce(x, scratch, [](T v) { return warp_sum(v); });
  }
  template <class T>
  __device__ __forceinline__ T max(T x, T* scratch) const {
    return reduce(x, scratch, [](T v) { return warp_max(v); });
  }
};

// Words of shared memory for one row: the bits of whole rounds of a team, and one word behind them.
HEM_HOST_DEVICE int64_t wide_row_words(int64_t classes, int width, int threads) {
  const int64_t round = static_cast<int64_t>(width) * threads;
  return (classes + width - 1 + round - 1) / round * round / 32 + 1;
}

// One row cut into vectors of sixteen bytes as its address demands: vector v holds classes
// [v * kWidth - shift, (v + 1) * kWidth - shift), of which some are missing at either end.
template <class T, class Storage, int kWidth>
struct RowVectors {
  using V = Vector<Storage, kWidth>;
  const Storage* row;
  int64_t classes, count;
  int shift;

  __device__ __forceinline__ RowVectors(const Storage* first, int64_t num_classes)
      : row(first), classes(num_classes), shift(kWidth == 1 ? 0 : misalignment(first)) {
    count = (classes + shift + kWidth - 1) / kWidth;
  }
  __device__ __forceinline__ int64_t first_class(int64_t v) const { return v * kWidth - shift; }

  __device__ __forceinline__ V load(int64_t v) const {
    const int64_t j = first_class(v);
    if (j >= 0 && j + kWidth <= classes) return load_vector<Storage, kWidth>(row + j);
    V partial;
    for (int k = 0; k < kWidth; ++k) {
      partial.at[k] = j + k >= 0 && j + k < classes ? row[j + k] : Narrow<Storage>::from(T(0));
    }
    return partial;
  }
};

template <class T, class Storage, bool kWarpRow, int kItems, int kWidth>
__global__ void __launch_bounds__(kWarpRow ? 256 : kBlockRowThreads)
    hem_forward_wide_rows(CudaForwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const Team<kWarpRow> team;
  const int64_t classes = a.layout.classes, num_words = a.layout.words();
  const int64_t capacity = wide_row_words(classes, kWidth, team.size);
  T* scratch = reinterpret_cast<T*>(shared);  // [32], used by blocks
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + 64 * sizeof(double)) + team.index * capacity;
  using Row = RowVectors<T, Storage, kWidth>;
  Tally<T> tally;

  for (int64_t position = static_cast<int64_t>(blockIdx.x) * team.count + team.index;
       position < a.layout.inner; position += static_cast<int64_t>(gridDim.x) * team.count) {
    const int target = read_target(a, position);
    uint32_t* mask = a.mask + position * num_words;
    if (target < 0) {
      for (int64_t w = team.rank; w < num_words; w += team.size) mask[w] = 0;
      if (team.rank == 0) tally.add(a, position, target, T(0));
      continue;
    }
    const Storage* first = static_cast<const Storage*>(a.input) + position * a.layout.inner_stride;
    const Row row(first, classes);
    const T y = widen(first[target]), margin = margin_of(a, target);
    int64_t rounds = (row.count + team.size - 1) / team.size;

    // e of element k of a vector that starts at class j; 0 at the target and outside the row.
    auto error_at = [&](const typename Row::V& v, int64_t j, int k) {
      const bool rival = j + k >= 0 && j + k < classes && j + k != target;
      return rival ? error<T>(widen(v.at[k]), y, margin) : T(0);
    };

    typename Row::V cache[kItems];
    T sum = T(0), chunk = T(0), largest = T(0);
    auto add = [&](const typename Row::V& v, int64_t j) {
      for (int k = 0; k < kWidth; ++k) {
        const T e = error_at(v, j, k);
        chunk += e;
        largest = maximum(e, largest);
      }
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t v = static_cast<int64_t>(i) * team.size + team.rank;
      if (v < row.count) {
        cache[i] = row.load(v);
        add(cache[i], row.first_class(v));
      }
    }
    for (int64_t i = kItems; i < rounds; ++i) {
      const int64_t v = i * team.size + team.rank;
      if (v < row.count) add(row.load(v), row.first_class(v));
      if (i % 8 == 7) {  // short runs, then their sums: no long serial sum
        sum += chunk;
        chunk = T(0);
      }
    }
    const T error_sum = team.sum(sum + chunk, scratch);
    const T thr = threshold<T>(error_sum, T(classes), team.max(largest, scratch));
    if (!(error_sum > 0)) rounds = 0;  // finished, or broken: no second look

    // Bits leave the team as words of the row's vectors, `shift` bits away from where the mask wants them.
    T kept_sum = T(0);
    chunk = T(0);
    int count = 0;
    auto keep = [&](const typename Row::V& v, int64_t i, bool present) {
      uint32_t bits = 0;
      if (present) {
        const int64_t j = row.first_class(i * team.size + team.rank);
        for (int k = 0; k < kWidth; ++k) {
          const T e = error_at(v, j, k);
          if (kept(e, thr, T(0))) {
            chunk += e;
            bits |= 1u << k;
          }
        }
      }
      count += __popc(bits);
      constexpr int kLanes = 32 / kWidth;  // that share a word
      bits <<= kWidth * (team.rank % kLanes);
      for (int step = kLanes / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(kFullWarp, bits, step);
      if (team.rank % kLanes == 0) words[(i * team.size + team.rank) / kLanes] = bits;
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < rounds) keep(cache[i], i, static_cast<int64_t>(i) * team.size + team.rank < row.count);
    }
    for (int64_t i = kItems; i < rounds; ++i) {
      const int64_t v = i * team.size + team.rank;
      const bool present = v < row.count;
      keep(present ? row.load(v) : typename Row::V{}, i, present);
      if (i % 8 == 7) {
        kept_sum += chunk;
        chunk = T(0);
      }
    }
    if (team.rank == 0) words[rounds * team.size * kWidth / 32] = 0;
    kept_sum = team.sum(kept_sum + chunk, scratch);
    const T kept_count = team.sum(static_cast<T>(count), scratch);
    T loss = kept_count > 0 ? kept_sum / kept_count : T(0);
    if (error_sum != error_sum || y != y) loss = T(NAN);
    const bool finite = loss - loss == 0;
    if (team.rank == 0) tally.add(a, position, target, loss);
    team.sync();
    for (int64_t w = team.rank; w < num_words; w += team.size) {
      uint32_t bits = 0;
      if (kept_count > 0) {
        bits = row.shift == 0 ? words[w] : words[w] >> row.shift | words[w + 1] << (32 - row.shift);
      }
      mask[w] = finite ? bits : all_bits(classes, w);
    }
    team.sync();
  }
  tally.write(a.partials, reinterpret_cast<double*>(shared));
}

template <class T, class Storage, bool kWarpRow, int kWidth>
__global__ void hem_backward_wide_rows(CudaBackwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const Team<kWarpRow> team;
  const int64_t classes = a.layout.classes, num_words = a.layout.words();
  const Storage zero = Narrow<Storage>::from(T(0));
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * team.count + team.index;
       position < a.layout.inner; position += static_cast<int64_t>(gridDim.x) * team.count) {
    const uint32_t* words = a.mask + position * a.range.words + a.range.first_word;
    int count = 0;
    if (a.range.counts == nullptr) {
      for (int64_t w = team.rank; w < num_words; w += team.size) count += __popc(words[w]);
      count = team.sum(count, reinterpret_cast<int*>(shared));
    } else {
      count = a.range.counts[position];
    }
    const auto c = coefficients<T, Storage>(a, position, count);

    Storage* out = static_cast<Storage*>(a.grad_input) + position * classes;  // a gradient is dense
    const RowVectors<T, Storage, kWidth> row(out, classes);
    for (int64_t v = team.rank; v < row.count; v += team.size) {
      const int64_t j = row.first_class(v);
      Vector<Storage, kWidth> values;
      for (int k = 0; k < kWidth; ++k) values.at[k] = zero;
      for (int k = 0; k < kWidth && count != 0; ++k) {
        const int64_t i = j + k;
        const bool in_row = i >= 0 && i < classes;
        const bool kept_bit = in_row && ((words[i / 32] >> (i % 32)) & 1u);
        values.at[k] = i == c.own ? c.target : kept_bit ? c.kept : zero;
      }
      if (j >= 0 && j + kWidth <= classes) {
        store_vector(out + j, values);
      } else {
        for (int k = 0; k < kWidth; ++k) {
          if (j + k >= 0 && j + k < classes) out[j + k] = values.at[k];
        }
      }
    }
  }
}

// --- pixels ---

// Where a thread of the pixel kernels works: pixels [pixel, pixel + kWidth) of an image, and one group of
// classes. A unit is the 32 * kWidth pixels of a warp; `groups` warps share it, and a block holds several
// units.
template <int kWidth>
struct PixelPlace {
  int lane, group, unit_in_block, units_per_block;

  __device__ __forceinline__ explicit PixelPlace(int groups)
      : lane(threadIdx.x % kWarp),
        group(static_cast<int>(threadIdx.x / kWarp) % groups),
        unit_in_block(static_cast<int>(threadIdx.x / kWarp) / groups),
        units_per_block(static_cast<int>(blockDim.x / kWarp) / groups) {}
};

HEM_HOST_DEVICE int64_t pixel_units_per_image(int64_t pixels, int width) {
  const int64_t unit = static_cast<int64_t>(kWarp) * width;
  return (pixels + unit - 1) / unit;
}
HEM_HOST_DEVICE int pixel_groups(int64_t classes) {
  return static_cast<int>((classes + kClassesPerThread - 1) / kClassesPerThread);
}
// Shared bytes: two numbers a thread and pixel, and one half word.
template <class T>
HEM_HOST_DEVICE size_t pixel_shared_bytes(int threads, int width) {
  return static_cast<size_t>(threads) * width * (2 * sizeof(T) + sizeof(uint32_t));
}

template <class T, class Storage, int kWidth>
__global__ void __launch_bounds__(pixel_max_threads(kWidth)) hem_forward_pixels(CudaForwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const int64_t classes = a.layout.classes, pixels = a.layout.inner, num_words = a.layout.words();
  const int groups = pixel_groups(classes);
  const PixelPlace<kWidth> place(groups);
  T* first_of = reinterpret_cast<T*>(shared);     // [threads, kWidth], as [unit, group, k, lane]
  T* second_of = first_of + blockDim.x * kWidth;  // the same
  uint32_t* half_words = reinterpret_cast<uint32_t*>(second_of + blockDim.x * kWidth);  // the same
  auto slot = [&](int group, int k) {
    return ((place.unit_in_block * groups + group) * kWidth + k) * kWarp + place.lane;
  };
  const int64_t units_per_image = pixel_units_per_image(pixels, kWidth),
                units = a.layout.outer * units_per_image;
  Tally<T> tally;

  for (int64_t block_unit = static_cast<int64_t>(blockIdx.x) * place.units_per_block; block_unit < units;
       block_unit += static_cast<int64_t>(gridDim.x) * place.units_per_block) {
    const int64_t unit = block_unit + place.unit_in_block;
    const int64_t image = unit / units_per_image;
    const int64_t pixel = (unit % units_per_image * kWarp + place.lane) * kWidth;
    const bool present = unit < units && pixel < pixels;  // all kWidth or none
    const Storage* from = static_cast<const Storage*>(a.input) + image * a.layout.outer_stride + pixel;

    int target[kWidth];
    T y[kWidth], margin[kWidth], sum[kWidth], largest[kWidth];
    T e[kClassesPerThread][kWidth];
    for (int k = 0; k < kWidth; ++k) {
      target[k] = present ? read_target(a, image * pixels + pixel + k) : -1;
      // An ignored pixel keeps nothing: its errors are 0.
      y[k] = target[k] < 0 ? T(0) : widen(from[target[k] * a.layout.class_stride + k]);
      margin[k] = target[k] < 0 ? T(0) : margin_of(a, target[k]);
      sum[k] = largest[k] = T(0);
    }
#pragma unroll
    for (int i = 0; i < kClassesPerThread; ++i) {
      const int64_t j = static_cast<int64_t>(place.group) * kClassesPerThread + i;
      if (present && j < classes) {
        const auto v = load_vector<Storage, kWidth>(from + j * a.layout.class_stride);
        for (int k = 0; k < kWidth; ++k) {
          const bool rival = target[k] >= 0 && target[k] != j;
          e[i][k] = rival ? error<T>(widen(v.at[k]), y[k], margin[k]) : T(0);
        }
      } else {
        for (int k = 0; k < kWidth; ++k) e[i][k] = T(0);
      }
      for (int k = 0; k < kWidth; ++k) {
        sum[k] += e[i][k];
        largest[k] = maximum(e[i][k], largest[k]);
      }
    }
    for (int k = 0; k < kWidth; ++k) {
      first_of[slot(place.group, k)] = sum[k];
      second_of[slot(place.group, k)] = largest[k];
    }
    __syncthreads();
    T thr[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      sum[k] = largest[k] = T(0);
      for (int g = 0; g < groups; ++g) {
        sum[k] += first_of[slot(g, k)];
        largest[k] = maximum(second_of[slot(g, k)], largest[k]);
      }
      thr[k] = threshold<T>(sum[k], T(classes), largest[k]);
    }
    __syncthreads();

    for (int k = 0; k < kWidth; ++k) {
      T kept_sum = T(0);
      uint32_t bits = 0;
      if (sum[k] > 0) {  // else finished, or broken
#pragma unroll
        for (int i = 0; i < kClassesPerThread; ++i) {
          if (kept(e[i][k], thr[k], T(0))) {
            kept_sum += e[i][k];
            bits |= 1u << i;
          }
        }
      }
      first_of[slot(place.group, k)] = kept_sum;
      half_words[slot(place.group, k)] = bits;
    }
    __syncthreads();

    // Every group knows the loss; the even ones write its words, the first one books it.
    Vector<uint32_t, (kWidth < 4 ? kWidth : 4)> word[(kWidth + 3) / 4];
    for (int k = 0; k < kWidth; ++k) {
      T kept_sum = T(0);
      int count = 0;
      for (int g = 0; g < groups; ++g) {
        kept_sum += first_of[slot(g, k)];
        count += __popc(half_words[slot(g, k)]);
      }
      T loss = count > 0 ? kept_sum / T(count) : T(0);
      if (sum[k] != sum[k] || y[k] != y[k]) loss = T(NAN);
      const bool finite = loss - loss == 0;
      if (present && place.group == 0) tally.add(a, image * pixels + pixel + k, target[k], loss);
      const uint32_t high = place.group + 1 < groups ? half_words[slot(place.group + 1, k)] << 16 : 0;
      const uint32_t bits = half_words[slot(place.group, k)] | high;
      word[k / 4].at[k % 4] = finite ? bits : all_bits(classes, place.group / 2);
    }
    if (present && place.group % 2 == 0) {
      uint32_t* to = a.mask + (image * num_words + place.group / 2) * pixels + pixel;
      for (int k = 0; k < kWidth; k += 4) store_vector(to + k, word[k / 4]);
    }
    __syncthreads();
  }
  tally.write(a.partials, reinterpret_cast<double*>(shared));
}

// One pixel by one thread, which looks at each logit twice: logit_at(j) is that of class j.
template <class T, class LogitAt>
__device__ __forceinline__ void solve_pixel(const CudaForwardArgs<T>& a, int64_t position,
                                            const LogitAt& logit_at, Tally<T>* tally) {
  const int64_t classes = a.layout.classes, pixels = a.layout.inner, num_words = a.layout.words();
  uint32_t* words = a.mask + position / pixels * num_words * pixels + position % pixels;
  const int target = read_target(a, position);
  if (target < 0) {
    for (int64_t w = 0; w < num_words; ++w) words[w * pixels] = 0;
    tally->add(a, position, target, T(0));
    return;
  }
  const T y = logit_at(target), margin = margin_of(a, target);
  auto error_at = [&](int64_t j) { return j == target ? T(0) : error<T>(logit_at(j), y, margin); };
  // A binary tree over runs of 32.
  T level[32], largest = T(0);
  auto tree_sum = [&](auto&& term) {
    int depth = 0;
    for (int64_t w = 0; w < num_words; ++w) {
      T run = T(0);
      for (int64_t j = 32 * w; j < 32 * w + 32 && j < classes; ++j) run += term(j);
      for (int64_t n = w; n & 1; n >>= 1) run = level[--depth] + run;
      level[depth++] = run;
    }
    T total = T(0);
    while (depth > 0) total = level[--depth] + total;
    return total;
  };
  const T error_sum = tree_sum([&](int64_t j) {
    const T e = error_at(j);
    largest = maximum(e, largest);
    return e;
  });
  if (!(error_sum > 0)) {  // finished, or broken: no second look
    const bool finite = tally->add(a, position, target, error_sum != error_sum || y != y ? T(NAN) : T(0));
    for (int64_t w = 0; w < num_words; ++w) words[w * pixels] = finite ? 0 : all_bits(classes, w);
    return;
  }
  const T thr = threshold<T>(error_sum, T(classes), largest);
  int64_t count = 0;
  uint32_t bits = 0;
  const T kept_sum = tree_sum([&](int64_t j) {
    const T e = error_at(j);
    const bool keep = kept(e, thr, T(0));
    if (j % 32 == 0) bits = 0;
    bits |= static_cast<uint32_t>(keep) << (j % 32);
    count += keep;
    if (j % 32 == 31 || j == classes - 1) words[j / 32 * pixels] = bits;
    return keep ? e : T(0);
  });
  if (!tally->add(a, position, target, kept_sum / T(count))) {
    for (int64_t w = 0; w < num_words; ++w) words[w * pixels] = all_bits(classes, w);
  }
}

// More classes than a block holds: a thread a pixel.
template <class T, class Storage>
__global__ void hem_forward_many_class_pixels(CudaForwardArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const int64_t pixels = a.layout.inner;
  Tally<T> tally;
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       position < a.layout.positions(); position += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Storage* from =
        static_cast<const Storage*>(a.input) + position / pixels * a.layout.outer_stride + position % pixels;
    solve_pixel(a, position, [&](int64_t j) { return widen(from[j * a.layout.class_stride]); }, &tally);
  }
  tally.write(a.partials, reinterpret_cast<double*>(shared));
}

// A thread writes kWidth adjacent pixels of `per_thread` classes: a warp 32 * kWidth pixels, and one group of
// classes.
template <class T, class Storage, int kWidth>
__global__ void hem_backward_pixels(CudaBackwardArgs<T> a, int64_t per_thread) {
  const int64_t classes = a.layout.classes, pixels = a.layout.inner, num_words = a.layout.words();
  const int64_t groups = (classes + per_thread - 1) / per_thread;
  const int64_t units_per_image = pixel_units_per_image(pixels, kWidth);
  const int64_t warps = a.layout.outer * units_per_image * groups;
  const Storage zero = Narrow<Storage>::from(T(0));
  const int lane = threadIdx.x % kWarp;
  constexpr int kMaskWidth = kWidth < 4 ? kWidth : 4;

  for (int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; warp < warps;
       warp += static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp) {
    const int64_t unit = warp / groups, group = warp % groups;
    const int64_t image = unit / units_per_image;
    const int64_t pixel = (unit % units_per_image * kWarp + lane) * kWidth;
    const bool present = pixel < pixels;  // all kWidth or none
    const uint32_t* words = a.mask + (image * a.range.words + a.range.first_word) * pixels + pixel;
    auto load_words = [&](int64_t w, uint32_t (&to)[kWidth]) {
      for (int k = 0; k < kWidth; k += kMaskWidth) {
        const auto v = load_vector<uint32_t, kMaskWidth>(words + w * pixels + k);
        for (int i = 0; i < kMaskWidth; ++i) to[k + i] = v.at[i];
      }
    };
    uint32_t word[kWidth];
    int count[kWidth] = {}, any = 0;
    if (a.range.counts == nullptr) {
      for (int64_t w = 0; w < num_words && present; ++w) {
        load_words(w, word);
        for (int k = 0; k < kWidth; ++k) count[k] += __popc(word[k]);
      }
    } else {
      for (int k = 0; k < kWidth && present; ++k) count[k] = a.range.counts[image * pixels + pixel + k];
    }
    for (int k = 0; k < kWidth; ++k) any |= count[k];
    const bool finished = !__any_sync(kFullWarp, any);  // all of the warp's: so it stays together
    if (!present) continue;
    DeviceCoefficients<Storage> c[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      c[k] = coefficients<T, Storage>(a, image * pixels + pixel + k, count[k]);
    }
    Storage* out = static_cast<Storage*>(a.grad_input) + image * a.layout.outer_stride + pixel;
    const int64_t begin = group * per_thread,
                  end = begin + per_thread < classes ? begin + per_thread : classes;
    for (int64_t j = begin; j < end; ++j) {
      Vector<Storage, kWidth> values;
      for (int k = 0; k < kWidth; ++k) values.at[k] = zero;
      if (!finished && (j == begin || j % 32 == 0)) load_words(j / 32, word);
      for (int k = 0; k < kWidth && !finished; ++k) {
        values.at[k] = j == c[k].own ? c[k].target : ((word[k] >> (j % 32)) & 1u) ? c[k].kept : zero;
      }
      store_vector(out + j * a.layout.class_stride, values);
    }
  }
}

}  // namespace hem_ext
