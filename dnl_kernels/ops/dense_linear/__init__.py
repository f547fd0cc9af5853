"""dense_linear: the dense accumulation of tokens."""
