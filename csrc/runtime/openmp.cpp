#include "freemerge/openmp.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "freemerge/threads.h"

namespace freemerge {
namespace {

// What compilers call for `#pragma omp parallel`: a function run by each thread of a team. Intel's and LLVM's runtimes have it, too.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
using Count = int (*)();

struct OpenMp {
  Parallel parallel = nullptr;
  Count most = nullptr;

  explicit operator bool() const { return parallel && most; }
};

// The child of a fork() has none of these threads, and OpenMP waits for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// A process may hold several OpenMP runtimes: this finds the one that torch's library is linked with.
OpenMp find_openmp() {
  OpenMp found;
  if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    found.parallel = reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
    found.most = reinterpret_cast<Count>(dlsym(torch, "omp_get_max_threads"));
  }
  return found;
}

struct Loop {
  std::size_t count;
  const std::function<void(std::size_t)>& body;
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;

  Loop(std::size_t count, const std::function<void(std::size_t)>& body) : count(count), body(body) {}

  void work() {
    try {
      for (std::size_t index; (index = next.fetch_add(1)) < count;) body(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

}  // namespace

void parallel_with_torch(std::size_t count, const std::function<void(std::size_t)>& body) {
  static const OpenMp openmp = find_openmp();
  const int most = openmp && !forked ? std::min(threads(), openmp.most()) : 1;
  if (count < 2 || most < 2) return parallel_for(count, body);
  Loop loop(count, body);
  openmp.parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, static_cast<unsigned>(most), 0);
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace freemerge
