"""Tokens in blocks of the video: the permutation by sorting, and models that must not notice it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import lite_attention
from lite_attention import masks, token_order
from lite_attention.compile import settings
from lite_attention.inspection import named_states
from lite_attention.ops.quantization import quantization_of
from lite_attention.token_order import block_of, tile3d_order, tile3d_rank
from tests.support import diffusers_models as dm
from tests.support.diffusers_models import TILE, Case, run, silent_report, skipped_by_site
from tests.support.toys import Toy

GRID = (3, 8, 4)  # of the tokens of the tiny models


def _enable(model: Any, compile: bool | str = False, **options: Any) -> Any:
    options = {"inner": "aot_eager", "tile_shape": TILE, "threshold": -math.inf, "num_steps": 4} | options
    return lite_attention.enable(model, compile=compile, **({"token_order": "tile3d"} | options))


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


# ---- the permutation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((4, 6, 8), (2, 3, 4)),
        ((3, 8, 4), (2, 3, 3)),
        ((5, 7, 9), (4, 6, 8)),
        ((2, 3, 4), (4, 6, 8)),
        ((3, 5, 2), (1, 1, 1)),
    ],
)
def test_order_is_that_of_blocks_and_rank_its_inverse(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    tokens = [*itertools.product(*map(range, grid))]
    of_block = sorted(tokens, key=lambda t: ([i // size for i, size in zip(t, block, strict=True)], t))
    want = [tokens.index(token) for token in of_block]
    assert tile3d_order(*grid, block).tolist() == want
    rank = tile3d_rank(*grid, block)
    assert rank[want].tolist() == [*range(len(tokens))]
    assert rank.dtype == torch.int64


def test_blocks_are_as_large_as_a_q_tile_and_as_round_as_can_be() -> None:
    for tile_m, want in [
        (192, (4, 6, 8)),
        (128, (4, 4, 8)),
        (64, (4, 4, 4)),
        (16, (2, 2, 4)),
        (1, (1, 1, 1)),
        (7, (1, 1, 7)),
    ]:
        assert block_of("tile3d", tile_m) == want
    assert block_of([1, 2, 3], 64) == (1, 2, 3)


def test_mistakes_are_named() -> None:
    for wrong in ("rows", (1, 2), (1, 2, 0), (1, 2, 3.0)):
        with pytest.raises(ValueError, match="token_order: expected 'tile3d' or a block"):
            _enable(dm.WAN_OF_ONE_LAYER.model(), token_order=wrong)
    with pytest.raises(ValueError, match="block: expected at least 1"):
        tile3d_order(1, 2, 3, (1, 0, 1))
    with pytest.raises(ValueError, match="frames, height, width: expected at least 1"):
        tile3d_rank(0, 2, 3)


def test_an_unknown_model_is_refused_before_anything_is_changed() -> None:
    model = _enable(Toy(1), token_order=None)
    with pytest.raises(ValueError, match=r"WanTransformer3DModel, LTXVideoTransformer3DModel, got Toy"):
        _enable(model)
    with torch.no_grad():
        model(torch.randn(1, 96, 32), torch.randn(1, 24, 32))
    assert silent_report(model).swapped  # still as enabled before


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [dm.WAN, dm.LTX], ids=lambda case: case.name)
@pytest.mark.parametrize("compile", [False, True, "blocks"])
def test_without_skipping_the_output_is_unchanged(case: Case, compile: bool | str) -> None:
    model = case.model()
    inputs = [case.inputs(step, 0) for step in range(2)]
    want = [run(model, x) for x in inputs]
    inner = "aot_eager" if case is dm.WAN else "eager"
    _enable(model, compile, token_order=(2, 3, 3), inner=inner)  # ragged along each axis
    seen: list[torch.Tensor] = []
    if not compile:
        first = model.get_submodule(case.swapped[0])
        first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(_hidden(args, kwargs)), with_kwargs=True)
    _close(run(model, inputs[0]), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        _close(run(model, inputs[1]), want[1])
    assert set(skipped_by_site(silent_report(model))) == set(case.swapped)
    lite_attention.disable(model)
    assert torch.equal(run(model, inputs[0]), want[0])
    if seen:  # not a no-op: what attention saw are the tokens of the plain model, in the other order
        reordered, _, plain = seen
        _close(reordered, plain[:, tile3d_order(*GRID, (2, 3, 3))])
        assert not torch.equal(reordered, plain)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("model_of", ["Wan", "LTX"])
def test_a_timestep_of_each_token_moves_along(model_of: str, compile: bool) -> None:
    """Wan 2.2 5B and LTX image-to-video give conditioning frames a timestep of their own."""
    case = {"Wan": dm.WAN_OF_ONE_LAYER, "LTX": dm.LTX}[model_of]
    model = case.model()
    timestep = torch.linspace(0, 900, 96).repeat(2, 1)
    x = {name: torch.cat([v, v]) if torch.is_tensor(v) else v for name, v in case.inputs(0, 0).items()}
    x["timestep"] = timestep * torch.tensor([[1.0], [0.5]])
    want = run(model, x)
    _enable(model, compile, inner="eager")
    torch.testing.assert_close(run(model, x), want, rtol=0, atol=1e-5)


def test_sizes_may_change_without_a_recompile_for_each() -> None:
    model = dm.WAN_OF_ONE_LAYER.model()
    inputs = [dm.WAN.inputs(0, 0) | {"hidden_states": dm.latents(3, height, 8)} for height in (16, 24, 32)]
    want = [run(model, x) for x in inputs]
    _enable(model, True, inner="eager")  # static at first, dynamic from the second size on
    for i, x in enumerate(inputs):
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            _close(run(model, x), want[i])
    assert len(silent_report(model).swapped) == 1


def test_default_block_is_of_the_tile_in_use() -> None:
    for tile, block in (((16, 8), (2, 2, 4)), ((64, 16), (4, 4, 4)), (None, (4, 4, 4))):
        model = dm.WAN_OF_ONE_LAYER.model()
        _enable(model, tile_shape=tile, min_tiles=1)
        seen: list[torch.Tensor] = []
        model.patch_embedding.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        run(model, dm.WAN.inputs(0, 0))
        lite_attention.disable(model)
        run(model, dm.WAN.inputs(0, 0))
        reordered, plain = (t.flatten(2) for t in seen)
        assert torch.equal(reordered, plain[:, :, tile3d_order(*GRID, block)])


@pytest.mark.parametrize(("switches", "tile_m"), [({}, 16), ({"use_int8": True}, 32), ({"use_fp8": True}, 64)])
def test_default_block_is_of_the_tile_of_the_quantization(
    switches: dict[str, bool], tile_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {"none": (16, 8), "int8": (32, 8), "int8_fp8": (64, 16)}
    for module in (token_order, settings):
        monkeypatch.setattr(module, "tile_shape", lambda *about: tiles[about[3]])
    model = dm.WAN_OF_ONE_LAYER.model()
    pattern = masks.window(*GRID, radius=(1, 1, 1))
    switches = {"use_int8": bool(switches), **switches}
    _enable(model, tile_shape=None, min_tiles=1, initial_mask=pattern, **switches)
    seen: list[torch.Tensor] = []
    model.patch_embedding.register_forward_hook(lambda _, args, out: seen.append(out))
    run(model, dm.WAN.inputs(0, 0))
    (state,) = named_states(model).values()
    assert (state.tile_m, state.tile_n) == tiles[quantization_of(switches["use_int8"], "use_fp8" in switches)]
    assert state.tile_m == tile_m
    lite_attention.disable(model)
    run(model, dm.WAN.inputs(0, 0))
    reordered, plain = (t.flatten(2) for t in seen)
    assert torch.equal(reordered, plain[:, :, tile3d_order(*GRID, block_of("tile3d", tile_m))])


def test_skipping_works_on_blocks_of_the_video() -> None:
    """A model of local attention in three dimensions: blocks tell more tiles than rows do, at no larger an error."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval().requires_grad_(False)  # fmt: skip
    model.blocks[0].attn1.norm_q.weight.mul_(6.0)
    frames = torch.randn(1, 4, 2, 4, 4).repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    x = dm.WAN.inputs(0, 0) | {"hidden_states": 3 * frames}  # 2 x 4 x 4 cubes, of 4 x 4 x 4 tokens each
    dense = run(model, x)
    skipped, errors = [], []
    for order in (None, "tile3d"):
        _enable(model, token_order=order, threshold=-6.0, tile_shape=(64, 64))
        for _ in range(3):
            out = run(model, x)
        skipped.append(skipped_by_site(silent_report(model))["blocks.0.attn1"])
        errors.append(float((out - dense).abs().mean()))
    assert skipped[1] > 1.5 * skipped[0]
    assert errors[1] < 0.05 * float(dense.abs().mean())


def test_other_tokens_than_the_grid_has_are_refused() -> None:
    model = _enable(dm.LTX.model())
    coords = torch.zeros(1, 3, 96)
    with pytest.raises(ValueError, match="token_order: expected a call with num_frames, height and width"):
        run(model, dm.LTX.inputs(0, 0) | {"num_frames": None, "height": None, "width": None, "video_coords": coords})
    with pytest.raises(ValueError, match="token_order: expected 2 x 8 x 4 = 64 tokens, got 96"):
        run(model, dm.LTX.inputs(0, 0) | {"num_frames": 2, "video_coords": coords})
