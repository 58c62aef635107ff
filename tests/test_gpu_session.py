"""What `gpu_session` makes of a test that breaks the GPU of its process."""

import json
import os
import pathlib
import subprocess
import sys

CONFTEST = """
import gpu_session

def pytest_configure(config):
    gpu_session.register(config, config.rootpath)
"""
TESTS = """
import gpu_session
import pytest

pytestmark = pytest.mark.gpu

def test_crash(record_property):
    record_property("error", 0.5)
    gpu_session.works = lambda: False
    assert 0

@pytest.mark.parametrize("i", range(4))
def test_behind_it(i):
    assert gpu_session.works()
"""


def outcomes(folder, *options):
    """Of a run of the tests above, by name, from the summary."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_of_gpu.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent)))
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    run = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout + run.stderr
    summary = json.loads((folder / "cpu" / "correctness.json").read_text())
    return {case["test"].split("::")[1]: case for case in summary["rows"]}


def test_a_new_process_runs_what_comes_behind_a_crash(tmp_path):
    found = outcomes(tmp_path, "-n1", "--maxschedchunk=1")
    assert found["test_crash"]["outcome"] == "failed"
    assert found["test_crash"]["error"] == 0.5
    assert "assert 0" in found["test_crash"]["reason"]
    assert [found[f"test_behind_it[{i}]"]["outcome"] for i in range(4)] == ["passed"] * 4


def test_one_process_skips_what_comes_behind_a_crash_and_names_it(tmp_path):
    found = outcomes(tmp_path, "-n0")
    assert found["test_crash"]["outcome"] == "failed"
    for i in range(4):
        behind = found[f"test_behind_it[{i}]"]
        assert behind["outcome"] == "skipped"
        assert "broke the GPU: test_of_gpu.py::test_crash" in behind["reason"]
    again = outcomes(tmp_path, "-n0", "-k", "crash")
    assert again == found | {"test_crash": again["test_crash"]}, "what is not run keeps its row"
