"""The parts of a pickle that was read without running it."""

from dataclasses import dataclass, field
from typing import Any


class Tuple(tuple[Any, ...]):
    """A tuple that knows how deep it is, and how many entries it has if what is shared counts each time."""

    depth: int = 1
    weight: int = 0


@dataclass(eq=False, frozen=True, slots=True)
class Named:
    """A class or function, by its full name."""

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """A call, or a new object: what is called, with which arguments, and what is then done to the result."""

    function: Any
    args: Any
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Table:
    """A dict, as pairs."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Look a key up; the last of that name counts, as in a dict.

        Args:
            key: A name.

        Returns:
            The value, or None.
        """
        return next((value for name, value in reversed(self.items) if isinstance(name, str) and name == key), None)


@dataclass(eq=False, frozen=True, slots=True)
class Stored:
    """A reference to what lies outside of the pickle: the memory of a tensor."""

    id: Any
