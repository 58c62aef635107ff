"""Generation: caches of keys and values, and attention of the newest queries over them."""

from pallas_flash.decoding.attention import decode_attention, explain_decode
from pallas_flash.decoding.cache import KVCache
from pallas_flash.decoding.paged_cache import PagedKVCache

__all__ = ["KVCache", "PagedKVCache", "decode_attention", "explain_decode"]
