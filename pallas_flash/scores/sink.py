"""Sink: a logit for each head that takes part in the softmax and has no value."""

from functools import reduce

import jax
import jax.numpy as jnp

from pallas_flash.scores.score_mod import Chain, ScoreMod
from pallas_flash.terms import operand, term


@term
class Sink(ScoreMod):
    """``softmax`` over the scores and one logit more: ``P = exp(s) / (exp(logit) + sum exp(s))``.

    The logit joins the softmax as it is: neither the scale nor another mod of a chain changes it,
    wherever in the chain it stands. The lse includes it. A row that may attend to nothing gives
    zeros and ``lse = logit``. No kernel knows of sinks: `join` corrects the result of the rest.

    Args:
      logits: [Hq] or [B, Hq] floating point; gets its gradient.

    Source: Xiao et al. 2024 (arXiv:2309.17453), section 3; gpt-oss (OpenAI 2025).
    """

    logits: jax.Array = operand("batch", "heads", dtype=jnp.floating)

    def join(self, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq] with the sink, from those without.

        ``out * sigmoid(lse - logit)`` and ``log(exp(lse) + exp(logit))``.
        """
        logits = self.logits.astype(lse.dtype)[..., None]
        # The gradients of an infinite lse would be NaN in the branch that is not taken.
        empty = lse == -jnp.inf
        known = jnp.where(empty, 0, lse)
        weight = jnp.where(empty, 0, jax.nn.sigmoid(known - logits))
        joined = jnp.where(empty, logits, jnp.logaddexp(known, logits))
        return (out * jnp.swapaxes(weight, 1, 2)[..., None]).astype(out.dtype), joined


def split_sinks(score_mod: ScoreMod | None) -> tuple[ScoreMod | None, tuple[Sink, ...]]:
    """The score mod without the sinks in it, and the sinks."""
    if isinstance(score_mod, Sink):
        return None, (score_mod,)
    if not isinstance(score_mod, Chain):
        return score_mod, ()
    parts = [split_sinks(mod) for mod in score_mod.mods]
    rest = tuple(mod for mod, _ in parts if mod is not None)
    sinks: tuple[Sink, ...] = reduce(lambda a, b: a + b, (found for _, found in parts), ())
    return Chain(rest) if rest else None, sinks
