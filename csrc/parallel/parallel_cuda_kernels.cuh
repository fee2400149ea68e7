// The CUDA kernels of class_parallel_hem_loss. No torch and no launches in here, as in hem_cuda_kernels.cuh.
//
// As forward of hem_loss, in two calls: `errors` takes the first look at those of a share of the classes,
// `keep` the second one, when it is known what all of them come to. Samples that are finished by then are not
// looked at again.
//   rows    a warp or a block a row: 32 classes side by side are a word of the mask, by vote
//   pixels  a thread a pixel
// Backward is that of hem_loss.
#pragma once

#include "../hem/hem_cuda_kernels.cuh"

namespace hem_ext {

// Some of the classes of every sample: the logits that one process has.
template <class T>
struct CudaParallelArgs {
  CudaForwardArgs<T> hem;  // of these logits; targets and margins are of all classes
  int64_t classes;         // so many
  int64_t first;           // of them that is here
  const T* target_logits;  // [positions]
  T* errors;  // [2, positions] sum and largest: those here, written; then those of all classes, read
  T* kept;    // [2, positions] sum and count
};

// One sample, and what its classes here are compared with.
template <class T>
struct ParallelSample {
  bool ignored;
  int64_t own;  // the target, from the first class here on
  T target_logit, margin;

  __device__ __forceinline__ ParallelSample(const CudaParallelArgs<T>& a, int64_t position) {
    const int target = read_target(a.hem, position, a.classes);
    ignored = target < 0;
    own = target - a.first;
    target_logit = a.target_logits[position];
    margin = ignored ? T(0) : margin_of(a.hem, target);
  }
  __device__ __forceinline__ T error_at(int64_t j, T logit) const {
    return j == own ? T(0) : error<T>(logit, target_logit, margin);
  }
};

// A sum in short runs.
template <class T>
struct SumOfRuns {
  T total = T(0), run = T(0);
  int length = 0;

  __device__ __forceinline__ void add(T x) {
    run += x;
    if (++length == 8) {
      total += run;
      run = T(0);
      length = 0;
    }
  }
  __device__ __forceinline__ T sum() const { return total + run; }
};

// Above which an error of a sample is kept, from the errors of all classes; nothing is where it is finished.
template <class T>
struct ParallelThreshold {
  T least;
  bool finished;

  __device__ __forceinline__ ParallelThreshold(const CudaParallelArgs<T>& a, int64_t position) {
    const T largest = a.errors[a.hem.layout.positions() + position];
    finished = !(largest > 0);
    least = threshold<T>(a.errors[position], T(a.classes), largest);
  }
};

// --- rows; `scratch` of a block's team is 32 numbers ---

template <class T, class Storage, bool kWarpRow>
__global__ void __launch_bounds__(kBlockRowThreads) parallel_errors_rows(CudaParallelArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const Team<kWarpRow> team;
  T* scratch = reinterpret_cast<T*>(shared);
  const int64_t classes = a.hem.layout.classes, rows = a.hem.layout.inner;
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * team.count + team.index; position < rows;
       position += static_cast<int64_t>(gridDim.x) * team.count) {
    const ParallelSample<T> sample(a, position);
    const Storage* row = static_cast<const Storage*>(a.hem.input) + position * a.hem.layout.inner_stride;
    SumOfRuns<T> sum;
    T largest = T(0);
    for (int64_t j = team.rank; j < classes && !sample.ignored; j += team.size) {
      const T e = sample.error_at(j, widen(row[j]));
      sum.add(e);
      largest = maximum(e, largest);
    }
    const T total = team.sum(sum.sum(), scratch);
    largest = team.max(largest, scratch);
    if (team.rank != 0) continue;
    a.errors[position] = total;
    a.errors[rows + position] = largest;
  }
}

template <class T, class Storage, bool kWarpRow>
__global__ void __launch_bounds__(kBlockRowThreads) parallel_keep_rows(CudaParallelArgs<T> a) {
  HEM_DYNAMIC_SHARED(shared);
  const Team<kWarpRow> team;
  T* scratch = reinterpret_cast<T*>(shared);
  const int64_t classes = a.hem.layout.classes, rows = a.hem.layout.inner, num_words = a.hem.layout.words();
  const int lane = team.rank % kWarp;
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * team.count + team.index; position < rows;
       position += static_cast<int64_t>(gridDim.x) * team.count) {
    const ParallelSample<T> sample(a, position);
    const ParallelThreshold<T> threshold(a, position);
    const bool skipped = sample.ignored || threshold.finished;
    const Storage* row = static_cast<const Storage*>(a.hem.input) + position * a.hem.layout.inner_stride;
    SumOfRuns<T> sum;
    T count = T(0);
    for (int64_t w = team.rank / kWarp; w < num_words; w += team.size / kWarp) {
      uint32_t bits = 0;
      if (!skipped) {
        const int64_t j = 32 * w + lane;
        const T e = j < classes ? sample.error_at(j, widen(row[j])) : T(0);
        const bool is_kept = kept(e, threshold.least, T(0));
        bits = __ballot_sync(kFullWarp, is_kept);
        sum.add(is_kept ? e : T(0));
      }
      if (lane != 0) continue;
      a.hem.mask[position * num_words + w] = bits;
      count += T(__popc(bits));
    }
    const T kept_sum = team.sum(sum.sum(), scratch), kept_count = team.sum(count, scratch);
    if (team.rank != 0) continue;
    a.kept[position] = kept_sum;
    a.kept[rows + position] = kept_count;
  }
}

// --- pixels ---

template <class T, class Storage>
__global__ void parallel_errors_pixels(CudaParallelArgs<T> a) {
  const Layout& layout = a.hem.layout;
  const int64_t classes = layout.classes, pixels = layout.inner, positions = layout.positions();
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; position < positions;
       position += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const ParallelSample<T> sample(a, position);
    const Storage* from = static_cast<const Storage*>(a.hem.input) + position / pixels * layout.outer_stride +
                          position % pixels;
    SumOfRuns<T> sum;
    T largest = T(0);
    for (int64_t j = 0; j < classes && !sample.ignored; ++j) {
      const T e = sample.error_at(j, widen(from[j * layout.class_stride]));
      sum.add(e);
      largest = maximum(e, largest);
    }
    a.errors[position] = sum.sum();
    a.errors[positions + position] = largest;
  }
}

template <class T, class Storage>
__global__ void parallel_keep_pixels(CudaParallelArgs<T> a) {
  const Layout& layout = a.hem.layout;
  const int64_t classes = layout.classes, pixels = layout.inner, positions = layout.positions();
  const int64_t num_words = layout.words();
  for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; position < positions;
       position += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const ParallelSample<T> sample(a, position);
    const ParallelThreshold<T> threshold(a, position);
    const bool skipped = sample.ignored || threshold.finished;
    const int64_t image = position / pixels, pixel = position % pixels;
    const Storage* from = static_cast<const Storage*>(a.hem.input) + image * layout.outer_stride + pixel;
    SumOfRuns<T> sum;
    int count = 0;
    for (int64_t w = 0; w < num_words; ++w) {
      uint32_t bits = 0;
      for (int64_t j = 32 * w; j < 32 * w + 32 && j < classes && !skipped; ++j) {
        const T e = sample.error_at(j, widen(from[j * layout.class_stride]));
        if (!kept(e, threshold.least, T(0))) continue;
        sum.add(e);
        bits |= 1u << (j % 32);
      }
      a.hem.mask[(image * num_words + w) * pixels + pixel] = bits;
      count += __popc(bits);
    }
    a.kept[position] = sum.sum();
    a.kept[positions + position] = T(count);
  }
}

}  // namespace hem_ext
