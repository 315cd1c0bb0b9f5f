"""Tensors as pickles describe them: which memory, from where, in which shape; checked before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ntkscope._checks import format_bytes
from ntkscope.record.formats.guards import EXPANDED, DamagedError, ExcessError
from ntkscope.record.formats.names import DTYPES
from ntkscope.record.formats.nodes import Call, Named, Stored, Tuple

# Old names of memory by the kind of number it holds; `UntypedStorage` counts bytes.
STORAGES: dict[str, torch.dtype] = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Untyped": torch.uint8,
    "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
}  # fmt: skip
REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
DTYPE_AT = 6  # position of the dtype among the arguments of _rebuild_tensor_v3
LARGEST = 2**62
Available = Callable[[str], int]  # bytes of memory that lie in the file, by key


@dataclass(frozen=True)
class Memory:
    """A piece of memory that a pickle refers to.

    Attributes:
        key: Its name in the file.
        dtype: Of the numbers in it.
        num_bytes: Its claimed length.
    """

    key: str
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True)
class View:
    """A tensor as a view of memory.

    Attributes:
        memory: The memory.
        dtype: Of the tensor.
        offset: First entry, counted in numbers.
        size: Shape.
        stride: Steps along each axis, counted in numbers.
    """

    memory: Memory
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def memory_of(stored: Any, place: object) -> Memory:
    """Read a reference to memory.

    Args:
        stored: A `Stored` of a tree.
        place: For messages.

    Returns:
        What it refers to.

    Raises:
        DamagedError: If it is not as torch writes it.
        ExcessError: If it claims a negative or absurd length.
    """
    parts = stored.id if isinstance(stored, Stored) else None
    if not isinstance(parts, tuple) or len(parts) not in (5, 6) or parts[0] not in ("storage", b"storage"):
        raise DamagedError(place, "a tensor refers to no memory")
    kind, key, _, count = parts[1:5]
    name = kind.name.rpartition(".")[2].removesuffix("Storage") if isinstance(kind, Named) else ""
    if name not in STORAGES or not isinstance(key, str | bytes | int) or not isinstance(count, int) or isinstance(count, bool):
        raise DamagedError(place, "a tensor refers to memory of an unknown kind")
    num_bytes = count * STORAGES[name].itemsize
    if not 0 <= num_bytes < LARGEST:
        raise ExcessError(place, f"a tensor claims {count:.3g} numbers of memory")
    return Memory(key.decode("ascii", "replace") if isinstance(key, bytes) else str(key), STORAGES[name], num_bytes)


def view_of(call: Call, place: object) -> View | None:
    """Read a call that makes a tensor.

    Args:
        call: Any call of a tree.
        place: For messages.

    Returns:
        The tensor; None if the call makes none from memory.

    Raises:
        DamagedError: If it is not as torch writes it.
    """
    name = call.function.name if isinstance(call.function, Named) else ""
    if name == "torch._tensor._rebuild_from_type_v2" and isinstance(call.args, tuple) and len(call.args) == 4:
        return view_of(Call(call.args[0], call.args[2]), place)
    if not name.startswith("torch._utils.") or name.removeprefix("torch._utils.") not in REBUILD:
        return None
    if not isinstance(call.args, tuple) or len(call.args) < 4:
        raise DamagedError(place, f"a call of {name} lacks arguments")
    dtype = None
    if name.endswith("_v3"):
        kind = call.args[DTYPE_AT] if len(call.args) > DTYPE_AT else None
        dtype = DTYPES.get(kind.name) if isinstance(kind, Named) else None
        if dtype is None:
            raise DamagedError(place, f"a call of {name} names no kind of number")
    return view_from(call.args[:4], dtype, place)


def view_from(parts: Any, dtype: torch.dtype | None, place: object) -> View:
    """Read memory, offset, size and stride.

    Args:
        parts: These four.
        dtype: Of the tensor; None for that of the memory.
        place: For messages.

    Returns:
        The tensor.

    Raises:
        DamagedError: If they are not as torch writes them.
    """
    memory = memory_of(parts[0], place)
    size, stride = _numbers(parts[2]), _numbers(parts[3])
    offset = _numbers((parts[1],))
    if size is None or stride is None or offset is None or len(size) != len(stride):
        raise DamagedError(place, "the shape of a tensor is not made of counts")
    return View(memory, memory.dtype if dtype is None else dtype, offset[0], size, stride)


def check_view(view: View, available: int, place: object) -> None:
    """Check that a tensor lies inside memory that the file has, and is not blown up.

    Args:
        view: The tensor.
        available: Bytes of its memory in the file.
        place: For messages.

    Raises:
        ExcessError: If it is not.
    """
    width, count = view.dtype.itemsize, 1
    for length in view.size:
        count *= length
    last = view.offset + sum((length - 1) * step for length, step in zip(view.size, view.stride, strict=True)) if count else -1
    held = min(view.memory.num_bytes, available)
    shape = " x ".join(map(str, view.size[:8]))[:80]
    if (last + 1) * width > held:
        raise ExcessError(place, f"a tensor of {shape} claims more than the {format_bytes(held)} that its memory has in the file")
    if count * width > held + EXPANDED:
        raise ExcessError(place, f"a tensor of {shape} repeats {format_bytes(held)} of memory to {format_bytes(count * width)}")


def _numbers(value: Any) -> tuple[int, ...] | None:
    """Read counts from a tuple, or from a torch.Size of one."""
    if isinstance(value, Call) and isinstance(value.function, Named) and value.function.name == "torch.Size" and value.args:
        value = value.args[0]
    if isinstance(value, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < LARGEST for n in value):
        return tuple(value)
    return None


def is_empty_call(value: Any, name: str) -> bool:
    """Say whether a value of a tree is a new object without any content.

    Args:
        value: Any part.
        name: The class.

    Returns:
        Whether it is a call of that class with nothing in it.
    """
    return (
        isinstance(value, Call)
        and isinstance(value.function, Named)
        and value.function.name == name
        and isinstance(value.args, Tuple)
        and not (value.args or value.states or value.items)
    )
