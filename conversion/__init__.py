"""What goes beyond one backend: describing checkpoints, comparing models. Loads no framework."""

from conversion.describe import Description, describe
from conversion.verify import Report, verify

__all__ = ["Description", "Report", "describe", "verify"]
