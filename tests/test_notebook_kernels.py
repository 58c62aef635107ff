"""The notebooks' kernels are right and lower for CUDA; the commands that time them run."""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from benchmarks import cases, notebook_figures, paper_figure, record, timing
from benchmarks.building import Builder
from conftest import normal
from interpreted import interpreted, with_races
from notebooks import figures
from notebooks.kernels import hopper_steps, textbook
from tolerance import assert_as_good_as_plain


def bf16(seed, *shape):
    return normal(seed, *shape, dtype=jnp.bfloat16)


def with_gradients(form, causal, q, k, v, dout):
    out, vjp = jax.vjp(partial(form, causal=causal), q, k, v)
    return out, *vjp(dout)


@interpreted
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", ["flash1", "flash2"])
def test_textbook_kernels_match_standard_attention_without_races(shim, name, causal):
    arrays = [bf16(i, 1, 256, 1, 64) for i in range(4)]
    results, has_raced = with_races(
        jax.jit(partial(with_gradients, textbook.FORMS[name], causal)), *arrays
    )
    assert not has_raced
    plain = with_gradients(textbook.standard, causal, *arrays)
    truth = with_gradients(textbook.standard, causal, *(x.astype(jnp.float32) for x in arrays))
    for array, x, low, exact in zip(("out", "dq", "dk", "dv"), results, plain, truth):
        assert_as_good_as_plain(x, low, exact, array, factor=2.0 if array == "out" else 3.0)


@interpreted
@pytest.mark.parametrize("step", hopper_steps.STEPS.values(), ids=hopper_steps.STEPS)
def test_steps_match_standard_attention_without_races(shim, step):
    # Enough blocks of keys for stages to be used again.
    q, k, v = bf16(0, 1, 128, 1, 64), bf16(1, 1, 512, 1, 64), bf16(2, 1, 512, 1, 64)
    out, has_raced = with_races(jax.jit(step), q, k, v)
    assert not has_raced
    plain = textbook.standard(q, k, v, causal=False)
    truth = textbook.standard(*(x.astype(jnp.float32) for x in (q, k, v)), causal=False)
    assert_as_good_as_plain(out, plain, truth, "out", factor=2.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_lower_for_cuda(head_dim):
    x = jax.ShapeDtypeStruct((1, 1024, 2, head_dim), jnp.bfloat16)
    calls = [(step, 3) for step in hopper_steps.STEPS.values()]
    for name in ("flash1", "flash2"):
        calls += [(partial(with_gradients, textbook.FORMS[name], c), 4) for c in (False, True)]
    for call, count in calls:
        lowered = jax.jit(call).trace(*[x] * count).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def small(causal, head_dim=64):
    return cases.Case(
        batch=1,
        q_len=64,
        kv_len=64,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        value_dim=head_dim,
        causal=causal,
    )


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The commands on tiny problems, by the clock of the wall, writing to a folder of the test."""

    def wall_ms(f, *args, iterations):
        start = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        ms = 1e3 * (time.perf_counter() - start)
        return out, timing.Spread(ms, ms, ms)

    grid = [small(causal, d) for causal, d in ((False, 64), (True, 128))]
    monkeypatch.setattr(timing, "gpu_ms", wall_ms)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(paper_figure, "cases", lambda: grid)
    # What they ask of XLA is for GPUs.
    for module in (paper_figure, notebook_figures):
        monkeypatch.setattr(module, "CUBLAS", {})
    monkeypatch.setattr(notebook_figures, "case", lambda *_, causal=False: small(causal))
    monkeypatch.setattr(notebook_figures, "LENGTHS", [64])
    return tmp_path / "cpu"


def test_paper_figure_is_measured_and_drawn(on_cpu, capsys, monkeypatch):
    monkeypatch.setattr(paper_figure, "IMPLEMENTATIONS", ("standard", "ours", "cudnn"))
    words = ["--output", str(on_cpu.parent), "--iterations", "1"]
    assert paper_figure.main([*words, "--only", "x64-"]) == 0
    assert paper_figure.main([*words, "--only", "x128-"]) == 0
    results = record.load(on_cpu / "paper_figure.json")
    rows = {(r["impl"], r["head_dim"], r["causal"]): r for r in results["rows"]}
    assert len(rows) == 6
    for (name, *_), row in rows.items():
        if name == "cudnn":
            assert "fwd_error" in row and "fwd_ms" not in row
        else:
            assert max(row["rel_err"].values()) < 0.02
    figure = figures.speed_bars(results)
    assert "cpu" in figure.get_suptitle()
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown.count("failed") == 1 and shown.count("OOM") == 0
    for row in results["rows"]:
        if row["impl"] == "cudnn":
            row["fwd_bwd_error"] = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    shown = [text.get_text() for text in figures.speed_bars(results).axes[0].texts]
    assert shown.count("OOM") == 1


def test_notebook_figures_are_measured_and_drawn(on_cpu, capsys, monkeypatch):
    some = {"none": None, "ours": pf.SlidingWindow(3, 0)}
    assert set(notebook_figures.masks_of(small(True))) > {"none", "8 packed documents"}
    monkeypatch.setattr(notebook_figures, "masks_of", lambda _: some)
    assert notebook_figures.main(["masks"]) == 0
    assert notebook_figures.main(["lengths"]) == 0
    results = json.loads((on_cpu / "notebook_figures.json").read_text())
    areas = {row["mask"]: row["visited_blocks"] for row in results["masks"]}
    assert areas == {"none": 1.0, "ours": 1.0}
    assert {row["impl"] for row in results["lengths"]} == {"ours", "standard"}
    for row in results["lengths"]:
        assert row["fwd_bwd_total_bytes"] > row["fwd_bwd_temp_bytes"] > 0
    assert "cpu" in figures.growth(results).get_suptitle()


def test_steps_are_measured_with_their_errors(on_cpu, capsys, monkeypatch):
    forms = {"right": lambda q, k, v: textbook.standard(q, k, v, causal=False), "wrong": None}
    monkeypatch.setattr(hopper_steps, "STEPS", forms)
    with Builder() as builder:
        rows = {row["impl"]: row for row in notebook_figures.steps(builder)}
    assert rows["right"]["rel_err"] < 0.02 and rows["ours"]["rel_err"] < 0.02
    assert "TypeError" in rows["wrong"]["error"]


def test_a_missing_result_names_its_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.load("paper_figure") is None
    assert "python -m benchmarks.paper_figure" in capsys.readouterr().out


def test_committed_figures_are_right_attention():
    results = figures.load("paper_figure")
    assert results is not None
    assert {row["impl"] for row in results["rows"]} == set(paper_figure.IMPLEMENTATIONS)
    errors = [max(row["rel_err"].values()) for row in results["rows"] if "rel_err" in row]
    assert np.max(errors) < 0.01
