"""What a neural network has learned, and what it has merely stored."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ntkscope._checks import InputError, InputTypeError, UnsupportedError, UserError
from ntkscope.analysis import analyze
from ntkscope.audit_price import AuditPrice, price_audit
from ntkscope.dynamics.agreement import GradientAgreement
from ntkscope.dynamics.closure import Closure
from ntkscope.dynamics.density import Density
from ntkscope.dynamics.diffusion import Diffusion
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.drift import Drift
from ntkscope.dynamics.transfer import Fit, Transfer
from ntkscope.gate.audit_options import AuditOptions
from ntkscope.gate.audit_results import LayerAudit, SpectralGate, StepAudit
from ntkscope.gate.compared import Compared
from ntkscope.gate.gate_statistics import GateShare, OptimizerGateStatistics
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.gate.population_risk import PopulationRisk, RiskRate, correlation_with_heldout, population_risk, streaming_population_risk
from ntkscope.gate.step import gate_values, gated_adam_step
from ntkscope.gate.variance import MicrobatchVariance, StreamingMoments, exact_variance, microbatch_variance, streaming_variance
from ntkscope.gate.variance_ratio import VarianceComparison, VarianceRatio, compare_variances
from ntkscope.gate.verdict import GateAudit, RiskCurve, Verdict
from ntkscope.jumps import JumpErrors, JumpStudy, jump_study
from ntkscope.kernel.coverage import Coverage
from ntkscope.kernel.gram import Gram, ntk_gram
from ntkscope.kernel.moments import GradientMoments, gradient_moments
from ntkscope.kernel.price import Price, price_gram
from ntkscope.kernel.ranks import RankError
from ntkscope.record.continuation import continue_training
from ntkscope.record.recorder import Recorder
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.subset import stratified_subset
from ntkscope.record.trace import Trace, load_trace
from ntkscope.results import Analysis, GateStats, History, RunInfo, Window, load_analysis
from ntkscope.spectrum.cells import Cells
from ntkscope.spectrum.channels import ChannelSplit
from ntkscope.spectrum.cutoffs import Cutoff
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.examples import Examples
from ntkscope.spectrum.null import Null
from ntkscope.spectrum.sensitivity import Sensitivity
from ntkscope.spectrum.truncation import Truncation
from ntkscope.uncertainty import Uncertainty

if TYPE_CHECKING:
    from ntkscope.kernel.operator import NTKOperator
    from ntkscope.kernel.top_eig import TopEigenpairs

__all__ = [
    # kernel
    "Coverage",
    "Gram",
    "NTKOperator",
    "Price",
    "TopEigenpairs",
    "ntk_gram",
    "price_gram",
    # dynamics
    "Closure",
    "Density",
    "Diffusion",
    "Dissipation",
    "Drift",
    "Fit",
    "GradientAgreement",
    "Transfer",
    # spectrum
    "Cells",
    "ChannelSplit",
    "Cutoff",
    "Examples",
    "Null",
    "Sensitivity",
    "Spectrum",
    "Truncation",
    "Uncertainty",
    # gate
    "GateShare",
    "GatedAdamW",
    "GradientMoments",
    "MicrobatchVariance",
    "OptimizerGateStatistics",
    "PopulationRisk",
    "RiskRate",
    "StreamingMoments",
    "VarianceComparison",
    "VarianceRatio",
    "compare_variances",
    "correlation_with_heldout",
    "exact_variance",
    "gate_values",
    "gated_adam_step",
    "gradient_moments",
    "microbatch_variance",
    "population_risk",
    "streaming_population_risk",
    "streaming_variance",
    # audit of the gate
    "AuditOptions",
    "AuditPrice",
    "Compared",
    "GateAudit",
    "LayerAudit",
    "RiskCurve",
    "SpectralGate",
    "StepAudit",
    "Verdict",
    # record
    "Recorder",
    "Snapshot",
    "Trace",
    "continue_training",
    "load_trace",
    "stratified_subset",
    # analysis
    "Analysis",
    "GateStats",
    "History",
    "RunInfo",
    "Window",
    "JumpErrors",
    "JumpStudy",
    "analyze",
    "load_analysis",
    "price_audit",
    "jump_study",
    # errors
    "InputError",
    "InputTypeError",
    "RankError",
    "UnsupportedError",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import what needs scipy.sparse.linalg when it is asked for: that takes a sixth of the time of importing torch."""
    later = {"NTKOperator": "ntkscope.kernel.operator", "TopEigenpairs": "ntkscope.kernel.top_eig"}
    if name not in later:
        raise AttributeError(f"module 'ntkscope' has no attribute {name!r}")
    return getattr(import_module(later[name]), name)
