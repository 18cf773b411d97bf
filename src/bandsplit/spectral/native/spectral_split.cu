// The GPU backend of fn.spectral_split: chooses and launches the kernels of tiles.h.

#include "spectral_split.h"

#include <algorithm>
#include <set>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dali/core/cuda_error.h"
#include "dali/core/dev_buffer.h"
#include "tiles.h"

namespace bandsplit {

namespace {

/// Samples that one launch can process: of one size, with inputs and outputs that are contiguous in memory.
struct Span {
  int first, last;  ///< samples first to last - 1
  Images images;
  std::vector<void *> outputs;  ///< per group: the output of sample `first`
};

/// SplitTiles for this block; nullptr if it is not compiled for it.
template <bool kIsProduct, typename Out>
auto KernelFor(int block) -> void (*)(const Tiles) {
  switch (block) {
    case 1: return SplitTiles<1, kIsProduct, Out>;
    case 2: return SplitTiles<2, kIsProduct, Out>;
    case 4: return SplitTiles<4, kIsProduct, Out>;
    case 6: return SplitTiles<6, kIsProduct, Out>;
    case 8: return SplitTiles<8, kIsProduct, Out>;
    default: return nullptr;
  }
}

}  // namespace

class SpectralSplitGPU : public SpectralSplit<::dali::GPUBackend> {
 public:
  explicit SpectralSplitGPU(const ::dali::OpSpec &spec) : SpectralSplit(spec) {
    for (int g = 0; g < static_cast<int>(plan_.groups.size()); g++) PlaceGroup(g);
  }

 protected:
  void RunImpl(::dali::Workspace &ws) override {
    SetOutputLayouts(ws);
    if (constants_.empty()) CopyConstants(ws.stream());
    const auto spans = Spans(ws);
    for (const Span &span : spans) {
      if (plan_.dtype == DALI_FLOAT)
        Launch<float>(span, ws.stream());
      else
        Launch<__half>(span, ws.stream());
    }
  }

 private:
  /// Assigns a group to the first launch of SplitTiles that has none of its bands, because a launch writes each band to
  /// one place only. A group that repeats a band is left to SplitAny.
  void PlaceGroup(int group) {
    const std::vector<int> &rows = plan_.groups[group];
    const std::set<int> named(rows.begin(), rows.end());
    if (named.size() < rows.size()) {
      slow_groups_.push_back(group);
      return;
    }
    for (size_t i = 0;; i++) {
      if (i == launches_.size()) launches_.emplace_back();
      const auto has_some = [&](int other) {
        return std::any_of(plan_.groups[other].begin(), plan_.groups[other].end(),
                           [&](int row) { return named.count(row) > 0; });
      };
      if (std::any_of(launches_[i].begin(), launches_[i].end(), has_some)) continue;
      launches_[i].push_back(group);
      return;
    }
  }

  /// Copies scale, shift, matrix and the bands of all groups to the GPU; called once per operator.
  void CopyConstants(cudaStream_t stream) {
    std::vector<float> constants = plan_.scale;
    constants.insert(constants.end(), plan_.shift.begin(), plan_.shift.end());
    constants.insert(constants.end(), plan_.matrix.begin(), plan_.matrix.end());
    std::vector<int> bands;
    for (const auto &group : plan_.groups)
      for (const int row : group) bands.push_back(plan_.bands[row]);
    constants_.from_host(constants, stream);
    bands_.from_host(bands, stream);
    CUDA_CALL(cudaStreamSynchronize(stream));
  }

  /// Merges consecutive samples of the batch into spans where possible; leaves out empty images.
  std::vector<Span> Spans(::dali::Workspace &ws) const {
    const auto &input = ws.Input<::dali::GPUBackend>(0);
    const int samples = input.num_samples(), groups = ws.NumOutput();
    if (samples == 0) return {};
    const std::vector<int> mirror = Mirror(ws, samples);
    const size_t number_bytes = plan_.dtype == DALI_FLOAT ? sizeof(float) : sizeof(__half);
    std::vector<Span> spans;
    for (int i = 0; i < samples; i++) {
      const auto side = input.tensor_shape_span(i);
      const int height = int(side[0]) / plan_.block, width = int(side[1]) / plan_.block;
      if (height == 0 || width == 0) continue;
      const auto *pixels = input.tensor<uint8_t>(i);
      std::vector<void *> outputs;
      for (int g = 0; g < groups; g++) outputs.push_back(ws.Output<::dali::GPUBackend>(g).raw_mutable_tensor(i));
      const auto follows = [&](const Span &span) {
        const size_t before = i - span.first, area = size_t(height) * width * plan_.channels();
        if (span.last != i || before == kMostSamples || span.images.height != height || span.images.width != width ||
            span.images.pixels + before * area * plan_.pixels != pixels)
          return false;
        for (int g = 0; g < groups; g++)
          if (static_cast<char *>(span.outputs[g]) + before * area * plan_.groups[g].size() * number_bytes != outputs[g])
            return false;
        return true;
      };
      if (spans.empty() || !follows(spans.back())) spans.push_back({i, i, {pixels, height, width, {}}, outputs});
      Span &span = spans.back();
      const int at = span.last++ - span.first;
      span.images.mirror[at / 32] |= uint32_t(mirror[i] != 0) << (at % 32);
    }
    return spans;
  }

  /// Computes all outputs of a span.
  template <typename Out>
  void Launch(const Span &span, cudaStream_t stream) const {
    const auto kernel = plan_.channels() != 3 ? nullptr
                        : plan_.factors       ? KernelFor<true, Out>(plan_.block)
                                              : KernelFor<false, Out>(plan_.block);
    for (const auto &groups : launches_) {
      if (!kernel || !LaunchTiles<Out>(kernel, span, groups, stream))
        for (const int group : groups) LaunchAny<Out>(span, group, stream);
    }
    for (const int group : slow_groups_) LaunchAny<Out>(span, group, stream);
  }

  /// Launches SplitTiles for `groups`; false if a row of blocks does not fit into shared memory.
  template <typename Out>
  bool LaunchTiles(void (*kernel)(const Tiles), const Span &span, const std::vector<int> &groups,
                   cudaStream_t stream) const {
    Tiles tiles{};
    tiles.images = span.images;
    tiles.channels_last = plan_.channels_last;
    std::copy_n(plan_.scale.begin(), 3, tiles.scale);
    std::copy_n(plan_.shift.begin(), 3, tiles.shift);
    if (plan_.factors) {
      std::copy_n(plan_.factors->vertical.begin(), plan_.pixels, tiles.vertical);
      std::copy_n(plan_.factors->horizontal.begin(), plan_.pixels, tiles.horizontal);
    }
    tiles.matrix = matrix();
    std::vector<std::vector<int>> bands;
    for (const int group : groups) {
      bands.emplace_back();
      for (const int row : plan_.groups[group]) bands.back().push_back(plan_.bands[row]);
      tiles.outputs[bands.size() - 1] = span.outputs[group];
    }
    const auto launch = PlaceTiles(tiles, plan_.block, bands, sizeof(Out));
    if (!launch) return false;
    kernel<<<dim3(launch->tiles, span.last - span.first), launch->threads, launch->shared_bytes, stream>>>(tiles);
    CUDA_CALL(cudaGetLastError());
    return true;
  }

  /// Launches SplitAny for one group.
  template <typename Out>
  void LaunchAny(const Span &span, int group, cudaStream_t stream) const {
    size_t before = 0;
    for (int g = 0; g < group; g++) before += plan_.groups[g].size();
    Numbers numbers{};
    numbers.images = span.images;
    numbers.samples = span.last - span.first;
    numbers.block = plan_.block;
    numbers.channels = plan_.channels();
    numbers.channels_last = plan_.channels_last;
    numbers.scale = constants_.data();
    numbers.shift = constants_.data() + plan_.channels();
    numbers.matrix = matrix();
    numbers.bands = bands_.data() + before;
    numbers.band_count = static_cast<int>(plan_.groups[group].size());
    numbers.output = span.outputs[group];
    const size_t all = size_t(numbers.samples) * span.images.height * span.images.width * numbers.band_count *
                       plan_.channels();
    constexpr unsigned kThreads = 256;
    SplitAny<Out><<<unsigned(std::min<size_t>((all - 1) / kThreads + 1, 1 << 20)), kThreads, 0, stream>>>(numbers);
    CUDA_CALL(cudaGetLastError());
  }

  const float *matrix() const { return constants_.data() + 2 * plan_.channels(); }

  std::vector<std::vector<int>> launches_;  ///< the groups of each launch of SplitTiles
  std::vector<int> slow_groups_;            ///< groups for SplitAny
  ::dali::DeviceBuffer<float> constants_;   ///< scale, shift and matrix, concatenated
  ::dali::DeviceBuffer<int> bands_;         ///< bands of all groups, concatenated
};

DALI_REGISTER_OPERATOR(SpectralSplit, SpectralSplitGPU, ::dali::GPU);

}  // namespace bandsplit
