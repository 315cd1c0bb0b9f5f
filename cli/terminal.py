"""What a command prints when it is done."""

from pathlib import Path

from rich.console import Console

from ntkscope.results import Analysis
from ntkscope.view.text import print_summary


def show(analysis: Analysis, folder: Path, *, has_report: bool) -> None:
    """Print the summary, and where the files are.

    Args:
        analysis: The result.
        folder: Where it was saved.
        has_report: Whether a report was written.
    """
    console = Console(highlight=False)
    print_summary(analysis, console)
    if has_report:
        console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, markup=False)
    console.print(f"Numbers: {folder / 'summary.json'}, {folder / 'results.safetensors'}", soft_wrap=True, markup=False)
