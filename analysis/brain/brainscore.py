"""Brain-Score's own benchmarks, for any network: where data cannot be had, one sentence says so.

What else is needed of Brain-Score can be had from here too: `prepare` and `brainscore_at_hand` (`preparing`),
`brain_model` and `brain_models` (`models`).
"""

from __future__ import annotations

import difflib
import math
import re
import socket
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from localsim.analysis.brain.models import brain_model as brain_model
from localsim.analysis.brain.models import brain_models as brain_models
from localsim.analysis.brain.models import region_layers_from as region_layers_from
from localsim.analysis.brain.preparing import INSTALL as INSTALL
from localsim.analysis.brain.preparing import brainscore_at_hand as brainscore_at_hand
from localsim.analysis.brain.preparing import cache_in_use
from localsim.analysis.brain.preparing import prepare as prepare
from localsim.analysis.brain.preparing import quiet as quiet
from localsim.errors import UserError


@dataclass(frozen=True)
class BenchmarkScore:
    """What Brain-Score's own benchmark gave a model.

    Attributes:
        benchmark, model: their identifiers; the latter holds the weights' hash.
        region, layer: what was recorded, and the layer that stood for it; empty for benchmarks of behaviour.
        value: Brain-Score's ceiled score. Neural benchmarks that fit or square lose the sign of a correlation here.
        raw: the score before it was divided by the ceiling, with its sign; None where a benchmark keeps none.
        ceiling: None where a benchmark keeps none.
        score: Brain-Score's object, with the values of all splits and neuroids.
    """

    benchmark: str
    model: str
    region: str
    layer: str
    value: float
    raw: float | None
    ceiling: float | None
    score: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        raw, ceiling = ("-" if number is None else f"{number:.3f}" for number in (self.raw, self.ceiling))
        where = f", {self.region} as {self.layer}" if self.region else ""
        return f"{self.benchmark}: {self.value:.3f} of its ceiling {ceiling} (raw {raw}){where}; model {self.model}"


def registered_benchmarks() -> list[str]:
    """Return the identifiers of Brain-Score's benchmarks, without loading any."""
    folder = Path(brainscore_at_hand().__file__).parent / "benchmarks"
    entry = re.compile(r"""^benchmark_registry\[['"]([^'"<]+)['"]\]""", re.MULTILINE)
    files = sorted(folder.glob("[!_.]*/__init__.py"))
    return sorted({name for file in files for name in entry.findall(file.read_text(encoding="utf-8"))})


def open_benchmark(name: str) -> Any:
    """Return a benchmark of Brain-Score's by its identifier, such as `MajajHong2015public.IT-pls`.

    Its ceiling is computed once. Some benchmarks fetch their data only when they are first used.

    Raises:
        UserError: there is no such benchmark, or its data cannot be fetched.
    """
    brainscore = brainscore_at_hand()
    if name not in (known := registered_benchmarks()):
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise UserError(f"Brain-Score has no benchmark {name!r}; close: {', '.join(close) or 'none'}")
    with quiet(), _fetching(name):
        made = brainscore.load_benchmark(name)
    if callable(ceiling := getattr(made, "_ceiling_func", None)):
        # without Brain-Score's cache, which goes by name, it would be computed for every model
        made._ceiling_func = lru_cache(1)(ceiling)
    return made


def score_benchmark(benchmark: Any, model: Any) -> BenchmarkScore:
    """Score a model on a benchmark of Brain-Score's, after Brain-Score's own check that memory will do.

    Args:
        benchmark: an identifier, or a benchmark object such as `open_benchmark` or `assemblies.benchmark` gives.
        model: a `BrainModel`, see `brain_model`.

    Raises:
        UserError: there is no such benchmark, its data cannot be fetched, its region has no layer in the model, memory
            would not do, or the score is no number.
    """
    brainscore_at_hand()
    opened = open_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    name = benchmark if isinstance(benchmark, str) else benchmark.identifier
    with quiet(), _fetching(name):
        region = str(getattr(opened, "region", None) or "")
        commitment = getattr(getattr(model, "layer_model", None), "region_layer_map", None)
        if region and commitment is not None and region not in commitment:
            raise UserError(f"benchmark {name} is of region {region}, for which the model has no layer; "
                            f"it has layers for {', '.join(commitment)}")  # fmt: skip
        try:
            opened.preallocate_memory(model)
        except MemoryError as error:
            told = re.search(r"[\d.]+ GB needed, [\d.]+ GB available", str(error))
            raise UserError(f"benchmark {name} does not fit into memory ({told[0] if told else error}); take a coarser "
                            "spatial") from error  # fmt: skip
        score = opened(model)
    if not math.isfinite(float(score)):
        raise UserError(f"benchmark {name} gives {model.identifier} the score {float(score)}: its responses or the "
                        "recorded ones do not vary, or a ceiling is not positive")  # fmt: skip
    raw, ceiling = score.attrs.get("raw"), score.attrs.get("ceiling")
    return BenchmarkScore(
        benchmark=name,
        model=model.identifier,
        region=region,
        layer=str(commitment[region]) if region and commitment is not None else "",
        value=float(score),
        raw=None if raw is None else float(raw),
        ceiling=None if ceiling is None else float(ceiling),
        score=score,
    )


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Turn what Brain-Score raises where it cannot fetch data into a sentence; all other errors stay what they are."""
    try:
        yield
    except Exception as error:
        if (cause := _not_fetched(error)) is None:
            raise
        raise UserError(
            f"benchmark {name} needs data that are not here and could not be fetched ({cause}); connect to the "
            f"network, or set BRAINIO_HOME to a folder that Brain-Score filled elsewhere (now {cache_in_use()})"
        ) from error


def _not_fetched(error: BaseException) -> str | None:
    """Return why data could not be fetched, or None if the error is another."""
    from botocore import exceptions  # type: ignore[import-not-found]

    amazon = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.NoCredentialsError,
        exceptions.ClientError,
    )
    # a file is tried with and without credentials, and what both raised goes into a bare Exception
    tried = error.args[0] if type(error) is Exception and error.args else None
    last = tried[-1] if isinstance(tried, list) and tried else error
    if isinstance(last, (*amazon, urllib.error.URLError, socket.gaierror, ConnectionError)):
        return " ".join(str(last).split())
    if isinstance(error, ValueError) and str(error).startswith("SHA1 mismatch"):
        return f"a file of theirs is damaged: {error}"
    return None
