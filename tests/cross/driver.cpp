// Runs the CPU kernels on calls that come in a file, without torch: what is compiled for another processor,
// or by another compiler, is compared with the library bit by bit. See kernels.py for what the files hold.
//
//     driver INSTRUCTION_SET CALLS RESULTS
//
// The pieces of a call are shared by kThreads threads, and what a kernel is given lies in memory of its own
// size.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../../csrc/hem/hem_cpu_kernels.h"
#include "../../csrc/parallel/parallel_cpu_kernels.h"
#include "../../csrc/upsample/upsample_cpu_pieces.h"

namespace {

using namespace hem_ext;

struct Call {
  int64_t type, rows, outer, classes, inner;
  int64_t target_type, ignore_index, count_all, has_margins, has_weight, per_sample, block;
  int64_t in_rows, in_columns, columns, align_corners, channels_last;  // of upsampled_hem_loss, else 0
  int64_t past_caches;  // the gradient of rows: 0 no, 1 zeros, 2 all of it
  int64_t of, first;  // of class_parallel_hem_loss, else 0: so many classes, of which `classes` from here on
  double margin;
};

void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

using Bytes = std::vector<char>;

Bytes read(std::FILE* from, int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, from) != static_cast<size_t>(size)) fail("the calls end too soon");
  return bytes;
}

void write(std::FILE* to, const Bytes& bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), to) != bytes.size()) fail("the results cannot be written");
}

// The kernels of one instruction set.
struct Tables {
  const CpuKernels& hem;
  const UpsampledCpuKernels& upsampled;
  const ParallelCpuKernels& parallel;
};

Tables tables(const char* name) {
  for (CpuIsa isa : available_isas()) {
    if (std::strcmp(name, hem_ext::name(isa)) != 0) continue;
#if HEM_X86_TARGETS
    if (isa == CpuIsa::kAvx512) return {avx512::kernels, avx512::upsampled_kernels, avx512::parallel_kernels};
    if (isa == CpuIsa::kAvx2) return {avx2::kernels, avx2::upsampled_kernels, avx2::parallel_kernels};
#endif
    return {baseline::kernels, baseline::upsampled_kernels, baseline::parallel_kernels};
  }
  fail("no such instruction set here");
  std::abort();
}

constexpr int64_t kThreads = 3;

template <class Args>
void run_pieces(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t pieces) {
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < kThreads; ++k) {
    threads.emplace_back(kernel, std::cref(args), pieces * k / kThreads, pieces * (k + 1) / kThreads);
  }
  for (std::thread& thread : threads) thread.join();
}

// A share of the classes, as if no others had an error: what both looks write, the mask and the gradient.
void run_share(const Tables& tables, const Call& c, const ForwardArgs& hem, BackwardArgs backward,
               const Bytes& target_logits, Bytes* gradient, std::FILE* to) {
  const int64_t number = c.type == 1 ? 8 : 4, positions = c.outer * c.inner;
  const int64_t blocks = num_blocks(hem.layout, hem.block);
  Bytes errors(2 * positions * number), kept(2 * positions * number), counts(positions * 4);
  ParallelForwardArgs a{};
  a.hem = hem;
  a.classes = c.of;
  a.first = c.first;
  a.target_logits = target_logits.data();
  a.error_sum = errors.data();
  a.largest = errors.data() + positions * number;
  a.kept_sum = kept.data();
  a.kept_count = kept.data() + positions * number;
  run_pieces(tables.parallel.errors[c.type], a, blocks);
  run_pieces(tables.parallel.keep[c.type], a, blocks);
  for (int64_t i = 0; i < positions; ++i) {
    const char* count = static_cast<const char*>(a.kept_count) + i * number;
    double as_double = 0;
    float as_float = 0;
    std::memcpy(number == 8 ? static_cast<void*>(&as_double) : &as_float, count, number);
    const int32_t whole = static_cast<int32_t>(as_double + as_float);
    std::memcpy(counts.data() + 4 * i, &whole, 4);
  }
  backward.range = {c.first, c.of, reinterpret_cast<const int32_t*>(counts.data()), hem.layout.words(), 0};
  run_pieces(tables.hem.backward[c.type], backward, blocks);
  const char* mask = reinterpret_cast<const char*>(hem.mask);
  write(to, errors);
  write(to, Bytes(mask, mask + 4 * positions * hem.layout.words()));
  write(to, kept);
  write(to, *gradient);
}

void run(const Tables& tables, const Call& c, std::FILE* from, std::FILE* to) {
  constexpr int64_t kStored[] = {4, 8, 2, 2}, kTarget[] = {8, 4, 1};
  const int64_t stored = kStored[c.type], number = c.type == 1 ? 8 : 4;
  const bool upsampled = c.in_rows != 0;
  const int64_t positions = c.outer * c.inner;
  const int64_t size = stored * c.classes * (upsampled ? c.outer * c.in_rows * c.in_columns : positions);

  const Bytes input = read(from, size), target = read(from, positions * kTarget[c.target_type]);
  const Bytes margins = read(from, c.has_margins != 0 ? (c.of != 0 ? c.of : c.classes) * number : 0);
  const Bytes weight = read(from, c.has_weight != 0 ? c.classes * number : 0);
  const Bytes grad_loss = read(from, (c.per_sample != 0 ? positions : 1) * number);
  const Bytes denominator = read(from, number);
  const Bytes target_logits = read(from, c.of != 0 ? positions * number : 0);

  ForwardArgs f{};
  f.layout = {c.rows != 0, c.outer, c.classes, c.inner, 0, 0, 0};
  f.layout.outer_stride = c.rows != 0 ? 0 : c.classes * c.inner;
  f.layout.class_stride = c.rows != 0 ? 1 : c.inner;
  f.layout.inner_stride = c.rows != 0 ? c.classes : 1;
  f.input = input.data();
  f.targets = {target.data(), static_cast<TargetType>(c.target_type), c.ignore_index};
  f.margins = c.has_margins != 0 ? margins.data() : nullptr;
  f.margin = c.margin;
  f.weight = c.has_weight != 0 ? weight.data() : nullptr;
  f.count_all = c.count_all != 0;

  const UpsampledSizes sizes{
      c.outer, c.classes, c.in_rows, c.in_columns, upsampled ? c.inner / c.columns : 0, c.columns};
  f.block = upsampled ? block_size(sizes) : c.block;
  const int64_t blocks = upsampled ? num_blocks(sizes, f.block) : num_blocks(f.layout, f.block);
  Bytes losses(positions * number), mask(positions * f.layout.words() * 4);
  Bytes gradient(size, 0x5a);  // all of it is to be written
  Bytes partials(blocks * sizeof(Partial));
  f.losses = losses.data();
  f.mask = reinterpret_cast<int32_t*>(mask.data());
  f.partials = reinterpret_cast<Partial*>(partials.data());

  BackwardArgs b{};
  b.layout = f.layout;
  b.targets = f.targets;
  b.weight = f.weight;
  b.grad_loss = grad_loss.data();
  b.grad_per_sample = c.per_sample != 0;
  b.denominator = denominator.data();
  b.mask = f.mask;
  b.block = f.block;
  b.grad_input = gradient.data();
  b.streamed = c.past_caches > 0;
  b.by_line = c.past_caches > 1;
  b.range = all_classes(b.layout);
  if (c.of != 0) return run_share(tables, c, f, b, target_logits, &gradient, to);

  if (upsampled) {
    with_axes(sizes, number == 8, c.align_corners != 0, [&](const Axis& rows, const Axis& columns) {
      const UpsampledForwardArgs forward{f, rows, columns, span_of(columns, f.block)};
      run_pieces(tables.upsampled.forward[c.type], forward, blocks);
      const UpsampledBackwardArgs backward{b, rows, columns, band_size(sizes), c.channels_last != 0};
      run_pieces(tables.upsampled.backward[c.type], backward,
                 sizes.images * bands_per_image(sizes, backward.band));
    });
  } else {
    run_pieces(tables.hem.forward[c.type], f, blocks);
    run_pieces(tables.hem.backward[c.type], b, blocks);
  }
  Bytes count(sizeof(blocks));
  std::memcpy(count.data(), &blocks, sizeof(blocks));
  for (const Bytes* bytes : {&losses, &mask, &count, &partials, &gradient}) write(to, *bytes);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) fail("expected an instruction set, a file of calls and one for the results");
  const Tables kernels = tables(words[1]);
  std::FILE* from = std::fopen(words[2], "rb");
  std::FILE* to = std::fopen(words[3], "wb");
  if (from == nullptr || to == nullptr) fail("a file cannot be opened");
  Call call;
  while (std::fread(&call, sizeof(call), 1, from) == 1) run(kernels, call, from, to);
  std::fclose(from);
  return std::fclose(to);
}
