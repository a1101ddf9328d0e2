"""Heads that predict one representation from another through learned matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from localsim.errors import UserError
from localsim.gradients import constant
from localsim.rules.checks import check_choice, check_count
from localsim.rules.site import Site


class Predictor(nn.Module):
    """Predicts the patches below from those above: one matrix per distance.

        p_k[r] = W_k z[r],    k = 1..steps,    a prediction of z[r + k + skip] at row r

    for the vectors z of an image's patches (Löwe et al. 2019, arXiv 1905.11786, and its released code: W_k has no bias,
    z is target and context at once, 5 steps with skip 1). With `asymmetric` (Illing et al. 2021, arXiv 2010.08262, and
    its released code) no gradient needs to pass a matrix to reach the target, nor the other way round:

        p_k = W1_k constant(z) for a loss f(z, p),    q_k = W2_k z for a loss f(constant(z), q)

    The matrices start from torch's default for convolutions, uniform within +-1 / sqrt(d).

    Args:
        site: its shape is `(d, rows, columns)`.
        steps: number of distances predicted; None for as many as fit, at most 5.
        skip: rows left out between a patch and the first that it predicts; with -1 the first prediction is of the
            same place (in another view).
        asymmetric: two matrices per distance.

    Raises:
        UserError: too few rows for the steps.
    """

    takes = "patches"
    gives = "predictions"

    def __init__(self, site: Site, steps: int | None = None, skip: int = 1, asymmetric: bool = False) -> None:
        super().__init__()
        check_count("predictor", "skip", skip, at_least=-1)
        check_choice("predictor", "asymmetric", asymmetric, (False, True))
        dimensions, rows, _ = site.shape
        fitting = rows - 1 - skip
        if steps is None:
            steps = max(1, min(5, fitting))
        check_count("predictor", "steps", steps, at_least=1)
        if steps > fitting:
            raise UserError(
                f"predictor needs {steps + skip + 1} or more rows of patches for steps={steps} and skip={skip}, "
                f"but there are {rows}; take larger images, smaller patches, a smaller stride, fewer steps or less skip"
            )
        self.matrices = _matrices(dimensions, steps)
        self.context_matrices = _matrices(dimensions, steps) if asymmetric else None

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return `(z, p_1, ..., p_K)`, with `q_1, ..., q_K` after them if asymmetric, each `(n, d, rows, columns)`."""
        if self.context_matrices is None:
            return (z, *(matrix(z) for matrix in self.matrices))
        context = constant(z)
        return (z, *(matrix(context) for matrix in self.matrices), *(matrix(z) for matrix in self.context_matrices))


def _matrices(dimensions: int, steps: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(dimensions, dimensions, 1, bias=False) for _ in range(steps))


class FeedbackPredictor(nn.Module):
    """Predicts the stage's vector for another view from the activity of the highest stage (direct feedback).

        p = B mean_positions(top),    with `lateral`:  p = B mean_positions(top) + L constant(z)

    CLAPP++ with direct feedback (Wu et al. 2026, arXiv 2601.21683; released code zihan-wu/local-SSL with
    `asymmetric_W_pred`, where the context is activity without gradient; `lateral` is its `predict_module_num both`):
    B and L have no bias and are learned by the same local loss, and no gradient comes down from the top. As there, both
    are one linear layer of the joined contexts with torch's default initialisation, so B = weight[:, :top channels].
    That code can also keep several positions of the top stage's map; this always takes the mean.

    Args:
        site: its shape is `(d,)`.
        lateral: predict from the stage's own vector too.
    """

    takes = "vector"
    gives = "predictions"
    context = "top"
    # options of the objective that this head has a meaning with
    implies: ClassVar[dict[str, str]] = {"pair": "views"}

    def __init__(self, site: Site, lateral: bool = False) -> None:
        super().__init__()
        check_choice("feedback_predictor", "lateral", lateral, (False, True))
        dimensions, top_channels = site.shape[0], site.top_shape[0]
        self.lateral = lateral
        self.matrix = nn.Linear(top_channels + (dimensions if lateral else 0), dimensions, bias=False)

    def forward(self, z: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(z, p)`, each `(n, d, 1, 1)`, for vectors `(n, d)` and maps `(n, top channels, height, width)`."""
        activity = top.mean((2, 3))
        if self.lateral:
            activity = torch.cat([activity, constant(z)], 1)
        return z[:, :, None, None], self.matrix(activity)[:, :, None, None]
