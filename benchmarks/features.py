"""Masks, scores and dropout that are measured: ours, and as others can say the same."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_flash as pf
from benchmarks import peers, timing
from benchmarks.cases import Case, square

Arrays = dict[str, jax.Array]
# q, k, v and a problem's further arrays -> out.
Call = Callable[[jax.Array, jax.Array, jax.Array, Arrays], jax.Array]
# A problem's further arrays -> keywords of flash_attention.
Terms = Callable[[Arrays], dict[str, Any]]

# Of what JAX users write today, all that take a bias and a mask.
DENSE = ("cudnn", "tokamax", "tokamax_triton", "xla")
WINDOW = 1023
CAP = 50.0
DROPPED = 0.1


class Beside(NamedTuple):
    """Another call of ours, and how much of its time the feature may take."""

    label: str
    call: Call
    at_most: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """One problem; `name` is the `case` of its rows."""

    name: str
    # Of q, k and v. Every implementation obeys its `causal`.
    shape: Case
    # What the problem has besides; `wrt` names those of them that get gradients.
    arrays: Callable[[], Arrays] = dict
    wrt: tuple[str, ...] = ()
    terms: Terms
    # Implementation -> how it says the same.
    others: dict[str, Call] = dataclasses.field(default_factory=dict)
    beside: Beside | None = None
    # Heads whose error is measured: where no array knows of heads one is enough.
    heads_checked: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def calls(self) -> dict[str, Call]:
        """Implementation -> call; what stands beside ours is an implementation of its own."""
        beside = {f"ours, {self.beside.label}": self.beside.call} if self.beside else {}
        return {"ours": ours(self.terms), **beside, **self.others}

    def backend(self) -> str:
        """The name of our backend that serves it here."""
        return peers.backend(self.shape, self.terms, jax.eval_shape(self.arrays))

    def inputs(self) -> tuple[list[jax.Array], jax.Array, Arrays]:
        """q, k and v, dout, and the further arrays."""
        *qkv, dout = timing.arrays(self.shape)
        return qkv, dout, self.arrays()


def ours(terms: Terms, **how: Any) -> Call:
    return lambda q, k, v, arrays: pf.flash_attention(q, k, v, **terms(arrays), **how)


def dense(*names: str, causal: bool = False, **options: Any) -> dict[str, Call]:
    """Calls of those that know a bias, a mask and `options`; they read `bias` and `mask`."""

    def call(name: str, q, k, v, arrays: Arrays) -> jax.Array:
        attention = peers.dense(name, is_causal=causal, **options)
        return attention(q, k, v, arrays.get("bias"), arrays.get("mask"))

    return {name: functools.partial(call, name) for name in names}


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def packed(name: str, lengths: list[int], heads: int, with_mask: bool) -> Feature:
    """Documents end to end in one row, which others need a T x S mask for."""
    length = sum(lengths)
    starts = np.cumsum([0, *lengths])

    def arrays() -> Arrays:
        ids = pf.segment_ids_from_cu_seqlens(starts, length)
        given = {"ids": ids[None], "starts": jnp.asarray(starts, jnp.int32)}
        return given | ({"mask": (ids[:, None] == ids)[None, None]} if with_mask else {})

    def fa4(q, k, v, arrays):
        attention = peers.imported("fa4").flash_attn_varlen
        return attention(q[0], k[0], v[0], arrays["starts"], arrays["starts"], causal=True)[None]

    def rows(q, k, v, arrays):
        q, k, v = (x.reshape(len(lengths), lengths[0], *x.shape[2:]) for x in (q, k, v))
        return pf.flash_attention(q, k, v, mask=pf.Causal()).reshape(1, length, heads, -1)

    equal = len(set(lengths)) == 1
    return Feature(
        name=name,
        shape=square(1, length, heads, 128, True),
        arrays=arrays,
        terms=lambda a: {"mask": pf.Causal() & pf.SegmentIds(a["ids"])},
        others={"fa4": fa4} | (dense(*DENSE[:3], causal=True) if with_mask else {}),
        beside=Beside(f"{len(lengths)} rows of {lengths[0]}", rows, 1.1) if equal else None,
    )


def random_lengths(count: int, total: int) -> list[int]:
    """Lengths of documents, from one to about four times the mean."""
    cuts = np.random.default_rng(0).choice(np.arange(1, total), count - 1, replace=False)
    return [int(n) for n in np.diff([0, *sorted(cuts), total])]


def window(length: int, heads: int, left: int = WINDOW) -> Feature:
    def fa4(q, k, v, arrays):
        attention = peers.imported("fa4").flash_attn
        return attention(q, k, v, causal=True, window_size=(left, 0))

    return Feature(
        name=f"window-{left + 1}-in-{length}",
        shape=square(1, length, heads, 128, True),
        terms=lambda a: {"mask": pf.Causal() & pf.SlidingWindow(left, 0)},
        others={"fa4": fa4} | dense(*DENSE[:3], causal=True, local_window_size=(left, 0)),
    )


def pair_bias(length: int, heads: int, head_dim: int) -> Feature:
    """AlphaFold: rows of a table attend along it, with one bias for all and a mask of keys."""
    return Feature(
        name=f"pair-bias-{length}x{length}x{heads}x{head_dim}",
        shape=square(length, length, heads, head_dim, False),
        arrays=lambda: {
            "bias": normal(4, 1, heads, length, length),
            "mask": jax.random.bernoulli(jax.random.key(5), 0.9, (length, 1, 1, length)),
        },
        wrt=("bias",),
        terms=lambda a: {"mask": pf.DenseMask(a["mask"]), "score_mod": pf.Bias(a["bias"])},
        others=dense(*DENSE),
        heads_checked=heads,
    )


def dense_bias(batch: int, length: int, heads: int) -> Feature:
    return Feature(
        name=f"dense-bias-{batch}x{length}x{heads}x64",
        shape=square(batch, length, heads, 64, False),
        arrays=lambda: {"bias": normal(4, 1, heads, length, length)},
        wrt=("bias",),
        terms=lambda a: {"score_mod": pf.Bias(a["bias"])},
        others=dense(*DENSE),
        heads_checked=heads,
    )


def relative_bias(batch: int, length: int, heads: int) -> Feature:
    """T5's; others are given its T x S bias, made from the table and back in the same call."""

    def expanded(call: Call) -> Call:
        def with_bias(q, k, v, arrays):
            by_distance = pf.RelativeBias(arrays["table"]).bind(length, length).values[0]
            distance = jnp.arange(length) - jnp.arange(length)[:, None]
            bias = by_distance[:, distance + length - 1][None].astype(q.dtype)
            return call(q, k, v, {"bias": bias})

        return with_bias

    return Feature(
        name=f"t5-bias-{batch}x{length}x{heads}x64",
        shape=square(batch, length, heads, 64, False),
        arrays=lambda: {"table": normal(4, heads, 32, dtype=jnp.float32)},
        wrt=("table",),
        terms=lambda a: {"score_mod": pf.RelativeBias(a["table"])},
        others={name: expanded(call) for name, call in dense(*DENSE).items()},
        beside=Beside("no bias", ours(lambda a: {}), 1.3),
        heads_checked=heads,
    )


def softcap(batch: int, length: int, heads: int) -> Feature:
    return Feature(
        name=f"softcap-{batch}x{length}x{heads}x128-causal",
        shape=square(batch, length, heads, 128, True),
        terms=lambda a: {"mask": pf.Causal(), "score_mod": pf.Softcap(CAP)},
        others=dense("tokamax", "tokamax_triton", causal=True, logits_soft_cap=CAP),
        beside=Beside("no softcap", ours(lambda a: {"mask": pf.Causal()}), 1.15),
    )


def dropout(batch: int, length: int, heads: int) -> Feature:
    """No kernel that JAX users have knows it."""
    return Feature(
        name=f"dropout-{batch}x{length}x{heads}x128-causal",
        shape=square(batch, length, heads, 128, True),
        arrays=lambda: {"key": jax.random.key(0)},
        terms=lambda a: {"mask": pf.Causal(), "dropout": pf.Dropout(DROPPED, a["key"])},
        beside=Beside("no dropout", ours(lambda a: {"mask": pf.Causal()}), 1.25),
        heads_checked=heads,
    )


def deterministic(batch: int, length: int, heads: int, head_dim: int) -> Feature:
    return Feature(
        name=f"deterministic-{batch}x{length}x{heads}x{head_dim}-causal",
        shape=square(batch, length, heads, head_dim, True),
        terms=lambda a: {"mask": pf.Causal(), "deterministic": True},
        # 15% of the backward.
        beside=Beside("not deterministic", ours(lambda a: {"mask": pf.Causal()}), 1.1),
    )


# What a user writes; each is defined once, as the terms ask for.
def user_softcap(s, q_pos, kv_pos):
    return CAP * jnp.tanh(s / CAP)


def user_alibi(s, q_pos, kv_pos, slopes):
    return s - slopes * (q_pos - kv_pos)


def user_causal(q_pos, kv_pos):
    return q_pos >= kv_pos


def user_window(q_pos, kv_pos):
    return (q_pos >= kv_pos) & (q_pos - kv_pos <= WINDOW)


def user_scores(batch: int, length: int, heads: int) -> list[Feature]:
    """A function of the user's beside the class that does the same."""
    shape = square(batch, length, heads, 128, True)
    built_in = ours(lambda a: {"mask": pf.Causal(), "score_mod": pf.Softcap(CAP)})
    alibi = ours(lambda a: {"mask": pf.Causal(), "score_mod": pf.Alibi(a["slopes"][:, 0, 0])})
    return [
        Feature(
            name=f"user-softcap-{batch}x{length}x{heads}x128-causal",
            shape=shape,
            terms=lambda a: {"mask": pf.Causal(), "score_mod": pf.ScoreFunction(user_softcap)},
            beside=Beside("built in", built_in, 1.2),
        ),
        Feature(
            name=f"user-alibi-{batch}x{length}x{heads}x128-causal",
            shape=shape,
            arrays=lambda: {"slopes": jnp.asarray(pf.alibi_slopes(heads))[:, None, None]},
            wrt=("slopes",),
            terms=lambda a: {
                "mask": pf.Causal(),
                "score_mod": pf.ScoreFunction(user_alibi, a["slopes"]),
            },
            beside=Beside("built in", alibi, 1.2),
            heads_checked=heads,
        ),
    ]


def user_masks(batch: int, length: int, heads: int) -> list[Feature]:
    """A mask of the user's, joined with what skips blocks, beside that alone."""

    def feature(name: str, shape: Case, function: Any, mask: pf.Mask) -> Feature:
        return Feature(
            name=name,
            shape=shape,
            terms=lambda a: {"mask": mask & pf.MaskMod(function)},
            beside=Beside("built in", ours(lambda a: {"mask": mask}), 1.2),
        )

    return [
        feature(
            f"user-mask-{batch}x{length}x{heads}x128-causal",
            square(batch, length, heads, 128, True),
            user_causal,
            pf.Causal(),
        ),
        feature(
            f"user-mask-window-{WINDOW + 1}-in-{batch * length}",
            square(1, batch * length, heads, 128, True),
            user_window,
            pf.Causal() & pf.SlidingWindow(WINDOW, 0),
        ),
    ]


def features() -> list[Feature]:
    return [
        packed("packed-8x2048-in-16384", [2048] * 8, 16, with_mask=True),
        packed("packed-37-in-65536", random_lengths(37, 65536), 16, with_mask=False),
        window(16384, 16),
        pair_bias(384, 4, 32),
        pair_bias(768, 4, 64),
        dense_bias(8, 2048, 16),
        relative_bias(8, 2048, 16),
        softcap(4, 4096, 16),
        dropout(4, 4096, 16),
        *(deterministic(4, 4096, heads, dim) for heads, dim in ((32, 64), (16, 128), (8, 256))),
        *user_scores(4, 4096, 16),
        *user_masks(4, 4096, 16),
    ]
