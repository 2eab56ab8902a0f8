// For filters whose lines are columns: the sum of the task vectors on the way in, and the base on the way out, each with a
// transposition by tiles in shared memory. In between, lines are rows of float32.
#include "device.h"
#include "element.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr int SIDE = 32, STEP = 8;   // a tile is SIDE x SIDE, a block STEP of its rows at once

// A tile of the matrix: a thread has column `across` of rows `down`, `down` + STEP, ... before, and the other way round after.
struct Tile {
  float* memory;   // [SIDE][SIDE + 1]: the padding puts a column into different banks
  long long row, column;
  int across, down;

  __device__ explicit Tile(float* memory)
      : memory(memory), row(blockIdx.y * static_cast<long long>(SIDE)), column(blockIdx.x * static_cast<long long>(SIDE)),
        across(threadIdx.x % SIDE), down(threadIdx.x / SIDE) {}

  __device__ void put(int i, int j, float value) const {
    SHARED_WRITE(memory + i * (SIDE + 1) + j);
    memory[i * (SIDE + 1) + j] = value;
  }
  __device__ float get(int i, int j) const {
    SHARED_READ(memory + i * (SIDE + 1) + j);
    return memory[i * (SIDE + 1) + j];
  }
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

using namespace freemerge::FREEMERGE_ISA;

// sums[column][row] = sum_t weights[t] * (experts[t][row][column] - base[row][column])
extern "C" __global__ void __launch_bounds__(SIDE * STEP)
    high_pass_transpose_in(const void* base, const unsigned long long* experts, const float* weights, int T, long long rows,
                           long long columns, float* sums) {
  DYNAMIC_SHARED(float, memory);
  const Tile tile(memory);
  const long long column = tile.column + tile.across;
  float total[SIDE / STEP] = {};
  BASE::Value start[SIDE / STEP] = {};
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < SIDE / STEP; ++k) {
    const long long row = tile.row + tile.down + k * STEP;
    if (base && row < rows && column < columns) start[k] = BASE::at(base, row * columns + column);
  }
  for (int t = 0; t < T; ++t) {
    const void* expert = reinterpret_cast<const void*>(experts[t]);
    FREEMERGE_UNROLL(4)
    for (int k = 0; k < SIDE / STEP; ++k) {
      const long long row = tile.row + tile.down + k * STEP;
      if (row < rows && column < columns) total[k] += weights[t] * task_vector(EXPERT::at(expert, row * columns + column), start[k]);
    }
  }
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < SIDE / STEP; ++k) tile.put(tile.down + k * STEP, tile.across, total[k]);
  __syncthreads();
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < SIDE / STEP; ++k) {
    const long long row = tile.row + tile.across, line = tile.column + tile.down + k * STEP;
    if (row < rows && line < columns) sums[line * rows + row] = tile.get(tile.across, tile.down + k * STEP);
  }
}

// out[row][column] = round(base[row][column] + values[column][row])
extern "C" __global__ void __launch_bounds__(SIDE * STEP)
    high_pass_transpose_out(const float* values, const void* base, long long rows, long long columns, void* out) {
  DYNAMIC_SHARED(float, memory);
  const Tile tile(memory);
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < SIDE / STEP; ++k) {
    const long long row = tile.row + tile.across, line = tile.column + tile.down + k * STEP;
    if (row < rows && line < columns) tile.put(tile.across, tile.down + k * STEP, values[line * rows + row]);
  }
  __syncthreads();
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < SIDE / STEP; ++k) {
    const long long row = tile.row + tile.down + k * STEP, column = tile.column + tile.across;
    if (row >= rows || column >= columns) continue;
    const float value = tile.get(tile.down + k * STEP, tile.across);
    const long long at = row * columns + column;
    if (base)
      OUT::put(out, at, BASE::at(base, at) + value);
    else
      OUT::put(out, at, value);
  }
}
