"""Generation without a framework: settings, requests checked, drafts to speculate with."""

from opt_core.generation.config import GenerationConfig

__all__ = ["GenerationConfig"]
