"""Running a module again in the backward instead of keeping what its forward computed."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def rerun(module: nn.Module, x: Tensor) -> Tensor:
    """Return `module(x)`, of whose graph only `x` is kept: its backward runs the module once more.

    Random draws are repeated and running statistics stay where the first run left them, so gradients and buffers are
    the same bits as without.
    """
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _WithoutTracking(module)))


class _WithoutTracking:
    """A context in which batch norms in training mode normalise as ever and do not move their running statistics.

    It may be entered again, for a graph that is kept runs its module at every backward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            # the statistics themselves must still be given: the graph is checked to keep what it kept the first time
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_error: object) -> None:
        for norm, momentum, batches in self.before:
            norm.momentum, norm.num_batches_tracked = momentum, batches
