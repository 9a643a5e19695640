"""The page of troubles: the library is brought to say each of its messages, and the page quotes it."""

from __future__ import annotations

import contextlib
import io
import math
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention import LiteAttention, ResidualState, SkipState, ThresholdTable, masks
from lite_attention.compile.other_attention import reason_of_op
from lite_attention.ops.part import Part
from lite_attention.ops.targets import SM80, SM90A
from tools.reasons import MEANINGS, reasons

__all__ = ["TROUBLES", "page"]

TOKENS, WIDTH, HEADS = 96, 32, 2
SMALL: dict[str, Any] = {"compile": False, "tile_shape": (16, 16)}

_TOP = """# Troubleshooting

Look at three places, in this order:

1. `python -m lite_attention check` says which kernel runs here, tries it, and says what is missing.
2. `lite_attention.report(pipe)`, after a generation: a row for each attention, with the reason where it does not skip.
3. Warnings that begin with `lite_attention:`. Each is given once for each cause.

Below are the library's own words, and what to do. The messages are not copied: `python -m tools.pages` brings the
library to say each of them, and writes this page.
"""


class Trouble(NamedTuple):
    """A message, and what to do: `say` brings the library to say it, and returns it."""

    say: Callable[[], str]
    do: str


class Model(nn.Module):
    """Attention with projections; `options` go to scaled_dot_product_attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(of).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


def tokens(count: int = TOKENS) -> torch.Tensor:
    """Return an input of `Model`, of a batch of one."""
    return torch.randn(1, count, WIDTH)


@contextlib.contextmanager
def _warned() -> Iterator[list[str]]:
    """Give the first lines of the warnings of ours that come inside."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    texts = (str(warning.message) for warning in caught)
    said += [text.removeprefix("lite_attention: ") for text in texts if "lite_attention" in text]


def _reason(*inputs: torch.Tensor, model: nn.Module | None = None, grad: bool = False, **options: Any) -> str:
    """Return why the attention of a model does not skip."""
    enabled = lite_attention.enable(model or Model(**options), **SMALL)
    with _warned(), torch.set_grad_enabled(grad):
        enabled(*(inputs or (tokens(),)))
        with contextlib.redirect_stdout(io.StringIO()):
            rows = lite_attention.report(enabled).rows
    return str(rows[0].reason)


def _warning(run: Callable[[], Any]) -> str:
    with _warned() as said, torch.no_grad():
        run()
    return said[-1]


def _error(run: Callable[[], Any]) -> str:
    try:
        with _warned(), torch.no_grad():
            run()
    except Exception as error:  # of whatever kind it is
        return str(error)
    raise AssertionError("expected an error, got none")


def _head_dim() -> str:
    return str(SM90A.unsupported_reason(80, 80, torch.bfloat16))


def _no_compiler() -> str:
    from lite_attention.cute_kernels import launch
    from lite_attention.cute_kernels.config import KernelConfig

    none = {name: mock.Mock(return_value=None) for name in ("has_compiler", "library")}
    with mock.patch.multiple(launch, **none), mock.patch("torch.version.cuda", "13.0"):
        return str(launch._not_to_be_had(KernelConfig("bf16", 128, *SM90A.tile_shape(128), target=SM90A)))


def _quantized() -> str:
    return _error(lambda: SM80.tile_shape(128, "int8_fp8"))


def _endless() -> None:
    model = lite_attention.enable(Model(), **SMALL)
    model(tokens())


def _many_passes() -> None:
    class Timed(Model):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    model = lite_attention.enable(Timed(), slots=2, num_steps=2, **SMALL)
    for _ in range(3):
        model(tokens(), torch.tensor(0.5))


def _went_around() -> None:
    class Cached(Model):
        def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:  # type: ignore[override]
            return x if skip else super().forward(x)

    model = lite_attention.enable(Cached(), num_steps=2, **SMALL)
    model(tokens())
    model(tokens(), True)


def _nothing_at_all() -> None:
    lite_attention.enable(nn.Linear(WIDTH, WIDTH), num_steps=2, **SMALL)(tokens())


def _copied() -> None:
    import copy

    copy.deepcopy(lite_attention.enable(Model(), **SMALL))


def _pickled() -> None:
    import pickle

    pickle.dumps(lite_attention.enable(Model(), **SMALL))


def _of_another_length() -> None:
    table = ThresholdTable({"attn1": torch.tensor([[[-4.0]] * 20])}, num_steps=20)
    with tempfile.TemporaryDirectory() as folder:
        table.save(f"{folder}/thresholds.toml")
        block = nn.Sequential(OrderedDict(attn1=Model()))
        lite_attention.enable(block, num_steps=50, threshold=f"{folder}/thresholds.toml", **SMALL)(tokens())


def _another_grid() -> None:
    mask = masks.window(6, 4, 5, radius=(1, 1, 1))
    lite_attention.enable(Model(), threshold=-math.inf, initial_mask=mask, **SMALL)(tokens())


def _traced() -> None:
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        LiteAttention()(*torch.randn(3, 1, TOKENS, HEADS, 16))


def _no_such_option() -> None:
    lite_attention.enable(Model(), treshold=-6.0)  # type: ignore[call-arg]


def _no_memory() -> None:
    sizes: dict[str, Any] = {"batch": 1, "heads": 40, "seq_q": 75600, "seq_k": 75600, "tile_m": 192, "tile_n": 80}
    with mock.patch("torch.zeros", side_effect=MemoryError):
        ResidualState(**sizes, value_dim=128, plan=[2, 1, 0], keep=0.3, residual_dtype="fp8")


def _two_threads() -> None:
    attention = LiteAttention(num_steps=2)
    attention(*torch.randn(3, 1, TOKENS, HEADS, 16))
    with lite_attention.branch("cond"), ThreadPoolExecutor() as pool:
        pool.submit(lambda: lite_attention.branch("uncond").__enter__()).result()


def _of_another_rank() -> None:
    sizes: dict[str, Any] = {"batch": 1, "heads": 1, "seq_q": TOKENS, "seq_k": TOKENS, "tile_m": 16, "tile_n": 16}
    parts = [Part((rank,), 2 * HEADS, 0, TOKENS, TOKENS) for rank in range(2)]
    first, second = (SkipState(**sizes) for _ in parts)
    for state, part in zip((first, second), parts, strict=True):
        state.hold_place(part.words())
    second.load_state_dict(first.state_dict())


def _an_unsplit_plan() -> None:
    from lite_attention.parallel import shard

    model = type("LTX2VideoTransformer3DModel", (nn.Module,), {})()
    found = {"context_parallel_of": mock.Mock(), "_unsplit_rotary": mock.Mock(return_value=["rope"])}
    with mock.patch.multiple(shard, **found):
        shard.check_of_sequence(model, [])()


def _gradients() -> None:
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, 16)
    with torch.enable_grad():
        LiteAttention()(q.requires_grad_(), k, v)


_PER_QUERY = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()

TROUBLES: dict[str, list[Trouble]] = {
    "An attention is left to PyTorch": [
        Trouble(lambda: _reason(tokens(), tokens(77)), "Nothing: it has few keys, and skipping them saves nothing. "
                "`select=lambda site: True` swaps it all the same."),
        Trouble(lambda: _reason(tokens(12)), "Nothing: with one tile of keys nothing can be skipped. A smaller "
                "`tile_shape` is for tests on the CPU; GPUs have tiles of their own."),
        Trouble(lambda: _reason(attn_mask=_PER_QUERY), "Nothing can be done from outside. Masks of keys alone are "
                "exact to the token: bool, (batch, 1, 1, keys). A product of a mask of queries and one of keys, as "
                "HunyuanVideo 1.5 makes it, is one of these, too."),
        Trouble(lambda: _reason(attn_mask=torch.zeros(1, 1, 1, TOKENS)), "Give the model a bool mask. A float one "
                "may hold any bias."),
        Trouble(lambda: _reason(grad=True), "As it says. Training through skipped tiles is not supported."),
        Trouble(_head_dim, "Head dims that a card's kernel has are in [the table of cards](reference/cards.md). "
                "Others keep PyTorch's attention."),
        Trouble(_quantized, "Leave `quantization` out for this model or card, or take `\"int8\"`."),
        Trouble(_no_compiler, "As it says. Or install kernels that were "
                "[compiled ahead of time](how-to/ahead-of-time.md)."),
        Trouble(lambda: str(reason_of_op("flash_attn::_flash_attn_forward")), "Set the model's attention to "
                "PyTorch's: in diffusers `model.set_attention_backend(\"native\")`."),
    ],
    "A warning": [
        Trouble(lambda: _warning(_nothing_at_all), "As it says. If the report has rows, their reasons are above."),
        Trouble(lambda: _warning(_endless), "As it says. Give the pipeline rather than its transformer: it tells "
                "where a generation ends."),
        Trouble(lambda: _warning(_many_passes), "As it says. A slot is a memory; each takes as much again."),
        Trouble(lambda: _warning(_went_around), "A step cache, or code that kept the function from before `enable`, "
                "went around the swap. With a step cache it is as it should be."),
        Trouble(lambda: _warning(_copied), "As it says."),
    ],
    "An error": [
        Trouble(lambda: _error(_no_such_option).partition(" There are ")[0], "The message goes on with all that there "
                "are. [`SkipSettings`](reference/compile.md) says what each is."),
        Trouble(lambda: _error(_of_another_length), "Calibrate for this number of steps. A threshold counts from the "
                "steps before it, so one for other steps is another threshold. `ThresholdTable.apply(..., "
                "strict=False)` overrides."),
        Trouble(lambda: _error(_another_grid), "Make the pattern for the latents of this video."),
        Trouble(lambda: _error(_pickled), "As it says."),
        Trouble(lambda: _error(lambda: lite_attention.enable(torch.compile(Model()))), "Enable the model first."),
        Trouble(lambda: _error(lambda: lite_attention.enable(Model(), compile="blocks")), "Blocks are those that a "
                "model of diffusers names. Take `compile=True`."),
        Trouble(lambda: _error(_traced), "As it says, before `torch.compile` or `torch.export`."),
        Trouble(lambda: _error(_no_memory), "As it says. Votes take a bit a tile."),
        Trouble(lambda: _error(_two_threads), "Use `enable`, where each thread has memories of its own."),
        Trouble(lambda: _error(_of_another_rank), "Save what all processes have, joined: `joined_state_dict` on "
                "[several GPUs](how-to/parallel.md). Each takes its own of that."),
        Trouble(lambda: _error(_an_unsplit_plan), "LTX-2 needs it. The plan is on the page of "
                "[several GPUs](how-to/parallel.md)."),
        Trouble(lambda: _error(_gradients), "Run it under `torch.no_grad()`."),
    ],
}  # fmt: skip

_ALL_REASONS = """## All reasons

Of attention that a model or a graph shows, by the words of the report. Reasons of a card or a quantization are above.

| reason | what to do |
|---|---|
{rows}
"""

_BESIDES = """## No message, but something is wrong

**It is not faster.** See [Does it pay for me?](does-it-pay.md). Below some 10,000 tokens attention is a small part of a
step. On a CPU it pays from about half of the tiles skipped on.

**The video differs too much.** Take `preset="quality"`, or a lower threshold. For exact tokens, such as text within the
sequence, see [masks](how-to/masks.md).

**The first call takes long.** Kernels are compiled once, some seconds each, and kept. `torch.compile` takes its own
time. Neither happens again in the next process if the cache folder stays.

**On a busy CPU it crawls.** Set `OMP_WAIT_POLICY=PASSIVE`: OpenMP threads that spin while they wait take the cores from
those that work.

**It runs out of memory.** Residuals are as large as outputs; `memory="host"` keeps them in the host's memory, and
`forecast=False` halves them. Votes take a bit a tile.
"""


def page() -> str:
    """Return the page."""
    torch.manual_seed(0)
    sections = []
    for title, troubles in TROUBLES.items():
        rows = [f"> {_plain(trouble.say())}\n\n{trouble.do}\n" for trouble in troubles]
        sections.append(f"## {title}\n\n" + "\n".join(rows))
    advice = "\n".join(f"| `{reason}` | {MEANINGS[reason]} |" for reason in reasons())
    return "\n".join([_TOP, *sections, _ALL_REASONS.format(rows=advice), _BESIDES])


def _plain(said: str) -> str:
    """Return a message on one line, without the paths of this machine."""
    line = re.sub(r"\S*/(?=thresholds\.toml)", "", " ".join(said.split()))
    return re.sub(r"([*_<>`])", r"\\\1", line)
