"""Recording folders as any program may have written them, and what is said of wrong ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localsim.analysis.brain.loading import load_recordings
from localsim.errors import UserError


def work_in(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the current one; the runs of `folder` are in `runs/`, its recordings in `my/`."""
    for name in ("runs", "my"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(n=5, size=6, seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def responses(n=5, neurons=3, trials=2, bins=1, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, neurons, trials, bins))


def by_hand(made: Path) -> Path:
    """Write a folder and return it."""
    (made / "images").mkdir(parents=True)
    for number, image in enumerate(pixels()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(made / "images" / f"im{number}.png")
    np.savez(made / "responses.npz", responses=responses())
    (made / "recording.json").write_text('{"name": "mine"}')
    return made


def refused(path: Path, *said: str) -> None:
    """One sentence, which holds these words."""
    with pytest.raises(UserError) as raised:
        load_recordings(path)
    message = str(raised.value)
    assert "\n" not in message and message == message.strip() and not message.endswith(".")
    for words in said:
        assert words in message, message
