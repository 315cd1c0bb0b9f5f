"""Files that are either whole or not there."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_when_done(path: Path) -> Generator[Path, None, None]:
    """Write to a temporary name in the same folder, and rename when the block ends well.

    Args:
        path: The final name; replaced if it exists.

    Yields:
        The temporary name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        # The data must be on disk before the name is: a power cut must not leave a whole name on half a file.
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
