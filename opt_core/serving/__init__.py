"""Continuous batching, as far as it needs no framework: rows that come and go at any step."""
