"""Exact attention for JAX on NVIDIA GPUs: FlashAttention-2 as Pallas kernels."""

from pallas_flash.api import (
    dot_product_attention,
    explain_backends,
    flash_attention,
    flash_attention_with_lse,
)
from pallas_flash.masks import Causal, DenseMask, KvLengths, Mask, QLengths, SlidingWindow
from pallas_flash.scores import Bias, Chain, ScoreMod, Softcap

__all__ = [
    "Bias",
    "Causal",
    "Chain",
    "DenseMask",
    "KvLengths",
    "Mask",
    "QLengths",
    "ScoreMod",
    "SlidingWindow",
    "Softcap",
    "dot_product_attention",
    "explain_backends",
    "flash_attention",
    "flash_attention_with_lse",
]
