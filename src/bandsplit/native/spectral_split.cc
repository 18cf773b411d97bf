// The schema of fn.spectral_split and its CPU kernel.

#include "spectral_split.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "dali/core/float16.h"
#include "dali/pipeline/util/thread_pool.h"

namespace bandsplit {

using ::dali::float16;

DALI_SCHEMA(SpectralSplit)
    .DocStr(R"(Splits pictures into spectral sub-bands.

Each ``block`` x ``block`` square of pixels is turned into N = ``block``² coefficients by a matrix; coefficient k of
every square, kept at its place, is band k. One pass mirrors, normalises to (x - mean) / std, transforms, and writes
each group of bands as one output in the asked layout and type. Channel i * C + c of an output is colour c of the
group's i-th band.)")
    .NumInput(1)
    .InputLayout(0, "HWC")
    .InputDox(0, "pictures", "TensorList of UINT8", "Height and width are multiples of ``block``.")
    .OutputFn([](const ::dali::OpSpec &spec) { return static_cast<int>(GroupsOf(spec).size()); })
    .AddOptionalArg("block", "Side of the square of pixels.", 2)
    .AddArg("matrix", "The transform, N x N, row by row: row k weighs the pixels of a square for band k.",
            DALI_FLOAT_VEC)
    .AddOptionalArg("mean", "What is subtracted from each colour channel, in units of the pixel values.",
                    std::vector<float>{0, 0, 0})
    .AddOptionalArg("std", "What each colour channel is then divided by.", std::vector<float>{1, 1, 1})
    .AddOptionalArg("mirror", "Not 0 flips the picture left to right, before everything else.", 0, true)
    .AddOptionalArg("groups", "The bands of all groups, one group after the other; by default each band is a group.",
                    std::vector<int>{})
    .AddOptionalArg("group_sizes", "How many entries of ``groups`` belong to each group.", std::vector<int>{})
    .AddOptionalTypeArg("dtype", "FLOAT or FLOAT16.", DALI_FLOAT)
    .AddOptionalArg("output_layout", "\"HWC\" or \"CHW\".", ::dali::TensorLayout("HWC"));

namespace {

// A vector register of floats (GCC's vector extension: operators act on every lane).
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

// The sums that one turn of the inner loop holds in registers: 4 bands x 2 vectors.
constexpr int kBandsAtOnce = 4;
constexpr int kFloatsAtOnce = 2 * kLanes;

int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Memory for rows of floats that starts at a cache line.
class Scratch {
 public:
  float *Floats(size_t count) {
    lines_.resize((count + kFloatsPerLine - 1) / kFloatsPerLine);
    return lines_.empty() ? nullptr : lines_[0].floats;
  }

 private:
  static constexpr int kFloatsPerLine = 16;
  struct alignas(64) Line {
    float floats[kFloatsPerLine];
  };
  std::vector<Line> lines_;
};

/// One picture of the batch.
struct Picture {
  const uint8_t *pixels;  ///< (height * block, width * block, channels)
  int height, width;      ///< in blocks
  bool mirror;
  std::vector<void *> outputs;  ///< one a group
};

void Store(float *to, Lanes values) { *reinterpret_cast<Lanes *>(to) = values; }

void Store(float16 *to, Lanes values) {
#ifdef __F16C__
  // One instruction for 8 floats, where dali::float16 converts one at a time in software. The bits are the same.
  for (int lane = 0; lane < kLanes; lane += 8) {
    __m256 eight;
    std::memcpy(&eight, reinterpret_cast<const char *>(&values) + lane * sizeof(float), sizeof(eight));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + lane), _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int lane = 0; lane < kLanes; lane++) to[lane] = float16(values[lane]);
#endif
}

}  // namespace

class SpectralSplitCPU : public SpectralSplit<::dali::CPUBackend> {
 public:
  explicit SpectralSplitCPU(const ::dali::OpSpec &spec) : SpectralSplit(spec), rows_(PackRows(plan_)) {}

 protected:
  void RunImpl(::dali::Workspace &ws) override {
    SetOutputLayouts(ws);
    const std::vector<Picture> pictures = Pictures(ws);
    if (pictures.empty()) return;
    auto &pool = ws.GetThreadPool();
    scratch_.resize(pool.NumThreads());
    // A few tasks a thread: enough to level the load, few enough that queueing costs nothing.
    const int batch = static_cast<int>(pictures.size());
    const int parts = std::max(1, 4 * pool.NumThreads() / batch);
    for (const Picture &picture : pictures) {
      for (int part = 0; part < parts; part++) {
        const int first = picture.height * part / parts, last = picture.height * (part + 1) / parts;
        if (first < last)
          pool.AddWork([this, &picture, first, last](int thread) { SplitRows(picture, first, last, scratch_[thread]); },
                       last - first);
      }
    }
    pool.RunAll();
  }

 private:
  std::vector<Picture> Pictures(::dali::Workspace &ws) const {
    const auto &input = ws.Input<::dali::CPUBackend>(0);
    const int batch = input.num_samples();
    if (batch == 0) return {};
    const std::vector<int> mirror = Mirror(ws, batch);
    std::vector<Picture> pictures(batch);
    for (int i = 0; i < batch; i++) {
      const auto side = input.tensor_shape_span(i);
      const int height = int(side[0]) / plan_.block, width = int(side[1]) / plan_.block;
      pictures[i] = {input.tensor<uint8_t>(i), height, width, mirror[i] != 0, {}};
      for (int g = 0; g < ws.NumOutput(); g++)
        pictures[i].outputs.push_back(ws.Output<::dali::CPUBackend>(g).raw_mutable_tensor(i));
    }
    return pictures;
  }

  /// The rows of the plan as the inner loop reads them: (row_count / 4, N + 1, 4), filled up with rows of zeros.
  static std::vector<float> PackRows(const Plan &plan) {
    const int columns = plan.pixels + 1;
    std::vector<float> packed(size_t(RoundUp(plan.row_count(), kBandsAtOnce)) * columns);
    for (int k = 0; k < plan.row_count(); k++)
      for (int n = 0; n < columns; n++)
        packed[(size_t(k / kBandsAtOnce) * columns + n) * kBandsAtOnce + k % kBandsAtOnce] = plan.rows[k * columns + n];
    return packed;
  }

  void SplitRows(const Picture &picture, int first, int last, Scratch &scratch) const {
    if (plan_.dtype == DALI_FLOAT)
      SplitRowsTo<float>(picture, first, last, scratch);
    else
      SplitRowsTo<float16>(picture, first, last, scratch);
  }

  /// Rows first..last of blocks, each in three steps: pixels to planes, planes to bands, bands to outputs.
  ///
  /// Plane n holds pixel n of every block of the row, all colours, so that one vector instruction works on many
  /// blocks; its order is that of the output: block by block with the colours together (HWC), or colour by colour.
  template <typename Out>
  void SplitRowsTo(const Picture &picture, int first, int last, Scratch &scratch) const {
    const int pixels = plan_.pixels, channels = plan_.channels();
    const int stride = RoundUp(picture.width * channels, kFloatsAtOnce) + kFloatsAtOnce;  // room for a pixel too wide
    const size_t bands_floats = size_t(RoundUp(plan_.row_count(), kBandsAtOnce)) * stride;
    const size_t tile_floats = size_t(pixels + 1) * kFloatsAtOnce;
    float *mean = scratch.Floats(2 * stride + tile_floats + bands_floats + size_t(pixels) * stride / sizeof(float));
    float *scale = mean + stride, *tile = scale + stride;
    Out *bands = reinterpret_cast<Out *>(tile + tile_floats);
    uint8_t *planes = reinterpret_cast<uint8_t *>(tile + tile_floats + bands_floats);
    for (int j = 0; j < picture.width; j++) {
      for (int c = 0; c < channels; c++) {
        const int at = plan_.channels_last ? j * channels + c : c * picture.width + j;
        mean[at] = plan_.mean[c];
        scale[at] = plan_.inverse_std[c];
      }
    }
    for (int y = first; y < last; y++) {
      PixelsToPlanes(picture, y, planes, stride);
      for (int at = 0; at < picture.width * channels; at += kFloatsAtOnce) {
        LoadTile(planes + at, stride, mean + at, tile);
        TileToBands(tile, scale + at, bands + at, stride);
      }
      for (size_t g = 0; g < plan_.groups.size(); g++)
        BandsToOutput(bands, stride, plan_.groups[g], picture, y, static_cast<Out *>(picture.outputs[g]));
    }
  }

  void PixelsToPlanes(const Picture &picture, int y, uint8_t *planes, int stride) const {
    const int block = plan_.block, channels = plan_.channels();
    const int row_bytes = picture.width * block * channels;
    // A mirrored picture is read from its right end.
    const int step = picture.mirror ? -block * channels : block * channels;
    for (int r = 0; r < block; r++) {
      const uint8_t *row = picture.pixels + size_t(y * block + r) * row_bytes;
      for (int s = 0; s < block; s++) {
        const uint8_t *from = picture.mirror ? row + row_bytes - (s + 1) * channels : row + s * channels;
        uint8_t *plane = planes + size_t(r * block + s) * stride;
        if (!plan_.channels_last) {
          for (int c = 0; c < channels; c++)
            for (int j = 0; j < picture.width; j++) plane[c * picture.width + j] = from[j * step + c];
        } else if (channels == 3) {
          CopyPixels(from, step, picture.width, picture.mirror, plane);
        } else {
          for (int j = 0; j < picture.width; j++, from += step)
            for (int c = 0; c < channels; c++) plane[j * channels + c] = from[c];
        }
      }
    }
  }

  /// RGB pixels `step` bytes apart to one after the other. Four bytes move at once, the fourth to be overwritten by the
  /// next pixel; the pixel at the highest address moves alone, since what follows it may not be ours to read.
  static void CopyPixels(const uint8_t *from, int step, int count, bool backwards, uint8_t *to) {
    if (count == 0) return;
    const int alone = backwards ? 0 : count - 1;
    for (int j = backwards ? 1 : 0; j < (backwards ? count : count - 1); j++)
      std::memcpy(to + 3 * j, from + ptrdiff_t(j) * step, 4);
    std::memcpy(to + 3 * alone, from + ptrdiff_t(alone) * step, 3);
  }

  /// A tile: pixel n of kFloatsAtOnce places as floats, (N + 1, kFloatsAtOnce), the mean as the last row.
  void LoadTile(const uint8_t *planes, int stride, const float *mean, float *tile) const {
    for (int n = 0; n < plan_.pixels; n++, planes += stride, tile += kFloatsAtOnce)
      for (int i = 0; i < kFloatsAtOnce; i++) tile[i] = planes[i];
    std::copy_n(mean, kFloatsAtOnce, tile);
  }

  /// bands[k] = (Σ_n rows[k][n] tile[n]) * scale: a product of small matrices that stays in registers.
  template <typename Out>
  void TileToBands(const float *tile, const float *scale, Out *bands, int stride) const {
    const int columns = plan_.pixels + 1;
    const Lanes scale0 = Load(scale), scale1 = Load(scale + kLanes);
    const float *weights = rows_.data();
    for (int k = 0; k < plan_.row_count(); k += kBandsAtOnce) {
      Lanes sum0[kBandsAtOnce] = {}, sum1[kBandsAtOnce] = {};
      const float *pixels = tile;
      for (int n = 0; n < columns; n++, weights += kBandsAtOnce, pixels += kFloatsAtOnce) {
        const Lanes pixels0 = Load(pixels), pixels1 = Load(pixels + kLanes);
        for (int i = 0; i < kBandsAtOnce; i++) {
          sum0[i] += weights[i] * pixels0;
          sum1[i] += weights[i] * pixels1;
        }
      }
      for (int i = 0; i < kBandsAtOnce; i++) {
        Store(bands + size_t(k + i) * stride, sum0[i] * scale0);
        Store(bands + size_t(k + i) * stride + kLanes, sum1[i] * scale1);
      }
    }
  }

  static Lanes Load(const float *from) { return *reinterpret_cast<const Lanes *>(from); }

  /// Row y of one output, from the bands of its group.
  template <typename Out>
  void BandsToOutput(const Out *bands, int stride, const std::vector<int> &group, const Picture &picture, int y,
                     Out *output) const {
    const int channels = plan_.channels(), row_length = picture.width * channels;
    const int size = static_cast<int>(group.size());
    if (!plan_.channels_last) {
      for (int i = 0; i < size * channels; i++) {
        const Out *from = bands + size_t(group[i / channels]) * stride + (i % channels) * picture.width;
        std::copy_n(from, picture.width, output + (size_t(i) * picture.height + y) * picture.width);
      }
      return;
    }
    output += size_t(y) * row_length * size;
    if (size == 1) {
      std::copy_n(bands + size_t(group[0]) * stride, row_length, output);
    } else if (channels == 3) {
      for (int j = 0; j < row_length; j += 3)
        for (int i = 0; i < size; i++, output += 3) std::copy_n(bands + size_t(group[i]) * stride + j, 3, output);
    } else {
      for (int j = 0; j < row_length; j += channels)
        for (int i = 0; i < size; i++, output += channels)
          std::copy_n(bands + size_t(group[i]) * stride + j, channels, output);
    }
  }

  const std::vector<float> rows_;
  std::vector<Scratch> scratch_;  ///< one a thread
};

DALI_REGISTER_OPERATOR(SpectralSplit, SpectralSplitCPU, ::dali::CPU);

}  // namespace bandsplit
