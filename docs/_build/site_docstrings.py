"""Lets the API reference show the house style's `Example:` sections as code (griffe knows `Examples:`)."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the sections before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one object.

        Args:
            obj: Any module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
