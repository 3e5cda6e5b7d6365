"""Kernels of the vendors' libraries, as torch offers them, in the layouts that those take."""
