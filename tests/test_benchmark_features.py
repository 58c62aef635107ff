"""The suite of masks, scores and dropout: every implementation is asked for the same thing."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import feature_timing, features, measure, peers, record, run, timing

# What the issue that asked for them lists, by the start of their names.
PROMISED = (
    *("packed-8x2048-in-16384", "packed-37-in-65536", "window-1024-in-16384"),
    *("pair-bias-384x384x4x32", "pair-bias-768x768x4x64", "dense-bias-8x2048x16x64"),
    *("t5-bias-8x2048x16x64", "softcap-4x4096x16x128", "dropout-4x4096x16x128"),
    *("user-softcap", "user-alibi", "user-mask-4x4096", "user-mask-window-1024"),
    *("deterministic-4x4096x32x64", "deterministic-4x4096x16x128", "deterministic-4x4096x8x256"),
)
SMALL = {
    "packed": features.packed("packed", [16, 16], 2, with_mask=True),
    "window": features.window(48, 2, left=20),
    "pair-bias": features.pair_bias(20, 2, 16),
}
T5 = features.relative_bias(1, 40, 2)


@pytest.fixture
def small(monkeypatch):
    """Small features; peers that take a bias and a mask are XLA, the clock is that of the wall."""

    def wall_ms(f, *args, iterations):
        start = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        ms = 1e3 * (time.perf_counter() - start)
        return out, timing.Spread(ms, ms, ms)

    def by_xla(name, **options):
        return functools.partial(jax.nn.dot_product_attention, implementation="xla", **options)

    monkeypatch.setattr(timing, "gpu_ms", wall_ms)
    monkeypatch.setattr(
        timing, "chip_rates", lambda iterations: {"matmul_tflops": 1.0, "copy_gb_s": 1.0}
    )
    monkeypatch.setattr(peers, "dense", by_xla)
    suite = [SMALL["packed"], SMALL["pair-bias"]]
    monkeypatch.setattr(run, "SUITES", {"features": lambda: suite})
    monkeypatch.setenv("GIT_COMMIT", "some")


def test_every_promised_case_is_there():
    names = [str(f) for f in features.features()]
    assert len(names) == len(set(names))
    for promised in PROMISED:
        assert any(name.startswith(promised) for name in names), promised


def test_random_lengths_fill_the_row():
    lengths = features.random_lengths(37, 65536)
    assert len(lengths) == len(set(lengths)) == 37
    assert sum(lengths) == 65536 and min(lengths) > 0


def test_all_implementations_give_the_same(small, tmp_path):
    assert run.main(["--suite", "features", "--impl", "ours,cudnn", "--output", str(tmp_path)]) == 0
    result = record.load(tmp_path / "cpu" / "features.json")
    assert result["versions"].keys() == {"cudnn"}
    rows = {(row["case"], row["impl"]): row for row in result["rows"]}
    pair, beside = SMALL["pair-bias"].name, "ours, 2 rows of 16"
    assert rows.keys() == {
        *((case, name) for case in ("packed", pair) for name in ("ours", "cudnn")),
        ("packed", beside),
    }
    for (case, name), row in rows.items():
        assert row["fwd_ms"] > 0 and row["fwd_bwd_ms"] > 0 and row["peak_temp_bytes"] >= 0
        if name != beside:
            learned = {"dbias"} if case == pair else set()
            assert row["rel_err"].keys() == {"out", "dq", "dk", "dv"} | learned
            assert max(row["rel_err"].values()) < 0.006, (case, name)
        assert row.get("backend") == ("blockwise" if name == "ours" else None)


@pytest.mark.parametrize("feature", [SMALL["window"], T5], ids=str)
def test_others_say_what_ours_says(small, feature):
    qkv, _, arrays = feature.inputs()
    ours, other = (
        np.asarray(feature.calls[name](*qkv, arrays), np.float32) for name in ("ours", "cudnn")
    )
    np.testing.assert_allclose(ours, other, atol=0.02)


def test_a_wrong_answer_has_a_large_error(small):
    right = SMALL["window"]
    wrong = features.window(48, 2, left=19)
    asked = measure.feature_programs(right, ["ours"])
    asked["ours"] = measure.feature_programs(wrong, ["ours"])["ours"]
    (builds,) = measure.build([right], lambda _: asked)
    (row,) = measure.measure_feature(right, builds, 5)
    assert min(row["rel_err"].values()) > 0.05


def test_rows_that_stand_beside_packed_documents_are_the_same_problem(small):
    packed = SMALL["packed"]
    qkv, _, arrays = packed.inputs()
    ours, rows = packed.calls["ours"], packed.calls["ours, 2 rows of 16"]
    np.testing.assert_allclose(
        *(np.asarray(f(*qkv, arrays), np.float32) for f in (ours, rows)), atol=0.02
    )


def test_reference_keeps_the_heads_it_promises():
    lowered = feature_timing.lower_reference(SMALL["window"])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), lowered.fwd_bwd.out_info)
    assert shapes["out"] == ((1, 48, 1, 128), jnp.float32)


def test_features_of_one_shape_keep_their_own_rows(tmp_path):
    same = [f for f in features.features() if str(f.shape) == "4x4096x16x128-causal-bfloat16"]
    for ms in (1.0, 2.0):
        rows = [{**measure.new_row(vars(f.shape), "ours"), "case": f.name, "ms": ms} for f in same]
        record.write(tmp_path / "features.json", {"device": "Test GPU"}, rows)
    kept = record.load(tmp_path / "features.json")["rows"]
    assert [(row["case"], row["ms"]) for row in kept] == [(f.name, 2.0) for f in same]
    assert len(same) > 1
