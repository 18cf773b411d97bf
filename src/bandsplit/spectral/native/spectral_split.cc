// The schema and the CPU backend of fn.spectral_split.
//
// Images are processed in chunks that fit into the L2 cache, in three steps. Pixels are copied into planes, one per
// position within a block. The planes are multiplied by the matrix, with vector instructions across many blocks. The
// resulting planes of coefficients are copied to the outputs.

#include "spectral_split.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "dali/core/float16.h"
#include "dali/pipeline/util/thread_pool.h"

namespace bandsplit {

using ::dali::float16;

DALI_SCHEMA(SpectralSplit)
    .DocStr(R"(Splits images into spectral sub-bands.

A matrix maps each ``block`` x ``block`` block of pixels to N = ``block``² coefficients; band k is the image that holds
coefficient k of every block. One pass flips, normalizes to (x - mean) / std, transforms, and writes each group of bands
as one output in the requested layout and dtype. Channel i * C + c of an output is color c of the group's i-th band.)")
    .NumInput(1)
    .InputLayout(0, "HWC")
    .InputDox(0, "images", "TensorList of UINT8", "Height and width must be multiples of ``block``.")
    .OutputFn([](const ::dali::OpSpec &spec) { return static_cast<int>(GroupsOf(spec).size()); })
    .AddOptionalArg("block", "Side of the pixel block, 1 to 32.", 2)
    .AddArg("matrix", "The N x N transform, row-major: row k holds the weights of a block's pixels for band k.",
            DALI_FLOAT_VEC)
    .AddOptionalArg("mean", "Mean of each color channel, on the 0..255 scale of the pixels.",
                    std::vector<float>{0, 0, 0})
    .AddOptionalArg("std", "Standard deviation of each color channel, on the same scale.", std::vector<float>{1, 1, 1})
    .AddOptionalArg("mirror", "If nonzero, flips the image horizontally before the transform.", 0, true)
    .AddOptionalArg("groups", "The bands of all groups, concatenated; by default, each band is a group.",
                    std::vector<int>{})
    .AddOptionalArg("group_sizes", "Number of bands in each group.", std::vector<int>{})
    .AddOptionalTypeArg("dtype", "Data type of the outputs: FLOAT or FLOAT16.", DALI_FLOAT)
    .AddOptionalArg("output_layout", "Layout of the outputs: \"HWC\" or \"CHW\".", ::dali::TensorLayout("HWC"));

namespace {

// Vectors ------------------------------------------------------------------------------------------------------------

// One vector register of floats. This is GCC's vector extension: operators work lane by lane.
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

/// Loads kLanes floats; no alignment required.
Lanes Load(const float *from) {
  Lanes values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

/// Stores kLanes floats; no alignment required.
void Store(float *to, Lanes values) { std::memcpy(to, &values, sizeof(values)); }

// Conversions that compilers do not vectorize well by themselves, with a scalar fallback for other CPUs.

/// Loads kLanes bytes and converts them to float; no alignment required.
Lanes Load(const uint8_t *from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))));
#else
  Lanes values;
  for (int lane = 0; lane < kLanes; lane++) values[lane] = from[lane];
  return values;
#endif
}

/// Rounds kLanes floats to nearest even and stores them as float16; no alignment required.
void Store(float16 *to, Lanes values) {
#ifdef __F16C__
  // Converts 8 floats at once; dali::float16 converts one at a time in software. The results are bitwise equal.
  for (int lane = 0; lane < kLanes; lane += 8) {
    __m256 eight;
    std::memcpy(&eight, reinterpret_cast<const char *>(&values) + lane * sizeof(float), sizeof(eight));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + lane), _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int lane = 0; lane < kLanes; lane++) to[lane] = float16(values[lane]);
#endif
}

/// Copies one row of RGB pixels into planes: pixel s of block j, at from + j * step + 3 * s, goes to
/// to + s * stride + 3 * j, or 3 * (count - 1 - j) if `backwards`.
///
/// Takes `pixels` adjacent pixels from each of `count` blocks. `step` is the distance between blocks in bytes, `stride`
/// that between planes, which may be negative. No alignment is required; `from` and `to` must not overlap. Reads
/// nothing past the last block, and writes only 3 * count bytes of each plane.
void CopyPixels(const uint8_t *from, int step, int count, int pixels, bool backwards, uint8_t *to, ptrdiff_t stride) {
  int j = 0;
#ifdef __SSSE3__
  // Four pixels of four blocks at a time. A load reads 16 bytes and uses 12; a store writes 16 bytes, of which 4 are
  // overwritten by the next four blocks. The last blocks are left to the scalar loop, so that loads do not run past the
  // end of the image and stores do not run past the plane.
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  const __m128i drop = backwards ? _mm_setr_epi8(-1, -1, -1, -1, 12, 13, 14, 8, 9, 10, 4, 5, 6, 0, 1, 2)
                                 : _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  for (; pixels >= 4 && j + 4 < count - 1; j += 4) {
    const ptrdiff_t place = backwards ? 3 * (count - 4 - j) - 4 : 3 * j;
    for (int s = 0; s < pixels; s = s + 8 > pixels && s + 4 < pixels ? pixels - 4 : s + 4) {
      const auto load = [&](int i) {
        const uint8_t *block = from + ptrdiff_t(j + i) * step + 3 * s;
        return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(block)), spread);
      };
      const auto store = [&](int plane, __m128i four) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + (s + plane) * stride + place), _mm_shuffle_epi8(four, drop));
      };
      const __m128i block0 = load(0), block1 = load(1), block2 = load(2), block3 = load(3);
      const __m128i low01 = _mm_unpacklo_epi32(block0, block1), low23 = _mm_unpacklo_epi32(block2, block3);
      const __m128i high01 = _mm_unpackhi_epi32(block0, block1), high23 = _mm_unpackhi_epi32(block2, block3);
      store(0, _mm_unpacklo_epi64(low01, low23));
      store(1, _mm_unpackhi_epi64(low01, low23));
      store(2, _mm_unpacklo_epi64(high01, high23));
      store(3, _mm_unpackhi_epi64(high01, high23));
    }
  }
  // With fewer than four pixels per block: one pixel of four blocks at a time.
  const auto pixel = [=](int i, int s) {
    int bytes;
    std::memcpy(&bytes, from + ptrdiff_t(i) * step + 3 * s, 4);
    return bytes;
  };
  for (; j + 4 < count - 1; j += 4) {
    const ptrdiff_t place = backwards ? 3 * (count - 4 - j) - 4 : 3 * j;
    for (int s = 0; s < pixels; s++) {
      const __m128i four = _mm_setr_epi32(pixel(j, s), pixel(j + 1, s), pixel(j + 2, s), pixel(j + 3, s));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(to + s * stride + place), _mm_shuffle_epi8(four, drop));
    }
  }
#endif
  for (; j < count; j++)
    for (int s = 0; s < pixels; s++)
      std::memcpy(to + s * stride + 3 * (backwards ? count - 1 - j : j), from + ptrdiff_t(j) * step + 3 * s, 3);
}

/// memcpy with non-temporal stores. They bypass the caches: no cache line is read before it is written, and the output
/// evicts nothing. No alignment required; the buffers must not overlap. Call FinishStreams before other threads read.
void Stream(void *target, const void *source, size_t bytes) {
  auto *to = static_cast<char *>(target);
  auto *from = static_cast<const char *>(source);
#ifdef __AVX__
  const size_t unaligned = std::min(bytes, -reinterpret_cast<uintptr_t>(to) % sizeof(__m256i));
  std::memcpy(to, from, unaligned);
  to += unaligned, from += unaligned, bytes -= unaligned;
  for (; bytes >= sizeof(__m256i); to += sizeof(__m256i), from += sizeof(__m256i), bytes -= sizeof(__m256i))
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#endif
  std::memcpy(to, from, bytes);
}

/// Orders the non-temporal stores of this thread before its later stores, so that other threads see them.
void FinishStreams() {
#ifdef __AVX__
  _mm_sfence();
#endif
}

// Products of small matrices -----------------------------------------------------------------------------------------

// A plane is an array with one element per block and color; `place` is an index into it. All planes of a chunk have the
// same length and order, so a transform is a matrix product over planes.
//
// The inner loop computes up to 6 rows of the product for 2 vectors of places, or up to 2 rows for 4 vectors. These are
// enough independent sums to hide the latency of FMA, and they fit into the 16 vector registers of AVX2.
constexpr int kRowsAtOnce = 6;
constexpr int kPlacesAtOnce = 4 * kLanes;

int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/// The product y[rows[i]] = Σ_n matrix[i][n] x[first + n * step], n < count, for input planes x and output planes y.
struct Product {
  int first, step, count;     ///< input planes
  std::vector<int> rows;      ///< output planes
  std::vector<float> matrix;  ///< in tiles of kRowsAtOnce rows (the last may have fewer), each tile column-major

  /// weight(i, n) is matrix[i][n].
  template <typename Weight>
  Product(int first, int step, int count, std::vector<int> rows, const Weight &weight)
      : first(first), step(step), count(count), rows(std::move(rows)) {
    const int all = static_cast<int>(this->rows.size());
    for (int i = 0; i < all; i += kRowsAtOnce)
      for (int n = 0; n < count; n++)
        for (int k = i; k < std::min(all, i + kRowsAtOnce); k++) matrix.push_back(weight(k, n));
  }
};

/// Multiplies one tile of kRows rows. `matrix` and `rows` point to the tile's part of the product's.
/// kCount is product.count as a compile-time constant, or 0 to read it at run time.
template <int kRows, int kCount, typename Load, typename Store>
void MultiplyRows(const Product &product, const float *matrix, const int *rows, int places, const Load &load,
                  const Store &store) {
  constexpr int kVectors = kRows <= 2 ? 4 : 2;
  const int first = product.first, step = product.step, count = kCount ? kCount : product.count;
  for (int place = 0; place < places; place += kVectors * kLanes) {
    Lanes sums[kRows][kVectors] = {};
    for (int n = 0; n < count; n++) {
      Lanes x[kVectors];
      for (int v = 0; v < kVectors; v++) x[v] = load(first + n * step, place + v * kLanes);
      for (int i = 0; i < kRows; i++)
        for (int v = 0; v < kVectors; v++) sums[i][v] += matrix[n * kRows + i] * x[v];
    }
    for (int i = 0; i < kRows; i++)
      for (int v = 0; v < kVectors; v++) store(rows[i], place + v * kLanes, sums[i][v]);
  }
}

/// Computes a product over places 0 to `places` - 1, in vectors of kLanes places.
///
/// load(plane, place) returns the vector that starts at `place`; store(plane, place, lanes) writes one. Both are also
/// called past the end, up to the next multiple of kPlacesAtOnce, so planes need that much padding.
template <typename Load, typename Store>
void Multiply(const Product &product, int places, const Load &load, const Store &store) {
  const float *matrix = product.matrix.data();
  const int *rows = product.rows.data();
  const auto multiply = [&](auto kRows, auto kCount) {
    MultiplyRows<kRows(), kCount()>(product, matrix, rows, places, load, store);
  };
  using std::integral_constant;
  constexpr integral_constant<int, 0> kAny;
  for (int left = static_cast<int>(product.rows.size()); left > 0; left -= kRowsAtOnce) {
    switch (left) {
      case 1: multiply(integral_constant<int, 1>(), kAny); break;
      case 2: multiply(integral_constant<int, 2>(), kAny); break;
      case 3: multiply(integral_constant<int, 3>(), kAny); break;
      case 4:
        if (product.count == 4) multiply(integral_constant<int, 4>(), integral_constant<int, 4>());
        else multiply(integral_constant<int, 4>(), kAny);
        break;
      case 5: multiply(integral_constant<int, 5>(), kAny); break;
      default:
        if (product.count == 6) multiply(integral_constant<int, 6>(), integral_constant<int, 6>());
        else multiply(integral_constant<int, 6>(), kAny);
    }
    matrix += kRowsAtOnce * product.count;
    rows += kRowsAtOnce;
  }
}

/// Scratch memory that is reused from chunk to chunk. One per thread.
class Scratch {
 public:
  /// Uninitialized memory for `count` values, aligned to 64 bytes; valid until the next Reset.
  template <typename T>
  T *Take(size_t count) {
    T *taken = reinterpret_cast<T *>(lines_[used_].bytes);
    used_ += Lines<T>(count);
    return taken;
  }

  /// Releases everything that was taken, and makes room for `lines` lines.
  void Reset(size_t lines) {
    used_ = 0;
    if (lines_.size() < lines + 1) lines_.resize(lines + 1);
  }

  /// Number of 64-byte lines that Take<T>(count) uses.
  template <typename T>
  static size_t Lines(size_t count) {
    return (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
  size_t used_ = 0;
};

/// Number of places that go through both stages of a transform together: the intermediate planes stay in the L1 cache.
constexpr int kStretch = 2 * kPlacesAtOnce;

/// One image of the batch.
struct Image {
  const uint8_t *pixels;  ///< (height * block, width * block, channels)
  int height, width;      ///< in blocks
  bool mirror;
  std::vector<void *> outputs;  ///< one per group: (height, width, channels of the group), or CHW
};

/// A chunk of an image (some rows of blocks), and the memory layout of its planes in scratch memory.
///
/// Plane n holds pixel n of every block, in all colors. Its elements are ordered as in the output: for HWC, block by
/// block with interleaved colors (one run per plane); for CHW, color by color (one run per color). The planes of
/// coefficients have the same layout.
struct Chunk {
  Chunk(const Image &image, int first, int rows, int channels, bool channels_last)
      : image(image), first(first), rows(rows), runs(channels_last ? 1 : channels),
        row_length(image.width * (channels_last ? channels : 1)), run_length(rows * row_length),
        run_stride(RoundUp(run_length, kPlacesAtOnce)), plane_stride(runs * run_stride + kPlacesAtOnce) {}

  const Image &image;
  int first, rows;               ///< first row of blocks, and number of rows
  int runs;                      ///< runs per plane
  int row_length, run_length;    ///< elements of a run per row of blocks, and in total
  int run_stride, plane_stride;  ///< in elements, padded for loads and stores past the end of a run
};

}  // namespace

class SpectralSplitCPU : public SpectralSplit<::dali::CPUBackend> {
 public:
  explicit SpectralSplitCPU(const ::dali::OpSpec &spec) : SpectralSplit(spec) {
    PlanProducts();
    for (const int band : plan_.bands) {
      const float *row = &plan_.matrix[size_t(band) * plan_.pixels];
      row_sums_.push_back(static_cast<float>(std::accumulate(row, row + plan_.pixels, 0.0)));
    }
    for (int i = 0; i < kStretch * plan_.channels(); i++) {
      const int color = plan_.channels_last ? i % plan_.channels() : i / kStretch;
      scale_.push_back(plan_.scale[color]);
      shift_.push_back(plan_.shift[color]);
    }
  }

 protected:
  void RunImpl(::dali::Workspace &ws) override {
    SetOutputLayouts(ws);
    const std::vector<Image> images = Images(ws);
    if (images.empty()) return;
    auto &pool = ws.GetThreadPool();
    scratch_.resize(pool.NumThreads());
    // About four tasks per thread: enough to balance the load, few enough that queueing costs nothing.
    const int batch = static_cast<int>(images.size());
    const int parts = std::max(1, 4 * pool.NumThreads() / batch);
    for (const Image &image : images) {
      for (int part = 0; part < parts; part++) {
        const int first = image.height * part / parts, last = image.height * (part + 1) / parts;
        if (first < last)
          pool.AddWork([this, &image, first, last](int thread) { SplitRows(image, first, last, scratch_[thread]); },
                       last - first);
      }
    }
    pool.RunAll();
  }

 private:
  /// Plans the transform as one product, or as two stages if it is separable and that takes fewer multiplications.
  ///
  /// Stage one (first_) multiplies each row of a block by the horizontal factor, only for horizontal frequencies that
  /// some band needs. Stage two (last_) multiplies each column of the result by the vertical factor.
  void PlanProducts() {
    const int block = plan_.block, count = plan_.row_count();
    std::vector<int> rows(count);
    std::iota(rows.begin(), rows.end(), 0);
    std::map<int, std::vector<int>> rows_of_column;
    for (int k : rows) rows_of_column[plan_.bands[k] % block].push_back(k);
    const int columns = static_cast<int>(rows_of_column.size());
    const int in_two_stages = plan_.pixels * columns + block * count;
    if (!plan_.factors || in_two_stages >= plan_.pixels * count) {
      last_.emplace_back(0, 1, plan_.pixels, rows,
                         [&](int k, int n) { return plan_.matrix[plan_.bands[k] * plan_.pixels + n]; });
      return;
    }
    std::vector<int> wanted;
    for (const auto &[column, rows] : rows_of_column) wanted.push_back(column);
    for (int r = 0; r < block; r++) {
      std::vector<int> to(columns);
      std::iota(to.begin(), to.end(), r * columns);
      first_.emplace_back(r * block, 1, block, to,
                          [&](int i, int s) { return plan_.factors->horizontal[wanted[i] * block + s]; });
    }
    for (int i = 0; i < columns; i++) {
      const std::vector<int> &to = rows_of_column[wanted[i]];
      last_.emplace_back(i, columns, block, to, [&](int k, int r) {
        return plan_.factors->vertical[plan_.bands[to[k]] / block * block + r];
      });
    }
    middles_ = block * columns;
  }

  /// The images of the batch, with pointers to their outputs.
  std::vector<Image> Images(::dali::Workspace &ws) const {
    const auto &input = ws.Input<::dali::CPUBackend>(0);
    const int batch = input.num_samples();
    if (batch == 0) return {};
    const std::vector<int> mirror = Mirror(ws, batch);
    std::vector<Image> images(batch);
    for (int i = 0; i < batch; i++) {
      const auto side = input.tensor_shape_span(i);
      const int height = int(side[0]) / plan_.block, width = int(side[1]) / plan_.block;
      images[i] = {input.tensor<uint8_t>(i), height, width, mirror[i] != 0, {}};
      for (int g = 0; g < ws.NumOutput(); g++)
        images[i].outputs.push_back(ws.Output<::dali::CPUBackend>(g).raw_mutable_tensor(i));
    }
    return images;
  }

  /// Splits rows first to last - 1 of blocks of an image.
  void SplitRows(const Image &image, int first, int last, Scratch &scratch) const {
    if (plan_.dtype == DALI_FLOAT)
      SplitRowsTo<float>(image, first, last, scratch);
    else
      SplitRowsTo<float16>(image, first, last, scratch);
  }

  /// SplitRows for an output type: works in chunks that fit into the L2 cache.
  template <typename Out>
  void SplitRowsTo(const Image &image, int first, int last, Scratch &scratch) const {
    constexpr int kChunkBytes = 192 * 1024;
    const int row_bytes = image.width * plan_.channels() * (plan_.row_count() * int(sizeof(Out)) + plan_.pixels);
    const int rows = std::max(1, kChunkBytes / std::max(1, row_bytes));
    for (int y = first; y < last; y += rows)
      SplitChunk<Out>({image, y, std::min(rows, last - y), plan_.channels(), plan_.channels_last}, scratch);
    FinishStreams();
  }

  template <typename Out>
  void SplitChunk(const Chunk &chunk, Scratch &scratch) const {
    const size_t planes_size = size_t(plan_.pixels) * chunk.plane_stride;
    const size_t bands_size = size_t(plan_.row_count()) * chunk.plane_stride;
    scratch.Reset(Scratch::Lines<uint8_t>(planes_size) + Scratch::Lines<Out>(bands_size) +
                  Scratch::Lines<float>(size_t(middles_) * kStretch));
    uint8_t *planes = scratch.Take<uint8_t>(planes_size);
    Out *bands = scratch.Take<Out>(bands_size);
    float *middles = scratch.Take<float>(size_t(middles_) * kStretch);
    PixelsToPlanes(chunk, planes);
    for (int run = 0; run < chunk.runs; run++) {
      for (int i = 0; i < chunk.run_length; i += kStretch) {
        const int color = plan_.channels_last ? i % plan_.channels() : run * kStretch;
        const int at = run * chunk.run_stride + i;
        StretchToBands(planes + at, &scale_[color], &shift_[color], middles, bands + at, chunk.plane_stride,
                       std::min(kStretch, chunk.run_length - i));
      }
    }
    for (int g = 0; g < static_cast<int>(plan_.groups.size()); g++)
      BandsToOutput(chunk, bands, plan_.groups[g], static_cast<Out *>(chunk.image.outputs[g]));
  }

  /// Copies the chunk's pixels into planes, flipped horizontally if the image is mirrored.
  void PixelsToPlanes(const Chunk &chunk, uint8_t *planes) const {
    const int block = plan_.block, channels = plan_.channels(), width = chunk.image.width;
    const ptrdiff_t row_bytes = ptrdiff_t(width) * block * channels;
    const bool mirror = chunk.image.mirror;
    const int step = block * channels;
    const ptrdiff_t stride = mirror ? -chunk.plane_stride : chunk.plane_stride;  // to the next pixel's plane
    const uint8_t *row = chunk.image.pixels + chunk.first * block * row_bytes;
    for (int y = 0; y < chunk.rows; y++) {
      for (int r = 0; r < block; r++, row += row_bytes) {
        const int first_plane = r * block + (mirror ? block - 1 : 0);
        uint8_t *to = planes + ptrdiff_t(first_plane) * chunk.plane_stride + y * chunk.row_length;
        if (plan_.channels_last && channels == 3) {
          CopyPixels(row, step, width, block, mirror, to, stride);
          continue;
        }
        for (int s = 0; s < block; s++, to += stride) {
          const uint8_t *from = row + s * channels;
          for (int j = 0; j < width; j++, from += step) {
            const int place = mirror ? width - 1 - j : j;
            for (int c = 0; c < channels; c++)
              to[plan_.channels_last ? place * channels + c : c * chunk.run_stride + place] = from[c];
          }
        }
      }
    }
  }

  /// Normalizes and transforms `places` places of all planes, at most kStretch.
  ///
  /// `planes` and `bands` point to the first of these places in plane 0; both have `stride` elements from plane to
  /// plane. `scale` and `shift` give the normalization of each place. `middles` is scratch memory for the intermediate
  /// planes, (middles_, kStretch). Places up to the next multiple of kPlacesAtOnce are overwritten.
  template <typename Out>
  void StretchToBands(const uint8_t *planes, const float *scale, const float *shift, float *middles, Out *bands,
                      ptrdiff_t stride, int places) const {
    const auto bytes = [=](int n, int place) { return Load(planes + n * stride + place); };
    const auto pixels = [=](int n, int place) { return bytes(n, place) * Load(scale + place) + Load(shift + place); };
    const auto to_bands = [=](int k, int place, Lanes lanes) { Store(bands + k * stride + place, lanes); };
    if (first_.empty() && 2 * plan_.row_count() < plan_.pixels) {  // cheaper to normalize the bands than the pixels
      const float *row_sums = row_sums_.data();
      Multiply(last_[0], places, bytes, [=](int k, int place, Lanes lanes) {
        to_bands(k, place, lanes * Load(scale + place) + row_sums[k] * Load(shift + place));
      });
      return;
    }
    if (first_.empty()) {
      Multiply(last_[0], places, pixels, to_bands);
      return;
    }
    const auto from_middles = [=](int i, int place) { return Load(middles + i * kStretch + place); };
    const auto to_middles = [=](int i, int place, Lanes lanes) { Store(middles + i * kStretch + place, lanes); };
    for (const Product &product : first_) Multiply(product, places, pixels, to_middles);
    for (const Product &product : last_) Multiply(product, places, from_middles, to_bands);
  }

  /// Writes the chunk's part of one output from the planes of the group's bands.
  template <typename Out>
  void BandsToOutput(const Chunk &chunk, const Out *bands, const std::vector<int> &group, Out *output) const {
    const int channels = plan_.channels(), size = static_cast<int>(group.size());
    const auto band = [&](int i) { return bands + ptrdiff_t(group[i]) * chunk.plane_stride; };
    if (!plan_.channels_last) {
      for (int i = 0; i < size * channels; i++)
        Stream(output + (ptrdiff_t(i) * chunk.image.height + chunk.first) * chunk.image.width,
               band(i / channels) + i % channels * chunk.run_stride, chunk.run_length * sizeof(Out));
      return;
    }
    output += ptrdiff_t(chunk.first) * chunk.row_length * size;
    if (size == 1) {
      Stream(output, band(0), chunk.run_length * sizeof(Out));
    } else if (channels == 3) {
      for (int j = 0; j < chunk.run_length; j += 3)
        for (int i = 0; i < size; i++, output += 3) std::copy_n(band(i) + j, 3, output);
    } else {
      for (int j = 0; j < chunk.run_length; j += channels)
        for (int i = 0; i < size; i++, output += channels) std::copy_n(band(i) + j, channels, output);
    }
  }

  std::vector<Product> first_, last_;  ///< the two stages; with a single stage, first_ is empty
  int middles_ = 0;                    ///< number of intermediate planes
  std::vector<float> row_sums_;        ///< sum of each matrix row, to normalize bands instead of pixels (linearity)

  /// Normalization of the places of a stretch, channels * kStretch entries. HWC: colors alternate, and a stretch starts
  /// at the color of its first place. CHW: kStretch equal entries per color.
  std::vector<float> scale_, shift_;

  std::vector<Scratch> scratch_;  ///< one per thread
};

DALI_REGISTER_OPERATOR(SpectralSplit, SpectralSplitCPU, ::dali::CPU);

}  // namespace bandsplit
