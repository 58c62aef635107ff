"""dQ in fixed point: a sum of integers, the same in whatever order its parts are added.

Blocks of different keys add to dQ whenever they get there. The result of such a sum of floats
depends on the order, one of int32 does not, not even where it overflows on the way. So where
gradients are to be deterministic every part of dQ is multiplied by a power of two, rounded to
integers and added as such: nobody waits for anybody.

The factor is a query's own. With ``x = keep * f * dO . V - delta``, f what dropout multiplies by,
and L what the score mod's derivative never exceeds, Hoelder's inequality and ``sum_j P_ij <= 1``
give, for the sum over any keys and before the scale,

    |dQ_id| <= L * (f * max_d |dO_id| * max_j sum_d |V_jd| + |delta_i|) * max_jd |K_jd|.

Doubled, for the roundings of P, dS and dQ itself, which are less than a hundredth, this is below
2**e for some e, and the factor is ``2 ** (31 - e)``. To round a part errs by 2**-30 of the bound at
most; dS is rounded to bfloat16 before, by 2**-9 of each of its numbers.

Nothing that is not finite becomes a number. In a row of dQ that is not finite lse or delta are not,
or the bound is not, and its factor is NaN. Keys that the mask leaves unused may hold anything: they
do not count, as far as the mask tells, nor does NaN where there may be others. A query that attends
to nothing has the factor 0 and no gradient.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_flash.backends.hopper.backward_kernel import Kernel, may_hold_padding
from pallas_flash.backends.hopper.padding import unused_keys
from pallas_flash.backends.hopper.scores import dropout_factor
from pallas_flash.backends.hopper.storage import MATRIX, PER_ROW, round_up, widen_rows
from pallas_flash.spec import AttentionSpec, Operands

# Of a float32: the bits behind its exponent, and the exponent of 1.
MANTISSA_BITS, EXPONENT_OF_ONE = 23, 127
# The largest factor: its inverse is the smallest normal number.
LARGEST = EXPONENT_OF_ONE + 126


def factors(spec: AttentionSpec, operands: Operands, lse: Any, delta: Any, dout: Any) -> jax.Array:
    """What the rows of dQ are multiplied with: [B, Hq, Tq] float32; see above for 0 and NaN.

    lse, delta: [B, Hq, Tq]; dout: [B, Tq, Hq, Dv].
    """
    largest_k = _of_keys(spec, operands, jnp.abs(operands.k.astype(jnp.float32)).max(-1))
    largest_v = _of_keys(spec, operands, jnp.abs(operands.v.astype(jnp.float32)).sum(-1))
    largest_dout = jnp.abs(dout.astype(jnp.float32)).max(-1).swapaxes(1, 2)
    steepness = 1.0 if spec.score_mod is None else spec.score_mod.lipschitz
    assert steepness is not None, "refused before"
    of_logits = largest_dout * (dropout_factor(spec) * largest_v) + jnp.abs(delta)
    of_logits = of_logits * (2 * steepness)
    bound = of_logits * largest_k
    exponent = lax.bitcast_convert_type(bound, jnp.int32) >> MANTISSA_BITS
    # bound < 2 ** (exponent - EXPONENT_OF_ONE + 1)
    exponent = jnp.minimum(2 * EXPONENT_OF_ONE + 30 - exponent, LARGEST)
    factor = lax.bitcast_convert_type(exponent << MANTISSA_BITS, jnp.float32)
    is_finite = jnp.isfinite(of_logits) & jnp.isfinite(bound) & jnp.isfinite(lse)
    return jnp.where(lse == -jnp.inf, 0.0, jnp.where(is_finite, factor, jnp.nan))


def _of_keys(spec: AttentionSpec, operands: Operands, sizes: jax.Array) -> jax.Array:
    """The largest size [B, Hq, 1] of a head's keys, from theirs [B, Tkv, Hkv]."""
    if may_hold_padding(spec):
        counts = jnp.isfinite(sizes)
        unused = unused_keys(operands.mask, spec.batch, spec.q_len, spec.kv_len)
        if unused is not None:
            counts &= ~unused.swapaxes(1, 2)
        sizes = jnp.where(counts, sizes, 0.0)
    return jnp.repeat(sizes.max(1), spec.group, axis=1)[..., None]


def over_whole_tiles(factor: jax.Array, block_q: int) -> jax.Array:
    """With rows that count for nothing at the end."""
    rows = round_up(factor.shape[-1], block_q) - factor.shape[-1]
    return jnp.pad(factor, ((0, 0), (0, 0), (0, rows)))


def read_factors(kernel: Kernel, q_head: Any, row: Any, rows: int) -> Any:
    """The factors of some rows in a kernel."""
    part = kernel.gmem.dq_factors.at[kernel.block.batch, q_head, pl.ds(row, rows)]
    return plgpu.load(part, layout=PER_ROW, optimized=False)


def as_added(dq: Any, factor: Any) -> Any:
    """A part of dQ as it is added to memory; factor: of its rows, or None for a sum of floats."""
    return dq if factor is None else _rounded(dq * widen_rows(factor, dq.shape))


def _rounded(x: Any) -> Any:
    """The nearest integers of a matrix in registers; of NaN 0, of what is too large the largest."""
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.int32), layout=MATRIX)

    # In one instruction: `jnp.round` and a conversion are two, of the unit of the exponentials.
    @plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=result)
    def to_integers(_, x):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty_like(x.registers)
        for place, pair in np.ndenumerate(x.registers):
            numbers = [vector.extract(pair, [], [i]) for i in range(2)]
            ptx = "cvt.rni.s32.f32 $0, $1;", "=r,f"
            rounded = [llvm.inline_asm(i32, [number], *ptx) for number in numbers]
            registers[place] = vector.from_elements(ir.VectorType.get((2,), i32), rounded)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)

    return to_integers(x)


def units(factor: jax.Array) -> jax.Array:
    """What one of a row's integers stands for, from its factor: exact."""
    return jnp.where(factor == 0, 0.0, 1.0 / factor)


def with_overflows(spec: AttentionSpec, dq: jax.Array, dk: jax.Array) -> jax.Array:
    """dQ, but NaN where dS was too large for float16: this dK shows, in the same head."""
    if spec.dtype != jnp.float16:
        return dq
    is_finite = jnp.isfinite(dk).all((1, 3))
    is_finite = jnp.repeat(is_finite, spec.group, axis=1)[:, None, :, None]
    return jnp.where(is_finite, dq, jnp.nan)
