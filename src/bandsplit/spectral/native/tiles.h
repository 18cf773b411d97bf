// The CUDA kernels of fn.spectral_split, apart from DALI so that a test can run them where there is no GPU.

#ifndef BANDSPLIT_NATIVE_TILES_H_
#define BANDSPLIT_NATIVE_TILES_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace bandsplit {

constexpr int kMostSamples = 4096;  ///< of a launch
constexpr int kFastBlock = 8;       ///< the largest block that SplitTiles takes
constexpr int kFastBands = kFastBlock * kFastBlock;

/// Images of one size, one after the other in memory.
struct Images {
  const uint8_t *pixels;  ///< (samples, height * block, width * block, channels)
  int height, width;      ///< in blocks
  uint32_t mirror[kMostSamples / 32];  ///< a bit each

  __device__ bool is_mirrored(unsigned sample) const { return mirror[sample / 32] >> (sample % 32) & 1; }
};

/// What one launch of SplitTiles works on: a tile is `tile_rows` rows of blocks of one image.
///
/// It travels as the argument of the kernel, which the GPU holds in constant memory: nothing is copied or allocated for
/// a launch, and the entries of the matrices are operands of instructions.
struct Tiles {
  Images images;
  int tile_rows;
  uint64_t inverse_width;  ///< floor(2^32 / width) + 1, to divide by the width in one product
  bool channels_last;
  float scale[3], shift[3];
  float vertical[kFastBands], horizontal[kFastBands];  ///< see Factors
  const float *matrix;                                 ///< (N, N), for what is no Kronecker product

  // In shared memory lie the tile's pixels and, from `outputs_start` on, its part of each output just as it is written.
  unsigned outputs_start;  ///< in bytes
  int groups;
  void *outputs[kFastBands];       ///< one a group: (samples, height, width, channels) or (samples, channels, …)
  unsigned start[kFastBands];      ///< of each group in shared memory, in numbers from outputs_start
  int channels[kFastBands];        ///< of each group
  int16_t group_of[kFastBands];    ///< of each band, or -1
  int16_t channel_of[kFastBands];  ///< in its group, of color 0
};
static_assert(sizeof(Tiles) <= 4096, "the limit of a kernel's arguments");

/// How SplitTiles is launched: over (tiles, samples).
struct Launch {
  unsigned tiles, threads;
  size_t shared_bytes;
};

/// Fills in what follows from the images and from the bands of each group, none of them twice: the size of a tile and
/// where its outputs lie in shared memory. Nothing where a row of blocks does not fit there.
inline std::optional<Launch> PlaceTiles(Tiles &tiles, int block, const std::vector<std::vector<int>> &groups,
                                        size_t number_bytes) {
  constexpr size_t kSharedBytes = 48 * 1024;  // what every GPU gives a kernel without asking
  constexpr size_t kTileBytes = 32 * 1024;    // more tiles at once hide the wait for memory better than larger ones
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
  rows = (height + count - 1) / count;  // equal tiles

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
  // As few threads as do the items of a tile in equal turns.
  const size_t items = rows * width * 3, turns = (items + kMostThreads - 1) / kMostThreads;
  return Launch{unsigned((height + rows - 1) / rows), unsigned(round_up((items + turns - 1) / turns, 32)),
                shared_bytes(rows)};
}

template <typename Word>
__device__ void CopyWords(void *to, const void *from, unsigned bytes, unsigned index, unsigned team) {
  for (unsigned i = index; i < bytes / sizeof(Word); i += team)
    static_cast<Word *>(to)[i] = static_cast<const Word *>(from)[i];
}

/// Member `index` of a team's part of a copy, in the widest words that the addresses and the length allow.
__device__ inline void CopyTogether(void *to, const void *from, unsigned bytes, unsigned index, unsigned team) {
  const auto odd = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (odd % 16 == 0) CopyWords<uint4>(to, from, bytes, index, team);
  else if (odd % 4 == 0) CopyWords<uint32_t>(to, from, bytes, index, team);
  else if (odd % 2 == 0) CopyWords<uint16_t>(to, from, bytes, index, team);
  else CopyWords<uint8_t>(to, from, bytes, index, team);
}

/// RGB images: blockIdx.y is the sample, blockIdx.x the tile.
///
/// Three steps with shared memory between them, because reading and writing want neighboring threads at neighboring
/// addresses and whole words, and the arithmetic wants all pixels of a block in one thread.
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

  // 1. The pixels.
  CopyTogether(pixels, images.pixels + (size_t(sample) * height + first) * kBlock * row_bytes,
               places * (kBlock * kBlock * 3), thread, threads);
  __syncthreads();

  // 2. The coefficients: one color of one block at a time.
  const unsigned color_step = tiles.channels_last ? 1 : places;
  for (unsigned item = thread; item < places * 3; item += threads) {
    const unsigned place = item / 3, color = item % 3;
    const unsigned row = uint64_t(place) * tiles.inverse_width >> 32, column = place - row * width;
    const float scale = tiles.scale[color], shift = tiles.shift[color];
    // A mirrored image is read from its right end.
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

  // 3. The outputs: where there are many, each warp writes some of them.
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

/// What one launch of SplitAny works on: all numbers of one output.
struct Numbers {
  Images images;
  int samples, block, channels;
  bool channels_last;
  const float *scale, *shift;  ///< one a color channel
  const float *matrix;         ///< (N, N)
  const int *bands;            ///< of the output
  int band_count;
  void *output;
};

/// Any block, number of channels and list of bands: one number a thread, straight from the images.
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
