"""CUDA C++ kernels for sm_90: what only wgmma, TMA and warp specialisation reach."""
