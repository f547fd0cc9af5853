"""transition: a DenseNet's normalisation, activation, pooling and 1x1 convolution in evaluation, in one pass, and the
normalisation, activation and maximum behind its stem. Internal operators with CPU kernels (csrc/transition)."""
