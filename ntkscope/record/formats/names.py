"""Names of classes and functions that pickles ask for: which are harmless, and which the caller allows."""

import importlib
import re
import shlex
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.formats.guards import Trust, printable
from ntkscope.record.formats.nodes import Named, Tuple
from ntkscope.record.formats.pickles import Pickled

DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
MAX_NAMES = 100  # in a message
BLOCKED = ("sys", "os", "posix", "nt")  # torch never lets these through
HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(bytearray|set|complex)|_codecs\.encode"
    r"|torch\.(Size|device|Tensor|nn\.parameter\.Parameter|serialization\._get_layout|_tensor\._rebuild_from_type_v2)"
    r"|torch\.(cuda\.|sparse\.|storage\.|cuda\.sparse\.)?\w+(Tensor|Storage)|torch\.per_(tensor|channel)_\w+"
    r"|torch\._utils\._rebuild_\w+"
)
NUMPY_KIND = re.compile(r"[<>|=]?([biufc])(\d+)")


def refused_names(pickled: Pickled, allowed: Iterable[str]) -> list[str]:
    """List what a pickle asks for that is neither harmless nor allowed.

    Args:
        pickled: From `read_pickle`.
        allowed: Names that the caller gave.

    Returns:
        Full names, in order.
    """
    needed = dict.fromkeys([*pickled.names, *_numpy_kinds(pickled)])
    return [name for name in needed if not HARMLESS.fullmatch(name) and name not in DTYPES and name not in set(allowed)]


def _numpy_kinds(pickled: Pickled) -> Iterable[str]:
    """List the classes of numpy's dtypes, which torch wants allowed although pickles do not name them."""
    sizes = {"b1": "Bool", "f2": "Float16", "f4": "Float32", "f8": "Float64", "c8": "Complex64", "c16": "Complex128"}
    sizes |= {f"{sign}{size}": f"{word}{8 * size}" for sign, word in (("i", "Int"), ("u", "UInt")) for size in (1, 2, 4, 8)}
    for call in pickled.calls:
        is_kind = isinstance(call.function, Named) and call.function.name == "numpy.dtype" and isinstance(call.args, Tuple)
        code = NUMPY_KIND.fullmatch(str(call.args[0])) if is_kind and call.args and isinstance(call.args[0], str) else None
        if code and code[1] + code[2] in sizes:
            yield f"numpy.dtypes.{sizes[code[1] + code[2]]}DType"


def refusal(place: object, names: list[str]) -> UnsupportedError:
    """Make the error for a file that asks for more than tensors and plain containers.

    Args:
        place: The file.
        names: All that is still missing.

    Returns:
        The error, to be raised.
    """
    blocked = [printable(name) for name in names if name.partition(".")[0] in BLOCKED]
    shown = [printable(name) for name in names[:MAX_NAMES]]
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    flags = " ".join(f"--allow-global {shlex.quote(name)}" for name in shown) + more
    start = (
        f"{place} holds more than tensors and plain containers; it asks for {', '.join(shown)}{more}. Loading that could run code of the "
        "file, so it is refused. "
    )
    if blocked:
        return UnsupportedError(
            f"{start}{', '.join(blocked)} cannot be allowed at all: no checkpoint needs it, and the file may be an attack. Do not load "
            "it; ask for the model's state_dict in a safetensors file."
        )
    return UnsupportedError(
        f"{start}Best save model.state_dict() (not the model), optimizer.state_dict() and recorder.state_dict(). If you know and trust "
        f"what it asks for: {flags} (in Python: allow_globals=[...]); if you trust the whole file: --unsafe-load (unsafe=True)."
    )


@contextmanager
def allowing(trust: Trust) -> Generator[None, None, None]:
    """Let torch's restricted unpickler use what the caller named.

    Args:
        trust: What the caller allows; only these names are imported, whatever the file says.

    Yields:
        Nothing.

    Raises:
        InputError: If a name cannot be imported.
        UnsupportedError: If a name is of a module that torch never lets through.
    """
    found = [(_imported(name), name) for name in trust.allowed]
    # By the name that the file uses, where it is another than the object's own (numpy moved its functions).
    wanted = [each if f"{each.__module__}.{each.__qualname__}" == name else (each, name) for each, name in found]
    known = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([each for each in wanted if each not in known]):
        yield


def _imported(name: str) -> Any:
    """Import what the caller named."""
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InputError(f"--allow-global takes a full name such as argparse.Namespace, got {name!r}.")
    if parts[0] in BLOCKED:
        raise UnsupportedError(f"--allow-global {name}: torch never lets {parts[0]} through. Save the model's state_dict instead.")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and not (module == error.name or module.startswith(f"{error.name}.")):
                raise InputError(f"--allow-global {name} cannot be imported: {error}. Install what it needs.") from error
            continue
        except Exception as error:
            raise InputError(f"--allow-global {name} cannot be imported: {type(error).__name__}: {error}.") from error
        for part in parts[split:]:
            if not hasattr(found, part):
                raise InputError(f"--allow-global {name}: {module} has no {'.'.join(parts[split:])}. Run where it can be imported.")
            found = getattr(found, part)
        if not callable(found) or not hasattr(found, "__qualname__"):
            raise InputError(
                f"--allow-global {name} names a {type(found).__name__}. Give classes and functions, as the message lists them."
            )
        return found
    raise InputError(
        f"--allow-global {name}: there is no module {parts[0]} here. Install it, or run where it can be imported; or save the model's "
        "state_dict instead."
    )
