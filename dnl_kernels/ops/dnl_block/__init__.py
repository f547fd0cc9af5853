"""dnl_block: all layers of a dense non-local block as one operator."""
