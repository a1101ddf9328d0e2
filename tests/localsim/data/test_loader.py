"""Batches: the same images and views whatever the workers, the batch they fall in, or where an epoch is entered."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from localsim.data import loader as loader_module
from localsim.data.augment import AUGMENTATIONS
from localsim.data.datasets import ImageSet
from localsim.data.loader import Batch, ViewLoader, plain_batches
from localsim.errors import UserError

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NORMAL: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def memory_set(num: int = 10, size: int = 16) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, None, torch.arange(num) % 3)


def streamed_set(folder: Path, num: int = 10, broken: tuple[int, ...] = ()) -> ImageSet:
    """PNG files of several sizes; those in `broken` are cut short."""
    paths = []
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:200])
        paths.append(path)
    return ImageSet(None, tuple(paths), torch.arange(num) % 3)


def views_of(images: ImageSet, **options) -> ViewLoader:
    settings: dict[str, Any] = {"size": 12, "batch_size": 4, "seed": 1} | NORMAL | options
    return ViewLoader(images, AUGMENTATIONS["barlow_twins"], **settings)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.indices, b.indices) and len(a.views) == len(b.views)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert a.labels is not None and b.labels is not None and torch.equal(a.labels, b.labels)


@pytest.fixture(params=["memory", "streamed"])
def images(request, tmp_path) -> ImageSet:
    return memory_set() if request.param == "memory" else streamed_set(tmp_path)


def test_an_epoch_drops_the_rest_and_keeps_labels_with_images(images):
    loader = views_of(images, num_views=3)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 2
    seen = torch.cat([batch.indices for batch in batches])
    assert len(seen.unique()) == 8 and seen.tolist() != sorted(seen.tolist())
    for batch in batches:
        assert [view.shape for view in batch.views] == [(4, 3, 12, 12)] * 3
        assert batch.labels is not None and torch.equal(batch.labels, batch.indices % 3)
        assert not torch.equal(batch.views[0], batch.views[1])


def test_epochs_and_seeds_differ_and_repeat(images):
    loader = views_of(images)
    first = list(loader.epoch(0))
    assert_same(first, list(views_of(images).epoch(0)))
    for other in (loader.epoch(1), views_of(images, seed=2).epoch(0)):
        assert not torch.equal(torch.cat([b.indices for b in first]), torch.cat([b.indices for b in other]))


def test_an_epoch_can_be_entered_at_any_step(images):
    loader = views_of(images, batch_size=2)
    whole = list(loader.epoch(3))
    assert_same(whole[2:], list(loader.epoch(3, start_step=2)))
    assert list(loader.epoch(3, start_step=5)) == []
    with pytest.raises(ValueError, match="start_step is 6; an epoch has 5 steps"):
        loader.epoch(3, start_step=6)


def test_order_is_the_indices_of_an_epoch(images):
    loader = views_of(images, batch_size=3)
    order = list(loader.order(2))
    assert [indices.tolist() for indices in order] == [batch.indices.tolist() for batch in loader.epoch(2)]
    assert len(order) == 3 and not torch.equal(torch.cat(order), torch.cat(list(loader.order(1))))
    assert [indices.tolist() for indices in loader.order(2, start_step=1)] == [i.tolist() for i in order[1:]]
    assert list(loader.order(2, start_step=3)) == []
    with pytest.raises(ValueError, match="start_step is 4; an epoch has 3 steps"):
        loader.order(2, start_step=4)


def test_order_reads_no_file(tmp_path):
    loader = views_of(streamed_set(tmp_path, broken=(0, 1)), batch_size=5)
    assert len(torch.cat(list(loader.order(0))).unique()) == 10 and loader.num_skipped == 0


@pytest.mark.parametrize(("batch_size", "last"), [(4, 2), (3, 1), (5, 5)])
def test_all_views_are_those_of_the_epoch_in_the_order_of_the_images(images, batch_size, last):
    loader = views_of(images, batch_size=batch_size)
    everything = list(loader.all_views(3))
    assert torch.equal(torch.cat([batch.indices for batch in everything]), torch.arange(10))
    assert {len(batch.indices) for batch in everything[:-1]} == {batch_size} and len(everything[-1].indices) == last
    views = [torch.cat([batch.views[view] for batch in everything]) for view in range(2)]
    for batch in loader.epoch(3):
        for view in range(2):
            assert torch.equal(batch.views[view], views[view][batch.indices])
    for batch in everything:
        assert batch.labels is not None and torch.equal(batch.labels, batch.indices % 3)


def test_all_views_leave_out_unreadable_files_and_refuse_none_at_all(tmp_path):
    broken = (0, 1, 5)
    loader = views_of(streamed_set(tmp_path, num=6, broken=broken), batch_size=2)
    with pytest.warns(UserWarning, match="skipped an unreadable image"):
        batches = list(loader.all_views(0))
    assert [batch.indices.tolist() for batch in batches] == [[2, 3], [4]] and loader.num_skipped == 3
    loader = views_of(loader.images.subset(broken), batch_size=2)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of the 3 images can be read"):
        list(loader.all_views(0))


def test_another_augmentation_keeps_everything_else(images):
    loader = views_of(images)
    before = list(loader.epoch(0))
    other = loader.with_augmentation(AUGMENTATIONS["none"])
    assert loader.augmentation == AUGMENTATIONS["barlow_twins"] and other.augmentation == AUGMENTATIONS["none"]
    assert_same(before, list(loader.epoch(0)))
    plain = ViewLoader(images, AUGMENTATIONS["none"], size=12, batch_size=4, seed=1, **NORMAL)
    assert_same(list(plain.epoch(0)), list(other.epoch(0)))


def test_the_number_of_workers_changes_nothing(tmp_path):
    streamed = streamed_set(tmp_path)
    assert_same(list(views_of(streamed).epoch(0)), list(views_of(streamed, workers=2).epoch(0)))
    assert_same(
        list(plain_batches(streamed, size=12, batch_size=4, **NORMAL)),
        list(plain_batches(streamed, size=12, batch_size=4, workers=2, **NORMAL)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_delivered_in_chunks_are_those_delivered_whole(tmp_path, monkeypatch, workers):
    streamed, sizes = streamed_set(tmp_path), []

    class Recording(DataLoader):
        def __iter__(self):
            for item in super().__iter__():
                sizes.append(len(item[0]))
                yield item

    monkeypatch.setattr(loader_module, "DataLoader", Recording)

    def load() -> tuple[list[Batch], list[Batch]]:
        views = views_of(streamed, batch_size=5, workers=workers).epoch(0)
        return list(views), list(plain_batches(streamed, size=12, batch_size=7, workers=workers, **NORMAL))

    whole = load()
    assert sizes == [5, 5, 7, 3]
    sizes.clear()
    monkeypatch.setattr(loader_module, "CHUNK", 2)
    chunked = load()
    assert sizes == [2, 2, 1] * 2 + [2, 2, 2, 1] + [2, 1]
    for first, second in zip(whole, chunked, strict=True):
        assert_same(first, second)
    assert_same(chunked[0][1:], list(views_of(streamed, batch_size=5, workers=workers).epoch(0, start_step=1)))
    in_memory = views_of(memory_set(), batch_size=5).epoch(0)
    assert [b.indices.tolist() for b in chunked[0]] == [b.indices.tolist() for b in in_memory]


def test_large_batches_are_the_same_for_any_number_of_workers(tmp_path):
    streamed = streamed_set(tmp_path, num=loader_module.CHUNK + 6)
    alone, shared = (views_of(streamed, batch_size=len(streamed), workers=workers).epoch(0) for workers in (0, 2))
    assert_same(list(alone), list(shared))


def test_an_image_is_decoded_once_for_all_its_views(tmp_path, monkeypatch):
    asked, decode = [], loader_module.decode
    monkeypatch.setattr(loader_module, "decode", lambda path: asked.append(path) or decode(path))
    streamed = streamed_set(tmp_path)
    list(views_of(streamed, batch_size=5, num_views=3).epoch(0))
    assert streamed.paths is not None and sorted(asked) == sorted(streamed.paths)


needs_fork = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="workers that are not forked do not see what a test patches"
)


@needs_fork
def test_workers_decode_the_next_batch_while_one_is_in_use(tmp_path, monkeypatch):
    decode, done = loader_module.decode, tmp_path / "done"
    done.mkdir()

    def noted(path: Path) -> torch.Tensor:
        (done / path.name).touch()
        return decode(path)

    monkeypatch.setattr(loader_module, "decode", noted)
    batches = views_of(streamed_set(tmp_path), batch_size=3, workers=1).epoch(0)
    next(batches)
    deadline = time.monotonic() + 30
    while len(list(done.iterdir())) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(done.iterdir())) >= 6
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_workers_outlive_a_signal_that_goes_to_all_processes(tmp_path, number):
    streamed = streamed_set(tmp_path, num=40)
    batches = views_of(streamed, batch_size=2, workers=2).epoch(0)
    seen = [next(batches), next(batches)]  # one of either worker: both have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, number)
    seen += batches
    assert_same(seen, list(views_of(streamed, batch_size=2).epoch(0)))


SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path

from localsim.data import AUGMENTATIONS, ImageSet, ViewLoader

def begin():
    global batches  # open until the process ends
    images = ImageSet(None, tuple(sorted(Path(sys.argv[1]).iterdir())), None)
    batches = ViewLoader(
        images, AUGMENTATIONS["none"], size=8, batch_size=2, seed=0, mean=(0,) * 3, std=(1,) * 3, workers=2
    ).epoch(0)
    next(batches), next(batches)  # one of either worker: both have begun

def child():
    begin()
    print("child ends", flush=True)

if __name__ == "__main__":
"""
ENDINGS = {
    "its end": "begin()",
    "a signal to all before": (
        "begin(); [os.kill(one.pid, signal.SIGTERM) for one in multiprocessing.active_children()]; next(batches)"
    ),
    "workers that were spawned": "multiprocessing.set_start_method('spawn'); begin()",
    "a process of its own": "one = multiprocessing.Process(target=child); one.start(); one.join()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_though_an_epoch_is_open(tmp_path, ending):
    folder, script = tmp_path / "images", tmp_path / "script.py"
    folder.mkdir()
    streamed_set(folder, num=40)
    script.write_text(f"{SCRIPT}    {ENDINGS[ending]}\n    print('end')\n")
    with subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (process.returncode, out.splitlines()[-1], err) == (0, "end", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_workers_end_with_an_epoch_that_is_left(tmp_path, error):
    def use() -> None:
        for _ in views_of(streamed_set(tmp_path), batch_size=2, workers=2).epoch(0):
            assert len(multiprocessing.active_children()) == 2
            raise error

    with pytest.raises(error) as caught:
        use()
    del caught  # a traceback keeps what its frames hold
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_are_asked_for_without_waiting_for_it(images):
    """Else the training step would have to end before the next views are even asked for."""
    expected = list(views_of(images).epoch(0))
    loader = views_of(images, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = list(loader.epoch(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(expected, made, strict=True):
        for view, same in zip(one.views, other.views, strict=True):
            torch.testing.assert_close(view, same.cpu(), rtol=0, atol=1e-3)


def test_a_view_is_the_same_in_batches_of_any_size(images):
    def by_image(batch_size):
        batches = views_of(images, batch_size=batch_size).epoch(0)
        return {int(i): view for batch in batches for i, view in zip(batch.indices, batch.views[1], strict=True)}

    small, large = by_image(2), by_image(5)
    assert len(small) == len(large) == 10
    for index, view in small.items():
        torch.testing.assert_close(view, large[index], rtol=0, atol=1e-4)


def test_images_on_disk_and_in_memory_get_nearly_the_same_views(tmp_path):
    coarse = memory_set(6, 4).images
    assert coarse is not None
    pixels = torch.nn.functional.interpolate(coarse.float(), size=(24, 24), mode="bilinear").byte()
    paths = []
    for i, image in enumerate(pixels):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    plain = PLAIN | {"batch_size": 6}
    in_memory = next(views_of(ImageSet(pixels, None, None), **plain).epoch(0))
    on_disk = next(views_of(ImageSet(None, tuple(paths), None), **plain).epoch(0))
    assert torch.equal(in_memory.indices, on_disk.indices) and on_disk.labels is None
    # solarisation turns a rounding across its threshold into a jump, hence the mean
    assert (in_memory.views[0] - on_disk.views[0]).abs().max() < 4 / 255
    assert (in_memory.views[1] - on_disk.views[1]).abs().mean() < 1 / 255


def test_views_are_normalised(images):
    raw = next(views_of(images, **PLAIN).epoch(0)).views[0]
    mean, std = (torch.tensor(NORMAL[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(next(views_of(images).epoch(0)).views[0], (raw - mean) / std)


def test_loading_leaves_the_default_generator_alone(images):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(views_of(images).epoch(0))
    list(plain_batches(images, size=8, batch_size=4, **NORMAL))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("workers", "chunk"), [(0, 64), (2, 64), (0, 1), (2, 1)])
def test_unreadable_files_are_dropped_warned_of_once_and_counted(tmp_path, monkeypatch, workers, chunk):
    monkeypatch.setattr(loader_module, "CHUNK", chunk)
    streamed = streamed_set(tmp_path, broken=(3, 7))
    loader = views_of(streamed, batch_size=5, workers=workers)
    with pytest.warns(UserWarning, match="skipped an unreadable image") as caught:
        batches = [*loader.epoch(0), *loader.epoch(1)]
    assert sorted(Path(str(w.message).split(": ")[0].split(", ")[1]).name for w in caught) == ["3.png", "7.png"]
    assert loader.num_skipped == 2
    assert sum(len(batch.indices) for batch in batches) == 16
    for batch in batches:
        assert not set(batch.indices.tolist()) & {3, 7}
        assert batch.labels is not None and torch.equal(batch.labels, batch.indices % 3)
        assert len(batch.views[0]) == len(batch.indices)
    whole = streamed_set(tmp_path)
    order = [set(batch.indices.tolist()) - {3, 7} for batch in views_of(whole, batch_size=5).epoch(0)]
    assert order == [set(batch.indices.tolist()) for batch in batches[:2]]


def test_a_batch_of_fewer_than_two_images_is_refused(tmp_path):
    loader = views_of(streamed_set(tmp_path, num=3, broken=(0, 2)), batch_size=3)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"only 1 of a batch of 3 images .*\.png"):
        next(loader.epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "batch_size is 11, but there are only 10 images"),
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"workers": -1}, "workers is -1"),
        ({"num_views": 0}, "num_views is 0"),
    ],
)
def test_impossible_loaders_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        views_of(memory_set(), **options)


def test_plain_batches_give_every_image_in_order_as_it_is():
    images = memory_set(10, 12)
    batches = list(plain_batches(images, size=12, batch_size=4, **PLAIN))
    assert [len(batch.indices) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(10))
    assert images.images is not None
    assert torch.equal(torch.cat([batch.views[0] for batch in batches]), images.images / 255)


def test_plain_batches_resize_and_crop_as_torchvision_does(tmp_path):
    streamed = streamed_set(tmp_path)
    assert streamed.paths is not None
    (batch,) = plain_batches(streamed, size=14, batch_size=10, **PLAIN)
    for path, view in zip(streamed.paths, batch.views[0], strict=True):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        resized = reference.resize(image, [16], v2.InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(view, reference.center_crop(resized, [14]) / 255, rtol=0, atol=1.01 / 255)


def test_plain_batches_leave_out_unreadable_files_and_refuse_none_at_all(tmp_path):
    streamed = streamed_set(tmp_path, num=3, broken=(0, 2))
    with pytest.warns(UserWarning, match="unreadable"):
        (batch,) = plain_batches(streamed, size=8, batch_size=2, **NORMAL)
    assert batch.indices.tolist() == [1]
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of the 2 images"):
        list(plain_batches(streamed.subset([0, 2]), size=8, batch_size=2, **NORMAL))
    with pytest.raises(UserError, match="size is 0"):
        plain_batches(streamed, size=0, batch_size=2, **NORMAL)


def test_plain_batches_without_colour_are_the_luma_in_every_channel():
    images = memory_set(10, 12)
    for plain, grey in zip(
        plain_batches(images, size=12, batch_size=4, **PLAIN),
        plain_batches(images, size=12, batch_size=4, grey=True, **PLAIN),
        strict=True,
    ):
        luma = torch.einsum("nchw,c->nhw", plain.views[0], torch.tensor([0.2989, 0.587, 0.114]))
        assert torch.allclose(grey.views[0], luma[:, None].expand(-1, 3, -1, -1), atol=1e-6)


def test_plain_batches_of_a_crop_are_the_central_square():
    images = memory_set(6, 12)
    assert images.images is not None
    (batch,) = plain_batches(images, size=8, batch_size=6, crop=2 / 3, **PLAIN)
    assert torch.equal(batch.views[0], images.images[..., 2:10, 2:10] / 255), "of the size asked for: not resampled"
    (larger,) = plain_batches(images, size=16, batch_size=6, crop=2 / 3, **PLAIN)
    square = images.images[..., 2:10, 2:10].float()
    enlarged = torch.nn.functional.interpolate(square, size=(16, 16), mode="bilinear", antialias=True)
    assert torch.equal(larger.views[0], enlarged.round() / 255)
