"""Plots for docs/, as SVG: the same numbers give the same bytes.

What lives here: how a plot looks. What must not: measuring.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

STYLE: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at any size
    "svg.hashsalt": "vtpm",  # identifiers are otherwise random
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#dddddd",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_LOOKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "store": {"color": "#0b5fa5", "marker": "o", "linewidth": 2.4, "zorder": 3},
    "SQLite WAL": {"color": "#c2571a", "marker": "s", "linewidth": 1.6},
    "LMDB": {"color": "#5b8c2a", "marker": "^", "linewidth": 1.6},
}
_FLOOR_COLOUR: Final = "#888888"
_XEN_BYTES: Final = 2 * 1024 * 1024 / 20_000  # Xen's vtpmmgr, the only size it has


def store_sizes(section_data: Mapping[str, Any], form: str = "svg") -> bytes:
    """Draw time of an update, bytes of a vTPM and time to open against the number of vTPMs; returns the file."""
    data = section_data["sizes"]
    counts: Sequence[int] = data["counts"]
    with mpl.rc_context(dict(STYLE)):
        figure, (update, size, opening) = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
        _lines(update, counts, data["update_us"])
        update.axhline(data["flush_us"], color=_FLOOR_COLOUR, linestyle="--", linewidth=1.2, label="one flush")
        update.set(title="One durable update, microseconds", ylim=(0, 1.1 * update.get_ylim()[1]))
        _lines(size, counts, data["bytes"])
        size.axhline(_XEN_BYTES, color=_FLOOR_COLOUR, linestyle=":", linewidth=1.2, label="Xen's 2 MiB / 20,000")
        size.set(title="On disk, bytes for each vTPM", ylim=(0, 1.1 * size.get_ylim()[1]))
        _lines(opening, counts, data["open_ms"])
        opening.set(title="Open and read everything, ms", yscale="log")
        opening.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        handles, labels = update.get_legend_handles_labels()
        more = size.get_legend_handles_labels()
        figure.legend(handles + more[0][-1:], labels + more[1][-1:], loc="outside lower center", ncols=5, frameon=False)
        return saved(figure, form)


def _lines(axes: Axes, counts: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    for name, values in series.items():
        axes.plot(counts, values, label=name, **_LOOKS[name])
    axes.set(xscale="log", xlabel="vTPMs in the store")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)


def saved(figure: Any, form: str) -> bytes:
    """Return a figure as a file, and close it."""
    buffer = io.BytesIO()
    if form == "svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(buffer, format=form, dpi=110)
    plt.close(figure)
    return buffer.getvalue()
