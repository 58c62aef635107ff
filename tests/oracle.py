"""The oracle: attention in float64 numpy, written apart from the package and differentiated by JAX.

`attention` shares no code with the backends. `arrays` are cast to float64; masks and scores come as
plain arrays (a boolean matrix, a function of the scores), never as the package's terms.
"""

import jax
import jax.numpy as jnp
import numpy as np


def attention(q, k, v, *, allowed=None, change=None, scale=None, sink=None, keep=None):
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq], from q, k, v in [B, T, H, D] of any dtype.

    allowed: bool, broadcastable to [B, Hq, Tq, Tkv]; change: scores -> scores, after the scale;
    sink: [Hq] or [B, Hq], one more logit of each row, whose value is 0; keep: [B, Hq, Tq, Tkv],
    factor of the probabilities.
    """
    q, k, v = (x.astype(jnp.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    s = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if change is not None:
        s = change(s)
    allowed = jnp.broadcast_to(_not_folded(True if allowed is None else allowed), s.shape)
    if sink is not None:
        sink = jnp.broadcast_to(sink[..., None, None], (*s.shape[:3], 1))
        s, allowed = (jnp.concatenate(pair, -1) for pair in ((s, sink), (allowed, sink > -jnp.inf)))
    some = allowed.any(-1, keepdims=True)
    s = jnp.where(allowed, s, jnp.where(some, -jnp.inf, 0.0))
    lse = jax.scipy.special.logsumexp(s, axis=-1, keepdims=True)
    p = jnp.where(allowed, jnp.exp(s - lse), 0.0)[..., : v.shape[1]]
    if keep is not None:
        p = p * keep
    out = jnp.einsum("bhts,bshd->bthd", p, v)
    return out, jnp.where(some, lse, -jnp.inf)[..., 0]


def _not_folded(x):
    """An array that XLA does not take for a constant: it takes a minute to fold a large one."""
    return jax.lax.optimization_barrier(jnp.asarray(x))


def plain_attention_with_lse(q, k, v, allowed, scale=None, change=None, keep=None):
    """Attention as one writes it in low precision: products of q's dtype summed in float32,
    softmax in float32, P rounded to q's dtype. Same results as `attention`."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    s = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    allowed = jnp.broadcast_to(_not_folded(allowed), s.shape)
    some = allowed.any(-1, keepdims=True)
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if change is None else change(s)
    s = jnp.where(allowed, s, jnp.where(some, -jnp.inf, 0.0))
    lse = jax.scipy.special.logsumexp(s, axis=-1, keepdims=True)
    p = jnp.where(allowed, jnp.exp(s - lse), 0.0)
    p = (p if keep is None else p * keep).astype(q.dtype)
    out = jnp.einsum("bhts,bshd->bthd", p, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), jnp.where(some, lse, -jnp.inf)[..., 0]


def on_host():
    """Where references are computed: a GPU takes longer to compile them than a CPU to run them."""
    return jax.default_device(jax.devices("cpu")[0])


def with_gradients(arrays, cotangents, function):
    """``function(*arrays)`` in float64 and the gradients of its arrays for the given cotangents."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        cotangents = tuple(np.asarray(c, np.float64) for c in cotangents)
        return in_own_precision(wide, cotangents, function)


def in_own_precision(arrays, cotangents, function):
    """The same in the arrays' own dtypes."""

    @jax.jit
    def both(arrays, cotangents):
        results, vjp = jax.vjp(function, *arrays)
        return results, vjp(cotangents)

    with on_host():
        return both(*jax.tree.map(np.asarray, (arrays, cotangents)))
