"""Prefixes that wrappers put before the names of parameters: which there are, and which a model does not have."""

from collections import Counter
from collections.abc import Collection, Iterable

WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.")
# Also found inside of names, where a part of the model was compiled, sharded or checkpointed.
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Take off what only wrappers write: `module.` before all names, others also inside of them.

    Args:
        names: Of parameters and buffers.

    Returns:
        New names by old ones, and the prefixes in the order in which they were taken off.
    """
    renamed = {name: name for name in names}
    taken: list[str] = []
    while (prefix := next((p for p in WRAPPERS if renamed and all(name.startswith(p) for name in renamed.values())), None)) is not None:
        taken.append(prefix)
        renamed = {old: name.removeprefix(prefix) for old, name in renamed.items()}
    for part in INSIDE:
        inner = {old: name.replace(f".{part}", ".").removeprefix(part) for old, name in renamed.items()}
        if inner != renamed and len(set(inner.values())) == len(inner):
            taken.append(part)
            renamed = inner
    return renamed, tuple(taken)


def best_prefix(names: Iterable[str], expected: Collection[str]) -> tuple[str, int]:
    """Find the prefix that, taken off, turns most names into expected ones.

    Args:
        names: What there is.
        expected: What a model has; looked up often, so give a set or dict.

    Returns:
        The prefix, the shortest of the best, and how many names fit with it.
    """
    fitting: Counter[str] = Counter()
    for name in names:
        cut = 0
        while True:
            if name[cut:] in expected:
                fitting[name[:cut]] += 1
            dot = name.find(".", cut)
            if dot < 0:
                break
            cut = dot + 1
    if not fitting:
        return "", 0
    best = max(fitting.values())
    return min((prefix for prefix, count in fitting.items() if count == best), key=len), best


def parts_of(prefix: str) -> tuple[str, ...]:
    """Split a prefix at its dots.

    Args:
        prefix: For example "module.model.".

    Returns:
        For example ("module.", "model.").
    """
    return tuple(f"{part}." for part in prefix.split(".") if part)
