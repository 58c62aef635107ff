"""AttentionSpec and Operands: one request for attention, and the only check of user input."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from pallas_flash.dropout import Dropout, KeepBits
from pallas_flash.masks import Mask
from pallas_flash.scores import ScoreMod, Sink, split_sinks
from pallas_flash.terms import Axes, Tile, canonical, leaf_axes, map_operands

Q_AXES = ("batch", "q", "heads", "dim")
K_AXES = ("batch", "kv", "kv_heads", "dim")
V_AXES = ("batch", "kv", "kv_heads", "value_dim")
OUT_AXES = ("batch", "q", "heads", "value_dim")
LSE_AXES = ("batch", "heads", "q")


def describe(tree: Any) -> Any:
    """The same structure with ``jax.ShapeDtypeStruct`` in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a request.

    q: [B, Tq, Hq, D]; k: [B, Tkv, Hkv, D]; v: [B, Tkv, Hkv, Dv]; mask, score_mod, dropout: bound
    terms or None.
    """

    q: Any
    k: Any
    v: Any
    mask: Mask | None = None
    score_mod: ScoreMod | None = None
    dropout: KeepBits | None = None

    @property
    def axes(self) -> list[Axes]:
        """Named axes of the arrays, in the order of ``jax.tree.leaves``."""
        terms = (self.mask, self.score_mod, self.dropout)
        return [Q_AXES, K_AXES, V_AXES, *(axes for term in terms for axes in leaf_axes(term))]

    @property
    def differentiated(self) -> list[int]:
        """Which of ``jax.tree.leaves`` have gradients: q, k, v, the score mod's float arrays."""
        first = 3 + len(jax.tree.leaves(self.mask))
        of_mod = enumerate(jax.tree.leaves(self.score_mod), first)
        return [0, 1, 2, *(i for i, x in of_mod if jnp.issubdtype(x.dtype, jnp.floating))]

    @property
    def shared(self) -> set[int]:
        """Which of ``jax.tree.leaves`` mapped calls may share: those of mask and dropout.

        The score mod's arrays need a gradient for every mapped call.
        """
        masks = len(jax.tree.leaves(self.mask))
        mods, seeds = len(jax.tree.leaves(self.score_mod)), len(jax.tree.leaves(self.dropout))
        return {*range(3, 3 + masks), *range(3 + masks + mods, 3 + masks + mods + seeds)}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static in a request: sizes, dtype, scale and the structure of its terms.

    `mask`, `score_mod` and `dropout` hold ``jax.ShapeDtypeStruct`` in place of arrays.

    Raises:
      TypeError: if `deterministic` is not a bool.
    """

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    scale: float
    mask: Mask | None
    score_mod: ScoreMod | None
    dropout: KeepBits | None
    deterministic: bool = False

    def __post_init__(self):
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {self.deterministic!r}")

    @classmethod
    def of(cls, operands: Operands, scale: float, deterministic: bool = False) -> "AttentionSpec":
        """The spec of operands that have been checked."""
        batch, q_len, num_q_heads, head_dim = operands.q.shape
        _, kv_len, num_kv_heads, value_dim = operands.v.shape

        return cls(
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=operands.q.dtype,
            scale=scale,
            mask=describe(operands.mask),
            score_mod=describe(operands.score_mod),
            dropout=describe(operands.dropout),
            deterministic=deterministic,
        )

    @property
    def group(self) -> int:
        """Number of query heads that share a key head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def state_dtype(self) -> np.dtype:
        """Of scores, running maximum, denominator and accumulators: at least float32."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)


class Request(NamedTuple):
    """What a user asks for, checked.

    scale: of the scores; sinks: what joins the softmax outside of the backends; has_batch: whether
    the user gave a batch dimension (the operands always have one).
    """

    operands: Operands
    scale: float
    sinks: tuple[Sink, ...]
    has_batch: bool


def make_request(q, k, v, *, mask, score_mod, scale, dropout=None) -> Request:
    """The request of a call.

    Raises:
      TypeError: if mask, score_mod, dropout or scale is not of the documented kind.
      ValueError: if a shape, dtype, head count or scale breaks its rule; the message has both.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    has_batch = _check_arrays(q, k, v)
    if not has_batch:
        q, k, v = q[None], k[None], v[None]
    scale = check_scale(scale, q.shape[-1])
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be Dropout(rate, key) or None, got {_kind(dropout)}")
    sizes = {"batch": q.shape[0], "heads": q.shape[2], "q": q.shape[1], "kv": k.shape[1]}
    mask, score_mod, sinks = bind_terms(mask, score_mod, sizes)
    keep_bits = None if dropout is None else dropout.bind(sizes["batch"], sizes["heads"])
    operands = Operands(q, k, v, mask, score_mod, keep_bits)
    check_functions(AttentionSpec.of(operands, scale))
    return Request(operands, scale, sinks, has_batch)


def bind_terms(
    mask: Any, score_mod: Any, sizes: dict[str, int]
) -> tuple[Mask | None, ScoreMod | None, tuple[Sink, ...]]:
    """The mask, the score mod without its sinks, and the sinks: bound, checked, at full rank.

    sizes: of the axes "batch", "heads", "q" and "kv" of the scores.

    Raises:
      TypeError: if a term is not of its kind.
      ValueError: if an array of theirs does not fit the sizes.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask such as Causal() or DenseMask(array), got {_kind(mask)}"
        )
    if score_mod is not None and not isinstance(score_mod, ScoreMod):
        raise TypeError(
            f"score_mod must be a ScoreMod such as Softcap(50.0) or Bias(array), "
            f"got {_kind(score_mod)}; join several with Chain((first, second))"
        )
    sizes = sizes | {"distance": sizes["q"] + sizes["kv"] - 1}
    if mask is not None:
        mask = canonical(mask.bind(sizes["q"], sizes["kv"]), sizes)
    score_mod, sinks = split_sinks(score_mod)
    if score_mod is not None:
        score_mod = canonical(score_mod.bind(sizes["q"], sizes["kv"]), sizes)
    return mask, score_mod, canonical(sinks, sizes)


@functools.lru_cache(1024)
def check_functions(spec: AttentionSpec) -> None:
    """Raises if the mask's or the score mod's function is not what a tile may be given to.

    It must be elementwise, give a bool or a score for every element, and read its arrays from the
    term's operands: a captured array would be read whole by every tile, and have no gradient.
    """
    whole = Tile(spec.batch, 0, spec.q_len, 0, spec.kv_len, spec.q_len)
    s = jax.ShapeDtypeStruct(
        (spec.batch, spec.num_q_heads, spec.q_len, spec.kv_len), spec.state_dtype
    )

    def align(x, axes):
        x = whole.align(x, axes)
        return x.astype(spec.state_dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def check(term, is_mask: bool) -> None:
        aligned = jax.eval_shape(lambda x: map_operands(align, x), term)

        def function(s, term):
            if is_mask:
                return term.allowed(*whole.positions())
            return term.apply(s, *whole.positions())

        name = type(term).__name__
        program, result = jax.make_jaxpr(function, return_shape=True)(s, aligned)
        for array in program.consts:
            if np.ndim(array) or isinstance(array, jax.core.Tracer):
                raise TypeError(
                    f"the function of {name} captures an array of shape {np.shape(array)}: hand "
                    "it over as an argument, e.g. MaskMod(fn, array) or ScoreFunction(fn, array)"
                )
        if mixing := _mixing(program.jaxpr):
            raise TypeError(
                f"the function of {name} must be elementwise, but it uses {', '.join(mixing)}"
            )
        want = jnp.bool_ if is_mask else s.dtype
        shape, dtype = getattr(result, "shape", ()), getattr(result, "dtype", type(result))
        if dtype != want:
            raise TypeError(f"the function of {name} must return {np.dtype(want)}, got {dtype}")
        full = (1,) * (4 - len(shape)) + shape
        if any(n not in (1, m) for n, m in itertools.zip_longest(full, s.shape)):
            raise ValueError(
                f"the function of {name} must return one number for each score, of a shape that "
                f"broadcasts to {s.shape}, got {shape}"
            )

    if spec.mask is not None:
        check(spec.mask, True)
    if spec.score_mod is not None:
        check(spec.score_mod, False)


# What makes a result depend on other elements of a tile than its own.
_MIXING = re.compile(
    "reduce_(?!precision)|cum|arg(max|min)|sort|gather|scatter|dynamic|dot_general|conv_|rev$"
)


def _mixing(program: Any) -> list[str]:
    """The names of a program's operations that are not elementwise."""
    found = [e.primitive.name for e in program.eqns if _MIXING.match(e.primitive.name)]
    for inner in (j for e in program.eqns for j in jaxprs_in_params(e.params)):
        found += _mixing(inner)
    return sorted(set(found))


def _kind(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return f"{type(x).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def _check_arrays(q, k, v) -> bool:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim not in (3, 4) or not q.ndim == k.ndim == v.ndim:
        raise ValueError(
            f"q, k and v must all be [batch, length, heads, head_dim] or all "
            f"[length, heads, head_dim], got {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must have one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize == 1:
        raise ValueError(f"dtype={q.dtype} must be bfloat16, float16, float32 or float64")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree but for their last dimension, got {shapes}")
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"q and k must have the same batch, got {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim, got {shapes}")
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"every dimension must be at least 1, got {shapes}")
    num_q_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads={num_q_heads} must be a multiple of num_kv_heads={num_kv_heads}"
        )
    return q.ndim == 4


def check_scale(scale, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, jax.core.Tracer):
        raise TypeError(
            "scale must be a number known when the function is traced; multiply q by a traced one"
        )
    is_scalar = np.ndim(scale) == 0 and np.issubdtype(np.asarray(scale).dtype, np.number)
    if not is_scalar or isinstance(scale, complex):
        raise TypeError(f"scale must be a real number or None, got {_kind(scale)}")
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    return scale
