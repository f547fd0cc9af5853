"""dnl_layer: sigma(N(y)) of the dense accumulation y."""
