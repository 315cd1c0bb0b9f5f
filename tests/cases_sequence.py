"""Cases of attention, transformers and recurrent networks."""

import warnings

import torch
from cases_base import NUM_CLASSES as C
from cases_base import Case, MeanPool, Net, bare, features, perturb, tokens, vectors
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

# --- Attention ---------------------------------------------------------------------------------------------------------------


def self_attention(function, **options: object) -> nn.Module:
    """d = 4, two heads, biases and the rows of `add_bias_kv` not at zero."""
    options = {"batch_first": True} | options
    return perturb(Net(function, attend=nn.MultiheadAttention(4, 2, **options), read=nn.Linear(4, C)))


def attended(m, x):
    return m.read(torch.tanh(x + m.attend(x, x, x)[0]).mean(dim=1))


def attended_sequence_first(m, x):
    x = x.transpose(0, 1)
    return m.read(torch.tanh(x + m.attend(x, x, x, need_weights=False)[0]).mean(dim=0))


def attended_causal(m, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return m.read(torch.tanh(x + m.attend(x, x, x, attn_mask=mask, need_weights=False)[0])[:, -2])


def attended_padding(m, batch):
    x, padding = batch["x"], batch["padding"]
    mixed = torch.tanh(m.attend(x, x, x, key_padding_mask=padding, need_weights=False)[0])
    return m.read(mixed.masked_fill(padding[:, :, None], 0.0).sum(dim=1))


def padded(num):
    """Between one and four of four positions are there."""
    return {"x": torch.randn(num, 4, 4), "padding": torch.arange(4) >= torch.randint(1, 5, (num, 1))}


def cross_attended(m, inputs):
    query, key, value = inputs
    return m.read(torch.tanh(query + m.attend(query, key, value)[0]).mean(dim=1))


def attention_weights(m, x):
    """What comes out are the weights, averaged over heads: the values get no gradient."""
    return m.read(m.attend(x, x, x)[1].flatten(1))


def scaled_dot_product(m, x):
    """nanoGPT's attention: one Linear for query, key and value, split into heads."""
    num, steps, width = x.shape
    query, key, value = (part.view(num, steps, 2, width // 2).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return m.read(m.out(mixed.transpose(1, 2).reshape(num, steps, width))[:, -1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.1, activation="gelu", norm_first=True, batch_first=True)
    stack = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    return perturb(nn.Sequential(stack, MeanPool(), nn.Linear(4, C)))


def decoder_layer() -> nn.Module:
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=6, batch_first=True)
    return perturb(Net(lambda m, pair: m.read(m.layer(*pair).mean(dim=1)), layer=layer, read=nn.Linear(4, C)))


def gpt_forward(m, x):
    """Tied head, position table, Conv1D of GPT-2 in the block, logits of the last position."""
    num, steps = x.shape
    h = m.embed(x) + m.position(torch.arange(steps, device=x.device))
    mask = nn.Transformer.generate_square_subsequent_mask(steps, dtype=h.dtype, device=h.device)
    normed = m.norm1(h)
    h = h + m.attend(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
    hidden = torch.addmm(m.up_bias, m.norm2(h).reshape(num * steps, -1), m.up).view(num, steps, -1)
    h = h + m.down(F.gelu(hidden))
    return m.head(m.norm3(h))[:, -1]


def gpt() -> nn.Module:
    norms = {f"norm{i}": nn.LayerNorm(4) for i in (1, 2, 3)}
    attend = nn.MultiheadAttention(4, 2, batch_first=True)
    parts = {"attend": attend, "up": bare(4, 6), "up_bias": bare(6), "down": nn.Linear(6, 4), "head": nn.Linear(4, C, bias=False)}
    model = Net(gpt_forward, embed=nn.Embedding(C, 4), position=nn.Embedding(5, 4), **parts, **norms)
    model.head.weight = model.embed.weight
    return perturb(model)


def vit_forward(m, x):
    patches = m.patch(x).flatten(2).transpose(1, 2)
    h = torch.cat([m.token.expand(len(x), -1, -1), patches], dim=1) + m.position
    return m.read(m.norm(m.layer(h)[:, 0]))


def vit() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, norm_first=True, batch_first=True)
    parts = {"patch": nn.Conv2d(2, 4, 2, stride=2), "layer": layer, "norm": nn.LayerNorm(4), "read": nn.Linear(4, C)}
    return perturb(Net(vit_forward, token=bare(1, 1, 4), position=bare(1, 5, 4), **parts))


# --- Recurrent networks ------------------------------------------------------------------------------------------------------


def mean_state(m, x):
    return m.read(m.rnn(x)[0].mean(dim=1))


def mean_state_sequence_first(m, x):
    return m.read(m.rnn(x.transpose(0, 1))[0].mean(dim=0))


def last_hidden(m, x):
    hidden = m.rnn(x)[1]
    return m.read((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])


def projected(m, x):
    """In float32 torch warns that oneDNN has no such LSTM."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")
        return last_hidden(m, x)


def both_directions(m, x):
    return m.read(m.rnn(x)[1].transpose(0, 1).flatten(1))


def learned_start(m, x):
    """The initial state is a parameter; it enters by the second argument."""
    return m.read(m.rnn(x, m.start.expand(-1, len(x), -1).contiguous())[0][:, -1])


def packed(m, batch):
    """Examples sorted by length, shorter ones leave the batch early."""
    sequence = rnn.pack_padded_sequence(batch["x"], batch["lengths"].cpu(), batch_first=True, enforce_sorted=False)
    return m.read(m.rnn(sequence)[1][-1])


def packed_inputs(num):
    return {"x": torch.randn(num, 4, 3), "lengths": torch.randint(1, 5, (num,))}


def recurrent(function, kind: type[nn.Module], width: int = 4, **options: object) -> nn.Module:
    return Net(function, rnn=kind(3, 4, **{"batch_first": True} | options), read=nn.Linear(width, C))


def cell_loop(m, x):
    """GRUCell and RNNCell: the state is a tensor, zero by default."""
    state = None
    for step in x.unbind(dim=1):
        state = m.cell(step, state)
    return m.read(state)


def lstm_cell_loop(m, x):
    state, memory = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
    total = 0.0
    for step in x.unbind(dim=1):
        state, memory = m.cell(step, (state, memory))
        total = total + state
    return m.read(total)


def zero_start(m, x):
    """An Elman network of two Linear modules: `back` has a zero input, the same for all examples, at the first step."""
    state = x.new_zeros(len(x), 4)
    for step in x.unbind(dim=1):
        state = torch.tanh(m.into(step) + m.back(state))
    return m.read(state)


CASES = [
    Case("attention_plain", lambda: self_attention(attended), features(3, 4), training=True),
    Case("attention_no_bias", lambda: self_attention(attended, bias=False), features(3, 4), training=False),
    Case("attention_bias_kv", lambda: self_attention(attended, add_bias_kv=True), features(3, 4), training=True),
    Case("attention_zero", lambda: self_attention(attended, add_zero_attn=True), features(3, 4), training=False),
    Case("attention_sequence_first", lambda: self_attention(attended_sequence_first, batch_first=False), features(5, 4), training=True),
    Case("attention_causal", lambda: self_attention(attended_causal), features(4, 4), training=False),
    Case("attention_padding_mask", lambda: self_attention(attended_padding), padded, training=True),
    Case("attention_cross", lambda: self_attention(cross_attended, kdim=3, vdim=2), vectors((2, 4), (3, 3), (3, 2)), training=False),
    Case(
        "attention_weights",
        lambda: perturb(Net(attention_weights, attend=nn.MultiheadAttention(4, 2, batch_first=True), read=nn.Linear(9, C))),
        features(3, 4),
        training=True,
    ),
    Case(
        "attention_functional",
        lambda: Net(scaled_dot_product, qkv=nn.Linear(4, 12, bias=False), out=nn.Linear(4, 4), read=nn.Linear(4, C)),
        features(4, 4),
        training=False,
    ),
    Case("transformer_encoder", encoder, features(3, 4), training=True),
    Case("transformer_decoder_layer", decoder_layer, vectors((2, 4), (3, 4)), training=False),
    Case("gpt", gpt, tokens(C, 4), training=True),
    Case("vit", vit, features(2, 4, 4), training=False),
    Case("lstm_last_hidden", lambda: recurrent(last_hidden, nn.LSTM), features(4, 3), training=True),
    Case("lstm_two_layers", lambda: recurrent(mean_state, nn.LSTM, num_layers=2, dropout=0.2), features(3, 3), training=True),
    Case("lstm_projection", lambda: recurrent(projected, nn.LSTM, 2, proj_size=2), features(4, 3), training=False),
    Case("lstm_sequence_first", lambda: recurrent(mean_state_sequence_first, nn.LSTM, batch_first=False), features(5, 3), training=False),
    Case("gru_bidirectional", lambda: recurrent(both_directions, nn.GRU, 8, bidirectional=True), features(4, 3), training=True),
    Case("gru_packed", lambda: recurrent(packed, nn.GRU), packed_inputs, training=False),
    Case("rnn_tanh_no_bias", lambda: recurrent(mean_state, nn.RNN, bias=False), features(4, 3), training=True),
    Case("rnn_relu", lambda: recurrent(mean_state, nn.RNN, num_layers=2, nonlinearity="relu"), features(4, 3), training=False),
    Case(
        "rnn_learned_start",
        lambda: Net(learned_start, rnn=nn.RNN(3, 4, batch_first=True), start=bare(1, 1, 4), read=nn.Linear(4, C)),
        features(3, 3),
        training=True,
    ),
    Case("lstm_cell", lambda: Net(lstm_cell_loop, cell=nn.LSTMCell(3, 4), read=nn.Linear(4, C)), features(3, 3), training=False),
    Case("gru_cell", lambda: Net(cell_loop, cell=nn.GRUCell(3, 4), read=nn.Linear(4, C)), features(3, 3), training=True),
    Case("rnn_cell", lambda: Net(cell_loop, cell=nn.RNNCell(3, 4), read=nn.Linear(4, C)), features(3, 3), training=False),
    Case(
        "zero_initial_state",
        lambda: Net(zero_start, into=nn.Linear(3, 4), back=nn.Linear(4, 4), read=nn.Linear(4, C)),
        features(4, 3),
        training=True,
    ),
]
