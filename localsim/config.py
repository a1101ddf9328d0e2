"""The configuration of a run: every choice that decides its numbers, resolved, in one flat record."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localsim.errors import UserError, one_of
from localsim.transport import TRANSPORTS


@dataclass(frozen=True, kw_only=True)
class Config:
    """A resolved configuration; `localsim.presets.resolve` makes one from a rule, a preset and overrides.

    It is written to `config.json` in the run folder, and a run is rebuilt from it alone.
    """

    # what is learned where
    rule: str
    preset: str
    granularity: int | str | None  # number of stages, or network, stage, block; None: what `cuts` lists
    cuts: str  # auto, balanced, or the unit blocks at which stages begin
    reach: int | None  # stages down that every tap's credit goes; None: the rule's own matrix
    credit: dict[str, Any] | None  # an explicit matrix (Credit.to_config); None: the rule's, or by reach
    objective: str  # one for all taps, or one per tap: "barlow_twins,vicreg,vicreg"; readout and head likewise
    objective_options: dict[str, Any]  # {"from": a, "to": b} runs from the lowest tap to the highest
    readout: str
    head: str
    head_options: dict[str, Any]
    expand_width: int  # channels of the `expand` readout
    projector: list[int]  # widths of the projector's layers
    provenance: str  # of readouts and heads. private: drawn per tap; identical: heads are copies of one draw; frozen
    noise: str  # none, or kind:sigma
    schedule: str  # simultaneous, or sequential: one tap after the other, bottom-up, what lies below its reach frozen
    feature_cache: bool  # sequential: keep the frozen stages' outputs on disk, with one draw of views per tap
    view_strength: str  # uniform, or receptive_field: augmentation scaled with what a stage sees of the image
    transport: str  # how a gradient crosses a layer, see localsim.transport
    on_collapse: str  # stop, or continue
    # network
    backbone: str
    backbone_width: float  # relative width of the networks without normalisation (vgg6, preact_resnet50)
    patches: str  # none, or size:stride in pixels: images enter the network cut into patches
    stem: str
    zero_init_residual: bool
    image_size: int  # side of the square training images, in pixels
    # data
    data: str  # a data set's name, or a folder of images
    num_classes: int | None  # width of classifiers; None without labels
    data_root: str | None = field(metadata={"free": True})  # where torchvision keeps its data sets
    train_images: int | None  # a class-balanced part of the training images; None: all
    test_images: int | None
    augmentation: str
    views: int  # of every image, in every step
    # training
    epochs: int
    batch_size: int
    optimizer: str
    lr: float  # peak learning rate; with lr_scaling "linear", per 256 images of the batch
    lr_scaling: str  # linear or none
    weight_decay: float
    momentum: float  # LARS and SGD
    warmup_epochs: float
    final_lr_factor: float  # the cosine ends at this part of the peak
    precision: str  # full or bf16
    channels_last: bool
    seed: int
    # probe at the end of the run
    probe_protocol: str  # logistic, paper (Siddiqui et al. 2023), or none
    probe_images: int | None  # training images that the probes see; None: all
    log_every: int = 10  # steps between lines of metrics
    # how it is computed: the same but for rounding, and what rounding does to a run
    readout_impl: str = "auto"  # of `expand`: auto, fused (its map is never made) or plain
    recompute: str = "none"  # none, or units: keep only what enters each unit block, and run it again in the backward
    compile: bool = False  # run every stage through torch.compile
    # how it is run: does not change the numbers, may differ when a run is resumed
    max_steps: int | None = field(default=None, metadata={"free": True})  # stop after so many; the schedule stays
    device: str = field(default="auto", metadata={"free": True})
    workers: int = field(default=0, metadata={"free": True})  # processes that decode streamed images
    parallel: str = field(default="data", metadata={"free": True})  # what several processes divide: data, blocks
    timeout_seconds: float = field(default=600.0, metadata={"free": True})  # the longest wait for another process
    checkpoint_minutes: float = field(default=5.0, metadata={"free": True})  # besides the end of every epoch
    snapshot_every: int = field(default=0, metadata={"free": True})  # keep the weights after every n-th epoch; 0: none

    def __post_init__(self) -> None:
        for name in ("lr", "image_size", "epochs", "backbone_width"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value < math.inf):
                raise UserError(f"{name} is {value!r}; allowed: numbers above 0")
        if self.backbone_width > _WIDEST:
            raise UserError(f"backbone_width is {self.backbone_width:g}; allowed: numbers above 0, up to {_WIDEST}")
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if not (_may_be_none(name, value) or (_is_number(value) and low <= value < math.inf)):
                raise UserError(f"{name} is {value!r}; allowed: numbers from {low}")
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}")
        if not isinstance(self.patches, str):
            raise UserError(f"patches is {self.patches!r}; allowed: none, or SIZE:STRIDE in pixels, e.g. 16:8")
        for name in _TEXT:
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} is {getattr(self, name)!r}; allowed: text")
        for name in (*_TEXT, "granularity", "data_root"):
            if _NO_TEXT.search(str(getattr(self, name))) or len(str(getattr(self, name))) > _LONGEST:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; allowed: at most {_LONGEST} characters that can be printed"
                )
        for name in ("credit", "objective_options", "head_options"):
            value = getattr(self, name)
            if not (isinstance(value, dict) or (name == "credit" and value is None)):
                raise UserError(f"{name} is {value!r}; allowed: a mapping of names to values")
        if self.rule.endswith(".py"):
            # a configuration comes with a run folder, perhaps a stranger's: it names rules, it never runs files
            raise UserError(f"rule is {self.rule!r}, a file; allowed: the name of a rule")
        if not (self.data_root is None or isinstance(self.data_root, str)):
            raise UserError(f"data_root is {self.data_root!r}; allowed: the path of a folder")
        if isinstance(self.granularity, bool) or not isinstance(self.granularity, int | str | None):
            raise UserError(f"granularity is {self.granularity!r}; allowed: a number, network, stage, block")
        for name in _WHOLE:
            value = getattr(self, name)
            if not (_may_be_none(name, value) or (isinstance(value, int) and not isinstance(value, bool))):
                raise UserError(f"{name} is {value!r}; allowed: whole numbers")
            if value is not None and abs(value) >= (limit := 2**63 if name == "seed" else 2**31):
                raise UserError(f"{name} is {value!r}; allowed: whole numbers below {limit}")
        widths = self.projector
        if not (isinstance(widths, list | tuple) and all(type(w) is int and 1 <= w < 2**31 for w in widths) and widths):
            raise UserError(f"projector is {widths!r}; allowed: a list of whole numbers above 0, e.g. [256, 256]")
        object.__setattr__(self, "projector", list(widths))  # a tuple would differ from what config.json gives back
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs:g}, which must be below epochs ({self.epochs})")
        if self.schedule != "sequential":
            for name, value, reason in (
                ("view_strength", "receptive_field", "in one pass all stages see the same views"),
                ("feature_cache", True, "without frozen stages there is nothing to keep"),
            ):
                if getattr(self, name) == value:
                    raise UserError(f"{name} {value} needs schedule sequential: {reason}")
        if self.recompute != "none" and self.compile:
            raise UserError("recompute units and compile contradict each other: what is compiled chooses what it keeps")
        if self.recompute != "none" and self.transport == "direct_feedback":
            raise UserError(
                "recompute units cannot serve transport direct_feedback, which listens to layers as they run"
            )
        if self.readout_impl == "fused" and self.transport not in ("exact", "direct_feedback"):
            raise UserError(
                f"readout_impl fused cannot carry transport {self.transport}, which needs the readout's layers one by "
                "one; allowed: auto, plain"
            )
        if self.readout_impl != "auto" and "expand" not in self.readout:
            raise UserError(
                f"readout_impl {self.readout_impl} has no meaning for readout {self.readout}: expand alone has two ways"
            )
        if self.reach is not None and self.credit is not None:
            raise UserError("reach and an explicit credit matrix contradict each other; give one of them")

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all fields, which are what `--set` takes."""
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str | Path) -> Config:
        """Return the configuration that a `config.json` holds; UserError naming `source` if it holds something else."""
        if not isinstance(values, Mapping):
            raise UserError(f"{source} is not a configuration: it holds {type(values).__name__}, not named entries")
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in known]
        missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
        if unknown or missing:
            told = [repr(name)[1:-1] for name in unknown[:5]] + ["..."] * (len(unknown) > 5)
            said = [f"unknown entries {', '.join(told)}"] * bool(unknown)
            said += [f"missing entries {', '.join(missing)}"] * bool(missing)
            raise UserError(f"{source} is not a configuration of this version of localsim: {'; '.join(said)}")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the plain values of all fields."""
        return dataclasses.asdict(self)

    def changed_by(self, overrides: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the fields that `overrides` would change and that decide the numbers: name -> (here, there).

        Raises:
            UserError: there is no such field.
        """
        for name in overrides:
            if name not in self.names():
                raise one_of("setting", name, self.names())
        other = dataclasses.replace(self, **overrides)
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in overrides
            if name not in FREE and getattr(self, name) != getattr(other, name)
        }


FREE = tuple(f.name for f in dataclasses.fields(Config) if f.metadata.get("free"))
"""Fields that do not change a run's numbers."""

_WIDEST = 100
_LONGEST = 4096  # what a path may have
_NO_TEXT = re.compile("[\x00-\x1f\ud800-\udfff]")  # control characters, and halves of characters
_AT_LEAST = {
    "expand_width": 1,
    "num_classes": 2,
    "views": 1,
    "train_images": 1,
    "test_images": 1,
    "batch_size": 2,
    "weight_decay": 0,
    "momentum": 0,
    "warmup_epochs": 0,
    "final_lr_factor": 0,
    "seed": 0,
    "probe_images": 1,
    "max_steps": 1,
    "workers": 0,
    "log_every": 1,
    "checkpoint_minutes": 0,
    "timeout_seconds": 1,
    "snapshot_every": 0,
}
_WHOLE = (
    "reach", "expand_width", "num_classes", "views", "image_size", "train_images", "test_images", "epochs",
    "batch_size", "seed", "probe_images", "max_steps", "workers", "log_every",
    "snapshot_every",
)  # fmt: skip
_TEXT = ("rule", "preset", "cuts", "objective", "readout", "head", "noise", "backbone", "patches", "stem", "data",
         "augmentation", "optimizer", "lr_scaling", "precision", "probe_protocol", "device", "parallel")  # fmt: skip
_ONE_OF = {
    "provenance": ("private", "identical", "frozen"),
    "schedule": ("simultaneous", "sequential"),
    "feature_cache": (True, False),
    "view_strength": ("uniform", "receptive_field"),
    "transport": TRANSPORTS,
    "on_collapse": ("stop", "continue"),
    "lr_scaling": ("linear", "none"),
    "precision": ("full", "bf16"),
    "probe_protocol": ("logistic", "paper", "none"),
    "zero_init_residual": (True, False),
    "channels_last": (True, False),
    "readout_impl": ("auto", "fused", "plain"),
    "recompute": ("none", "units"),
    "compile": (True, False),
}


_OPTIONAL = {f.name for f in dataclasses.fields(Config) if "None" in f.type}  # pyright: ignore[reportOperatorIssue]


def _may_be_none(name: str, value: Any) -> bool:
    return value is None and name in _OPTIONAL


def _is_number(value: Any) -> bool:
    # whole numbers in JSON have any length; what no float can hold ends in an overflow sooner or later
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
