"""Layerwise learning: blockwise at the finest cut, one unit block per stage."""

import dataclasses

from localsim.rules.blockwise import RULE as BLOCKWISE

RULE = dataclasses.replace(
    BLOCKWISE,
    name="layerwise",
    summary="Every unit block (stem, residual block, conv layer) is trained by its own loss alone.",
    granularity="block",
    meaningless={
        "granularity": "it is one unit block per stage; use --rule blockwise --granularity N",
        "cuts": "it is one unit block per stage; use --rule blockwise --cuts ...",
    },
)
