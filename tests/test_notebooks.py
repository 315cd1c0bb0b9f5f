"""The notebooks in docs/notebooks: clean as committed, and running to the end.

Running them takes a minute; the docs build runs them as well. `-m "not notebooks"` leaves that out here.
"""

import ast
import json
import re
import time
from pathlib import Path

import nbformat
import plotly.io
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from view_case import synthetic_analysis

from ntkscope._display import Plots

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = {"quickstart", "your_own_model_and_data", "gate_audit"}
FEWEST_FIGURES = {"quickstart": 3, "your_own_model_and_data": 1, "gate_audit": 2}
LONGEST_TEXT = 800  # characters of a cell between others
TIMEOUT = 600  # seconds for all cells of a notebook, on a machine that is busy with other tests
FIGURE = "application/vnd.plotly.v1+json"
NETWORK = ("http://", "https://", "urllib", "requests", "wget", "curl", "pip install", "download", "fetch_")


def cells_of(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def python_of(cell):
    """Turn shell lines and magics into Python, as IPython does."""
    return TransformerManager().transform_cell(cell.source)


def test_the_notebooks_are_there():
    assert {path.stem for path in PATHS} == NAMES


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_as_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n", "as nbformat writes it"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_code_cell_parses_and_stays_here(path):
    for cell in cells_of(path, "code"):
        ast.parse(python_of(cell))
        assert not [word for word in NETWORK if word in cell.source], "no network access"
        assert not re.search(r"""["'](/|~|[A-Z]:\\)""", cell.source), "no absolute paths"
        assert max(map(len, cell.source.splitlines())) <= 140


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_text_is_short_and_states_no_result(path):
    cells = cells_of(path, "markdown")
    assert cells[0].source.startswith("# ")
    assert "pip install" in cells[0].source or "(quickstart.ipynb)" in cells[0].source
    for cell in cells[1:]:
        assert len(cell.source) <= LONGEST_TEXT
    # A rerun may give other numbers: those of results are printed by code. Percentages and decimals in the text would be results.
    for cell in cells:
        assert not re.search(r"\d\s?%|\d\.\d", cell.source), cell.source


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path):
    for cell in cells_of(path, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert (FOLDER / target).resolve().is_file(), target


@pytest.mark.notebooks
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, capfd):
    notebook = nbformat.read(path, as_version=4)
    begin = time.perf_counter()
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    seconds = time.perf_counter() - begin
    with capfd.disabled():
        print(f"\n{path.name}: {seconds:.0f} s")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert sum(FIGURE in data for data in shown) >= FEWEST_FIGURES[path.stem]
    assert any("<table" in data.get("text/html", "") for data in shown)
    assert not list(tmp_path.iterdir()), "what it writes is gone at the end"


@pytest.mark.parametrize(
    ("renderer", "kind"), [("plotly_mimetype", FIGURE), ("vscode", FIGURE), ("notebook", "text/html"), ("colab", "text/html")]
)
def test_figures_show_where_notebooks_are_read(renderer, kind):
    figure = Plots(synthetic_analysis()).spectrum()
    bundle = plotly.io.renderers[renderer].to_mimebundle(figure.to_dict())
    shown = bundle[kind]
    title = figure.to_dict()["layout"]["title"]["text"]
    if kind == FIGURE:
        assert shown["layout"]["title"]["text"] == title
    else:
        assert json.dumps(title)[1:-1] in shown.replace("\\u003c", "<").replace("\\u003e", ">") or title.partition("<br>")[0] in shown
    if renderer == "notebook":
        assert "cdn.plot.ly/plotly" not in shown, "the page carries plotly.js"
