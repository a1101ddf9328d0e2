"""Networks by name: torchvision's and timm's, untrained, with their published weights, or with those of a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

from torch import nn

from localsim.data.datasets import Triple
from localsim.errors import UserError, one_of
from localsim.interop import read_weights
from localsim.opening import open_device
from localsim.rng import keyed

NAMED = ("torchvision:", "timm:")
"""What the names of networks begin with."""
_CLASSIFIERS = ("fc", "classifier")


def open_named(text: str, seed: int) -> dict[str, Any]:
    """Return `network`, `size`, `mean` and `std` of `torchvision:NAME[:WEIGHTS or FILE]` or `timm:NAME[:pretrained]`.

    The network is in evaluation mode on a CUDA device where there is one. Untrained ones are drawn by the key that the
    trunks of runs are drawn by.

    Raises:
        UserError: there is no such network, weights or file, weights do not fit or cannot be downloaded, or timm is
            not installed.
    """
    library, name, weights = [*text.split(":", 2), ""][:3]
    made = (_torchvision if library == "torchvision" else _timm)(name, weights, seed)
    made["network"].eval().to(open_device("auto"))
    return made


def _torchvision(name: str, weights: str, seed: int) -> dict[str, Any]:
    from torchvision import models

    if name not in (known := models.list_models()):
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise UserError(f"torchvision has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    published = models.get_model_weights(name)
    if weights and weights != "DEFAULT" and weights not in published.__members__ and not Path(weights).is_file():
        allowed = ", ".join(dict.fromkeys(["DEFAULT", *published.__members__]))
        raise UserError(f"{weights!r} is neither a file nor weights of torchvision's {name}; allowed: {allowed}")
    chosen = (
        published[weights]
        if weights in published.__members__
        else published["DEFAULT"]
        if weights == "DEFAULT"
        else None
    )
    with keyed(seed, "init", "trunk"):
        network = _fetched(f"torchvision:{name}:{weights}", lambda: models.get_model(name, weights=chosen))
    if weights and chosen is None:
        _load_file(network, Path(weights))
    shown = (chosen or published["DEFAULT"]).transforms()
    size = getattr(shown, "crop_size", [None])[0]
    mean, std = (tuple(getattr(shown, what)) if hasattr(shown, what) else None for what in ("mean", "std"))
    return {"network": network, "size": size, "mean": mean, "std": std}


def _timm(name: str, weights: str, seed: int) -> dict[str, Any]:
    try:
        import timm  # type: ignore[import-not-found]
        from timm.data import resolve_model_data_config  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(f"timm:{name} needs timm, which is not installed; install it with `pip install timm`") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        raise UserError(f"timm has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    if weights not in ("", "pretrained"):
        raise one_of("weights of timm's networks", weights, ("pretrained", "none, which is untrained"))
    with keyed(seed, "init", "trunk"):
        network = _fetched(f"timm:{name}", lambda: timm.create_model(name, pretrained=bool(weights)))
    shown = resolve_model_data_config(network)
    return {"network": network, "size": shown["input_size"][-1], "mean": cast(Triple, tuple(shown["mean"])),
            "std": cast(Triple, tuple(shown["std"]))}  # fmt: skip


def _fetched(what: str, make: Any) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise UserError(f"{what} could not be had: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _load_file(network: nn.Module, path: Path) -> None:
    """Load a file of weights under torchvision's names in place; an identity stands for a classifier that it lacks.

    Raises:
        UserError: the file cannot be read, or an entry is missing, unexpected or of another shape.
    """
    state = read_weights(path)
    for name in _CLASSIFIERS:
        if hasattr(network, name) and not any(entry.startswith(f"{name}.") for entry in state):
            setattr(network, name, nn.Identity())  # drawn at random it would pass for a trained layer
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from None
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} does not fit: {what} {names[0]}{more}")
