"""The example that `make demo` runs: it learns, plots, writes text, and agrees with Flax."""

import contextlib
import io

import numpy as np
import pytest

import train_lm

TINY = "--steps 24 --eval-every 12 --batch 4 --context 32 --layers 1 --width 32 --heads 2"


# One test, not one per claim: each process of a parallel run would train for its share of them.
@pytest.mark.quick
def test_example_learns_plots_writes_and_agrees_with_flax_attention(tmp_path):
    plot = tmp_path / "plots" / "loss.png"
    arguments = [*TINY.split(), "--learning-rate=0.01", "--sample-bytes=40", f"--plot={plot}"]
    arguments.append(f"--checkpoint={tmp_path / 'model'}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runs = train_lm.main([*arguments, "--compare"])
    printed = printed.getvalue()
    ours, flax = runs["pallas_flash"], runs["flax"]

    # The loss falls. Uniform bytes would give 5.5; 24 steps teach how common each byte is.
    assert list(ours.held_out) == [0, 12, 24]
    assert ours.final < ours.held_out[12] < ours.held_out[0]
    assert ours.final < 4.0

    # Same parameters, batches and mathematics: the whole curve agrees.
    np.testing.assert_allclose(ours.train_losses, flax.train_losses, rtol=1e-3)
    np.testing.assert_allclose(
        list(ours.held_out.values()), list(flax.held_out.values()), rtol=1e-3
    )

    # It says which backend serves it, and both losses and speeds.
    assert "attention backend: " in printed
    for name, run in runs.items():
        assert run.tokens_per_second > 0
        assert f"{name:14}" in printed
        assert f"{run.held_out[0]:.3f} -> {run.final:.3f}" in printed

    assert plot.read_bytes().startswith(b"\x89PNG")

    # It writes with a cache, greedily and by drawing, and leaves the model behind.
    for name in ("the likeliest bytes", "drawn bytes"):
        sample = printed.split(f"--- {name}, after the last 32 held-out bytes ---\n")[1]
        sample = sample.split("\n---\n")[0]
        # A byte that is no UTF-8 shows as one replacement character.
        assert 0 < len(sample) <= 40
        assert len(sample.encode()) >= 40
    assert printed.count("are words of the training text; ") == 2
    assert printed.count("bytes/s with a cache") == 2
    assert (tmp_path / "model").exists()


@pytest.mark.quick
def test_held_out_text_is_not_trained_on():
    text, held_out = (train_lm.decode(part) for part in train_lm.load_text())
    # The cut falls within a paragraph.
    whole_paragraphs = held_out.split("\n\n")[1:]
    assert len(whole_paragraphs) > 50
    assert not set(whole_paragraphs) & set(text.split("\n\n"))
