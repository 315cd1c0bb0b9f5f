"""Named, seeded, tiny models with their inputs, each one a way in which a fast kernel can go wrong.

    model, inputs = case.build(torch.float64)
    _, query = case.build(torch.float64, draw=1, num_examples=4)  # the same model, other inputs

Outputs are (n, C), row i a function of input row i only. More models are in the files cases_*.py.
Half of the models are left in train mode: the code under test must switch to eval, and back.
"""

import itertools
from collections.abc import Callable

import cases_layers
import cases_layouts
import cases_parameters
import cases_sequence
import torch
from cases_base import NUM_CLASSES, NUM_EXAMPLES, Case, MeanPool, features, perturb, tokens
from torch import nn
from torch.nn import functional as F

__all__ = ["BY_NAME", "CASES", "NUM_CLASSES", "NUM_EXAMPLES", "Case", "MeanPool", "features", "mlp", "perturb", "tokens"]


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Recurrent(nn.Module):
    """One cell over time: every module is called once per step."""

    def __init__(self):
        super().__init__()
        self.cell, self.read = nn.Linear(3 + 4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(dim=1):
            state = torch.tanh(self.cell(torch.cat([step, state], dim=1)))
        return self.read(state)


class Tied(nn.Module):
    """Two Linear modules that share one weight but not their biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.read(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedEmbedding(nn.Module):
    """A language model's head: the Linear over the vocabulary has the Embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens).mean(dim=1))))


class FunctionalUse(nn.Module):
    """A weight used by the module and beside it by `F.linear`, which no module hook sees."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.read(torch.tanh(self.fc(x)) + F.linear(x**2, self.fc.weight))


class TransposedUse(nn.Module):
    """A tied autoencoder: the decoder is the transpose of the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(NUM_CLASSES, 4)

    def forward(self, x):
        return torch.tanh(self.encode(x)) @ self.encode.weight


class BareScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.read = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, NUM_CLASSES)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.read(torch.tanh(self.norm(self.fc(x)) * self.scale))


class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.read = nn.Embedding(7, 4), nn.Linear(3, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, batch):
        return self.read(torch.tanh(self.fc(batch["numbers"]) + self.embed(batch["kind"])))


class TupleInput(nn.Module):
    """Both inputs go through the same module."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, pair):
        left, right = pair
        return self.read(torch.tanh(self.fc(left)) * torch.tanh(self.fc(right)))


class Attention(nn.Module):
    """Self-attention: `out_proj` is a Linear whose forward is never called, `in_proj_weight` belongs to no Linear."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        self.read = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        mixed, _ = self.attend(x, x, x, need_weights=False)
        return self.read(torch.tanh(x + mixed).mean(dim=1))


class Unused(nn.Module):
    """A module and a bare parameter that the forward pass never touches."""

    def __init__(self):
        super().__init__()
        self.fc, self.idle, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.read(torch.tanh(self.fc(x)))


class NoGradBranch(nn.Module):
    """The same Linear once with and once without gradient."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        with torch.no_grad():
            target = torch.tanh(self.fc(2 * x))
        return self.read(torch.tanh(self.fc(x)) + target)


class DetachedBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.read(torch.tanh(self.fc(x)) * self.fc(x).detach())


class UnusedOutput(nn.Module):
    """The Linear is called twice, the second result does not reach the output."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        hidden = torch.tanh(self.fc(x))
        self.fc(hidden)
        return self.read(hidden)


class SquaredLinear(nn.Linear):
    """A subclass of Linear that is not linear in its weight."""

    def forward(self, x):
        return F.linear(x, self.weight**2, self.bias)


class Residual(nn.Module):
    """The Linear's input is also the skip path."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.read(x + torch.tanh(self.fc(x)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * 2 * 1, NUM_CLASSES),
    )


def batch_norm() -> nn.Module:
    model = perturb(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.3, 3.0)
    return model


def batch_norm_2d() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, NUM_CLASSES))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.3, 3.0)
    return perturb(model)


def weight_norm() -> nn.Module:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return perturb(nn.Sequential(parametrized, nn.Tanh(), nn.Linear(5, NUM_CLASSES)))


def frozen_first() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
    model[0].requires_grad_(False)
    return model


def frozen_weights() -> nn.Module:
    """Weight frozen with a live bias, bias frozen with a live weight."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=6, dropout=0.2, batch_first=True)
    return perturb(nn.Sequential(layer, MeanPool(), nn.Linear(4, NUM_CLASSES)))


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


C = NUM_CLASSES
CASES = [
    Case("linear", lambda: nn.Linear(4, C), features(4), training=True),
    Case("mlp", lambda: mlp(6, 8, C), features(6), training=False),
    Case("mlp_no_bias", lambda: mlp(6, 8, C, bias=False), features(6), training=True),
    Case("mlp_deep_tanh", lambda: mlp(4, 6, 6, 6, 6, C, activation=nn.Tanh), features(4), training=False),
    Case("mlp_single_output", lambda: mlp(4, 6, 1, activation=nn.GELU), features(4), training=True),
    Case("cnn", cnn, features(2, 8, 6), training=False),
    Case(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding="same", dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(21, C)),
        features(2, 7),
        training=True,
    ),
    Case(
        "sequence_mean_pool",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), MeanPool(), nn.Linear(5, C)),
        features(4, 3),
        training=False,
    ),
    Case("called_twice", CalledTwice, features(4), training=True),
    Case("recurrent", Recurrent, features(4, 3), training=False),
    Case("tied_linear", Tied, features(4), training=True),
    Case("tied_embedding", TiedEmbedding, tokens(6, 3), training=False),
    Case("functional_use", FunctionalUse, features(4), training=True),
    Case("transposed_use", TransposedUse, features(C), training=False),
    Case(
        "embedding",
        lambda: nn.Sequential(nn.Embedding(7, 4), MeanPool(), nn.Tanh(), nn.Linear(4, C)),
        tokens(7, 3),
        training=True,
    ),
    Case(
        "embedding_padding",
        lambda: perturb(nn.Sequential(nn.Embedding(4, 4, padding_idx=0), MeanPool(), nn.Tanh(), nn.Linear(4, C))),
        tokens(4, 3),
        training=False,
        stops_gradient=True,
    ),
    Case("layer_norm_scale", lambda: perturb(BareScale()), features(4), training=False),
    Case(
        "group_norm",
        lambda: perturb(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, C))),
        features(2, 6, 5),
        training=True,
    ),
    Case("batch_norm", batch_norm, features(4), training=True),
    Case("batch_norm_2d", batch_norm_2d, features(2, 5, 4), training=False),
    Case("weight_norm", weight_norm, features(4), training=True),
    Case("inplace_linear", lambda: mlp(4, 6, 6, C, activation=lambda: nn.ReLU(inplace=True)), features(4), training=False),
    Case(
        "inplace_conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, C)
        ),
        features(2, 6, 5),
        training=True,
    ),
    Case("frozen_first", frozen_first, features(4), training=False),
    Case("frozen_weights", frozen_weights, features(4), training=True),
    Case(
        "dict_input",
        DictInput,
        lambda num: {"numbers": torch.randn(num, 3), "kind": torch.randint(7, (num,))},
        training=False,
    ),
    Case("tuple_input", TupleInput, lambda num: (torch.randn(num, 4), torch.randn(num, 4)), training=True),
    Case("attention", Attention, features(3, 4), training=False),
    Case("encoder_layer", encoder_layer, features(3, 4), training=True),
    Case(
        "dropout",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, C)),
        features(4),
        training=True,
    ),
    Case("unused", Unused, features(4), training=False),
    Case("unused_output", UnusedOutput, features(4), training=True),
    Case("no_grad_branch", NoGradBranch, features(4), training=False, stops_gradient=True),
    Case("detached_branch", DetachedBranch, features(4), training=True, stops_gradient=True),
    Case("linear_subclass", lambda: nn.Sequential(SquaredLinear(4, 5), nn.Tanh(), nn.Linear(5, C)), features(4), training=False),
    Case("residual", Residual, features(4), training=True),
    *cases_layers.CASES,
    *cases_sequence.CASES,
    *cases_parameters.CASES,
    *cases_layouts.CASES,
]
BY_NAME = {case.name: case for case in CASES}
