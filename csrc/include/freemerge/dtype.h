// Storage types and the arrays an op is handed. Kernels compute in float tiles (tile.h); these say what lies in memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace freemerge {

enum class DType : int { f64, f32, f16, bf16, f8_e4m3fn, f8_e5m2 };

inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    default: return 1;
  }
}

// A contiguous array to read. It may lie at any byte offset of a mapped file, so nothing is assumed of its alignment.
// Null where there is none and an op allows that.
struct Source {
  const void* data;
  DType dtype;

  explicit operator bool() const { return data != nullptr; }
  const void* at(std::size_t index) const { return static_cast<const char*>(data) + index * size_of(dtype); }
};

// A contiguous array to write; may be the memory of one of the sources.
struct Target {
  void* data;
  DType dtype;

  void* at(std::size_t index) const { return static_cast<char*>(data) + index * size_of(dtype); }
};

}  // namespace freemerge
