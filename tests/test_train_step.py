"""The benchmark of the training step: each attention trains the same model; file and table."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import gpt, peers, record, train_case, train_step, train_table
from tools import readme

TINY = gpt.Sizes(layers=2, width=16, heads=2, vocabulary=32)


def test_model_has_124_million_parameters():
    params, _ = jax.eval_shape(lambda: gpt.initial_state(gpt.Sizes()))
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == 124


def test_every_attention_trains_the_same_model(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "cudnn", peers.PEERS["xla"])
    rows = {name: train_case.measure(name, TINY, 2, 24, 2) for name in ("ours", "cudnn", "flax")}
    first, last = rows["flax"]["losses"]
    assert last < first - 0.01
    for row in rows.values():
        np.testing.assert_allclose(row["losses"], [first, last], atol=2e-3)
        assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["step_ms"] * 1e3, rel=0.01)


@pytest.mark.parametrize("power", [1, 2])
def test_search_brackets_the_longest_context(power):
    calls = []

    def needs(length):
        calls.append(length)
        return 5.0 + (length / 1000) ** power

    tried = train_case.search(needs, 75.0, 1000)
    fits = max(t for t, size in tried.items() if size <= 75)
    exact = 1000 * 70 ** (1 / power)
    assert exact * 0.97 - 1000 <= fits <= exact
    assert min(t for t, size in tried.items() if size > 75) > exact
    assert len(calls) == len(set(calls)) <= 8
    assert not any(size <= 0.5 for size in train_case.search(needs, 0.5, 1000).values())


def test_the_most_telling_steps_come_first():
    measured, compiled = train_step.jobs(train_step.arguments([]))
    order = [(job["impl"], job["length"]) for job in measured]
    assert len(order) == len(set(order)) == 4 * 4 + 1
    assert order[:3] == [("ours", 32768), ("cudnn", 32768), ("ours", 4096)]
    # Then Flax's own where it fits, other peers, and at last what can only be compiled.
    assert order[8:11] == [("flax", 1024), ("tokamax", 32768), ("fa4", 32768)]
    assert {(job["impl"], job["length"]) for job in compiled[:3]} == {
        ("flax", length) for length in (4096, 16384, 32768)
    }
    assert [(job["kind"], job["impl"]) for job in compiled[3:]] == [
        ("longest", impl) for impl in train_step.IMPLS
    ]


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--impl", "nobody"])
    assert "'nobody' must be one of ours, cudnn" in capsys.readouterr().err


def test_a_process_prints_its_row_or_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "first")
    job = {"kind": "step", "impl": "ours", "batch": 1, "length": 16, "steps": 1}
    job["lock"] = str(tmp_path / "lock")
    train_case.main([json.dumps(job | {"sizes": vars(TINY)})])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["header"]["model"]["parameters"] > 0 and result["header"]["steps"] == 1
    assert result["row"]["tokens_per_s"] > 0 and result["row"]["commit"] == "first"
    monkeypatch.setitem(peers.PEERS, "fa4", peers.PEERS["fa4"]._replace(module="no_such_module"))
    train_case.main([json.dumps(job | {"impl": "fa4", "sizes": vars(TINY)})])
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert missing == "ModuleNotFoundError: No module named 'no_such_module'"


def test_run_writes_rows_as_they_come(tmp_path, capsys, monkeypatch):
    """Processes that end well, have nothing to measure with, and die."""

    def start(job, cache):
        del cache
        row = {name: job.get(name) for name in train_step.KEY} | {"tokens_per_s": 1}
        result = {"header": {"device": "Test GPU"}, "row": row}
        if job["impl"] == "fa4":
            result = {"missing": "no fa4"}
        code = f"print('noise'); print({json.dumps(result)!r}); exit({int(job['impl'] == 'flax')})"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(train_step, "start", start)
    words = ["--shapes=1x16", f"--output={tmp_path}"]
    assert train_step.main(["--impl=ours,fa4,flax", *words]) == 0
    printed = capsys.readouterr().out
    assert "step fa4 1 16 is not measured: no fa4" in printed
    assert "step flax 1 16: the process ended with 1" in printed
    rows = record.load(tmp_path / "test_gpu" / "train_step.json")["rows"]
    assert [(row["kind"], row["impl"]) for row in rows] == [("step", "ours"), ("longest", "ours")]


def made_up(path):
    rows = [
        {"kind": "step", "impl": "ours", "batch": 1, "length": 32768, "tokens_per_s": 300000,
         "peak_gb": 18.96, "commit": "abc"},
        {"kind": "step", "impl": "cudnn", "batch": 1, "length": 32768, "tokens_per_s": 250000,
         "peak_gb": 18.96, "commit": "abc"},
        {"kind": "step", "impl": "tokamax", "batch": 1, "length": 32768, "tokens_per_s": 240000,
         "peak_gb": 18.96, "commit": "abc"},
        {"kind": "step", "impl": "flax", "batch": 1, "length": 32768, "peak_gb": 140.2,
         "error": "needs 140.2 GB", "commit": "abc"},
        {"kind": "longest", "impl": "ours", "batch": None, "length": None, "longest": 131072,
         "commit": "abc"},
    ]  # fmt: skip
    model = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50304, "parameters": 123.6e6}
    header = {"device": "Test GPU", "jax": "0", "date": "2000-01-01", "steps": 7}
    record.write(path, header | {"model": model, "budget_gb": 80.0}, rows, train_step.KEY)


def test_table_says_what_the_file_says(tmp_path):
    assert train_table.section(tmp_path) is None
    made_up(tmp_path / "test_gpu" / "train_step.json")
    text = train_table.section(tmp_path)
    assert "A GPT of 124 M parameters" in text
    assert "| attention | 1 x 32768 | longest context |" in text
    assert "| pallas_flash | 300,000, 19.0 GB | 131,072 |" in text
    assert "| Flax's own | needs 140 GB | not measured |" in text
    assert "fa4-jax |" not in text
    assert (
        "pallas_flash : the fastest other is **1.20** at 1 x 32768 (`jax.nn` with cuDNN)." in text
    )


def test_readme_says_what_the_result_files_say():
    text = readme.PATH.read_text()
    made = train_table.section()
    assert (made is None) == (f"<!-- {train_table.MARKER} -->" not in text)
    assert made is None or readme.part(text, train_table.MARKER) == made
