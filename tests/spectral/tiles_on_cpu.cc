// The kernels of native/tiles.h on the CPU: every CUDA thread of a block is a coroutine, and __syncthreads lets the
// others continue. For test_tiles.py, which compiles this and calls `split`.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __shared__

struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x, y;
};

static Index blockIdx, blockDim, gridDim, threadIdx;
using std::min;
template <typename T>
T __ldg(const T *from) {
  return *from;
}

namespace {

constexpr size_t kStack = 64 * 1024;
std::vector<ucontext_t> threads;
ucontext_t scheduler;
std::function<void()> body;
std::vector<bool> finished;

void Enter() {
  body();
  finished[threadIdx.x] = true;
  swapcontext(&threads[threadIdx.x], &scheduler);
}

/// Each round takes every thread to its next __syncthreads or to its end.
void RunBlock(unsigned count) {
  static std::vector<char> stacks;
  stacks.resize(count * kStack);
  threads.assign(count, {});
  finished.assign(count, false);
  for (unsigned i = 0; i < count; i++) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = &stacks[i * kStack];
    threads[i].uc_stack.ss_size = kStack;
    makecontext(&threads[i], Enter, 0);
  }
  while (!std::all_of(finished.begin(), finished.end(), [](bool f) { return f; })) {
    for (threadIdx.x = 0; threadIdx.x < count; threadIdx.x++)
      if (!finished[threadIdx.x]) swapcontext(&scheduler, &threads[threadIdx.x]);
  }
}

}  // namespace

void __syncthreads() { swapcontext(&threads[threadIdx.x], &scheduler); }

namespace bandsplit {
alignas(16) uint4 shared[48 * 1024 / sizeof(uint4)];
}

#include "tiles.h"

namespace {

template <int kBlock>
void RunTiles(const bandsplit::Tiles &tiles, bool is_product) {
  if (is_product)
    bandsplit::SplitTiles<kBlock, true, float>(tiles);
  else
    bandsplit::SplitTiles<kBlock, false, float>(tiles);
}

}  // namespace

/// Returns 1 where SplitTiles ran, 0 where a row does not fit, -1 where it wrote past the shared memory it asked for.
/// `sizes`: bands per group, `bands`: their numbers, concatenated; `factors` is null if the matrix is not a product.
extern "C" int split(const uint8_t *pixels, int samples, int height, int width, int block, const uint8_t *mirror,
                     const float *scale, const float *shift, const float *matrix, const float *factors, int groups,
                     const int *sizes, const int *bands, int channels_last, void **outputs) {
  bandsplit::Tiles tiles{};
  tiles.images = {pixels, height, width, {}};
  for (int i = 0; i < samples; i++) tiles.images.mirror[i / 32] |= uint32_t(mirror[i]) << (i % 32);
  tiles.channels_last = channels_last;
  std::copy_n(scale, 3, tiles.scale);
  std::copy_n(shift, 3, tiles.shift);
  tiles.matrix = matrix;
  if (factors) {
    std::copy_n(factors, block * block, tiles.vertical);
    std::copy_n(factors + block * block, block * block, tiles.horizontal);
  }
  std::vector<std::vector<int>> lists;
  for (int g = 0; g < groups; bands += sizes[g++]) {
    lists.emplace_back(bands, bands + sizes[g]);
    tiles.outputs[g] = outputs[g];
  }
  const auto launch = bandsplit::PlaceTiles(tiles, block, lists, sizeof(float));
  if (!launch) return 0;
  auto *memory = reinterpret_cast<uint8_t *>(bandsplit::shared);
  std::memset(memory, 0xff, sizeof(bandsplit::shared));
  body = [&] {
    switch (block) {
      case 1: return RunTiles<1>(tiles, factors);
      case 2: return RunTiles<2>(tiles, factors);
      case 4: return RunTiles<4>(tiles, factors);
      case 6: return RunTiles<6>(tiles, factors);
      case 8: return RunTiles<8>(tiles, factors);
    }
  };
  blockDim = {launch->threads, 1};
  gridDim = {launch->tiles, unsigned(samples)};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) RunBlock(launch->threads);
  const bool kept_within = std::all_of(memory + launch->shared_bytes, memory + sizeof(bandsplit::shared),
                                       [](uint8_t byte) { return byte == 0xff; });
  return kept_within ? 1 : -1;
}

/// SplitAny for one output.
extern "C" void split_any(const uint8_t *pixels, int samples, int height, int width, int block, int channels,
                          const uint8_t *mirror, const float *scale, const float *shift, const float *matrix,
                          int band_count, const int *bands, int channels_last, void *output) {
  bandsplit::Numbers numbers{};
  numbers.images = {pixels, height, width, {}};
  for (int i = 0; i < samples; i++) numbers.images.mirror[i / 32] |= uint32_t(mirror[i]) << (i % 32);
  numbers.samples = samples, numbers.block = block, numbers.channels = channels;
  numbers.channels_last = channels_last;
  numbers.scale = scale, numbers.shift = shift, numbers.matrix = matrix;
  numbers.bands = bands, numbers.band_count = band_count, numbers.output = output;
  body = [&] { bandsplit::SplitAny<float>(numbers); };
  blockDim = {32, 1}, gridDim = {3, 1}, blockIdx = {0, 0};
  for (; blockIdx.x < gridDim.x; blockIdx.x++) RunBlock(blockDim.x);
}
