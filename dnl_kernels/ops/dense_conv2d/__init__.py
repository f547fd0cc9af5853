"""dense_conv2d: a convolution over all earlier states, with the normalise-activate prologue of a DenseNet layer."""
