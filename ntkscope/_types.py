"""Axis names and aliases used in every annotation.

| axis | meaning |
| --- | --- |
| `examples` | n, examples of the probe set |
| `queries` | q, examples of the query set |
| `classes` | C, outputs of one example |
| `outputs` | N = n * C, stacked outputs; example i, class c sits at i * C + c |
| `query_outputs` | q * C |
| `params` | p, parameters with `requires_grad` |
| `modes` | directions of the range of B_s, the loss Hessian at the start of the window |
| `snapshots` | points of a trace |
| `steps` | optimizer steps that were followed one by one |
| `audits` | steps at which received gradients were compared |
| `horizons` | times that a jump predicts |
| `lags` | spans of time over which motion is measured |
| `groups` | groups of examples that a jackknife leaves out |
| `kept`, `left_out` | examples kept or left out of a group's replicate |
| `height`, `width`, `channels` | of a small picture of an input |
| `...` | nothing, or in the trace form one column per class |
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

KernelOutputs = str  # "full", "trace", "sum", "class=k" or "loss": see `kernel.readout`
BatchNormMode = Literal["eval", "batch"]
GramMethod = Literal["auto", "autograd"]
GateKind = Literal["soft", "hard", "snr", "open"]

ForwardFn = Callable[[nn.Module, Any], Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
