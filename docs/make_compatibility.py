"""Writes compatibility.md from compatibility.toml: `make compatibility`."""

from __future__ import annotations

import tomllib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "compatibility.toml"
PAGE = FOLDER / "compatibility.md"
VERDICTS = ("same", "better", "not yet")

HEAD = """\
# Compatibility with Ray

What shoal makes of each public name of Ray 2.60 (Core): *same*, *better*, or *not yet*. `import shoal as ray` gives
these names to a program, and `shoal run script.py` runs one that says `import ray` as it is. Ray's libraries for data,
training, tuning and serving are out of scope, as are workers in other languages.

This page is made from [compatibility.toml](compatibility.toml) by `make compatibility`, and a test compares each line
of it with the package.
"""


def verdict(text: str) -> tuple[str, str]:
    """("same" | "better" | "not yet", the rest).

    Raises:
        ValueError: it begins with something else.
    """
    kind, _, rest = text.partition(":")
    if kind not in VERDICTS:
        raise ValueError(f"{text!r} begins with none of {VERDICTS}")
    return kind, rest.strip()


def read() -> dict[str, dict[str, str]]:
    return tomllib.loads(SOURCE.read_text())


def render(table: dict[str, dict[str, str]]) -> str:
    """The page."""
    parts = [HEAD]
    for section, names in table.items():
        parts.append(f"\n## {section}\n\n| name | shoal | |\n|---|---|---|\n")
        for name, text in names.items():
            kind, rest = verdict(text)
            parts.append(f"| `{name}` | {kind} | {rest} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(read()))
    print(f"wrote {PAGE}")
