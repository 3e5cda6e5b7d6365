"""Kernels for the CPU in C++: no headers of torch, built by the host's compiler on first use."""
