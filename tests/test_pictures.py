"""Small pictures of inputs: when they are made, how they are scaled, and their way through a trace."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ntkscope
from ntkscope.experiments.demo import train_demo
from ntkscope.record.pictures import MAX_SIDE, make_pictures
from ntkscope.record.trace import trace_from_state
from ntkscope.record.trajectory import trace_from_checkpoints


def ramp(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def record(inputs, path=None, steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 3))
    targets = torch.randint(3, (len(inputs),))
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", path=path, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return recorder


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        (torch.rand(5, 1, 8, 9), (5, 8, 9, 1)),
        (torch.rand(5, 3, 28, 32).double(), (5, 28, 32, 3)),
        (torch.rand(5, 3, 64, 48).half(), (5, 32, 24, 3)),
        (torch.randint(256, (2, 1, 100, 10), dtype=torch.uint8), (2, 32, 3, 1)),
        (torch.rand(70, 1, 224, 224), (70, 32, 32, 1)),
    ],
    ids=lambda value: str(tuple(getattr(value, "shape", value))),
)
def test_images_are_recognised(inputs, shape):
    pictures = make_pictures(inputs)
    assert pictures.shape == shape
    assert pictures.dtype == torch.uint8


@pytest.mark.parametrize(
    "inputs",
    [
        torch.rand(5, 64),
        torch.rand(5, 2, 8, 8),  # two channels
        torch.rand(5, 1, 7, 8),  # too small to be sure
        torch.randint(9, (5, 1, 8, 8)),  # integers may be tokens
        torch.rand(5, 8, 8),
        {"image": torch.rand(5, 1, 8, 8)},
        (torch.rand(5, 1, 8, 8), torch.rand(5, 2)),
        [],
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__,
)
def test_what_may_be_no_image_is_left_alone(inputs):
    assert make_pictures(inputs) is None


def test_flat_inputs_are_read_as_torch_flattens_them():
    images = torch.rand(4, 3, 5, 6)
    expected = make_pictures(images, (5, 6, 3))
    assert expected.shape == (4, 5, 6, 3)
    assert torch.equal(make_pictures(images.flatten(1), (5, 6, 3)), expected)
    assert torch.equal(make_pictures(images.permute(0, 2, 3, 1), (5, 6, 3)), expected)
    grey = images[:, 0]
    for rows in (grey, grey[:, None], grey[..., None], grey.flatten(1), 7 * grey.double() - 2):
        for shape in ((5, 6), (5, 6, 1), [5, 6], torch.Size([5, 6])):
            assert torch.equal(make_pictures(rows, shape), make_pictures(grey, (5, 6)))


def test_one_scale_for_the_whole_probe():
    pictures = make_pictures(ramp(2, 1, 8, 8))
    assert (int(pictures.min()), int(pictures.max())) == (0, 255)
    assert int(pictures[0].max()) == 126  # half as bright as the second
    assert torch.equal(pictures.flatten(), (255 * ramp(128) / 127).round().to(torch.uint8))


def test_areas_are_averaged_and_nothing_is_enlarged():
    fine = torch.zeros(1, 1, 64, 64)
    fine[..., ::2, ::2] = 1.0  # one of four pixels
    fine[..., 0, 1] = 1.0
    pictures = make_pictures(fine)
    assert pictures.shape == (1, 32, 32, 1)
    assert int(pictures[0, 0, 0, 0]) == 128
    assert set(pictures.flatten()[1:].tolist()) == {64}
    assert make_pictures(torch.rand(1, 4), (2, 2)).shape == (1, 2, 2, 1)


@given(
    values=st.lists(st.floats(width=64, allow_nan=True, allow_infinity=True, allow_subnormal=True), min_size=6, max_size=24),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_whatever_the_numbers_are_pictures_keep_their_order(values, dtype):
    row = torch.tensor(values[: 6 * (len(values) // 6)], dtype=torch.float64).to(dtype).view(-1, 6)
    pictures = make_pictures(row, (2, 3))
    assert pictures.shape == (len(row), 2, 3, 1)
    known = ~row.isnan()
    order = row[known].double().argsort()
    assert bool((pictures.flatten()[known.flatten()].int()[order].diff() >= 0).all()), "a larger number is no darker"
    finite = row[row.isfinite()]
    if finite.numel() and bool(finite.max() > finite.min()):
        assert (int(pictures.min()), int(pictures.max())) == (0, 255)


@pytest.mark.parametrize("value", [0.0, -3.0, sys.float_info.max, float("nan"), float("inf")])
def test_inputs_that_are_all_the_same(value):
    pictures = make_pictures(torch.full((3, 1, 8, 8), value, dtype=torch.float64))
    assert set(pictures.flatten().tolist()) == {128}


@pytest.mark.parametrize(
    ("inputs", "shape", "message"),
    [
        (torch.rand(4, 64), (8,), r"must be \(height, width\) or .* got \(8,\)"),
        (torch.rand(4, 64), 8, r"must be \(height, width\) or .* got 8"),
        (torch.rand(4, 64), (8, 8, 2), r"with 1 or 3 channels, got \(8, 8, 2\)"),
        (torch.rand(4, 64), (8, 0), r"got \(8, 0\)"),
        (torch.rand(4, 64), (8, 8.0), r"got \(8, 8.0\)"),
        (
            torch.rand(4, 64),
            (7, 8),
            r"means 56 numbers an example, but the probe's inputs have shape \(64,\) each.*leave `image_shape` out",
        ),
        (torch.rand(4, 8, 8), (8, 8, 3), r"Expected \(192,\), \(3, 8, 8\) or \(8, 8, 3\)"),
        ({"x": torch.rand(4, 64)}, (8, 8), "needs probe inputs that are one tensor of real numbers, got dict"),
        (torch.rand(4, 64) + 0j, (8, 8), "got a tensor of torch.complex64"),
    ],
)
def test_bad_shape_gets_a_message(inputs, shape, message):
    with pytest.raises(ntkscope.InputError, match=message):
        make_pictures(inputs, shape)


def test_pictures_go_through_folder_and_state(tmp_path):
    inputs = torch.rand(6, 1, 40, 8)
    recorder = record(inputs, tmp_path / "trace")
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    traces = [
        recorder.trace,
        ntkscope.load_trace(tmp_path / "trace"),
        trace_from_state(torch.load(tmp_path / "state.pt", weights_only=True), "it"),
    ]
    for trace in traces:
        assert torch.equal(trace.probe["pictures"], make_pictures(inputs))
        assert torch.equal(ntkscope.analyze(trace).examples.pictures, make_pictures(inputs))


def test_without_images_the_trace_has_no_pictures():
    trace = record(torch.rand(6, 64)).trace
    assert "pictures" not in trace.probe
    assert ntkscope.analyze(trace).examples.pictures is None


def test_flat_images_need_the_recorder_to_be_told():
    trace = record(torch.rand(6, 64), image_shape=(8, 8)).trace
    assert trace.probe["pictures"].shape == (6, 8, 8, 1)
    with pytest.raises(ntkscope.InputError, match="means 63 numbers an example"):
        record(torch.rand(6, 64), image_shape=(7, 9))


def test_the_pictures_change_neither_hash_nor_numbers():
    plain, drawn = (record(ramp(6, 64) / 400, **options) for options in ({}, {"image_shape": (8, 8)}))
    assert plain.trace.facts == drawn.trace.facts
    assert all(torch.equal(a.kernel(), b.kernel()) for a, b in zip(plain.trace, drawn.trace, strict=True))


@pytest.mark.parametrize(
    "pictures",
    [
        torch.zeros(6, 8, 8, 1),
        torch.zeros(6, 8, 8, dtype=torch.uint8),
        torch.zeros(6, 8, 8, 2, dtype=torch.uint8),
        torch.zeros(6, MAX_SIDE + 1, 8, 1, dtype=torch.uint8),
        torch.zeros(6, 0, 8, 1, dtype=torch.uint8),
    ],
    ids=lambda pictures: str((pictures.dtype, tuple(pictures.shape))),
)
def test_damaged_pictures_are_refused(pictures, tmp_path):
    recorder = record(torch.rand(6, 1, 8, 8), tmp_path)
    probe = load_file(tmp_path / "probe.safetensors") | {"pictures": pictures}
    save_file(probe, tmp_path / "probe.safetensors")
    message = r"pictures of inputs in .* are damaged: expected bytes of shape \[6, height, width, 1 or 3\] .* Record the run again"
    with pytest.raises(ntkscope.InputError, match=message):
        ntkscope.load_trace(tmp_path)
    state = recorder.state_dict()
    state["probe"]["pictures"] = pictures
    with pytest.raises(ntkscope.InputError, match=message):
        trace_from_state(state, "a state")


def test_pictures_of_another_number_of_examples_are_refused():
    state = record(torch.rand(6, 1, 8, 8)).state_dict()
    state["probe"]["pictures"] = state["probe"]["pictures"][:5]
    with pytest.raises(ntkscope.InputError, match="The probe in a state is damaged"):
        trace_from_state(state, "a state")


def test_traces_of_before_have_none(tmp_path):
    record(torch.rand(6, 1, 8, 8), tmp_path)
    probe = load_file(tmp_path / "probe.safetensors")
    del probe["pictures"]
    save_file(probe, tmp_path / "probe.safetensors")
    assert json.loads((tmp_path / "manifest.json").read_text())["schema"] == "ntkscope.trace/3"
    assert ntkscope.analyze(ntkscope.load_trace(tmp_path)).examples.pictures is None


def test_the_demo_keeps_its_digits():
    run = train_demo(num_examples=20, num_steps=2)
    pictures = run.recorder.trace.probe["pictures"]
    assert torch.equal(pictures, make_pictures(run.data.pixels, (8, 8)))
    assert pictures.shape == (20, 8, 8, 1)


def test_bare_checkpoints_of_images_have_pictures(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    inputs, targets = torch.rand(5, 1, 8, 8), torch.randint(2, (5,))
    for step in range(2):
        torch.save(model.state_dict(), tmp_path / f"{step}.pt")
        with torch.no_grad():
            model[1].weight.mul_(0.9)
    paths = [tmp_path / f"{step}.pt" for step in range(2)]
    trace = trace_from_checkpoints(paths, model, (inputs, targets), loss="cross_entropy", times=[0.0, 1.0])
    assert torch.equal(trace.probe["pictures"], make_pictures(inputs))
