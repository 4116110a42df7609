"""The layer for code written for `transformers`: what its OPT takes and gives, one idea a file.

The models call it where a user's script may come in; nothing in here computes anything of a model.
"""
