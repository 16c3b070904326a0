"""Pictures of exported files: latency against accuracy or size, and their sensitive layers."""

import math

import matplotlib.figure
import numpy as np
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from keras_vit.files import check_new, replacing

_COLORS = [f"C{index}" for index in range(10)] + ["k", "b", "r", "g", "m", "c"]
_MARKERS = ("o", "s", "^", "D")  # of the numbers of threads, in their order
_LARGEST_AREA, _SMALLEST_AREA = 400, 15  # of a dot, in points^2; the smallest is still seen
_LABEL_DISTANCE, _LABEL_STEP = 14, 11  # points: beside the dot, and from line to line
_BARS = 30


def save_panels(path, panels, *, overwrite=False):
    """Writes a picture of panels side by side.

    Args:
        path: file to write; its suffix, such as `.png` or `.svg`, says the format.
        panels: functions that each draw on the axes that they are given.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError: if `path` exists and `overwrite` is False, or has an unknown suffix.
    """
    check_new(path, overwrite)
    figure = matplotlib.figure.Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes)
    spread_labels(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def draw_files(axes, files, label, reference=None):
    """Draws each file in a colour of its own: a dot for each number of threads, and a line.

    Args:
        axes: of matplotlib.
        files: tuples (name, size in bytes, {threads: latency in ms}, height). The areas of the
            dots are as the sizes; a file whose height is None is left out.
        label: what the heights are.
        reference: height of a line for what the files were made from, or None.
    """
    largest = max(size for _, size, _, _ in files)
    counts = sorted({threads for _, _, latencies, _ in files for threads in latencies})
    markers = {threads: _MARKERS[i % len(_MARKERS)] for i, threads in enumerate(counts)}
    for index, (name, size, latencies, height) in enumerate(files):
        if height is None:
            continue
        color = _COLORS[index % len(_COLORS)]
        area = max(_SMALLEST_AREA, _LARGEST_AREA * size / largest)
        axes.plot(list(latencies.values()), [height] * len(latencies), color=color, alpha=0.4)
        for threads, ms in latencies.items():
            axes.scatter(ms, height, area, color, markers[threads], alpha=0.6, linewidths=0)
        text = f"{name}, {size / 1e6:.3g} MB"
        _label(axes, text, (max(latencies.values()), height), color)
    for threads, marker in markers.items():
        text = f"{threads} thread{'s' * (threads > 1)}"
        axes.scatter([], [], 40, "grey", marker, label=text)
    if reference is not None:
        axes.axhline(reference, color="grey", linestyle="--", linewidth=1, label="the model")
    axes.set(xlabel="latency of one inference, ms (area: size of the file)", ylabel=label)
    axes.margins(0.3, 0.2)
    axes.set_xlim(left=0)
    _frame(axes)


def draw_sensitivity(axes, name, report):
    """Draws the layers whose quantization costs most as bars, the worst on top.

    Args:
        axes: of matplotlib.
        name: of the file.
        report: its `ExportReport`. A ratio that is not finite has no bar, and the layers of its
            `fallback` have another colour.
    """
    finite = [item for item in report.sensitivity.items() if math.isfinite(item[1])]
    worst = sorted(finite, key=lambda item: item[1])[:_BARS]
    for label, is_fallback in (("quantized", False), ("at a higher precision", True)):
        rows = [
            i for i, (layer, _) in enumerate(worst) if (layer in report.fallback) == is_fallback
        ]
        axes.barh(rows, [worst[i][1] for i in rows], color=f"C{int(is_fallback)}", label=label)
    axes.set_yticks(range(len(worst)), [layer for layer, _ in worst], fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel="signal-to-noise ratio of the outputs with this layer alone quantized, dB",
        ylabel=f"{name}: the worst {len(worst)} of {len(report.sensitivity)} layers",
    )
    _frame(axes)


def _frame(axes):
    """A grid, and the legend above, where it covers nothing."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False)


def _label(axes, text, point, color):
    label = axes.annotate(
        text,
        point,
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.6},
    )
    label.set_in_layout(False)


def spread_labels(figure):
    """Moves the labels of dots to where they cover nothing, if they can."""
    figure.draw_without_rendering()  # what follows measures, so the layout must be there
    heights = sorted((step * _LABEL_STEP for step in range(-7, 8)), key=abs)
    offsets = [(side, y) for y in heights for side in (_LABEL_DISTANCE, -_LABEL_DISTANCE)]
    for axes in figure.axes:
        taken = [line.get_window_extent() for line in axes.lines]
        taken += [box for dots in axes.collections for box in _dot_boxes(dots)]
        for label in axes.texts:
            best = min(offsets, key=lambda offset: _cost(axes, _box_at(label, offset), taken))
            taken.append(_box_at(label, best))


def _dot_boxes(dots):
    """The squares around the dots of a scatter, in pixels."""
    centers = dots.get_offset_transform().transform(dots.get_offsets())
    half = np.sqrt(dots.get_sizes()[0]) / 2 * dots.get_figure().dpi / 72
    return [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centers]


def _box_at(label, offset):
    """Moves a label; returns its box in pixels, the line to its dot aside."""
    label.set(position=offset, horizontalalignment="left" if offset[0] > 0 else "right")
    return Text.get_window_extent(label)


def _cost(axes, box, taken):
    """How many boxes a box covers; leaving the axes is as bad as covering all."""
    (left, bottom), (right, top) = axes.bbox.get_points()
    is_inside = left <= box.x0 and box.x1 <= right and bottom <= box.y0 and box.y1 <= top
    return box.count_overlaps(taken) + (0 if is_inside else len(taken) + 1)
