// torch's parallel_for, with threads that ThreadSanitizer sees begin and end: it is preloaded by `make
// sanitize`. Those of torch are of an OpenMP that is not built for it, and every hand-over looks like a race.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*run)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 3;
  const int64_t each = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (; begin < end; begin += each) threads.emplace_back(run, begin, std::min(begin + each, end), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
