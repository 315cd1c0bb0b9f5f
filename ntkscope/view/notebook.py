"""Notebook cells: every result as a small table."""

import dataclasses
from typing import Any

from torch import Tensor

from ntkscope.results import Analysis
from ntkscope.view.text import analysis_html, rows_html
from ntkscope.view.words import number

MAX_TEXT = 200  # characters


def html_of(result: Any) -> str:
    """Describe any result in a notebook cell.

    Args:
        result: A result dataclass.

    Returns:
        A small HTML table, one row a field.
    """
    if isinstance(result, Analysis):
        return analysis_html(result)
    names = [field.name for field in dataclasses.fields(result)]
    return rows_html([(name, _brief(getattr(result, name))) for name in names], type(result).__name__)


def _brief(value: Any) -> str:
    """Describe a value in a few words."""
    if isinstance(value, Tensor):
        return f"tensor {' x '.join(map(str, value.shape)) or 'scalar'}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, dict):
        return f"{len(value)} entries: {_short(', '.join(map(str, value)))}"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{len(value)} values"
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return _short(str(value))


def _short(text: str) -> str:
    """Cut a long text."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
