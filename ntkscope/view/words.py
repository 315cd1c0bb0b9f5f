"""Numbers as people write them."""

import math
from typing import Any

AnalysisLike = Any  # an `ntkscope.results.Analysis`, or what has its fields

SPACE = "\u00a0"  # does not break


def number(value: float, digits: int = 3) -> str:
    """Write a number with few digits.

    Args:
        value: Any float.
        digits: Significant ones.

    Returns:
        For example "0.0123", "1,200", "3.1e-05", "unknown" or "infinite".
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{decimals}f}"


def percent(share: float) -> str:
    """Write a share as percentage.

    Args:
        share: 1 is all.

    Returns:
        For example "3.7 %", "< 0.1 %" or "unknown"; the space does not break.
    """
    if math.isnan(share):
        return "unknown"
    if math.isinf(share) or abs(share) >= 100:
        return f"more than 9,999{SPACE}%" if share > 0 else f"less than -9,999{SPACE}%"
    if 0 < share < 0.0005:
        return f"< 0.1{SPACE}%"
    if 0.9995 <= share < 1:
        return f"> 99.9{SPACE}%"
    return f"{100 * share:,.1f}{SPACE}%" if abs(share) < 1 else f"{100 * share:,.0f}{SPACE}%"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun.

    Args:
        count: How many.
        noun: Singular; its plural takes an s.

    Returns:
        For example "1 example" or "1,000 examples".
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
