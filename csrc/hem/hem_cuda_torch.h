// What the CUDA glue of every op shares: where a call runs, and torch's tensors as the arguments of kernels.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../common/torch_glue.h"
#include "hem_cuda_kernels.cuh"
#include "hem_torch.h"

namespace hem_ext {

constexpr int kThreads = 256;  // a block, where nothing else decides

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) raise<std::runtime_error>("hem_ext: ", what, ": ", cudaGetErrorString(status));
}

// Where a call runs, for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& input) : guard_(input.get_device_index()) {
    void* stream = nullptr;
    check_status(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream),
                 "aoti_torch_get_current_cuda_stream");
    stream_ = static_cast<cudaStream_t>(stream);
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, input.get_device_index()),
          "cudaDeviceGetAttribute");
    max_blocks_ = int64_t{16} * multiprocessors;
  }

  int64_t max_blocks() const { return max_blocks_; }

  // Enough blocks for the work, and no more than fill the device a few times over: every block of a forward
  // kernel leaves two partial sums.
  unsigned blocks(int64_t work, int64_t per_block) const {
    return static_cast<unsigned>(std::clamp<int64_t>((work + per_block - 1) / per_block, 1, max_blocks_));
  }

  template <class Kernel, class... Args>
  void launch(Kernel kernel, unsigned blocks, int threads, size_t shared_bytes, const Args&... args) const {
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
    }
    kernel<<<blocks, threads, shared_bytes, stream_>>>(args...);
    check(cudaGetLastError(), "kernel launch");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int64_t max_blocks_ = 0;
};

// f with a value of the storage type.
template <class F>
void with_storage(InputType type, const F& f) {
  switch (type) {
    case InputType::kFloat32: return f(float{});
    case InputType::kFloat64: return f(double{});
    case InputType::kBFloat16: return f(DeviceBFloat16{});
    case InputType::kFloat16: return f(DeviceFloat16{});
  }
}

template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class T>
CudaForwardArgs<T> forward_args(const ForwardCall& call, const Tensor& input,
                                const std::optional<Tensor>& margins, double margin,
                                const std::optional<Tensor>& weight, int64_t ignore_index) {
  CudaForwardArgs<T> args{};
  args.layout = call.layout;
  args.input = data_of("input", input);
  args.target = data_of("target", call.target);
  args.target_type = target_type(call.target.scalar_type());
  args.ignore_index = ignore_index;
  args.margins = static_cast<const T*>(data_or_null("margin", margins));
  args.margin = static_cast<T>(margin);
  args.weight = static_cast<const T*>(data_or_null("weight", weight));
  args.count_all = call.reduction == Reduction::kBatchMean;
  args.losses = call.per_sample() ? static_cast<T*>(call.loss.mutable_data_ptr()) : nullptr;
  args.mask = static_cast<uint32_t*>(call.mask.mutable_data_ptr());
  return args;
}

template <class T>
CudaBackwardArgs<T> backward_args(const BackwardCall& call, const Tensor& grad_input, const Tensor& mask,
                                  const std::optional<Tensor>& weight, const Tensor& denominator,
                                  int64_t ignore_index) {
  CudaBackwardArgs<T> args{};
  args.layout = call.layout;
  args.target = data_of("target", call.target);
  args.target_type = target_type(call.target.scalar_type());
  args.ignore_index = ignore_index;
  args.weight = static_cast<const T*>(data_or_null("weight", weight));
  args.grad_loss = static_cast<const T*>(data_of("grad_loss", call.grad_loss));
  args.grad_per_sample = call.per_sample;
  args.denominator = static_cast<const T*>(data_of("the denominator", denominator));
  args.mask = static_cast<const uint32_t*>(data_of("the mask", mask));
  data_of("the gradient", grad_input);
  args.grad_input = grad_input.mutable_data_ptr();
  args.range = all_classes(call.layout);
  return args;
}

// Backward of hem_loss for these classes, in hem_cuda.cu: which kernel with which grid.
void write_gradient(const BackwardCall& call, const Tensor& grad_input, const Tensor& mask,
                    const std::optional<Tensor>& weight, const Tensor& denominator, int64_t ignore_index,
                    const ClassRange& range);

// Lets run() launch a forward kernel, of as many blocks as it returns, and adds up what these leave.
template <class T, class Run>
void forward_and_reduce(const Device& device, const ForwardCall& call, CudaForwardArgs<T>* args,
                        const Tensor& input, const Run& run) {
  const Tensor partials = empty({device.max_blocks(), 2}, ScalarType::Double, input);
  args->partials = static_cast<double*>(partials.mutable_data_ptr());
  const unsigned blocks = run();
  const double* sums = args->partials;
  device.launch(hem_reduce<T>, 1, kThreads, 2 * sizeof(double) * (kThreads / kWarp), sums,
                static_cast<int>(blocks), call.divides(), !call.per_sample(),
                static_cast<T*>(call.loss.mutable_data_ptr()),
                static_cast<T*>(call.denominator.mutable_data_ptr()));
}

}  // namespace hem_ext
