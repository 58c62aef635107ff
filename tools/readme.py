"""Parts of the README that are made: between a marker of their own and an end marker."""

import pathlib
import re

PATH = pathlib.Path(__file__).parent.parent / "README.md"
END = "<!-- end -->"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {name} -->\n(.*?)\n{END}", re.DOTALL)


def part(text: str, name: str) -> str | None:
    """What stands between the markers, or None where there are none."""
    found = _pattern(name).search(text)
    return found and found.group(1)


def replace(text: str, name: str, body: str | None, before: str) -> str:
    """`text` with the part made anew; without `body` it goes. A first one precedes a heading."""
    made = f"<!-- {name} -->\n{body}\n{END}\n\n"
    whole = re.compile(_pattern(name).pattern + "\n\n", re.DOTALL)
    if body is None or whole.search(text):
        return whole.sub(lambda _: made if body is not None else "", text)
    if f"\n{before}\n" not in text:
        raise ValueError(f"the text has no line {before!r}")
    return text.replace(f"\n{before}\n", f"\n{made}{before}\n", 1)
