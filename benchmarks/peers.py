"""The implementations that are measured: ours, and those of others that are installed."""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import pallas_flash as pf
from benchmarks.cases import Case

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _ours(case: Case) -> Attention:
    return functools.partial(pf.flash_attention, mask=pf.Causal() if case.causal else None)


def backend(case: Case) -> str:
    """The name of our backend that serves a case here."""
    answers: list[dict[str, str | None]] = []

    def ask(q, k, v):
        answers.append(pf.explain_backends(q, k, v, mask=pf.Causal() if case.causal else None))

    jax.eval_shape(ask, *case.structs[:3])
    return next(name for name, reason in answers[0].items() if reason is None)


def _jax_nn(case: Case, implementation: str) -> Attention:
    function: Any = jax.nn.dot_product_attention
    return functools.partial(function, is_causal=case.causal, implementation=implementation)


def _fa4(case: Case) -> Attention:
    # Its causal mask ends at the bottom right; the suites' causal cases are square.
    assert case.q_len == case.kv_len or not case.causal
    fa4_jax = importlib.import_module("fa4_jax")
    return functools.partial(fa4_jax.flash_attn, causal=case.causal)


def _tokamax(case: Case) -> Attention:
    tokamax = importlib.import_module("tokamax")
    return functools.partial(
        tokamax.dot_product_attention, is_causal=case.causal, implementation="mosaic"
    )


class Peer(NamedTuple):
    """An implementation of attention."""

    make: Callable[[Case], Attention]
    # What must be importable, and the distribution whose version is noted.
    module: str
    distribution: str
    # The longest sequence that is measured, and whether it is measured without being asked for.
    longest: int | None = None
    by_default: bool = True


PEERS = {
    "ours": Peer(_ours, "pallas_flash", "pallas-flash"),
    "cudnn": Peer(functools.partial(_jax_nn, implementation="cudnn"), "jax", "nvidia-cudnn-cu13"),
    "fa4": Peer(_fa4, "fa4_jax", "fa4-jax"),
    "tokamax": Peer(_tokamax, "tokamax", "tokamax"),
    # It writes every score to memory.
    "xla": Peer(functools.partial(_jax_nn, implementation="xla"), "jax", "jax", 2048, False),
}


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    try:
        importlib.import_module(PEERS[name].module)
    # A package made for other versions may break in any way; the others are measured all the same.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PEERS[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def takes(name: str, case: Case) -> bool:
    longest = PEERS[name].longest
    return longest is None or max(case.q_len, case.kv_len) <= longest
