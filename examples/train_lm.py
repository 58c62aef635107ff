"""Trains a small Transformer language model with flash attention, on text every Python carries.

The model reads the documentation that `help()` shows, byte by byte, and learns to predict the
next byte. It is an ordinary Flax model (`transformer.py`) but for its attention layer. At the end
it writes text with a cache of keys and values (`generate.py`).

    python examples/train_lm.py              train, plot the loss, write some text
    python examples/train_lm.py --compare    and train it again with Flax's attention layer
"""

import argparse
import dataclasses
import re
import time
from pathlib import Path
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from tqdm import tqdm

import pallas_flash
from flax_layers.linen import Attention
from generate import CHECKPOINT, linen_apply, save, write
from transformer import Sizes, Transformer


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on and the held-out bytes, each as an int32 array."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    # Topics quote each other: a paragraph is kept once, so that no held-out one is trained on.
    # Tables are left out, they are mostly dashes and spaces.
    text = "\n\n".join(p for p in dict.fromkeys(paragraphs) if "--+" not in p)
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    cut = int(0.95 * len(tokens))
    return tokens[:cut], tokens[cut:]


def decode(tokens) -> str:
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


def words_of(text) -> list[str]:
    return re.findall("[A-Za-z]{3,}", text)


def random_windows(tokens, size, count, rng) -> np.ndarray:
    """Returns [count, size + 1] random stretches: inputs, and the same shifted by one."""
    starts = rng.integers(0, len(tokens) - size, count)
    return tokens[starts[:, None] + np.arange(size + 1)]


class FlaxAttention(nn.MultiHeadDotProductAttention):
    """Flax's own layer, causal by an array of length x length."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x, mask=nn.make_causal_mask(x[..., 0]))


def flax_attention(*, num_heads, rope, use_bias, dtype, name, **ours):
    """Flax's layer in the place of ours, with the same rotary embeddings and parameters."""
    del ours

    def attention_fn(query, key, value, mask):
        positions = jnp.arange(query.shape[-3])
        query, key = rope(query, positions), rope(key, positions)
        return nn.dot_product_attention(query, key, value, mask=mask)

    return FlaxAttention(
        num_heads, use_bias=use_bias, dtype=dtype, attention_fn=attention_fn, name=name
    )


def loss_fn(params, apply_fn, windows):
    """Returns the mean cross-entropy of the next byte, in nats."""
    logits = apply_fn(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@jax.jit
def train_step(state, windows):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, windows)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def held_out_loss(state, batches):
    """Returns the mean loss over batches [number, batch, context + 1]."""
    losses = jax.lax.map(lambda windows: loss_fn(state.params, state.apply_fn, windows), batches)
    return losses.mean()


@dataclasses.dataclass
class Run:
    """What a training run leaves behind. Losses are in nats per byte."""

    state: TrainState
    train_losses: list[float]
    # Step -> loss.
    held_out: dict[int, float]
    tokens_per_second: float

    @property
    def final(self) -> float:
        return self.held_out[max(self.held_out)]


def train(args, attention) -> Run:
    """Trains with one attention layer. The same seed gives the same start and the same batches."""
    model = Transformer(sizes_of(args), attention)
    text, held_out_text = load_text()
    rng = np.random.default_rng(args.seed)
    # Always the same held-out windows, side by side.
    starts = np.arange(0, len(held_out_text) - args.context, args.context)
    starts = starts[: len(starts) // args.batch * args.batch].reshape(-1, args.batch, 1)
    held_out_windows = held_out_text[starts + np.arange(args.context + 1)]

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 20 + 1, args.steps + 1, args.learning_rate / 20
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.1)
    )
    params = model.init(jax.random.key(args.seed), held_out_windows[0, :, :-1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters, {args.dtype}")

    # Compiled ahead, so that the speed below is that of training alone.
    windows = random_windows(text, args.context, args.batch, rng)
    step_fn = train_step.lower(state, windows).compile()
    held_out = {0: float(held_out_loss(state, held_out_windows))}
    print(f"held-out loss before training: {held_out[0]:.3f}")

    losses, seconds, start = [], 0.0, time.perf_counter()
    with tqdm(total=args.steps, unit="step", mininterval=1.0) as bar:
        for step in range(1, args.steps + 1):
            state, loss = step_fn(state, windows)
            # The device computes while the next batch is drawn.
            windows = random_windows(text, args.context, args.batch, rng)
            losses.append(float(loss))
            speed = step * args.batch * args.context / (seconds + time.perf_counter() - start)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if step % args.eval_every == 0 or step == args.steps:
                seconds += time.perf_counter() - start
                held_out[step] = float(held_out_loss(state, held_out_windows))
                bar.write(f"step {step}: held-out loss {held_out[step]:.3f}")
                start = time.perf_counter()
    return Run(state, losses, held_out, args.steps * args.batch * args.context / seconds)


def sizes_of(args) -> Sizes:
    return Sizes(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        kv_heads=args.heads,
        window=args.context,
        dtype=jnp.dtype(args.dtype),
    )


def describe_backend(args) -> str:
    """Returns the name of the attention backend in use, and why those before it are not."""
    q = jnp.zeros((args.batch, args.context, args.heads, args.width // args.heads), args.dtype)
    refused = ""
    mask = sizes_of(args).attention["mask"]
    for name, reason in pallas_flash.explain_backends(q, q, q, mask=mask).items():
        if reason is None:
            return name + refused
        refused += f"\n  not {name}: {reason}"
    raise RuntimeError(f"no attention backend serves this model:{refused}")


def save_plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        (line,) = axes.plot(run.train_losses, alpha=0.35, label=f"{name}, training")
        steps, losses = zip(*run.held_out.items(), strict=True)
        axes.plot(steps, losses, "o-", color=line.get_color(), label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Learning Python's documentation")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--compare", action="store_true", help="also train with Flax's attention")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="bytes the model looks back")
    for name, default in {"layers": 4, "width": 128, "heads": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=200, help="steps between held-out losses")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--sample-bytes", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("out/train_lm.png"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    return parser.parse_args(argv)


def write_text(args, params) -> None:
    """Lets the model write behind the last held-out bytes, with a cache, greedily and sampled."""
    text, held_out_text = load_text()
    prompt = bytes(held_out_text[-args.context :].astype(np.uint8))
    sizes = sizes_of(args)
    apply, params = linen_apply(sizes, params)
    words_known = set(words_of(decode(text)))
    for name, temperature in (("the likeliest bytes", 0.0), ("drawn bytes", args.temperature)):
        written = write(
            apply,
            params,
            sizes,
            [prompt],
            args.sample_bytes,
            temperature=temperature,
            seed=args.seed,
        )
        sample = decode(written.tokens[0])
        words = words_of(sample)
        share = sum(word in words_known for word in words) / max(len(words), 1)
        print(f"\n--- {name}, after the last {args.context} held-out bytes ---\n{sample}\n---")
        print(
            f"{share:.0%} of its {len(words)} words are words of the training text; "
            f"{written.tokens_per_second:,.0f} bytes/s with a cache"
        )


def main(argv=None) -> dict[str, Run]:
    """Runs the example; returns the runs by name, for the tests."""
    args = parse_args(argv)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    print(f"attention backend: {describe_backend(args)}")
    layers = {"pallas_flash": Attention}
    if args.compare:
        layers["flax"] = flax_attention
    runs = {}
    for name, layer in layers.items():
        print(f"\nTraining with the attention of {name}")
        runs[name] = train(args, layer)

    print(f"\n{'attention':14}{'held-out loss':>20}{'tokens/s':>12}")
    for name, run in runs.items():
        losses = f"{run.held_out[0]:.3f} -> {run.final:.3f}"
        print(f"{name:14}{losses:>20}{run.tokens_per_second:>12,.0f}")
    save_plot(runs, args.plot)
    print(f"loss curve: {args.plot}")

    params = runs["pallas_flash"].state.params["params"]
    save(args.checkpoint, sizes_of(args), params)
    print(f"model: {args.checkpoint}")
    write_text(args, params)
    return runs


if __name__ == "__main__":
    main()
