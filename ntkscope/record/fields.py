"""Checks on what comes from a file: a hand-edited or damaged one must get a message, not a traceback."""

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from ntkscope._checks import InputError

RESCUE = "Copy it again or use an earlier file, else record the run again."


def check_fields(kind: type, values: Mapping[str, Any], source: str, *, names: set[str] | None = None) -> None:
    """Check that values have the types of a dataclass's fields, and that numbers are finite.

    Args:
        kind: The dataclass.
        values: By field name.
        source: Where they came from, for messages.
        names: The fields to check; all if not given.

    Raises:
        InputError: If a field is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    expected = {field.name for field in fields(kind)} if names is None else names
    if set(values) != expected:
        missing, unknown = sorted(expected - set(values)), sorted(map(str, set(values) - expected))
        raise InputError(f"{source} is damaged, or of an unfinished version: fields missing {missing}, unknown {unknown}. {RESCUE}")
    for name in expected:
        if not _fits(values[name], hints[name]):
            raise InputError(f"{source} is damaged: `{name}` must be {hints[name]}, got {values[name]!r:.60}. {RESCUE}")


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value is of a type: plain ones, unions, lists and tuples of them; an integer is a fine float."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin in (list, tuple):
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(part, item) for part in value)
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return isinstance(value, hint)
