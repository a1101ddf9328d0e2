"""What goes wrong on one of several processes: how the others learn of it, and what is said."""

# torch documents its stores and rendezvous, exported or not
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import errno
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import torch.distributed as dist

from localsim import runs
from localsim.errors import ProcessLost, TrainingFailed
from localsim.files import cause

ErrorOf = TypeVar("ErrorOf", bound=BaseException)
_Answer = TypeVar("_Answer")

_WORD_SECONDS = 5.0  # for a word with the store, when something has gone wrong already


class Words:
    """What a process leaves for the others in the store that they met at.

    Attributes:
        store: None for a process alone.
        path: the run folder, once it is known to be this run's.
    """

    def __init__(self, rank: int, size: int, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self.store: dist.Store | None = None
        self.path: Path | None = None
        self._word = False  # whether there is word of a failure

    def ask(self, question: Callable[[dist.Store], Any], seconds: float | None = None) -> Any:
        """Return what the store answers; torch itself waits without end where its host is stopped or cut off.

        Raises:
            RuntimeError: there is no answer within so many seconds, by default the time-out.
        """
        seconds = self.timeout_seconds if seconds is None else min(seconds, self.timeout_seconds)

        def ask() -> Any:
            assert self.store is not None
            return question(self.store)

        return within(seconds, ask, "the store of all processes")

    def tell(self, failure: Exception) -> None:
        """Leave word of a failure here, unless another has done so: the first alone is to be printed."""
        text = json.dumps({"text": str(failure) or type(failure).__name__, "step": vars(failure).get("step")})
        with suppress(Exception):
            if self.ask(lambda store: store.add("failures", 1), _WORD_SECONDS) > 1:
                said_elsewhere(failure)
            else:
                self.ask(lambda store: store.set("failure", text), _WORD_SECONDS)
            self._word = True

    def loss(self, error: Exception) -> TrainingFailed:
        """Return the error of a process that gets no answer: what another has told of itself, or that it is gone."""
        with suppress(Exception):  # a store that is gone, or does not answer either
            if self.ask(lambda store: store.check(["failure"]), _WORD_SECONDS):
                told = json.loads(self.ask(lambda store: store.get("failure"), _WORD_SECONDS))
                self._word = True
                if self.rank == 0 and self.path is not None and told["step"] is not None:
                    runs.drop_untried_checkpoint(self.path, told["step"])
                return said_elsewhere(TrainingFailed(told["text"]))
        return ProcessLost(
            f"process {self.rank} of {self.size} has lost another, which is gone or has not answered within "
            f"{self.timeout_seconds:g} s ({_reason(error)}); "
            + ("" if self.path is None else f"{_kept(self.path)}; ")
            + "start all processes again"
            + ("" if self.path is None else " with --resume")
        )

    def leave(self) -> None:
        """With word of a failure, let the host of the store go last: whoever comes too late would hear nothing."""
        if not self._word:
            return
        with suppress(Exception):
            until = time.monotonic() + _WORD_SECONDS
            gone = self.ask(lambda store: store.add("gone", 1), _WORD_SECONDS)
            while self.rank == 0 and gone < self.size and time.monotonic() < until:
                time.sleep(0.02)
                gone = self.ask(lambda store: store.add("gone", 0), _WORD_SECONDS)


def within(seconds: float, do: Callable[[], _Answer], what: str) -> _Answer:
    """Return what a function gives that waits for other processes, where torch knows no time-out or takes several.

    Raises:
        RuntimeError: there is no answer within so many seconds; `what` was waited for.
    """
    answers: SimpleQueue[tuple[_Answer | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        try:
            answers.put((do(), None))
        except Exception as error:
            answers.put((None, error))

    # a thread that never gets its answer ends with the process
    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise RuntimeError(f"timed out after {seconds:g} s of waiting for {what}") from None
    if error is not None:
        raise error
    return cast(_Answer, answer)


def in_a_sentence(error: Exception, path: Path) -> Exception:
    """Return what to say of an error that comes from elsewhere than this program, or the error itself."""
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return TrainingFailed(
            f"a process that reads images is gone ({cause(error)}); {_kept(path)}; continue with --resume"
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f": {error.filename}" if error.filename else ""
        return TrainingFailed(
            f"{cause(error)}{where}; {_kept(path)}; put the disk or folder right and continue with --resume"
        )
    return error


def is_loss(error: Exception) -> bool:
    """Return whether torch says that another process does not answer; gloo has no class of error for it."""
    if "DataLoader" in str(error):
        return False
    known = isinstance(error, getattr(dist, "DistError", ()))
    return known or (isinstance(error, RuntimeError) and _LOSS.search(str(error)) is not None)


def said_elsewhere(error: ErrorOf) -> ErrorOf:
    """Return the error, which another process prints."""
    vars(error)["said_elsewhere"] = True
    return error


def _reason(error: Exception) -> str:
    """Return the first sentence of an error, without the place in gloo's source that it begins with."""
    return re.sub(r"^\[[^\]]*\]\s*", "", cause(error)).split(". ")[0][:200]


def _kept(path: Path) -> str:
    newest = runs.newest_checkpoint(path)
    return f"{newest} is kept" if newest else "no checkpoint yet"


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM}
_LOSS = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe|socket", re.IGNORECASE)
