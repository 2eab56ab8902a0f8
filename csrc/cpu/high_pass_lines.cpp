#include "freemerge/high_pass_lines.h"

#include <algorithm>
#include <cstring>

#include "freemerge/high_pass_columns.h"
#include "freemerge/simd.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// ---- input ----

struct Bf16 {
  static constexpr DType dtype = DType::bf16;
  static Vec load(const void* source) { return load_bf16(source); }
};

struct F32 {
  static constexpr DType dtype = DType::f32;
  static Vec load(const void* source) { return FREEMERGE_ISA::load(static_cast<const float*>(source)); }
};

static void load_any(const TaskVectorSum& sum, std::size_t start, std::size_t n, float* tile) {
  alignas(64) float base_tile[TILE], task_vector[TILE];
  if (sum.base) load_tile(sum.base->at(start), sum.base->dtype, n, base_tile);
  std::fill_n(tile, n, 0.0f);
  for (int t = 0; t < sum.T; ++t) {
    if (sum.base)
      task_vector_tile(*sum.base, base_tile, sum.experts[t], start, n, task_vector);
    else
      load_tile(sum.experts[t].at(start), sum.experts[t].dtype, n, task_vector);
    for (std::size_t i = 0; i < n; ++i) tile[i] += sum.weights[t] * task_vector[i];
  }
}

// All of one dtype: the sum stays in registers.
template <class Type>
static void load_alike(const TaskVectorSum& sum, std::size_t start, std::size_t n, float* tile) {
  constexpr int STEP = 32 / WIDTH;
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Vec base[STEP] = {}, total[STEP] = {};
    for (int k = 0; k < STEP && sum.base; ++k) base[k] = Type::load(sum.base->at(start + i + k * WIDTH));
    for (int t = 0; t < sum.T; ++t) {
      const char* expert = static_cast<const char*>(sum.experts[t].data) + (start + i) * size_of(Type::dtype);
      const Vec weight = splat(sum.weights[t]);
      for (int k = 0; k < STEP; ++k) total[k] += weight * (Type::load(expert + k * WIDTH * size_of(Type::dtype)) - base[k]);
    }
    for (int k = 0; k < STEP; ++k) store(tile + i + k * WIDTH, total[k]);
  }
  if (i < n) load_any(sum, start + i, n - i, tile + i);
}

static bool all_of(const TaskVectorSum& sum, DType dtype) {
  return (!sum.base || sum.base->dtype == dtype) &&
         std::all_of(sum.experts, sum.experts + sum.T, [=](const Source& expert) { return expert.dtype == dtype; });
}

Input::Input(const TaskVectorSum& sum)
    : sum_(sum),
      load_(all_of(sum, DType::bf16)  ? &load_alike<Bf16>
            : all_of(sum, DType::f32) ? &load_alike<F32>
                                      : &load_any) {}

void Input::prefetch(std::size_t start, std::size_t n) const {
  if (sum_.base) prefetch_run<false>(sum_.base->at(start), sum_.base->at(start + n));
  for (int t = 0; t < sum_.T; ++t) prefetch_run<false>(sum_.experts[t].at(start), sum_.experts[t].at(start + n));
}

// ---- groups of lines ----

constexpr std::size_t STRIP = 64;    // elements of a row handled at once where lines are rows
constexpr std::size_t AHEAD = 4;     // rows prefetched where lines are columns: each lies in another page, where the hardware does not look

std::size_t Lines::at_once(const HighPass& plan) { return plan.axis == 1 ? 1 : plan.rows <= 16384 ? 4 : 2; }

std::size_t Lines::count(std::size_t group) const { return std::min(GROUP, plan_.lines() - group * GROUP); }

static void transpose(const float* source, std::size_t source_stride, std::size_t rows, std::size_t columns, float* target,
                      std::size_t target_stride) {   // rows and columns: multiples of 8
  for (std::size_t i = 0; i < rows; i += 8)
    for (std::size_t j = 0; j < columns; j += 8)
      transpose_8x8(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride);
}

void Lines::load(std::size_t group, std::size_t groups, float* buffer) const {
  if (plan_.axis == 0)
    load_columns(group, groups, buffer);
  else
    for (std::size_t k = 0; k < groups; ++k) load_rows(group + k, buffer + k * plan_.length() * GROUP);
}

double Lines::finish(std::size_t group, std::size_t groups, float* buffer, float scale) const {
  if (plan_.axis == 0) return finish_columns(group, groups, buffer, scale);
  double magnitude = 0;
  for (std::size_t k = 0; k < groups; ++k) magnitude += finish_rows(group + k, buffer + k * plan_.length() * GROUP, scale);
  return magnitude;
}

void Lines::load_columns(std::size_t group, std::size_t groups, float* buffer) const {
  const std::size_t length = plan_.length(), width = plan_.columns, first = group * GROUP, last = std::min(width, first + groups * GROUP);
  for (std::size_t i = 0; i < length; ++i) {
    if (i + AHEAD < length) input_.prefetch((i + AHEAD) * width + first, last - first);
    for (std::size_t k = 0; k < groups; ++k) {
      const std::size_t lines = count(group + k);
      float* point = buffer + (k * length + i) * GROUP;
      input_.load(i * width + first + k * GROUP, lines, point);
      std::fill(point + lines, point + GROUP, 0.0f);
    }
  }
}

double Lines::finish_columns(std::size_t group, std::size_t groups, float* buffer, float scale) const {
  const std::size_t length = plan_.length();
  double magnitude = 0;
  const std::size_t width = std::min(plan_.columns - group * GROUP, groups * GROUP);
  for (std::size_t i = 0; i < length; ++i) {
    if (i + AHEAD < length) output_.prefetch((i + AHEAD) * plan_.columns + group * GROUP, width);
    for (std::size_t k = 0; k < groups; ++k)
      magnitude += output_.take(i * plan_.columns + (group + k) * GROUP, count(group + k), buffer + (k * length + i) * GROUP, scale);
  }
  return magnitude;
}

void Lines::load_rows(std::size_t group, float* buffer) const {
  const std::size_t length = plan_.length(), first = group * GROUP, lines = count(group);
  alignas(64) float tile[GROUP * STRIP] = {};
  for (std::size_t start = 0; start < length; start += STRIP) {
    const std::size_t n = std::min(STRIP, length - start), next = std::min(STRIP, length - start - n);
    for (std::size_t line = 0; line < lines; ++line) {
      const std::size_t at = (first + line) * length + start;
      if (next) input_.prefetch(at + n, next);
      input_.load(at, n, tile + line * STRIP);
    }
    if (n == STRIP) {
      transpose(tile, STRIP, GROUP, STRIP, buffer + start * GROUP, GROUP);
    } else {
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t line = 0; line < GROUP; ++line) buffer[(start + i) * GROUP + line] = tile[line * STRIP + i];
    }
  }
}

double Lines::finish_rows(std::size_t group, float* buffer, float scale) const {
  const std::size_t length = plan_.length(), first = group * GROUP, lines = count(group);
  double magnitude = 0;
  alignas(64) float tile[GROUP * STRIP];
  for (std::size_t start = 0; start < length; start += STRIP) {
    const std::size_t n = std::min(STRIP, length - start);
    if (n == STRIP) {
      transpose(buffer + start * GROUP, GROUP, STRIP, GROUP, tile, STRIP);
    } else {
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t line = 0; line < GROUP; ++line) tile[line * STRIP + i] = buffer[(start + i) * GROUP + line];
    }
    const std::size_t next = std::min(STRIP, length - start - n);
    for (std::size_t line = 0; line < lines; ++line) {
      const std::size_t at = (first + line) * length + start;
      if (next) output_.prefetch(at + n, next);
      magnitude += output_.take(at, n, tile + line * STRIP, scale);
    }
  }
  return magnitude;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
