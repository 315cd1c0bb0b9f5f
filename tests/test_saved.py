"""A saved result, loaded again, is the same result; a file that is not one is refused."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from record_case import record
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_auditing import MAKERS, recorded

import ntkscope
from ntkscope import saved
from ntkscope.view.figures import FIGURES, drawable

# Other programs read these names.
NAMES = {
    *(f"dissipation/{name}" for name in ("gramian", "propagator", "displacement")),
    *(f"spectrum/{name}" for name in ("eigvals", "eigvecs", "log_dissipation", "residual", "owner")),
    *(f"drift/{name}" for name in ("relative", "velocity", "alignment_start", "alignment_targets")),
    *(f"truncation/{name}" for name in ("ranks", "loss_bound", "loss_error", "train_bound", "train_error")),
    *(f"examples/{name}" for name in ("reservoir_energy", "reservoir_share", "loss", "margin", "area_under_margin", "self_influence")),
    *(f"examples/{name}" for name in ("half_time", "quarter_time")),
    *(f"history/{name}" for name in ("steps", "times", "loss", "predicted_loss", "gradient_error", "eigvals", "leading")),
    *(f"history/{name}" for name in ("example_residual", "signal_share")),
}
NAMES_WITH_ALL = NAMES | {
    *(f"transfer/{name}" for name in ("predicted", "observed", "predictor")),
    *(f"cells/{name}" for name in ("signal_clean", "reservoir_clean", "signal_noise", "reservoir_noise")),
    *("dissipation/transfer", "truncation/query_error", "gate/live", "uncertainty/reservoir_energy"),
}
RUNS = {
    "plain": lambda: ntkscope.analyze(record(MAKERS["sgd"], steps=40)),
    "trace form": lambda: ntkscope.analyze(record(MAKERS["sgd"], steps=40, outputs="trace", query=True)),
    "all there is": lambda: ntkscope.analyze(recorded("gated", query=True, live_audit=10, every_step=True), jackknife=4),
}


@pytest.fixture(scope="module", params=list(RUNS))
def case(request, tmp_path_factory):
    found = RUNS[request.param]()
    return request.param, found, found.save(tmp_path_factory.mktemp("saved") / "out", report=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    found = RUNS["plain"]()
    return found, found.save(tmp_path_factory.mktemp("small") / "out", report=False)


def content(path):
    """A file's metadata and tensors."""
    with safe_open(path, framework="pt") as handle:
        return handle.metadata(), load_file(path)


def rewritten(folder, path, change):
    """The file with another structure, its checksum right."""
    metadata, tensors = content(folder / saved.FILE)
    structure = json.loads(metadata["result"])
    text = json.dumps(change(structure) or structure)
    save_file(tensors, path, metadata={"schema": metadata["schema"], "result": text, "checksum": saved._checksum(text, tensors)})
    return path


def assert_same(first, second):
    (structure, tensors), (other, others) = saved.split(first), saved.split(second)
    assert json.dumps(structure) == json.dumps(other)  # as text: NaN is NaN
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(others[name])), name


def test_loaded_is_what_was_saved(case):
    _, found, folder = case
    for source in (folder, str(folder), folder / saved.FILE):
        loaded = ntkscope.load_analysis(source)
        assert_same(loaded, found)
    assert json.dumps(loaded.summary()) == json.dumps(found.summary()) == json.dumps(json.loads((folder / "summary.json").read_text()))
    assert type(loaded.warnings) is tuple
    assert type(loaded.history.steps) is list


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_the_same(case, name):
    _, found, folder = case
    loaded = ntkscope.load_analysis(folder)
    assert drawable(loaded) == drawable(found)
    if name in drawable(found):
        assert FIGURES[name](loaded).to_json() == FIGURES[name](found).to_json()


def test_saved_again_is_the_same_file_content(case, tmp_path):
    _, _, folder = case
    again = ntkscope.load_analysis(folder).save(tmp_path / "again", report=False)
    (metadata, tensors), (other, others) = (content(place / saved.FILE) for place in (folder, again))
    assert metadata == other
    assert set(metadata) == {"schema", "result", "checksum"}
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in others.items()
    }
    assert (folder / "summary.json").read_bytes() == (again / "summary.json").read_bytes()


def test_arrays_have_the_names_they_always_had(case):
    kind, found, folder = case
    assert (NAMES_WITH_ALL if kind == "all there is" else NAMES) <= set(found.tensors()) == set(load_file(folder / saved.FILE))
    assert found.tensors()["history/steps"].tolist() == found.history.steps


def test_the_classes_are_those_of_the_result_and_no_others():
    classes = saved.result_classes(ntkscope.Analysis)
    expected = {"Analysis", "RunInfo", "Window", "GateStats", "StepAudit", "LayerAudit", "Compared", "Growth", "Sampler"}
    assert expected <= set(classes)
    assert all(kind.__module__.startswith("ntkscope.") for kind in classes.values())


@dataclass(frozen=True)
class Leaf:
    value: object
    note: str = "default"


NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans() | st.none() | st.text()
TENSORS = st.lists(st.floats(width=64), max_size=4).map(lambda row: torch.tensor(row, dtype=torch.float64)) | st.sampled_from([
    torch.tensor(2.0),
    torch.tensor([True, False]),
    torch.arange(6).reshape(2, 3).T,
    torch.zeros(0, 3, dtype=torch.uint8),
])
VALUES = st.recursive(
    NUMBERS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | inner.map(Leaf)
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
@example(value={"tuple": {"dict": [math.nan, -math.inf, (), {"list": []}]}, "Leaf": Leaf((1, [2])), "": -0.0})
def test_any_nesting_comes_back(value, tmp_path):
    path = tmp_path / "file.safetensors"
    saved.write_result(Leaf(value), path, also={})
    assert_same(saved.read_result(path, Leaf), Leaf(value))


def test_tensors_that_share_memory_are_saved(tmp_path):
    both = torch.arange(4.0)
    saved.write_result(Leaf([both, both, both[1:]]), tmp_path / "file", also={"more": both})
    assert_same(saved.read_result(tmp_path / "file", Leaf), Leaf([both, both, both[1:]]))


def test_others_may_read_results_as_any_new_file(tmp_path):
    path, plain = tmp_path / "file.safetensors", tmp_path / "plain"
    plain.touch()
    saved.write_result(Leaf(torch.ones(2)), path, also={})
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    saved.write_result(Leaf(torch.zeros(2)), path, also={})
    assert path.stat().st_mode & 0o777 == 0o600  # as its owner wanted it
    assert_same(saved.read_result(path, Leaf), Leaf(torch.zeros(2)))


def test_what_has_no_place_in_a_result_is_named():
    with pytest.raises(TypeError, match="value/0 is a set, which has no place"):
        saved.split(Leaf([{1}]))


def test_fields_with_defaults_may_be_absent(small, tmp_path):
    def drop(structure):
        del structure["Analysis"]["examples"]["Examples"]["abstains"]

    loaded = ntkscope.load_analysis(rewritten(small[1], tmp_path / "file", drop))
    assert_same(loaded, small[0])


def test_bad_structures_are_refused(small, tmp_path):
    def remove(structure):
        del structure["Analysis"]["window"]

    def add(structure):
        structure["Analysis"]["window"]["Window"]["newer"] = 1

    def rename(structure):
        structure["Analysis"]["window"] = {"subprocess.Popen": {"args": "true"}}

    def lose(structure):
        structure["Analysis"]["spectrum"]["Spectrum"]["eigvals"] = {"tensor": "nowhere"}

    def deepen(structure):
        structure["Analysis"]["warnings"] = {"tuple": [{"a": 1, "b": 2}]}

    for change in (remove, add, rename, lose, deepen):
        with pytest.raises(ntkscope.InputError, match=r"another version of ntkscope wrote it .*Analyze again"):
            ntkscope.load_analysis(rewritten(small[1], tmp_path / "file", change))
    with pytest.raises(ntkscope.InputError, match="it holds no Analysis"):
        ntkscope.load_analysis(rewritten(small[1], tmp_path / "file", lambda structure: structure["Analysis"]["window"]))


def test_bad_files_are_refused_by_name_with_the_next_step(small, tmp_path):
    metadata, tensors = content(small[1] / saved.FILE)
    path = tmp_path / "file.safetensors"

    def refused(match):
        with pytest.raises(ntkscope.InputError, match=match) as caught:
            ntkscope.load_analysis(path)
        assert str(path) in str(caught.value)
        assert "ntkscope analyze" in str(caught.value)

    refused("There is no saved result at")
    path.write_text("not a safetensors file")
    refused("truncated, or no safetensors file")
    path.write_bytes(b"")
    refused("truncated, or no safetensors file")
    save_file(tensors, path, metadata={"schema": "ntkscope.summary/2"})
    refused("arrays alone, as earlier versions")
    save_file(tensors, path)
    refused("arrays alone, as earlier versions")
    save_file(tensors, path, metadata=metadata | {"schema": "ntkscope.summary/1"})
    refused("it has schema ntkscope.summary/1, and this version reads")
    save_file(tensors | {"spectrum/eigvals": tensors["spectrum/eigvals"] + 1}, path, metadata=metadata)
    refused("its checksum does not fit")
    path.unlink()
    path.mkdir()
    refused("There is no saved result at")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**9), in_header=st.booleans(), flip=st.integers(0, 255))
def test_bad_bytes_are_refused_or_do_not_matter(small, tmp_path, place, in_header, flip):
    found, folder = small
    raw = bytearray((folder / saved.FILE).read_bytes())
    # The header is where damage has the most ways to go unnoticed.
    place %= 8 + int.from_bytes(raw[:8], "little") if in_header else len(raw)
    raw[place] ^= flip
    path = tmp_path / "file"
    path.write_bytes(raw if flip else raw[:place])
    with suppress(ntkscope.InputError):
        assert_same(ntkscope.load_analysis(path), found)
