// Large buffers that outlive an op: fresh pages cost more than the arithmetic done in them, so a buffer given back waits for the next op.
#pragma once
#include <cstddef>

namespace freemerge {

class Scratch {
 public:
  explicit Scratch(std::size_t bytes);   // contents undefined, aligned to a page
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;
  std::size_t bytes_;
};

std::size_t release_scratch();   // give the waiting buffers back to the system; the number of bytes they held

}  // namespace freemerge
