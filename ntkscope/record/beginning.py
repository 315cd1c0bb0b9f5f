"""The weights before the first step: the first snapshot is taken at them, and the model is linearized there."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError

State = dict[str, Tensor]


def copy_state(model: nn.Module) -> State:
    """Copy weights and buffers.

    Args:
        model: Any module.

    Returns:
        Copies by name.
    """
    return {name: value.detach().clone() for name, value in _named_state(model)}


def check_beginning(value: object, model: nn.Module) -> State | None:
    """Check that a stored beginning fits the model.

    Args:
        value: From a recorder's state; None where it has none.
        model: The model.

    Returns:
        Weights and buffers, on the model's device.

    Raises:
        InputError: If a trained weight is missing or of another shape.
    """
    if value is None:
        return None
    if not (isinstance(value, Mapping) and all(isinstance(tensor, Tensor) for tensor in value.values())):
        raise InputError("The given state is damaged: `beginning` must hold tensors by name. Resume from another checkpoint.")
    wrong = [name for name, own in model.named_parameters() if name not in value or value[name].shape != own.shape]
    if wrong:
        raise InputError(f"The weights at the beginning of the run do not fit the model: {', '.join(wrong)}. Resume with the same model.")
    return {name: value[name].detach().to(own) for name, own in _named_state(model) if name in value}


@contextmanager
def weights_of(model: nn.Module, state: State) -> Generator[None, None, None]:
    """Swap other weights and buffers in: by pointer, so that the model's own storage is not even touched.

    Args:
        model: Any module.
        state: From `copy_state`.
    """
    own = [(tensor, tensor.data, state.get(name)) for name, tensor in _named_state(model)]
    try:
        for tensor, _, other in own:
            if other is not None:
                tensor.data = other
        yield
    finally:
        for tensor, data, _ in own:
            tensor.data = data


def displacement(parameters: Mapping[str, nn.Parameter], state: State) -> dict[str, Tensor]:
    """Compute how far weights have moved.

    Args:
        parameters: Trained parameters, by name.
        state: From `copy_state`.

    Returns:
        w − w_0 by name.
    """
    with torch.no_grad():
        return {name: parameter.detach() - state[name] for name, parameter in parameters.items()}


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()
