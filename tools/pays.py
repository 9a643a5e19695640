"""The page "Does it pay for me?": seconds for a video, from what was measured of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lite_attention.ops.plan import DECIDING, FULL, SPARSE, step_plan
from lite_attention.presets import PRESETS, preset_of

__all__ = ["MODELS", "Measured", "Model", "attention_share", "memory", "page", "seconds"]


class Measured(NamedTuple):
    """Layers of Wan 14B, one forward in ms, by what attention they have: python -m benchmarks.model."""

    card: str = "H200"
    tokens: int = 32760
    layers: int = 2
    without_attention: float = 64.6
    pytorch: float = 143.0  # cuDNN's attention
    full: float = 125.9
    deciding: float = 132.5
    sparse: Mapping[float, float] = MappingProxyType({0.5: 99.6, 0.3: 85.9, 0.2: 78.9})  # by the share that is kept


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


MEASURED = Measured()
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

| model | video | tokens | steps | attention | PyTorch | quality | balanced | fast | memory |
|---|---|---|---|---|---|---|---|---|---|
"""

_REST = """
Under the presets are seconds, and how many times as fast as with PyTorch's attention. "Memory" is what a preset keeps
for each branch of a step.

With INT8 and FP8 attention takes about 0.6 of the time that it takes here, see [results](results.md). That was not
measured in a model.

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
  Both were measured on {card} at {tokens:,} tokens, in {layers} layers of the shape of Wan 14B. A forward took
  {without_attention} ms without attention, {pytorch} ms with PyTorch's, {full} ms in a full step of the residual and
  {deciding} ms where tiles are chosen. Sparse steps took {sparse} ms.
* Other models are counted in operations, and run them at the same rates. Small ones are slower than that: their
  matrices are small. Models with heads of 64 channels, such as LTX-Video, have slower attention, too.
* Videos that are longer than {tokens:,} tokens gain a little more: attention is faster there.
* Other cards are not in the table, since nobody has measured them. `python -m lite_attention bench` does.

How far that holds, on H200s:

| | estimated | measured |
|---|---|---|
| the same layers, a step of `quality`, 20 steps, over PyTorch's | {quality:.3f} | 0.817 |
| of `balanced` | {balanced:.3f} | 0.727 |
| of `fast` | {fast:.3f} | 0.697 |
| two layers at 75,600 tokens, PyTorch's attention, ms | {far:.0f} | 576 |

The commands are in [performance](performance.md#a-step-of-a-model). This page is made by `python -m tools.pages`.
"""


def page() -> str:
    """Return the page."""
    rows = [_row(model) for model in MODELS]
    twenty = _WAN_14B._replace(layers=MEASURED.layers, steps=20, passes=1)
    over = {name: seconds(twenty, name) / seconds(twenty) for name in PRESETS}
    far = _WAN_14B._replace(tokens=75600, layers=MEASURED.layers, steps=1, passes=1)
    measured = MEASURED._asdict() | {"sparse": _listed(MEASURED.sparse)}
    said = _REST.format(**measured, **over, far=1e3 * seconds(far))
    return _TOP.format(card=MEASURED.card) + "\n".join(rows) + "\n" + said


def _listed(sparse: Mapping[float, float]) -> str:
    return ", ".join(f"{ms} ({100 * keep:.0f} % kept)" for keep, ms in sparse.items())


def _row(model: Model) -> str:
    dense = seconds(model)
    presets = [seconds(model, name) for name in PRESETS]
    cells = [f"{_said(time)} ({dense / time:.2f} x)" for time in presets]
    share = f"{100 * attention_share(model):.0f} %"
    about = [model.name, model.video, f"{model.tokens:,}", f"{model.steps}", share, _said(dense)]
    return f"| {' | '.join([*about, *cells, f'{memory(model) / 1e9:.1f} GB'])} |"


def _said(time: float) -> str:
    return f"{time:,.0f}" if time >= 10 else f"{time:.1f}"


def memory(model: Model) -> float:
    """Return the bytes that a preset keeps for a branch: two residuals a layer, in FP8 with a scale a row of a head."""
    return 2 * model.layers * model.tokens * model.heads * (model.head_dim + 4)


def seconds(model: Model, preset: str | None = None) -> float:
    """Return the seconds of a generation, with a preset or, None, with PyTorch's attention."""
    step = _layer(model, MEASURED.pytorch) if preset is None else _mean_of_steps(model, preset)
    return model.steps * model.passes * model.layers * step / 1e3


def attention_share(model: Model) -> float:
    """Return the share of the time that PyTorch's attention takes, 0 to 1."""
    return 1 - _layer(model, MEASURED.without_attention) / _layer(model, MEASURED.pytorch)


def _mean_of_steps(model: Model, preset: str) -> float:
    """Return ms of a layer, the mean over the steps of a generation."""
    keep, full_every = preset_of(preset, model.steps)
    measured = {SPARSE: MEASURED.sparse[keep], FULL: MEASURED.full, DECIDING: MEASURED.deciding}
    plan = step_plan(model.steps, full_every=full_every)
    return sum(_layer(model, measured[kind]) for kind in plan) / len(plan)


def _layer(model: Model, measured: float) -> float:
    """Return ms of a layer, from those of the measured layers with the same kind of attention."""
    wan, rest = _WAN_14B, MEASURED.without_attention
    more_work = _linear_work(model) / _linear_work(wan)
    more_scores = model.tokens**2 * model.width / (wan.tokens**2 * wan.width)
    return (rest * more_work + (measured - rest) * more_scores) / MEASURED.layers


def _linear_work(model: Model) -> int:
    """Return multiplications of a layer: its projections and its feed-forward."""
    return model.tokens * model.width * (model.projections * model.width + 2 * model.feed_forward)
