"""Trains a 7,640-parameter convolutional network on MNIST, from a laptop to a cluster."""

import os

# Before torch is loaded: its OpenMP threads else spin for some 15 ms before they sleep. Where other
# programs want the cores too, a step then waits for threads that wait for a core: it took 5 to 7
# times as long, on two cores under a load of 6.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
