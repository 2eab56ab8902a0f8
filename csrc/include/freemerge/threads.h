// One pool of threads for the process. Several callers may use it at once: an op is running while another waits for its writer.
#pragma once
#include <cstddef>
#include <functional>

namespace freemerge {

void set_threads(int count);   // 0: one for each core this process may use
int threads();

// Call body(0) ... body(count - 1), each once, on the pool and the calling thread; return when all are done.
// What a body computes must not depend on which thread runs it or in what order: results are the same for any thread count.
// An exception of a body is thrown again here, after the others have ended.
void parallel_for(std::size_t count, const std::function<void(std::size_t)>& body);

}  // namespace freemerge
