"""The page "Does it pay for me?": seconds for a video, from what was measured of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lite_attention.ops.plan import DECIDING, FULL, SPARSE, step_plan
from lite_attention.presets import PRESETS

__all__ = ["MODELS", "Measured", "Model", "attention_share", "memory", "page", "preset_ratio", "seconds"]


class Measured(NamedTuple):
    """Two layers of Wan 14B, 32,760 tokens, one forward in ms: python -m benchmarks.model, see performance.md."""

    card: str = "H100"
    tokens: int = 32760
    layers: int = 2
    without_attention: float = 67.0
    pytorch: float = 144.6  # cuDNN's attention
    ours: float = 125.8  # nothing skipped


class Ratios(NamedTuple):
    """Steps of the residual over our own dense call: python -m benchmarks.attention --only residual."""

    fresh: float = 1.157
    deciding: float = 1.075
    full: float = 1.031
    beside_kept: float = 0.019  # of a sparse step, over the share that it keeps


class Model(NamedTuple):
    """A transformer and a video.

    `feed_forward` is the inner width, `passes` are those of a step. `projections` are those of a layer: queries, keys,
    values and output, and two more where there is cross-attention.
    """

    name: str
    video: str
    tokens: int
    layers: int
    heads: int
    head_dim: int
    feed_forward: int
    steps: int
    passes: int
    projections: int = 6

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim


MEASURED, RATIOS = Measured(), Ratios()
_WAN_14B = Model("Wan 14B", "", MEASURED.tokens, 40, 40, 128, 13824, 50, 2)
_WAN_1B = Model("Wan 1.3B", "", MEASURED.tokens, 30, 12, 128, 8960, 50, 2)
_LTX = Model("LTX-Video 2B", "", 0, 28, 32, 64, 8192, 50, 2)
_HUNYUAN = Model("HunyuanVideo", "", 0, 60, 24, 128, 12288, 50, 1, projections=4)
_COG = Model("CogVideoX 5B", "", 0, 42, 48, 64, 12288, 50, 2, projections=4)
_FLUX = Model("FLUX.1", "", 0, 57, 24, 128, 12288, 28, 1, projections=4)
MODELS = [
    _WAN_14B._replace(video="480 x 832, 81 frames"),
    _WAN_14B._replace(video="720 x 1280, 81 frames", tokens=75600),
    _WAN_14B._replace(video="720 x 1280, 81 frames, 8 steps, no guidance", tokens=75600, steps=8, passes=1),
    _WAN_1B._replace(video="480 x 832, 81 frames"),
    _HUNYUAN._replace(video="720 x 1280, 129 frames", tokens=33 * 45 * 80 + 256),
    _COG._replace(video="480 x 720, 49 frames", tokens=13 * 30 * 45 + 226),
    _LTX._replace(video="512 x 704, 161 frames", tokens=21 * 16 * 22),
    _LTX._replace(video="704 x 1216, 257 frames", tokens=33 * 22 * 38),
    _FLUX._replace(video="1024 x 1024, an image", tokens=64 * 64 + 512),
]

_TOP = """# Does it pay for me?

It pays where attention is a large part of a step: long videos, high resolutions, many steps. It does not pay for short
sequences.

## Seconds for a video

Of the transformer alone, on one {card}, compiled; without text encoder and decoder. **These are estimates**, from one
measurement of two layers, by the assumptions below. "Attention" is its share of the time with PyTorch's own attention.

| model | video | tokens | steps | attention | PyTorch | nothing skipped | quality | balanced | fast | memory |
|---|---|---|---|---|---|---|---|---|---|---|
"""

_REST = """
Under the presets are seconds, and how many times as fast as with PyTorch's attention. "Memory" is what a preset keeps
for each branch of a step.

## When it does not pay

* **Below some 10,000 tokens.** Attention is a third of the time or less, so the most that can be saved is small.
  Images of 1024 x 1024 have some 4,600 tokens.
* **With few steps.** A generation of 8 steps or fewer computes 75 % and more of the tiles with any preset, since
  neighbors are far apart. At 4 steps it saves next to nothing.
* **Where fewer steps are good enough.** On the small model that is measured here, they were as good below 46 % of the
  attention of 20 steps. At 50 steps the residual was ahead by little. See [results](results.md).
* **Where memory is short.** Presets keep two residuals for each layer and branch. `memory="host"` keeps them in the
  host's memory, `forecast=False` halves them, and votes need next to nothing.
* **On a CPU**, unless more than half of the tiles are skipped.
* **On B200 and B300**: the kernel there is a fallback, see [cards](reference/cards.md).

## Assumptions

* Time is that of attention, which grows with the square of the tokens, and of the rest, which grows with the tokens.
  Both were measured on {card} at {tokens:,} tokens in two layers of the shape of Wan 14B: {rest} ms without attention,
  {pytorch} ms with PyTorch's, {ours} ms with ours and nothing skipped.
* Other models are counted in operations, and run them at the same rates. Small ones are slower than that: their
  matrices are small. Models with heads of 64 channels, such as LTX-Video, have slower attention, too.
* Steps of a preset take, over our own dense call: {fresh:.3f} the first, {deciding:.3f} where tiles are chosen,
  {full:.3f} other full ones, and sparse ones {beside:.3f} more than the share that they keep.
* Other cards are not in the table, since nobody has measured them: `python -m lite_attention bench` does.

How far that holds: two layers of Wan 14B at 75,600 tokens, estimated from the numbers above, and measured on an H200.

| | estimated | measured |
|---|---|---|
| PyTorch's attention, ms | {far:.0f} | 576 |
| ours, nothing skipped, over PyTorch's | {none:.2f} | 0.85 |
| ours, 42 % skipped | {some:.2f} | 0.61 |
| ours, 77 % skipped | {most:.2f} | 0.41 |

The commands are in [performance](performance.md#a-step-of-a-model). This page is made by `python -m tools.pages`.
"""


def page() -> str:
    """Return the page."""
    rows = [_row(model) for model in MODELS]
    far = _WAN_14B._replace(tokens=75600, layers=2, steps=1, passes=1)
    dense = seconds(far)
    said = _REST.format(
        card=MEASURED.card, tokens=MEASURED.tokens, rest=MEASURED.without_attention, pytorch=MEASURED.pytorch,
        ours=MEASURED.ours, fresh=RATIOS.fresh, deciding=RATIOS.deciding, full=RATIOS.full, beside=RATIOS.beside_kept,
        far=1e3 * dense, none=seconds(far, 1.0) / dense, some=seconds(far, 0.58) / dense,
        most=seconds(far, 0.23) / dense,
    )  # fmt: skip
    return _TOP.format(card=MEASURED.card) + "\n".join(rows) + "\n" + said


def _row(model: Model) -> str:
    dense, nothing = seconds(model), seconds(model, 1.0)
    presets = [seconds(model, preset_ratio(name, model.steps)) for name in PRESETS]
    cells = [f"{_said(time)} ({dense / time:.2f} x)" for time in presets]
    share = f"{attention_share(model):.0%}"
    about = [model.name, model.video, f"{model.tokens:,}", f"{model.steps}", share, _said(dense), _said(nothing)]
    return f"| {' | '.join([*about, *cells, f'{memory(model) / 1e9:.1f} GB'])} |"


def _said(time: float) -> str:
    return f"{time:.0f}" if time >= 10 else f"{time:.1f}"


def memory(model: Model) -> float:
    """Return the bytes that a preset keeps for a branch: two residuals a layer, in FP8 with a scale a row of a head."""
    return 2 * model.layers * model.tokens * model.heads * (model.head_dim + 4)


def seconds(model: Model, ratio: float | None = None) -> float:
    """Return the seconds of a generation.

    Args:
        model: and video.
        ratio: time of attention over that of our own with nothing skipped; None = PyTorch's attention.
    """
    rest, pytorch, ours = _layer(model)
    attention = pytorch if ratio is None else ratio * ours
    return model.steps * model.passes * model.layers * (rest + attention) / 1e3


def attention_share(model: Model) -> float:
    """Return the share of the time that PyTorch's attention takes, 0 to 1."""
    rest, pytorch, _ = _layer(model)
    return pytorch / (rest + pytorch)


def preset_ratio(name: str, steps: int) -> float:
    """Return the time of attention in a generation with a preset, over our own with nothing skipped."""
    from lite_attention.presets import preset_of

    keep, full_every = preset_of(name, steps)
    times = {SPARSE: keep + RATIOS.beside_kept, FULL: RATIOS.full, DECIDING: RATIOS.deciding}
    of_steps: Sequence[float] = [times[kind] for kind in step_plan(steps, full_every=full_every)]
    return (RATIOS.fresh + sum(of_steps[1:])) / steps


def _layer(model: Model) -> tuple[float, float, float]:
    """Return ms of a layer: all but attention, PyTorch's attention, and ours with nothing skipped."""
    wan, measured = _WAN_14B, MEASURED
    more_work = _linear_work(model) / _linear_work(wan)
    more_scores = model.tokens**2 * model.width / (wan.tokens**2 * wan.width)
    rest = measured.without_attention / measured.layers
    attention = [(time - measured.without_attention) / measured.layers for time in (measured.pytorch, measured.ours)]
    return rest * more_work, attention[0] * more_scores, attention[1] * more_scores


def _linear_work(model: Model) -> int:
    """Return multiplications of a layer: its projections and its feed-forward."""
    return model.tokens * model.width * (model.projections * model.width + 2 * model.feed_forward)
