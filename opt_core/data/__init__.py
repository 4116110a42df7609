"""Data for training: read, cleaned, tokenised, in blocks and in batches."""
