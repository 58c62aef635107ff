"""Prints the README's table of what each backend serves, from the backends' own answers."""

import jax
import jax.numpy as jnp

import pallas_flash as pf
from pallas_flash.dispatch import BACKENDS
from pallas_flash.spec import AttentionSpec, make_request

WHERE = {
    "hopper": "NVIDIA Hopper",
    "blockwise": "any device",
    "reference": "any device, T x S memory",
}


def shapes(head_dim=64, value_dim=64, dtype=jnp.bfloat16, kv_heads=2):
    sizes = ((1, 300, 4, head_dim), (1, 200, kv_heads, head_dim), (1, 200, kv_heads, value_dim))
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


# What a user may ask for -> calls that ask for it.
REQUESTS = {
    "bfloat16, float16": [{"dtype": jnp.bfloat16}, {"dtype": jnp.float16}],
    "float32, float64": [{"dtype": jnp.float32}],
    "head_dim 16 to 256, multiples of 8": [
        {"head_dim": d, "value_dim": v} for d in range(16, 257, 8) for v in (d, 16, 256)
    ],
    "any other head_dim": [{"head_dim": 20, "value_dim": 20}, {"head_dim": 512, "value_dim": 512}],
    "grouped-query and multi-query attention": [{"kv_heads": 2}, {"kv_heads": 1}],
    "`Causal`, `SlidingWindow`": [
        {"mask": pf.Causal()},
        {"mask": pf.Causal("bottom_right")},
        {"mask": pf.SlidingWindow(9, 9)},
    ],
    "`KvLengths`, `QLengths`": [
        {"mask": kind(zeros(1, dtype=jnp.int32))} for kind in (pf.KvLengths, pf.QLengths)
    ],
    "`ChunkedCausal`, `PrefixLM`": [
        {"mask": pf.ChunkedCausal(64)},
        {"mask": pf.PrefixLM(zeros(1, dtype=jnp.int32))},
    ],
    "`SegmentIds`": [
        {"mask": pf.SegmentIds(zeros(1, 300, dtype=jnp.int32), zeros(1, 200, dtype=jnp.int32))}
    ],
    "`MaskMod`: a function of your own": [{"mask": pf.MaskMod(lambda q, kv: kv < q)}],
    "`DenseMask`": [{"mask": pf.DenseMask(zeros(1, 4, 300, 200, dtype=bool))}],
    "`&`, `|`, `~` of masks it serves": [
        {"mask": ~(pf.Causal() & pf.SlidingWindow(9)) | pf.KvLengths(zeros(1, dtype=jnp.int32))}
    ],
    "`Softcap`": [{"score_mod": pf.Softcap(30.0)}],
    "`Bias`, with its gradient": [{"score_mod": pf.Bias(zeros(1, 4, 300, 200))}],
    "`Alibi`, `RelativeBias`, `DistanceBias`, with gradients": [
        {"score_mod": pf.Alibi(zeros(4))},
        {"score_mod": pf.RelativeBias(zeros(4, 32))},
        {"score_mod": pf.DistanceBias(zeros(4, 499))},
    ],
    "`Sink`, with its gradient": [{"score_mod": pf.Sink(zeros(4))}],
    "`ScoreFunction`: a function of your own": [
        {"score_mod": pf.ScoreFunction(lambda s, q, kv: s * s)}
    ],
    "`Dropout`": [{"dropout": pf.Dropout(0.1, jax.random.key(0))}],
}


def serves(backend, mask=None, score_mod=None, dropout=None, **keywords) -> bool:
    reasons: list[str | None] = []

    def ask(q, k, v):
        operands, scale, *_ = make_request(
            q, k, v, mask=mask, score_mod=score_mod, scale=None, dropout=dropout
        )
        reasons.append(backend.unsupported(AttentionSpec.of(operands, scale)))

    jax.eval_shape(ask, *shapes(**keywords))
    return reasons == [None]


def table() -> str:
    lines = [
        "| | " + " | ".join(f"`{name}` ({WHERE[name]})" for name in BACKENDS) + " |",
        "|---" * (1 + len(BACKENDS)) + "|",
    ]
    for title, calls in REQUESTS.items():
        cells = []
        for backend in BACKENDS.values():
            answers = {serves(backend, **call) for call in calls}
            assert len(answers) == 1, f"{backend.name} serves only a part of {title!r}"
            cells.append("yes" if answers.pop() else "no")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
