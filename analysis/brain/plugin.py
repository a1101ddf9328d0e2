"""A run as a plugin folder of Brain-Score's: weights, code, region-layer map and test, as its `models/` hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from localsim import __version__
from localsim.analysis.brain.models import identifier_of, requests_for
from localsim.analysis.extraction import feature_batches
from localsim.analysis.feature_store import refuse_existing, whole_folder
from localsim.analysis.sources import Source
from localsim.analysis.spatial import POOLED, Reducer
from localsim.assembly import build_credit, build_trunk, open_patches, trunk_size
from localsim.backbones import unit_shapes
from localsim.config import Config
from localsim.errors import UserError
from localsim.files import write_json, write_text
from localsim.network import LocalNetwork, Objective, Stage, Tap
from localsim.rules.choices import at_tap, listed
from localsim.rules.readouts import make_readout
from localsim.runs import Run, opened_run

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "vgg11", "vgg11_bn")
"""Backbones that torchvision alone can rebuild."""
_INIT = """from brainscore_vision import model_registry

from .model import get_model

model_registry['{identifier}'] = get_model
"""
_TEST = """import brainscore_vision


def test_has_identifier():
    assert brainscore_vision.load_model('{identifier}').identifier == '{identifier}'
"""
_README = """# {identifier}

The {which} network of the localsim run `{run}`: backbone {backbone}, rule `{rule}`, seed {seed}, images {data} at
{size} px; exported by localsim {version}. `model.py` needs {needs}.

| region | layer |
|---|---|
{regions}

Of every layer Brain-Score is given {features}. Images span {degrees:g} degrees of visual angle.

- To score it: put this folder into `brainscore_vision/models/` of a checkout of Brain-Score and call
  `brainscore_vision.score('{identifier}', BENCHMARK)`.
  Set BS_INSTALL_DEPENDENCIES=no unless pip should run.
- To submit it: follow Brain-Score's guide for model plugins. weights.safetensors has {megabytes:.1f} MB; where a
  submission may not be as large, upload the file as the guide says and load it from there in `model.py`.
- SHA-256 of weights.safetensors, which `model.py` checks: `{digest}`.
"""


def export_plugin(
    run: Run | str | Path,
    folder: str | Path,
    *,
    region_layers: Mapping[str, str],
    identifier: str | None = None,
    degrees: float = 8,
    spatial: str = POOLED,
    which: str | int = "trained",
) -> str:
    """Write a run as a plugin folder for Brain-Score and return the identifier under which it is registered.

    The plugin gives the activations that `brain_model` gives. Where the backbone is torchvision's and the layers are
    stages, unit blocks or modules, it needs torch, torchvision and safetensors only, and layers get torchvision's
    names; otherwise it needs localsim, but not the file of a rule of one's own.

    Args:
        run: a run or its folder.
        folder: to be made; its name becomes that of a package.
        region_layers: the layer that stands for each region, such as `{"V4": "stage2", "IT": "stage3"}`.
        identifier: by default `identifier_of` the network, which holds the hash of its weights.
        degrees: width of the images in degrees of visual angle.
        spatial: see `localsim.analysis.spatial`.
        which: `trained`, `untrained`, or the step of a snapshot.

    Raises:
        UserError: the folder exists or cannot be written, its name or the identifier has characters that Brain-Score
            cannot take, there are no such weights or layers, or maps have no such regions.
    """
    opened, folder, reducer = opened_run(run), Path(folder), Reducer(spatial)
    refuse_existing(folder)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", folder.name):
        raise UserError(f"folder {folder.name!r} cannot be a plugin's; allowed in its name: letters, digits, _ and -")
    if not region_layers:
        raise UserError("no region has a layer; name some, such as V4=stage2 IT=stage3")
    if not 0 < degrees < 180:
        raise UserError(f"degrees is {degrees!r}; allowed: above 0 and below 180 degrees of visual angle")
    source = Source.of(opened, which=which).whole()
    asked = requests_for(source, list(region_layers.values()))
    grey = torch.full((1, 3, opened.config.image_size, opened.config.image_size), 127, dtype=torch.uint8)
    for _ in feature_batches(source, grey, **asked, spatial=spatial):
        pass  # refuses regions that are finer than a map, which torch would make up
    identifier = identifier_of(source, reducer) if identifier is None else identifier
    if not re.fullmatch(r"[A-Za-z0-9._-]+", identifier):
        raise UserError(f"identifier {identifier!r} cannot be a plugin's; allowed: letters, digits, dot, _ and -")
    alone = _torchvision_layers(opened, source.network, region_layers, spatial)
    layers = alone or dict(region_layers)
    try:
        with whole_folder(folder) as partial:
            _write(partial, opened, source, layers, identifier, degrees, spatial, which, bool(alone))
    except OSError as error:
        raise UserError(f"plugin {folder} cannot be written: {error.strerror or error}") from None
    return identifier


def network_without_heads(config: Config) -> LocalNetwork:
    """Return the trunk of a configuration with its readouts, untrained; heads are left out, and noise at boundaries.

    Needs no rule where the configuration has a credit matrix.
    """
    backbone, stages = build_trunk(config)
    credit, shapes = build_credit(config, len(stages)), unit_shapes(backbone, trunk_size(config))
    patches = open_patches(config)
    grid = patches.grid(config.image_size) if patches else None
    names = listed(config.readout, "readout")
    taps = []
    for tap, stage in enumerate(credit.taps):
        name, shape = at_tap(names, tap, credit.num_taps, "readout"), shapes[stages[stage][-1]]
        readout = make_readout(name, shape, expand_width=config.expand_width, grid=grid)
        taps.append(Tap(stage, readout, nn.Identity(), cast(Objective, None)))  # nothing here asks for a loss
    cut = [Stage([backbone.units[unit] for unit in units]) for units in stages]
    return LocalNetwork(cut, taps, credit, patches=patches, image_size=config.image_size)


def _torchvision_layers(run: Run, network: Any, region_layers: Mapping[str, str], spatial: str) -> dict[str, str]:
    """Return the layers under torchvision's names; none if the network or what is read of it is not torchvision's."""
    assert isinstance(network, LocalNetwork)
    # noise at the boundaries is that of training only
    if run.config.backbone not in TORCHVISION or run.config.patches != "none" or spatial.startswith("project"):
        return {}
    ends = {f"stage{place + 1}": stage.units[-1].part_names[-1] for place, stage in enumerate(network.stages)}
    ends |= {unit.name: unit.part_names[-1] for unit in network.units}
    parts = [(name, part) for unit in network.units for name, part in zip(unit.part_names, unit.parts, strict=True)]
    ends |= {inner: inner for name, part in parts for inner, _ in part.named_modules(prefix=name) if inner not in ends}
    if not set(region_layers.values()) <= ends.keys():
        return {}
    return {region: ends[layer] for region, layer in region_layers.items()}


def _write(
    folder: Path,
    run: Run,
    source: Source,
    region_layers: dict[str, str],
    identifier: str,
    degrees: float,
    spatial: str,
    which: str | int,
    alone: bool,
) -> None:
    network, config = source.network, run.config
    assert isinstance(network, LocalNetwork)
    tensors = network.trunk_state_dict()
    if not alone:  # heads are gone, so these are readouts'
        tensors |= {f"taps.{name}": tensor for name, tensor in network.taps.state_dict().items()}
        # with its matrix in place of the rule's, whose file may not be where the plugin is loaded
        write_json(folder / "config.json", replace(config, credit=network.credit.to_config(), reach=None).to_json())
    weights = folder / "weights.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
    digest = sha256(weights.read_bytes()).hexdigest()
    look = {"size": source.size, "mean": source.mean, "std": source.std, "grey": source.grey, "crop": source.crop}
    built = {"backbone": config.backbone, "stem": config.stem} if alone else {}
    settings = {"identifier": identifier, "degrees": degrees, "spatial": spatial, "weights_sha256": digest}
    write_json(folder / "settings.json", {**settings, **look, **built})
    write_json(folder / "region_layer_map" / f"{identifier}.json", region_layers)
    template = Path(__file__).with_name("plugin_torchvision.py" if alone else "plugin_localsim.py")
    write_text(folder / "model.py", template.read_text(encoding="utf-8"))
    write_text(folder / "__init__.py", _INIT.format(identifier=identifier))
    write_text(folder / "test.py", _TEST.format(identifier=identifier))
    needs = ("torch", "torchvision", "safetensors") if alone else ("localsim",)
    write_text(folder / "requirements.txt", "\n".join(needs) + "\n")
    reduced = {"flatten": "all numbers", "mean": "the mean over positions"}
    features = reduced.get(spatial, f"the means over {spatial} regions" if "x" in spatial else f"{spatial}, a random "
                           "projection")  # fmt: skip
    text = _README.format(
        identifier=identifier,
        run=run.path.name,
        which=which if isinstance(which, str) else f"{which} steps old",
        backbone=config.backbone,
        rule=config.rule,
        seed=config.seed,
        data=Path(config.data).name,
        size=config.image_size,
        version=__version__,
        needs=", ".join(needs),
        regions="\n".join(f"| {region} | {layer} |" for region, layer in region_layers.items()),
        features=features,
        degrees=degrees,
        megabytes=weights.stat().st_size / 1e6,
        digest=digest,
    )
    write_text(folder / "README.md", text)
