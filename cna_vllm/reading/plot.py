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

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter

from cna_vllm.files import write_atomic
from cna_vllm.reading.compare import Comparison
from cna_vllm.reading.glyphs import drawable, families
from cna_vllm.reading.profile import expert_counts, late_shares
from cna_vllm.reading.report import expected_text
from cna_vllm.reading.tokens import columns, visible
from cna_vllm.reading.vocabulary import Item, Reading
from cna_vllm.steering.circuit import Circuit, Neuron

MAX_NEURONS = 25
_BLUE, _ORANGE, _GREY, _SHADE = "#0072B2", "#E69F00", "#666666", "#EEEEEE"
_HATCH = "////"
_WIDTH = 12.5  # inches
_STRIP = 0.5  # height of the experts' strip
_TOP_EXPERTS = 8
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

    At most MAX_NEURONS of them are drawn, the first ones. Raises OSError if `path` cannot be
    written; it is then as it was.
    """
    neurons, readings = neurons[:MAX_NEURONS], readings[:MAX_NEURONS]
    rows = 0.29 * len(neurons) + 0.5
    heights = [2.6, *([_STRIP] if circuit.is_routed else []), *([rows] if neurons else [])]
    title = _title(f"{circuit.model}: circuit of {_count(len(circuit))}")
    figure = _figure(sum(heights) + 1.5 + 0.25 * title.count("\n") + circuit.is_routed, title)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights, width_ratios=[5, 4, 4])
    _draw_profile(figure.add_subplot(grid[0, :]), circuit)
    if circuit.is_routed:
        _draw_experts(figure.add_subplot(grid[1, :]), circuit)
    if neurons:
        bars = figure.add_subplot(grid[-1, 0] if readings else grid[-1, :])
        _draw_strongest(bars, neurons)
        if readings:
            for column, side in enumerate(("promotes", "suppresses"), start=1):
                cells = [_cell(getattr(reading, side)) for reading in readings]
                _draw_cells(figure.add_subplot(grid[-1, column], sharey=bars), side, cells)
    _save(figure, path)


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draws both circuits by layer with what they share, late shares, and the common deltas.

    Raises OSError as `plot_circuit` does.
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
        _draw_down(axes, by_sign[-1], "higher on negative prompts")
    if any(by_sign[0]):
        label = "activation difference unknown"
        axes.bar(layers, by_sign[0], bottom=by_sign[1], color=_GREY, hatch="..", label=label)
    shares = "   ".join(f"{s.name}: {s.share:.0%}" for s in late_shares(circuit))
    _finish_layers(axes, circuit, f"neurons by layer      {shares}")


def _draw_experts(axes: Axes, circuit: Circuit) -> None:
    """A strip: neurons of routed experts by layer, all experts of a layer summed; its heading names
    the experts with most."""
    counts = expert_counts(circuit)
    by_layer = [0] * circuit.num_layers
    for layer, _, count in counts:
        by_layer[layer] += count
    axes.imshow([by_layer], cmap="Greys", aspect="auto", vmin=0)
    for layer, count in enumerate(by_layer):
        if count:
            colour = "white" if count > max(by_layer) / 2 else "black"
            axes.text(layer, 0, str(count), color=colour, fontsize=7, ha="center", va="center")
    axes.set_xlim(-0.7, circuit.num_layers - 0.3)
    axes.set_yticks([])
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    top = ", ".join(f"{layer}/{expert}: {count}" for layer, expert, count in counts[:_TOP_EXPERTS])
    _heading(axes, f"of them in routed experts; most in layer/expert {top}")


def _place(neuron: Neuron) -> str:
    expert = "" if neuron.expert is None else f" · expert {neuron.expert}"
    return f"layer {neuron.layer}{expert} · {neuron.index}"


def _draw_down(axes: Axes, counts: Sequence[int], label: str) -> None:
    down = [-count for count in counts]
    axes.bar(range(len(down)), down, color=_ORANGE, hatch=_HATCH, edgecolor="white", label=label)


def _draw_strongest(axes: Axes, neurons: Sequence[Neuron]) -> None:
    """A bar for every neuron, the strongest at the top; its sign is also its direction."""
    deltas = [neuron.delta for neuron in neurons]
    bars = axes.barh(
        range(len(neurons)),
        deltas,
        color=[_ORANGE if delta < 0 else _BLUE for delta in deltas],
        hatch=[_HATCH if delta < 0 else "" for delta in deltas],
        edgecolor="white",
        tick_label=[_place(neuron) for neuron in neurons],
    )
    numbers = [f"{delta:+.3g}" if delta else "unknown" for delta in deltas]
    axes.bar_label(bars, numbers, padding=4, fontsize=8)
    axes.tick_params("y", labelsize=8)
    axes.set_ylim(len(neurons) - 0.4, -0.6)
    # Room for the numbers at the ends of the bars.
    low, high = min(deltas), max(deltas)
    reach = max(-low, high) or 1.0
    axes.set_xlim(-1.3 * reach if low < 0 else 0, 1.3 * reach if high > 0 or low == 0 else 0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5) if low or high else NullLocator())
    axes.set_xlabel("delta: mean activation on positive minus on negative prompts")
    _heading(axes, f"strongest {_count(len(neurons))}")


def _draw_cells(axes: Axes, side: str, cells: Sequence[str]) -> None:
    for place, cell in enumerate(cells):
        axes.text(0, place, cell, fontsize=8.5, va="center", clip_on=False)
    axes.set_axis_off()
    _heading(axes, f"{side}, strongest first")


def _draw_profiles(axes: Axes, comparison: Comparison) -> None:
    """A up, B down and hatched; the part that both hold is dark in either bar."""
    a, b, both = (list(counts) for counts in zip(*comparison.by_layer, strict=True))
    layers = range(len(both))
    axes.bar(layers, a, color=_BLUE, label="A only")
    _draw_down(axes, b, "B only")
    if any(both):
        axes.bar(layers, both, color="black", label="in both")
        axes.bar(layers, [-count for count in both], color="black")
    _finish_layers(axes, comparison.first, "neurons by layer")


def _draw_shares(axes: Axes, comparison: Comparison) -> None:
    first, second = late_shares(comparison.first), late_shares(comparison.second)
    places = np.arange(len(first))
    for offset, letter, shares, color, hatch in (
        (-0.2, "A", first, _BLUE, None),
        (0.2, "B", second, _ORANGE, _HATCH),
    ):
        bars = axes.bar(
            places + offset,
            [share.share for share in shares],
            0.38,
            label=letter,
            color=color,
            hatch=hatch,
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8, padding=2)
    even = [share.uniform for share in first]
    lines = axes.hlines(even, places - 0.42, places + 0.42, color="black", linewidth=1.2)
    lines.set(linestyle="--", label="spread evenly over layers")
    axes.set_xticks(places, [share.name for share in first])
    axes.set_ylim(0, 1.3)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
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


def _finish_layers(axes: Axes, circuit: Circuit, heading: str) -> None:
    """The axes of bars by layer: their scales, the last quarter shaded, and the legend."""
    axes.set_xlim(-0.7, circuit.num_layers - 0.3)
    axes.set_xlabel("layer")
    axes.set_ylabel("neurons")
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.08)
    _heading(axes, heading)
    ends = late_shares(circuit)[-1].first_layer - 0.5, circuit.num_layers - 0.5
    axes.axvspan(*ends, color=_SHADE, zorder=0, label="last quarter of layers")
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
