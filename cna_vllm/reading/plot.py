# SPDX-License-Identifier: Apache-2.0
"""Circuits and comparisons as PNG files.

Colours are Okabe and Ito's, told apart by people of any colour vision; sign and origin are also
told by direction and hatching, so that the pictures survive a grey printer.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from cna_vllm.files import write_atomic
from cna_vllm.reading.compare import Comparison
from cna_vllm.reading.glyphs import drawable, families
from cna_vllm.reading.profile import late_shares
from cna_vllm.reading.report import expected_text
from cna_vllm.reading.tokens import columns, visible
from cna_vllm.reading.vocabulary import Item, Reading
from cna_vllm.steering.circuit import Circuit, Neuron

MAX_NEURONS = 25
_BLUE, _ORANGE, _GREY, _SHADE = "#0072B2", "#E69F00", "#666666", "#EEEEEE"
_HATCH = "////"
_WIDTH = 12.5  # inches
_DPI = 120
_TITLE_WIDTH = 110  # characters
_TOKEN_WIDTH, _CELL_WIDTH = 16, 48


def plot_circuit(
    circuit: Circuit,
    path: str | os.PathLike[str],
    neurons: Sequence[Neuron],
    readings: Sequence[Reading] = (),
) -> None:
    """Draws neurons by layer and sign, and the `neurons` with their deltas and vocabulary items.

    At most MAX_NEURONS of them are drawn, the first ones.

    Raises:
        OSError: `path` cannot be written; it is then as it was.
    """
    neurons, readings = neurons[:MAX_NEURONS], readings[:MAX_NEURONS]
    rows = 0.29 * len(neurons) + 0.5
    heights = [2.6, rows] if neurons else [2.6]
    title = _title(f"{circuit.model}: circuit of {_count(len(circuit))}")
    figure = _figure(sum(heights) + 1.5 + 0.25 * title.count("\n"), title)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights, width_ratios=[5, 4, 4])
    _draw_profile(figure.add_subplot(grid[0, :]), circuit)
    if neurons:
        bars = figure.add_subplot(grid[1, 0] if readings else grid[1, :])
        _draw_strongest(bars, neurons)
        if readings:
            head = "promotes, strongest first", "suppresses, strongest first"
            for column, side in enumerate((0, 1), start=1):
                cells = [_cell(r.suppresses if side else r.promotes) for r in readings]
                _draw_cells(figure.add_subplot(grid[1, column], sharey=bars), head[side], cells)
    _save(figure, path)


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draws both circuits by layer with what they share, late shares, and the common deltas.

    Raises:
        OSError: `path` cannot be written; it is then as it was.
    """
    first, second = comparison.first, comparison.second
    chance = comparison.uniform
    title = "\n".join(
        [
            _title(f"A: {first.model}, {_count(len(first))}"),
            _title(f"B: {second.model}, {_count(len(second))}"),
            f"in both: {len(comparison.common)}, Jaccard {comparison.jaccard:.3f} "
            f"(by chance {expected_text(chance)}, p = {chance.p_value:.2g})",
        ]
    )
    figure = _figure(7.6 + 0.2 * title.count("\n"), title)
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1])
    _draw_profiles(figure.add_subplot(grid[0, :]), comparison)
    _draw_shares(figure.add_subplot(grid[1, 0]), comparison)
    _draw_deltas(figure.add_subplot(grid[1, 1]), comparison)
    _save(figure, path)


def _draw_profile(axes: Axes, circuit: Circuit) -> None:
    """Positive deltas up, negative ones down and hatched, unknown ones up and grey."""
    layers = range(circuit.num_layers)
    by_sign = {sign: [0] * circuit.num_layers for sign in (-1, 0, 1)}
    for neuron in circuit.neurons:
        by_sign[(neuron.delta > 0) - (neuron.delta < 0)][neuron.layer] += 1
    if any(by_sign[1]):
        axes.bar(layers, by_sign[1], color=_BLUE, label="higher on positive prompts")
    if any(by_sign[-1]):
        down = [-count for count in by_sign[-1]]
        label = "higher on negative prompts"
        axes.bar(layers, down, color=_ORANGE, hatch=_HATCH, edgecolor="white", label=label)
    if any(by_sign[0]):
        label = "activation difference unknown"
        axes.bar(layers, by_sign[0], bottom=by_sign[1], color=_GREY, hatch="..", label=label)
    shares = "   ".join(f"{s.name}: {s.share:.0%}" for s in late_shares(circuit))
    _layer_axis(axes, circuit.num_layers, f"neurons by layer      {shares}")
    _shade_last_quarter(axes, circuit)
    _legend(axes)


def _draw_strongest(axes: Axes, neurons: Sequence[Neuron]) -> None:
    """A bar for every neuron, the strongest at the top; its sign is also its direction."""
    places = range(len(neurons))
    for place, neuron in zip(places, neurons, strict=True):
        negative = neuron.delta < 0
        axes.barh(
            place,
            neuron.delta,
            color=_ORANGE if negative else _BLUE,
            hatch=_HATCH if negative else None,
            edgecolor="white",
        )
        axes.annotate(
            f"{neuron.delta:+.3g}" if neuron.delta else "unknown",
            (neuron.delta, place),
            xytext=(-4 if negative else 4, 0),
            textcoords="offset points",
            ha="right" if negative else "left",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(list(places), [f"layer {n.layer} · {n.index}" for n in neurons], fontsize=8)
    axes.set_ylim(len(neurons) - 0.4, -0.6)
    # Room for the numbers at the ends of the bars.
    reach = max(abs(neuron.delta) for neuron in neurons) or 1.0
    low, high = min(n.delta for n in neurons), max(n.delta for n in neurons)
    axes.set_xlim(-1.3 * reach if low < 0 else 0, 1.3 * reach if high > 0 or low == 0 else 0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5) if low or high else NullLocator())
    axes.set_xlabel("delta: mean activation on positive minus on negative prompts")
    _heading(axes, f"strongest {_count(len(neurons))}")


def _draw_cells(axes: Axes, head: str, cells: Sequence[str]) -> None:
    for place, cell in enumerate(cells):
        axes.text(0, place, cell, fontsize=8.5, va="center", clip_on=False)
    axes.set_axis_off()
    _heading(axes, head)


def _draw_profiles(axes: Axes, comparison: Comparison) -> None:
    """A up, B down and hatched; the part that both hold is dark in either bar."""
    a, b, both = (list(counts) for counts in zip(*comparison.by_layer, strict=True))
    layers = range(len(both))
    axes.bar(layers, a, color=_BLUE, label="A only")
    axes.bar(
        layers,
        [-count for count in b],
        color=_ORANGE,
        hatch=_HATCH,
        edgecolor="white",
        label="B only",
    )
    if any(both):
        axes.bar(layers, both, color="black", label="in both")
        axes.bar(layers, [-count for count in both], color="black")
    _layer_axis(axes, len(both), "neurons by layer")
    _shade_last_quarter(axes, comparison.first)
    _legend(axes)


def _draw_shares(axes: Axes, comparison: Comparison) -> None:
    first, second = late_shares(comparison.first), late_shares(comparison.second)
    places = range(len(first))
    for offset, letter, shares, color, hatch in (
        (-0.2, "A", first, _BLUE, None),
        (0.2, "B", second, _ORANGE, _HATCH),
    ):
        heights = [share.share for share in shares]
        bars = axes.bar(
            [place + offset for place in places],
            heights,
            0.38,
            label=letter,
            color=color,
            hatch=hatch,
            edgecolor="white",
        )
        axes.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=8, padding=2)
    for place, share in zip(places, first, strict=True):
        ends = (place - 0.42, place + 0.42)
        label = "spread evenly over layers" if place == 0 else "_"  # once in the legend
        axes.hlines(share.uniform, *ends, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set_xticks(list(places), [share.name for share in first])
    axes.set_ylim(0, 1.3)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel("share of the circuit")
    _heading(axes, "late layers")
    axes.legend(loc="upper left", ncols=3, fontsize=8, frameon=False)


def _draw_deltas(axes: Axes, comparison: Comparison) -> None:
    _heading(axes, f"deltas of the {_count(len(comparison.common))} in both")
    axes.set_xlabel("delta in A")
    axes.set_ylabel("delta in B")
    if not comparison.common:
        axes.text(0.5, 0.5, "no neuron in both", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for same, marker, color in ((True, "o", _BLUE), (False, "X", _ORANGE)):
        pairs = [(a.delta, b.delta) for a, b in comparison.common]
        chosen = [pair for pair in pairs if (pair[0] * pair[1] >= 0) is same]
        if chosen:
            label = f"{'equal' if same else 'opposite'} sign: {len(chosen)}"
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, marker=marker, color=color, s=30, alpha=0.8, label=label, zorder=3)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.axline((0, 0), slope=1, color=_GREY, linestyle=":", linewidth=1.2, label="A = B")
    if comparison.correlation is not None:
        axes.plot([], [], " ", label=f"correlation {comparison.correlation:+.2f}")
    axes.legend(loc="best", fontsize=8, frameon=True, framealpha=0.9)


def _layer_axis(axes: Axes, num_layers: int, heading: str) -> None:
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.set_xlabel("layer")
    axes.set_ylabel("neurons")
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.08)
    _heading(axes, heading)


def _shade_last_quarter(axes: Axes, circuit: Circuit) -> None:
    quarter = late_shares(circuit)[-1]
    axes.axvspan(
        quarter.first_layer - 0.5,
        circuit.num_layers - 0.5,
        color=_SHADE,
        zorder=0,
        label="last quarter of layers",
    )


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)


def _heading(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left")


def _cell(items: Sequence[Item]) -> str:
    """As many items as fit, at least one, each made visible and drawable."""
    cell = ""
    for item in items:
        piece = drawable(visible(item.text, _TOKEN_WIDTH))
        longer = f"{cell}   {piece}" if cell else piece
        if cell and columns(longer) > _CELL_WIDTH:
            break
        cell = longer
    return cell


def _count(neurons: int) -> str:
    return f"{neurons} neuron{'' if neurons == 1 else 's'}"


def _title(text: str) -> str:
    return textwrap.fill(drawable(text), _TITLE_WIDTH)


def _figure(height: float, title: str) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a pair of dollar signs in a token or a name is no formula
        text.set_fontfamily(families())
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, [buffer.getvalue()])
