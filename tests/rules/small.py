"""Networks of one small size under any rule: what the tests of choices, combinations and reach share."""

from __future__ import annotations

import pytest
import torch

from localsim import engine
from localsim.assembly import build
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.presets import resolve

SMALL = {
    "backbone": "resnet20",
    "image_size": 16,
    "projector": [8, 8],
    "expand_width": 8,
    "zero_init_residual": False,  # with zero gains the weights inside a residual branch get a gradient of zero
}


def small(rule: str, **settings) -> dict:
    """Return small settings; the 16:8 patches of a rule or of a predictor have one row in 16 pixels, 8:4 have three."""
    made = {**SMALL, **settings}
    if resolve(rule, "quick", made).patches != "none":
        made.setdefault("patches", "8:4")
    return made


def step(net: LocalNetwork) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(net.parameters()).dtype
    views = [torch.randn(4, 3, 16, 16, generator=generator, dtype=dtype) for _ in range(2)]
    return engine.backward(net, *views, labels=torch.arange(4), key=3)


def refusal(rule: str, **settings) -> str:
    with pytest.raises(UserError) as error:
        step(build(rule, preset="quick", **{**SMALL, **settings}))
    said = str(error.value)
    assert "\n" not in said
    return said
