"""Images per second of the two views that are trained on: localsim beside torchvision's transforms of PIL images.

    python benchmarks/input.py                           # one worker per core, augmentation on the CPU
    python benchmarks/input.py --device cuda             # augmentation on the GPU
    python benchmarks/input.py --folder DIR --only jpeg  # JPEG files of one's own

What the rows and columns mean, and how to read them: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tracked import machine, wait

from localsim.data import AUGMENTATIONS, ImageSet, ViewLoader
from localsim.data.augment import Augmentation, recolour_
from localsim.data.images import decode, find_images
from localsim.rng import key

SHAPE = (375, 500)  # height and width of most photographs in ImageNet
QUALITY = 90  # of the JPEG files: at this shape about 110 kB, as in ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batches = Iterator[int]
"""Makes batches, and says how many images each has."""


def picture(index: int) -> Image.Image:
    """Return a made-up photograph: Gaussian noise whose amplitude falls with frequency as that of photographs does."""
    random = np.random.default_rng(key(0, "benchmark", "picture", index))
    down, right = np.fft.fftfreq(SHAPE[0])[:, None], np.fft.rfftfreq(SHAPE[1])[None]
    amplitude = 1 / np.maximum(np.hypot(down, right), 1 / SHAPE[1])

    def plane(spread: float) -> np.ndarray:
        spectrum = amplitude * np.exp(2j * np.pi * random.random(amplitude.shape))
        pixels = np.fft.irfft2(spectrum, SHAPE)
        return spread * (pixels - pixels.mean()) / pixels.std()

    colours = [plane(15.0) for _ in range(3)]
    light = plane(60.0)
    return Image.fromarray(np.stack([128 + light + one for one in colours], axis=-1).clip(0, 255).astype(np.uint8))


def make_jpegs(folder: Path, num: int) -> None:
    """Write `num` JPEG files."""
    for index in range(num):
        picture(index).save(folder / f"{index:05d}.jpg", quality=QUALITY)


class PilViews:
    """The two views of Barlow Twins (Zbontar et al. 2021), as its authors and those of blockwise learning make them.

    Args:
        size: pixels of the views.
        augmentation: whose numbers are used.
    """

    def __init__(self, size: int, augmentation: Augmentation) -> None:
        a = augmentation
        self.views = [
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(
                        size, a.crop_scale, a.crop_ratio, transforms.InterpolationMode.BICUBIC
                    ),
                    transforms.RandomHorizontalFlip(a.flip),
                    transforms.RandomApply(
                        [transforms.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter
                    ),
                    transforms.RandomGrayscale(a.gray),
                    transforms.RandomApply([partial(blurred, sigma=a.blur_sigma)], a.blur[view % len(a.blur)]),
                    transforms.RandomApply([ImageOps.solarize], a.solarize[view % len(a.solarize)]),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            )
            for view in range(2)
        ]

    def __call__(self, image: Image.Image) -> list[Any]:  # tensors, which torchvision's types do not know
        return [view(image) for view in self.views]


def blurred(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


class Mapped(Dataset):
    """What `work` makes of each item."""

    def __init__(self, items: Any, work: Callable[[Any], Any]) -> None:
        self.items, self.work = items, work

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.items[index])


def read_pil(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def pil_views_of_file(path: Path, views: PilViews) -> list[Tensor]:
    return views(read_pil(path))


def pil_views_of_pixels(pixels: np.ndarray, views: PilViews) -> list[Tensor]:
    return views(Image.fromarray(pixels))


def only_decode(path: Path) -> int:
    return decode(path).shape[0]


def only_draft(path: Path) -> int:
    """Decode to half the height and width, which libjpeg does by leaving out frequencies."""
    with Image.open(path) as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        return len(image.convert("RGB").getbands())


@dataclass(frozen=True)
class Setting:
    """What is common to all contestants: the items in the order they are asked for, and how they are asked for."""

    paths: tuple[Path, ...]
    pixels: Tensor | None
    size: int
    batch_size: int
    workers: int
    device: str


def through_workers(setting: Setting, items: Any, work: Callable[[Any], Any]) -> Batches:
    """Iterate as the reference does: whole batches of float views from workers, copied to the device."""
    device = torch.device(setting.device)
    dataset = Mapped(items, work)
    for made in DataLoader(
        dataset, setting.batch_size, shuffle=True, num_workers=setting.workers, pin_memory=device.type == "cuda"
    ):
        views = [view.to(device, non_blocking=True) for view in made] if isinstance(made, list) else [made]
        yield len(views[0])


def pil_pipeline(setting: Setting, augmentation: Augmentation) -> Batches:
    views = PilViews(setting.size, augmentation)
    if setting.pixels is None:
        return through_workers(setting, setting.paths, partial(pil_views_of_file, views=views))
    pixels = setting.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return through_workers(setting, pixels, partial(pil_views_of_pixels, views=views))


def decoding(setting: Setting, work: Callable[[Path], int]) -> Batches:
    return through_workers(replace(setting, device="cpu"), setting.paths, work)


def view_loader(setting: Setting, augmentation: Augmentation) -> ViewLoader:
    images = ImageSet(setting.pixels, None if setting.pixels is not None else setting.paths, None)
    return ViewLoader(
        images,
        augmentation,
        size=setting.size,
        batch_size=setting.batch_size,
        seed=0,
        mean=MEAN,
        std=STD,
        workers=setting.workers,
        device=setting.device,
    )


def localsim_pipeline(setting: Setting, augmentation: Augmentation) -> Batches:
    return (len(batch.views[0]) for batch in view_loader(setting, augmentation).all_views(0))


def localsim_host(setting: Setting, augmentation: Augmentation) -> Batches:
    """What is left to the CPU where a GPU augments: decoding, crops, and asking for the augmentation.

    Crops go to the device `meta`, which computes nothing. Augmentation is drawn and asked for in full, but of stand-ins
    of 2 x 2 pixels on the CPU: on `meta` a call takes torch many times longer than on any real device.
    """
    crops = replace(augmentation, jitter=0.0, gray=0.0, blur=(0.0,), solarize=(0.0,))
    loader = view_loader(replace(setting, device="meta"), crops)
    for batch in loader.all_views(0):
        num = len(batch.indices)
        for view in range(loader.num_views):
            recolour_(torch.rand(num, 3, 2, 2), batch.indices.numpy(), augmentation, view=view, key=(0, "augment", 0))
        yield num


BARLOW, SMALL = AUGMENTATIONS["barlow_twins"], AUGMENTATIONS["small"]

TASKS: dict[str, dict[str, Callable[[Setting], Batches]]] = {
    "jpeg": {
        "decoding alone": partial(decoding, work=only_decode),
        "decoding alone, to half size": partial(decoding, work=only_draft),
        "PIL pipeline": partial(pil_pipeline, augmentation=BARLOW),
        "localsim, what a GPU leaves to the host": partial(localsim_host, augmentation=BARLOW),
        "localsim": partial(localsim_pipeline, augmentation=BARLOW),
    },
    "memory": {
        "PIL pipeline": partial(pil_pipeline, augmentation=SMALL),
        "localsim": partial(localsim_pipeline, augmentation=SMALL),
    },
}
REFERENCE = "PIL pipeline"


@dataclass(frozen=True)
class Outcome:
    """Images per second by the clock, and milliseconds of processor time of all processes per image."""

    rate: float
    busy: float


def measured(task: str, contestant: str, folder: Path, chosen: argparse.Namespace) -> Outcome:
    """Make all batches once; call it in a process of its own."""
    work = TASKS[task][contestant]
    common: dict[str, Any] = {"workers": chosen.workers, "device": chosen.device}
    if task == "jpeg":
        paths = tuple(find_images(folder))
        setting = Setting(paths * chosen.passes, None, chosen.size, chosen.batch_size, **common)
        warm = replace(setting, paths=paths[: chosen.batch_size])
    else:
        num = chosen.small_images
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, 32, 32), dtype=np.uint8))
        setting = Setting((), pixels, 32, chosen.batch_size, **common)
        warm = replace(setting, pixels=pixels[: chosen.batch_size])
    device = torch.device(chosen.device)
    sum(work(warm))
    wait(device)
    busy, start = processor_seconds(), time.perf_counter()
    num = sum(work(setting))
    wait(device)
    seconds = time.perf_counter() - start
    return Outcome(num / seconds, 1e3 * (processor_seconds() - busy) / num)


def processor_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def alone(*given: Any) -> Outcome:
    """Return `measured` of a fresh process."""
    # a spawned process would spawn its workers too, which import everything anew; users' workers start as by default
    again = {"initializer": set_start_method, "initargs": (get_start_method(), True)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **again) as pool:
        return pool.submit(measured, *given).result()


def lines(task: str, folder: Path, chosen: argparse.Namespace) -> Iterator[str]:
    """Yield the table's lines of a task: repeats go round the contestants, so that each meets the same load."""
    runs: dict[str, list[Outcome]] = {name: [] for name in TASKS[task]}
    for _ in range(chosen.repeats):
        for name, outcomes in runs.items():
            outcomes.append(alone(task, name, folder, chosen))
    for name, outcomes in runs.items():
        rate, busy = (statistics.median(getattr(one, of) for one in outcomes) for of in ("rate", "busy"))
        # within a repeat, where the load is most alike
        less = statistics.median(a.busy / b.busy for a, b in zip(runs[REFERENCE], outcomes, strict=True))
        yield f"| {task} | {name} | {rate:,.0f} | {busy:.2f} | {1e3 / busy:,.0f} | {less:.1f} |"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="JPEG files to make")
    parser.add_argument("--folder", type=Path, help="JPEG files to take instead")
    parser.add_argument("--passes", type=int, default=6, help="times every file is read")
    parser.add_argument("--size", type=int, default=224, help="pixels of the views of files")
    parser.add_argument("--small-images", type=int, default=10_000, help="images of 32 pixels in memory")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; one per core by default")
    parser.add_argument("--device", default="cpu", help="where localsim augments")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="ROW", help=", ".join(TASKS))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    with tempfile.TemporaryDirectory(prefix="localsim-benchmark-") as made:
        folder = chosen.folder or Path(made)
        about = machine(torch.device(chosen.device), ("torch", "torchvision", "pillow"))
        print(f"{chosen.workers} worker(s), device {chosen.device}, batch {chosen.batch_size}. {about}", flush=True)
        if "jpeg" in chosen.only:
            if chosen.folder is None:
                make_jpegs(folder, chosen.images)
            sizes = [path.stat().st_size for path in find_images(folder)]
            print(f"{len(sizes)} files of {statistics.mean(sizes) / 1e3:.0f} kB on average.", flush=True)
        print("\n| input | by | images/s | CPU ms per image | images/s per core | PIL pipeline's CPU / this |")
        print("|---" * 6 + "|", flush=True)
        for task in chosen.only:
            for line in lines(task, folder, chosen):
                print(line, flush=True)


if __name__ == "__main__":
    main()
