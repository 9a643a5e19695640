"""Pictures of what was skipped. They need matplotlib: `pip install "lite-attention[plot]"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from lite_attention.demo import DemoResult

__all__ = ["demo_figure", "require_matplotlib", "skip_maps", "sparsity_curve"]

_KEPT, _SKIPPED = "#2a6f97", "#e9ecef"
_LINES = ("#e07a5f", "#3d85c6", "#6aa84f", "#8e7cc3", "#b08d57", "#4c9a9a")


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        ImportError: it is not; says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "lite-attention[plot]"') from error


def skip_maps(
    figure: Figure | SubFigure, kept: torch.Tensor, row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    """Draw which tiles are computed, as a grid of maps with queries downwards and keys to the right.

    Args:
        figure: where to draw; all of it is used.
        kept: bool (rows, columns, q_tiles, k_tiles), True = computed. Rows may be heads, and columns steps.
        row_labels: one a row.
        column_labels: one a column.
    """
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([_SKIPPED, _KEPT])
    rows, columns, q_tiles, k_tiles = kept.shape
    for row, axes_of_row in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for column, axes in enumerate(axes_of_row):
            image = kept[row, column].cpu().numpy()
            axes.imshow(image, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{1 - image.mean():.0%} skipped", fontsize=8, labelpad=2)
            if row == 0:
                axes.set_title(column_labels[column], fontsize=10)
            if column == 0:
                axes.set_ylabel(row_labels[row], fontsize=10)
    figure.supxlabel(f"{k_tiles} key tiles", fontsize=9)
    figure.supylabel(f"{q_tiles} query tiles", fontsize=9)


def sparsity_curve(axes: Axes, sparsity: torch.Tensor, labels: Sequence[str]) -> None:
    """Draw the share of tiles skipped over the steps, a line for each label and a thick one for the mean of all.

    Args:
        axes: where to draw.
        sparsity: (steps, lines), 0 to 1.
        labels: one a line.
    """
    from matplotlib.ticker import MaxNLocator

    percent = 100 * sparsity.cpu().numpy()
    for i, label in enumerate(labels):
        axes.plot(percent[:, i], color=_LINES[i % len(_LINES)], label=label)
    axes.plot(percent.mean(1), color="black", linewidth=2.5, label="all")
    axes.set(xlabel="denoising step", ylabel="tiles skipped in the step (%)", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(labels) + 1, fontsize=8, frameon=False)


def demo_figure(result: DemoResult) -> Figure:
    """Return the figure of the demo: skip maps of a layer's heads over the steps, sparsity, and error.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    options, last = result.options, len(result.steps) - 1
    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    figure.suptitle(
        f"Attention tiles that LiteAttention skips: a small Wan transformer with untrained weights, "
        f"{options.tokens:,} tokens, threshold {options.threshold:g}"
    )
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    left, right = panels

    shown = sorted({0, min(1, last), last // 2, last})
    layer = result.kept_tiles[0].shape[0] // 2
    kept = torch.stack([result.kept_tiles[step][layer] for step in shown], dim=1)
    left.suptitle(
        f"Layer {layer}, cond branch: tiles of {result.tile_shape[0]} queries x {result.tile_shape[1]} keys; "
        "blue = computed, grey = skipped",
        fontsize=9,
    )
    skip_maps(left, kept, [f"{kind} head" for kind in result.heads], [f"step {step}" for step in shown])

    upper, lower = right.subplots(2, 1, height_ratios=(1.5, 1))
    upper.set_title("Skipped, mean over layers and branches", fontsize=10)
    sparsity_curve(upper, torch.stack(result.head_sparsity).mean(1), result.heads)
    lower.set_title("Distance of the latent from the dense run's", fontsize=10)
    lower.plot([100 * step.error for step in result.steps], color="black", marker="o", markersize=3)
    lower.set(xlabel="denoising step", ylabel="relative L1 error after the step (%)", ylim=(0, None))
    lower.sharex(upper)
    lower.grid(alpha=0.3)
    return figure
