"""Brain-Score imported so that it installs nothing, writes nothing to the user's home and asks no server.

brainscore-vision (Schrimpf et al. 2018, bioRxiv 407007) is optional; everything here says so in a sentence without it.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from pathlib import Path
from typing import Any

from localsim.errors import UserError

INSTALL = (
    'pip install "localsim[brain]" in an environment with Python 3.11 and numpy below 2, which brainscore-vision needs'
)
_HOMES = {"RESULTCACHING_HOME": "result_caching", "BRAINSCORE_HOME": "brain-score", "MT_HOME": "model-tools"}
_prepared: Path | None = None


def prepare(home: Path | None = None) -> Path:
    """Set what Brain-Score reads from the environment, before its first import, and return where it will write.

    | variable | becomes, unless it is set | because otherwise |
    |---|---|---|
    | BS_INSTALL_DEPENDENCIES | `no`, whatever it was | every benchmark and metric that is loaded runs pip |
    | RESULTCACHING_DISABLE | `1` | activations, ceilings and scores are kept by name |
    | RESULTCACHING_HOME, BRAINSCORE_HOME, MT_HOME | folders in `home` | they lie in the user's home |
    | BRAINIO_HOME | a folder in `home` that shows what ~/.brainio holds | downloads land in the user's home |
    | AWS_EC2_METADATA_DISABLED | `true` | a server is asked for credentials and waited for |
    | MT_MULTITHREAD | `0` | threads are started per layer |

    Args:
        home: where to write, kept afterwards; by default a new temporary folder that is removed when Python ends, and
            downloads with it. Set BRAINIO_HOME to keep those.

    Raises:
        UserError: brainscore_vision was imported before and writes to the user's home, or was prepared for another
            `home`.
    """
    global _prepared
    os.environ["BS_INSTALL_DEPENDENCIES"] = "no"
    if _prepared is not None:
        if home is not None and Path(home).resolve() != _prepared:
            raise UserError(f"Brain-Score writes to {_prepared} already in this process, and cannot to {home} as well")
        return _prepared
    screen = sys.modules.get("brainscore_vision.benchmark_helpers.screen")
    if screen is not None and "BRAINSCORE_HOME" not in os.environ:
        raise UserError(
            f"brainscore_vision was imported before localsim prepared it, and would write to {screen.framework_home}; "
            "call localsim.analysis.brain.brainscore.prepare() first, or set BRAINSCORE_HOME before the import"
        )
    if home is None:
        home = Path(tempfile.mkdtemp(prefix="localsim-brainscore-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    _prepared = Path(home).resolve()
    for variable, folder in _HOMES.items():
        os.environ.setdefault(variable, str(_prepared / folder))
    if "BRAINIO_HOME" not in os.environ:
        _show(Path("~/.brainio").expanduser(), _prepared / "brainio")
        os.environ["BRAINIO_HOME"] = str(_prepared / "brainio")
    for variable, value in {
        "RESULTCACHING_DISABLE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MT_MULTITHREAD": "0",
    }.items():
        os.environ.setdefault(variable, value)
    return _prepared


def _show(cache: Path, folder: Path) -> None:
    """Link every file and folder of a cache `<hash>/<file>`, so that it is read but only `folder` is written to."""
    for kept in cache.glob("*/*"):
        link = folder / kept.parent.name / kept.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists() and not link.is_symlink():
            link.symlink_to(kept)
    for link in folder.glob("*/*"):
        if not link.exists():  # what it showed is gone
            link.unlink()


def brainscore_at_hand() -> Any:
    """Return the module brainscore_vision, prepared by `prepare`.

    Raises:
        UserError: it is not installed or cannot be imported, or see `prepare`.
    """
    prepare()
    if importlib.util.find_spec("brainscore_vision") is None:
        raise UserError(f"this needs Brain-Score, which is not installed; do {INSTALL}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarnings of old pandas and xarray among each other
            return importlib.import_module("brainscore_vision")
    except (ImportError, AttributeError) as error:  # numpy 2 lacks names that old packages look up
        raise UserError(f"Brain-Score cannot be imported ({error}); do {INSTALL}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Brain-Score's progress bars, reports on stdout and warnings of age from the user inside the block."""
    from tqdm import std

    loggers = [logging.getLogger(name) for name in ("brainscore_vision", "brainscore_core")]
    levels = [logger.level for logger in loggers]
    shown = vars(std.tqdm)["__init__"]  # as it stands there: looked up, it is bound anew each time
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        std.tqdm.__init__ = partialmethod(shown, disable=True)  # type: ignore[method-assign, assignment]
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", kind)
            # a StimulusSet is a table that is given attributes
            warnings.filterwarnings("ignore", "Pandas doesn't allow columns to be created", UserWarning)
            yield
    finally:
        std.tqdm.__init__ = shown  # type: ignore[method-assign]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cache_in_use() -> str:
    """Return the folder in which Brain-Score looks for data, in words."""
    kept = os.environ.get("BRAINIO_HOME", "~/.brainio")
    return "not set; ~/.brainio is read" if _prepared is not None and Path(kept) == _prepared / "brainio" else kept
