// The CUDA kernels of fn.spectral_split. They include nothing from DALI, so a test can run them on the CPU.
//
// SplitTiles is the fast kernel: RGB, a block of up to 8 known at compile time, each band in at most one output per
// launch. SplitAny covers all other cases.

#ifndef BANDSPLIT_NATIVE_TILES_H_
#define BANDSPLIT_NATIVE_TILES_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace bandsplit {

constexpr int kMostSamples = 4096;  ///< largest number of samples per launch
constexpr int kFastBlock = 8;       ///< largest block that SplitTiles supports
constexpr int kFastBands = kFastBlock * kFastBlock;

/// Images of one size, contiguous in device memory.
struct Images {
  const uint8_t *pixels;  ///< (samples, height * block, width * block, channels)
  int height, width;      ///< in blocks
  uint32_t mirror[kMostSamples / 32];  ///< one bit per sample: flip horizontally

  __device__ bool is_mirrored(unsigned sample) const { return mirror[sample / 32] >> (sample % 32) & 1; }
};

/// The argument of SplitTiles. A tile is `tile_rows` rows of blocks of one image; one thread block computes one tile.
///
/// It is passed by value, so it is in constant memory: a launch needs no allocation or copy, and instructions can read
/// matrix entries as operands.
struct Tiles {
  Images images;
  int tile_rows;
  uint64_t inverse_width;    ///< floor(2^32 / width) + 1: division by the width becomes a product and a shift
  bool channels_last;        ///< outputs are HWC, otherwise CHW
  float scale[3], shift[3];  ///< per color: a normalized pixel is x * scale + shift
  float vertical[kFastBands], horizontal[kFastBands];  ///< see Factors; used if the matrix is separable
  const float *matrix;                                 ///< (N, N) in device memory; used otherwise

  // Shared memory holds the tile's pixels and, from `outputs_start` on, its part of each group's output, contiguous and
  // in the output's layout.
  unsigned outputs_start;  ///< in bytes, a multiple of 16
  int groups;
  void *outputs[kFastBands];       ///< per group: (samples, height, width, channels), or CHW
  unsigned start[kFastBands];      ///< per group: its first element in shared memory, counted from outputs_start
  int channels[kFastBands];        ///< per group
  int16_t group_of[kFastBands];    ///< per band: its group, or -1
  int16_t channel_of[kFastBands];  ///< per band: its channel of color 0 within the group
};
static_assert(sizeof(Tiles) <= 4096, "kernel arguments are limited to 4 KiB");

/// The launch configuration of SplitTiles: grid (tiles, samples), `threads` threads per thread block.
struct Launch {
  unsigned tiles, threads;
  size_t shared_bytes;
};

/// Chooses the size of a tile and lays out its outputs in shared memory.
///
/// Reads tiles.images; sets tile_rows, inverse_width, outputs_start, groups, start, channels, group_of and channel_of.
/// `groups` lists the bands of each group; no band may occur twice. `number_bytes` is the size of an output element.
/// Returns nullopt if a single row of blocks does not fit into shared memory.
inline std::optional<Launch> PlaceTiles(Tiles &tiles, int block, const std::vector<std::vector<int>> &groups,
                                        size_t number_bytes) {
  constexpr size_t kSharedBytes = 48 * 1024;  // available to every kernel without opting in
  constexpr size_t kTileBytes = 32 * 1024;    // more resident thread blocks hide latency better than larger tiles
  constexpr size_t kMostThreads = 256;
  const auto round_up = [](size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; };
  const size_t height = tiles.images.height, width = tiles.images.width;
  const auto outputs_start = [&](size_t rows) { return round_up(rows * width * 3 * block * block, 16); };
  const auto group_bytes = [&](size_t rows, size_t bands) {
    return round_up(rows * width * 3 * bands * number_bytes, 16);
  };
  const auto shared_bytes = [&](size_t rows) {
    size_t bytes = outputs_start(rows);
    for (const auto &bands : groups) bytes += group_bytes(rows, bands.size());
    return bytes;
  };
  if (shared_bytes(1) > kSharedBytes) return std::nullopt;
  size_t rows = 1;
  while (rows < height && shared_bytes(rows + 1) <= kTileBytes) rows++;
  const size_t count = (height + rows - 1) / rows;
  rows = (height + count - 1) / count;  // tiles of nearly equal size

  tiles.tile_rows = int(rows);
  tiles.inverse_width = (uint64_t{1} << 32) / width + 1;
  tiles.outputs_start = unsigned(outputs_start(rows));
  tiles.groups = int(groups.size());
  for (auto &group : tiles.group_of) group = -1;
  size_t start = 0;
  for (size_t g = 0; g < groups.size(); g++) {
    tiles.start[g] = unsigned(start / number_bytes);
    tiles.channels[g] = 3 * int(groups[g].size());
    start += group_bytes(rows, groups[g].size());
    for (size_t i = 0; i < groups[g].size(); i++) {
      tiles.group_of[groups[g][i]] = int16_t(g);
      tiles.channel_of[groups[g][i]] = int16_t(3 * i);
    }
  }
  // The fewest threads, in whole warps, that still process a tile in the same number of iterations as kMostThreads.
  const size_t items = rows * width * 3, turns = (items + kMostThreads - 1) / kMostThreads;
  return Launch{unsigned((height + rows - 1) / rows), unsigned(round_up((items + turns - 1) / turns, 32)),
                shared_bytes(rows)};
}

/// Thread `index` of `team` copies every team-th word. `to`, `from` and `bytes` must be multiples of sizeof(Word).
template <typename Word>
__device__ void CopyWords(void *to, const void *from, unsigned bytes, unsigned index, unsigned team) {
  for (unsigned i = index; i < bytes / sizeof(Word); i += team)
    static_cast<Word *>(to)[i] = static_cast<const Word *>(from)[i];
}

/// Copies `bytes` bytes with `team` threads, each of which calls this with its `index`; the buffers must not overlap.
/// Any alignment works; copies 16 bytes at a time if both addresses and the length are multiples of 16, otherwise 4, 2
/// or 1.
__device__ inline void CopyTogether(void *to, const void *from, unsigned bytes, unsigned index, unsigned team) {
  const auto odd = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (odd % 16 == 0) CopyWords<uint4>(to, from, bytes, index, team);
  else if (odd % 4 == 0) CopyWords<uint32_t>(to, from, bytes, index, team);
  else if (odd % 2 == 0) CopyWords<uint16_t>(to, from, bytes, index, team);
  else CopyWords<uint8_t>(to, from, bytes, index, team);
}

/// Splits RGB images; blockIdx.x is the tile, blockIdx.y the sample. kIsProduct: the matrix is separable.
///
/// Goes through shared memory so that global reads and writes are coalesced and in wide words, although each thread
/// computes with all pixels of a block.
template <int kBlock, bool kIsProduct, typename Out>
__global__ void SplitTiles(const __grid_constant__ Tiles tiles) {
  extern __shared__ uint4 shared[];
  uint8_t *const pixels = reinterpret_cast<uint8_t *>(shared);
  Out *const outputs = reinterpret_cast<Out *>(pixels + tiles.outputs_start);
  const Images &images = tiles.images;
  const unsigned sample = blockIdx.y, thread = threadIdx.x, threads = blockDim.x;
  const unsigned width = images.width, height = images.height;
  const unsigned first = blockIdx.x * tiles.tile_rows;
  const unsigned places = min(unsigned(tiles.tile_rows), height - first) * width;
  const unsigned row_bytes = width * kBlock * 3;

  // 1. Copy the pixels to shared memory.
  CopyTogether(pixels, images.pixels + (size_t(sample) * height + first) * kBlock * row_bytes,
               places * (kBlock * kBlock * 3), thread, threads);
  __syncthreads();

  // 2. Compute the coefficients; each iteration handles one color of one block.
  const unsigned color_step = tiles.channels_last ? 1 : places;
  for (unsigned item = thread; item < places * 3; item += threads) {
    const unsigned place = item / 3, color = item % 3;
    const unsigned row = uint64_t(place) * tiles.inverse_width >> 32, column = place - row * width;
    const float scale = tiles.scale[color], shift = tiles.shift[color];
    // A mirrored image is read from right to left.
    const bool mirror = images.is_mirrored(sample);
    const uint8_t *corner = pixels + row * kBlock * row_bytes + (mirror ? row_bytes - 3 - column * kBlock * 3
                                                                        : column * kBlock * 3) + color;
    const int step = mirror ? -3 : 3;
    const auto pixel = [&](int r, int s) { return float(corner[r * int(row_bytes) + s * step]) * scale + shift; };
    const auto put = [&](int band, float value) {
      const int group = tiles.group_of[band], channel = tiles.channel_of[band];
      outputs[tiles.start[group] + place * (tiles.channels_last ? tiles.channels[group] : 1) +
              (channel + color) * color_step] = Out(value);
    };
    float x[kBlock * kBlock];
    if constexpr (kIsProduct) {
#pragma unroll
      for (int r = 0; r < kBlock; r++) {
        float line[kBlock];
#pragma unroll
        for (int s = 0; s < kBlock; s++) line[s] = pixel(r, s);
#pragma unroll
        for (int v = 0; v < kBlock; v++) {
          float sum = 0;
#pragma unroll
          for (int s = 0; s < kBlock; s++) sum += tiles.horizontal[v * kBlock + s] * line[s];
          x[r * kBlock + v] = sum;
        }
      }
#pragma unroll
      for (int band = 0; band < kBlock * kBlock; band++) {
        if (tiles.group_of[band] < 0) continue;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < kBlock; r++)
          sum += tiles.vertical[band / kBlock * kBlock + r] * x[r * kBlock + band % kBlock];
        put(band, sum);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kBlock * kBlock; n++) x[n] = pixel(n / kBlock, n % kBlock);
      for (int band = 0; band < kBlock * kBlock; band++) {
        if (tiles.group_of[band] < 0) continue;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kBlock * kBlock; n++) sum += __ldg(tiles.matrix + band * kBlock * kBlock + n) * x[n];
        put(band, sum);
      }
    }
  }
  __syncthreads();

  // 3. Copy to the outputs. With at least as many groups as warps, each warp copies whole groups by itself.
  constexpr unsigned kWarp = 32;
  const bool by_warp = tiles.groups >= int(threads / kWarp);
  const unsigned index = by_warp ? thread % kWarp : thread, team = by_warp ? kWarp : threads;
  for (int g = by_warp ? thread / kWarp : 0; g < tiles.groups; g += by_warp ? threads / kWarp : 1) {
    const size_t channels = tiles.channels[g], area = size_t(height) * width, at = size_t(first) * width;
    Out *to = static_cast<Out *>(tiles.outputs[g]) + sample * channels * area;
    const Out *from = outputs + tiles.start[g];
    if (tiles.channels_last) {
      CopyTogether(to + at * channels, from, places * channels * sizeof(Out), index, team);
    } else {
      for (unsigned c = 0; c < channels; c++)
        CopyTogether(to + c * area + at, from + c * places, places * sizeof(Out), index, team);
    }
  }
}

/// The argument of SplitAny, which computes one output. Pointers are to device memory.
struct Numbers {
  Images images;
  int samples, block, channels;
  bool channels_last;          ///< the output is HWC, otherwise CHW
  const float *scale, *shift;  ///< per color channel: a normalized pixel is x * scale + shift
  const float *matrix;         ///< (N, N), row-major
  const int *bands;            ///< the output's bands, (band_count)
  int band_count;
  void *output;  ///< (samples, height, width, band_count * channels), or CHW
};

/// Supports any block, number of channels and list of bands. Each thread computes one output element at a time directly
/// from global memory, in a grid-stride loop.
template <typename Out>
__global__ void SplitAny(const __grid_constant__ Numbers numbers) {
  const Images &images = numbers.images;
  const int block = numbers.block, channels = numbers.channels, pixels = block * block;
  const size_t width = images.width, height = images.height, stacked = size_t(numbers.band_count) * channels;
  const size_t of_sample = height * width * stacked, all = numbers.samples * of_sample;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += size_t(gridDim.x) * blockDim.x) {
    const size_t sample = i / of_sample, rest = i % of_sample;
    const size_t place = numbers.channels_last ? rest / stacked : rest % (height * width);
    const int channel = int(numbers.channels_last ? rest % stacked : rest / (height * width));
    const int color = channel % channels;
    const float *weights = numbers.matrix + size_t(numbers.bands[channel / channels]) * pixels;
    const float scale = numbers.scale[color], shift = numbers.shift[color];
    const bool mirror = images.is_mirrored(unsigned(sample));
    const size_t y = (sample * height + place / width) * block, x = place % width * block;
    float sum = 0;
    for (int r = 0; r < block; r++) {
      for (int s = 0; s < block; s++) {
        const size_t column = mirror ? width * block - 1 - (x + s) : x + s;
        const uint8_t pixel = images.pixels[((y + r) * width * block + column) * channels + color];
        sum += weights[r * block + s] * (float(pixel) * scale + shift);
      }
    }
    static_cast<Out *>(numbers.output)[i] = Out(sum);
  }
}

}  // namespace bandsplit

#endif  // BANDSPLIT_NATIVE_TILES_H_
