"""Cases of where the examples are in a layer's input, of how a model is called, and of how autograd is used in it."""

import torch
from cases_base import NUM_CLASSES as C
from cases_base import Case, Net, features, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# --- Layouts -----------------------------------------------------------------------------------------------------------------


def linear_net(function, inner: int = 3, width: int = 4, **parts: object) -> nn.Module:
    return Net(function, fc=nn.Linear(inner, width), read=nn.Linear(width, C), **parts)


def time_major(m, x):
    """The Linear sees (T, n, d), where T is the number of examples."""
    return m.read(torch.tanh(m.fc(x.transpose(0, 1))).mean(dim=0))


def position_major(m, x):
    """The Linear sees (T n, d), the examples fastest."""
    num, steps, _ = x.shape
    return m.read(torch.tanh(m.fc(x.transpose(0, 1).reshape(steps * num, -1))).view(steps, num, -1).sum(dim=0))


def example_major(m, x):
    """The Linear sees (n T, d), the positions fastest."""
    return m.read(torch.tanh(m.fc(x.flatten(0, 1))).view(*x.shape[:2], -1).sum(dim=1))


def windows(m, x):
    """Swin: (n, T, d) -> (n W, T / W, d) -> Linear -> back, and once more with shifted windows."""
    num, steps, width = x.shape
    for shift in (0, 1):
        parts = x.roll(shift, dims=1).view(num * 2, steps // 2, width)
        x = x + torch.tanh(m.fc(parts + parts.mean(dim=1, keepdim=True))).view(num, steps, width)
    return m.read(x.mean(dim=1))


def frames(m, x):
    hidden = torch.tanh(m.conv(x.flatten(0, 1))).flatten(1)
    return m.read(hidden.view(*x.shape[:2], -1).mean(dim=1))


def both_views(m, pair):
    """Siamese: the two inputs one after the other on the batch axis."""
    left, right = torch.tanh(m.fc(torch.cat(pair))).chunk(2)
    return m.read(left * right)


def sorted_rows(m, x):
    """The rows are examples, but in another order."""
    order = x[:, 0].argsort(descending=True)
    return m.read(torch.tanh(m.fc(x[order]))[order.argsort()])


def routed(m, x):
    """A mixture of experts with hard routing: each expert sees only its own examples."""
    hidden = x.new_zeros(len(x), 4)
    for expert, chosen in ((m.first, x[:, 0] > 0), (m.second, x[:, 0] <= 0)):
        hidden[chosen] = torch.tanh(expert(x[chosen]))
    return m.read(hidden)


def soft_experts(m, x):
    gates = m.gate(x).softmax(dim=1)
    return (torch.stack([expert(x) for expert in m.experts], dim=1) * gates[:, :, None]).sum(dim=1)


def one_at_a_time(m, x):
    return m.read(torch.stack([torch.tanh(m.fc(row)) for row in x]))


def expanded(m, x):
    """The Linear's input is an expanded view: the same row at each of five positions."""
    return m.read(torch.tanh(m.fc(x[:, None].expand(-1, 5, -1)) * m.scales).mean(dim=1))


def channels_last(m, x):
    """ConvNeXt: the Linear on (n, h, w, c), a view with permuted strides."""
    return m.read(torch.tanh(m.fc(x.permute(0, 2, 3, 1))).mean(dim=(1, 2)))


def mixer(m, x):
    """MLP-Mixer: one Linear over positions, on the transposed input."""
    return m.read(torch.tanh(m.fc(x.mT)).mT.mean(dim=1) * x.mean(dim=1))


def three_lengths(m, x):
    total = sum(torch.tanh(m.fc(x[:, :steps])).sum(dim=1) for steps in (1, 2, 4))
    return m.read(total)


def ranks_two_and_three(m, pair):
    """One Linear on (n, d) and on (n, T, d)."""
    row, sequence = pair
    return m.read(torch.tanh(m.fc(row))[:, None] * torch.tanh(m.fc(sequence))).sum(dim=1)


def masked_mean(m, batch):
    mask = batch["mask"][:, :, None].to(batch["x"].dtype)
    hidden = torch.tanh(m.fc(batch["x"])) * mask
    return m.read(hidden.sum(dim=1) / mask.sum(dim=1))


def masked_inputs(num):
    return {"x": torch.randn(num, 4, 3), "mask": torch.arange(4) < torch.randint(1, 5, (num, 1))}


def nested(m, batch):
    left, (right, kind) = batch["pair"][0], batch["pair"][1]
    return m.read(torch.tanh(m.fc(left) + m.fc(right) * batch["extra"]["scale"]) + m.embed(kind))


def nested_inputs(num):
    pair = (torch.randn(num, 3), [torch.randn(num, 3), torch.randint(4, (num,))])
    return {"pair": pair, "extra": {"scale": torch.randn(num, 1)}}


class Pair(nn.Module):
    """Returns the logits and the hidden state, as models with an auxiliary output do."""

    def __init__(self):
        super().__init__()
        self.fc, self.read = nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, x):
        hidden = torch.tanh(self.fc(x))
        return self.read(hidden), hidden


class TwoInputsLinear(nn.Linear):
    """A Linear's subclass called with a keyword argument."""

    def forward(self, x, *, gain):
        return super().forward(x) * gain


# --- Autograd ----------------------------------------------------------------------------------------------------------------


def checkpointed(m, x):
    """The first Linear runs a second time, during each backward pass."""
    return m.read(checkpoint(m.block, x, use_reentrant=False))


def detached_functional(m, x):
    hidden = torch.tanh(m.fc(x))
    return m.read(F.linear(hidden.detach(), m.mix.weight, m.mix.bias) + hidden)


def output_inplace(m, x):
    hidden = m.fc(x)
    hidden *= 2.0
    hidden[:, 0] = 0.0  # the first unit gets no gradient
    return m.read(hidden.tanh_())


def output_twice(m, x):
    """A result that is used on two paths, on one of them without gradient."""
    hidden = m.fc(x)
    return m.read(torch.tanh(hidden) + hidden.sigmoid() * hidden.detach())


def straight_through(m, x):
    """Binary units with the gradient of the identity."""
    soft = torch.tanh(m.fc(x))
    return m.read(soft + (soft.sign() - soft).detach())


class Double(torch.autograd.Function):
    """A function of the user's own, without a rule for vmap."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2.0 * x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2.0 * grad @ weight, 2.0 * grad.T @ x


def own_function(m, x):
    return m.read(torch.tanh(Double.apply(x, m.fc.weight) + m.fc.bias))


def gradient_inside(m, x):
    """The output is a gradient with respect to the input, as a force is of an energy."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.read(torch.tanh(m.fc(x))).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())


CASES = [
    Case("time_major", lambda: linear_net(time_major), features(5, 3), training=True),
    Case("position_major", lambda: linear_net(position_major), features(3, 3), training=False),
    Case("example_major", lambda: linear_net(example_major), features(3, 3), training=True),
    Case("windows", lambda: linear_net(windows, 4, 4), features(4, 4), training=False),
    Case("frames", lambda: Net(frames, conv=nn.Conv2d(2, 3, 2), read=nn.Linear(12, C)), features(3, 2, 3, 3), training=True),
    Case("siamese", lambda: linear_net(both_views), vectors((3,), (3,)), training=False),
    Case("sorted_rows", lambda: linear_net(sorted_rows), features(3), training=True),
    Case(
        "experts_hard",
        lambda: Net(routed, first=nn.Linear(3, 4), second=nn.Linear(3, 4), read=nn.Linear(4, C)),
        features(3),
        training=False,
    ),
    Case(
        "experts_soft",
        lambda: Net(soft_experts, gate=nn.Linear(3, 2), experts=nn.ModuleList([nn.Linear(3, C), nn.Linear(3, C)])),
        features(3),
        training=True,
    ),
    Case("one_at_a_time", lambda: linear_net(one_at_a_time), features(3), training=False),
    Case("expanded_input", lambda: linear_net(expanded, scales=torch.randn(5, 1)), features(3), training=True),
    Case("channels_last", lambda: linear_net(channels_last), features(3, 2, 4), training=False),
    Case("mixer", lambda: Net(mixer, fc=nn.Linear(5, 6), read=nn.Linear(4, C)), features(5, 4), training=True),
    Case("three_lengths", lambda: linear_net(three_lengths), features(4, 3), training=False),
    Case("ranks_two_and_three", lambda: linear_net(ranks_two_and_three), vectors((3,), (4, 3)), training=True),
    Case("width_one", lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), features(1), training=False),
    Case("masked_mean", lambda: linear_net(masked_mean), masked_inputs, training=True),
    Case("nested_inputs", lambda: linear_net(nested, embed=nn.Embedding(4, 4)), nested_inputs, training=False),
    Case("first_of_tuple", lambda: Net(lambda m, x: m.inner(x)[0], inner=Pair()), features(4), training=True),
    Case(
        "keyword_argument",
        lambda: Net(lambda m, x: m.read(torch.tanh(m.fc(x, gain=x[:, :1]))), fc=TwoInputsLinear(3, 4), read=nn.Linear(4, C)),
        features(3),
        training=False,
    ),
    Case("checkpoint", lambda: Net(checkpointed, block=block(), read=nn.Linear(4, C)), features(3), training=False),
    Case(
        "functional_on_detached",
        lambda: linear_net(detached_functional, mix=nn.Linear(4, 4)),
        features(3),
        training=True,
        stops_gradient=True,
    ),
    Case("output_inplace", lambda: linear_net(output_inplace), features(3), training=False),
    Case("output_twice", lambda: linear_net(output_twice), features(3), training=True, stops_gradient=True),
    Case("straight_through", lambda: linear_net(straight_through), features(3), training=False, stops_gradient=True),
    Case("own_function", lambda: linear_net(own_function), features(3), training=True),
    Case("gradient_inside", lambda: Net(gradient_inside, fc=nn.Linear(3, 4), read=nn.Linear(4, 1)), features(3), training=False),
]
