"""The figure of `localsim cost`: what rules cost before training, against how finely the network is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, styled
from localsim.cost_table import in_words, shared_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from localsim.cost import Cost

_PANELS: dict[str, Callable[[Cost], float]] = {
    "held activations (MiB)": lambda cost: cost.held_bytes / 2**20,
    "arithmetic (GFLOP)": lambda cost: (cost.forward_flops + cost.backward_flops) / 1e9,
    "gradient path (unit blocks)": lambda cost: cost.gradient_path,
}


@styled
def cost_figure(costs: Sequence[Cost]) -> Figure:
    """Draw held bytes at the peak, FLOPs of a step and the gradient path against the number of stages, a line per rule.

    Args:
        costs: from `localsim.cost.cost`; those of one rule are joined in the order of their stages.
    """
    rules = list(dict.fromkeys(cost.rule for cost in costs))
    # places in a row, not a scale: few and many stages can be told apart alike
    place = {number: i for i, number in enumerate(sorted({len(cost.stages) for cost in costs}))}
    views_differ = len({cost.views for cost in costs}) > 1
    figure, _ = new_figure(11.6, 3.4, axes=False)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (what, value) in zip(panels, _PANELS.items(), strict=True):
        for number, (rule, colour) in enumerate(zip(rules, cycle(COLOURS), strict=False)):
            mine = sorted((cost for cost in costs if cost.rule == rule), key=lambda cost: len(cost.stages))
            # where colours come again, they come with other markers
            marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
            # later rules have smaller markers, so that those they cover can be seen
            axes.plot([place[len(cost.stages)] for cost in mine], [value(cost) for cost in mine], color=colour,
                      label=f"{rule} ({in_words('views', mine[0].views)})" if views_differ else rule,
                      marker=marker, markersize=max(4.0, 9 - 1.5 * number), linestyle="-")  # fmt: skip
        axes.set(title=what, xlabel="stages", ylim=(0, None), xlim=(-0.3, len(place) - 0.7))
        axes.set_xticks(list(place.values()), [str(number) for number in place])
    figure.suptitle(shared_settings(costs), fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="rule")
    return figure
