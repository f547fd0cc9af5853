"""dense_sum: a weighted sum over the earlier states."""
