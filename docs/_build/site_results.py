"""Reads benchmarks/RESULTS.md, so that no measured number is typed twice."""

import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)


def section(title: str) -> str:
    """Find a section.

    Args:
        title: Its heading, whole.

    Returns:
        Its text, without the heading.

    Raises:
        KeyError: If there is none.
    """
    text = RESULTS.read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    for k, heading in enumerate(headings):
        if heading[2] == title:
            after = (other.start() for other in headings[k + 1 :] if len(other[1]) <= len(heading[1]))
            return text[heading.end() : next(after, len(text))].strip()
    raise KeyError(f"{RESULTS} has no section {title!r}; it has {', '.join(heading[2] for heading in headings)}")


def table(title: str, first_column: str) -> list[dict[str, str]]:
    """Read a table.

    Args:
        title: Heading of its section.
        first_column: Name of its first column.

    Returns:
        One dictionary for each row, by column.

    Raises:
        KeyError: If there is none.
    """
    rows = [line.strip().strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    starts = [k for k, row in enumerate(cells) if row[0] == first_column]
    if not starts:
        raise KeyError(f"section {title!r} of {RESULTS} has no table whose first column is {first_column!r}")
    header = cells[starts[0]]
    body = cells[starts[0] + 2 :]
    return [dict(zip(header, row, strict=True)) for row in body if len(row) == len(header)]
