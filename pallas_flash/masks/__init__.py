"""Masks: one file each, combined with ``&``, ``|`` and ``~``."""

from pallas_flash.masks.causal import Causal
from pallas_flash.masks.dense import DenseMask
from pallas_flash.masks.lengths import KvLengths, QLengths
from pallas_flash.masks.mask import And, BlockKind, Mask, Not, Or
from pallas_flash.masks.sliding_window import SlidingWindow

__all__ = [
    "And",
    "BlockKind",
    "Causal",
    "DenseMask",
    "KvLengths",
    "Mask",
    "Not",
    "Or",
    "QLengths",
    "SlidingWindow",
]
