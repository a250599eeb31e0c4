"""Measurements that anyone can repeat; each is a program of its own."""
