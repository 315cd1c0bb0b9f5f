"""Whether the optimizer received the gradient of the loss on the probe: its scale, and what is missing (theory.md section 2)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed

SCALE_LIMIT = 0.1
UNEXPLAINED_LIMIT = 0.05
PERSISTENCE_LIMIT = 0.5
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class GradientAgreement(Displayed):
    """What the optimizer received, against the gradient of the loss on the probe.

    Attributes:
        factor: Σ⟨p.grad, ∇Φ⟩ / Σ‖∇Φ‖²: 1 when the loss has the trained scale and nothing is clipped.
        factor_error: Its standard error; NaN below two audits.
        unexplained: Share of the squared gradient that no multiple of ∇Φ explains, each audit with its own multiple.
        persistence: Mean cosine between the unexplained parts of consecutive audits: near 0 for noise; NaN without two in a row.
        persistence_error: Its standard error; NaN below two cosines.
        num_audits: Steps that were audited.
    """

    factor: float
    factor_error: float
    unexplained: float
    persistence: float
    persistence_error: float
    num_audits: int

    def warnings(self) -> tuple[str, ...]:
        """Name what is wrong, if it is so beyond chance.

        Returns:
            At most two sentences: a wrong scale, and a missing term.
        """
        found = []
        gap = abs(self.factor - 1)
        if gap > SCALE_LIMIT and gap > STANDARD_ERRORS * self.factor_error:
            found.append(
                f"Loss scale or clipping: the gradients that the optimizer received are {self.factor:.2f} times those of the loss on the "
                f"probe (± {self.factor_error:.2f}, {self.num_audits} audited steps). Give the recorder the loss at the scale you train "
                "with, or rescale time: analyze(..., rescale_time=True)."
            )
        excess = self.persistence - PERSISTENCE_LIMIT
        if self.unexplained > UNEXPLAINED_LIMIT and excess > 0 and excess > STANDARD_ERRORS * self.persistence_error:
            found.append(
                f"Missing term: {self.unexplained:.0%} of the squared gradient that the optimizer received is not that of the loss on the "
                f"probe, and keeps its direction from audit to audit (cosine {self.persistence:.2f}). A penalty added to the loss by hand, "
                "another loss, or training examples outside the probe."
            )
        return tuple(found)


def gradient_agreement(rows: Float[Tensor, "audits 4"]) -> GradientAgreement:
    """Summarize the audits of a run.

    Args:
        rows: One per audited step: ⟨p.grad, ∇Φ⟩, ‖∇Φ‖², ‖p.grad‖², and the cosine with the audit before (NaN for the first).

    Returns:
        The summary.

    Raises:
        InputError: If there is no row, or the gradient of the loss vanishes in all of them.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0, 4.0, torch.nan], [4.0, 2.0, 8.0, 0.1]], dtype=torch.float64)
        >>> gradient_agreement(rows).factor, gradient_agreement(rows).unexplained
        (2.0, 0.0)

    Source:
        theory.md section 2; the standard error is that of a ratio estimator, with audits taken as independent.
    """
    if rows.ndim != 2 or rows.shape[1] != 4 or len(rows) == 0:
        raise InputError(f"`rows` must have shape (audits, 4) with at least one audit, got {tuple(rows.shape)}. Did the record audit any?")
    product, square, total, cosine = rows.double().T
    if not float(square.sum()) > 0:
        raise InputError("The gradient of the loss on the probe is zero at every audited step, so nothing can be compared with it.")
    factor = float(product.sum() / square.sum())
    count = len(rows)
    spread = float((product - factor * square).square().sum())
    error = math.sqrt(count / (count - 1) * spread) / float(square.sum()) if count > 1 else math.nan
    explained = torch.where(square > 0, product.square() / square, 0.0).sum()
    whole = float(total.sum())
    known = cosine[cosine.isfinite()]
    return GradientAgreement(
        factor=factor,
        factor_error=error,
        unexplained=max(0.0, 1 - float(explained) / whole) if whole > 0 else 0.0,
        persistence=float(known.mean()) if len(known) else math.nan,
        persistence_error=float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan,
        num_audits=count,
    )
