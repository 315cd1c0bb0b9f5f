"""Kernels and analyses as datasets of xarray: named dimensions and coordinates, attributes that any file format takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.kernel.gram import Gram
from ntkscope.results import Analysis

try:
    import xarray
except ImportError:
    xarray = None

TIME = "optimizer time (learning rate x steps)"
LOSS = "loss"
EXAMPLE_SCORES = {
    "reservoir_energy": ("squared residual in the reservoir", f"2 {LOSS}"),
    "reservoir_share": ("share of the squared residual in the reservoir", "1"),
    "margin": ("output of the label minus the largest other, at the window's end", "output"),
    "area_under_margin": ("margin averaged over the window's steps", "output"),
    "self_influence": ("trace of the example's own kernel block, at the window's end", "squared output gradient"),
    "half_time": ("when half of the squared residual was gone; infinite if never", TIME),
    "quarter_time": ("when a quarter of the squared residual was left; infinite if never", TIME),
    "residual_left": ("share of the squared residual left at the last snapshot", "1"),
}


def gram_dataset(gram: Gram, examples: Sequence[Any] | None, others: Sequence[Any] | None) -> Any:
    """Put a kernel into a dataset.

    Args:
        gram: The kernel.
        examples: Names of the rows' examples; 0, 1, ... if not given.
        others: Names of the columns' examples; if not given, those of the rows where the kernel is symmetric, else 0, 1, ...

    Returns:
        An `xarray.Dataset` with `kernel`, and `kernel_by_layer` where the kernel has layers.

    Raises:
        InputError: If there are not as many names as examples.
    """
    package = _package()
    num_others = gram.matrix.shape[1] // (gram.num_classes if gram.outputs == "full" else 1)
    rows = _names(examples, gram.num_examples, "examples")
    is_symmetric = torch.equal(gram.matrix, gram.matrix.T)
    columns = rows if others is None and is_symmetric else _names(others, num_others, "others")
    dims: tuple[str, ...] = ("example", "example_")
    shape: tuple[int, ...] = (len(rows), len(columns))
    coords: dict[str, Any] = {"example": rows, "example_": columns}
    if gram.outputs == "full":
        outputs = list(range(gram.num_classes))
        dims, shape = ("example", "output", "example_", "output_"), (len(rows), len(outputs), len(columns), len(outputs))
        coords |= {"output": outputs, "output_": outputs}
    attrs = {"long_name": "empirical neural tangent kernel J M J^T", "outputs": gram.outputs, "num_classes": gram.num_classes}
    variables: dict[str, Any] = {"kernel": (dims, _numbers(gram.matrix.reshape(shape)), attrs)}
    if gram.by_layer is not None:
        coords["layer"] = list(gram.by_layer)
        stacked = torch.stack([matrix.reshape(shape) for matrix in gram.by_layer.values()])
        variables["kernel_by_layer"] = (("layer", *dims), _numbers(stacked), {**attrs, "long_name": "its parts, one per module"})
    return package.Dataset(variables, coords)


def analysis_dataset(analysis: Analysis) -> Any:
    """Put an analysis into a dataset; its operators and directions, which are N x N, stay in `Analysis.tensors()`.

    Args:
        analysis: The result.

    Returns:
        An `xarray.Dataset` with the dimensions `example`, `mode`, `propagator_mode`, `step`, `axis` and `rule`.
    """
    package = _package()
    examples, history, spectrum, drift = analysis.examples, analysis.history, analysis.spectrum, analysis.drift
    num_modes = len(spectrum.eigvals)
    coords: dict[str, Any] = {
        "example": examples.ids,
        "mode": list(range(num_modes)),
        "propagator_mode": list(range(len(spectrum.log_dissipation))),
        "step": ("step", history.steps, {"long_name": "optimizer steps", "units": "1"}),
        "time": ("step", _numbers(history.times), {"long_name": "since the window's start", "units": TIME}),
        "leading_mode": ("axis", history.leading_modes, {"long_name": "mode along which `leading` places examples"}),
        "rule": list(analysis.cutoffs),
    }
    for name, values in (("label", examples.labels), ("true_label", examples.true_labels)):
        if values is not None:
            coords[name] = ("example", values)
    if examples.is_noise is not None:
        coords["is_noise"] = ("example", _numbers(examples.is_noise), {"long_name": "whether the label was planted wrong"})
    verdict = analysis.cutoffs[analysis.channels.rule]
    is_signal = torch.arange(num_modes) < analysis.channels.signal_rank if verdict.selected is None else verdict.selected
    found: dict[str, tuple[tuple[str, ...], Tensor, str, str]] = {
        "eigvals": (("mode",), spectrum.eigvals, "share of the loss along the direction that training dissipated, omega", "1"),
        "residual_energy": (("mode",), spectrum.residual_energy, "squared residual along the direction at the window's start", f"2 {LOSS}"),
        "is_signal": (("mode",), is_signal, "whether the direction is in the signal channel", "1"),
        "log_dissipation": (("propagator_mode",), spectrum.log_dissipation, "kappa; has directions of its own", "1"),
        "loss": (("step",), history.loss, "observed", LOSS),
        "predicted_loss": (("step",), history.predicted_loss, "loss at the start minus the dissipated energy", LOSS),
        "gradient_error": (("step",), history.gradient_error, "relative error of the predicted output gradient", "1"),
        "signal_share": (("step",), history.signal_share, "share of the squared residual that was dissipated", "1"),
        "is_refined": (("step",), torch.tensor(history.is_refined), "whether the way there was integrated by interpolated halves", "1"),
        "kernel_drift": (("step",), drift.relative, f"relative change of the {drift.kernel} kernel since the window's start", "1"),
        "eigvals_at_step": (("step", "mode"), history.eigvals, "omega of the window that ends there, descending", "1"),
        "example_residual": (("step", "example"), history.example_residual, "share of the squared residual that is left", "1"),
        "leading": (("step", "example", "axis"), history.leading, "part of the residual that is gone along a leading mode", "1"),
        "example_loss": (("example",), examples.loss, "the example's own, at the window's end", LOSS),
        "cutoff_rank": (("rule",), _optional([cutoff.rank for cutoff in analysis.cutoffs.values()]), "signal directions by the rule", "1"),
        "cutoff_threshold": (("rule",), _optional([cutoff.threshold for cutoff in analysis.cutoffs.values()]), "omega above which", "1"),
    }
    found |= {name: (("example",), getattr(examples, name), *text) for name, text in EXAMPLE_SCORES.items()}
    variables = {name: (dims, _numbers(values), {"long_name": text, "units": units}) for name, (dims, values, text, units) in found.items()}
    return package.Dataset(variables, coords, _attributes(analysis))


def _attributes(analysis: Analysis) -> dict[str, str | int | float]:
    """List what describes the whole: texts and numbers only, as netCDF has neither null nor booleans."""
    run, window, closure, channels = analysis.run, analysis.window, analysis.closure, analysis.channels
    return {
        "source": run.source,
        "loss_function": run.loss,
        "optimizer": run.optimizer,
        "preconditioner": run.precond,
        "kernel_outputs": run.outputs,
        "num_params": run.num_params,
        "num_classes": run.num_classes,
        "window_start_step": window.start_step,
        "window_stop_step": window.stop_step,
        "window_reason": window.reason,
        "energy_error": closure.energy_error,
        "gradient_error": closure.gradient_error,
        "trustworthy": int(closure.trustworthy),
        "causes": "\n".join(closure.causes),
        "cutoff_rule": channels.rule,
        "signal_rank": channels.signal_rank,
        "regime": analysis.regime,
        "warnings": "\n".join(analysis.warnings),
    }


def _package() -> Any:
    """Give xarray, or say how to get it."""
    if xarray is None:
        raise UnsupportedError("xarray is not installed: pip install 'ntkscope[interop]', or take the arrays as they are.")
    return xarray


def _names(given: Sequence[Any] | None, count: int, argument: str) -> list[Any]:
    """Number examples, or check that they all have names."""
    if given is None:
        return list(range(count))
    if len(given) != count:
        raise InputError(f"`{argument}` must name all {count} examples, got {len(given)} names.")
    return given.tolist() if isinstance(given, Tensor) else list(given)


def _numbers(values: Tensor) -> Any:
    """Take an array from a tensor on any device."""
    return values.detach().cpu().numpy()


def _optional(values: list[Any]) -> Tensor:
    """Write what is missing as NaN."""
    return torch.tensor([torch.nan if value is None else float(value) for value in values], dtype=torch.float64)
