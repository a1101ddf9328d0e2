"""Published recordings as their authors' files hold them, read where they lie."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.brain.folders import DAMAGED
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet
from localsim.data.images import UnreadableImageError, decode
from localsim.errors import UserError

COWLEY = (
    "Cowley, Stan, Pillow & Smith (2026), Compact deep neural network models of the visual cortex, Nature 652:947-954, "
    "doi 10.1038/s41586-026-10150-1"
)
KRIEGESKORTE = (
    "Kriegeskorte, Mur, Ruff, Kiani, Bodurka, Esteky, Tanaka & Bandettini (2008), Matching categorical object "
    "representations in inferior temporal cortex of man and monkey, Neuron 60:1126-1141; monkey recordings: Kiani, "
    "Esteky, Mirpour & Tanaka (2007), J Neurophysiol 97:4296-4309"
)
_BASHIVAN = "; images: Bashivan, Kar & DiCarlo (2019), Science 364:eaav9436"

# animal, and how often each image was shown, of the sessions of Cowley et al. for which both are known
_SESSIONS = {"210325": ("PE", "6-10"), "201025": ("PE", "12"), "190923": ("WE", "14"), "210621": ("RA", "16")}
_SESSION_FILE = re.compile(r"(?:responses_(?:raw|avg)_(\d{6})\.npy|images_(\d{6})\.zip)")
_MONKEY_AND_IMAGES, _HUMANS = "Kriegeskorte_Neuron2008_supplementalData.mat", "92_brainRDMs.mat"


def is_cowley(folder: Path) -> bool:
    """Say whether a folder holds files of the V4 recordings of Cowley et al. 2026."""
    return bool(_sessions(folder))


def load_cowley(folder: Path) -> list[Recording]:
    """Return the V4 sessions of Cowley et al. 2026 in a folder, one recording each, by session.

    A session is `responses_raw_S.npy` `(neurons, images, trials)`, NaN where there was no trial, or else
    `responses_avg_S.npy` `(neurons, images)`, averaged over trials, with `images_S.zip`. Spike counts are of 100 ms,
    images are 11.2 degrees wide.

    Raises:
        UserError: no session is complete. Where some are, the others are left out with a warning.
    """
    found, left_out = [], []
    for session in _sessions(folder):
        try:
            found.append(_cowley_session(folder, session))
        except UserError as error:
            left_out.append(f"{session} ({error})")
    if not found:
        raise UserError(f"{folder} holds no complete session of Cowley et al. 2026: {', '.join(left_out)}")
    if left_out:
        warnings.warn(f"left out sessions of Cowley et al. 2026 in {folder}: {', '.join(left_out)}", stacklevel=3)
    return found


def is_kriegeskorte(folder: Path) -> bool:
    """Say whether a folder holds files of the 92 images of Kriegeskorte et al. 2008."""
    return any((folder / name).is_file() for name in (_MONKEY_AND_IMAGES, _HUMANS))


def load_kriegeskorte(folder: Path) -> list[Recording]:
    """Return the RDMs of monkey and human inferior temporal cortex for 92 images (Kriegeskorte et al. 2008).

    One recording: region "monkey IT" has one matrix, pooled over 674 neurons of two animals; "human IT" has two
    sessions of each of four people. Dissimilarity is 1 - Pearson r between response patterns.

    Raises:
        UserError: the file with the images is missing or damaged. Without the human matrices, the monkeys' are
            returned with a warning.
    """
    if not (folder / _MONKEY_AND_IMAGES).is_file():
        raise UserError(f"{folder} has no {_MONKEY_AND_IMAGES}, which holds the 92 images and the monkeys' matrix")
    from scipy.spatial.distance import squareform

    try:
        main = _mat(folder / _MONKEY_AND_IMAGES)
        shown = main["stimuli_92objs"]
        images = torch.from_numpy(np.stack([one.image for one in shown])).permute(0, 3, 1, 2).contiguous()
        monkeys = next(one.RDM for one in main["RDMs_mIT_hIT_fig1"] if one.name.startswith("mIT"))
        rows = [("monkey IT", "two monkeys pooled", "674 neurons", squareform(np.asarray(monkeys, dtype=np.float64)))]
        if (folder / _HUMANS).is_file():
            rows += [_human(one) for one in _mat(folder / _HUMANS)["RDMs"].ravel()]
        else:
            warnings.warn(f"left out human IT of Kriegeskorte et al. 2008: {folder} has no {_HUMANS}", stacklevel=3)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} does not hold the files of Kriegeskorte et al. 2008 as published") from error
    regions, subjects, names, rdms = zip(*rows, strict=True)
    made = Recording(
        name="kriegeskorte2008",
        images=ImageSet(images, None, None),
        rdms=np.stack(rdms),
        regions=regions,
        subjects=subjects,
        names=names,
        groups=tuple(str(one.category) for one in shown),
        unit="1 - Pearson r",
        citation=KRIEGESKORTE,
    )
    return [made]


def _sessions(folder: Path) -> list[str]:
    files = (_SESSION_FILE.fullmatch(file.name) for file in folder.iterdir())
    return sorted({match[1] or match[2] for match in files if match})


def _cowley_session(folder: Path, session: str) -> Recording:
    raw, averaged = (folder / f"responses_{kind}_{session}.npy" for kind in ("raw", "avg"))
    file, axes = (raw, 3) if raw.is_file() else (averaged, 2)
    if not file.is_file():
        raise UserError(f"no {raw.name} or {averaged.name}")
    if not (folder / f"images_{session}.zip").is_file():
        raise UserError(f"no images_{session}.zip")
    try:
        values = np.load(file, allow_pickle=False)
    except DAMAGED:
        raise UserError(f"{file.name} cannot be read") from None
    if values.ndim != axes or values.dtype.kind not in "fiu":
        shape = "(neurons, images, trials)" if axes == 3 else "(neurons, images)"
        raise UserError(f"{file.name} is {values.dtype} of shape {values.shape}; allowed: numbers {shape}")
    called, images = _zipped(folder / f"images_{session}.zip")
    if len(called) != values.shape[1]:
        raise UserError(f"images_{session}.zip holds {len(called)} images, {file.name} {values.shape[1]}")
    subject, repeats = _SESSIONS.get(session, ("unknown", ""))
    # only the images of 210325 were not the authors' own
    citation = COWLEY + (_BASHIVAN if session == "210325" else "")
    return Recording(
        name=f"cowley2026 {session}",
        images=ImageSet(images, None, None),
        responses=values.swapaxes(0, 1),
        regions=("V4",) * len(values),
        subjects=(subject,) * len(values),
        stimuli=called,
        bins=((50.0, 150.0),),
        unit="spikes in 100 ms",
        degrees=11.2,
        repeats=repeats,
        citation=citation,
    )


def _zipped(file: Path) -> tuple[tuple[str, ...], Tensor]:
    """Return the names and pixels `(n, 3, H, W)` of the JPEG files in an archive, sorted by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = sorted(
                one for one in archive.namelist() if one.endswith(".jpg") and not one.startswith("__MACOSX")
            )
            images = []
            for member in members:
                try:
                    with archive.open(member) as opened:
                        # PIL, and so decode, takes open files as well as paths
                        images.append(decode(cast(Path, opened)))
                except UnreadableImageError:
                    raise UserError(f"{member} in {file.name} cannot be read") from None
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file.name} cannot be read") from None
    if not images:
        raise UserError(f"{file.name} holds no images")
    if (sizes := len({image.shape for image in images})) > 1:
        raise UserError(f"{file.name} holds images of {sizes} sizes")
    return tuple(Path(member).stem for member in members), torch.stack(images)


def _human(one: Any) -> tuple[str, str, str, np.ndarray]:
    """Return region, subject, name and matrix of a struct whose name is such as `hIT | BE | Session: 1`."""
    _, subject, session = (part.strip() for part in str(one.name).split("|"))
    return "human IT", subject, f"{subject} session {session.removeprefix('Session:').strip()}", np.asarray(one.RDM)


def _mat(file: Path) -> dict[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        # structs of numbers and text only: nothing in such a file is run
        return loadmat(file, squeeze_me=True, struct_as_record=False)
    except (*DAMAGED, MatReadError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
