"""nn.RNN, nn.GRU, nn.LSTM and their cells, unrolled into F.linear calls that the watch sees.

torch runs them as one call that shows no gate. The unrolled loop computes the same numbers to rounding, and each weight becomes a
Linear used once per step. Packed sequences, whose batch shrinks as examples end, are left to autograd.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkscope.kernel.rules.use import Seen

if TYPE_CHECKING:
    from ntkscope.kernel.watch import WeightWatch

NUM_PADDED_ARGS = 9  # torch.lstm(input, hx, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)

State = Sequence[Tensor]  # (h,) or (h, c)
Step = Callable[[Tensor, State, Sequence[Tensor | None]], State]


def lstm_step(step: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """One step of an LSTM.

    Args:
        step: Input `(n, inputs)`.
        state: h and c.
        weights: Input weight, hidden weight, their biases, projection.

    Returns:
        The next h and c.
    """
    w_in, w_hidden, b_in, b_hidden, projection = weights
    assert w_in is not None  # only biases and the projection may be missing
    assert w_hidden is not None
    gates = F.linear(step, w_in, b_in) + F.linear(state[0], w_hidden, b_hidden)
    enter, forget, cell, leave = gates.chunk(4, dim=-1)
    memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
    hidden = torch.sigmoid(leave) * torch.tanh(memory)
    return (hidden if projection is None else F.linear(hidden, projection)), memory


def gru_step(step: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """One step of a GRU.

    Args:
        step: Input `(n, inputs)`.
        state: h.
        weights: Input weight, hidden weight, their biases.

    Returns:
        The next h.
    """
    w_in, w_hidden, b_in, b_hidden, _ = weights
    assert w_in is not None
    assert w_hidden is not None
    from_input, from_hidden = F.linear(step, w_in, b_in).chunk(3, dim=-1), F.linear(state[0], w_hidden, b_hidden).chunk(3, dim=-1)
    reset, update = (torch.sigmoid(a + b) for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
    new = torch.tanh(from_input[2] + reset * from_hidden[2])
    return ((1 - update) * new + update * state[0],)


def _elman_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(step: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
        w_in, w_hidden, b_in, b_hidden, _ = weights
        assert w_in is not None
        assert w_hidden is not None
        return (activation(F.linear(step, w_in, b_in) + F.linear(state[0], w_hidden, b_hidden)),)

    return step


STEPS: dict[str, Step] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": _elman_step(torch.tanh),
    "rnn_relu": _elman_step(torch.relu),
}


def recurrent(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu on padded sequences, in evaluation mode."""
    if len(args) != NUM_PADDED_ARGS or not isinstance(args[3], bool) or (args[6] and args[5]):
        result: tuple[Tensor, ...] = func(*args, **kwargs)
        return Seen(result, result[0])
    inputs, start, weights, has_biases, num_layers, _, _, bidirectional, batch_first = args
    first = start if isinstance(start, tuple | list) else (start,)
    num_directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * num_directions)
    with watch:  # the calls below are watched like the model's own
        steps = list(inputs.unbind(1 if batch_first else 0))
        final: list[State] = []
        for layer in range(num_layers):
            outputs: list[list[Tensor]] = []
            for direction in range(num_directions):
                index = layer * num_directions + direction
                own = weights[index * per_direction : (index + 1) * per_direction]
                state: State = tuple(part[index] for part in first)
                hidden = []
                for step in reversed(steps) if direction else steps:
                    state = STEPS[func.__name__](step, state, _spread(own, has_biases))
                    hidden.append(state[0])
                outputs.append(hidden[::-1] if direction else hidden)
                final.append(state)
            steps = [torch.cat(parts, dim=-1) for parts in zip(*outputs, strict=True)]
        sequence = torch.stack(steps, dim=1 if batch_first else 0)
        states = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
    return Seen((sequence, *states))


def recurrent_cell(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell."""
    step, start, w_in, w_hidden, *biases = args
    state: State = tuple(start) if isinstance(start, tuple | list) else (start,)
    b_in, b_hidden = biases if biases else (None, None)
    with watch:
        result = STEPS[func.__name__.removesuffix("_cell")](step, state, (w_in, w_hidden, b_in, b_hidden, None))
    return Seen(result if len(result) > 1 else result[0])


def _spread(own: Sequence[Tensor], has_biases: bool) -> tuple[Tensor | None, ...]:
    """Name one direction's flat list of weights: input, hidden, two biases, projection."""
    biases = own[2:4] if has_biases else (None, None)
    rest = own[4:] if has_biases else own[2:]
    return own[0], own[1], biases[0], biases[1], rest[0] if rest else None
