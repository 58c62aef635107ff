"""Kernels that the notebooks read, run and measure; the fast ones are in `pallas_flash`."""
