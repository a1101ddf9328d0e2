"""How a process learns that it is one of several: from torchrun's variables, or from Slurm's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from localsim.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among those of a run: its rank, how many there are, and its number on its own host."""

    rank: int
    size: int
    local_rank: int


def find_place(variables: Mapping[str, str] | None = None) -> Place | None:
    """Return this process's place, or None for a process of its own.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Under plain `srun` Slurm's SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID stand for them, where MASTER_ADDR and MASTER_PORT are set; without those, `srun` starts runs that know
    nothing of each other.

    Args:
        variables: of the environment; by default this process's own.

    Raises:
        UserError: a variable is missing or no number.
    """
    found = os.environ if variables is None else variables
    if "RANK" in found or "WORLD_SIZE" in found:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "MASTER_ADDR" in found and "SLURM_PROCID" in found:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return None
    values = {name: _number(found, name, default="0" if name == "LOCAL_RANK" else None) for name in names}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in found:
            raise UserError(f"{names[0]} is set but {name} is not; torchrun sets both, under srun export them")
    place = Place(*values.values())
    if not 0 <= place.rank < place.size:
        raise UserError(f"{names[0]} is {place.rank}; allowed: 0 to {names[1]} - 1, which is {place.size - 1}")
    return place if place.size > 1 else None


def _number(found: Mapping[str, str], name: str, default: str | None) -> int:
    text = found.get(name, default)
    if text is None or not text.strip().isdigit():
        raise UserError(f"{name} is {text!r}; allowed: a number, as torchrun and Slurm set it")
    return int(text)
