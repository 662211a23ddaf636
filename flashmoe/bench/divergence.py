"""How far one model's next-token distributions are from another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Of one float64 temporary; rows are taken in slices of that.
SLICE_BYTES = 2**25


@dataclass(frozen=True)
class Divergence:
    """What a text's tokens show of a model beside a reference, in nats.

    `kl` is the reference's distribution from the model's, KL(reference || model), `kl_error`
    the standard error of its mean. `agreement` is the share of tokens before which both find the
    same token likeliest.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_error: float
    kl_p99: float
    kl_max: float
    agreement: float


@dataclass
class Tally:
    """Collects tokens' figures; they are kept apart, so that sums do not depend on slices."""

    kl: list[Floats] = field(default_factory=list)
    surprise: list[Floats] = field(default_factory=list)
    reference_surprise: list[Floats] = field(default_factory=list)
    agrees: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(
        self,
        reference: npt.NDArray[np.float32],
        logits: npt.NDArray[np.float32],
        targets: npt.NDArray[Any],
    ) -> None:
        """Logits [tokens, vocabulary] of both before each of `targets` [tokens]."""
        step = max(SLICE_BYTES // (8 * reference.shape[1]), 1)
        for first in range(0, len(targets), step):
            part = slice(first, first + step)
            self._add(reference[part], logits[part], targets[part])

    def _add(
        self,
        reference: npt.NDArray[np.float32],
        logits: npt.NDArray[np.float32],
        targets: npt.NDArray[Any],
    ) -> None:
        p, q = log_softmax(reference), log_softmax(logits)
        rows = np.arange(len(targets))
        # Where the reference says that a token cannot be, nothing is added.
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
        self.kl.append(terms.sum(axis=1))
        self.surprise.append(-q[rows, targets])
        self.reference_surprise.append(-p[rows, targets])
        self.agrees.append(reference.argmax(axis=1) == logits.argmax(axis=1))

    def result(self) -> Divergence:
        """Figures over all tokens so far, of which there must be one."""
        kl = np.concatenate(self.kl)
        return Divergence(
            tokens=len(kl),
            perplexity=float(np.exp(np.concatenate(self.surprise).mean())),
            reference_perplexity=float(np.exp(np.concatenate(self.reference_surprise).mean())),
            kl_mean=float(kl.mean()),
            kl_error=float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else 0.0,
            kl_p99=float(np.percentile(kl, 99)),
            kl_max=float(kl.max()),
            agreement=float(np.concatenate(self.agrees).mean()),
        )


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Log-probabilities [tokens, vocabulary] in nats."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    total: Floats = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    shifted -= total
    return shifted
