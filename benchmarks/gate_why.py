"""Why the gate is no spectral filter: it is a threshold on Adam's own step. `python -m benchmarks.gate_why` (about 5 minutes).

Adam moves by u = m/(sqrt v + eps). With v = mean square = m^2 + s, a gate m^2 > alpha s is |u| > sqrt(alpha/(1 + alpha)): the steps that
are small already. v and s look back differently far, so that this need not hold; the study measures how well it does, at the audited steps
of AdamW on digits (as benchmarks.gate_calibration, base setting, 5 seeds). Agreement: share of live gates on which both decide alike.
Removed: share of the squared motion that the gate takes away. Precision (share of the removed motion in the reservoir) of the gate, of
the threshold on |u|, and of the gate shuffled within tensors (mean of 100); "largest removed" closes as many of the largest steps.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gate_runs import Setting, record
from ntkscope.auditing import ChannelKeeper, _split, _state_of, audited_positions, trained_parameters
from ntkscope.course import Course
from ntkscope.gate.channel import Channel
from ntkscope.gate.step import gate_values
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.columns import columns_of, whole_jacobian
from ntkscope.kernel.coverage import probe_routes
from ntkscope.record.beginning import weights_of
from ntkscope.walk import walk_trajectory

ALPHAS = {"1": 1.0, "1/4": 0.25, "alpha_U": 1 / 19}
NUM_DRAWS, NUM_AUDITED = 100, 10
COLUMNS = ("open", "agreement", "rank correlation", "removed", "precision", "of |u|", "shuffled", "largest removed")
Rows = dict[tuple[int, str], list[float]]


def coordinates(recorder, trace, position: int, channel: Channel) -> tuple[Tensor, list[int]]:  # ruff: ignore[missing-type-function-argument]
    """Compute all columns of J at a snapshot in the channel's directions, and the sizes of the tensors."""
    parameters = trained_parameters(trace.facts, recorder.model)
    with weights_of(recorder.model, _state_of(trace[position], trace.facts, recorder.model)), undisturbed(recorder.model):
        routes, coverage = probe_routes(recorder.model, recorder.probe.inputs, params=list(parameters))
        jacobian = whole_jacobian(recorder.model, recorder.probe.inputs, routes=routes, coverage=coverage, budget=DEFAULT_MEMORY)
        parts = []
        for name, parameter in parameters.items():
            held = torch.zeros(channel.num_modes, parameter.numel(), dtype=torch.float64)
            for columns in columns_of(jacobian, name, chunk_bytes=2**24):
                held[:, columns.where] = channel.motion(columns.values)[:, 0]
            parts.append(held)
    return torch.cat(parts, dim=1), [part.shape[1] for part in parts]


def precision(removed: Tensor, rank: int) -> Tensor:
    """Compute the share of removed motions in the reservoir."""
    return removed[rank:].square().sum(dim=0) / removed.square().sum(dim=0)


def measure(seed: int) -> Rows:
    """One run."""
    torch.set_num_threads(1)
    setting = replace(Setting(), seed=seed)
    recorder = record(setting, setting.num_steps)
    trace = recorder.trace
    keeper = ChannelKeeper(audited_positions(trace, 0, NUM_AUDITED), "half")
    course = Course(trace, 0, len(trace) - 1, loss=recorder.probe.loss)
    walk_trajectory(course, target_kernel=None, device=None, progress=None, visit=keeper.visit)
    found: Rows = {}
    for position, channel in keeper.channels.items():
        snapshot = trace[position]
        if isinstance(channel, str) or snapshot.step < 3:
            continue
        jacobian, sizes = coordinates(recorder, trace, position, channel)
        live = jacobian.square().sum(dim=0) > 0
        parameters = trained_parameters(trace.facts, recorder.model)
        mean, variance, precond = (
            torch.cat([part.flatten() for part in _split(value, parameters).values()])
            for value in (snapshot.audit_mean, snapshot.audit_variance, snapshot.audit_precond)
        )
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[live]
        jacobian, mean, variance, precond = jacobian[:, live], mean[live], variance[live], precond[live]
        step = precond * mean
        ratio = mean.square() / variance
        ranks = [values.argsort().argsort().double() for values in (step.abs(), ratio)]
        correlation = float(torch.corrcoef(torch.stack(ranks))[0, 1])
        generator = torch.Generator().manual_seed(seed)
        for name, alpha in ALPHAS.items():
            gate = gate_values(mean, variance, kind="hard", alpha=alpha)
            threshold = (step.abs() > (alpha / (1 + alpha)) ** 0.5).double()
            largest = torch.ones_like(gate)
            largest[step.abs().topk(int((gate == 0).sum())).indices] = 0.0
            keys = tensor + torch.rand(NUM_DRAWS, len(gate), generator=generator)
            shuffled = torch.empty(NUM_DRAWS, len(gate), dtype=gate.dtype)
            shuffled[:, torch.arange(len(gate))] = gate[keys.argsort(dim=1)]  # tensors are side by side: sorting keeps each in place
            gates = torch.cat([gate[None], threshold[None], largest[None], shuffled])
            removed = jacobian @ ((1 - gates) * step).T
            shares = precision(removed, channel.rank)
            whole = (jacobian @ step).square().sum()
            found[snapshot.step, name] = [
                float(gate.mean()),
                float((gate == threshold).double().mean()),
                correlation,
                float(removed[:, 0].square().sum() / whole),
                float(shares[0]),
                float(shares[1]),
                float(shares[3:].mean()),
                float(shares[2]),
            ]
    return found


def main() -> None:
    """Print the table, mean over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.workers) as pool:
        runs = list(pool.map(measure, range(arguments.seeds)))
    print(f"| step | alpha | {' | '.join(COLUMNS)} |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    for key in runs[0]:
        mean = torch.tensor([run[key] for run in runs if key in run], dtype=torch.float64).nanmean(dim=0).tolist()
        print(f"| {key[0]} | {key[1]} | {mean[0]:.1%} | {mean[1]:.1%} | {mean[2]:.3f} | " + " | ".join(f"{v:.2g}" for v in mean[3:]) + " |")


if __name__ == "__main__":
    main()
