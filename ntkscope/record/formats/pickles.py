"""A pickle as the tree of what it asks for: nothing is imported, called or allocated.

`pickle` and torch's restricted unpickler build objects while they read. Here every name stays a `Named`, every call a `Call`, and every
tensor's memory a `Stored`, so that one can look first: which names are there in all, and how large tensors claim to be.
"""

import pickletools
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from typing import Any, BinaryIO, cast

from ntkscope.record.formats.guards import DamagedError, ExcessError, Window
from ntkscope.record.formats.nodes import Call, Named, Stored, Table, Tuple

MAX_INSTRUCTIONS = 5_000_000  # read in about 10 s
MAX_DEPTH = 200  # of tuples in tuples; Python's own hash of one recurses in C
MAX_KEY = 10_000  # entries of a key, what is shared counted each time; hashing it takes that long


@dataclass(frozen=True)
class Pickled:
    """What a pickle asks for.

    Attributes:
        root: The tree; it may share parts and hold itself.
        names: Full names of classes and functions, in order, each once.
        calls: All calls.
        stored: All references to memory.
        protocol: Of the pickle.
    """

    root: Any
    names: list[str]
    calls: list[Call]
    stored: list[Stored]
    protocol: int


def read_pickle(stream: BufferedReader | BytesIO | Window, place: object) -> Pickled:
    """Read one pickle, up to its end.

    Args:
        stream: Where it begins.
        place: For messages.

    Returns:
        What it asks for.

    Raises:
        DamagedError: If it is damaged.
        ExcessError: If it is built to exhaust time or memory.
    """
    machine = _Machine(place)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about escapes in damaged texts
            for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(BinaryIO, stream))):
                if count >= MAX_INSTRUCTIONS:
                    raise ExcessError(place, f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
                if opcode.name != "STOP":
                    machine.run(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError) as error:
        raise DamagedError(place, f"its pickle breaks off or makes no sense ({str(error)[:100] or type(error).__name__})") from error
    if not machine.stack:
        raise DamagedError(place, "its pickle is empty")
    return Pickled(machine.stack[-1], list(machine.names), machine.calls, machine.stored, machine.protocol)


class _Machine:
    """Follows the instructions of a pickle."""

    def __init__(self, place: object) -> None:
        self.place = place
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under a MARK
        self.memo: dict[int, Any] = {}
        self.names: dict[str, None] = {}
        self.calls: list[Call] = []
        self.stored: list[Stored] = []
        self.protocol = 0

    def run(self, name: str, argument: Any) -> None:
        """Follow one instruction; damaged ones raise whatever Python raises.

        Args:
            name: As in `pickletools`.
            argument: What follows it.

        Raises:
            ValueError: If the instruction is not one that checkpoints have.
        """
        if name in _PLAIN:
            self.stack.append(argument)
        elif name in _FRESH:
            self.stack.append(_FRESH[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise ValueError(f"instruction {name}")

    def top(self) -> list[Any]:
        """Take what lies above the last MARK."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def drop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.top()

    def join(self, count: int | None) -> None:
        """Make a tuple of the last values, or of all above the MARK."""
        parts = self.top() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        made = Tuple(parts)
        inner = [part for part in parts if isinstance(part, Tuple)]
        made.depth = 1 + max((part.depth for part in inner), default=0)
        made.weight = len(parts) + sum(part.weight for part in inner)
        if made.depth > MAX_DEPTH:
            raise ExcessError(self.place, f"its pickle nests more than {MAX_DEPTH} tuples")
        self.stack.append(made)

    def make_table(self, _: Any) -> None:
        parts = self.top()
        self.stack.append(Table())
        self.set(parts)

    def make_set(self, _: Any) -> None:
        parts = self.top()
        self.call(Named("builtins.frozenset"), Tuple([parts]))

    def append(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def extend(self, parts: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target.items.extend(parts)
        elif isinstance(target, list):
            target.extend(parts)
        else:
            raise TypeError("entries for what is no list")

    def set(self, parts: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Table | Call) or len(parts) % 2:
            raise TypeError("entries for what is no dict")
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            if isinstance(key, Tuple) and key.weight > MAX_KEY:
                raise ExcessError(self.place, f"its pickle has a key of more than {MAX_KEY:,} entries")
            target.items.append((key, value))

    def set_one(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set([key, value])

    def name(self, argument: str) -> None:
        module, _, attribute = argument.partition(" ")
        self.push_name(module, attribute)

    def name_from_stack(self, _: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("a name that is no text")
        self.push_name(module, attribute)

    def push_name(self, module: str, attribute: str) -> None:
        # Names of Python 2, which torch translates the same way.
        if (module, attribute) in NAME_MAPPING:
            module, attribute = NAME_MAPPING[module, attribute]
        module = IMPORT_MAPPING.get(module, module)
        self.names.setdefault(f"{module}.{attribute}")
        self.stack.append(Named(f"{module}.{attribute}"))

    def call(self, function: Any, args: Any) -> None:
        made = Call(function, args)
        self.calls.append(made)
        self.stack.append(made)

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def reduce_named(self, _: Any) -> None:
        options, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(function, Tuple((args, options)))

    def instance(self, argument: str) -> None:
        self.name(argument)
        function = self.stack.pop()
        self.call(function, Tuple(self.top()))

    def instance_from_stack(self, _: Any) -> None:
        parts = self.top()
        self.call(parts[0], Tuple(parts[1:]))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Call):
            raise TypeError("a state for what is no object")
        target.states.append(state)

    def persist(self, argument: Any) -> None:
        made = Stored(self.stack.pop() if argument is None else argument)
        self.stored.append(made)
        self.stack.append(made)

    def start(self, protocol: int) -> None:
        self.protocol = protocol


_PLAIN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}  # fmt: skip
_FRESH: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": Table, "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.start, "FRAME": lambda machine, _: None, "MARK": _Machine.mark, "POP": _Machine.drop,
    "POP_MARK": lambda machine, _: machine.top().clear(), "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "PUT": _Machine.put, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GET": _Machine.get, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "EMPTY_TUPLE": lambda machine, _: machine.join(0), "TUPLE1": lambda machine, _: machine.join(1),
    "TUPLE2": lambda machine, _: machine.join(2), "TUPLE3": lambda machine, _: machine.join(3),
    "TUPLE": lambda machine, _: machine.join(None), "LIST": lambda machine, _: machine.stack.append(machine.top()),
    "DICT": _Machine.make_table,
    "EMPTY_SET": lambda machine, _: machine.call(Named("builtins.set"), Tuple()), "FROZENSET": _Machine.make_set,
    "APPEND": _Machine.append, "APPENDS": lambda machine, _: machine.extend(machine.top()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.top()),
    "SETITEM": _Machine.set_one, "SETITEMS": lambda machine, _: machine.set(machine.top()),
    "GLOBAL": _Machine.name, "STACK_GLOBAL": _Machine.name_from_stack, "REDUCE": _Machine.reduce, "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.reduce_named, "INST": _Machine.instance, "OBJ": _Machine.instance_from_stack, "BUILD": _Machine.build,
    "PERSID": _Machine.persist, "BINPERSID": _Machine.persist,
}  # fmt: skip
