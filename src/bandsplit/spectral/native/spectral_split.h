// The DALI operator fn.spectral_split: flips, normalizes, transforms and converts images in one pass.
//
// This header parses the arguments and holds the code that both backends share. spectral_split.cc has the schema and
// the CPU backend, spectral_split.cu the GPU backend, tiles.h the CUDA kernels. The reference implementation is
// bandsplit.spectral.transforms.split_images.

#ifndef BANDSPLIT_NATIVE_SPECTRAL_SPLIT_H_
#define BANDSPLIT_NATIVE_SPECTRAL_SPLIT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "dali/core/error_handling.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/common.h"

namespace bandsplit {

/// Throws an exception that DALI raises as RuntimeError in Python, unless `condition` holds.
/// (DALI_ENFORCE would prefix the message with the C++ condition.)
template <typename... Parts>
void Require(bool condition, const Parts &...message) {
  if (!condition) DALI_FAIL("spectral_split: ", message...);
}

/// The argument `block`, checked.
inline int BlockOf(const ::dali::OpSpec &spec) {
  const int block = spec.GetArgument<int>("block");
  // At 32 the matrix already has 2^20 entries; larger blocks would need a fast transform instead of a matrix.
  Require(1 <= block && block <= 32, "block = ", block, ": allowed are 1 to 32");
  return block;
}

/// The bands of each output, from `groups` and `group_sizes`, checked; by default one band per output.
inline std::vector<std::vector<int>> GroupsOf(const ::dali::OpSpec &spec) {
  const int block = BlockOf(spec);
  const int bands = block * block;
  const auto flat = spec.GetRepeatedArgument<int>("groups");
  const auto sizes = spec.GetRepeatedArgument<int>("group_sizes");
  std::vector<std::vector<int>> groups;
  if (flat.empty() && sizes.empty()) {
    for (int band = 0; band < bands; band++) groups.push_back({band});
    return groups;
  }
  for (size_t g = 0; g < sizes.size(); g++)
    Require(sizes[g] >= 1, "group_sizes[", g, "] = ", sizes[g], ": a group has at least one band");
  const auto named = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
  Require(named == flat.size(), "group_sizes sum to ", named, ", but groups names ", flat.size(), " bands");
  for (size_t i = 0; i < flat.size(); i++)
    Require(0 <= flat[i] && flat[i] < bands,
            "groups[", i, "] = ", flat[i], ": the bands of block = ", block, " are 0 to ", bands - 1);
  auto next = flat.begin();
  for (const int size : sizes) {
    groups.emplace_back(next, next + size);
    next += size;
  }
  return groups;
}

/// Factors A and B of a matrix that is a Kronecker product: entry (u * block + v, r * block + s) is A[u][r] * B[v][s].
///
/// Such a transform is separable: a block x of pixels becomes A x Bᵀ, which takes 2 * block instead of block²
/// multiplications per pixel.
struct Factors {
  std::vector<float> vertical, horizontal;  ///< A and B: (block, block), row-major
};

/// Factors `matrix`, (block², block²) and row-major; nullopt if it is zero or not a Kronecker product.
///
/// With (u, v, r, s) the indices of the entry of largest magnitude, A is read from the entries that share v and s with
/// it, and B from those that share u and r. Their product is then compared with every entry.
inline std::optional<Factors> FactorsOf(const std::vector<float> &matrix, int block) {
  const auto largest = std::max_element(matrix.begin(), matrix.end(),
                                        [](float a, float b) { return std::abs(a) < std::abs(b); });
  if (*largest == 0) return std::nullopt;
  const int pixels = block * block, at = static_cast<int>(largest - matrix.begin());
  const int band = at / pixels, pixel = at % pixels;
  const auto entry = [&](int u, int v, int r, int s) { return matrix[(u * block + v) * pixels + r * block + s]; };
  Factors factors;
  for (int i = 0; i < pixels; i++) {
    factors.vertical.push_back(entry(i / block, band % block, i % block, pixel % block));
    factors.horizontal.push_back(entry(band / block, i / block, pixel / block, i % block) / *largest);
  }
  // Allows for rounding to float32. The negated comparison also rejects NaN.
  const float tolerance = 1e-6f * std::abs(*largest);
  for (int i = 0; i < pixels; i++)
    for (int j = 0; j < pixels; j++)
      if (!(std::abs(matrix[i * pixels + j] - factors.vertical[i / block * block + j / block] *
                                                  factors.horizontal[i % block * block + j % block]) <= tolerance))
        return std::nullopt;
  return factors;
}

/// The operator's arguments, checked and in the form that the kernels use.
///
/// The CPU kernel computes each band that occurs in a group once. These bands are numbered 0, 1, ... in the order of
/// their first use; that number is called a row. A normalized pixel is x * scale + shift.
struct Plan {
  explicit Plan(const ::dali::OpSpec &spec)
      : block(BlockOf(spec)), pixels(block * block), dtype(spec.GetArgument<::dali::DALIDataType>("dtype")) {
    ReadColors(spec);
    ReadGroups(spec);
    Require(dtype == DALI_FLOAT || dtype == DALI_FLOAT16,
            "dtype = ", dtype, ": allowed are FLOAT and FLOAT16");
    const auto layout = spec.GetArgument<::dali::TensorLayout>("output_layout");
    Require(layout == "HWC" || layout == "CHW", "output_layout = \"", layout, "\": allowed are \"HWC\" and \"CHW\"");
    channels_last = layout == "HWC";
  }

  int channels() const { return static_cast<int>(scale.size()); }
  int row_count() const { return static_cast<int>(bands.size()); }

  int block;   ///< side of a block of pixels
  int pixels;  ///< N = block²
  ::dali::DALIDataType dtype;
  bool channels_last;  ///< outputs are HWC, otherwise CHW
  std::vector<float> scale, shift;       ///< per color channel: 1 / std and -mean / std
  std::vector<std::vector<int>> groups;  ///< the rows of each output
  std::vector<int> bands;                ///< the band of each row
  std::vector<float> matrix;             ///< (N, N), row-major, indexed by band and pixel
  std::optional<Factors> factors;        ///< of `matrix`, if it is separable

 private:
  void ReadColors(const ::dali::OpSpec &spec) {
    const auto mean = spec.GetRepeatedArgument<float>("mean");
    const auto std = spec.GetRepeatedArgument<float>("std");
    Require(!mean.empty() && mean.size() == std.size(), "mean has ", mean.size(), " and std ", std.size(),
            " entries: both need one per color channel");
    for (size_t c = 0; c < std.size(); c++) {
      Require(std[c] > 0 && std::isfinite(std[c]), "std[", c, "] = ", std[c], ": must be positive");
      scale.push_back(1 / std[c]);
      shift.push_back(-mean[c] / std[c]);
    }
  }

  void ReadGroups(const ::dali::OpSpec &spec) {
    matrix = spec.GetRepeatedArgument<float>("matrix");
    Require(matrix.size() == size_t(pixels) * pixels, "matrix has ", matrix.size(), " entries: block = ", block,
            " needs ", pixels, " x ", pixels, " = ", pixels * pixels);
    groups = GroupsOf(spec);
    std::map<int, int> row_of_band;
    for (auto &group : groups) {
      for (int &band : group) {
        const auto [entry, is_new] = row_of_band.try_emplace(band, row_count());
        if (is_new) bands.push_back(band);
        band = entry->second;
      }
    }
    factors = FactorsOf(matrix, block);
  }
};

/// Base class of both backends: parses the arguments, checks the input and sets the output shapes.
/// Stateless, so pipelines with checkpointing accept the operator.
template <typename Backend>
class SpectralSplit : public ::dali::StatelessOperator<Backend> {
 public:
  explicit SpectralSplit(const ::dali::OpSpec &spec) : ::dali::StatelessOperator<Backend>(spec), plan_(spec) {}

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc> &outputs, const ::dali::Workspace &ws) override {
    const auto &input = ws.Input<Backend>(0);
    const int batch = input.num_samples();
    Require(batch == 0 || input.type() == DALI_UINT8,
            "the images are ", input.type(), ": must be uint8");
    Require(batch == 0 || input.sample_dim() == 3,
            "the images have ", input.sample_dim(), " axes: must have 3 (height, width, channels)");
    for (int i = 0; i < batch; i++) CheckImage(i, input.shape().tensor_shape(i));

    outputs.resize(plan_.groups.size());
    for (size_t g = 0; g < outputs.size(); g++) {
      outputs[g].type = plan_.dtype;
      outputs[g].shape.resize(batch, 3);
      for (int i = 0; i < batch; i++) {
        const auto side = input.shape().tensor_shape_span(i);
        const int64_t h = side[0] / plan_.block, w = side[1] / plan_.block;
        const int64_t channels = plan_.channels() * plan_.groups[g].size();
        outputs[g].shape.set_tensor_shape(i, plan_.channels_last ? ::dali::TensorShape<>{h, w, channels}
                                                                 : ::dali::TensorShape<>{channels, h, w});
      }
    }
    return true;
  }

  /// Labels the outputs HWC or CHW.
  void SetOutputLayouts(::dali::Workspace &ws) const {
    for (int g = 0; g < ws.NumOutput(); g++) ws.Output<Backend>(g).SetLayout(plan_.channels_last ? "HWC" : "CHW");
  }

  /// The argument `mirror` of each sample; nonzero means flip.
  std::vector<int> Mirror(const ::dali::Workspace &ws, int batch) const {
    std::vector<int> mirror;
    ::dali::GetPerSampleArgument(mirror, "mirror", this->spec_, ws, batch);
    return mirror;
  }

  const Plan plan_;

 private:
  void CheckImage(int sample, const ::dali::TensorShape<> &shape) const {
    Require(shape[2] == plan_.channels(), "sample ", sample, " of shape ", shape, " has ", shape[2],
            " channels: mean and std have ", plan_.channels(), " entries");
    Require(shape[0] % plan_.block == 0 && shape[1] % plan_.block == 0, "sample ", sample, " of shape ", shape,
            ": block = ", plan_.block, " does not divide its height and width");
  }
};

}  // namespace bandsplit

#endif  // BANDSPLIT_NATIVE_SPECTRAL_SPLIT_H_
