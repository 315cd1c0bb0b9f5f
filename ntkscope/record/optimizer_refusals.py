"""Why the M of some well-known optimizers cannot be read from what they save, in a sentence each."""

from collections.abc import Callable, Mapping, Set
from typing import Any

Options = Mapping[str, Any]
Names = Set[str]

ADAFACTOR = {"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"}
TRUST_RATIO = {"trust_clip", "always_adapt", "grad_averaging", "max_coeff", "min_coeff", "trust_coefficient"}
MATRICES = {"GG", "Q", "preconditioner", "preconditioners", "factor_matrices"}
GATED_FORMAT = (
    "step, exp_avg, exp_avg_sq and grad_var in the entries, betas, eps, rho, gate, alpha, lambda_pop, center and gate_warmup in the groups"
)

# The first rule that holds speaks: what groups and entries have, and why that is not enough.
RULES: list[tuple[Callable[[Options, Names], bool], str]] = [
    (
        lambda group, saved: bool(group.get("caution")),
        "It is a cautious optimizer: a coordinate moves only where average and gradient agree in sign, and the gradient is not stored",
    ),
    (
        lambda group, saved: "state1" in saved,
        "bitsandbytes wrote it: whether it is Adam or LAMB is not stored, and in 8 bits the moments are known roughly only",
    ),
    (
        lambda group, saved: bool(saved & ADAFACTOR),
        "It is Adafactor: its step is clipped by its own size, which depends on the gradient, and that is not stored",
    ),
    (
        lambda group, saved: bool(saved & MATRICES) or any(name.startswith(("precond", "inv_precond")) for name in saved),
        "It preconditions with matrices (Shampoo, SOAP), so that M is no diagonal",
    ),
    (
        lambda group, saved: "ns_steps" in group,
        "It orthogonalizes its step (Muon), which no diagonal M does",
    ),
    (
        lambda group, saved: bool(group.keys() & TRUST_RATIO),
        "It scales every layer by a trust ratio (LAMB, LARS), which is not stored",
    ),
    (
        lambda group, saved: "max_grad_norm" in group and "bias_correction" in group,
        "It may be the first FusedAdam of Apex, 1-bit Adam or LAMB, and the place of ε (`eps_inside_sqrt`) is not stored",
    ),
    (
        lambda group, saved: "betas" in group and "eps" not in group and saved == {"exp_avg"},
        "It is Lion: its step is the sign of an average, which no diagonal M gives",
    ),
    (
        lambda group, saved: "exp_avg_var" in saved and "exp_avg_sq" not in saved,
        "It is an AdaBelief that does not store whether its steps are rectified (timm's does)",
    ),
    (
        lambda group, saved: {"exp_avg", "exp_avg_sq"} < saved - {"step", "max_exp_avg_sq"},
        "What it keeps beside both moments may gate or scale its steps, and how is not stored. A gated Adam by the rule of GatedAdamW is "
        f"read if it saves as that does: {GATED_FORMAT}",
    ),
]


def reason_against(group: Options, saved: Names) -> str:
    """Say why an optimizer's M cannot be read.

    Args:
        group: The first of its groups.
        saved: Names in its entries.

    Returns:
        A sentence without its full stop; empty where nothing particular is known.
    """
    return next((sentence for holds, sentence in RULES if holds(group, saved)), "")
