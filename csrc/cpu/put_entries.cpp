#include "freemerge/put_entries.h"

#include "freemerge/sparse_entries.h"

namespace freemerge {
namespace FREEMERGE_ISA {

template <class Element>
static void put(const void* entries, const std::size_t* index, std::size_t n, void* array) {
  auto* target = static_cast<Element*>(array);
  for (std::size_t i = 0; i < n; ++i) std::memcpy(target + index[i], static_cast<const Element*>(entries) + i, sizeof(Element));
}

void put_entries(const SparseSource& sparse, const void* entries, const Target& array) {
  const Source source{entries, array.dtype};
  for_entries(sparse, array, [&](std::size_t first, std::size_t n, const std::size_t* index) {
    with_size(array.dtype, [&](auto element) { put<decltype(element)>(source.at(first), index, n, array.data); });
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
