"""The benchmark of attention over a cache runs, and keeps what it measured."""

import json
import time

import jax
import numpy as np
import pytest

from benchmarks import decode, decode_report, record, timing
from tools import readme

SMALL = decode.Case(
    batch=3, kv_len=128, num_q_heads=4, num_kv_heads=2, head_dim=16, shortest=32, dtype="float32"
)


@pytest.fixture
def small(monkeypatch):
    """One small case, timed by the clock of the wall on a CPU."""

    def wall_ms(f, *args, iterations):
        start = time.perf_counter()
        out = jax.block_until_ready(f(*args))
        ms = 1e3 * (time.perf_counter() - start)
        return out, timing.Spread(ms, ms, ms)

    monkeypatch.setattr(timing, "gpu_ms", wall_ms)
    monkeypatch.setattr(timing, "copy_gb_s", lambda iterations: 1000.0)
    monkeypatch.setattr(decode, "CASES", [SMALL])


def test_bytes_are_of_the_tokens_that_are_there():
    np.testing.assert_array_equal(SMALL.lengths, [32, 64, 128])
    assert SMALL.bytes == 4 * 16 * (2 * 2 * (32 + 64 + 128) + 2 * 3 * 4)


def test_rows_hold_speed_and_error(small, tmp_path):
    words = ["--output", str(tmp_path), "--impl", "ours,ours-paged,xla", "--iterations", "5"]
    assert decode.main(words) == 0
    assert decode.main([*words, "--impl", "ours"]) == 0
    (path,) = tmp_path.glob("*/decode.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["ours", "ours-paged", "xla"]
    for row in rows:
        assert row["rel_err"] < 1e-5 and row["case"] == "3x128-from-32x4/2x16-float32"
        np.testing.assert_allclose(row["gb_s"], SMALL.bytes / row["ms"] / 1e6, atol=0.06)
        np.testing.assert_allclose(row["share_of_copy"], row["gb_s"] / 1000, atol=6e-5)


def test_what_fails_is_a_row_and_fails_the_run(small, tmp_path, monkeypatch):
    def broken(q, cache):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(decode.IMPLS, "ours", (broken, lambda cache: cache))
    assert decode.main(["--output", str(tmp_path), "--impl", "ours"]) == 1
    (path,) = tmp_path.glob("*/decode.json")
    assert json.loads(path.read_text())["rows"][0]["error"] == "RuntimeError: no kernel"


def test_every_case_lowers_for_cuda(capsys):
    assert decode.main(["--dry", "--only", "^8x32768x"]) == 0
    assert "2 cases of ours lower for CUDA" in capsys.readouterr().out


def test_report_has_a_line_for_each_case(tmp_path):
    assert decode_report.section(tmp_path) is None
    row = {"case": "8x64x4/2x16-bfloat16", "commit": "0123456789ab"}
    speed = {"ms": 0.5, "gb_s": 2999.6, "share_of_copy": 0.987}
    header = {"device": "Test GPU", "jax": "0", "date": "today", "copy_gb_s": 3030.3}
    rows = [row | speed | {"impl": "ours"}, row | {"impl": "cudnn", "error": "refused"}]
    record.write(tmp_path / "test_gpu" / "decode.json", header, rows, decode.KEY)
    text = decode_report.section(tmp_path)
    assert "| `8x64x4/2x16` | 0.500 ms, 3000 GB/s, **99%** | - | - | - |" in text
    assert "commit 0123456789:" in text and "3030 GB/s of a copy" in text


def test_readme_says_what_the_result_files_say():
    made = readme.part(readme.PATH.read_text(), decode_report.MARKER)
    assert made == decode_report.section()
