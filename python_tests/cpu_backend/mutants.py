"""What python_tests/cpu_backend/mutations.py breaks: the lines of the C++ kernels, and of the Python around them."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """The expression `old`, which occurs once in `file`, becomes `new`; a test of `tests` (a file of python_tests/ops)
    that `selected` (pytest's -k) chooses must fail."""

    file: str
    kind: str
    old: str
    new: str
    tests: str
    selected: str = ""


# A factor that is wrong by a little in the type T.
OFF = "(sizeof(T) == 4 ? T(1.00002) : T(1 + 1e-10))"
BLOCK, REVERSE = "csrc/dnl_block/cpu_kernel.cpp", "csrc/dnl_block/backward.h"
CONV, CONV_HOST = "csrc/common/cpu_kernel_conv.cpp", "csrc/dense_conv2d/cpu.cpp"
FORWARD, BACKWARD = "csrc/nonlocal_attention/cpu_kernel_fwd.cpp", "csrc/nonlocal_attention/cpu_kernel_bwd.cpp"
TILES, HOST = "csrc/nonlocal_attention/tiles.h", "csrc/nonlocal_attention/host.h"
SUM, SUM_HOST = "csrc/dense_sum/cpu_kernel.cpp", "csrc/dense_sum/cpu.cpp"
LAYER, NORM = "csrc/dnl_layer/cpu.cpp", "csrc/norm_activation/cpu.cpp"
ACTIVATION, PARALLEL = "csrc/common/activation.h", "csrc/common/parallel.h"
LINEAR, TILED = "dnl_kernels/ops/dense_linear/cpu.py", "dnl_kernels/ops/nonlocal_attention/tiled.py"
BOTTLENECK, TRANSITION = "csrc/dnl_bottleneck/cpu_kernel.cpp", "csrc/transition/cpu_kernel.cpp"
WINOGRAD = "csrc/common/cpu_kernel_winograd.cpp"
TRAINED, BACK = "csrc/dnl_bottleneck/cpu_kernel_training.cpp", "csrc/dnl_bottleneck/backward.h"
TRAINING, STEP = "test_dnl_bottleneck_training.py", "csrc/dnl_bottleneck/training.h"
BLOCKS, ZERO = "test_dnl_block_cpu.py", "zero"
IMAGES = "instruction_set and (densenet or leaky or paper)"

MUTATIONS = [
    # dnl_block
    Mutation(BLOCK, "tail", "kNarrow || column + lanes <= width", "kNarrow || column + lanes <= width + 1",
             "test_widths.py", "dnl_block"),
    Mutation(BLOCK, "tail", "row >= v.rows", "row >= v.rows - 1", "test_widths.py", "dnl_block"),
    Mutation(BLOCK, "window", "y < bottom ? row(y) : Vec<T>{}", "y + 1 < bottom ? row(y) : Vec<T>{}",
             "test_widths.py", "dnl_block"),
    Mutation(BLOCK, "zero", "u * s + h > Vec<T>{}", "u * s + h >= Vec<T>{}", BLOCKS, ZERO),
    Mutation(BLOCK, "term", "q * (u * r1 + r0)", "q * (u * r1)", BLOCKS, IMAGES),
    Mutation(BLOCK, "window", "g + lead > 0", "g + lead > 1", BLOCKS, "every_shape"),
    Mutation(BLOCK, "window", "g + 1 < groups + trail", "g + 2 < groups + trail", BLOCKS, "every_shape"),
    Mutation(BLOCK, "term", "first_lanes<T>(q * slope, left)", "first_lanes<T>(q, left)", BLOCKS, IMAGES),
    Mutation(BLOCK, "term", "bk * (read(v.plane(x, image, k) + p) - mk)", "bk * read(v.plane(x, image, k) + p)",
             BLOCKS, IMAGES),
    Mutation(BLOCK, "tail", "column + kLanes<T> >= v.width", "column + kLanes<T> > v.width", "test_widths.py",
             "dnl_block"),
    Mutation(BLOCK, "term", "moment += q * u", "moment += q", BLOCKS, IMAGES),
    Mutation(REVERSE, "little", "g_.beta[pair] = static_cast<T>(plain)",
             f"g_.beta[pair] = static_cast<T>(plain) * {OFF}", BLOCKS, IMAGES),
    Mutation(REVERSE, "little", "static_cast<T>(found[i * s_.growth + o] * s_.tau)",
             f"static_cast<T>(found[i * s_.growth + o] * s_.tau * {OFF})", BLOCKS, IMAGES),
    Mutation(REVERSE, "statistics", "mean_moment_[c] += gamma * moment / elements",
             "mean_moment_[c] += gamma * moment / (elements - 1)", BLOCKS, IMAGES),
    Mutation(REVERSE, "piece", "s += sums[chunk * row + i]",
             "s += chunk + 1 < chunks_ || chunks_ == 1 ? sums[chunk * row + i] : 0.0", BLOCKS, IMAGES),
    Mutation(REVERSE, "piece", "sum[i] += part[i]", "sum[i] += chunk + 1 < chunks_ || chunks_ == 1 ? part[i] : T(0)",
             BLOCKS, IMAGES),
    Mutation(REVERSE, "term", "c_[k] = static_cast<T>(-scale * mean_plain_[k])", "c_[k] = T(0)", BLOCKS, IMAGES),
    Mutation(REVERSE, "piece", "sum += bias_sums_[chunk * s_.growth + o]",
             "sum += chunk > 0 ? bias_sums_[chunk * s_.growth + o] : 0.0", BLOCKS,
             "instruction_set and (silu or eval)"),
    Mutation("csrc/dnl_block/cpu.cpp", "statistics", "sum.count > 0 ? sum.deviations / sum.count : 0.0",
             "sum.count > 1 ? sum.deviations / (sum.count - 1) : 0.0", BLOCKS, IMAGES),
    # nonlocal_attention
    Mutation(FORWARD, "scale", "t.sum.a * factor.a", "t.sum.a", "test_nonlocal_attention.py", "float64 and large"),
    Mutation(FORWARD, "little", "sum[i] == 0 ? T(0) : 1 / sum[i]", f"sum[i] == 0 ? T(0) : {OFF} / sum[i]",
             "test_nonlocal_attention.py", "float64 and odd"),
    Mutation(FORWARD, "term", "t.sum.a + sum.a", "sum.a", "test_nonlocal_attention.py", "float64 and several"),
    Mutation(TILES, "tail", "broadcast(T(j)) < load(of + vector * kLanes<T>)",
             "broadcast(T(j + 1)) < load(of + vector * kLanes<T>)", "test_widths.py", "attention and keys"),
    Mutation(TILES, "window", "smaller(query + i + 1, total)", "smaller(query + i, total)",
             "test_nonlocal_attention.py", "float64 and causal"),
    Mutation(TILES, "term", "before.a + sum[f].a", "sum[f].a", "test_nonlocal_attention.py", "float64 and several"),
    Mutation(BACKWARD, "term", "(d.a - drift.a) * weight.a", "d.a * weight.a", "test_nonlocal_attention.py",
             "float64 and odd"),
    Mutation(BACKWARD, "term", "dk[d] -= column * k[d * kKeys]", "dk[d] -= 0 * k[d * kKeys]",
             "test_nonlocal_attention.py", "float64 and odd"),
    Mutation(BACKWARD, "little", "x.a * of_sum", f"x.a * of_sum * broadcast({OFF})", "test_nonlocal_attention.py",
             "float64 and odd"),
    Mutation(BACKWARD, "little", "sum == 0 ? T(0) : 1 / sum", f"sum == 0 ? T(0) : {OFF} / sum",
             "test_nonlocal_attention.py", "float64 and odd"),
    Mutation(BACKWARD, "piece", "sum[i] += from[part * stride + i]",
             "sum[i] += part + 1 < p.parts ? from[part * stride + i] : T(0)", "test_nonlocal_attention.py",
             "float64 and several"),
    Mutation(HOST, "little", "-2 / (kLog2E * p.bandwidth[h])", "-2 * (1 + 1e-10) / (kLog2E * p.bandwidth[h])",
             "test_nonlocal_attention.py", "test_float64 and gaussian"),
    # A row's deltas sum to rounding, so that this is about accuracy alone.
    Mutation(HOST, "rounding", "moment - row * typical", "moment + row * typical", "test_nonlocal_attention.py",
             "mostly_themselves"),
    Mutation(HOST, "piece", "row += at[0], moment += at[1], mean += at[2]",
             "(part ? (row += at[0], moment += at[1], mean += at[2]) : mean)", "test_nonlocal_attention.py",
             "float64 and gaussian"),
    Mutation(TILED, "term", "total[i] + gradient", "total[i] - gradient", "test_nonlocal_attention.py", "create_graph"),
    # dense_conv2d
    Mutation(CONV, "window", "tile.row - r > 0 ? tile.row - r : 0", "tile.row > 0 ? tile.row : int64_t(0)",
             "test_dense_conv2d.py", "float64 and bands"),
    Mutation(CONV, "zero", "load(value.data + o * value.stride + at) <= Vec<T>{}",
             "load(value.data + o * value.stride + at) < Vec<T>{}", "test_dense_conv2d.py", ZERO),
    Mutation(CONV, "term", "g * load(u.data + o * u.stride + at)", "g + 0 * load(u.data + o * u.stride + at)",
             "test_dense_conv2d.py", "float64 and seven"),
    Mutation(CONV, "tail", "first_lanes<T>(g, span - p)", "first_lanes<T>(g, span - p - 1)", "test_widths.py",
             "dense_conv2d"),
    Mutation(CONV_HOST, "piece", "w += partial[chunk * filters + s * p.outputs + o]",
             "w += chunk + 1 < chunks ? partial[chunk * filters + s * p.outputs + o] : T(0)", "test_dense_conv2d.py",
             "float64 and seven"),
    Mutation(CONV_HOST, "statistics", "sum[2 * p.channels + o] += mean * pixels",
             "sum[2 * p.channels + o] += mean * (pixels - 1)", "test_dense_conv2d.py", "float64 and seven"),
    Mutation(CONV_HOST, "term", "bias && channel == 0 ? bias + o : nullptr", "bias ? bias + o : nullptr",
             "test_dense_conv2d.py", "float64 and seven"),
    Mutation(CONV_HOST, "little", "static_cast<T>(w * p.scale)", f"static_cast<T>(w * p.scale * {OFF})",
             "test_dense_conv2d.py", "float64 and seven"),
    # norm_activation
    Mutation(NORM, "statistics", "count > 0 ? deviations / count : 0.0", "count > 1 ? deviations / (count - 1) : 0.0",
             "test_norm_activation.py", "every_gradient and measured"),
    Mutation(CONV, "term", "g * (x - m)", "g * x", "test_norm_activation.py", "every_gradient"),
    Mutation(CONV, "term", "rate * (x[p] - centre) + constant", "rate * (x[p] - centre)", "test_norm_activation.py",
             "every_gradient and measured"),
    Mutation(CONV, "window", "alone ? T(0.5) : T(0.25)", "T(0.25)", "test_norm_activation.py",
             "every_gradient and ceil"),
    Mutation(CONV, "window", "2 * y + 1 < height ? above + width : above", "above", "test_norm_activation.py",
             "every_gradient and ceil"),
    Mutation(CONV, "tail", "n ? total([](Vec<T> v) { return v; }) / n : 0.0",
             "n ? total([](Vec<T> v) { return v; }) / (n - n % lanes + lanes) : 0.0", "test_widths.py", "statistics"),
    Mutation(ACTIVATION, "zero", "zero < z ? one : zero", "zero <= z ? one : zero", "test_norm_activation.py", ZERO),
    # dnl_bottleneck
    Mutation(TRAINED, "tail", "p + i < count", "p + i + 1 < count", TRAINING, "float64-odd"),
    Mutation(TRAINED, "tail", "first_lanes<T>(load(back + i) * slope, left)", "load(back + i) * slope", TRAINING,
             "float64-odd"),
    Mutation(TRAINED, "term", "rate * (load(layer.y + at) - mean) + constant", "constant", TRAINING, "float64-odd"),
    Mutation("csrc/dnl_bottleneck/tiles.h", "window", "left + 4 <= maps.width", "left + 3 <= maps.width", TRAINING,
             "float64-odd"),
    Mutation(BACK, "little", "moment * a.rate", f"moment * a.rate * {OFF}", TRAINING, "float64-odd"),
    Mutation(BACK, "piece", "inner_sums_[chunk * 2 * wide + o]",
             "(chunk > 0 || tile_chunks_ == 1 ? inner_sums_[chunk * 2 * wide + o] : 0.0)", TRAINING, "many_pixels"),
    Mutation(BACK, "statistics", "-r * plain_[channel]", "-r * 0 * plain_[channel]", TRAINING, "float64-odd"),
    Mutation(STEP, "statistics", "square[c] + offset * (2 * plain[c] + weight * offset)", "square[c]", TRAINING,
             "many_pixels"),
    Mutation(STEP, "order", "pieces_by_size(s_.pixels, kBottleneckPanel)",
             "pieces_by_size(s_.pixels, kBottleneckPanel / free_threads())", TRAINING, "number_of_threads"),
    # dense_sum
    Mutation(SUM_HOST, "piece", "sum += partial[c * rows + r]", "sum += c + 1 < kChunks ? partial[c * rows + r] : T(0)",
             "test_dense_sum.py", "float64 and longer"),
    Mutation(SUM, "tail", "s += a[i] * b[i]", "s += T(0) * a[i]", "test_widths.py", "dense_sum"),
    Mutation(SUM, "term", "accumulate || first > 0", "accumulate", "test_dense_sum.py", "several_sums"),
    Mutation(SUM, "little", "load(dy + i) * broadcast(scale)", f"load(dy + i) * broadcast(scale * {OFF})",
             "test_dense_sum.py", "float64"),
    # dnl_layer
    Mutation(LAYER, "term", "to[n] += from[n]", "to[n] += T(0) * from[n]", "test_dnl_layer_cpu.py",
             "float64 and gaussian"),
    Mutation(LAYER, "statistics", "bias[o] += mean * n", "bias[o] += mean * (n - 1)", "test_dnl_layer_cpu.py",
             "float64 and biases"),
    Mutation(LAYER, "piece", "s += from[chunk * row + i]",
             "s += chunk + 1 < chunks ? double(from[chunk * row + i]) : 0", "test_dnl_layer_cpu.py",
             "float64 and softmax"),
    Mutation(LAYER, "order", "std::min(count(), kChunks)", "std::min(count(), free_threads())", "test_threads.py",
             "dnl_layer"),
    Mutation(LAYER, "term", "std::copy_n(given.data, G * length, dsource.data)",
             "std::fill_n(dsource.data, G * length, T(0))", "test_dnl_layer_cpu.py", "float64 and residual"),
    # parallel.h
    Mutation(PARALLEL, "piece", "first(s + 1)", "first(s + 1) - (s + 1 == shares)", "test_threads.py"),
    # dense_linear
    Mutation(LINEAR, "term", "dpre.sum(0)", "dpre[1:].sum(0)", "test_dense_linear.py", "float64"),
    Mutation(LINEAR, "term", "(dpre * x).sum(0)", "(dpre * pre).sum(0)", "test_dense_linear.py", "float64"),
    Mutation(LINEAR, "scale", "_joined(dweights).mul_(config.scale)", "_joined(dweights)",
             "test_dense_linear.py", "float64"),
    Mutation(LINEAR, "little", "torch.addmm(y, z, w.mT, alpha=config.scale)",
             "torch.addmm(y, z, w.mT, alpha=config.scale * (1.00002 if dtype == torch.float32 else 1 + 1e-10))",
             "test_dense_linear.py", "float64"),
    # dnl_bottleneck
    Mutation(BOTTLENECK, "tail", "maps.width - x < 2 * n ? maps.width - x : 2 * n",
             "maps.width - x < 2 * n ? maps.width - x - 1 : 2 * n", "test_dnl_bottleneck.py", "every_width"),
    Mutation(BOTTLENECK, "tail", "y + i < maps.height", "y + i + 1 < maps.height", "test_dnl_bottleneck.py",
             "every_width"),
    Mutation(BOTTLENECK, "piece", "part > 0", "part > 1", "test_dnl_bottleneck.py", "number_of_channels_on"),
    Mutation(BOTTLENECK, "zero", "relu && part + 1 == parts", "relu", "test_dnl_bottleneck.py",
             "number_of_channels_on"),
    Mutation(BOTTLENECK, "window", "(y + 1) * maps.row() + (x + 1) * maps.wide", "(y + 1) * maps.row() + x * maps.wide",
             "test_dnl_bottleneck.py", "every_width"),
    Mutation("csrc/dnl_bottleneck/cpu.cpp", "little", "inner.scale[o] * tau * double(w[o * l.channels + c])",
             f"inner.scale[o] * tau * double(w[o * l.channels + c]) * {OFF}", "test_dnl_bottleneck.py", "activation"),
    Mutation("csrc/dnl_bottleneck/cpu.cpp", "term", "inner.scale[o] * bias[o] + inner.shift[o]",
             "bias[o] + inner.shift[o]", "test_dnl_bottleneck.py", "activation"),
    Mutation("csrc/common/product.h", "term", "before(to, j) + sum[m][j]", "sum[m][j]",
             "test_dnl_bottleneck.py", "every_width"),
    # transition
    Mutation(TRANSITION, "tail", "runs[r].count", "runs[r].count - 1", "test_transition.py", "every_width"),
    Mutation(TRANSITION, "piece", "part > 0", "part > 1", "test_transition.py", "instruction_set"),
    Mutation(TRANSITION, "window", "2 * y + 1 < height", "2 * y + 2 < height", "test_transition.py", "max_pool_of"),
    Mutation(TRANSITION, "tail", "columns - c < lanes ? columns - c : lanes",
             "columns - c < lanes ? columns - c - 1 : lanes", "test_transition.py", "max_pool_of"),
    Mutation(TRANSITION, "term", "a == a ? known : a", "known", "test_transition.py", "finite"),
    # wide 3x3 convolutions
    Mutation(WINOGRAD, "window", "begins ? Vec<T>{} : before", "before", "test_wide_convolutions.py", "every_size"),
    Mutation(WINOGRAD, "window", "finishes ? Vec<T>{} : after", "after", "test_wide_convolutions.py", "every_size"),
    Mutation(WINOGRAD, "term", "load(p) + (m1 + m2)", "load(p) + m1", "test_wide_convolutions.py", "every_size"),
    Mutation(WINOGRAD, "window", "y < 0 || y >= height", "y < 0 || y > height", "test_wide_convolutions.py",
             "every_size"),
]  # fmt: skip
