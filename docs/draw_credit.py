"""Draws the picture at the top of the README: `python docs/draw_credit.py`."""

from pathlib import Path

from localsim.analysis import plots
from localsim.credit import Credit

NAMES = ["stem + layer1", "layer2", "layer3", "layer4"]
RULES = {
    "End-to-end\nbackpropagation": Credit.end_to_end(4),
    "Blockwise\none loss per stage": Credit.blockwise(4),
    "Overlapping (LoCo)\neach loss reaches two stages": Credit.overlapping(4),
    "Chunked\none loss per two stages": Credit.chunked(4, 2),
    "Interlocking\nchanged by the next stage's loss": Credit.interlocking(4),
}

if __name__ == "__main__":
    figure = plots.gradient_paths([(title, c.matrix, c.taps, NAMES) for title, c in RULES.items()])
    for ending in ("svg", "png"):
        plots.save(figure, Path(__file__).with_name(f"credit.{ending}"))
