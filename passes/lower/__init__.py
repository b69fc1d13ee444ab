"""Target-neutral form to the kernels of one target."""
