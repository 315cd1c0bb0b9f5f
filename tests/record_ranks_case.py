"""A small run that one process and two ranks train alike."""

import torch
from torch import nn

NUM_STEPS, BATCH = 14, 8
NUM_EXAMPLES, NUM_CLASSES = 12, 3


def build(kind):
    """Model, maker of its optimizer, and data; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(10) if kind == "norm" else nn.Identity()
    model = nn.Sequential(nn.Linear(4, 10), norm, nn.Tanh(), nn.Linear(10, NUM_CLASSES)).double()
    query = (inputs[:5] + 0.5, targets[:5])
    return model, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1), (inputs, targets, query)


def train(model, optimizer, data, steps, own):
    """Batches are drawn by the step's number; a rank takes its part of each."""
    inputs, targets, _ = data
    model.train()
    for step in steps:
        rows = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(step))[:BATCH][own]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
