"""`ThresholdTable`: thresholds of a model's attention sites, and what they were found on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lite_attention.files import write_whole
from lite_attention.model_sites import set_values
from lite_attention.tables import text_table
from lite_attention.threshold_table import file as threshold_file
from lite_attention.threshold_table.content import Content
from lite_attention.threshold_table.fit import check_fit, fitted, threshold_at

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = ["ThresholdTable", "loaded", "of_sites"]


class ThresholdTable(Content):
    """Thresholds by site, or shares to keep, and what is known of where they come from and what they reach.

    As a mapping: the values by the names of the sites. What is not known is None.

    Args:
        thresholds: by site name, (slots or 1, steps or 1, heads or 1): log2 units, or, of method "residual", the share
            of tiles that a step keeps, (1, steps or 1, 1).
        tile_shapes: (tile_m, tile_n) by site name, where known; a threshold is judged tile by tile.
        model_class: name of the model's class.
        model: name of the model on a hub, or a hash of its parameters' names and shapes.
        dtype: of the queries, such as "bfloat16".
        tokens: queries of the longest site.
        resolution: frames, height, width of the video in pixels.
        num_steps: denoising steps of a generation.
        branches: their names in the order of the slots.
        metric: of the error: "L1", "Cossim" or "RMSE".
        target_error: what the calibration aimed at.
        target_sparsity: likewise, share of tiles left out, 0 to 1.
        reached: errors on calibration and on held-out prompts, sparsity, ..., by name.
        library_version: of lite_attention.
        date: ISO 8601.
        method: "residual": the values are shares to keep. None = "votes": they are thresholds.
        full_every: of method "residual", as are the next: options that the shares were found with.
        first_full: likewise.
        decide_every: likewise.

    Raises:
        ValueError: a field is of another kind, a value is NaN, out of range or not of three dimensions.
    """

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the table as TOML, values rounded to 3 decimals. What is the same for all is written once.

        The file is there whole or not at all: one of that name is replaced when the new one is complete.

        Raises:
            ValueError: `reached` holds something that TOML does not know.
            OSError: the file cannot be written.
        """
        content = self.to_toml().encode()
        write_whole(path, lambda file: file.write(content))

    def to_toml(self) -> str:
        """Return what `save` writes.

        Raises:
            ValueError: `reached` holds something that TOML does not know.
        """
        return threshold_file.to_toml(self)

    @classmethod
    def load(cls, path: str | Path) -> ThresholdTable:
        """Read a file that `save` wrote, or one of the existing CUDA project.

        What was written once comes back with a size of 1, which broadcasts. The CUDA project's files know no steps:
        they hold a threshold for each forward call of a module, in order. One call is taken as a threshold for all
        steps, n calls as those of n steps, disabled ones as -inf.

        Raises:
            ValueError: the file is not TOML, has no version or a newer one, or does not say thresholds as it should.
            OSError: the file cannot be read.
        """
        content = Path(path).read_bytes()
        try:
            table = cls(**threshold_file.parse(content))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        table.path = Path(path)
        return table

    # ---- in a model ------------------------------------------------------------------------------------------------

    def apply(self, model_or_pipe: Any, *, strict: bool = True) -> None:
        """Set the values of a model's attention sites, in place, and of states that are yet to come.

        A swapped model shows its sites with its first call. If there was none yet, they are looked up as they turn up;
        call `check` after the first step to see whether the rest fits too.

        Args:
            model_or_pipe: as for `lite_attention.set_threshold`.
            strict: False takes what can be taken where the table does not fit, and warns of what it overrides: sites
                by name, steps by their relative position (the lowest of all for a state without steps), heads if their
                thresholds are equal. Other sites skip nothing.

        Raises:
            ValueError: it does not fit the model; lists all that differs. Nothing is changed then. Or no attention of
                ours in the model.
        """
        set_values(model_or_pipe, self.name, fitted(self, model_or_pipe, strict=strict))

    def check(self, model_or_pipe: Any) -> None:
        """Hold the table against the sites that a model has shown by now.

        Raises:
            ValueError: it does not fit; lists all that differs.
        """
        check_fit(self, model_or_pipe)

    def threshold_of(self, site: Site, *, num_steps: int | None = None, strict: bool = True) -> torch.Tensor:
        """Return the thresholds of a site, float32 (slots or 1, steps or 1, heads or 1), or its shares, (steps or 1,).

        Args:
            site: whose sizes are numbers.
            num_steps: denoising steps of a generation, where known.
            strict: False returns what can be taken where the table does not fit, see `apply`.

        Raises:
            ValueError: the table has no such site, or was found on other steps, heads, tiles, dtype or sizes.
        """
        return threshold_at(self, site, num_steps, strict)

    # ---- reading it ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows; numbers by the thousand help nobody

    def __str__(self) -> str:
        """Return what is known, and a row for each site: how many slots, steps and heads it tells apart, and values."""
        lines = [f"{name}: {_plain(value)}" for name, value in {**self.about(), **self.reached}.items()]
        header = ["site", "tile", "slots", "steps", "heads", "min", "median", "max"]
        rows = []
        for site, threshold in self.items():
            tile = "x".join(map(str, self.tile_shapes.get(site, ())))
            sizes = ["all" if size == 1 else str(size) for size in threshold.shape]
            # The lower of two in the middle: a mean of -inf and a number says nothing.
            values = (threshold.min(), threshold.flatten().median(), threshold.max())
            rows.append([site, tile, *sizes, *(f"{float(value):.{threshold_file.DECIMALS}f}" for value in values)])
        return "\n".join([*lines, *([""] if lines else []), text_table(header, rows)])


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def loaded(name: Literal["threshold", "keep"], value: Any) -> Any:
    """Return the table of a file in place of its path; anything else as it is.

    Args:
        name: of the argument, which says what a table must hold.
        value: what was given for it.

    Raises:
        ValueError: there is no such file, or it holds something else.
        OSError: it cannot be read.
    """
    if isinstance(value, (str, Path)):
        if not Path(value).is_file():
            raise ValueError(f"{name}: expected a number or a tensor, or the path of a file, got {str(value)!r}")
        value = ThresholdTable.load(value)
    if isinstance(value, ThresholdTable) and value.name != name:
        method = "votes" if name == "threshold" else "residual"
        raise ValueError(
            f"{name}: expected a table of method={method!r}, got {value.label}, which is for {value.name}="
        )
    return value


def of_sites(name: Literal["threshold", "keep"], value: Any, num_steps: int | None = None) -> Any:
    """Return a threshold, or a share to keep, as states take it: a table becomes a callable of a `Site`.

    Args:
        name: of the argument.
        value: a `ThresholdTable`, a path of one, or what is such a value already, which is returned as it is.
        num_steps: denoising steps of a generation, where known; a table for another number is refused.

    Raises:
        ValueError: a path without such a file. When a state is born: the table does not fit the site.
        OSError: the file cannot be read.
    """
    value = loaded(name, value)
    is_table = isinstance(value, ThresholdTable)
    return functools.partial(value.threshold_of, num_steps=num_steps) if is_table else value
