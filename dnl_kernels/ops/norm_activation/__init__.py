"""norm_activation: batch normalisation, the activation after it and the average pooling after that, of images."""
