"""What ranks run: a tiny model of diffusers whose tokens they share, against one process that has them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, LTX2VideoTransformer3DModel, WanTransformer3DModel
from diffusers import logging as diffusers_logging
from diffusers.models._modeling_parallel import ContextParallelInput
from torch import nn

import lite_attention
from lite_attention.inspection import named_states
from lite_attention.ops.site_state import SiteState
from tests.support import diffusers_models as dm

STEPS, HEADS, TILE = 4, 4, 16
TABLE = torch.tensor([-2.0, -4.0, -6.0, -8.0]).view(1, 1, HEADS)  # a threshold for each head

Inputs = Callable[[int], dict[str, Any]]


def wan(heads: int = HEADS) -> nn.Module:
    return dm.peaked(
        lambda: WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
    )  # fmt: skip


def video(step: int) -> dict[str, Any]:
    """96 tokens, a timestep for all."""
    return dm.WAN.inputs(step, 0)


def odd_video(step: int) -> dict[str, Any]:
    """135 tokens, which two ranks cannot share evenly."""
    return dm.WAN.inputs(step, 0) | {"hidden_states": dm.latents(3, 18, 10, step)}


def video_with_timesteps(step: int) -> dict[str, Any]:
    """96 tokens, each with a timestep of its own, as Wan 2.2 has them for images."""
    timestep = torch.full((1, 96), 900.0 - 50 * step)
    timestep[:, :32] = 0.0
    return dm.WAN.inputs(step, 0) | {"timestep": timestep}


@contextmanager
def diffusers_on_cpus() -> Iterator[None]:
    """diffusers counts accelerators, of which there are none; gloo gathers tensors of one size only."""
    diffusers_logging.set_verbosity_error()
    gather = dist.all_gather

    def all_gather(out: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> None:
        most = max(map(torch.Tensor.numel, out))
        padded = [torch.empty(most, dtype=x.dtype) for _ in out]
        gather(padded, nn.functional.pad(x.flatten(), (0, most - x.numel())), group=group)
        for whole, part in zip(padded, out, strict=True):
            part.copy_(whole[: part.numel()].view_as(part))

    with (
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
        mock.patch.object(dist, "all_gather", all_gather),
    ):
        yield


def split(model: Any, **degrees: Any) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(**degrees))
    return model


def enable(model: Any, **options: Any) -> Any:
    given = {"tile_shape": (TILE, TILE), "num_steps": STEPS, "compile": False, "threshold": TABLE, "inner": "eager"}
    return lite_attention.enable(model, **{**given, **options})


@torch.no_grad()
def generation(model: nn.Module, inputs: Inputs = video) -> torch.Tensor:
    return torch.stack([dm.run(model, inputs(step)) for step in range(STEPS)])


class Part(NamedTuple):
    """Heads and q-tiles of a rank."""

    heads: slice
    rows: slice

    @classmethod
    def of(cls, degrees: dict[str, Any], heads: int = HEADS, tokens: int = 96) -> Part:
        ulysses, ring = degrees.get("ulysses_degree", 1), degrees.get("ring_degree", 1)
        of_ring, of_ulysses = divmod(dist.get_rank(), ulysses)
        each, rows = -(-heads // ulysses), -(-tokens // TILE) // ring
        return cls(
            slice(of_ulysses * each, (of_ulysses + 1) * each),
            slice(of_ring * rows, (of_ring + 1) * rows) if ring > 1 else slice(None),
        )


class Found(NamedTuple):
    """What a rank found out."""

    error: float  # largest difference of an output
    same_masks: bool
    same_names: bool
    skipped: float  # share of the tiles of this rank
    moved: float  # largest difference of skipping from dense, in one process


def compared(got: torch.Tensor, model: Any, want: torch.Tensor, one: Any, part: Part, dense: torch.Tensor) -> Found:
    here, there = named_states(model), named_states(one)
    return Found(
        error=float((got - want).abs().max()),
        same_masks=len(here) == len(there) > 0
        and all(
            torch.equal(here[name].skip_mask, there[name].skip_mask[:, :, part.heads, part.rows])
            for name in set(here) & set(there)
            if "refiner" not in name  # of text, which every rank has
        ),
        same_names=list(here) == list(there),
        skipped=sum(float(state.sparsity()) for state in here.values()) / len(here),
        moved=float((want - dense).abs().max()),
    )


def shared(
    degrees: dict[str, Any],
    options: dict[str, Any],
    *,
    order: str = "split first",
    inputs: Inputs = video,
    build: Callable[[], Any] = wan,
    heads: int = HEADS,
    tokens: int = 96,
) -> Found:
    """Run a generation on all ranks and on this one alone."""
    torch._dynamo.reset()
    with diffusers_on_cpus():
        dense = generation(build(), inputs)
        one = enable(build(), **options | {"compile": False})
        want = generation(one, inputs)
        model = split(build(), **degrees) if order == "split first" else build()
        enable(model, **options)
        if order == "split after a run":
            generation(model, inputs)
            lite_attention.reset(model)
        if order != "split first":
            split(model, **degrees)
        got = generation(model, inputs)
        return compared(got, model, want, one, Part.of(degrees, heads, tokens), dense)


def in_order(degrees: dict[str, Any], options: dict[str, Any], order: str, inputs: str = "") -> Found:
    return shared(degrees, options, order=order, inputs=video_with_timesteps if inputs else video)


def uneven(degrees: dict[str, Any], threshold: float, compile: bool | str) -> Found:
    return shared(degrees, {"threshold": threshold, "compile": compile}, inputs=odd_video, tokens=135)


def uneven_heads() -> Found:
    degrees = {"ulysses_degree": 2, "ulysses_anything": True}
    table = torch.tensor([-2.0, -4.0, -6.0, -8.0, -3.0]).view(1, 1, 5)
    return shared(degrees, {"threshold": table}, build=lambda: wan(5), heads=5)


def two_dimensions() -> Found:
    options = {"threshold": by_site, "initial_mask": initial_mask, "token_order": (1, 4, 4)}
    return shared({"ring_degree": 2, "ulysses_degree": 2}, options)


# ---- thresholds, masks and files ------------------------------------------------------------------------------------


def by_site(site: Any) -> torch.Tensor:
    """Thresholds of all heads of the model, which a rank's site has, too."""
    assert site.q_shape[1:3] == (96, HEADS), site.q_shape
    return TABLE if "blocks.0" in site.name else TABLE.flip(-1)


def initial_mask(site: Any) -> torch.Tensor:
    tiles = site.q_shape[1] // TILE
    mask = torch.rand(1, site.q_shape[2], tiles, tiles, generator=torch.Generator().manual_seed(3)) < 0.3
    return mask & ~torch.eye(tiles, dtype=torch.bool)


def window() -> Any:
    return lite_attention.masks.window(3, 8, 4, radius=(0, 1, 1))


def callables(degrees: dict[str, Any]) -> Found:
    return shared(degrees, {"threshold": by_site, "initial_mask": initial_mask, "select": whole_only})


def whole_only(site: Any) -> bool | None:
    assert site.q_shape[1:3] == (96, HEADS) or "attn2" in site.name, site.q_shape
    return None


def told_by_a_group(options: dict[str, Any]) -> Found:
    """Heads are exchanged, and the model does not tell."""
    with diffusers_on_cpus():
        dense, one = generation(wan()), enable(wan(), **options)
        want = generation(one)
        model = split(wan(), ulysses_degree=2)
        model._parallel_config = None
        enable(model, process_group=dist.group.WORLD, **options)
        return compared(generation(model), model, want, one, Part.of({"ulysses_degree": 2}), dense)


def pattern(degrees: dict[str, Any]) -> Found:
    return shared(degrees, {"threshold": -4.0, "initial_mask": window()})


def set_later(degrees: dict[str, Any]) -> tuple[list[str], Found]:
    """Thresholds that are set while the model is enabled; those of a rank's own heads are refused by all ranks."""
    with diffusers_on_cpus():
        dense = generation(wan())
        one, model = enable(wan(), threshold=-1.0), enable(split(wan(), **degrees), threshold=-1.0)
        for x in (one, model):
            generation(x)
            lite_attention.set_threshold(x, by_site)
            lite_attention.reset(x)
        refused = []
        for wrong in (TABLE[..., :2], TABLE[..., :3]):
            try:
                lite_attention.set_threshold(model, wrong)
            except ValueError as error:
                refused.append(str(error))
        want, got = generation(one), generation(model)
        return refused, compared(got, model, want, one, Part.of(degrees), dense)


def from_file(degrees: dict[str, Any], path: str) -> list[Found]:
    """Rank 0 writes the file of a single process; all ranks load it, before and after their first call."""
    with diffusers_on_cpus():
        dense, one = generation(wan()), enable(wan(), threshold=by_site)
        want = generation(one)
        if dist.get_rank() == 0:
            found = {name: state.threshold[:1, :1].clone() for name, state in named_states(one).items()}
            lite_attention.ThresholdTable(found, num_steps=STEPS, tokens=96, dtype="float32").save(path)
        dist.barrier()
        by_option = enable(split(wan(), **degrees), threshold=path)
        applied = enable(split(wan(), **degrees), threshold=-1.0)
        generation(applied)
        lite_attention.ThresholdTable.load(path).apply(applied)
        lite_attention.reset(applied)
        part = Part.of(degrees)
        return [compared(generation(model), model, want, one, part, dense) for model in (by_option, applied)]


def foreign_file(degrees: dict[str, Any], path: str) -> str:
    """A file with as many heads as a rank has."""
    with diffusers_on_cpus():
        if dist.get_rank() == 0:
            names = [f"blocks.{i}.attn1" for i in range(2)]
            lite_attention.ThresholdTable({name: TABLE[..., :2] for name in names}).save(path)
        dist.barrier()
        model = enable(split(wan(), **degrees), threshold=path)
        try:
            generation(model)
        except ValueError as error:
            return str(error)
    return ""


# ---- residuals -------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a rank found out about a residual."""

    error: float  # of all tiles kept, against dense
    capacity: tuple[int, ...]
    query_start: int | None
    kept: float
    diagonal: bool  # whether the tiles on it are kept


def residual(degrees: dict[str, Any]) -> Kept:
    part = Part.of(degrees)
    with diffusers_on_cpus():
        dense = generation(wan())
        options = {"threshold": None, "method": "residual", "full_every": 2, "residual_dtype": "fp32"}
        whole = generation(enable(split(wan(), **degrees), keep=1.0, **options))
        model = enable(split(wan(), **degrees), keep=0.3, **options)
        generation(model)
    state: SiteState = next(iter(named_states(model).values()))
    kept = state.kept_tiles()[0, 0]
    rows = range(kept.shape[1])
    return Kept(
        float((whole - dense).abs().max()), state.capacity, state.query_start, float(kept.float().mean()),
        bool(kept[:, rows, [(part.rows.start or 0) + i for i in rows]].all()),
    )  # fmt: skip


# ---- other models ----------------------------------------------------------------------------------------------------


def of_dense(case: dm.Case, degrees: dict[str, Any], options: dict[str, Any]) -> tuple[float, list[str]]:
    """The error of a model that skips nothing, and its sites that may."""
    with diffusers_on_cpus():
        inputs = case.inputs(0, 0)
        want = dm.run(case.model(), inputs)
        model = enable(split(case.model(), **degrees), threshold=-math.inf, **options)
        got = dm.run(model, inputs)
        return float((got - want).abs().max()), [name for name in named_states(model)]


def by_name(name: str, degrees: dict[str, Any], options: dict[str, Any]) -> tuple[float, list[str]]:
    return of_dense(next(case for case in [*dm.SUPPORTED, dm.MINIMAX_H3] if case.name == name), degrees, options)


def ltx2(degrees: dict[str, Any], rope_type: str, has_plan: bool) -> str | float:
    """Return the error of LTX-2 that skips nothing, or what it is told."""
    at = {"split": (2, 4), "interleaved": (1, 3)}[rope_type]
    splits = [ContextParallelInput(split_dim=at[0], expected_dims=at[1], split_output=True)] * 2
    plan = {
        **LTX2VideoTransformer3DModel._cp_plan,
        **{name: dict(enumerate(splits)) for name in ("rope", "cross_attn_rope")},
    }
    with diffusers_on_cpus():
        models = [dm.ltx2(rope_type=rope_type) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        one, model = models
        want = dm.run(one, dm.LTX2.inputs(0, 0))
        model.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=plan if has_plan else None)
        enable(model, threshold=-math.inf)
        try:
            return float((dm.run(model, dm.LTX2.inputs(0, 0)) - want).abs().max())
        except ValueError as error:
            return str(error)


def joint(degrees: dict[str, Any], name: str) -> str:
    """Flux, whose text and picture are split apart."""
    given = {"initial_mask": lambda _: None, "exact_tokens": [[0, 24]]}[name]
    with diffusers_on_cpus():
        model = enable(dm.FLUX.model(), threshold=-4.0, **{name: given})
        dm.run(model, dm.FLUX.inputs(0, 0))  # one process has them in order
        split(model, **degrees)
        try:
            dm.run(model, dm.FLUX.inputs(1, 0))
        except ValueError as error:
            return str(error)
    return ""


def minimax(degrees: dict[str, Any], keep_text: bool) -> Found:
    """One sequence of text, references and video, of which the exact tokens are known."""
    case = dm.MINIMAX_H3
    options = {"threshold": -4.0, "exact_tokens": "auto" if keep_text else None}
    return shared(degrees, options, inputs=lambda step: case.inputs(step, 0), build=case.model, heads=2, tokens=160)


def of_pipeline(degrees: dict[str, Any]) -> tuple[float, float, list[bool]]:
    """Latents of a whole pipeline: what they are off by, and by skipping; and whether masks of both branches match."""
    from tests.support import pipelines

    with diffusers_on_cpus():
        found, states = [], []
        for prepare in (lambda _: None, _enabled, lambda pipe: _enabled(_split_pipe(pipe, degrees))):
            pipe = pipelines.wan()
            prepare(pipe)
            found.append(pipelines.generate(pipe, steps=STEPS))
            states.append(named_states(pipe).values())
        dense, one, shared_by_ranks = found
        part = Part.of(degrees, heads=2)
        same = [
            torch.equal(mine.skip_mask, whole.skip_mask[:, :, part.heads, part.rows])
            and bool(mine.sparsity("slot")[:2].all())
            for mine, whole in zip(states[2], states[1], strict=True)
        ]
    return float((shared_by_ranks - one).abs().max()), float((one - dense).abs().max()), same


def _enabled(pipe: Any) -> Any:
    return enable(pipe, threshold=-4.0, num_steps=None)


def _split_pipe(pipe: Any, degrees: dict[str, Any]) -> Any:
    split(pipe.transformer, **degrees)
    return pipe


# ---- what is taken off again -----------------------------------------------------------------------------------------


def taken_off() -> tuple[list[set[Any]], str]:
    """The backends of the processors, split first and last, while enabled and afterwards; and what a ring says then."""
    found = []
    with diffusers_on_cpus():
        for before in (True, False):
            model = split(wan(), ring_degree=2) if before else wan()
            enable(model)
            if not before:
                split(model, ring_degree=2)
            found.append(backends(model))
            lite_attention.disable(model)
            found.append(backends(model))
            assert "enable_parallelism" not in vars(model)
        try:
            generation(model)
        except ValueError as error:
            return found, str(error)
    return found, ""


def backends(model: nn.Module) -> set[Any]:
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return {getattr(processor._attention_backend, "value", None) for processor in processors}


def by_backend(way: str, degrees: dict[str, Any]) -> Found:
    """The model is enabled by the name of a backend."""
    import diffusers

    from lite_attention.integrations import diffusers as lite

    with diffusers_on_cpus():
        dense, one = generation(wan()), enable(wan())
        want = generation(one)
        lite.configure(tile_shape=(TILE, TILE), num_steps=STEPS, threshold=TABLE)
        model = split(wan(), **degrees)
        if way == "set":
            model.set_attention_backend("lite_attention")
            got = generation(model)
            found = compared(got, model, want, one, Part.of(degrees), dense)
            model.reset_attention_backend()
            return found
        with diffusers.attention_backend("lite_attention"):
            got = generation(model)
            return compared(got, model, want, one, Part.of(degrees), dense)
