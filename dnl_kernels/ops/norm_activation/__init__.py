"""norm_activation: batch normalisation, the activation after it and the average pooling after that, of images.

An internal operator of the modules, with a CPU kernel; elsewhere PyTorch's own operators compute it.
"""
