"""The one lazy door from results to `view/` and `interop/`: importing ntkscope must not load plotly, jinja2, rich, pandas or xarray.

This is the only module allowed to import inside a function (tests/test_layering.py).
"""

from typing import Any

from ntkscope._checks import UnsupportedError


class Displayed:
    """Adds to a result how it is shown: a table in notebooks, one line elsewhere."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # In the class itself: `dataclass` would write its own, which prints whole tensors, over one that is inherited.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Displayed.__repr__

    def __repr__(self) -> str:
        from ntkscope.view import brief

        return brief.line_of(self)

    def _repr_html_(self) -> str:
        from ntkscope.view import notebook

        return notebook.html_of(self)


class Plots:
    """Figures of an analysis: `analysis.plot.spectrum()` and so on; each returns a plotly Figure."""

    def __init__(self, analysis: Any) -> None:
        self._analysis = analysis

    def __dir__(self) -> list[str]:
        from ntkscope.view import figures

        return [*super().__dir__(), *figures.FIGURES]

    def __getattr__(self, name: str) -> Any:
        from ntkscope.view import figures, standalone

        if name not in figures.FIGURES:
            raise AttributeError(f"no figure {name!r}; there are {', '.join(figures.FIGURES)}")
        return lambda: standalone.standalone(figures.FIGURES[name](self._analysis))


def write_report(analysis: Any, path: Any) -> None:
    """Write the HTML report.

    Args:
        analysis: The result.
        path: The file.
    """
    from ntkscope.view import report

    report.write_report(analysis, path)


def write_comparison(first: Any, second: Any, path: Any) -> None:
    """Write the HTML page that lays two results side by side.

    Args:
        first: Result A.
        second: Result B.
        path: The file.
    """
    from ntkscope.view import comparison

    comparison.write_comparison(first, second, path)


def to_frame(columns: dict[str, list[Any]], *, index: str) -> Any:
    """Make a pandas frame; pandas is not a dependency.

    Args:
        columns: By name.
        index: Column to index by.

    Returns:
        The frame.

    Raises:
        UnsupportedError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UnsupportedError("pandas is not installed: pip install 'ntkscope[interop]', or use table().") from error
    return pandas.DataFrame(columns).set_index(index)


def gram_to_dataset(gram: Any, examples: Any, others: Any) -> Any:
    """Make an xarray dataset of a kernel.

    Args:
        gram: The kernel.
        examples: Names of its rows' examples, or None.
        others: Of its columns', or None.

    Returns:
        The dataset.
    """
    from ntkscope.interop import arrays

    return arrays.gram_dataset(gram, examples, others)


def analysis_to_dataset(analysis: Any) -> Any:
    """Make an xarray dataset of an analysis.

    Args:
        analysis: The result.

    Returns:
        The dataset.
    """
    from ntkscope.interop import arrays

    return arrays.analysis_dataset(analysis)
