"""The `ntkscope` command. Installed as `ntkscope_cli`, so that no top-level module is called `cli`."""

from .app import main

__all__ = ["main"]
