"""The API reference: every public name, in the groups of `ntkscope/__init__.py`."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "ntkscope" / "__init__.py"
_NAMES = re.compile(r"^__all__ = \[\n(.*?)^\]", re.MULTILINE | re.DOTALL)


def grouped_names() -> dict[str, list[str]]:
    """Read the public names and the comments between them.

    Returns:
        Names by group.

    Raises:
        ValueError: If `__all__` is not written as one group after the other.
    """
    match = _NAMES.search(SOURCE.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{SOURCE} has no list `__all__ = [` with one name a line.")
    groups: dict[str, list[str]] = {}
    for line in match[1].splitlines():
        entry = line.strip()
        if entry.startswith("#"):
            groups[entry.removeprefix("#").strip()] = []
        else:
            list(groups.values())[-1].append(ast.literal_eval(entry.rstrip(",")))
    return groups


def api_markdown() -> str:
    """Write the reference for mkdocstrings.

    Returns:
        One heading for each group, one block for each name.
    """
    parts = []
    for group, names in grouped_names().items():
        parts.append(f"## {group[0].upper()}{group[1:]}")
        parts += [f"::: ntkscope.{name}" for name in names]
    return "\n\n".join(parts)
