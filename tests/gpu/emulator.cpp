// Runs the threads of a block as fibers on one CPU: a barrier hands over to the next, so that between two barriers threads run
// one after another, in the order the test asks for. Shared memory is watched: an access outside of it, a read of what no thread
// wrote, and two accesses of different threads to one word with no barrier between them, one of them a write, are faults; atomic
// additions are none among themselves.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <vector>

struct Index {
  unsigned x, y, z;
};
Index threadIdx, blockIdx, gridDim;
void* emulator_shared_memory;

namespace {

constexpr std::size_t STACK = 128 << 10, GUARD = 64 << 10, MOST_THREADS = 1024;

struct Word {
  long written = -1, read = -1;   // at which barrier
  int writer = -1, reader = -1;   // SEVERAL: more than one thread has read it since, or added to it atomically
};
constexpr int SEVERAL = -2;

struct Fiber {
  ucontext_t context;
  bool done;
  int waits_at;   // line of a barrier
};

std::vector<char> memory;
std::vector<Word> words;
std::vector<Fiber> fibers(MOST_THREADS);
ucontext_t scheduler;
char* stacks;
long barrier, first_barrier;   // of all blocks; of this block
int current;
char fault[256];
void (*kernel)(void**);
void** kernel_arguments;

void complain(const char* what, std::size_t offset) {
  if (fault[0]) return;
  std::snprintf(fault, sizeof fault, "%s: byte %zd of shared memory, block (%u, %u), thread %d, after %ld barriers", what,
                static_cast<std::ptrdiff_t>(offset), blockIdx.x, blockIdx.y, current, barrier - first_barrier);
}

void run_fiber() {
  kernel(kernel_arguments);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void start(int thread) {
  Fiber& fiber = fibers[thread];
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + thread * STACK;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

// Every thread once, up to its next barrier or its end; whether any is left
bool run_to_barrier(int threads, bool descending) {
  int waits_at = 0;
  bool left = false;
  for (int i = 0; i < threads; ++i) {
    current = descending ? threads - 1 - i : i;
    Fiber& fiber = fibers[current];
    if (fiber.done) continue;
    threadIdx = {static_cast<unsigned>(current), 0, 0};
    swapcontext(&scheduler, &fiber.context);
    if (fiber.done) continue;
    if (left && fiber.waits_at != waits_at) complain("threads wait at different barriers", 0);
    waits_at = fiber.waits_at;
    left = true;
  }
  ++barrier;
  return left;
}

}  // namespace

void emulator_barrier(int line) {
  fibers[current].waits_at = line;
  swapcontext(&fibers[current].context, &scheduler);
}

void emulator_access(const void* address, std::size_t bytes, bool write, bool atomic) {
  const int who = atomic ? SEVERAL : current;
  const std::size_t offset = static_cast<const char*>(address) - static_cast<char*>(emulator_shared_memory);
  if (offset / 4 + bytes / 4 > words.size()) return complain("access outside", offset);
  for (std::size_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
    Word& word = words[i];
    if ((!write || atomic) && word.written < first_barrier) complain("read of what nobody wrote", 4 * i);
    if (word.written == barrier && word.writer != who) complain(write ? "two threads write" : "a race: written and read", 4 * i);
    if (write) {
      if (word.read == barrier && word.reader != current) complain("a race: read and written", 4 * i);
      word.written = barrier, word.writer = who;
    } else {
      word.reader = word.read == barrier && word.reader != current ? SEVERAL : current;
      word.read = barrier;
    }
  }
}

// Null, or what went wrong. Blocks run one after another, in descending order (threads too) where that is asked for.
extern "C" const char* emulator_run(void (*call)(void**), void** arguments, unsigned grid_x, unsigned grid_y, int threads,
                                    std::size_t shared_bytes, int descending) {
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  kernel = call, kernel_arguments = arguments, fault[0] = 0;
  gridDim = {grid_x, grid_y, 1};
  memory.assign(shared_bytes + 2 * GUARD, -1);   // NaN
  words.assign(shared_bytes / 4, Word());
  emulator_shared_memory = memory.data() + GUARD;
  for (unsigned block = 0; block < grid_x * grid_y && !fault[0]; ++block) {
    const unsigned index = descending ? grid_x * grid_y - 1 - block : block;
    blockIdx = {index % grid_x, index / grid_x, 0};
    first_barrier = ++barrier;
    for (int thread = 0; thread < threads; ++thread) start(thread);
    while (run_to_barrier(threads, descending)) {
    }
  }
  return fault[0] ? fault : nullptr;
}
