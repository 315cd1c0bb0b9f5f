"""`ntkscope report`."""

from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported
from .options import check_folder

EXAMPLES = """
ntkscope report ntkscope-out
ntkscope report ntkscope-out --out for-my-advisor.html
ntkscope report plain --compare gated
ntkscope report plain --compare gated --out both.html
"""


def check_file(path: Path | None) -> Path | None:
    """Check before any work that a file can be written; the callback of --out.

    Args:
        path: What the user typed.

    Returns:
        The same.

    Raises:
        typer.BadParameter: If it is a folder, or its folder could not be made.
    """
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder, and a file is written. Give a name in it, for example {path / 'report.html'}.")
    if path is not None:
        check_folder(path.parent)
    return path


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)],
    compare: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another saved result: lay the two side by side, this one as B.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=check_file,
            show_default="DIR/report.html, or DIR/comparison.html with --compare",
            help="The HTML file to write.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors.")] = False,
) -> None:
    """Write a report again, or compare two results.

    DIR is a folder that `ntkscope analyze --out DIR` wrote: its report is written again, or with --compare two results are laid
    side by side in one page. Nothing is computed anew.
    """
    own = folder if folder.is_dir() else folder.parent
    path = out or own / ("report.html" if compare is None else "comparison.html")
    with failures_reported(path.parent):
        from .progress import stages_shown

        with stages_shown(quiet=quiet) as stages:
            stages.begin("loading PyTorch")
            import ntkscope

            stages.begin(f"reading {folder.name}")
            analysis = ntkscope.load_analysis(folder)
            other = None if compare is None else ntkscope.load_analysis(compare)
            stages.begin(f"writing {path.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if other is None:
                analysis.report(path)
            else:
                analysis.compare(other, path)
        if not quiet:
            from .terminal import result_console

            result_console().print(f"{'Report' if other is None else 'Comparison'}: {path}", soft_wrap=True)
