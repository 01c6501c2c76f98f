"""Plots of what an instance costs beside swtpm: the time of a command, of a start, and memory."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import plots
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLOURS: Final = ("#0b5fa5", "#5aa0d8", "#c2571a")  # ours, ours by another way, swtpm
_PARTS: Final = ("#0b5fa5", "#5aa0d8", "#a9cdea", "#5b8c2a", "#b7b7b7", "#d9a679")
_LIMIT: Final[Mapping[str, Any]] = {"color": "#333333", "linestyle": "--", "linewidth": 1.2}
_WIDTH: Final = 0.26  # of a bar, where the space from one command to the next is 1


def round_trips(section_data: Mapping[str, Any], form: str = "svg") -> bytes:
    """Draw the time of each command by each way, pinned and unpinned; returns the file.

    `section_data`: "commands", and "pinned" and "free": microseconds by party, "limits": factors of swtpm by party.
    """
    commands: Sequence[str] = section_data["commands"]
    with mpl.rc_context(dict(plots.STYLE)):
        figure, (pinned, free) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
        for axes, which, title in ((pinned, "pinned", "one CPU for all"), (free, "free", "scheduler places them")):
            parties: Mapping[str, Sequence[float]] = section_data[which]
            for place, ((party, values), colour) in enumerate(zip(parties.items(), _COLOURS, strict=True)):
                where = [number + (place - 1) * _WIDTH for number in range(len(commands))]
                axes.bar(where, values, _WIDTH, color=colour, label=party)
            axes.set_xticks(range(len(commands)), commands)
            axes.set(title=f"A command, microseconds ({title})")
            axes.grid(visible=False, axis="x")
        _limits(pinned, section_data)
        figure.legend(*pinned.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return plots.saved(figure, form)


def _limits(axes: Axes, section_data: Mapping[str, Any]) -> None:
    """Mark what each of our ways may take at most; swtpm is the last party."""
    (*ours, peer), limits = section_data["pinned"].items(), section_data["limits"]
    for place, (party, _) in enumerate(ours):
        for number, theirs in enumerate(peer[1]):
            middle = number + (place - 1) * _WIDTH
            label = "limit" if (place, number) == (0, 0) else None
            axes.hlines(theirs * limits[party], middle - _WIDTH / 2, middle + _WIDTH / 2, label=label, **_LIMIT)


def stacked(section_data: Mapping[str, Any], form: str = "svg") -> bytes:
    """Draw what makes up a whole, a bar for each party; returns the file.

    `section_data`: "unit" (the title), "bars": for each party numbers by part, "limit" and "limit_label".
    """
    bars: Mapping[str, Mapping[str, float]] = section_data["bars"]
    parts = list(dict.fromkeys(part for of in bars.values() for part in of))
    with mpl.rc_context(dict(plots.STYLE)):
        figure, axes = plt.subplots(figsize=(9, 0.8 + 0.75 * len(bars)), layout="constrained")
        left = [0.0] * len(bars)
        for part, colour in zip(parts, _PARTS, strict=False):
            widths = [of.get(part, 0.0) for of in bars.values()]
            axes.barh(list(bars), widths, 0.6, left=left, color=colour, label=part)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.axvline(section_data["limit"], label=section_data["limit_label"], **_LIMIT)
        axes.set(title=section_data["unit"])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
        return plots.saved(figure, form)
