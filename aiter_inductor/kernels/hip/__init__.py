"""HIP kernels: one source each for AMD and NVIDIA chips and, for debugging, the host."""
