// Where the lines come from and go to: runs of the matrix, summed on the way in, finished on the way out.
#pragma once
#include "freemerge/fft.h"
#include "freemerge/high_pass.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Runs of the sum of task vectors, in float.
class Input {
 public:
  explicit Input(const TaskVectorSum& sum);

  // tile[i] = the sum at element start + i, n <= TILE
  void load(std::size_t start, std::size_t n, float* tile) const { load_(sum_, start, n, tile); }
  void prefetch(std::size_t start, std::size_t n) const;   // the cache lines of a run, soon to be loaded

  const Source* base() const { return sum_.base; }

 private:
  const TaskVectorSum& sum_;
  void (*load_)(const TaskVectorSum&, std::size_t, std::size_t, float*);
};

// What becomes of a run of the filtered sum.
class Output {
 public:
  virtual ~Output() = default;
  // values: n <= TILE of them, scale * values[i] is the filtered sum at element start + i; destroyed.
  // The sum of magnitudes of the run, where that is what is asked for, or 0
  virtual double take(std::size_t start, std::size_t n, float* values, float scale) const = 0;
};

// Groups of GROUP lines, in one buffer of [length][GROUP] floats.
class Lines {
 public:
  Lines(const HighPass& plan, const Input& input, const Output& output) : plan_(plan), input_(input), output_(output) {}

  void load(std::size_t group, float* buffer) const;             // absent lines of the last group are 0
  double finish(std::size_t group, float* buffer, float scale) const;   // sum of what Output::take says

 private:
  std::size_t count(std::size_t group) const;

  const HighPass& plan_;
  const Input& input_;
  const Output& output_;
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
