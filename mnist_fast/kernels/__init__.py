"""Kernels of our own for CPUs and large GPUs, their arguments and their compilers."""
