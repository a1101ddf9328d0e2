"""A backbone cut into stages, with taps: what the engine runs. Nothing here knows of any particular rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from localsim.backbones import UnitBlock, load_trunk_state_dict, trunk_state_dict
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.patches import Patches
from localsim.recompute import rerun

Embedding = Tensor | tuple[Tensor, ...]
"""What a head makes of a readout: a vector per image `(n, d)`, or several tensors, the first one entry per image."""

IMAGES = -1
"""The context that is below all stages: h_0, the images."""


def tensors_of(z: Embedding) -> tuple[Tensor, ...]:
    """Return the tensors of an embedding, the one that has an entry per image first."""
    return (z,) if isinstance(z, Tensor) else z


class Objective(Protocol):
    """What a tap minimises."""

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        """Return the scalar loss of the embeddings of every view, with labels `(n,)` or None."""
        ...

    def chance_level(self, num_dimensions: int, batch_size: int) -> float | None:
        """Return the loss to expect of views that have nothing in common, or None if there is no such number."""
        ...


M = TypeVar("M", bound=nn.Module)


class ModuleListOf(nn.ModuleList, Generic[M]):
    """An `nn.ModuleList` whose type says what it holds."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...  # type: ignore[override]
        def __getitem__(self, idx: int) -> M: ...  # type: ignore[override]


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything listens to the calls of a module itself."""
    return any(
        hooks
        for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        if (hooks := getattr(module, name))
    )


class Stage(nn.Module):
    """Consecutive unit blocks between two cuts, followed by what happens at the boundary (noise, or nothing).

    Args:
        units: from the input up.
        boundary: what happens to the last one's output.
        recompute: keep only what enters each unit block, and run the block again when its gradients are computed
            (Chen et al. 2016, arXiv 1604.06174). The gradients are the same bits; running statistics move once.
    """

    def __init__(
        self, units: Sequence[UnitBlock], boundary: nn.Module | None = None, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.units = ModuleListOf[UnitBlock](units)
        self.boundary = nn.Identity() if boundary is None else boundary
        self.recompute = recompute
        self._compiled: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        """The unit blocks it spans, e.g. `stem..layer1.2`."""
        names = [unit.name for unit in self.units]
        return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"

    def compile_units(self) -> None:
        """Train the unit blocks through `torch.compile` from now on; without gradients, or in a copy, they run as ever.

        What happens at the boundary is not compiled: it keeps its draws.
        """
        self._compiled = torch.compile(self._run_units, dynamic=False)

    def __getstate__(self) -> dict[str, Any]:
        # what is compiled is bound to this very stage, and a copy has weights of its own
        return {**super().__getstate__(), "_compiled": None}

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output map for the map (or images) `x`."""
        compiled = self._compiled if torch.is_grad_enabled() else None
        return self.boundary((compiled or self._run_units)(x))

    def _run_units(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = rerun(unit, x) if self.recompute and torch.is_grad_enabled() else unit(x)
        return x


class Tap(nn.Module):
    """A place where a local loss reads: the output of one stage, through a readout and a head.

    Args:
        stage: the stage it reads, from 0.
        readout: map `(batch, channels, height, width)` to vectors.
        head: vectors to embeddings; private to this tap.
        objective: what it minimises, a function of the embeddings of all views and the labels.
        context: a stage whose detached output `head(readout, output)` also needs: one above, for which the tap then
            waits, or `IMAGES`.
    """

    def __init__(
        self, stage: int, readout: nn.Module, head: nn.Module, objective: Objective, context: int | None = None
    ) -> None:
        super().__init__()
        self.stage = stage
        self.readout = readout
        self.head = head
        self.objective = objective
        self.context = context

    @property
    def fires(self) -> int:
        """The stage after whose forward pass its loss can be computed."""
        return self.stage if self.context is None else max(self.stage, self.context)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Embedding:
        """Return the embedding of a stage output `h`."""
        read = self.readout(h)
        return self.head(read) if context is None else self.head(read, context)

    def embed_views(
        self,
        maps: Sequence[Tensor],
        contexts: Sequence[Tensor | None],
        draws: Callable[[int], AbstractContextManager[object]],
    ) -> list[Embedding]:
        """Return the embedding of every view, each read with random draws of its own: `draws(view)`.

        A head with `forward_views` maps what was read of all views at once, so that its weights are read, and their
        gradients made, once. It must give each view what calling it view after view gives, and draw nothing. Where
        hooks listen to the tap or its head, it is called view after view.
        """
        if self.context is None and self._takes_views():
            reads = []
            for view, h in enumerate(maps):
                with draws(view):
                    reads.append(self.readout(h))
            return list(cast(Any, self.head).forward_views(reads))
        made = []
        for view, (h, context) in enumerate(zip(maps, contexts, strict=True)):
            with draws(view):
                made.append(self(h, context))
        return made

    def _takes_views(self) -> bool:
        """Return whether the head's `forward_views` stands for its `forward`, which a subclass or hook may change."""
        owners = {
            name: next((kind for kind in type(self.head).__mro__ if name in vars(kind)), None)
            for name in ("forward", "forward_views")
        }
        views, alone = owners["forward_views"], owners["forward"]
        if views is None or alone is None or not issubclass(views, alone):
            return False
        return not (has_hooks(self) or has_hooks(self.head))

    def embed(self, outputs: Mapping[int, Tensor]) -> Embedding:
        """Return the embedding of what the stages gave: outputs by the stage's index, the images as `IMAGES`."""
        return self(outputs[self.stage], None if self.context is None else outputs[self.context])


class LocalNetwork(nn.Module):
    """Stages, taps and the credit matrix that joins them.

    Args:
        stages: from the input up.
        taps: one per row of `credit`, in its order.
        credit: which tap may change which stage.
        patches: cut every image into patches, which pass the stages as a larger batch: stage outputs then have
            `batch * patches_per_image` entries, those of one image in a row.
        image_size: side of the images in pixels, where they are cut into patches.
        transport: how gradients cross the stages' layers, see `localsim.transport`.

    Raises:
        UserError: taps, stages and credit do not fit together.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        taps: Sequence[Tap],
        credit: Credit,
        *,
        patches: Patches | None = None,
        image_size: int | None = None,
        transport: str = "exact",
    ) -> None:
        super().__init__()
        if credit.num_stages != len(stages):
            raise UserError(f"the credit matrix has {credit.num_stages} stages but the network has {len(stages)}")
        if credit.taps != tuple(tap.stage for tap in taps):
            raise UserError(f"the credit matrix has taps on {credit.taps}, the network on {[t.stage for t in taps]}")
        self.stages = ModuleListOf[Stage](stages)
        self.taps = ModuleListOf[Tap](taps)
        self.credit = credit
        self.patches = patches
        self.patches_per_image = 1
        if patches is not None:
            if image_size is None:
                raise ValueError("patches need the size of the images")
            self.patches_per_image = math.prod(patches.grid(image_size))
        self.transport = transport

    @property
    def units(self) -> list[UnitBlock]:
        """All unit blocks, from the input up."""
        return [unit for stage in self.stages for unit in stage.units]

    @property
    def units_per_stage(self) -> list[int]:
        """How many unit blocks each stage spans."""
        return [len(stage.units) for stage in self.stages]

    def compile_stages(self) -> None:
        """Train every stage through `torch.compile` from now on, see `Stage.compile_units`."""
        from torch._dynamo import config  # slow to import

        # all stages share one code object, of which torch compiles so many variants and runs the others uncompiled
        config.cache_size_limit = max(config.cache_size_limit, 4 * len(self.stages))
        for stage in self.stages:
            stage.compile_units()

    @property
    def device(self) -> torch.device:
        """Where its parameters are, those without memory (on other processes) apart."""
        here = (parameter.device for parameter in self.parameters() if not parameter.is_meta)
        return next(here, torch.device("cpu"))

    def stage_outputs(self, x: Tensor, start: int = 0) -> Iterator[Tensor]:
        """Yield the output map of every stage from `start` on, lowest first.

        `x` are images `(batch, 3, height, width)`, above stage 0 outputs of stage `start - 1`.
        """
        x = x if start else self.fold(x)
        for stage in list(self.stages)[start:]:
            x = stage(x)
            yield x

    def fold(self, images: Tensor) -> Tensor:
        """Return what enters the first stage: the images `(batch, 3, height, width)`, or their patches."""
        return images if self.patches is None else self.patches.fold(images)

    def pooled(self, h: Tensor) -> Tensor:
        """Return a stage output averaged over positions, and patches, of every image: `(batch, channels)`.

        Averaged in float32 at least.
        """
        means = h.mean((2, 3), dtype=None if h.dtype == torch.float64 else torch.float32)
        return means if self.patches_per_image == 1 else means.unflatten(0, (-1, self.patches_per_image)).mean(1)

    def end_step(self) -> None:
        """Let the heads that follow the trunk's weights do so; the trainer calls it after every step."""
        for tap in self.taps:
            if hasattr(tap.head, "end_step") and not any(parameter.is_meta for parameter in tap.parameters()):
                cast(Any, tap.head).end_step(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's output map; gradients flow as in any network, only the engine cuts the graph."""
        for out in self.stage_outputs(x):
            x = out
        return x

    def trunk_state_dict(self) -> dict[str, Tensor]:
        """Return the trunk's weights under torchvision's names: they load into the torchvision model with strict=True.

        Give that model `fc = torch.nn.Identity()` (`classifier` for a VGG) first: a trunk has no classifier.
        """
        return trunk_state_dict(self.units)

    def load_trunk_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights under torchvision's names; raises UserError if they are of another architecture."""
        load_trunk_state_dict(self.units, state)
