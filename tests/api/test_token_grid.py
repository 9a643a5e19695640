"""The grid of tokens of a call: for each class of diffusers that is known, what its attention really sees."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import nn

import lite_attention
from lite_attention import masks, token_grid
from tests.support import diffusers_models as dm
from tests.support.diffusers_models import latents, noise, silent_report

Build = Callable[[], nn.Module]

_WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip


def _video(height: int, width: int) -> dict[str, Any]:
    """Arguments of a model that is called as Wan is."""
    return {
        "hidden_states": latents(3, height, width),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": noise(1, 24, 16, seed=7),
    }


def _packed(case: dm.Case) -> Callable[[int, int], dict[str, Any]]:
    return lambda height, width: case.inputs(0, 0) | {"num_frames": 3, "height": height // 2, "width": width // 2}


def _of_case(case: dm.Case, **more: Any) -> Callable[[int, int], dict[str, Any]]:
    """Arguments of a case, of a video of these sizes."""
    return lambda height, width: case.inputs(0, 0) | {"hidden_states": latents(3, height, width)} | more


def _frames_first(height: int, width: int) -> dict[str, Any]:
    return _video(height, width) | {"hidden_states": latents(3, height, width).transpose(1, 2)}


def _allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=1, sample_height=16,
        sample_width=16, sample_frames=3, caption_channels=16,
    )  # fmt: skip


def _allegro_inputs(height: int, width: int) -> dict[str, Any]:
    grid = height // 2, width // 2
    found = get_3d_rotary_pos_embed_allegro(12, ((0, 0), grid), grid, 3, (1.0, 1.0, 1.0))
    places = torch.cartesian_prod(*(axis.long() for axis in found[3:])).T.unsqueeze(1)
    return _video(height, width) | {
        "encoder_hidden_states": noise(1, 24, 16, seed=7).unsqueeze(1),
        "attention_mask": torch.ones(1, 3, height, width),
        "encoder_attention_mask": torch.ones(1, 1, 24),
        "image_rotary_emb": (found[:3], tuple(places)),
    }


def _cosmos() -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=16,
        adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=False, extra_pos_embed_type=None,
    )  # fmt: skip


def _kandinsky() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(4, 4, 4),
    )  # fmt: skip


def _kandinsky_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(3, height, width).permute(0, 2, 3, 4, 1),
        "encoder_hidden_states": noise(1, 24, 16, seed=7),
        "timestep": torch.tensor([900.0]),
        "pooled_projections": noise(1, 8, seed=8),
        "visual_rope_pos": [torch.arange(size) for size in (3, height // 2, width // 2)],
        "text_rope_pos": torch.arange(24),
    }


def _consisid() -> nn.Module:
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=8, sample_height=16, sample_frames=9, max_text_seq_length=24,
    )  # fmt: skip


def _vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=4)


def _vace_inputs(height: int, width: int) -> dict[str, Any]:
    return _video(height, width) | {"control_hidden_states": noise(1, 4, 3, height, width)}


MODELS: dict[str, tuple[Build, Callable[[int, int], dict[str, Any]]]] = {
    "AllegroTransformer3DModel": (_allegro, _allegro_inputs),
    "ChronoEditTransformer3DModel": (lambda: diffusers.ChronoEditTransformer3DModel(**_WAN), _video),
    "CogVideoXTransformer3DModel": (dm.COGVIDEOX.build, _frames_first),
    "ConsisIDTransformer3DModel": (_consisid, _frames_first),
    "CosmosTransformer3DModel": (_cosmos, _video),
    "HunyuanVideo15Transformer3DModel": (dm.HUNYUAN15.build, _of_case(dm.HUNYUAN15)),
    "HunyuanVideoTransformer3DModel": (dm.HUNYUAN.build, _of_case(dm.HUNYUAN)),
    "Kandinsky5Transformer3DModel": (_kandinsky, _kandinsky_inputs),
    "LTX2VideoTransformer3DModel": (dm.LTX2.build, _packed(dm.LTX2)),
    "LTXVideoTransformer3DModel": (dm.LTX.build, _packed(dm.LTX)),
    "MochiTransformer3DModel": (dm.MOCHI.build, _of_case(dm.MOCHI)),
    "SkyReelsV2Transformer3DModel": (lambda: diffusers.SkyReelsV2Transformer3DModel(**_WAN), _video),
    "WanTransformer3DModel": (dm.WAN_OF_ONE_LAYER.build, _video),
    "WanVACETransformer3DModel": (_vace, _vace_inputs),
}


# Tokens of text in the sequence of the video; none in the other models.
TEXT = {
    "CogVideoXTransformer3DModel": 24,
    "ConsisIDTransformer3DModel": 24,
    "HunyuanVideo15Transformer3DModel": 12 + 6 + 4,
    "HunyuanVideoTransformer3DModel": 24,
    "MochiTransformer3DModel": 9,
}


def test_all_that_are_known_are_tested() -> None:
    assert MODELS.keys() == token_grid._SIZES.keys()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_grid_of_a_call_is_what_attention_sees(name: str) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    assert type(model).__name__ == name
    tall, wide = inputs(16, 8), inputs(8, 16)
    grid, turned = (masks.grid_of_call(model, (), arguments) for arguments in (tall, wide))
    assert grid is not None
    assert turned == (grid[0], grid[2], grid[1]) != grid
    lite_attention.enable(model, compile=False, tile_shape=(16, 16), select=lambda _: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is swapped
        model(**tall)
    lengths = {row.q_shape[1] for row in silent_report(model).rows}
    assert math.prod(grid) + TEXT.get(name, 0) in lengths

    pattern = masks.window(*grid, radius=1)
    pattern.check_grid(grid)
    expected, got = (re.escape(" x ".join(map(str, sizes))) for sizes in (grid, turned))
    with pytest.raises(ValueError, match=rf"initial_mask: expected a video of {expected} tokens .*, got one of {got}"):
        pattern.check_grid(turned)


def test_arguments_by_position_and_what_is_not_known() -> None:
    class Derived(diffusers.WanTransformer3DModel):
        pass

    model, video = Derived(**_WAN), _video(16, 8)
    want = (3, 8, 4)
    assert masks.grid_of_call(model, (), video) == want
    assert masks.grid_of_call(model, tuple(video.values()), {}) == want
    assert masks.grid_of_call(model, (), {}) is None
    assert masks.grid_of_call(model, (video["hidden_states"][0],), {}) is None
    assert masks.grid_of_call(nn.Linear(2, 2), (), video) is None
    assert masks.grid_of_call(dm.FLUX.build(), (), dm.FLUX.inputs(0, 0)) is None
    ltx = dm.LTX.build()
    assert masks.grid_of_call(ltx, (), dm.LTX.inputs(0, 0)) == want
    assert masks.grid_of_call(ltx, (), dm.LTX.inputs(0, 0) | {"num_frames": None}) is None


def test_frames_are_patched_too() -> None:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, patch_size=2, patch_size_t=2, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    assert masks.grid_of_call(model, (torch.zeros(1, 6, 4, 16, 8),), {}) == (3, 8, 4)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", [dm.WAN, dm.LTX, dm.COGVIDEOX], ids=lambda case: case.name)
@torch.no_grad()
def test_a_video_turned_round_is_refused(case: dm.Case, compile: bool) -> None:
    """As many tokens, another pattern; and the model goes on with the video that it is for."""
    _, inputs = MODELS[type(case.build()).__name__]
    tall, wide = inputs(16, 8), inputs(8, 16)
    model = case.model()
    grid = masks.grid_of_call(model, (), tall)
    assert grid is not None
    pattern = masks.window(*grid, TEXT.get(type(model).__name__, 0), radius=1, text_first=True)
    options: dict[str, Any] = {"inner": "eager", "initial_mask": pattern, "num_steps": 3, "tile_shape": (16, 16)}
    lite_attention.enable(model, compile=compile, threshold=-math.inf, **options)
    want = dm.run(model, tall)
    with pytest.raises(
        ValueError, match=r"initial_mask: expected a video of 3 x 8 x 4 tokens .*, got one of 3 x 4 x 8"
    ):
        model(**wide)
    torch.testing.assert_close(dm.run(model, tall), want)
