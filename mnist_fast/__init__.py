"""Trains a 7,640-parameter convolutional network on MNIST, from a laptop to a cluster."""
