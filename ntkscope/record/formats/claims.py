"""What a pickle of torch claims, checked before torch reads it: memory, shapes, and calls that would do more than torch needs."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ntkscope._checks import UnsupportedError, format_bytes
from ntkscope.record.formats.guards import DamagedError, ExcessError
from ntkscope.record.formats.nodes import Call, Named, Table, Tuple
from ntkscope.record.formats.pickles import MAX_KEY, Pickled
from ntkscope.record.formats.views import check_view, is_empty_call, memory_of, view_from, view_of

ORDERED = "collections.OrderedDict"
HOOKS_AT = 5  # position of the hooks among the arguments of _rebuild_tensor_v2 and _v3
TENSORS = ("Tensor", "Storage")
ENCODINGS = ("latin1", "latin-1")  # how torch's pickles write bytes
# What classes have of their own: content may not take its place.
OWN = {ORDERED: {*dir(OrderedDict)}, "collections.Counter": {*dir(Counter)}, "": {*dir(torch.Tensor)}}


def check_claims(pickled: Pickled, available: Callable[[str], int], place: object) -> None:
    """Check what a pickle claims.

    Args:
        pickled: From `read_pickle`.
        available: Bytes of memory in the file, by key.
        place: For messages.

    Raises:
        InputError: If it is not as torch writes it.
        ExcessError: If it claims more than the file holds, or is built to exhaust time or memory.
    """
    for stored in pickled.stored:
        memory = memory_of(stored, place)
        if memory.num_bytes > available(memory.key):
            held = format_bytes(available(memory.key))
            raise ExcessError(place, f"a tensor claims {format_bytes(memory.num_bytes)} of memory, where the file has {held}")
    for call in pickled.calls:
        _check_call(call, available, place)


def _check_call(call: Call, available: Callable[[str], int], place: object) -> None:
    """Check one call, and what is done to its result."""
    name = call.function.name if isinstance(call.function, Named) else ""
    view = view_of(call, place)
    if view is not None:
        check_view(view, available(view.memory.key), place)
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            hooks = call.args[HOOKS_AT] if len(call.args) > HOOKS_AT else None
            if hooks is not None and not is_empty_call(hooks, ORDERED):
                raise UnsupportedError(f"{place} has a tensor with hooks, which are code. Save the model's state_dict without hooks.")
    if name == "torch._utils._rebuild_nested_tensor":
        raise UnsupportedError(f"{place} has a nested tensor, whose parts cannot be checked. Save its parts as plain tensors.")
    is_memory = name.startswith("torch.") and name.endswith(TENSORS)
    if is_memory and not (isinstance(call.args, Tuple) and not call.args):
        raise ExcessError(place, f"it makes memory by itself ({name} with arguments)")
    if name in ("builtins.bytearray", "builtins.set", "collections.Counter", ORDERED, "_codecs.encode"):
        _check_plain(name, call.args, place)
    for state in call.states:
        _check_state(name, state, is_memory, available, place)
    if name in ("torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2") and isinstance(call.args, tuple):
        _check_attributes("", call.args[-1] if call.args else None, place)


def _check_plain(name: str, args: Any, place: object) -> None:
    """Check the arguments of a call that makes a plain value."""
    parts = tuple(args) if isinstance(args, tuple) else (None,)
    if name == "_codecs.encode":
        is_fine = len(parts) == 2 and isinstance(parts[0], str) and parts[1] in ENCODINGS
    elif name == "builtins.bytearray":
        is_fine = not parts or (not isinstance(parts[0], int) and (len(parts) < 2 or parts[1] in ENCODINGS))
    elif name == ORDERED:
        is_fine = not parts
    elif name == "collections.Counter":
        is_fine = not parts or isinstance(parts[0], Table)
    else:
        is_fine = not parts or (
            isinstance(parts[0], list) and all(not isinstance(part, Tuple) or part.weight <= MAX_KEY for part in parts[0])
        )
    if not is_fine:
        raise ExcessError(place, f"it calls {name} in a way that torch.save never does")


def _check_state(name: str, state: Any, is_memory: bool, available: Callable[[str], int], place: object) -> None:
    """Check a state that is put into the result of a call."""
    if is_memory or name == "torch.nn.parameter.Parameter":  # as torch wrote tensors before 0.4
        if not isinstance(state, tuple) or len(state) != 4:
            raise DamagedError(place, "the state of a tensor is not as torch writes it")
        view = view_from(state, None, place)
        check_view(view, available(view.memory.key), place)
    elif name in OWN:
        _check_attributes(name, state, place)


def _check_attributes(name: str, state: Any, place: object) -> None:
    """Check that a state sets attributes that are not the object's own methods."""
    for table in state if isinstance(state, tuple) else (state,):
        if table is None:
            continue
        pairs = table.items if isinstance(table, Table) else table.items if is_ordered(table) else [(None, None)]
        if not all(isinstance(key, str) and key not in OWN[name] for key, _ in pairs):
            raise ExcessError(place, f"it would replace what {name or 'a tensor'} does")


def is_ordered(value: Any) -> bool:
    """Say whether a part of a tree is an OrderedDict.

    Args:
        value: Any part.

    Returns:
        Whether it is.
    """
    return isinstance(value, Call) and isinstance(value.function, Named) and value.function.name == ORDERED
