"""The credit matrix: which loss may change which stage.

A backbone is cut into stages 1..K with parameters theta_i. Losses ("taps") L_t read the output of stage p(t). The
matrix

    C[t, i] >= 0,    update_i = sum_t C[t, i] * dL_t / dtheta_i,    C[t, i] = 0 for i > p(t)

says with which weight tap t may change stage i. The gradient of tap t travels from p(t) down to the lowest stage with
C[t, i] > 0, through stages between them even where their own entry is 0. A tap's readout and head are always trained by
its own loss with weight 1, whatever its row says.

In code stages and taps count from 0; in text and pictures stages count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localsim.errors import UserError


@dataclass(frozen=True, eq=False)
class Credit:
    """A validated credit matrix.

    Args:
        matrix: `(taps, stages)` weights; finite, non-negative, zero above each tap's stage. Kept as read-only float64.
        taps: the stage (from 0) that each tap reads, in non-decreasing order; one entry per row.

    Raises:
        UserError: the matrix is not of this form; the message names the offending entry.
    """

    matrix: np.ndarray
    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            matrix = np.array(self.matrix, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise UserError("the credit matrix must be a rectangular table of numbers") from None
        if matrix.ndim != 2 or matrix.shape[1] == 0:
            raise UserError(f"a credit matrix is a (taps, stages) table with at least one stage, not {matrix.shape}")
        if len(self.taps) != matrix.shape[0]:
            raise UserError(f"the credit matrix has {matrix.shape[0]} rows but {len(self.taps)} taps are named")
        for tap, stage in enumerate(self.taps):
            if not isinstance(stage, int | np.integer) or not 0 <= stage < matrix.shape[1]:
                raise UserError(f"tap {tap} reads stage {stage!r}; allowed: 0 to {matrix.shape[1] - 1}")
        taps = tuple(int(stage) for stage in self.taps)
        if list(taps) != sorted(taps):
            raise UserError(f"taps must be listed from the bottom up, not {list(taps)}")
        for (tap, stage), weight in np.ndenumerate(matrix):
            if not (np.isfinite(weight) and weight >= 0):
                raise UserError(f"credit[{tap}, {stage}] is {weight}; allowed: finite numbers >= 0")
            if weight > 0 and stage > taps[tap]:
                raise UserError(
                    f"credit[{tap}, {stage}] is {weight:g}, but tap {tap} reads stage {taps[tap]}: "
                    "a loss cannot change a stage above the one it reads"
                )
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "taps", taps)

    # -- constructors, named after design and literature -------------------------------------------------------------

    @classmethod
    def end_to_end(cls, num_stages: int) -> Credit:
        """Return one tap on the last stage that may change every stage: backpropagation."""
        _positive("number of stages", num_stages)
        return cls(np.ones((1, num_stages)), (num_stages - 1,))

    @classmethod
    def blockwise(cls, num_stages: int) -> Credit:
        """Return the identity: each stage has a tap that changes it alone (Siddiqui et al. 2023; GIM; CLAPP)."""
        return cls.banded(num_stages, reach=1)

    @classmethod
    def banded(cls, num_stages: int, reach: int = 1, taps: Sequence[int] | None = None) -> Credit:
        """Return taps that each change their own stage and the `reach - 1` below it.

        C[t, i] = 1 for p(t) - reach < i <= p(t).

        `taps` are the stages that carry a tap, by default all of them.
        """
        _positive("number of stages", num_stages)
        if not 1 <= reach <= num_stages:
            raise UserError(f"reach {reach} does not fit {num_stages} stages; allowed: 1 to {num_stages}")
        taps = range(num_stages) if taps is None else taps
        stages = np.arange(num_stages)
        rows = [(stages <= tap) & (stages > tap - reach) for tap in taps]
        return cls(np.array(rows, dtype=float).reshape(len(rows), num_stages), tuple(taps))

    @classmethod
    def overlapping(cls, num_stages: int, reach: int = 2) -> Credit:
        """Return taps on stages reach..K that each reach `reach` stages, none below (LoCo, Xiong et al. 2020, Fig. 1).

        With `reach` equal to the number of stages this is end-to-end.
        """
        return cls.banded(num_stages, reach, taps=range(reach - 1, num_stages))

    @classmethod
    def chunked(cls, num_stages: int, size: int = 2) -> Credit:
        """Return chunks of `size` stages, each with one tap on top that changes the whole chunk (Laskin et al. 2020).

        Where `size` does not divide the number of stages the last chunk is shorter.
        """
        _positive("number of stages", num_stages)
        if not 1 <= size <= num_stages:
            raise UserError(f"chunk size {size} does not fit {num_stages} stages; allowed: 1 to {num_stages}")
        starts = range(0, num_stages, size)
        tops = tuple(min(start + size, num_stages) - 1 for start in starts)
        matrix = np.zeros((len(tops), num_stages))
        for row, (start, top) in enumerate(zip(starts, tops, strict=True)):
            matrix[row, start : top + 1] = 1
        return cls(matrix, tops)

    @classmethod
    def interlocking(cls, num_stages: int, n: int = 2) -> Credit:
        """Return a tap on every stage; stage i is changed only by the tap n-1 ahead, or the last (Gomez et al. 2022).

        The lowest n-1 taps change no stage: they train their own heads. n = K is end-to-end on the backbone.
        """
        _positive("number of stages", num_stages)
        if not 1 <= n <= num_stages:
            raise UserError(f"interlocking n={n} does not fit {num_stages} stages; allowed: 1 to {num_stages}")
        matrix = np.zeros((num_stages, num_stages))
        for stage in range(num_stages):
            matrix[min(stage + n - 1, num_stages - 1), stage] = 1
        return cls(matrix, tuple(range(num_stages)))

    @classmethod
    def deep_supervision(cls, num_stages: int) -> Credit:
        """Return the lower triangle of ones: a tap on every stage that changes all stages below it."""
        return cls.banded(num_stages, reach=num_stages)

    @classmethod
    def untrained(cls, num_stages: int) -> Credit:
        """Return a matrix without taps: nothing is learned, the control that every comparison needs."""
        _positive("number of stages", num_stages)
        return cls(np.zeros((0, num_stages)), ())

    def only(self, taps: Sequence[int]) -> Credit:
        """Return the matrix of some of the taps alone, over the same stages."""
        return Credit(
            self.matrix[list(taps)].reshape(len(taps), self.num_stages), tuple(self.taps[tap] for tap in taps)
        )

    # -- what the matrix implies -------------------------------------------------------------------------------------

    @property
    def num_stages(self) -> int:
        """How many stages the matrix speaks of (its columns)."""
        return self.matrix.shape[1]

    @property
    def num_taps(self) -> int:
        """How many losses there are (its rows)."""
        return self.matrix.shape[0]

    def lowest(self, tap: int) -> int | None:
        """Return the lowest stage that a tap's gradient must travel to, or None if it changes no stage."""
        changed = np.flatnonzero(self.matrix[tap])
        return int(changed[0]) if changed.size else None

    def path_to(self, stage: int, units_per_stage: Sequence[int] | None = None) -> int:
        """Return the longest gradient path that ends in `stage`, in unit blocks (in stages where none are given).

        A path runs from the farthest tap that may change the stage down to the stage's first unit block, both ends
        counted; 0 means that the stage is never changed.
        """
        units = self._units(units_per_stage)
        paths = [sum(units[stage : self.taps[tap] + 1]) for tap in np.flatnonzero(self.matrix[:, stage])]
        return max(paths, default=0)

    def longest_path(self, units_per_stage: Sequence[int] | None = None) -> int:
        """Return how many unit blocks (stages where none are given) the longest gradient crosses."""
        return max(self.path_to(stage, units_per_stage) for stage in range(self.num_stages))

    def max_alive(self) -> int:
        """Return how many stage graphs must be alive at once when every graph is freed as early as C allows."""
        alive = [
            sum(stage <= now <= last for stage, last in enumerate(self.last_use())) for now in range(self.num_stages)
        ]
        return max(alive)

    def last_use(self, fires: Sequence[int] | None = None) -> list[int]:
        """Return for every stage the last stage whose forward pass its graph must outlive; -1 where it needs none.

        Args:
            fires: for each tap the stage after whose forward pass it can compute its loss; by default the one it reads.
        """
        fires = self.taps if fires is None else fires
        return [
            max(
                (fires[t] for t, top in enumerate(self.taps) if top >= stage and self.matrix[t, : stage + 1].any()),
                default=-1,
            )
            for stage in range(self.num_stages)
        ]

    def crossing(self, border: int) -> tuple[int, ...]:
        """Return the taps on stages from `border` on that may change a stage below it."""
        pairs = zip(self.taps, self.matrix, strict=True)
        return tuple(tap for tap, (top, row) in enumerate(pairs) if top >= border and row[:border].any())

    def signals_down(self, border: int) -> int:
        """Return how many signals come down to stage `border - 1` from the taps at and above stage `border`.

        One per group of taps whose credit for what is below the border is proportional: these travel as one.
        """
        rows = [self.matrix[tap, :border] for tap in self.crossing(border)]
        return len({(row / row.max()).tobytes() for row in rows})

    def _units(self, units_per_stage: Sequence[int] | None) -> Sequence[int]:
        units = [1] * self.num_stages if units_per_stage is None else units_per_stage
        if len(units) != self.num_stages:
            raise UserError(f"{len(units)} unit counts were given for {self.num_stages} stages")
        return units

    # -- text and files ----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        header = "credit      " + " ".join(f"{stage + 1:>3}" for stage in range(self.num_stages)) + "   (stage)"
        if not self.num_taps:
            return f"{header}\n  no tap: nothing is trained"
        rows = [
            f"  tap on {self.taps[tap] + 1:>3} " + " ".join("  ." if w == 0 else f"{w:3g}" for w in self.matrix[tap])
            for tap in range(self.num_taps)
        ]
        return "\n".join([header, *rows])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Credit):
            return NotImplemented
        return self.taps == other.taps and np.array_equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash((self.taps, self.matrix.shape, self.matrix.tobytes()))

    def to_config(self) -> dict[str, Any]:
        """Return plain lists for a configuration file; `Credit.from_config` is the inverse."""
        return {"num_stages": self.num_stages, "taps": list(self.taps), "matrix": self.matrix.tolist()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Credit:
        """Return the matrix that `to_config` wrote down."""
        missing = [name for name in ("num_stages", "taps", "matrix") if name not in config]
        if missing:
            raise UserError(
                f"the credit entry lacks {', '.join(missing)}; it looks like "
                '{"num_stages": 2, "taps": [0, 1], "matrix": [[1, 0], [0, 1]]}, taps counted from 0'
            )
        try:
            rows = config["matrix"] or np.zeros((0, config["num_stages"]))
            taps = tuple(config["taps"])
        except (TypeError, ValueError, MemoryError):  # numpy's words for a number of stages that is none
            raise UserError("the credit entry needs num_stages (a number), taps and matrix (lists)") from None
        return cls(rows, taps)

    def draw(self, stage_names: Sequence[str] | None = None, title: str = ""):
        """Return a matplotlib figure of the matrix: rows are taps, columns stages."""
        from localsim.analysis import plots

        names = stage_names or [str(stage + 1) for stage in range(self.num_stages)]
        return plots.credit_matrix(self.matrix, self.taps, names, title)


def _positive(what: str, value: int) -> None:
    if value < 1:
        raise UserError(f"the {what} is {value}; allowed: 1 or more")
