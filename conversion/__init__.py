"""Describing, converting and comparing checkpoints across frameworks; loads none of them."""

from conversion.convert import Conversion, convert
from conversion.describe import Description, describe
from conversion.models import to_flax, to_tf, to_torch
from conversion.smoothquant import Smoothing, smooth
from conversion.verify import Report, verify

__all__ = [
    "Conversion",
    "Description",
    "Report",
    "Smoothing",
    "convert",
    "describe",
    "smooth",
    "to_flax",
    "to_tf",
    "to_torch",
    "verify",
]
