"""Quantizers: affine, codebook, packing. Each file can be copied alone."""
