"""Cases of the sizes that GPUs are for: several waves of blocks, more than 48 KiB of shared memory, long loops."""

from dnl_kernels.testing import dense_conv2d, dense_linear, dense_sum, dnl_block, dnl_layer, named, nonlocal_attention

SUMS = {
    "images": dense_sum.Case((16, 96, 56, 56), 24, 1),
    "tokens": dense_sum.Case((8, 2048, 768), 12, -1),
    "one-weight": dense_sum.Case((8, 2048, 768), 48),
    "seven": dense_sum.Case((128, 512, 7, 7), 16, 1),
}
LINEAR = {
    "tokens": dense_linear.Case((8, 1024), (256, 128, 128, 128), 384),
    "many-states": dense_linear.Case((3, 777), (48,) * 24, 96),
}
CONVOLUTIONS = {
    "densenet121-3x3": dense_conv2d.Case(16, (128,), 28, 28, 32, bias=False),
    "densenet121-1x1": dense_conv2d.Case(8, (64, 32, 32, 32), 28, 28, 32, size=1, bias=False),
    # Forward above 48 KiB, in 35 x 35 with 32 outputs; 47.6 KiB beside the tables in the backward of 14 x 14 and 6.
    "above-48-KiB": dense_conv2d.Case(8, (24, 12), 35, 35, 32),
    "above-48-KiB-with-the-tables": dense_conv2d.Case(64, (12, 6), 14, 14, 6),
    # More tiles than kConvPartialRows: the persistent loop of the backward kernel goes around again.
    "second-trip": dense_conv2d.Case(600, (6, 6), 32, 32, 6),
    "many-states": dense_conv2d.Case(8, (12, *(6,) * 40), 16, 16, 6),
    "widest-row": dense_conv2d.Case(2, (5,), 70, 128, 24),
}
_ATTENDS = dnl_layer.Case((16, 16), (16,) * 4, 16, size=1, kernel="softmax", preactivation=True, batch=300)
LAYERS = {
    "above-48-KiB": _ATTENDS,
    "gaussian": _ATTENDS._replace(kernel="gaussian", output_norm=True),
    "dot": _ATTENDS._replace(kernel="dot", residual=True),
    "tokens": dnl_layer.Case((352,), (8, 8), 8, kernel="softmax", heads=2, skip=True, activation="silu", batch=64),
    "many-states": _ATTENDS._replace(positions=(8, 8), channels=(6,) * 60, heads=2),
    "local": dnl_layer.Case((32, 32), (16,) * 4, 16, preactivation=True, batch=16),
}


def _dense(layers):
    return tuple((True,) * (layer + 1) for layer in range(layers))


def block(layers, growth, positions, batch, channels=12, **options):
    config = {"in_channels": channels, "num_layers": layers, "growth_rate": growth, "connectivity": _dense(layers)}
    return dnl_block.Case(dnl_block._config(**config, **options), positions, batch)


BLOCKS = {
    "paper": block(16, 6, (32, 32), 16, training=True),
    "paper-eval": block(16, 6, (32, 32), 16),
    "bottleneck": block(6, 32, (28, 28), 4, 64, bottleneck=4, training=True),
    "softmax": block(4, 16, (16, 16), 8, 16, affine="conv1x1", kernel="softmax", heads=2, head_dim=8, training=True),
}
# For the resident kernel, which has no gradients: a tile of one image and of several, every width of its filters, more
# than 48 KiB, and in float32 more than the 99 KiB of the smallest GPU.
RESIDENT = {
    "8x8": block(16, 6, (8, 8), 300),
    "14x14": block(8, 6, (14, 14), 40),
    "16x16": block(8, 12, (16, 16), 33, norm=None, activation="silu"),
    "32x32": block(2, 6, (32, 32), 40),
    "wide": block(3, 24, (9, 7), 5),
    "pointwise": block(8, 16, (8, 8), 17, affine="conv1x1"),
    "paper-order": block(6, 8, (12, 16), 21, preactivation=False, activation="tanh", tau=0.25),
}
ATTENTION = {
    "long": nonlocal_attention.Case(2, 2, 4096, 4096, 64, 64),
    "causal": nonlocal_attention.Case(2, 3, 2049, 2049, 128, 96, {"causal": True}),
    "channels-first": nonlocal_attention.Case(4, 1, 56 * 56, 56 * 56, 32, 32, {"layout": "channels_first"}),
    "masked": nonlocal_attention.Case(3, 2, 1000, 1531, 48, 80, mask=0.5),
    "widest": nonlocal_attention.Case(1, 2, 1024, 1024, 256, 256),
}


def _bound(make, cases):
    return {name: lambda dtype, case=case: make(case, dtype) for name, case in cases.items()}


CALLS = {
    "dense_sum": _bound(named._dense_sum, SUMS),
    "dense_linear": _bound(named._dense_linear, LINEAR),
    "dense_conv2d": _bound(named._dense_conv2d, CONVOLUTIONS),
    "dnl_layer": _bound(named._dnl_layer, LAYERS),
    "dnl_block": _bound(named._dnl_block, BLOCKS),
    "nonlocal_attention": {
        f"{kernel}-{name}": make
        for kernel in ("softmax", "gaussian", "softmax-unnormalised")
        for name, make in _bound(named._nonlocal_attention(kernel), ATTENTION).items()
    },
}
