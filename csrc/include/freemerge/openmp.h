// The threads torch computes with. Between its operations they go on spinning for some milliseconds, each on a core of its
// own: an op that is called amid them is faster on these threads than beside them.
#pragma once
#include <cstddef>
#include <functional>

namespace freemerge {

// As parallel_for, on the OpenMP threads of torch where torch is loaded and has some.
void parallel_with_torch(std::size_t count, const std::function<void(std::size_t)>& body);

}  // namespace freemerge
