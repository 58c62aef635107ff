"""Masks: one file each, combined with ``&``, ``|`` and ``~``."""

from pallas_flash.masks.causal import Causal
from pallas_flash.masks.chunked_causal import ChunkedCausal
from pallas_flash.masks.dense import DenseMask
from pallas_flash.masks.lengths import KvLengths, QLengths
from pallas_flash.masks.mask import And, BlockKind, Bounds, Mask, Not, Or
from pallas_flash.masks.mask_mod import MaskMod
from pallas_flash.masks.prefix_lm import PrefixLM
from pallas_flash.masks.segment_ids import SegmentIds, segment_ids_from_cu_seqlens
from pallas_flash.masks.sliding_window import SlidingWindow

__all__ = [
    "And",
    "BlockKind",
    "Bounds",
    "Causal",
    "ChunkedCausal",
    "DenseMask",
    "KvLengths",
    "Mask",
    "MaskMod",
    "Not",
    "Or",
    "PrefixLM",
    "QLengths",
    "SegmentIds",
    "SlidingWindow",
    "segment_ids_from_cu_seqlens",
]
