"""Writes text with a cache of keys and values: several prompts of different lengths at once.

    python examples/generate.py "The import statement" "A class"    after `make demo`
    python examples/generate.py --api nnx --temperature 0 --compare

It loads the model that `train_lm.py` has left in out/. The prompts go in at once, then one byte at
a time; `--compare` does the same without a cache, reading all bytes anew for each.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer import NnxTransformer, Sizes, Transformer

CHECKPOINT = Path("out/train_lm.msgpack")

# (tokens [B, T], caches, lengths [B] or None) -> logits [B, T, 256], caches; without caches only
# the logits.
Model = Callable[..., Any]


def pick(logits, temperature: float, key):
    """Returns the next byte of each row: the likeliest at temperature 0, else a drawn one."""
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def generate(model: Model, caches, prompts, lengths, keys, temperature: float):
    """Returns [B, len(keys)] bytes that follow the prompts, and the caches.

    prompts: [B, T] int32, of which the first `lengths` [B] are real.
    """
    logits, caches = model(prompts, caches, lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], 1)[:, 0]
    first = pick(last, temperature, keys[0])

    def step(carry, key):
        token, caches = carry
        logits, caches = model(token[:, None], caches)
        token = pick(logits[:, 0], temperature, key)
        return (token, caches), token

    (_, caches), rest = jax.lax.scan(step, (first, caches), keys[1:])
    return jnp.concatenate((first[None], rest)).T, caches


def generate_uncached(model: Model, prompts, lengths, keys, temperature: float):
    """Returns the same bytes, by a forward pass over everything so far for each of them."""
    rows = jnp.arange(len(prompts))
    room = jnp.zeros((len(prompts), len(keys)), prompts.dtype)

    def step(carry, key):
        tokens, lengths = carry
        # What lies behind a row's last byte is not seen from there.
        token = pick(model(tokens)[rows, lengths - 1], temperature, key)
        return (tokens.at[rows, lengths].set(token), lengths + 1), token

    start = jnp.concatenate((prompts, room), 1), lengths
    return jax.lax.scan(step, start, keys)[1].T


@dataclasses.dataclass
class Written:
    """Bytes [B, count] behind the prompts, and how many a second were written, over all rows."""

    tokens: np.ndarray
    tokens_per_second: float


def write(
    apply: Model,
    params,
    sizes: Sizes,
    prompts: list[bytes],
    count: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Written:
    """Writes `count` bytes behind each prompt; `apply` is the model as (params, ...)."""
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    longest = int(lengths.max())
    padded = [np.frombuffer(prompt.ljust(longest, b"\0"), np.uint8) for prompt in prompts]
    tokens = jnp.asarray(np.stack(padded), jnp.int32)
    keys = jax.random.split(jax.random.key(seed), count)
    caches = sizes.make_caches(len(prompts), longest + count) if use_cache else None

    # The caches are donated: a step writes into them, and does not copy them.
    @partial(jax.jit, donate_argnums=1)
    def run(params, caches, tokens, lengths, keys):
        model = partial(apply, params)
        if caches is None:
            return generate_uncached(model, tokens, lengths, keys, temperature), None
        return generate(model, caches, tokens, lengths, keys, temperature)

    # Compiled ahead, so that the speed is that of writing alone.
    compiled = run.lower(params, caches, tokens, lengths, keys).compile()
    start = time.perf_counter()
    written, _ = jax.block_until_ready(compiled(params, caches, tokens, lengths, keys))
    seconds = time.perf_counter() - start
    return Written(np.asarray(written), len(prompts) * count / seconds)


def linen_apply(sizes: Sizes, params) -> tuple[Model, Any]:
    """The linen model as a function of parameters, and these."""
    model = Transformer(sizes)
    return lambda params, *args: model.apply({"params": params}, *args), params


def nnx_apply(sizes: Sizes, params) -> tuple[Model, Any]:
    """The same of the nnx model, from linen's parameters."""
    model = nnx.eval_shape(lambda: NnxTransformer(sizes, rngs=nnx.Rngs(0)))
    nnx.update(model, params)
    graph, state = nnx.split(model)
    return lambda state, *args: nnx.merge(graph, state)(*args), state


APIS = {"linen": linen_apply, "nnx": nnx_apply}


def save(path: Path, sizes: Sizes, params) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = json.dumps(vars(sizes) | {"dtype": jnp.dtype(sizes.dtype).name}).encode()
    path.write_bytes(words + b"\n" + flax.serialization.to_bytes(params))


def load(path: Path) -> tuple[Sizes, Any]:
    """The sizes and parameters that `save` has written."""
    words, params = path.read_bytes().split(b"\n", 1)
    sizes = json.loads(words)
    sizes = Sizes(**(sizes | {"dtype": jnp.dtype(sizes["dtype"])}))
    return sizes, flax.serialization.msgpack_restore(params)


def show(prompt: bytes, written: np.ndarray) -> str:
    text = bytes(written.astype(np.uint8)).decode(errors="replace")
    return f"--- {prompt.decode(errors='replace')!r} goes on ---\n{text}\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=["The import statement", "A class"])
    parser.add_argument("--api", choices=APIS, default="linen")
    parser.add_argument("--count", type=int, default=400, help="bytes to write behind each prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="also without a cache")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args(argv)
    if not args.checkpoint.exists():
        parser.error(f"{args.checkpoint} does not exist: run `make demo` first")
    sizes, params = load(args.checkpoint)
    apply, params = APIS[args.api](sizes, params)
    prompts = [prompt.encode() for prompt in args.prompts]
    run = partial(
        write,
        apply,
        params,
        sizes,
        prompts,
        args.count,
        temperature=args.temperature,
        seed=args.seed,
    )
    cached = run()
    for prompt, written in zip(prompts, cached.tokens, strict=True):
        print(show(prompt, written))
    print(f"{args.api}, {len(prompts)} rows, with a cache: {cached.tokens_per_second:,.0f} bytes/s")
    if args.compare:
        plain = run(use_cache=False)
        same = (plain.tokens == cached.tokens).mean()
        print(
            f"without: {plain.tokens_per_second:,.0f} bytes/s; {same:.0%} of the bytes are the same"
        )


if __name__ == "__main__":
    main()
