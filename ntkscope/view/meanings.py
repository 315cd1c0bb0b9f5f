"""What the fields of a result mean, read from its docstring: one place says it, and notebooks repeat it."""

import inspect
import re

SECTION = re.compile(r"^(\w+):$")  # "Attributes:", not indented
FIELD = re.compile(r"^    (\w+): (.*)$")


def summary_of(kind: type) -> str:
    """Read the first line of a class's docstring.

    Args:
        kind: The class.

    Returns:
        The line; empty where Python dropped docstrings (`-OO`).
    """
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def meanings_of(kind: type, section: str = "Attributes") -> dict[str, str]:
    """Read what the fields of a class mean.

    Args:
        kind: The class; its docstring is in Google style, which the linter enforces.
        section: "Attributes" or "Args".

    Returns:
        Meaning by field name, continued lines joined; empty without such a section.
    """
    found: dict[str, str] = {}
    current, name = "", ""
    for line in (inspect.getdoc(kind) or "").splitlines():
        if head := SECTION.match(line):
            current, name = head[1], ""
        elif current == section and (field := FIELD.match(line)):
            name = field[1]
            found[name] = field[2]
        elif name and current == section and line.strip():
            found[name] += " " + line.strip()
    return found
