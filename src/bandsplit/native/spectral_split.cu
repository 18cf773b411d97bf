// The CUDA kernel of fn.spectral_split.

#include "spectral_split.h"

#include <algorithm>

#include <cuda_runtime.h>

#include "dali/core/cuda_error.h"
#include "dali/core/float16.h"
#include "dali/kernels/dynamic_scratchpad.h"

namespace bandsplit {

namespace {

using ::dali::float16;

// A tile is up to 64 blocks side by side; 192 = 64 blocks x 3 colours is one thread for each block and colour.
constexpr int kTileBlocks = 64;
constexpr int kThreads = 192;
// What every GPU gives a kernel without asking.
constexpr int kSharedBytes = 48 * 1024;

/// One picture of the batch, in device memory.
struct Picture {
  const uint8_t *pixels;  ///< (height * block, width * block, channels)
  int height, width;      ///< in blocks
  bool mirror;
};

/// A batch, its outputs and the plan; all pointers to device memory.
struct Batch {
  const Picture *pictures;  ///< one a sample
  void *const *outputs;     ///< (samples, groups)
  const int *group_starts;  ///< (groups + 1): where each group's entries in group_rows start
  const int *group_rows;    ///< the rows of all groups, one group after the other
  const float *rows;        ///< (row_count, N + 1)
  const float *mean, *inverse_std;
  int groups, row_count, channels, block, tile_blocks;
  bool channels_last;
};

/// Shared memory of a tile: its coefficients (row_count, tile_blocks * channels) as floats, then its pixels as bytes.
__host__ __device__ inline int CoefficientFloats(const Batch &batch) {
  return batch.row_count * batch.tile_blocks * batch.channels;
}
__host__ __device__ inline int PixelBytes(const Batch &batch) {
  return batch.block * batch.block * batch.tile_blocks * batch.channels;
}

/// The whole batch and all bands in one launch: blockIdx.y is the sample, blockIdx.x the tile in it, row by row.
///
/// Three steps with shared memory between them, because reading and writing want neighbouring threads at neighbouring
/// addresses and the arithmetic wants all pixels of a block in one thread.
/// kBlock: side of a block, known to the compiler so that the pixels stay in registers; 0: batch.block, any.
template <int kBlock, typename Out>
__global__ void __launch_bounds__(kThreads) SplitTiles(const Batch batch) {
  extern __shared__ float shared[];
  float *const coefficients = shared;
  uint8_t *const pixels = reinterpret_cast<uint8_t *>(shared + CoefficientFloats(batch));

  const Picture picture = batch.pictures[blockIdx.y];
  const int tiles_across = (picture.width + batch.tile_blocks - 1) / batch.tile_blocks;
  // Samples differ in size and the grid is as wide as the largest needs. The same for all threads of a tile.
  if (blockIdx.x >= static_cast<unsigned>(tiles_across * picture.height)) return;
  const int y = blockIdx.x / tiles_across;
  const int first = blockIdx.x % tiles_across * batch.tile_blocks;
  const int count = min(batch.tile_blocks, picture.width - first);

  const int block = kBlock ? kBlock : batch.block;
  const int block_pixels = block * block;
  const int channels = batch.channels;
  const int items = count * channels;        // an item is one colour of one block
  const int row_bytes = count * block * channels;  // of the tile

  // 1. The pixels of the tile. A mirrored picture shows the blocks first..first+count of its far end.
  {
    const size_t picture_row_bytes = size_t(picture.width) * block * channels;
    const int start = picture.mirror ? picture.width - first - count : first;
    const uint8_t *from = picture.pixels + size_t(y) * block * picture_row_bytes + size_t(start) * block * channels;
    for (int r = 0; r < block; r++)
      for (int i = threadIdx.x; i < row_bytes; i += blockDim.x)
        pixels[r * row_bytes + i] = from[r * picture_row_bytes + i];
  }
  __syncthreads();

  // 2. The coefficients: (Σ_n rows[k][n] x_n + rows[k][N] mean) / std, see Plan.
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int c = item % channels, j = item / channels;
    const float mean = batch.mean[c], inverse_std = batch.inverse_std[c];
    // Pixel (r, s) of block j; in a mirrored picture, columns count from the right.
    const int origin = picture.mirror ? (row_bytes - (j * block + 1) * channels) + c : j * block * channels + c;
    const int step = picture.mirror ? -channels : channels;
    const auto pixel = [&](int r, int s) { return static_cast<float>(pixels[r * row_bytes + origin + s * step]); };
    const float *row = batch.rows;
    if constexpr (kBlock != 0) {
      float x[kBlock * kBlock];
#pragma unroll
      for (int n = 0; n < kBlock * kBlock; n++) x[n] = pixel(n / kBlock, n % kBlock);
      for (int k = 0; k < batch.row_count; k++, row += kBlock * kBlock + 1) {
        float sum = __ldg(row + kBlock * kBlock) * mean;
#pragma unroll
        for (int n = 0; n < kBlock * kBlock; n++) sum += __ldg(row + n) * x[n];
        coefficients[k * items + item] = sum * inverse_std;
      }
    } else {
      for (int k = 0; k < batch.row_count; k++, row += block_pixels + 1) {
        float sum = __ldg(row + block_pixels) * mean;
        for (int r = 0; r < block; r++)
          for (int s = 0; s < block; s++) sum += __ldg(row + r * block + s) * pixel(r, s);
        coefficients[k * items + item] = sum * inverse_std;
      }
    }
  }
  __syncthreads();

  // 3. The outputs. Channel i * C + c of a group is colour c of its i-th row.
  for (int g = 0; g < batch.groups; g++) {
    const int *rows = batch.group_rows + batch.group_starts[g];
    const int stacked = (batch.group_starts[g + 1] - batch.group_starts[g]) * channels;
    Out *output = static_cast<Out *>(batch.outputs[blockIdx.y * batch.groups + g]);
    if (batch.channels_last) {
      output += (size_t(y) * picture.width + first) * stacked;
      for (int e = threadIdx.x; e < count * stacked; e += blockDim.x) {
        const int j = e / stacked, channel = e % stacked;
        output[e] = Out(coefficients[rows[channel / channels] * items + j * channels + channel % channels]);
      }
    } else {
      output += size_t(y) * picture.width + first;
      const size_t plane = size_t(picture.height) * picture.width;
      for (int e = threadIdx.x; e < count * stacked; e += blockDim.x) {
        const int channel = e / count, j = e % count;
        output[channel * plane + j] =
            Out(coefficients[rows[channel / channels] * items + j * channels + channel % channels]);
      }
    }
  }
}

template <typename Out>
void Launch(const Batch &batch, int samples, int tiles, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const size_t bytes = CoefficientFloats(batch) * sizeof(float) + PixelBytes(batch);
    kernel<<<dim3(tiles, samples), kThreads, bytes, stream>>>(batch);
    CUDA_CALL(cudaGetLastError());
  };
  switch (batch.block) {
    case 1: return launch(SplitTiles<1, Out>);
    case 2: return launch(SplitTiles<2, Out>);
    case 4: return launch(SplitTiles<4, Out>);
    case 6: return launch(SplitTiles<6, Out>);
    default: return launch(SplitTiles<0, Out>);
  }
}

}  // namespace

class SpectralSplitGPU : public SpectralSplit<::dali::GPUBackend> {
 public:
  explicit SpectralSplitGPU(const ::dali::OpSpec &spec) : SpectralSplit(spec) {
    const int bytes = plan_.channels() * (plan_.row_count() * int(sizeof(float)) + plan_.pixels);
    most_tile_blocks_ = std::min(kTileBlocks, kSharedBytes / bytes);
    Require(most_tile_blocks_ >= 1, "block = ", plan_.block, " with ", plan_.channels(), " channels needs ", bytes,
            " bytes a block of pixels: the GPU kernel has ", kSharedBytes);
    group_starts_.push_back(0);
    for (const auto &group : plan_.groups) {
      group_rows_.insert(group_rows_.end(), group.begin(), group.end());
      group_starts_.push_back(static_cast<int>(group_rows_.size()));
    }
  }

 protected:
  void RunImpl(::dali::Workspace &ws) override {
    SetOutputLayouts(ws);
    const auto &input = ws.Input<::dali::GPUBackend>(0);
    const int samples = input.num_samples(), groups = ws.NumOutput();
    if (samples == 0) return;
    // the limit of a CUDA grid in y
    Require(samples <= 65535, "a batch of ", samples, ": the GPU kernel takes up to 65535 samples");

    const std::vector<int> mirror = Mirror(ws, samples);
    std::vector<Picture> pictures(samples);
    std::vector<void *> outputs;
    int widest = 0;
    for (int i = 0; i < samples; i++) {
      const auto side = input.tensor_shape_span(i);
      pictures[i] = {input.tensor<uint8_t>(i), int(side[0]) / plan_.block, int(side[1]) / plan_.block, mirror[i] != 0};
      widest = std::max(widest, pictures[i].width);
      for (int g = 0; g < groups; g++) outputs.push_back(ws.Output<::dali::GPUBackend>(g).raw_mutable_tensor(i));
    }
    if (widest == 0) return;
    // Equal tiles: 112 blocks are 2 x 56, not 64 + 48.
    const int across = (widest + most_tile_blocks_ - 1) / most_tile_blocks_;
    const int tile_blocks = (widest + across - 1) / across;
    int tiles = 0;
    for (const Picture &picture : pictures)
      tiles = std::max(tiles, (picture.width + tile_blocks - 1) / tile_blocks * picture.height);
    if (tiles == 0) return;

    // One copy brings everything. ToContiguousGPU copies from pinned memory of its own, and it and the scratchpad give
    // their memory back in the order of the stream: the kernel may still be waiting when this function returns.
    ::dali::kernels::DynamicScratchpad scratchpad(ws.stream());
    const auto [d_pictures, d_outputs, d_starts, d_rows, d_matrix, d_mean, d_inverse_std] =
        scratchpad.ToContiguousGPU(ws.stream(), pictures, outputs, group_starts_, group_rows_, plan_.rows, plan_.mean,
                                   plan_.inverse_std);
    const Batch batch{d_pictures, d_outputs, d_starts, d_rows, d_matrix, d_mean, d_inverse_std, groups,
                      plan_.row_count(), plan_.channels(), plan_.block, tile_blocks, plan_.channels_last};
    if (plan_.dtype == DALI_FLOAT)
      Launch<float>(batch, samples, tiles, ws.stream());
    else
      Launch<float16>(batch, samples, tiles, ws.stream());
  }

 private:
  int most_tile_blocks_;
  std::vector<int> group_starts_, group_rows_;
};

DALI_REGISTER_OPERATOR(SpectralSplit, SpectralSplitGPU, ::dali::GPU);

}  // namespace bandsplit
