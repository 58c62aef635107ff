"""The README says what the code does."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_support_table_is_what_the_backends_answer():
    made = subprocess.run(
        [sys.executable, "tools/support_table.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    written = re.search("<!-- support table -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert written and written.group(1) == made


def test_python_blocks_run():
    blocks = re.findall("```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("path", re.findall(r"\b(?:tools|examples)/\w+\.py", README))
def test_files_exist(path):
    assert (ROOT / path).exists()
