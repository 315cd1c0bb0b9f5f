"""One audited step against the definitions of theory.md section 7, dense, in float64, and planted cases with a known answer."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracles import stacked_jacobian
from torch import nn

import ntkscope
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.gate.audit_results import FIGURES, LAYER_FIGURES
from ntkscope.gate.audit_step import Update, audit_step
from ntkscope.gate.channel import Channel, channel_at
from ntkscope.gate.compared import compare
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.columns import Columns, columns_of, whole_jacobian
from ntkscope.kernel.coverage import probe_routes
from ntkscope.spectrum.whitening import whiten

N, C = 6, 2


@pytest.fixture(scope="module")
def case():
    """A small network, softmax Hessians, and a window made of one interval with its own kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)).double()
    inputs = torch.randn(N, 4, dtype=torch.float64)
    inputs[:, 3] = 0.0  # dead columns: the weights of an input that is always zero
    targets = torch.randint(C, (N,))
    outputs = model(inputs)
    probabilities = outputs.softmax(dim=1).detach()
    blocks = (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]) / N
    gradient = (probabilities - nn.functional.one_hot(targets, C)) / N
    jacobian = stacked_jacobian(model, inputs)
    state = accumulate(init(gradient.flatten()), jacobian @ jacobian.T, blocks, elapsed=3.0)
    channel = channel_at(state, whiten(blocks), rank=2)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    draw = torch.Generator().manual_seed(1)

    def tensors(make):
        return {name: make(shapes[name]) for name in names}

    update = Update(
        mean=tensors(lambda shape: torch.randn(shape, generator=draw, dtype=torch.float64)),
        precond=tensors(lambda shape: torch.rand(shape, generator=draw, dtype=torch.float64) + 0.1),
        gate=tensors(lambda shape: torch.rand(shape, generator=draw, dtype=torch.float64)),
        variance=tensors(lambda shape: torch.rand(shape, generator=draw, dtype=torch.float64)),
        is_hard=False,
    )
    routes, coverage = probe_routes(model, inputs)
    with undisturbed(model):
        factored = whole_jacobian(model, inputs, routes=routes, coverage=coverage, budget=2**30)
    return {
        "columns": lambda name: columns_of(factored, name, chunk_bytes=500),
        "update": update, "channel": channel, "gradient": gradient, "jacobian": jacobian, "blocks": blocks, "state": state, "names": names,
    }  # fmt: skip


def flat(named):
    return torch.cat([named[name].flatten() for name in named])


def dense(case):
    """Symmetric B^½ on R, Π from the left singular vectors of B^{†½} P B^½ in plain output coordinates, and J̃."""
    blocks = torch.block_diag(*case["blocks"])
    values, vectors = torch.linalg.eigh(blocks)
    keep = values > 1e-12 * values.max()
    root = (vectors[:, keep] * values[keep].sqrt()) @ vectors[:, keep].T
    inverse = (vectors[:, keep] / values[keep].sqrt()) @ vectors[:, keep].T
    onto = vectors[:, keep] @ vectors[:, keep].T
    propagator = inverse @ case["state"].propagator @ root
    left, _, _ = torch.linalg.svd(propagator)
    inside = left[:, (onto @ left).norm(dim=0) > 0.5]  # those in R, singular values descending
    inside = inside[:, : int(keep.sum())]
    signal = inside[:, -2:]
    return root, inverse, signal @ signal.T, onto, root @ case["jacobian"]


def test_every_figure_is_the_definition(case):
    audit = audit_step(
        case["columns"], case["update"], case["channel"], case["gradient"], step=7, strictness=2.0, batch_size=4, num_permutations=20
    )
    update, jacobian, gradient = case["update"], case["jacobian"], case["gradient"].flatten()
    root, inverse, projector, onto, whitened = dense(case)
    reservoir = onto - projector
    mean, precond, gate = flat(update.mean), flat(update.precond), flat(update.gate)
    columns = whitened.square().sum(dim=0)
    live = columns > 0
    rho = ((projector @ whitened).square().sum(dim=0)[live] / columns[live]).round(decimals=9)
    opened = gate[live] > 0.5
    expected = {
        "auroc": float(scipy.stats.mannwhitneyu(rho[opened].numpy(), rho[~opened].numpy()).statistic) / int(opened.sum() * (~opened).sum()),
        "rank_correlation": scipy.stats.spearmanr(rho.numpy(), gate[live].numpy()).statistic,
    }
    threshold = case["channel"].rank / case["channel"].num_modes
    table = np.array([[float(((opened == a) & ((rho > threshold) == b)).double().mean()) for b in (False, True)] for a in (False, True)])
    chance = float((table.sum(axis=0) * table.sum(axis=1)).sum())
    expected["kappa"] = (float(np.trace(table)) - chance) / (1 - chance)
    ungated = root @ (jacobian @ (precond * mean))
    removed = ungated - root @ (jacobian @ (gate * precond * mean))
    expected["precision"] = float((reservoir @ removed).square().sum() / (onto @ removed).square().sum())
    expected["recall"] = float((reservoir @ removed) @ (reservoir @ ungated) / (reservoir @ ungated).square().sum())
    expected["collateral"] = float((projector @ removed) @ (projector @ ungated) / (projector @ ungated).square().sum())
    expected["advantage"] = expected["recall"] - expected["collateral"]
    target = precond * (jacobian.T @ (root @ projector @ inverse @ gradient))
    expected["direction"] = float(torch.nn.functional.cosine_similarity((gate * precond * mean)[live], target[live], dim=0))
    kernels = [[float(torch.trace(part @ whitened @ torch.diag(q * precond) @ whitened.T)) for q in (gate, torch.ones_like(gate))]
               for part in (projector, reservoir)]  # fmt: skip
    expected["selectivity"] = (kernels[0][0] / kernels[0][1]) / (kernels[1][0] / kernels[1][1])
    assert set(audit.figures) == set(FIGURES) == set(expected)
    for name, value in expected.items():
        assert audit.figures[name].observed == pytest.approx(value, rel=1e-9), name
        assert audit.figures[name].num_draws == 20
    assert audit.ungated_direction == pytest.approx(
        float(torch.nn.functional.cosine_similarity((precond * mean)[live], target[live], dim=0))
    )
    assert audit.kept_signal == pytest.approx(kernels[0][0] / kernels[0][1])
    assert audit.kept_reservoir == pytest.approx(kernels[1][0] / kernels[1][1])
    assert audit.reservoir_motion == pytest.approx(float((reservoir @ ungated).square().sum() / (onto @ ungated).square().sum()))
    assert (audit.num_live, audit.num_dead) == (int(live.sum()), int((~live).sum()))
    assert audit.num_dead >= 5
    assert audit.open_share == pytest.approx(float(opened.double().mean()))
    assert audit.mean_gate == pytest.approx(float(gate[live].mean()))
    assert int(audit.density.sum()) == audit.num_live


def test_spectral_gate_and_openness_are_the_definition(case):
    audit = audit_step(case["columns"], case["update"], case["channel"], case["gradient"], step=7, strictness=2.0, batch_size=4)
    update, jacobian = case["update"], case["jacobian"]
    precond, gate = flat(update.precond), flat(update.gate)
    coordinates = case["channel"].motion(jacobian.view(N, C, -1))[:, 0]  # [modes, params]
    caused = torch.stack([
        coordinates @ (precond * (jacobian.view(N, C, -1)[a].T @ case["gradient"][a])) * N for a in range(N)
    ], dim=1)  # fmt: skip
    snr = caused.mean(dim=1).square() * 3 / caused.var(dim=1, correction=0)
    assert torch.allclose(audit.spectral_gate.signal_to_noise, snr, rtol=1e-8)
    assert audit.spectral_gate.rank == int((snr > 2.0).sum())
    assert audit.spectral_gate.in_signal == int((snr[: case["channel"].rank] > 2.0).sum())
    start = 0
    for k, name in enumerate(case["names"]):
        part = slice(start, start + update.gate[name].numel())
        start = part.stop
        weight = coordinates[:, part].square() * precond[part]
        assert torch.allclose(audit.openness[:, k], (weight @ gate[part]) / weight.sum(dim=1), rtol=1e-8)
        whole = coordinates.square() @ precond
        assert torch.allclose(audit.layer_share[:, k], weight.sum(dim=1) / whole, rtol=1e-8)
    assert torch.allclose(audit.layer_share.sum(dim=1), torch.ones(audit.num_modes, dtype=torch.float64))


def test_layers_are_audits_of_their_tensor_alone(case):
    whole = audit_step(case["columns"], case["update"], case["channel"], case["gradient"], step=1)
    name = case["names"][2]
    only = Update(*({name: getattr(case["update"], key)[name]} for key in ("mean", "precond", "gate", "variance")), is_hard=False)
    alone = audit_step(case["columns"], only, case["channel"], case["gradient"], step=1)
    layer = whole.layers[name]
    assert set(layer.figures) == set(LAYER_FIGURES)
    for figure in LAYER_FIGURES:
        assert layer.figures[figure].observed == pytest.approx(alone.figures[figure].observed, rel=1e-9), figure
    assert layer.open_share == alone.open_share


def test_open_gate_removes_nothing_and_says_so(case):
    ones = {name: torch.ones_like(gate) for name, gate in case["update"].gate.items()}
    update = Update(case["update"].mean, case["update"].precond, ones, case["update"].variance, is_hard=True)
    figures = audit_step(case["columns"], update, case["channel"], case["gradient"], step=1).figures
    assert figures["precision"].reason == "the gate removed no motion"
    assert figures["auroc"].reason == "every gate is open"
    assert figures["recall"].observed == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(figures["recall"].z)
    assert figures["selectivity"].observed == pytest.approx(1.0)


@pytest.mark.parametrize(("rank", "words"), [(0, "no signal direction"), (None, "signal")])
def test_no_split_is_null_with_the_reason(case, rank, words):
    channel = case["channel"]
    degenerate = Channel(channel.whitening, channel.basis, channel.num_modes if rank is None else rank)
    figures = audit_step(case["columns"], case["update"], degenerate, case["gradient"], step=1).figures
    for name in ("auroc", "kappa", "precision", "recall", "collateral", "advantage", "selectivity"):
        assert words in figures[name].reason, name
        assert math.isnan(figures[name].z)


def planted(kind, num_params=800, num_examples=200, seed=0):
    """A linear readout of known columns: half of the parameters move signal directions only, half move reservoir directions only.

    "aligned": signal columns have gradients that stand out from their noise, so the gate opens them and closes the others.
    "rotated": the parameters are a rotation of those, so that no coordinate is signal; noise is large where signal is, which closes them.
    """
    draw = torch.Generator().manual_seed(seed)
    rank = num_examples // 2
    basis = torch.linalg.qr(torch.randn(num_examples, num_examples, generator=draw, dtype=torch.float64)).Q
    channel = Channel(whiten(torch.ones(num_examples, 1, 1, dtype=torch.float64)), basis, rank)
    half = num_params // 2
    signal = basis[:, :rank] @ torch.randn(rank, half, generator=draw, dtype=torch.float64)
    reservoir = basis[:, rank:] @ torch.randn(num_examples - rank, half, generator=draw, dtype=torch.float64)
    columns = torch.cat([signal, reservoir], dim=1)
    snr = torch.cat([10 * torch.ones(half), 0.1 * torch.ones(half)]).double()
    if kind == "rotated":
        snr = snr.flip(0)  # what is coherent over batches is what one example pulls at; the shared pattern looks noisy in these coordinates
    mean = torch.randn(num_params, generator=draw, dtype=torch.float64)
    variance = mean.square() / (snr * (0.5 + torch.rand(num_params, generator=draw, dtype=torch.float64)))
    update = Update({"w": mean}, {"w": 1.0}, {"w": ntkscope.gate_values(mean, variance, kind="hard")}, {"w": variance}, is_hard=True)
    gradient = torch.randn(num_examples, 1, generator=draw, dtype=torch.float64)

    def chunks(name):
        for start in range(0, num_params, 64):
            where = torch.arange(start, min(start + 64, num_params))
            yield Columns(where, columns[:, None, where])

    return audit_step(chunks, update, channel, gradient, step=1, num_permutations=200)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kind", "sign"), [("aligned", 1), ("rotated", -1)])
def test_planted_cases_have_the_right_sign_and_beat_the_null(kind, sign, seed):
    figures = planted(kind, seed=seed).figures
    for name in ("auroc", "rank_correlation", "kappa", "precision", "recall", "advantage", "selectivity"):
        assert sign * figures[name].z > 5, (name, figures[name])
    assert sign * figures["collateral"].z < -5
    assert figures["auroc"].observed == (1.0 if sign > 0 else 0.0)
    assert figures["precision"].observed == pytest.approx(1.0 if sign > 0 else 0.0, abs=1e-9)


def test_random_gates_are_not_found_to_matter():
    """Calibration: gates drawn without looking at the signal have z of standard size."""
    scores = []
    for seed in range(30):
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
        channel = Channel(whiten(torch.ones(20, 1, 1, dtype=torch.float64)), basis, 8)
        columns = torch.randn(20, 1, 300, dtype=torch.float64)
        gate, mean = torch.rand(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
        update = Update({"w": mean}, {"w": 1.0}, {"w": gate}, {"w": mean.square()}, is_hard=False)
        audit = audit_step(
            lambda _, columns=columns: iter([Columns(torch.arange(300), columns)]), update, channel, torch.randn(20, 1).double(), step=1
        )
        scores.append([audit.figures[name].z for name in FIGURES])
    spread = torch.tensor(scores)
    assert spread.abs().max() < 5
    assert torch.all((spread.std(dim=0) > 0.6) & (spread.std(dim=0) < 1.6))
    assert torch.all(spread.mean(dim=0).abs() < 0.8)


def test_trace_form_is_the_full_form_of_a_kernel_that_shares_classes():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    scale = torch.rand(5, dtype=torch.float64) + 0.5
    columns, gradient = torch.randn(5, 3, 40, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mean, gate = torch.randn(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    update = Update({"w": mean}, {"w": 0.5}, {"w": gate}, {"w": mean.square() + 1}, is_hard=False)
    trace = Channel(whiten(scale[:, None, None]), basis, 2)
    blocks = scale[:, None, None] * torch.eye(3, dtype=torch.float64)
    full = Channel(whiten(blocks), torch.kron(basis.contiguous(), torch.eye(3, dtype=torch.float64)), 6)
    found = [audit_step(lambda _: iter([Columns(torch.arange(40), columns)]), update, c, gradient, step=1) for c in (trace, full)]
    for name in FIGURES:
        assert found[0].figures[name].observed == pytest.approx(found[1].figures[name].observed, rel=1e-9), name


def test_nothing_to_audit_is_an_error(case):
    zero = torch.zeros(N, C, 3, dtype=torch.float64)
    ones = {"w": torch.ones(3)}
    with pytest.raises(ntkscope.InputError, match="No parameter moves an output"):
        audit_step(lambda _: iter([Columns(torch.arange(3), zero)]), Update(ones, ones, ones, ones, is_hard=False),
                   case["channel"], case["gradient"], step=1)  # fmt: skip


def test_p_values_count_both_sides():
    draws = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    assert compare(5.0, draws).p == compare(-5.0, draws).p == 1 / 5
    assert compare(0.5, draws).p == 1.0
    assert compare(math.nan, draws).reason == "it is not defined (0/0)"
    assert compare(1.0, draws[:0]).reason == "there are no permutations"
    assert compare(1.0, torch.ones(5, dtype=torch.float64)).reason == "permuting the gate does not change it"
