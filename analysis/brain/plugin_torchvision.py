"""The file `model.py` of a plugin for Brain-Score whose network is torchvision's; `export_plugin` copies it.

It needs torch, torchvision, safetensors and Brain-Score, not localsim. What differs from network to network is in
settings.json: the backbone, how images are shown, which layers stand for which regions and how they are pooled.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from brainscore_vision.model_helpers.activations.pytorch import (  # type: ignore[import-not-found]
    PytorchWrapper,
)
from brainscore_vision.model_helpers.brain_transformation import ModelCommitment  # type: ignore[import-not-found]
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import rgb_to_grayscale

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))


def get_network() -> nn.Module:
    """Return torchvision's network with the exported weights and an identity for its classifier."""
    weights = HERE / "weights.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SETTINGS["weights_sha256"]:
        raise ValueError(f"{weights} does not hold the weights that were exported: its SHA-256 is another")
    network = torchvision.models.get_model(SETTINGS["backbone"], weights=None)
    if SETTINGS["stem"] == "cifar" and hasattr(network, "maxpool"):
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    setattr(network, "fc" if hasattr(network, "fc") else "classifier", nn.Identity())
    network.load_state_dict(load_file(weights), strict=True)
    return network.eval()


def show(paths: list[str]) -> np.ndarray:
    """Return image files as the network was shown them in training, `(n, 3, size, size)` float32."""
    return torch.cat([_shown(_decoded(path)) for path in paths]).numpy()


def _decoded(path: str) -> Tensor:
    """Return `(1, 3, H, W)` uint8; 16-bit grey keeps its upper bits."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            pixels = np.repeat(grey[:, :, None], 3, axis=2)
        else:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _shown(image: Tensor) -> Tensor:
    """Return the centre of an image, resized, perhaps without colour, normalised."""
    size, crop = SETTINGS["size"], SETTINGS["crop"]
    if crop is not None:
        side = round(crop * min(image.shape[-2:]))
        top, left = ((length - side) // 2 for length in image.shape[-2:])
        image = image[..., top : top + side, left : left + side]
    height, width = image.shape[-2:]
    if (height, width) != (size, size):
        target = size if crop is not None else max(round(size * 8 / 7), size)
        shape = [max(target, int(target * side / min(height, width))) for side in (height, width)]
        image = F.interpolate(image.float(), size=shape, mode="bilinear", antialias=True)
        top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        image = image[..., top : top + size, left : left + size].round().to(torch.uint8)
    pixels = image.float().div_(255)
    if SETTINGS["grey"]:
        pixels = rgb_to_grayscale(pixels, num_output_channels=3)
    centre, scale = (torch.tensor(SETTINGS[name])[:, None, None] for name in ("mean", "std"))
    return (pixels - centre) / scale


class Wrapper(PytorchWrapper):
    """Brain-Score's wrapper, which keeps of every map the means over k x k regions, or all of it."""

    def register_hook(self, layer: nn.Module, layer_name: str, target_dict: dict[str, np.ndarray]):
        def keep(_layer: nn.Module, _given: object, output: Tensor) -> None:
            spatial = SETTINGS["spatial"]
            if output.ndim == 4 and spatial == "mean":
                output = output.mean((2, 3))
            elif output.ndim == 4 and spatial != "flatten":
                k = int(spatial.removeprefix("upto").partition("x")[0])
                # upto: a map that is coarser stays as it is
                rows, columns = (min(k, side) for side in output.shape[2:])
                output = F.adaptive_avg_pool2d(output, (rows, columns))
            # copied: the next layer may work in place
            target_dict[layer_name] = output.flatten(1).to("cpu", torch.float32, copy=True).numpy()

        return layer.register_forward_hook(keep)


def get_model() -> ModelCommitment:
    """Return the network as Brain-Score's BrainModel."""
    identifier = SETTINGS["identifier"]
    region_layers = json.loads((HERE / "region_layer_map" / f"{identifier}.json").read_text(encoding="utf-8"))
    wrapper = Wrapper(model=get_network(), preprocessing=show, identifier=identifier, batch_size=64)
    wrapper.image_size = SETTINGS["size"]
    return ModelCommitment(
        identifier=identifier,
        activations_model=wrapper,
        layers=list(dict.fromkeys(region_layers.values())),
        region_layer_map=region_layers,
        visual_degrees=SETTINGS["degrees"],
    )
