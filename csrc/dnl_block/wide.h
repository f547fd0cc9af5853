// The backward pass of a block of wide 3 x 3 layers without normalisation (RDB, RDN): layer by layer from the last one,
// in Winograd's form. Forward: Forward::run_wide in cpu.cpp.
#pragma once
#include "common/winograd_host.h"
#include "dnl_block/block.h"

namespace dnl {

// The channels that layer l reads, with act(scale * x + shift) before their filters (nullptr: 1 and 0).
template <class T>
std::vector<WideInput<T>> wide_inputs(const BlockShape& s, int64_t l, Planes<const T> states, const T* scale,
                                      const T* shift) {
  std::vector<WideInput<T>> found;
  int64_t channel = 0;
  for (const Span& span : s.spans(l)) {
    found.push_back({at(states, 0, span.first), span.channels, scale ? scale + channel : nullptr,
                     shift ? shift + channel : nullptr, s.preactivation ? s.activation : kIdentity});
    channel += span.channels;
  }
  return found;
}

// total: the gradients of all states, at first those of the block's result; at the end those of x_0 are left in it.
template <class T>
void backward_wide(const BlockShape& s, const BlockTensors<T>& t, Planes<const T> states, Planes<const T> outputs,
                   Planes<T> total, T* dweight, T* dbias) {
  const TileGrid grid{s.batch, s.height, s.width};
  const int64_t pixels = s.height * s.width;
  for (int64_t l = s.layers - 1; l >= 0; l--) {
    const Planes<T> dy = at(total, 0, s.state_first(l + 1));
    // Through the activation behind the layer, in place, and the bias.
    parallel_tasks(0, s.growth, 1, [&](int64_t o, int64_t) {
      double sums[2] = {};
      for (int64_t b = 0; b < s.batch; b++) {
        T* g = at(dy, b, o).data;
        const T* y = s.preactivation ? g : at(outputs, b, l * s.growth + o).data;
        DNL_ISA_CALL(activate_back_run<T>(g, y, pixels, T(1), T(0), T(0), s.preactivation ? kIdentity : s.activation,
                                          false, g, sums));
      }
      if (dbias) dbias[l * s.growth + o] = static_cast<T>(sums[0]);
    });
    const std::vector<WideInput<T>> inputs = wide_inputs<T>(s, l, states, nullptr, nullptr);
    const Planes<const T> from{dy.data, dy.image_stride, dy.channel_stride};
    weight_gradient_wide(grid, inputs, from, s.growth, s.tau, dweight + s.weight_offset(l));
    int64_t channel = 0;
    for (const Span& span : s.spans(l)) {
      const std::vector<T> filters = wide_filters_back(t.weight + s.weight_offset(l), s.growth, s.layer_channels(l),
                                                       channel, span.channels, s.tau);
      const std::vector<WideInput<T>> gradient{{from, s.growth, nullptr, nullptr, kIdentity}};
      convolve_wide(grid, gradient, filters.data(), span.channels,
                    [&](int64_t, int64_t c, int64_t image, int64_t row, int64_t x, int64_t n, const T* sums) {
                      const int64_t pixel = row * s.width + x, at_channel = span.first + c;
                      double unused[2] = {};
                      DNL_ISA_CALL(activate_back_run<T>(sums, at(states, image, at_channel).data + pixel, n, T(1), T(0),
                                                        T(0), s.preactivation ? s.activation : kIdentity, true,
                                                        at(total, image, at_channel).data + pixel, unused));
                    });
      channel += span.channels;
    }
  }
}

}  // namespace dnl
