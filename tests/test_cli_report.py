"""`ntkscope report`: the report of a saved result again, or two side by side."""

import shutil

import pytest
from ntkscope_cli.app import app
from record_case import record
from test_auditing import MAKERS
from typer.testing import CliRunner

import ntkscope

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two saved results; the first has a report."""
    place = tmp_path_factory.mktemp("results")
    first, second = (ntkscope.analyze(record(MAKERS[name], steps=40)) for name in ("sgd", "adam"))
    return first.save(place / "first"), second.save(place / "second", report=False)


@pytest.fixture
def copies(results, tmp_path):
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in results)


def test_the_report_is_that_of_the_analysis(copies):
    written = (copies[0] / "report.html").read_text()
    (copies[0] / "report.html").unlink()
    result = run("report", copies[0])
    assert (result.exit_code, result.stdout.split()) == (0, ["Report:", str(copies[0] / "report.html")])
    assert (copies[0] / "report.html").read_text() == written


def test_two_results_are_laid_side_by_side(copies):
    result = run("report", copies[0], "--compare", copies[1])
    assert (result.exit_code, result.stdout.split()) == (0, ["Comparison:", str(copies[0] / "comparison.html")])
    page = (copies[0] / "comparison.html").read_text()
    assert 'data-figure="half_times"' in page
    assert page.index("SGD(lr=0.03") < page.index("Adam(lr=0.005")
    assert not (copies[1] / "report.html").exists()


def test_the_file_can_be_given_and_elsewhere(copies, tmp_path):
    out = tmp_path / "new" / "page.html"
    result = run("report", copies[1] / "results.safetensors", "--out", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert out.read_text().startswith("<!doctype html>")
    assert not (copies[1] / "report.html").exists()
    assert run("report", copies[1] / "results.safetensors").exit_code == 0
    assert (copies[1] / "report.html").exists()


def test_help_has_examples():
    shown = run("report", "--help").stdout
    assert "ntkscope report plain --compare gated" in shown
    assert "report" in run("--help").stdout


def test_bad_input_is_exit_2_with_the_next_step(copies, tmp_path):
    def refused(*arguments):
        result = run("report", *arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return " ".join(result.output.split())

    assert "There is no saved result at" in refused(tmp_path / "nowhere")
    assert "There is no saved result at" in refused(copies[0], "--compare", tmp_path)
    assert "Give a folder that `ntkscope analyze`" in refused(copies[0], "--compare", tmp_path)
    assert "is a folder, and a file is written" in refused(copies[0], "--out", tmp_path)
    assert "is a file, and a folder is written" in refused(copies[0], "--out", copies[0] / "summary.json" / "x.html")
    damaged = copies[1] / "results.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert "Analyze again: `ntkscope analyze CHECKPOINT --out DIR`" in refused(copies[0], "--compare", copies[1])
    assert not (copies[0] / "comparison.html").exists()


def test_a_failure_leaves_what_was_there(copies, monkeypatch):
    before = (copies[0] / "report.html").read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkscope.view.page.get_plotlyjs", interrupted)
    assert run("report", copies[0]).exit_code == 130
    assert (copies[0] / "report.html").read_bytes() == before
    assert {path.name for path in copies[0].iterdir()} == {"report.html", "summary.json", "results.safetensors"}
