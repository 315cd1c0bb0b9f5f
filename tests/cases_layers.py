"""Cases of convolutions, embeddings, normalizations and other library layers."""

import warnings
from functools import partial

import torch
from cases_base import NUM_CLASSES as C
from cases_base import Case, MeanPool, Net, bare, features, flat, perturb, tokens, vectors
from torch import nn
from torch.nn import functional as F

# --- Convolutions ------------------------------------------------------------------------------------------------------------


def conv1d(padding_mode: str) -> nn.Module:
    """The last of the padded positions is reached by no window."""
    return flat(nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=padding_mode), shape=(2, 8))


def same_even(m, x):
    """One more zero on the right than on the left, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*even kernel lengths")
        hidden = m.conv(x)
    return m.read(torch.tanh(hidden).flatten(1))


def depthwise() -> nn.Module:
    """MobileNet's block: depthwise with two filters per channel, then pointwise."""
    return flat(nn.Conv2d(3, 6, 3, groups=3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1), shape=(3, 4, 3))


def conv_transpose(kind: type[nn.Module], *shape: int, **options: object) -> nn.Module:
    return flat(kind(4, 2, 3, stride=2, padding=1, **options), shape=(4, *shape))


def output_size(m, x):
    """The second argument of the call makes the output one larger."""
    return m.read(torch.tanh(m.conv(x, output_size=(6, 6))).flatten(1))


def one_image_at_a_time(m, x):
    """The convolution never sees a batch axis."""
    return m.read(torch.stack([torch.tanh(m.conv(image)) for image in x]).flatten(1))


# --- Embeddings --------------------------------------------------------------------------------------------------------------


def shared_embedding(m, pair):
    """Two inputs of different length through one table."""
    left, right = pair
    return m.read(torch.tanh(m.embed(left).mean(dim=1)) * torch.tanh(m.embed(right).sum(dim=1)))


def tied_positions(m, x):
    """The head has the table's weight and is applied at every position."""
    return m.head(torch.tanh(m.mix(m.embed(x)))).cumsum(dim=1)[:, -1]


def tied_head() -> nn.Module:
    model = Net(tied_positions, embed=nn.Embedding(C, 4), mix=nn.Linear(4, 4), head=nn.Linear(4, C))
    model.head.weight = model.embed.weight
    return model


def tied_functional(m, x):
    return F.linear(torch.tanh(m.mix(m.embed(x).mean(dim=1))), m.embed.weight)


def weighted_bag(m, batch):
    return m.read(torch.tanh(m.bag(batch["tokens"], per_sample_weights=batch["weights"])))


def weighted_bag_inputs(num):
    return {"tokens": torch.randint(5, (num, 4)), "weights": torch.randn(num, 4)}


def bag(**options: object) -> nn.Module:
    return perturb(nn.Sequential(nn.EmbeddingBag(5, 4, **options), nn.Tanh(), nn.Linear(4, C)))


def frozen_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding.from_pretrained(torch.randn(5, 4)), nn.Linear(4, 4), nn.Tanh(), MeanPool(), nn.Linear(4, C))


# --- Normalizations ----------------------------------------------------------------------------------------------------------


def normalized(norm: nn.Module, *shape: int) -> nn.Module:
    """The norm between two nonlinearities, with running statistics, if it has them, that are not zero and one."""
    model = flat(nn.Tanh(), norm.eval(), shape=shape)
    for name, buffer in norm.named_buffers():
        if name == "running_mean":
            buffer.normal_()
        elif name == "running_var":
            buffer.uniform_(0.3, 3.0)
    return perturb(model)


def adaptive_norm(m, pair):
    """Scale and shift of the norm come from a Linear on the other input (FiLM, DiT)."""
    x, condition = pair
    scale, shift = m.modulate(condition)[:, None].chunk(2, dim=-1)
    return m.read(torch.tanh(m.norm(m.fc(x)) * (1 + scale) + shift).mean(dim=1))


def bilinear(m, pair):
    return m.read(torch.tanh(m.mix(*pair)))


CASES = [
    *(
        Case(f"conv1d_{mode}", partial(conv1d, mode), features(2, 8), training=i % 2 == 0)
        for i, mode in enumerate(("zeros", "reflect", "replicate", "circular"))
    ),
    Case(
        "conv1d_same_even",
        lambda: Net(same_even, conv=nn.Conv1d(2, 3, 4, padding="same"), read=nn.Linear(18, C)),
        features(2, 6),
        training=True,
    ),
    Case(
        "conv1d_same_even_reflect",
        lambda: flat(nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), shape=(2, 6)),
        features(2, 6),
        training=False,
    ),
    Case("conv2d_depthwise", depthwise, features(3, 4, 3), training=True),
    Case("conv2d_wide_kernel", lambda: flat(nn.Conv2d(2, 3, 5, padding=2), shape=(2, 3, 2)), features(2, 3, 2), training=False),
    Case(
        "conv2d_asymmetric",
        lambda: flat(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3)), shape=(2, 6, 4)),
        features(2, 6, 4),
        training=True,
    ),
    Case(
        "conv2d_asymmetric_reflect",
        lambda: flat(nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(2, 1), groups=2, padding_mode="reflect"), shape=(2, 4, 5)),
        features(2, 4, 5),
        training=False,
    ),
    Case("conv2d_one_position", lambda: flat(nn.Conv2d(2, 4, (3, 2)), shape=(2, 3, 2)), features(2, 3, 2), training=True),
    Case("conv3d", lambda: flat(nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1)), shape=(2, 3, 5, 2)), features(2, 3, 5, 2), training=False),
    Case(
        "conv3d_groups_replicate",
        lambda: flat(nn.Conv3d(2, 4, 2, groups=2, padding=1, dilation=(1, 2, 1), padding_mode="replicate"), shape=(2, 2, 3, 2)),
        features(2, 2, 3, 2),
        training=True,
    ),
    Case("conv_transpose1d", lambda: conv_transpose(nn.ConvTranspose1d, 3), features(4, 3), training=False),
    Case(
        "conv_transpose1d_groups",
        lambda: conv_transpose(nn.ConvTranspose1d, 3, output_padding=1, groups=2, dilation=2),
        features(4, 3),
        training=True,
    ),
    Case(
        "conv_transpose2d",
        lambda: conv_transpose(nn.ConvTranspose2d, 3, 2, output_padding=(1, 0), groups=2, bias=False),
        features(4, 3, 2),
        training=False,
    ),
    Case(
        "conv_transpose2d_output_size",
        lambda: Net(output_size, conv=nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), read=nn.Linear(72, C)),
        features(3, 3, 3),
        training=True,
    ),
    Case(
        "conv_transpose3d",
        lambda: conv_transpose(nn.ConvTranspose3d, 2, 1, 2, output_padding=1, dilation=(2, 1, 1)),
        features(4, 2, 1, 2),
        training=False,
    ),
    Case(
        "conv_transpose2d_dilated",  # output_padding adds windows that lie on no input pixel
        lambda: flat(nn.ConvTranspose2d(2, 2, 2, dilation=2, output_padding=1), shape=(2, 3, 2)),
        features(2, 3, 2),
        training=True,
    ),
    Case(
        "divided_and_subtracted",
        lambda: Net(
            lambda m, x: m.read(torch.tanh(m.fc(x) / m.scale - m.shift)),
            fc=nn.Linear(3, 4),
            scale=bare(4),
            shift=bare(4),
            read=nn.Linear(4, C),
        ),
        features(3),
        training=False,
    ),
    Case(
        "one_image_at_a_time",
        lambda: Net(one_image_at_a_time, conv=nn.Conv2d(2, 3, 2), read=nn.Linear(12, C)),
        features(2, 3, 3),
        training=True,
    ),
    Case("embedding_one_token", lambda: nn.Sequential(nn.Embedding(4, 4), nn.Tanh(), nn.Linear(4, C)), tokens(4), training=False),
    Case(
        "embedding_repeated_tokens",
        lambda: nn.Sequential(nn.Embedding(2, 3), nn.Flatten(), nn.Linear(15, 5), nn.Tanh(), nn.Linear(5, C)),
        tokens(2, 5),
        training=True,
    ),
    Case(
        "embedding_two_inputs",
        lambda: Net(shared_embedding, embed=nn.Embedding(5, 4), read=nn.Linear(4, C)),
        lambda num: (torch.randint(5, (num, 2)), torch.randint(5, (num, 3))),
        training=False,
    ),
    Case("embedding_frozen", frozen_embedding, tokens(5, 3), training=False),
    Case(
        "tied_embedding_positions",
        tied_head,
        tokens(C, 4),
        training=True,
    ),
    Case(
        "tied_embedding_functional",
        lambda: Net(tied_functional, embed=nn.Embedding(C, 4), mix=nn.Linear(4, 4)),
        tokens(C, 4),
        training=False,
    ),
    Case(
        "functional_embedding",
        lambda: Net(lambda m, x: m.read(torch.tanh(F.embedding(x, m.table)).flatten(1)), table=bare(5, 3), read=nn.Linear(9, C)),
        tokens(5, 3),
        training=True,
    ),
    Case(
        "indexed_parameter",
        lambda: Net(lambda m, x: m.read(torch.tanh(m.table[x].sum(dim=1))), table=bare(5, 3), read=nn.Linear(3, C)),
        tokens(5, 3),
        training=False,
    ),
    Case("embedding_bag_sum", lambda: bag(mode="sum"), tokens(5, 4), training=True),
    Case("embedding_bag_mean", lambda: bag(mode="mean"), tokens(5, 4), training=False),
    Case("embedding_bag_max", lambda: bag(mode="max"), tokens(5, 4), training=True),
    Case("embedding_bag_padding", lambda: bag(mode="mean", padding_idx=1), tokens(5, 4), training=False),
    Case(
        "embedding_bag_weights",
        lambda: Net(weighted_bag, bag=nn.EmbeddingBag(5, 4, mode="sum"), read=nn.Linear(4, C)),
        weighted_bag_inputs,
        training=True,
    ),
    Case("layer_norm_sequence", lambda: normalized(nn.LayerNorm(4), 3, 4), features(3, 4), training=False),
    Case("layer_norm_no_bias", lambda: normalized(nn.LayerNorm(4, bias=False), 3, 4), features(3, 4), training=True),
    Case("layer_norm_two_axes", lambda: normalized(nn.LayerNorm((3, 2)), 2, 3, 2), features(2, 3, 2), training=False),
    Case("rms_norm", lambda: normalized(nn.RMSNorm(4), 3, 4), features(3, 4), training=True),
    Case("group_norm_no_positions", lambda: normalized(nn.GroupNorm(2, 6), 6), features(6), training=False),
    Case("instance_norm_2d", lambda: normalized(nn.InstanceNorm2d(2, affine=True), 2, 3, 3), features(2, 3, 3), training=True),
    Case(
        "instance_norm_running",
        lambda: normalized(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 3, 4),
        features(3, 4),
        training=True,
    ),
    Case("batch_norm_sequence", lambda: normalized(nn.BatchNorm1d(3), 3, 4), features(3, 4), training=False),
    Case("batch_norm_3d", lambda: normalized(nn.BatchNorm3d(2), 2, 3, 2, 2), features(2, 3, 2, 2), training=True),
    Case(
        "adaptive_norm",
        lambda: Net(
            adaptive_norm,
            fc=nn.Linear(3, 4),
            norm=nn.LayerNorm(4, elementwise_affine=False),
            modulate=nn.Linear(2, 8),
            read=nn.Linear(4, C),
        ),
        vectors((4, 3), (2,)),
        training=False,
    ),
    Case("prelu", lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, C)), features(4), training=False),
    Case("prelu_channels", lambda: perturb(flat(nn.Conv2d(2, 3, 2), nn.PReLU(3), shape=(2, 4, 3))), features(2, 4, 3), training=False),
    Case("bilinear", lambda: Net(bilinear, mix=nn.Bilinear(3, 4, 5), read=nn.Linear(5, C)), vectors((3,), (4,)), training=True),
]
