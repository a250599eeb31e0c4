"""Writes and verifies the FFCV betons that training reads."""
