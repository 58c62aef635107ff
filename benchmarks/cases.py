"""What is measured: attention problems, in suites."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; its fields open every row of a result file."""

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        """Batch x length x heads x head_dim; a slash where queries and keys, or values, differ."""
        length = _both(self.q_len, self.kv_len)
        heads = _both(self.num_q_heads, self.num_kv_heads)
        dim = _both(self.head_dim, self.value_dim)
        mask = "causal" if self.causal else "full"
        return f"{self.batch}x{length}x{heads}x{dim}-{mask}-{self.dtype}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of q, k, v and dout."""
        return [
            (self.batch, self.q_len, self.num_q_heads, self.head_dim),
            (self.batch, self.kv_len, self.num_kv_heads, self.head_dim),
            (self.batch, self.kv_len, self.num_kv_heads, self.value_dim),
            (self.batch, self.q_len, self.num_q_heads, self.value_dim),
        ]

    @property
    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """The same arrays without data, for tracing."""
        return [jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in self.shapes]

    @property
    def flops(self) -> dict[str, float]:
        """Useful floating point operations: two products forward, five backward."""
        pairs = self.batch * self.num_q_heads * self.q_len * self.kv_len
        forward = 2.0 * pairs * (self.head_dim + self.value_dim) * (0.5 if self.causal else 1.0)
        return {"fwd": forward, "bwd": 2.5 * forward, "fwd_bwd": 3.5 * forward}


def _both(a: int, b: int) -> str:
    return str(a) if a == b else f"{a}/{b}"


def square(batch: int, length: int, heads: int, head_dim: int, causal: bool, **changes) -> Case:
    """A case with as many keys as queries and key heads as query heads, but for `changes`."""
    fields = {
        "batch": batch,
        "q_len": length,
        "kv_len": length,
        "num_q_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "causal": causal,
    }
    return Case(**(fields | changes))


# Queries and channels of every case of the grid, as in the FlashAttention papers.
TOKENS = 16384
CHANNELS = 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)


def _grid() -> list[Case]:
    return [
        square(TOKENS // length, length, CHANNELS // head_dim, head_dim, causal)
        for head_dim, causal, length in itertools.product(HEAD_DIMS, (True, False), LENGTHS)
    ]


def _beyond() -> list[Case]:
    groups = [square(b, t, 32, 128, True, num_kv_heads=8) for b, t in ((4, 4096), (1, 16384))]
    dims = [
        square(4, 4096, 16, head_dim, causal, value_dim=value_dim)
        for head_dim, value_dim in ((80, 80), (96, 96), (192, 192), (192, 128))
        for causal in (True, False)
    ]
    lengths = [
        square(round(TOKENS / length), length, 16, 128, causal)
        for length in (1000, 3000, 4095)
        for causal in (True, False)
    ]
    unequal = [
        square(4, q_len, 16, 128, False, kv_len=kv_len)
        for q_len, kv_len in ((1024, 4096), (4096, 1024))
    ]
    dtypes = [
        square(4, 4096, 16, 128, causal, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for causal in (True, False)
    ]
    return groups + dims + lengths + unequal + dtypes


def _startup() -> list[Case]:
    """Shapes of no other suite, so that nothing of theirs is compiled yet."""
    return [
        square(2, 2560, CHANNELS // d, d, causal) for d in HEAD_DIMS for causal in (True, False)
    ]


SUITES = {"grid": _grid, "beyond": _beyond, "startup": _startup}
