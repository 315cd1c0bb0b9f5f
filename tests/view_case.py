"""A synthetic analysis for the views: a frozen linear model with planted wrong labels, as plain namespaces."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import scipy
import torch

from ntkscope.gate.audit_step import Update, audit_step
from ntkscope.gate.channel import Channel
from ntkscope.gate.step import gate_values
from ntkscope.gate.verdict import GateAudit, average_figures, judge
from ntkscope.kernel.columns import Columns
from ntkscope.spectrum.whitening import whiten

NUM_NOISY = 6
LARGE = 1000  # modes, from which random directions would take too long to make

CASES = {
    "normal": {},
    "gate": {"has_gate": True},
    "one snapshot": {"num_snapshots": 1, "has_gate": True},
    "two snapshots": {"num_snapshots": 2},
    "no labels, no noise": {"has_labels": False, "has_noise": False},
    "labels only": {"has_noise": False, "has_pictures": False},
    "nan": {"has_nan": True, "is_trustworthy": False, "has_gate": True},
    "nan, no labels": {"has_nan": True, "has_labels": False, "has_noise": False},
    "two examples": {"num_examples": 8, "num_classes": 2},
}
MISSING = {"cells": "no query set was recorded: give the Recorder `query=", "suspicious_inputs": r"Recorder\(image_shape="}  # else a gate


def title_of(figure: go.Figure) -> str:
    return figure.to_plotly_json()["layout"]["title"]["text"]


def finite_json(figure: go.Figure) -> dict:
    """Read the figure as a browser would: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the figure")

    return json.loads(figure.to_json(), parse_constant=refuse)


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """Random directions; large ones are cosines with shuffled signs and order, made in a second instead of a minute."""
    if size <= LARGE:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    cosines = torch.from_numpy(scipy.fft.dct(np.eye(size), norm="ortho", axis=0, overwrite_x=True))
    signs = 2.0 * torch.randint(2, (size, 1), generator=generator) - 1
    return (signs * cosines)[:, torch.randperm(size, generator=generator)]


def synthetic_audit(names: tuple[str, ...], num_steps: int = 3) -> GateAudit:
    """Audit random gates of a random model."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    steps = []
    for k in range(num_steps):
        columns = {name: torch.randn(12, 1, 40, generator=generator, dtype=torch.float64) for name in names}
        mean = {name: torch.randn(40, generator=generator, dtype=torch.float64) for name in names}
        variance = {name: torch.rand(40, generator=generator, dtype=torch.float64) for name in names}
        gate = {name: gate_values(mean[name], variance[name], kind="soft") for name in names}
        steps.append(
            audit_step(
                lambda name, columns=columns: iter([Columns(torch.arange(40), columns[name])]),
                Update(mean, dict.fromkeys(names, 1.0), gate, variance, is_hard=False),
                Channel(whiten(torch.ones(12, 1, 1, dtype=torch.float64)), basis, 3 + k),
                torch.randn(12, 1, generator=generator, dtype=torch.float64),
                step=4 * (k + 1),
                num_permutations=20,
            )
        )
    overall, layers = average_figures(steps)
    found = judge(steps, overall, layers, gate="the soft gate at α = 1", is_counterfactual=False)
    return GateAudit("soft", 1.0, 1.0, 19.0, False, "streaming", steps, overall, layers, found, None, ("A warning of the audit.",))


def synthetic_analysis(
    *,
    num_examples: int = 30,
    num_classes: int = 4,
    num_snapshots: int = 12,
    has_labels: bool = True,
    has_noise: bool = True,
    has_gate: bool = False,
    has_nan: bool = False,
    has_pictures: bool = True,
    is_trustworthy: bool = True,
    source: str = "runs/digits.pt",
) -> Any:
    """Build what `ntkscope.analyze` would return; see /docs for the fields."""
    generator = torch.Generator().manual_seed(0)
    num_modes = num_examples * num_classes
    owner = torch.arange(num_examples).repeat_interleave(num_classes)
    eigvecs = orthogonal(num_modes, generator)
    strength = 4.0 * torch.arange(1, num_modes + 1, dtype=torch.float64) ** -1.3
    # Right labels agree with the leading directions, wrong ones do not.
    residual = eigvecs[:, :14] @ (torch.rand(14, generator=generator, dtype=torch.float64) + 0.4)
    is_noise = torch.zeros(num_examples, dtype=torch.bool)
    is_noise[torch.randperm(num_examples, generator=generator)[:NUM_NOISY]] = True
    stray = eigvecs[:, 14:] @ torch.randn(num_modes - 14, generator=generator, dtype=torch.float64)
    residual = torch.where(is_noise[owner], 0.3 * residual + 0.5 * stray, residual + 0.04 * stray)
    residual /= residual.norm()

    growth = 1.8 if num_snapshots <= 16 else 3000 ** (1 / num_snapshots)
    steps = [0, *(round(growth**k) + k for k in range(num_snapshots - 1))] if num_snapshots > 1 else [40]
    times = 0.05 * torch.tensor(steps, dtype=torch.float64)
    eigvals = 1 - torch.exp(-2 * times[:, None] * strength)
    coefficients = eigvecs.T @ residual
    removed = (eigvals * coefficients.square()).sum(dim=1) / coefficients.square().sum()
    energies = torch.zeros(num_examples, dtype=torch.float64).index_add(0, owner, residual.square())
    leading, left = [], []
    for row in range(len(steps)):
        tilt = 0.25 * row / max(1, len(steps) - 1)
        turned = eigvecs[:, :3] + tilt * eigvecs[:, 3:6]
        placed = torch.zeros(num_examples, 3, dtype=torch.float64).index_add(0, owner, turned * residual[:, None])
        leading.append(placed / energies.sqrt()[:, None] * float(steps[row] > 0))
        rest = eigvecs @ ((1 - eigvals[row]).clamp(min=0).sqrt() * coefficients)
        left.append(torch.zeros(num_examples, dtype=torch.float64).index_add(0, owner, rest.square()) / energies)
    example_residual = torch.stack(left)
    stop = max(0, len(steps) - 3)
    loss = 0.45 * (1 - removed)
    gradient_error = 0.004 * torch.arange(len(steps), dtype=torch.float64) ** 1.6

    final = eigvals[stop]
    rank = int((final > 0.5).sum())
    reservoir = eigvecs[:, rank:] @ (eigvecs[:, rank:].T @ residual)
    reservoir_energy = torch.zeros(num_examples, dtype=torch.float64).index_add(0, owner, reservoir.square())
    noise = 0.05 * torch.randn(num_examples, generator=generator, dtype=torch.float64)
    margin = 0.6 - 0.9 * is_noise.double() + 4 * noise

    def times_to(level: float) -> torch.Tensor:
        found = torch.full((num_examples,), torch.inf, dtype=torch.float64)
        for row in reversed(range(len(steps))):
            found = torch.where(example_residual[row] < level, times[row], found)
        return found

    labels = [int(k) for k in torch.randint(0, num_classes, (num_examples,), generator=generator)]
    unknown = torch.full((num_examples,), torch.nan, dtype=torch.float64)
    examples = SimpleNamespace(
        ids=list(range(num_examples)),
        labels=labels if has_labels else None,
        true_labels=[(k + 1) % num_classes if bad else k for k, bad in zip(labels, is_noise, strict=True)] if has_noise else None,
        is_noise=is_noise if has_noise else None,
        loss=0.3 * example_residual[stop] + noise.abs(),
        margin=margin if has_labels else unknown,
        area_under_margin=margin - 0.2 if has_labels else unknown,
        self_influence=2 + 20 * noise,
        reservoir_energy=reservoir_energy,
        reservoir_share=reservoir_energy / energies,
        ranked_by="half_time",
        half_time=times_to(0.5),
        quarter_time=times_to(0.25),
        residual_left=example_residual[-1],
        abstains="",
        pictures=torch.randint(256, (num_examples, 8, 8, 1), generator=generator, dtype=torch.uint8) if has_pictures else None,
        ranking=lambda by="half_time": reservoir_energy.argsort(descending=True).tolist(),
        auroc={
            "reservoir_energy": 0.97,
            "loss": 0.91,
            "margin": 0.93,
            "area_under_margin": 0.90,
            "self_influence": 0.51,
            "half_time": 0.95,
            "quarter_time": 0.96,
        }
        if has_noise
        else None,
    )
    history = SimpleNamespace(
        steps=steps,
        times=times,
        loss=loss,
        predicted_loss=loss * (1 + 0.02 * torch.randn(len(steps), generator=generator, dtype=torch.float64)),
        gradient_error=gradient_error,
        eigvals=eigvals,
        leading_modes=[0, 1, 2],
        leading=torch.stack(leading),
        example_residual=example_residual,
        signal_share=removed,
        is_refined=[False, *[True] * (len(steps) - 1)],
    )
    if has_nan:
        history.leading[-1, 0] = torch.nan
        history.gradient_error[1:] = torch.tensor([torch.inf, torch.nan, *gradient_error[3:]])[: len(steps) - 1]
        history.predicted_loss[-1] = torch.nan
        history.eigvals[-1, :2] = torch.nan
        examples.reservoir_energy[1] = torch.nan
        examples.half_time[1] = torch.nan
        examples.reservoir_share[1] = torch.nan
        examples.self_influence[:] = torch.nan
        examples.loss[2] = torch.inf
    cut = lambda rule, threshold, verdict, note="": SimpleNamespace(rule=rule, threshold=threshold, rank=verdict, note=note, selected=None)  # ruff: ignore[lambda-assignment]
    gate = None
    if has_gate:
        share = torch.linspace(1.0, 0.3, len(steps), dtype=torch.float64)
        gate = SimpleNamespace(
            kind="soft",
            steps=steps,
            open_share=share,
            by_parameter={f"layers.{k}.weight": share**k for k in range(11)},
            audit=synthetic_audit(tuple(f"layers.{k}.weight" for k in range(4))),
            audit_reason="",
        )
    causes = () if is_trustworthy else ("Too few snapshots: between two of them the kernel moved by 81% of its size. Record more.",)
    fit = lambda error: SimpleNamespace(relative_error=error, correlation=math.nan if has_nan else 0.98)  # ruff: ignore[lambda-assignment]
    transfer = cells = None
    if has_labels:
        transfer = SimpleNamespace(fit=fit(0.01), baselines={"frozen_kernel": fit(0.4), "regression_end": fit(0.04)})
        norms = {"signal_clean": 1.1, "reservoir_clean": 0.1, "signal_noise": 0.4, "reservoir_noise": 0.09}
        cells = SimpleNamespace(is_estimate=not has_noise, norms=norms)
    return SimpleNamespace(
        run=SimpleNamespace(
            source=source,
            num_examples=num_examples,
            num_classes=num_classes,
            num_outputs=num_modes,
            num_params=3658,
            num_snapshots=num_snapshots,
            num_query=0,
            num_steps=steps[-1],
            loss="squared",
            optimizer="SGD(lr=0.05)",
            precond="identity",
            outputs="full",
            training_size=None,
        ),
        window=SimpleNamespace(
            start_step=steps[0], stop_step=steps[stop], start=0, stop=stop, reason="from the first snapshot to where it still separates"
        ),
        dissipation=SimpleNamespace(),
        spectrum=SimpleNamespace(
            eigvals=final,
            eigvecs=eigvecs,
            log_dissipation=-0.5 * torch.log1p(-final),
            residual=residual,
            residual_energy=coefficients.square(),
            owner=owner,
            effective_rank=33.2,
            stable_rank=21.9,
        ),
        channels=SimpleNamespace(rule="half", threshold=0.5, signal_rank=rank, num_modes=num_modes),
        cutoffs={
            "half": cut("half", 0.5, rank),
            "energy": cut("energy", None, min(num_modes, 3 * rank + 2)),
            "gap": cut("gap", 1e-3, max(1, num_modes - 2)),
            "rank": cut("rank", 1e-13, num_modes),
            "mp": cut("mp", 0.21, max(0, rank - 4), "heuristic: Ω is no sample covariance"),
            "gd": cut("gd", 1.7, None, "the threshold exceeds the largest ω: no bulk of noise to cut from"),
        },
        closure=SimpleNamespace(
            energy_predicted=float(loss[0] - history.predicted_loss[stop]),
            energy_observed=float(loss[0] - loss[stop]),
            energy_error=0.003 if is_trustworthy else 0.42,
            gradient_error=0.037 if is_trustworthy else math.inf,
            gradient_error_initial=0.01,
            query_error=None,
            forcing_share=0.0,
            trustworthy=is_trustworthy,
            causes=causes,
        ),
        drift=SimpleNamespace(
            kernel="plain",
            relative=torch.linspace(0, 0.7, len(steps), dtype=torch.float64),
            max=0.61,
            final=0.6,
            velocity=torch.cat([torch.tensor([torch.nan], dtype=torch.float64), 3.0 / (1 + times[1:])]),
            alignment_start=torch.linspace(1.0, 0.6, len(steps), dtype=torch.float64),
            alignment_targets=torch.linspace(0.1, 0.5, len(steps), dtype=torch.float64).where(torch.tensor(has_labels), torch.nan),
        ),
        stability=0.31,
        density=None,
        regime="not judged",
        regime_reason="the rule compares test motions, and no query set was recorded",
        transfer=transfer,
        transfer_reason="" if has_labels else "no query set was recorded: give the Recorder `query=(inputs, targets)`",
        truncation=SimpleNamespace(reservoir_query_share=0.11 if has_labels else None),
        cells=cells,
        null=SimpleNamespace(observed=0.62, mean=0.37, z=12.5, p=0.005, num_shuffles=200) if has_labels else None,
        sensitivity=SimpleNamespace(smallest_rank_correlation=math.nan if has_nan else 0.84),
        uncertainty=SimpleNamespace(num_groups=10, signal_rank=2.5, effective_rank=1.1, reservoir_share=0.02) if has_noise else None,
        diffusion=SimpleNamespace(sampler=SimpleNamespace(reason="epoch sums return near zero: batches are reshuffled."))
        if has_gate
        else None,
        gate=gate,
        gate_reason="" if has_gate else "SGD has no gate",
        examples=examples,
        history=history,
        warnings=() if is_trustworthy else ("Not trustworthy: energy error 42.0% (limit 5 %).",),
    )
