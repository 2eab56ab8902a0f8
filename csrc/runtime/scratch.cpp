#include "freemerge/scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace freemerge {
namespace {

struct Buffer {
  void* data;
  std::size_t bytes;
};

constexpr std::size_t MOST_WAITING = 64;   // buffers

std::mutex mutex;
std::vector<Buffer> waiting;

Buffer map(std::size_t bytes) {
  constexpr std::size_t HUGE_PAGE = 2 << 20;
  const std::size_t page = bytes < HUGE_PAGE / 2 ? 4096 : HUGE_PAGE;
  bytes = std::max<std::size_t>(page, (bytes + page - 1) / page * page);
  // mmap aligns to 4 KiB: map one huge page more and cut off what sticks out
  const std::size_t extra = page == HUGE_PAGE ? HUGE_PAGE : 0;
  void* raw = mmap(nullptr, bytes + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  if (extra == 0) return {raw, bytes};
  const auto start = reinterpret_cast<std::size_t>(raw), aligned = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (aligned > start) munmap(raw, aligned - start);
  if (aligned < start + extra) munmap(reinterpret_cast<void*>(aligned + bytes), start + extra - aligned);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);
#endif
  return {reinterpret_cast<void*>(aligned), bytes};
}

}  // namespace

Scratch::Scratch(std::size_t bytes) {
  std::vector<Buffer> outgrown;
  Buffer found{nullptr, 0};
  {
    std::lock_guard<std::mutex> lock(mutex);
    // the smallest that fits, unless it is so much larger that someone else will want it
    auto best = waiting.end();
    for (auto it = waiting.begin(); it != waiting.end(); ++it)
      if (it->bytes >= bytes && it->bytes / 4 <= bytes + (1 << 20) && (best == waiting.end() || it->bytes < best->bytes)) best = it;
    if (best != waiting.end()) {
      found = *best;
      waiting.erase(best);
    } else {
      // what is being asked for grows: a buffer of about this kind that is too small would only wait for ever
      const auto small = std::find_if(waiting.begin(), waiting.end(),
                                      [&](const Buffer& b) { return b.bytes < bytes && b.bytes >= bytes / 4; });
      if (small != waiting.end()) outgrown.push_back(*small), waiting.erase(small);
    }
  }
  for (const auto& buffer : outgrown) munmap(buffer.data, buffer.bytes);
  if (found.data == nullptr) found = map(bytes);
  data_ = found.data;
  bytes_ = found.bytes;
}

Scratch::~Scratch() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (waiting.size() < MOST_WAITING) {
      waiting.push_back({data_, bytes_});
      return;
    }
  }
  munmap(data_, bytes_);
}

std::size_t release_scratch() {
  std::vector<Buffer> released;
  {
    std::lock_guard<std::mutex> lock(mutex);
    released.swap(waiting);
  }
  std::size_t bytes = 0;
  for (const auto& buffer : released) munmap(buffer.data, buffer.bytes), bytes += buffer.bytes;
  return bytes;
}

}  // namespace freemerge
