"""The layer for code written for `transformers`: its names, over what this project computes.

Nothing here computes anything of a model, and nothing else depends on it but the classes that take
it in. What needs a framework is in the file `compatibility.py` of each backend.
"""
