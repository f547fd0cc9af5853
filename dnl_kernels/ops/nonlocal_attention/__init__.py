"""nonlocal_attention: averages of values with softmax, Gaussian, dot-product or Kronecker weights."""
