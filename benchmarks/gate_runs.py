"""Digits runs for the studies of the gate: the demo's MLP and data, other batch sizes, optimizers and lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ntkscope
from ntkscope.auditing import AuditedModel, ChannelKeeper, audit_run, audited_positions
from ntkscope.course import Course
from ntkscope.experiments.demo import NUM_CLASSES, DigitsData, load_digits_data, make_model
from ntkscope.gate.verdict import GateAudit
from ntkscope.walk import walk_trajectory

NUM_EXAMPLES = 100
LEARNING_RATE = 1e-3
NUM_SNAPSHOTS = 45


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    label_noise: float = 0.2
    batch_size: int = 20
    beta1: float = 0.9
    num_steps: int = 1500
    seed: int = 0


def one_hot(labels: Tensor) -> Tensor:
    """Turn labels into targets of the squared loss."""
    return nn.functional.one_hot(labels, NUM_CLASSES).float()


def make_optimizer(model: nn.Module, setting: Setting, **gate: object) -> torch.optim.Optimizer:
    """AdamW without `gate`, else GatedAdamW with these options."""
    betas = (setting.beta1, 0.999)
    if not gate:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=betas)
    return ntkscope.GatedAdamW(model.parameters(), lr=LEARNING_RATE, betas=betas, **gate)  # pyright: ignore[reportArgumentType]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DigitsData,
    setting: Setting,
    num_steps: int,
    *,
    every: int = 0,
    look: Callable[[], None] | None = None,
) -> None:
    """Train on the squared loss, half its mean over examples; batches drawn with replacement. `look` comes after every `every` steps."""
    targets = one_hot(data.labels)
    generator = torch.Generator().manual_seed(setting.seed)
    for step in range(num_steps):
        rows = torch.randint(len(targets), (setting.batch_size,), generator=generator)
        optimizer.zero_grad()
        loss = 0.5 * (model(data.inputs[rows]) - targets[rows]).square().sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        if look is not None and (step + 1) % every == 0:
            look()


def record(setting: Setting, num_steps: int, **gate: object) -> ntkscope.Recorder:
    """Train with a recorder, snapshots spaced evenly in log step."""
    data = load_digits_data(NUM_EXAMPLES, setting.label_noise, setting.seed)
    model = make_model(setting.seed)
    schedule = sorted({round(num_steps ** (k / NUM_SNAPSHOTS)) for k in range(NUM_SNAPSHOTS + 1)})
    recorder = ntkscope.Recorder(
        model, probe=(data.inputs, one_hot(data.labels)), loss="squared", schedule=schedule, tolerance=None, drift=None, audit=True
    )
    optimizer = make_optimizer(model, setting, **gate)
    recorder.attach(optimizer)
    train(model, optimizer, data, setting, num_steps)
    return recorder


def audits(recorder: ntkscope.Recorder, all_options: Sequence[ntkscope.AuditOptions]) -> list[GateAudit]:
    """Audit one run for several gates, walking it once; windows begin at step 0."""
    trace = recorder.trace
    keeper = ChannelKeeper(audited_positions(trace, 0, max(options.num_steps for options in all_options)), "half")
    walk_trajectory(
        Course(trace, 0, len(trace) - 1, loss=recorder.probe.loss), target_kernel=None, device=None, progress=None, visit=keeper.visit
    )
    audited = AuditedModel(recorder.model, recorder.probe.inputs, recorder.probe.forward_fn)
    return [audit_run(trace, keeper, audited, options, loss=None, max_memory=None, progress=None) for options in all_options]
