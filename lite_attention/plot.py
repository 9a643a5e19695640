"""Pictures of what is skipped, with which thresholds, and at what cost. They need matplotlib:
`pip install "lite-attention[plot]"`.

Every function that returns a figure also saves it if it is given a `path`, whose ending says the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.inspection import SparsityLog, named_states
from lite_attention.ops import control as c
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.tiles import ceil_div
from lite_attention.threshold_table import ThresholdTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "draw_frames",
    "draw_skip_maps",
    "draw_sparsity",
    "error_against_sparsity",
    "frames",
    "new_figure",
    "require_matplotlib",
    "skip_maps",
    "sparsity",
    "thresholds",
]

_KEPT, _SKIPPED = "#2a6f97", "#e9ecef"
_LINES = ("#e07a5f", "#3d85c6", "#6aa84f", "#8e7cc3", "#b08d57", "#4c9a9a")
_DPI, _COLOR_MAP, _SMALL, _TEXT = 130, "viridis", 8, 10
_SHOWN = 4  # sites, heads or frames where nobody says which


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        ImportError: it is not; says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "lite-attention[plot]"') from error


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure in the style of all, sizes in inches. It belongs to no window and needs no closing.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    return figure


# ---- figures -------------------------------------------------------------------------------------------------------


def skip_maps(
    model_or_states: Any,
    *,
    sites: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    slot: int = 0,
    path: str | Path | None = None,
) -> Figure:
    """Draw which tiles the next step computes: a row for each site, a column for each head, of the first sample.

    With method "residual" it is the next sparse step.

    Args:
        model_or_states: a model or pipeline that has run, or a dict of states by site name.
        sites: their names, as `report` prints them; None = four, spread evenly.
        heads: their numbers; None = the first four, or as many as all of the sites have.
        slot: the branch; 0 is the first that ran.
        path: where to save it; None = nowhere.

    Raises:
        ValueError: no such site, head or slot, or one that has not run.
    """
    states = model_or_states if isinstance(model_or_states, Mapping) else named_states(model_or_states)
    if not states:
        raise ValueError("model_or_states: expected sites that have run, got none")
    sites = _spread(list(states)) if sites is None else sites
    counts = [states[site].capacity[1] for site in sites if site in states]
    heads = range(min([_SHOWN, *counts])) if heads is None else heads
    unknown = [site for site in sites if site not in states]
    if unknown or not sites or not heads:
        raise ValueError(f"sites, heads: expected some, sites out of {list(states)}, got {list(sites)}, {list(heads)}")
    kept = [_kept(site, states[site], heads, slot) for site in sites]
    figure = new_figure(
        2.2 * len(heads) + 1, 2.2 * len(sites) + 1, f"Tiles of slot {slot}: blue = computed, gray = skipped"
    )
    draw_skip_maps(figure, kept, list(sites), [f"head {head}" for head in heads])
    return _saved(figure, path)


def sparsity(log: SparsityLog, *, path: str | Path | None = None) -> Figure:
    """Draw the share of tiles skipped as a heat map, sites downwards and steps to the right.

    Args:
        log: what was recorded after each step.
        path: where to save it; None = nowhere.

    Raises:
        ValueError: nothing was recorded.
    """
    if not log.sites:
        raise ValueError("log: expected a record() after at least one step, got none")
    figure = new_figure(*_heat_map_size(log.sites, len(log.steps)), "Tiles skipped after each step")
    _heat_map(figure, 100 * log.table(), log.sites, "skipped by the next (%)", (0, 100))
    return _saved(figure, path)


def thresholds(table: ThresholdTable, *, path: str | Path | None = None) -> Figure:
    """Draw thresholds as a heat map, sites downwards and steps to the right: the median over heads and slots.

    A step whose median is -inf is left gray: most of its heads vote nothing out.

    Args:
        table: what was loaded or calibrated.
        path: where to save it; None = nowhere.
    """
    steps = max(threshold.shape[1] for threshold in table.thresholds.values())
    rows = [t.expand(-1, steps, -1).movedim(1, 0).flatten(1).median(1).values for t in table.thresholds.values()]
    names = list(table.thresholds)
    title = f"Thresholds{f' of {table.model_class}' if table.model_class else ''}: median over heads, gray = -inf"
    figure = new_figure(*_heat_map_size(names, steps), title)
    _heat_map(figure, torch.stack(rows), names, "threshold (log2 units)")
    return _saved(figure, path)


def error_against_sparsity(
    results: Mapping[str, Sequence[tuple[float, float]]], *, path: str | Path | None = None
) -> Figure:
    """Draw the error of methods against how much they skip, a curve each, the error on a log scale.

    Args:
        results: by method: (sparsity, error), both as shares, 0 to 1, in any order.
        path: where to save it; None = nowhere.

    Raises:
        ValueError: no results, or an error that a log scale cannot show.
    """
    if not results or not all(results.values()):
        raise ValueError(f"results: expected (sparsity, error) pairs for each method, got {dict(results)}")
    for method, points in results.items():
        if not all(error > 0 for _, error in points):
            raise ValueError(f"results of {method}: expected errors above 0, got {[error for _, error in points]}")
    figure = new_figure(7, 5, "Error against sparsity")
    axes = figure.subplots()
    for i, (method, points) in enumerate(results.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(
            [100 * share for share in x], [100 * error for error in y], marker="o", markersize=4, label=method,
            color=_LINES[i % len(_LINES)],
        )  # fmt: skip
    axes.set(xlabel="tiles skipped (%)", ylabel="error against dense (%)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _saved(figure, path)


def frames(
    videos: Mapping[str, torch.Tensor], *, shown: Sequence[int] | None = None, path: str | Path | None = None
) -> Figure:
    """Draw frames of several videos below each other, a row for each video.

    Args:
        videos: (frames, 3 or 1, height, width) by name; uint8, or floating point from 0 to 1.
        shown: numbers of the frames; None = four, spread evenly over the shortest.
        path: where to save it; None = nowhere.

    Raises:
        ValueError: a video of another shape or range, or no such frame.
    """
    for name, video in videos.items():
        if video.dim() != 4 or video.shape[1] not in (1, 3) or not video.numel():
            raise ValueError(f"videos[{name!r}]: expected (frames, 3 or 1, height, width), got {tuple(video.shape)}")
        if video.dtype != torch.uint8 and not (float(video.min()) >= 0 and float(video.max()) <= 1):
            low, high = float(video.min()), float(video.max())
            raise ValueError(f"videos[{name!r}]: expected uint8 or floats from 0 to 1, got {low:g} to {high:g}")
    length = min((video.shape[0] for video in videos.values()), default=0)
    shown = _spread(list(range(length))) if shown is None else shown
    if not shown or not all(0 <= frame < length for frame in shown):
        raise ValueError(f"videos, shown: expected frames out of 0 to {length - 1}, got {list(shown)}")
    height, width = next(iter(videos.values())).shape[2:]
    figure = new_figure(2.5 * len(shown) + 0.5, (2.5 * height / width + 0.3) * len(videos) + 0.5, "Frames")
    draw_frames(figure, videos, shown)
    return _saved(figure, path)


# ---- parts of figures ----------------------------------------------------------------------------------------------


def draw_frames(figure: Figure | SubFigure, videos: Mapping[str, torch.Tensor], shown: Sequence[int]) -> None:
    """Draw frames of several videos below each other.

    Args:
        figure: where to draw; all of it is used.
        videos: (frames, 3 or 1, height, width) by name; uint8, or floating point from 0 to 1.
        shown: numbers of the frames.
    """
    grid = figure.subplots(len(videos), len(shown), squeeze=False)
    for row, (name, video) in enumerate(videos.items()):
        for axes, frame in zip(grid[row], shown, strict=True):
            image = video[frame].detach().cpu().movedim(0, -1)
            image = image if video.dtype == torch.uint8 else image.float()
            axes.imshow(image.expand(-1, -1, 3).numpy())
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"frame {frame}", fontsize=_TEXT)
        grid[row, 0].set_ylabel(name, fontsize=_TEXT)


def draw_skip_maps(
    figure: Figure | SubFigure,
    kept: Sequence[torch.Tensor],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> None:
    """Draw which tiles are computed, as a grid of maps with queries downwards and keys to the right.

    Args:
        figure: where to draw; all of it is used.
        kept: by row bool (columns, q_tiles, k_tiles), True = computed. Rows may be heads, and columns steps.
        row_labels: one a row.
        column_labels: one a column.
    """
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([_SKIPPED, _KEPT])
    for row, axes_of_row in enumerate(figure.subplots(len(row_labels), len(column_labels), squeeze=False)):
        for column, axes in enumerate(axes_of_row):
            image = kept[row][column].cpu().numpy()
            axes.imshow(image, cmap=colors, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{1 - image.mean():.0%} skipped", fontsize=_SMALL, labelpad=2)
            if row == 0:
                axes.set_title(column_labels[column], fontsize=_TEXT)
            if column == 0:
                axes.set_ylabel(row_labels[row], fontsize=_TEXT)
    for axis, label in ((1, "query"), (2, "key")):
        sizes = sorted({maps.shape[axis] for maps in kept})
        text = f"{sizes[0]}{f' to {sizes[-1]}' * (len(sizes) > 1)} {label} tiles"
        (figure.supylabel if axis == 1 else figure.supxlabel)(text, fontsize=9)


def draw_sparsity(axes: Axes, sparsity: torch.Tensor, labels: Sequence[str]) -> None:
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
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8, frameon=False)


def _heat_map(
    figure: Figure, values: torch.Tensor, rows: Sequence[str], label: str, limits: tuple[float, float] | None = None
) -> None:
    """Draw (rows, steps); what is not finite stays gray."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    colors = matplotlib.colormaps[_COLOR_MAP].with_extremes(bad=_SKIPPED)
    shown = values.masked_fill(~values.isfinite(), torch.nan).numpy()
    low, high = limits or (None, None)
    image = axes.imshow(shown, cmap=colors, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=_SMALL)
    axes.set(xlabel="denoising step", ylabel="attention site")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=label)


def _heat_map_size(rows: Sequence[str], steps: int) -> tuple[float, float]:
    return 6 + 0.1 * steps, 3 + 0.18 * len(rows)


def _kept(site: str, state: SiteState, heads: Sequence[int], slot: int) -> torch.Tensor:
    """Return bool (heads, q_tiles, k_tiles) of a state's first sample, the tiles that its last call had."""
    count = state.capacity[1]
    if not 0 <= slot < state.slots or not all(0 <= head < count for head in heads):
        raise ValueError(
            f"slot, heads: expected below {state.slots} and {count} for {site}, got {slot} and {list(heads)}"
        )
    words = state.control.tolist()
    seq_q, seq_k = (words[c.slot_word(slot, word)] for word in (c.SEQ_Q, c.SEQ_K))
    if not seq_q:
        raise ValueError(f"slot: expected one that has run, got {slot}, in which {site} has not")
    q_tiles, k_tiles = ceil_div(seq_q, state.tile_m), ceil_div(seq_k, state.tile_n)
    return state.kept_tiles()[slot, 0, list(heads), :q_tiles, :k_tiles].cpu()


def _spread(items: Sequence[Any]) -> list[Any]:
    """Return up to four items, spread evenly, with the first and the last."""
    count = min(_SHOWN, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
