"""The file `model.py` of a plugin for Brain-Score whose network only localsim can build; `export_plugin` copies it.

What differs from network to network is in config.json, the run's configuration, and settings.json: how images are
shown, which layers stand for which regions and how they are pooled.
"""

import hashlib
import json
import os
from pathlib import Path

from brainscore_vision.model_helpers.brain_transformation import ModelCommitment  # type: ignore[import-not-found]

from localsim.analysis.brain.models import brain_model
from localsim.analysis.brain.plugin import network_without_heads
from localsim.analysis.sources import Source
from localsim.config import Config
from localsim.network import LocalNetwork
from localsim.runs import load_tensors

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
DEFAULTS = {
    "BRAINSCORE_HOME": "~/.brain-score",
    "BRAINIO_HOME": "~/.brainio",
    "RESULTCACHING_HOME": "~/.result_caching",
    "RESULTCACHING_DISABLE": "0",
    "MT_HOME": "~/.model-tools",
}


def get_network() -> LocalNetwork:
    """Return the run's network with the exported weights of its trunk and readouts, without heads."""
    weights, config = HERE / "weights.safetensors", HERE / "config.json"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SETTINGS["weights_sha256"]:
        raise ValueError(f"{weights} does not hold the weights that were exported: its SHA-256 is another")
    network = network_without_heads(Config.from_json(json.loads(config.read_text(encoding="utf-8")), config))
    tensors = load_tensors(weights)
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("taps.")}
    network.load_trunk_state_dict(trunk)
    network.taps.load_state_dict({name.removeprefix("taps."): tensors[name] for name in tensors.keys() - trunk.keys()})
    return network.eval()


def get_model() -> ModelCommitment:
    """Return the network as Brain-Score's BrainModel."""
    for variable, default in DEFAULTS.items():
        # Brain-Score, which loads this file, keeps its own ways: where they are not set, localsim would set others
        os.environ.setdefault(variable, str(Path(default).expanduser()))
    identifier, look = SETTINGS["identifier"], ("size", "mean", "std", "grey", "crop")
    region_layers = json.loads((HERE / "region_layer_map" / f"{identifier}.json").read_text(encoding="utf-8"))
    return brain_model(
        Source(identifier, get_network(), **{name: SETTINGS[name] for name in look}),
        region_layers,
        degrees=SETTINGS["degrees"],
        spatial=SETTINGS["spatial"],
        identifier=identifier,
    )
