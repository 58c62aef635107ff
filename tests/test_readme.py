"""The README says what the code does."""

import pathlib
import re
import subprocess
import sys

import pytest

from tools import readme

ROOT = pathlib.Path(__file__).parent.parent
README = readme.PATH.read_text()


def test_support_table_is_what_the_backends_answer():
    made = subprocess.run(
        [sys.executable, "tools/support_table.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert readme.part(README, "support table") == made


def test_python_blocks_run():
    blocks = re.findall("```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("path", re.findall(r"\b(?:tools|examples)/\w+\.py", README))
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_a_part_is_added_replaced_and_taken_out():
    text = "# A\n\nwords\n\n## B\n"
    once = readme.replace(text, "x", "one", before="## B")
    assert once == "# A\n\nwords\n\n<!-- x -->\none\n<!-- end -->\n\n## B\n"
    assert readme.part(readme.replace(once, "x", "two", before="## B"), "x") == "two"
    assert readme.replace(once, "x", None, before="## B") == text
    with pytest.raises(ValueError, match="## C"):
        readme.replace(text, "x", "one", before="## C")
