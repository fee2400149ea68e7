// Runs the CPU kernels on calls that come in a file, without torch: what is compiled for another processor,
// or by another compiler, is compared with the library bit by bit. See kernels.py for what the files hold.
//
//     driver INSTRUCTION_SET CALLS RESULTS
//
// The blocks of a call are shared by kThreads threads, and what a kernel is given lies in memory of its own
// size.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../../csrc/hem/hem_cpu_kernels.h"

namespace {

using namespace hem_ext;

struct Call {
  int64_t type, rows, outer, classes, inner;
  int64_t target_type, ignore_index, count_all, has_margins, has_weight, per_sample, block;
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

const CpuKernels& table(const char* name) {
  for (CpuIsa isa : available_isas()) {
    if (std::strcmp(name, hem_ext::name(isa)) != 0) continue;
#if HEM_X86_TARGETS
    if (isa == CpuIsa::kAvx512) return avx512::kernels;
    if (isa == CpuIsa::kAvx2) return avx2::kernels;
#endif
    return baseline::kernels;
  }
  fail("no such instruction set here");
  std::abort();
}

constexpr int64_t kThreads = 3;

template <class Args>
void run_blocks(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t blocks) {
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < kThreads; ++k) {
    threads.emplace_back(kernel, std::cref(args), blocks * k / kThreads, blocks * (k + 1) / kThreads);
  }
  for (std::thread& thread : threads) thread.join();
}

void run(const CpuKernels& kernels, const Call& c, std::FILE* from, std::FILE* to) {
  constexpr int64_t kStored[] = {4, 8, 2, 2}, kTarget[] = {8, 4, 1};
  const int64_t stored = kStored[c.type], number = c.type == 1 ? 8 : 4;
  const int64_t positions = c.outer * c.inner, size = positions * c.classes * stored;

  const Bytes input = read(from, size), target = read(from, positions * kTarget[c.target_type]);
  const Bytes margins = read(from, c.has_margins != 0 ? c.classes * number : 0);
  const Bytes weight = read(from, c.has_weight != 0 ? c.classes * number : 0);
  const Bytes grad_loss = read(from, (c.per_sample != 0 ? positions : 1) * number);
  const Bytes denominator = read(from, number);

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
  f.block = c.block;

  const int64_t blocks = num_blocks(f.layout, c.block);
  Bytes losses(positions * number), mask(positions * f.layout.words() * 4), gradient(size);
  Bytes partials(blocks * sizeof(Partial));
  f.losses = losses.data();
  f.mask = reinterpret_cast<int32_t*>(mask.data());
  f.partials = reinterpret_cast<Partial*>(partials.data());
  run_blocks(kernels.forward[c.type], f, blocks);

  BackwardArgs b{};
  b.layout = f.layout;
  b.targets = f.targets;
  b.weight = f.weight;
  b.grad_loss = grad_loss.data();
  b.grad_per_sample = c.per_sample != 0;
  b.denominator = denominator.data();
  b.mask = f.mask;
  b.block = c.block;
  b.grad_input = gradient.data();
  run_blocks(kernels.backward[c.type], b, blocks);

  for (const Bytes* bytes : {&losses, &mask, &partials, &gradient}) write(to, *bytes);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) fail("expected an instruction set, a file of calls and one for the results");
  const CpuKernels& kernels = table(words[1]);
  std::FILE* from = std::fopen(words[2], "rb");
  std::FILE* to = std::fopen(words[3], "wb");
  if (from == nullptr || to == nullptr) fail("a file cannot be opened");
  Call call;
  while (std::fread(&call, sizeof(call), 1, from) == 1) run(kernels, call, from, to);
  std::fclose(from);
  return std::fclose(to);
}
