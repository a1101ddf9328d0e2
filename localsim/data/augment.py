"""Random views of images, with parameters drawn for every image on its own.

`torchvision.transforms.v2` gives all images of a batch one draw, which a loss that compares images would exploit. Here
an image's draws depend on its index, the view and a key only, so an image gets the same view in every batch, worker
and process. Images in memory are cropped as one batch (`augment_batch`); images streamed from disk are cropped one by
one in worker processes (`crop_image`) and recoloured as a batch (`recolour_`), with the same draws either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from localsim import rng
from localsim.errors import UserError

_CROP_TRIES = 10  # torchvision's RandomResizedCrop
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's luma
_SOLARIZE_FROM = 128 / 255  # PIL's ImageOps.solarize
_NO_BLUR = 1e-3  # a standard deviation, in pixels, that changes nothing and can be divided by

# columns of an image's uniform draws
_AREA, _RATIO = slice(0, _CROP_TRIES), slice(_CROP_TRIES, 2 * _CROP_TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(2 * _CROP_TRIES, 2 * _CROP_TRIES + 8)
_FACTORS = slice(_SOLARIZE + 1, _SOLARIZE + 5)
_ORDER = slice(_SOLARIZE + 5, _SOLARIZE + 9)
_NUM_DRAWS = _SOLARIZE + 9


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to an image, in this order: crop, flip, colour jitter, grey, blur, solarisation.

    The defaults are those of Barlow Twins (Zbontar et al. 2021, Section 2.2, after BYOL's Appendix B). With more views
    than `blur` and `solarize` have entries, the entries repeat in turn.

    Attributes:
        crop_scale: range of the crop's area, as a fraction of the image's; drawn uniformly.
        crop_ratio: range of the crop's width / height; its logarithm is drawn uniformly.
        flip: probability of a left-right flip.
        brightness: factors are drawn from U(1 - b, 1 + b), not below 0; likewise `contrast` and `saturation`.
        hue: turns of the colour wheel are drawn from U(-hue, hue), at most half a turn.
        jitter: probability that the four changes of colour are made, in a random order.
        gray: probability that colour is removed.
        blur: probability of a Gaussian blur, for each view.
        blur_sigma: range of the blur's standard deviation, in pixels of the view.
        solarize: probability that values of 128 and above (of 255) are inverted, for each view.

    Raises:
        UserError: if a field is outside its range.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    gray: float = 0.2
    blur: tuple[float, ...] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, ...] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name, highest in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= highest:
                bound = f" <= {highest:g}" if highest < math.inf else ""
                raise UserError(f"{name} is {value!r}; it must be a pair 0 < low <= high{bound}")
        for name, highest in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= highest:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be between 0 and {highest:g}")
        chances = {name: (getattr(self, name),) for name in ("flip", "jitter", "gray")}
        for name, values in (chances | {"blur": self.blur, "solarize": self.solarize}).items():
            if not values or not all(0 <= value <= 1 for value in values):
                raise UserError(f"{name} is {getattr(self, name)!r}; probabilities lie between 0 and 1")

    def scaled(self, strength: float) -> Augmentation:
        """Return this augmentation made weaker: each field goes linearly from no change (0) to its own value (1).

        `crop_ratio` does so in its logarithm, in which it is drawn. An image keeps its draws at every strength. Stages
        may so learn from deformations that suit them (Parthasarathy, Hénaff & Simoncelli 2023, arXiv:2312.11436,
        LCL-V2: the amplitude of local deformations is scaled with the layer's receptive field).

        Args:
            strength: 0 leaves the central square as it is; 1 gives an equal augmentation.

        Raises:
            UserError: for a strength below 0 or above 1.
        """
        if not 0 <= strength <= 1:
            raise UserError(f"augmentation strength is {strength!r}; it must be between 0 and 1")
        unchanged = {"crop_scale": 1.0, "blur_sigma": _NO_BLUR}
        weaker = {}
        for name in (field.name for field in fields(self)):
            value, least = getattr(self, name), unchanged.get(name, 0.0)
            values = value if isinstance(value, tuple) else (value,)
            if name == "crop_ratio":
                mixed = tuple(ratio**strength for ratio in values)
            else:
                mixed = tuple(strength * full + (1 - strength) * least for full in values)
            weaker[name] = mixed if isinstance(value, tuple) else mixed[0]
        return replace(self, **weaker)


_CROP_FLIP = Augmentation(jitter=0.0, gray=0.0, blur=(0.0,), solarize=(0.0,))

AUGMENTATIONS = MappingProxyType(
    {
        # Zbontar et al. 2021
        "barlow_twins": Augmentation(),
        # for images of 32 to 64 pixels, where a blur of up to 2 pixels leaves little: no blur, as SimCLR (Chen et al.
        # 2020, Appendix B.9) and solo-learn (da Costa et al. 2022) do on CIFAR; crops of at least 0.2 as in MoCo
        "small": Augmentation(crop_scale=(0.2, 1.0), blur=(0.0,)),
        # "small" with stronger colour changes: they keep colour from answering for shape and texture on the embedded
        # data set, whose objects are drawn in random colours
        "small_strong": Augmentation(
            crop_scale=(0.3, 1.0), blur=(0.0,), saturation=0.4, hue=0.5, gray=0.5, solarize=(0.0, 0.2)
        ),
        # training of a linear probe
        "crop_flip": _CROP_FLIP,
        # the input of Greedy InfoMax (Löwe et al. 2019) and CLAPP (Illing et al. 2021), whose code crops 64 of STL-10's
        # 96 pixels at random, flips and removes colour: such a crop is not resampled where views have 64 pixels
        "patches": Augmentation(
            crop_scale=(4 / 9, 4 / 9),
            crop_ratio=(1.0, 1.0),
            jitter=0.0,
            gray=1.0,
            blur=(0.0,),
            solarize=(0.0,),
        ),
        # the central square
        "none": Augmentation(
            crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=(0.0,), solarize=(0.0,)
        ),
    }
)
"""Augmentations by name."""


def augment_batch(
    images: Tensor,
    indices: np.ndarray,
    augmentation: Augmentation,
    *,
    size: int,
    view: int,
    key: tuple[rng.Part, ...],
) -> Tensor:
    """Return one random view of every image of a batch.

    Crop, flip and resampling are one matrix for the rows and one for the columns of each image, with the weights of
    PIL's bicubic filter, which widens when it shrinks (no aliasing). Unlike in PIL, nothing is rounded to bytes.

    Args:
        images: `(n, 3, H, W)` uint8, on any device.
        indices: `(n,)` integers that name the images; the draws depend on them, not on the place in the batch.
        augmentation: what may happen.
        size: height and width of the views, in pixels.
        view: which view of the image.
        key: what the draws are for, such as `(seed, "augment", epoch)`.

    Returns:
        `(n, 3, size, size)` float32 between 0 and 1, on the images' device.
    """
    draws = rng.uniform(indices, _NUM_DRAWS, *key, view)
    height, width = images.shape[-2:]
    top, left, rows, columns = _crop_boxes(draws, height, width, augmentation).T
    flip = draws[:, _FLIP] < augmentation.flip
    vertical = _resampling(top, rows, np.zeros_like(flip), height, size, images.device)
    horizontal = _resampling(left, columns, flip, width, size, images.device)
    views = _rows_and_columns(images.float().div_(255), vertical, horizontal).clamp_(0, 1)
    return _recolour_(views, draws, augmentation, view)


def crop_image(
    image: Tensor, index: int, augmentation: Augmentation, *, size: int, view: int, key: tuple[rng.Part, ...]
) -> Tensor:
    """Return the crop that `augment_batch` takes of one image, before its colours change.

    Resampled in bytes by torch's antialiased bicubic filter, as PIL does: fast, and rounded once per axis.

    Args:
        image: `(3, H, W)` uint8.
        index, augmentation, size, view, key: as in `augment_batch`.

    Returns:
        `(3, size, size)` uint8.
    """
    draws = rng.uniform(np.array([index]), _NUM_DRAWS, *key, view)
    top, left, rows, columns = _crop_boxes(draws, image.shape[-2], image.shape[-1], augmentation)[0].tolist()
    box = image[None, :, top : top + rows, left : left + columns]
    crop = functional.interpolate(box, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if draws[0, _FLIP] < augmentation.flip else crop


def recolour_(
    crops: Tensor, indices: np.ndarray, augmentation: Augmentation, *, view: int, key: tuple[rng.Part, ...]
) -> Tensor:
    """Change the colours of crops in place, as `augment_batch` does after cropping, and return them.

    Args:
        crops: `(n, 3, size, size)` float between 0 and 1, on any device.
        indices, augmentation, view, key: as in `augment_batch`.
    """
    return _recolour_(crops, rng.uniform(indices, _NUM_DRAWS, *key, view), augmentation, view)


def _recolour_(images: Tensor, draws: np.ndarray, augmentation: Augmentation, view: int) -> Tensor:
    """Apply jitter, grey, blur and solarisation in place; every step touches only the images it changes."""
    chosen = np.flatnonzero(draws[:, _JITTER] < augmentation.jitter)
    if len(chosen):
        where = _to(chosen, images.device)
        images[where] = _jitter_(images[where], *_jitter_parameters(draws[chosen], augmentation))

    chosen = np.flatnonzero(draws[:, _GRAY] < augmentation.gray)
    if len(chosen):
        where = _to(chosen, images.device)
        images[where] = _grey(images[where]).expand(-1, 3, -1, -1)

    chosen = np.flatnonzero(draws[:, _BLUR] < augmentation.blur[view % len(augmentation.blur)])
    if len(chosen):
        where = _to(chosen, images.device)
        lowest, highest = augmentation.blur_sigma
        sigma = lowest + (highest - lowest) * draws[chosen, _SIGMA]
        kernel = _blurring(sigma, _blur_radius(highest, images.shape[-1]), images.shape[-1], images.device)
        images[where] = _rows_and_columns(images[where], kernel, kernel)

    chosen = np.flatnonzero(draws[:, _SOLARIZE] < augmentation.solarize[view % len(augmentation.solarize)])
    if len(chosen):
        where = _to(chosen, images.device)
        bright = images[where]
        images[where] = torch.where(bright >= _SOLARIZE_FROM, 1 - bright, bright)
    return images


def _crop_boxes(draws: np.ndarray, height: int, width: int, augmentation: Augmentation) -> np.ndarray:
    """Return `(n, 4)` integer boxes (top, left, rows, columns), drawn as torchvision's RandomResizedCrop draws them.

    Of ten tries the first that fits counts; if none fits, the largest central box whose ratio is allowed.
    """
    (small, large), (narrow, wide) = augmentation.crop_scale, augmentation.crop_ratio
    area = height * width * (small + (large - small) * draws[:, _AREA])
    ratio = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * draws[:, _RATIO])
    columns, rows = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (0 < columns) & (columns <= width) & (0 < rows) & (rows <= height)
    first = fits.argmax(axis=1)[:, None]
    columns, rows = np.take_along_axis(columns, first, 1)[:, 0], np.take_along_axis(rows, first, 1)[:, 0]
    top = np.floor(draws[:, _TOP] * (height - rows + 1)).astype(int)
    left = np.floor(draws[:, _LEFT] * (width - columns + 1)).astype(int)

    none_fits = ~fits.any(axis=1, keepdims=True)
    allowed = min(max(width / height, narrow), wide)
    central_columns, central_rows = min(width, round(height * allowed)), min(height, round(width / allowed))
    central = ((height - central_rows) // 2, (width - central_columns) // 2, central_rows, central_columns)
    return np.where(none_fits, np.array(central), np.stack([top, left, rows, columns], axis=1))


def _resampling(
    start: np.ndarray, length: np.ndarray, flip: np.ndarray, num_in: int, size: int, device: torch.device
) -> Tensor:
    """Return `(n, size, num_in)` matrices that resample `length` pixels from `start` on to `size` pixels.

    Keys' cubic with a = -1/2, widened by the scale when it shrinks, each row normalised to sum 1: as PIL and torch's
    antialiased interpolation do.
    """
    first, span = _to(start, device)[:, None, None], _to(length, device)[:, None, None]
    out = torch.arange(size, device=device, dtype=torch.float32)
    out = torch.where(_to(flip, device)[:, None], size - 1 - out, out)[:, :, None]
    pixel = torch.arange(num_in, device=device, dtype=torch.float32)
    scale = span / size
    x = ((pixel + 0.5 - first - scale * (out + 0.5)) / scale.clamp_min(1)).abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights *= (pixel >= first) & (pixel < first + span)
    return weights / weights.sum(-1, keepdim=True)


def _blur_radius(highest_sigma: float, size: int) -> int:
    """Return where the Gaussian is cut: 4 standard deviations, or what reflection at the border allows."""
    return min(math.ceil(4 * highest_sigma), size - 1)


def _blurring(sigma: np.ndarray, radius: int, size: int, device: torch.device) -> Tensor:
    """Return `(n, size, size)` matrices of a Gaussian cut at `radius` pixels, with reflection at the border."""
    offset = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-0.5 * (offset / _to(sigma, device)[:, None]) ** 2)
    kernel /= kernel.sum(-1, keepdim=True)
    out = torch.arange(size, device=device)
    source = (out[:, None] + offset).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    place = (out[:, None] * size + source).flatten()
    matrices = torch.zeros(len(sigma), size * size, device=device)
    matrices.index_add_(1, place, kernel[:, None].expand(-1, size, -1).flatten(1))
    return matrices.view(-1, size, size)


def _rows_and_columns(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Return `vertical @ image @ horizontal^T` for every channel of every image."""
    num, channels, height, _ = images.shape
    across = torch.bmm(images.flatten(1, 2), horizontal.mT).view(num, channels, height, -1)
    return torch.matmul(vertical[:, None], across)


def _jitter_parameters(draws: np.ndarray, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Return `(n, 4)` amounts (three factors and a turn of hue) and `(n, 4)` orders of the four changes."""
    strength = np.array([augmentation.brightness, augmentation.contrast, augmentation.saturation])
    low, high = np.maximum(1 - strength, 0), 1 + strength
    amounts = draws[:, _FACTORS].copy()
    amounts[:, :_HUE] = low + (high - low) * amounts[:, :_HUE]
    amounts[:, _HUE] = augmentation.hue * (2 * amounts[:, _HUE] - 1)
    return amounts, draws[:, _ORDER].argsort(axis=1)


def _jitter_(images: Tensor, amounts: np.ndarray, order: np.ndarray) -> Tensor:
    """Make the four changes of colour in place, for each image in its own order.

    Brightness, contrast and saturation move an image away from black, from its mean grey, and from its own grey.
    """
    for change in order.T:
        turned = np.flatnonzero(change == _HUE)
        if len(turned) and amounts[turned, _HUE].any():
            where = _to(turned, images.device)
            images[where] = _turn_hue(images[where], _to(amounts[turned, _HUE], images.device)[:, None, None])
        blended = np.flatnonzero(change != _HUE)
        if len(blended):
            where = _to(blended, images.device)
            part = images[where]
            which = _to(change[blended], images.device)[:, None, None, None]
            factor = _to(amounts[blended, change[blended]], images.device)[:, None, None, None]
            grey = _grey(part)
            mean = grey.mean((-2, -1), keepdim=True)
            away_from = grey * (which == _SATURATION) + mean * (which == _CONTRAST)
            images[where] = part.mul_(factor).add_(away_from.mul_(1 - factor)).clamp_(0, 1)
    return images


def without_colour(images: Tensor) -> Tensor:
    """Return `(n, 3, H, W)` images whose three channels are their luma."""
    return _grey(images).repeat(1, 3, 1, 1)


def _grey(images: Tensor) -> Tensor:
    """Return `(n, 1, H, W)` luma."""
    red, green, blue = images.split(1, dim=1)
    return red * _GREY_WEIGHTS[0] + green * _GREY_WEIGHTS[1] + blue * _GREY_WEIGHTS[2]


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of `(n, 3, H, W)` images by `turn`, in turns, keeping HSV saturation and value.

    Hue runs through six sectors; channel m in (5, 3, 1) of the result is v - (v - min) * clip(min(k, 4 - k), 0, 1) with
    k = (m + 6 hue) mod 6: the usual conversion to HSV and back without its saturation.
    """
    red, green, blue = images.unbind(1)
    lowest, value = torch.aminmax(images, dim=1)
    chroma = value - lowest
    safe = chroma.clamp_min(torch.finfo(images.dtype).tiny)
    sector = torch.where(value == red, (green - blue) / safe, (blue - red) / safe + 2)
    sector = torch.where((value == blue) & (value != red) & (value != green), (red - green) / safe + 4, sector)
    sector += 6 * turn
    channels = []
    for m in (5, 3, 1):
        k = (sector + m).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on the device; float64 becomes float32."""
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    return put(torch.from_numpy(values), device)


def put(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device.

    A GPU fetches them from pinned memory when it comes to them. From ordinary memory this process would have to wait
    until the GPU has done all it was asked for before, the training step included.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
