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

template <bool WRITE>
inline void prefetch_run(const void* start, const void* end) {
  const char *first = static_cast<const char*>(start), *last = static_cast<const char*>(end) - 1;
  for (; first < last; first += 64) __builtin_prefetch(first, WRITE);
  __builtin_prefetch(last, WRITE);
}

// What becomes of a run of the filtered sum.
class Output {
 public:
  virtual ~Output() = default;
  // values: n <= TILE of them, scale * values[i] is the filtered sum at element start + i; destroyed.
  // The sum of magnitudes of the run, where that is what is asked for, or 0
  virtual double take(std::size_t start, std::size_t n, float* values, float scale) const = 0;
  virtual void prefetch(std::size_t start, std::size_t n) const = 0;   // the cache lines of a run, soon to be taken
};

// Groups of GROUP lines, each in a buffer of [length][GROUP] floats.
class Lines {
 public:
  Lines(const HighPass& plan, const Input& input, const Output& output) : plan_(plan), input_(input), output_(output) {}

  // How many neighbouring groups to handle together: a group of columns is one cache line wide and rarely aligned, so that alone it would
  // move most lines twice, and look up a page for each.
  static std::size_t at_once(const HighPass& plan);

  // `groups` of them from `group` on; buffer: [groups][length][GROUP]. Absent lines of the last group are 0
  void load(std::size_t group, std::size_t groups, float* buffer) const;
  double finish(std::size_t group, std::size_t groups, float* buffer, float scale) const;   // the sum of what Output::take says

 private:
  void load_columns(std::size_t group, std::size_t groups, float* buffer) const;
  void load_rows(std::size_t group, float* buffer) const;
  double finish_columns(std::size_t group, std::size_t groups, float* buffer, float scale) const;
  double finish_rows(std::size_t group, float* buffer, float scale) const;
  std::size_t count(std::size_t group) const;

  const HighPass& plan_;
  const Input& input_;
  const Output& output_;
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
