"""Cases of parameters that no library layer owns, and of weights that are computed from parameters."""

import torch
from cases_base import NUM_CLASSES as C
from cases_base import Case, Net, bare, features, flat, perturb
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

# --- Added, multiplied, concatenated -----------------------------------------------------------------------------------------


def with_position(m, x):
    return m.read(torch.tanh(m.fc(x) + m.position).mean(dim=1))


def with_position_slice(m, x):
    """The table is longer than the sequence."""
    return m.read(torch.tanh(m.fc(x) + m.position[:, : x.shape[1]]).mean(dim=1))


def with_position_inplace(m, x):
    h = m.fc(x)
    h += m.position
    return m.read(h.tanh_().mean(dim=1))


def with_position_table(m, x):
    """The table's input are the positions (T,), without a batch axis; T is the number of examples."""
    return m.read(torch.tanh(m.fc(x) + m.position(torch.arange(x.shape[1], device=x.device))).mean(dim=1))


def positions(function, position: object, width: int = 4) -> nn.Module:
    return Net(function, position=position, fc=nn.Linear(3, width), read=nn.Linear(width, C))


def with_class_token(m, x):
    h = torch.cat([m.token.expand(len(x), -1, -1), m.fc(x)], dim=1)
    return m.read(torch.tanh(h @ h.mT @ h)[:, 0])


def channel_scale(m, x):
    return m.read(torch.tanh(m.conv(x) * m.scale + m.shift).flatten(1))


def temperature(m, x):
    return m.fc(x) * m.log_scale.exp()


def layer_scale(m, x):
    return m.read(x + m.gamma * m.block(x))


def scaled_by_own_row(m, x):
    """One parameter is a Linear's weight and, its first row, a scale."""
    return m.read(torch.tanh(m.fc(x) * m.fc.weight[0]))


# --- Matrices ----------------------------------------------------------------------------------------------------------------


def matrix(function, *shape: int, read: int = 5, **parts: object) -> nn.Module:
    return Net(function, w=bare(*shape), read=nn.Linear(read, C), **parts)


def conv1d_of_gpt2(m, x):
    """A Linear with the weight stored transposed, on all positions of all examples as rows."""
    return m.read(torch.tanh(torch.addmm(m.b, x.view(-1, x.shape[-1]), m.w).view(*x.shape[:-1], -1)).mean(dim=1))


def low_rank(m, x):
    """LoRA: a frozen Linear and two bare matrices, of which one begins at zero."""
    return m.read(torch.tanh(m.fc(x) + x @ m.down.T @ m.up.T))


def lora() -> nn.Module:
    up = nn.Parameter(torch.zeros(5, 2))
    return Net(low_rank, fc=nn.Linear(4, 5).requires_grad_(False), down=bare(2, 4), up=up, read=nn.Linear(5, C))


def parameter_list(m, x):
    for w in m.ws:
        x = torch.tanh(x @ w)
    return m.read(x)


def parameter_dict(m, x):
    return m.read(torch.tanh(x @ m.ws["w"] + m.ws["b"]) * m.ws["scale"])


def prototypes(m, x):
    """A Linear on a constant whose leading size is the number of examples: no row belongs to an example."""
    return m.read(torch.tanh(x @ m.fc(m.table).T))


def prototype_parameters(m, x):
    return -(m.fc(x)[:, None] - m.table).square().sum(dim=-1)


# --- Weights computed from parameters ----------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    """The weight is the symmetric part of a parameter."""

    def forward(self, weight):
        return (weight + weight.mT) / 2


class StandardizedConv(nn.Conv2d):
    """Weight standardization: each filter with mean 0 and variance 1."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias, self.stride, self.padding)


def weight_norm_conv() -> nn.Module:
    return perturb(flat(parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), shape=(2, 4, 3)))


def spectral_norm() -> nn.Module:
    layer = parametrizations.spectral_norm(nn.Linear(4, 5))
    for _ in range(5):
        layer(torch.zeros(1, 4))  # in train mode each use of the weight is a step of the power iteration
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, C))


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, C))


def hypernetwork(m, x):
    """The second layer's weight comes from the first layer, another one for each example."""
    weights = m.hyper(x).view(len(x), C, 4)
    return torch.bmm(weights, torch.tanh(m.fc(x))[:, :, None])[:, :, 0]


CASES = [
    Case("position_batch_axis", lambda: positions(with_position, bare(1, 3, 4)), features(3, 3), training=True),
    Case("position_no_batch_axis", lambda: positions(with_position, bare(5, 4)), features(5, 3), training=False),
    Case("position_slice", lambda: positions(with_position_slice, bare(1, 6, 4)), features(3, 3), training=True),
    Case("position_inplace", lambda: positions(with_position_inplace, bare(3, 4)), features(3, 3), training=False),
    Case("position_embedding", lambda: positions(with_position_table, nn.Embedding(5, 4)), features(5, 3), training=True),
    Case(
        "class_token",
        lambda: Net(with_class_token, token=bare(1, 1, 4), fc=nn.Linear(3, 4), read=nn.Linear(4, C)),
        features(3, 3),
        training=False,
    ),
    Case(
        "channel_scale",
        lambda: Net(channel_scale, conv=nn.Conv2d(2, 3, 2), scale=bare(3, 1, 1), shift=bare(1, 3, 1, 1), read=nn.Linear(18, C)),
        features(2, 4, 3),
        training=True,
    ),
    Case(
        "temperature",
        lambda: Net(temperature, fc=nn.Linear(4, C), log_scale=nn.Parameter(torch.tensor(0.7))),
        features(4),
        training=False,
    ),
    Case(
        "layer_scale",
        lambda: Net(layer_scale, block=nn.Sequential(nn.Linear(4, 4), nn.GELU()), gamma=bare(4), read=nn.Linear(4, C)),
        features(4),
        training=True,
    ),
    Case("weight_row_as_scale", lambda: Net(scaled_by_own_row, fc=nn.Linear(4, 4), read=nn.Linear(4, C)), features(4), training=False),
    Case("matrix", lambda: matrix(lambda m, x: m.read(torch.tanh(x @ m.w)), 4, 5), features(4), training=False),
    Case("matrix_transposed", lambda: matrix(lambda m, x: m.read(torch.tanh(x @ m.w.T)), 5, 4), features(4), training=True),
    Case(
        "matrix_on_sequence",
        lambda: matrix(lambda m, x: m.read(torch.tanh(x @ m.w).mean(dim=1)), 4, 5),
        features(3, 4),
        training=False,
    ),
    Case(
        "matrix_on_the_left",
        lambda: matrix(lambda m, x: m.read(torch.tanh((m.w @ x).flatten(1))), 2, 3, read=8),
        features(3, 4),
        training=True,
    ),
    Case("matrix_addmm", lambda: matrix(conv1d_of_gpt2, 4, 5, b=bare(5)), features(3, 4), training=False),
    Case(
        "matrix_einsum",
        lambda: matrix(lambda m, x: m.read(torch.tanh(torch.einsum("ntd,dhk->nhk", x, m.w)).flatten(1)), 4, 2, 3, read=6),
        features(3, 4),
        training=True,
    ),
    Case(
        "matrix_per_position",
        lambda: matrix(lambda m, x: m.read(torch.tanh(torch.einsum("ntd,tdk->nk", x, m.w))), 3, 4, 5),
        features(3, 4),
        training=False,
    ),
    Case("lora", lora, features(4), training=True),
    Case(
        "parameter_list",
        lambda: Net(parameter_list, ws=nn.ParameterList([bare(4, 5), bare(5, 4)]), read=nn.Linear(4, C)),
        features(4),
        training=False,
    ),
    Case(
        "parameter_dict",
        lambda: Net(parameter_dict, ws=nn.ParameterDict({"w": bare(4, 5), "b": bare(5), "scale": bare(5)}), read=nn.Linear(5, C)),
        features(4),
        training=True,
    ),
    Case(
        "linear_on_buffer",
        lambda: Net(prototypes, fc=nn.Linear(3, 4), table=torch.randn(5, 3), read=nn.Linear(5, C)),
        features(4),
        training=False,
    ),
    Case(
        "linear_on_parameter",
        lambda: Net(prototypes, fc=nn.Linear(3, 4), table=bare(5, 3), read=nn.Linear(5, C)),
        features(4),
        training=True,
    ),
    Case("distances", lambda: Net(prototype_parameters, fc=nn.Linear(4, 2), table=bare(C, 2)), features(4), training=False),
    Case("weight_norm_conv", weight_norm_conv, features(2, 4, 3), training=True),
    Case("spectral_norm", spectral_norm, features(4), training=False),
    Case("symmetric_weight", symmetric, features(3), training=True),
    Case("standardized_conv", lambda: flat(StandardizedConv(2, 3, 2, padding=1), shape=(2, 3, 2)), features(2, 3, 2), training=False),
    Case("hypernetwork", lambda: Net(hypernetwork, fc=nn.Linear(4, 4), hyper=nn.Linear(4, 4 * C)), features(4), training=True),
]
