"""How much: presets of backbone, data, widths, batch, optimiser and length. A rule says how, a preset says how much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localsim.backbones import SCALABLE
from localsim.config import Config
from localsim.errors import UserError, one_of

_COMMON: dict[str, Any] = {
    "cuts": "auto",
    "reach": None,
    "credit": None,
    "objective_options": {},
    "head_options": {},
    "provenance": "private",
    "schedule": "simultaneous",
    "feature_cache": False,
    "view_strength": "uniform",
    "transport": "exact",
    "on_collapse": "stop",
    "backbone": "resnet50",
    "backbone_width": 1.0,
    "patches": "none",
    "stem": "imagenet",
    "zero_init_residual": True,
    "data_root": None,
    "train_images": None,
    "test_images": None,
    "momentum": 0.9,
    "probe_protocol": "logistic",
    "probe_images": None,
    "seed": 0,
}

# ResNet-50 within five minutes on two CPU cores; the settings were chosen by trial on the embedded data set. Residual
# branches do not start at zero here: an untrained network would then be a chain of strided shortcuts whose last block
# is at chance by construction, which makes any training look good.
_QUICK: dict[str, Any] = {
    "backbone_width": 0.125,
    "zero_init_residual": False,
    "probe_images": 2000,
    "expand_width": 256,
    "projector": [256, 256, 256],
    "image_size": 32,
    "data": "embedded",
    "augmentation": "small_strong",
    "epochs": 4,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 3e-3,
    "lr_scaling": "none",
    "weight_decay": 1e-4,
    "warmup_epochs": 0.4,
    "final_lr_factor": 0.001,
    "precision": "bf16",
    "channels_last": False,
}

_CIFAR10: dict[str, Any] = {
    **_QUICK,
    "backbone_width": 0.25,
    "zero_init_residual": True,
    "probe_images": 10_000,
    "data": "cifar10",
    "augmentation": "small",
    "expand_width": 512,
    "projector": [512, 512, 512],
    "epochs": 20,
    "batch_size": 128,
    "lr": 2e-3,
    "warmup_epochs": 1.0,
}

# Siddiqui et al. 2023: every number as published (300 epochs of the released train.sh)
_IMAGENET: dict[str, Any] = {
    "expand_width": 2048,
    "projector": [8192, 8192, 8192],
    "image_size": 224,
    "data": "imagenet",
    "augmentation": "barlow_twins",
    "epochs": 300,
    "batch_size": 2048,
    "optimizer": "lars",
    "lr": 0.2,
    "lr_scaling": "linear",
    "weight_decay": 1e-6,
    "warmup_epochs": 10.0,
    "final_lr_factor": 0.001,
    "precision": "bf16",
    "channels_last": True,
    "probe_protocol": "paper",
    "workers": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {**_COMMON, **_QUICK},
    "cifar10": {**_COMMON, **_CIFAR10},
    "stl10": {**_COMMON, **_CIFAR10, "data": "stl10", "image_size": 64},
    "folder": {**_COMMON, **_CIFAR10, "data": "", "image_size": 64},
    "imagenet": {**_COMMON, **_IMAGENET},
}
"""`quick` runs where nothing is named, `folder` where `data` is a folder of images."""

_PRESET_OF_DATA = {
    "embedded": "quick",
    "cifar10": "cifar10",
    "cifar100": "cifar10",
    "stl10": "stl10",
    "imagenet": "imagenet",
}
SUPERVISED: dict[str, Any] = {
    # crops and flips, SGD with momentum, 0.1 per 256 images, as supervised residual networks use (He et al. 2016)
    "augmentation": "crop_flip",
    "optimizer": "sgd",
    "lr": 0.1,
    "lr_scaling": "linear",
    "weight_decay": 1e-4,
}
"""The recipe of runs whose losses all learn from labels, unless the rule or the user says otherwise."""


# what must be of its type before taps can be chosen; Config checks the rest
_TYPES: tuple[tuple[str, type, str], ...] = (
    ("objective", str, "text"),
    ("head", str, "text"),
    ("readout", str, "text"),
    ("objective_options", dict, "a mapping of names to values"),
    ("head_options", dict, "a mapping of names to values"),
)


def resolve(rule: str = "blockwise", preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of a rule under a preset, with `overrides` by field name; None means not given.

    Without a preset, the one of the data set is taken: `quick` for no data, `folder` for a folder of images. Warm-up
    takes at most a quarter of `epochs`, unless `warmup_epochs` is given too.

    Args:
        rule: its name, see `localsim.rules.rules`, or the path of a file that holds one.
        preset: one of `PRESETS`.
        overrides: values of fields of `localsim.config.Config`.

    Raises:
        UserError: unknown rule, preset or field, a value outside its range, or an override that has no meaning for
            the rule.
    """
    from localsim.data import count_classes
    from localsim.rules import get_rule
    from localsim.rules.choices import choose, listed, options_at
    from localsim.rules.noise import Noise
    from localsim.rules.objectives import OBJECTIVES, make_objective, usual_views

    for name, value in (("rule", rule), ("preset", preset), ("data", (overrides or {}).get("data"))):
        if not isinstance(value, str | Path | None):
            raise UserError(f"{name} is {value!r}; allowed: text")
    chosen = get_rule(rule)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name in given:
        if name not in Config.names():
            raise one_of("setting", name, Config.names())
    for name in chosen.settings:
        if name not in Config.names():
            raise UserError(f"rule {chosen.name}: {one_of('setting', name, Config.names())}")
    for name, kind, what in _TYPES:
        if not isinstance(given.get(name, kind()), kind):
            raise UserError(f"{name} is {given[name]!r}; allowed: {what}")
    chosen.check_overrides(given)
    for name in ("data", "data_root"):
        # absolute, so that the run can be resumed and probed from anywhere
        if isinstance(given.get(name), str | Path) and (
            Path(given[name]).is_dir() and given[name] not in _PRESET_OF_DATA
        ):
            given[name] = str(Path(given[name]).resolve())
    if preset is None:
        preset = _PRESET_OF_DATA.get(given.get("data", "embedded"), "folder")
    if preset not in PRESETS:
        raise one_of("preset", preset, PRESETS)
    named = choose(chosen, given)
    names = listed(named["objective"], "objective")
    objectives = [make_objective(n, options_at(named["objective_options"], n, names, 1.0)) for n in names]
    supervised = all(objective.needs_labels for objective in objectives)
    settings = dict(chosen.settings)
    if not supervised and all(OBJECTIVES[name].needs_labels for name in listed(chosen.objective, "objective")):
        # the rule's recipe was made for labels, the preset's is for views
        settings = {name: value for name, value in settings.items() if name not in SUPERVISED}
    values = {
        "granularity": None if given.get("cuts", "auto") not in ("auto", "balanced") else chosen.granularity,
        "noise": str(chosen.noise),
        **PRESETS[preset],
        **(SUPERVISED if supervised else {}),
        **settings,
        **given,
        **named,
        "rule": chosen.name,
        "preset": preset,
    }
    if "backbone_width" in given or values["backbone"] not in SCALABLE:
        values["backbone_width"] = given.get("backbone_width", 1.0)
    if "epochs" in given and "warmup_epochs" not in given and isinstance(values["epochs"], int):
        # a run made shorter than its preset warms up for a quarter of it at most
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
    if not values["data"]:
        raise UserError("preset 'folder' needs --data with a folder of images")
    values.setdefault("views", max(usual_views(objective) for objective in objectives))
    values.setdefault("num_classes", None)
    labelled = "head" in given or any(objective.needs_labels for objective in objectives)
    if labelled and values["num_classes"] is None:
        root = values["data_root"]
        values["num_classes"] = count_classes(values["data"], Path(root) if root else None)
    config = Config(**values)
    Noise.parse(config.noise)
    return config
