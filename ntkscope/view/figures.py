"""The figures of an analysis, by name. Each title states the finding; each function reads the result object and nothing else."""

from collections.abc import Callable

import plotly.graph_objects as go

from ntkscope.view.cell_figures import cells
from ntkscope.view.eigenstructure import eigenstructure
from ntkscope.view.example_figures import suspicious, suspicious_inputs
from ntkscope.view.gate_figures import gate_agreement, gate_density, gate_modes, gate_motion, gate_openness
from ntkscope.view.spectrum_figures import omega_surface, spectrum
from ntkscope.view.training_figures import drift, loss_and_closure, signal_share
from ntkscope.view.words import AnalysisLike

FIGURES: dict[str, Callable[[AnalysisLike], go.Figure]] = {
    "spectrum": spectrum,
    "eigenstructure": eigenstructure,
    "omega_surface": omega_surface,
    "signal_share": signal_share,
    "suspicious": suspicious,
    "suspicious_inputs": suspicious_inputs,
    "cells": cells,
    "loss_and_closure": loss_and_closure,
    "drift": drift,
    "gate_openness": gate_openness,
    "gate_motion": gate_motion,
    "gate_agreement": gate_agreement,
    "gate_density": gate_density,
    "gate_modes": gate_modes,
}


def drawable(analysis: AnalysisLike) -> list[str]:
    """List the figures that have something to show; the others raise an error that says why not.

    Args:
        analysis: The result.

    Returns:
        Names in `FIGURES`.
    """
    gate = analysis.gate
    is_audited = gate is not None and gate.audit is not None
    needs = {
        "suspicious_inputs": analysis.examples.pictures is not None,
        "cells": analysis.cells is not None,
        "gate_openness": gate is not None,
        **dict.fromkeys(("gate_motion", "gate_agreement", "gate_density", "gate_modes"), is_audited),
    }
    return [name for name in FIGURES if needs.get(name, True)]
