"""transition: a DenseNet's normalisation, activation, pooling and 1x1 convolution in evaluation, in one pass; the
normalisation, activation and maximum behind its stem, and the normalisation, activation and mean in front of its
classifier. Internal operators with CPU kernels (csrc/transition)."""
