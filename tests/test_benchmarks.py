"""The benchmarks run, keep what they measured, and the README says what their files say."""

import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from benchmarks import cases, features, peers, record, report, run, tables, timing
from tools import readme

SMALL = cases.Case(
    batch=2,
    q_len=70,
    kv_len=70,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    value_dim=24,
    causal=True,
)


@pytest.fixture
def small(monkeypatch):
    """Suites of one small case, timed by the clock of the wall on a CPU."""

    def wall_ms(f, *args, iterations):
        start = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        ms = 1e3 * (time.perf_counter() - start)
        return out, timing.Spread(ms, ms, ms)

    monkeypatch.setattr(timing, "gpu_ms", wall_ms)
    monkeypatch.setattr(
        timing, "chip_rates", lambda iterations: {"matmul_tflops": 1.0, "copy_gb_s": 1.0}
    )
    monkeypatch.setattr(run, "SUITES", {name: lambda: [SMALL] for name in cases.SUITES})
    monkeypatch.setenv("GIT_COMMIT", "first")


def test_suites_hold_what_they_promise():
    grid = cases.SUITES["grid"]()
    assert len(grid) == len(set(grid)) == 36
    assert {c.batch * c.q_len for c in grid} == {16384}
    assert {c.num_q_heads * c.head_dim for c in grid} == {2048}
    every = [str(c) for suite in cases.SUITES.values() for c in suite()]
    assert "4x4096x32/8x128-causal-bfloat16" in every
    assert "4x1024/4096x16x128-full-bfloat16" in every
    assert not {*cases.SUITES["startup"]()} & {*grid, *cases.SUITES["beyond"]()}


def test_flops_of_a_causal_case_are_half():
    full = cases.Case(**(vars(SMALL) | {"causal": False}))
    assert full.flops["fwd"] == 2 * 2 * 4 * 70 * 70 * (16 + 24)
    assert SMALL.flops == {name: n / 2 for name, n in full.flops.items()}
    assert full.flops["fwd_bwd"] == full.flops["fwd"] + full.flops["bwd"]


@pytest.mark.quick
def test_dry_run_lowers_ours_for_cuda(capsys):
    assert run.main(["--dry", "--only", "^(4x4096x16x128|16x1024x8x256)-causal"]) == 0
    assert "2 cases of ours lower for CUDA" in capsys.readouterr().out


def test_dry_run_lowers_features_for_cuda(capsys):
    assert run.main(["--suite", "features", "--dry", "--only", "packed-8x|user-softcap"]) == 0
    assert "2 cases of ours lower for CUDA" in capsys.readouterr().out


def test_wrong_arguments_are_refused(capsys):
    for words, message in (
        (["--only", "nothing"], "leaves no case"),
        (["--impl", "ours,nobody"], "'nobody' must be one of ours, cudnn"),
        (["--iterations", "4"], "must be at least 5"),
    ):
        with pytest.raises(SystemExit):
            run.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(70, 70), (1300, 700)], ids=str)
def test_reference_of_the_errors_is_attention_and_its_gradient(sizes, causal):
    case = cases.Case(
        **(vars(SMALL) | {"q_len": sizes[0], "kv_len": sizes[1], "causal": causal}),
    )
    data = timing.arrays(case)
    allowed = jnp.arange(case.kv_len)[None] <= jnp.arange(case.q_len)[:, None]
    allowed = allowed if causal else jnp.ones((1, 1), bool)
    *qkv, dout = (np.asarray(x, np.float64) for x in data)
    exact = lambda q, k, v: oracle.attention(q, k, v, allowed=allowed)[:1]  # noqa: E731
    (truth,), gradients = oracle.with_gradients(qkv, (dout,), exact)
    results = [jnp.asarray(x, jnp.float32) for x in (truth, *gradients)]
    errors = timing.relative_errors(case, results, timing.reference(case, data))
    assert list(errors) == ["out", "dq", "dk", "dv"]
    assert max(errors.values()) < 1e-5


def test_runs_merge_into_one_file(small, tmp_path, capsys, monkeypatch):
    assert run.main(["--impl", "ours,cudnn", "--output", str(tmp_path)]) == 0
    monkeypatch.setenv("GIT_COMMIT", "second")
    assert run.main(["--impl", "xla", "--output", str(tmp_path)]) == 0
    assert run.main(["--impl", "ours", "--output", str(tmp_path)]) == 0
    result = record.load(tmp_path / "cpu" / "grid.json")
    assert result["jax"] == jax.__version__ and result["commit"] == "second"
    assert result["versions"].keys() == {"cudnn", "xla"}
    ours, cudnn, xla = result["rows"]
    assert [ours["commit"], cudnn["commit"], xla["commit"]] == ["second", "first", "second"]
    assert ours["backend"] == "blockwise"
    assert ours["head_dim"] == 16 and ours["value_dim"] == 24 and ours["causal"] is True
    assert ours["fwd_tflops"] >= 0 and ours["bwd_ms"] > 0 and len(ours["fwd_bwd_ms_range"]) == 2
    assert max(ours["rel_err"].values()) < 0.01
    # jax.nn does not take values with a head dim of their own.
    assert "error" in cudnn and "fwd_ms" not in cudnn
    assert "Error" in capsys.readouterr().out


def test_startup_counts_seconds(small, tmp_path):
    run.main(["--suite", "startup", "--impl", "ours", "--output", str(tmp_path)])
    (row,) = record.load(tmp_path / "cpu" / "startup.json")["rows"]
    assert row["build_s"] == pytest.approx(
        row["trace_s"] + row["lower_s"] + row["compile_s"], abs=0.01
    )


def test_a_dead_gpu_stops_the_run_and_spares_the_other_rows(small, tmp_path, monkeypatch):
    def dies(case):
        def f(q, k, v):
            raise RuntimeError("CUDA_ERROR_MISALIGNED_ADDRESS")

        return f

    assert run.main(["--impl", "ours", "--output", str(tmp_path)]) == 0
    path = tmp_path / "cpu" / "grid.json"
    (ours,) = record.load(path)["rows"]
    monkeypatch.setitem(peers.PEERS, "cudnn", peers.PEERS["cudnn"]._replace(make=dies))
    assert run.main(["--impl", "cudnn,ours", "--output", str(tmp_path)]) == 1
    kept, dead = record.load(path)["rows"]
    assert kept == ours and "MISALIGNED" in dead["error"]


def test_a_missing_peer_is_said_in_one_line(small, tmp_path, capsys, monkeypatch):
    absent = peers.PEERS["fa4"]._replace(module="no_such_module")
    monkeypatch.setitem(peers.PEERS, "fa4", absent)
    run.main(["--impl", "ours,fa4", "--output", str(tmp_path)])
    said = [text for text in capsys.readouterr().out.splitlines() if "fa4" in text]
    assert said == ["fa4 is not measured: ModuleNotFoundError: No module named 'no_such_module'"]


def feature_rows() -> list[tables.Row]:
    """Of two features: one ahead of its peers and slower than promised beside ours, one failed."""
    packed, _, window, *_ = features.features()

    def row(feature, name: str, ms: float, **more):
        times = {"fwd_ms": ms, "fwd_bwd_ms": 4 * ms, "peak_temp_bytes": 3 * 2**20}
        return {"case": feature.name, **vars(feature.shape), "impl": name} | times | more

    return [
        row(packed, "ours", 0.25, backend="blockwise"),
        row(packed, "ours, 8 rows of 2048", 0.2),
        row(packed, "fa4", 0.5),
        row(packed, "cudnn", 1.0),
        row(packed, "tokamax", 0.1, error="refused"),
        row(window, "ours", 0.1, error="refused"),
    ]


def made_up(folder: pathlib.Path) -> None:
    """Result files of a device that does not exist."""
    header = {
        "device": "Test GPU",
        "jax": "0",
        "date": "2000-01-01",
        "matmul_tflops": 900.0,
        "copy_gb_s": 3000.0,
    }
    speeds = {"ours": 600.0, "cudnn": 500.0, "fa4": 400.0}
    record.write(folder / "features.json", header, feature_rows())
    record.write(
        folder / "startup.json",
        header,
        [
            {**vars(case), "impl": "ours", "commit": "abc", "build_s": 2.25}
            for case in cases.SUITES["startup"]()
        ],
    )
    for suite in ("grid", "beyond"):
        rows = [
            {**vars(case), "impl": name, "commit": "abc"}
            | {f"{direction}_tflops": speed for direction in run.DIRECTIONS}
            for case in cases.SUITES[suite]()
            for name, speed in speeds.items()
        ]
        rows[-2] = {**vars(cases.SUITES[suite]()[-1]), "impl": "cudnn", "error": "refused"}
        record.write(folder / f"{suite}.json", header, rows)


def test_report_compares_with_the_best_peer(tmp_path):
    assert report.section(tmp_path) is None
    made_up(tmp_path / "test_gpu")
    text = report.section(tmp_path)
    assert "| 64 | causal | 512 | 600 : 500 cuDNN, **1.20** |" in text
    assert "| 256 | full | 16384 | 600 : 400 fa4-jax, **1.50** |" in text
    assert "forward: 1.21 of the best peer in the geometric mean of 36 cases, at worst 1.20" in text
    assert "Seconds to trace, lower and compile" in text and "-full-bfloat16` 2.2" in text
    report.plot(tmp_path / "test_gpu")
    assert {p.name for p in (tmp_path / "test_gpu").glob("*.png")} == {
        f"{direction}.png" for direction in run.DIRECTIONS
    }


def test_report_of_features_has_the_best_peer_and_what_stands_beside(tmp_path):
    made_up(tmp_path / "test_gpu")
    assert (
        "| `packed-8x2048-in-16384`, blockwise | 0.250 : 0.500 fa4-jax, **2.00** "
        "| 1.000 : 2.000 fa4-jax, **2.00** "
        "| **1.25** **1.25** of 8 rows of 2048 (at most 1.1) | 3 |"
    ) in report.section(tmp_path)
    assert "| `window-1024-in-16384` | failed |" in report.section(tmp_path)


def group(case: cases.Case, tflops: float) -> tables.Group:
    return case, {"ours": {f"{direction}_tflops": tflops for direction in run.DIRECTIONS}}


def test_cliffs_count_padding_as_work_and_compare_with_the_nearest_of_the_grid():
    grid = [group(c, 500.0) for c in cases.SUITES["grid"]()]
    beyond = {str(c): c for c in cases.SUITES["beyond"]()}
    odd = beyond["16x1000x16x128-causal-bfloat16"]
    bf16, f16 = (beyond[f"4x4096x16x128-full-{dtype}"] for dtype in ("bfloat16", "float16"))
    dims = [beyond[f"4x4096x16x{d}-full-bfloat16"] for d in ("80", "96", "192", "192/128")]
    speeds = {odd: 380.0, bf16: 500.0, f16: 480.0} | dict.fromkeys(dims, 450.0)
    found = tables.kept(grid, [group(case, tflops) for case, tflops in speeds.items()])
    assert str(found[odd].neighbour) == "16x1024x16x128-causal-bfloat16"
    assert found[odd].ratios["fwd"] == pytest.approx(380 / 500 * (1008 / 1000) ** 2)
    assert f"**{found[odd].ratios['fwd']:.2f}**" in str(found[odd])
    assert found[f16].neighbour == bf16 and found[f16].ratios["bwd"] == pytest.approx(0.96)
    assert bf16 not in found
    assert [found[c].neighbour.head_dim for c in dims] == [64, 64, 128, 128]
    assert {found[c].neighbour.q_len for c in dims} == {4096}
    said = tables.cliffs(found)
    assert "off the grid: at worst 0.77" in said and "3 of 15 figures are below 0.8" in said
    assert "float16: at worst 0.96" in said and "0 of 3 figures are below 0.95" in said


def test_result_files_are_json_with_a_row_a_line(tmp_path):
    made_up(tmp_path)
    text = (tmp_path / "grid.json").read_text()
    assert len(re.findall('(?m)^  {"batch"', text)) == 3 * 36
    assert json.loads(text)["device"] == "Test GPU"


def test_readme_says_what_the_result_files_say():
    assert readme.part(readme.PATH.read_text(), report.MARKER) == report.section()


@pytest.mark.parametrize(
    "suite, measured",
    [
        ("grid", {"fwd_ms", "bwd_ms", "fwd_bwd_ms", "rel_err"}),
        ("beyond", {"fwd_ms", "bwd_ms", "fwd_bwd_ms", "rel_err"}),
        ("features", {"case", "fwd_ms", "fwd_bwd_ms", "peak_temp_bytes"}),
        ("startup", {"build_s", "first_call_s"}),
    ],
)
def test_committed_rows_are_complete(suite, measured):
    for path in record.RESULTS.glob(f"*/{suite}.json"):
        for row in record.load(path)["rows"]:
            assert row["commit"] and row["date"]
            assert "error" in row or measured <= row.keys()
