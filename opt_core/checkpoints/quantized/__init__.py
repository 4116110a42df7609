"""Weights that other libraries, or we, quantised: read tensor by tensor, and written."""
