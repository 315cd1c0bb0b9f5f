"""What the linked view shows, against the definitions written as loops."""

import base64
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from view_case import synthetic_analysis

from ntkscope.view import links as linked
from ntkscope.view.links import energy_tables, links, pictures_of


@pytest.fixture(scope="module")
def analysis():
    return synthetic_analysis(has_gate=True)


def oracle(analysis):
    """‖v_k[i]‖² and ⟨v_k[i], h_i⟩ (v_kᵀh) / ‖h_i‖², entry by entry."""
    spectrum = analysis.spectrum
    vectors, residual, owner = spectrum.eigvecs, spectrum.residual.reshape(len(spectrum.owner), -1), spectrum.owner
    lies = torch.zeros(len(analysis.examples.ids), vectors.shape[1], dtype=torch.float64)
    parts = torch.zeros_like(lies)
    for i in range(lies.shape[0]):
        mine = owner == i
        energy = float((residual[mine] ** 2).sum())
        for k in range(lies.shape[1]):
            lies[i, k] = (vectors[mine, k] ** 2).sum()
            for column in residual.T:
                parts[i, k] += (vectors[mine, k] @ column[mine]) * (vectors[:, k] @ column) / energy
    return lies, parts


@pytest.mark.parametrize("num_fields", [1, 3])
def test_energy_tables_are_the_definition(num_fields):
    analysis = synthetic_analysis(num_examples=12, num_classes=2)
    if num_fields > 1:  # the trace form: one column per class
        analysis.spectrum.residual = torch.randn(24, num_fields, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lies, parts = energy_tables(analysis)
    expected_lies, expected_parts = oracle(analysis)
    torch.testing.assert_close(lies, expected_lies, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts, expected_parts, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lies.sum(dim=0), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(parts.sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_an_example_without_error_lies_along_nothing():
    analysis = synthetic_analysis(num_examples=12, num_classes=2)
    analysis.spectrum.residual[analysis.spectrum.owner == 3] = 0.0
    assert energy_tables(analysis)[1][3].abs().max() == 0
    assert links(analysis)["example_modes"][3] == []


def test_modes_and_examples_name_each_other(analysis):
    found, (lies, parts) = links(analysis), oracle(analysis)
    for k in (0, 7, 100):
        top = lies[:, k].topk(linked.NUM_SHOWN)
        assert [example for example, _ in found["mode_examples"][k]] == top.indices.tolist()
        assert [share for _, share in found["mode_examples"][k]] == [round(1000 * value) for value in top.values.tolist()]
    for i in (0, 11):
        top = parts[i].abs().topk(linked.NUM_SHOWN).indices.tolist()
        assert [found["modes"][k] - 1 for k, _ in found["example_modes"][i]] == top
        assert [share for _, share in found["example_modes"][i]] == [round(1000 * float(parts[i, k])) for k in top]


def test_labels_of_a_mode_add_up_their_examples(analysis):
    found, (lies, _) = links(analysis), oracle(analysis)
    totals = {str(label): 0.0 for label in analysis.examples.labels}
    for i, label in enumerate(analysis.examples.labels):
        totals[str(label)] += float(lies[i, 4])
    label, share = found["mode_labels"][4][0]
    assert totals[label] == max(totals.values())
    assert share == round(1000 * totals[label])


def test_a_mode_is_half_learned_at_the_first_such_snapshot(analysis):
    history, found = analysis.history, links(analysis)
    for mode in (0, 20, len(found["modes"]) - 1):
        steps = [step for step, row in zip(history.steps, history.eigvals, strict=True) if row[mode] > 0.5]
        assert found["learned_at"][mode] == (steps[0] if steps else None)


def test_layers_are_those_of_the_audited_step_nearest_to_the_windows_end(analysis):
    found, audit = links(analysis)["layers"], analysis.gate.audit
    nearest = min(audit.steps, key=lambda step: abs(step.step - analysis.window.stop_step))
    assert (found["step"], found["names"], found["num_left_out"]) == (nearest.step, list(nearest.layers), 0)
    assert found["share"][2] == [round(1000 * float(value)) for value in nearest.layer_share[2]]
    assert found["kept"][2] == [round(1000 * float(value), 0) for value in nearest.openness[2]]
    assert links(synthetic_analysis())["layers"] is None


def test_many_layers_are_left_out_and_counted(analysis, monkeypatch):
    monkeypatch.setattr(linked, "MAX_LAYERS", 2)
    found = links(analysis)["layers"]
    assert (len(found["names"]), found["num_left_out"]) == (2, 2)
    step = min(analysis.gate.audit.steps, key=lambda step: abs(step.step - analysis.window.stop_step))
    means = dict(zip(step.layers, step.layer_share.mean(dim=0).tolist(), strict=True))
    assert set(found["names"]) == set(sorted(means, key=lambda name: -means[name])[:2])


def test_thinned_modes_keep_those_that_examples_lie_along(monkeypatch):
    monkeypatch.setattr(linked, "MAX_MODES", 20)
    analysis = synthetic_analysis()
    found, (_, parts) = links(analysis), oracle(analysis)
    assert len(found["modes"]) == 20
    assert found["modes"][:10] == list(range(1, 11))
    assert found["modes"] == sorted(found["modes"])
    assert int(parts[:, 10:].abs().max(dim=0).values.argmax()) + 11 in found["modes"]
    assert all(0 <= k < 20 for row in found["example_modes"] for k, _ in row)


def test_infinite_directions_are_left_out():
    analysis = synthetic_analysis()
    analysis.spectrum.eigvecs[3, 5] = torch.inf
    found = links(analysis)
    json.dumps(found, allow_nan=False)
    assert int(analysis.spectrum.owner[3]) not in [example for example, _ in found["mode_examples"][5]]


@pytest.mark.parametrize(
    "options", [{"has_labels": False, "has_noise": False}, {"num_snapshots": 1}, {"has_nan": True}, {"num_examples": 8}], ids=str
)
def test_whatever_is_unknown_is_null_in_valid_json(options):
    text = json.dumps(links(synthetic_analysis(**options)), allow_nan=False)
    assert json.loads(text)["num_modes"] == (32 if options.get("num_examples") else 120)


def _with_pictures(count, height, width, channels):
    analysis = synthetic_analysis(num_examples=count, num_classes=2)
    generator = torch.Generator().manual_seed(0)
    analysis.examples.pictures = torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)
    return analysis


def test_small_pictures_are_packed_as_they_are():
    analysis = _with_pictures(10, 8, 9, 3)
    found = pictures_of(analysis)
    assert (found["height"], found["width"], found["channels"]) == (8, 9, 3)
    assert sorted(found["examples"]) == list(range(10))
    data = torch.frombuffer(bytearray(base64.b64decode(found["data"])), dtype=torch.uint8).view(10, 8, 9, 3)
    assert torch.equal(data, analysis.examples.pictures[found["examples"]])


def test_large_pictures_are_made_smaller_then_fewer(monkeypatch):
    analysis = _with_pictures(10, 32, 16, 1)
    monkeypatch.setattr(linked, "PICTURE_BYTES", 2000)
    found = pictures_of(analysis)
    assert (found["height"], found["width"], len(found["examples"])) == (16, 8, 10)
    first = analysis.examples.pictures[found["examples"][0], :2, :2, 0].float().mean()
    assert base64.b64decode(found["data"])[0] == int(first.round())
    monkeypatch.setattr(linked, "PICTURE_BYTES", 300)
    fewer = pictures_of(analysis)
    assert fewer["examples"] == analysis.examples.ranking()[:2], "the most suspicious first"


def test_without_images_there_are_no_pictures():
    assert pictures_of(synthetic_analysis(has_pictures=False)) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_shares_add_up_for_any_orthogonal_basis(num_examples, num_classes, seed):
    analysis = synthetic_analysis(num_examples=8, num_classes=2)
    generator = torch.Generator().manual_seed(seed)
    size = num_examples * num_classes
    analysis.spectrum.eigvecs = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    analysis.spectrum.residual = torch.randn(size, generator=generator, dtype=torch.float64)
    analysis.spectrum.owner = torch.arange(num_examples).repeat_interleave(num_classes)
    analysis.examples.ids = list(range(num_examples))
    lies, parts = energy_tables(analysis)
    torch.testing.assert_close(lies.sum(dim=0), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close(parts.sum(dim=1), torch.ones(num_examples, dtype=torch.float64))
    assert float(lies.min()) >= 0
