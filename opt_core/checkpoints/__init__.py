"""Checkpoints on disk: found, compared with the configuration, streamed in, and written."""
