"""Broken and hostile checkpoints, each made from a sound one by a function of its folder."""

from tests.support.hostile import folders, groups, messages, pickles
from tests.support.hostile.cases import CORPUS, FILES, MEMORY, SECONDS, used

PARTS = (folders, groups, messages, pickles)
"""The modules that add their cases to the corpus when they are imported."""

__all__ = ["CORPUS", "FILES", "MEMORY", "SECONDS", "used"]
