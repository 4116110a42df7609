"""Tensors on their way from one file to another, one at a time."""
