"""Exact attention for JAX on NVIDIA GPUs: FlashAttention-2 as Pallas kernels."""

from pallas_flash.api import (
    dot_product_attention,
    explain_backends,
    flash_attention,
    flash_attention_with_lse,
)
from pallas_flash.decoding import KVCache, PagedKVCache, decode_attention, explain_decode
from pallas_flash.dropout import Dropout
from pallas_flash.masks import (
    Causal,
    ChunkedCausal,
    DenseMask,
    KvLengths,
    Mask,
    MaskMod,
    PrefixLM,
    QLengths,
    SegmentIds,
    SlidingWindow,
    segment_ids_from_cu_seqlens,
)
from pallas_flash.scores import (
    Alibi,
    Bias,
    Chain,
    DistanceBias,
    RelativeBias,
    ScoreFunction,
    ScoreMod,
    Sink,
    Softcap,
    alibi_slopes,
)

__all__ = [
    "Alibi",
    "Bias",
    "Causal",
    "Chain",
    "ChunkedCausal",
    "DenseMask",
    "DistanceBias",
    "Dropout",
    "KVCache",
    "KvLengths",
    "Mask",
    "MaskMod",
    "PagedKVCache",
    "PrefixLM",
    "QLengths",
    "RelativeBias",
    "ScoreFunction",
    "ScoreMod",
    "SegmentIds",
    "Sink",
    "SlidingWindow",
    "Softcap",
    "alibi_slopes",
    "decode_attention",
    "dot_product_attention",
    "explain_backends",
    "explain_decode",
    "flash_attention",
    "flash_attention_with_lse",
    "segment_ids_from_cu_seqlens",
]
