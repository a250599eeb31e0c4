"""Code of our own for CPUs and large GPUs, its compilers, and what is passed to it."""
