// Evaluated normalisations folded into the numbers next to them, in double, and the cutting of work into tasks.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/torch.h"

namespace dnl {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Vectors of a layer, in double, absent ones filled.
inline std::vector<double> vector_of(const std::optional<Tensor>& t, int64_t size, double fill) {
  if (!t.has_value()) return std::vector<double>(size, fill);
  DNL_CHECK(t->numel() == size, "a vector of the wrong size");
  if (t->scalar_type() == ScalarType::Float && t->is_contiguous()) {
    const float* data = static_cast<const float*>(t->const_data_ptr());
    return std::vector<double>(data, data + size);
  }
  const Tensor wide = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Double));
  const double* data = static_cast<const double*>(wide.data_ptr());
  return std::vector<double>(data, data + size);
}

// act(scale * x + shift) of an evaluated normalisation
struct Folded {
  std::vector<double> scale, shift;

  Folded(bool norm, double eps, int64_t size, const std::optional<Tensor>* tensors) {  // gamma, beta, mean, var
    scale = vector_of(norm ? tensors[0] : std::nullopt, size, 1);
    shift = vector_of(norm ? tensors[1] : std::nullopt, size, 0);
    if (!norm || !tensors[2].has_value()) return;
    const std::vector<double> mean = vector_of(tensors[2], size, 0), var = vector_of(tensors[3], size, 1);
    for (int64_t c = 0; c < size; c++) {
      scale[c] /= std::sqrt(var[c] + eps);
      shift[c] -= mean[c] * scale[c];
    }
  }
};

// How many of `least` pieces or more each thread gets the same number of; `count` numbers are to be shared out.
inline int64_t pieces_of(int64_t count, int64_t largest, int64_t smallest, int64_t threads) {
  const int64_t least = (count + largest - 1) / largest, most = std::max<int64_t>(1, count / smallest);
  return least >= 8 * threads ? least : std::max(least, std::min(most, round_up(least, threads)));
}

}  // namespace dnl
