"""Sparse autoencoders: load, save, evaluate."""
