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


def plain(case: Case) -> dict[str, Any]:
    """The keywords of flash_attention that a case without features needs."""
    return {"mask": pf.Causal() if case.causal else None}


def _ours(case: Case) -> Attention:
    return functools.partial(pf.flash_attention, **plain(case))


def backend(case: Case, terms: Callable[[Any], dict[str, Any]], arrays: Any = None) -> str:
    """The name of our backend that serves a case here, with the keywords ``terms(arrays)``."""
    answers: list[dict[str, str | None]] = []

    def ask(q, k, v, arrays):
        answers.append(pf.explain_backends(q, k, v, **terms(arrays)))

    jax.eval_shape(ask, *case.structs[:3], arrays)
    return next(name for name, reason in answers[0].items() if reason is None)


def imported(name: str) -> Any:
    """A peer's module."""
    return importlib.import_module(PEERS[name].module)


def dense(name: str, **options: Any) -> Callable[..., jax.Array]:
    """An implementation with the arguments of ``jax.nn.dot_product_attention``."""
    implementation = {"tokamax": "mosaic", "tokamax_triton": "triton"}.get(name, name)
    package = imported(name).nn if PEERS[name].module == "jax" else imported(name)
    return functools.partial(
        package.dot_product_attention, implementation=implementation, **options
    )


def _dense(name: str) -> Callable[[Case], Attention]:
    return lambda case: dense(name, is_causal=case.causal)


def _fa4(case: Case) -> Attention:
    # Its causal mask ends at the bottom right; the suites' causal cases are square.
    assert case.q_len == case.kv_len or not case.causal
    return functools.partial(imported("fa4").flash_attn, causal=case.causal)


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
    "cudnn": Peer(_dense("cudnn"), "jax", "nvidia-cudnn-cu13"),
    "fa4": Peer(_fa4, "fa4_jax", "fa4-jax"),
    "tokamax": Peer(_dense("tokamax"), "tokamax", "tokamax"),
    # Slower than its other kernels, but for some of the features.
    "tokamax_triton": Peer(_dense("tokamax_triton"), "tokamax", "tokamax", None, False),
    # It writes every score to memory.
    "xla": Peer(_dense("xla"), "jax", "jax", 2048, False),
}


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    try:
        imported(name)
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
