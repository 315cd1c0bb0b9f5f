"""The figures of an analysis, by name. Each title states the finding; each function reads the result object and nothing else."""

from collections.abc import Callable

import plotly.graph_objects as go

from ntkscope.view.eigenstructure import eigenstructure
from ntkscope.view.example_figures import suspicious
from ntkscope.view.gate_figures import gate_agreement, gate_density, gate_modes, gate_motion, gate_openness
from ntkscope.view.spectrum_figures import omega_surface, spectrum
from ntkscope.view.training_figures import loss_and_closure
from ntkscope.view.words import AnalysisLike

FIGURES: dict[str, Callable[[AnalysisLike], go.Figure]] = {
    "spectrum": spectrum,
    "eigenstructure": eigenstructure,
    "omega_surface": omega_surface,
    "suspicious": suspicious,
    "loss_and_closure": loss_and_closure,
    "gate_openness": gate_openness,
    "gate_motion": gate_motion,
    "gate_agreement": gate_agreement,
    "gate_density": gate_density,
    "gate_modes": gate_modes,
}
AUDITED = ("gate_motion", "gate_agreement", "gate_density", "gate_modes")


def drawable(analysis: AnalysisLike) -> list[str]:
    """List the figures that have something to show.

    Args:
        analysis: The result.

    Returns:
        Names in `FIGURES`.
    """
    gate = analysis.gate
    missing = () if gate is not None and gate.audit is not None else AUDITED if gate is not None else (*AUDITED, "gate_openness")
    return [name for name in FIGURES if name not in missing]
