"""The release."""

__version__ = "1.0.0"
