"""Pipelines of diffusers, made of tiny random parts: `generate(wan())` takes a tenth of a second and reads no files.

The transformers are those of `diffusers_models`, whose attention is peaked, and latents are clustered: so tiles are
skipped. Sizes are those that give 96 tokens of video or image (Flux Kontext: 192).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanVideoImageToVideoPipeline,
    LTX2Pipeline,
    LTXPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    WanBlocks,
    WanImageToVideoPipeline,
    WanModularPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from PIL import Image
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.support import diffusers_models as dm

TEXT = 24  # tokens of a prompt, in bytes
VOCABULARY = 259  # bytes, padding, end, unknown


def generate(pipe: Any, seed: int = 0, steps: int = 4, **options: Any) -> torch.Tensor:
    """Return the latents that a pipeline of this file makes; further options replace those of `CALLS`."""
    call = CALLS[type(pipe)](seed) | {"num_inference_steps": steps, "max_sequence_length": TEXT}
    call |= {"generator": torch.Generator().manual_seed(seed)} | options
    if isinstance(pipe, WanModularPipeline):
        return pipe(**call, output="latents")  # it decodes them all the same
    return pipe(**call, output_type="latent", return_dict=False)[0]


# ---- parts ---------------------------------------------------------------------------------------------------------


def _part(build: Callable[..., nn.Module], *args: Any, **config: Any) -> nn.Module:
    torch.manual_seed(1)
    return build(*args, **config).eval().requires_grad_(False)


def _tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, model_max_length=TEXT)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _t5(config: type[T5Config], model: Callable[[T5Config], nn.Module]) -> nn.Module:
    return _part(model, config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1))


def _clip() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _part(CLIPTextModel, config)


def _gemma() -> nn.Module:
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=2, head_dim=8,
    )  # fmt: skip
    return _part(Gemma2Model, config)


def _image_vae(channels: int) -> nn.Module:
    return _part(AutoencoderKL, latent_channels=channels, block_out_channels=(4,), norm_num_groups=1, shift_factor=0.0)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _image(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- Wan: 3 x 16 x 8 latents of 5 frames of 32 x 16 pixels -----------------------------------------------------------


def _wan_parts() -> dict[str, Any]:
    vae = _part(
        AutoencoderKLWan, base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip
    return {
        "tokenizer": _tokenizer(), "text_encoder": _t5(UMT5Config, UMT5EncoderModel), "vae": vae,
        "scheduler": _scheduler(), "transformer": dm.WAN.model(),
    }  # fmt: skip


def wan(**parts: Any) -> WanPipeline:
    """Text to video; names its branches, cond and uncond, and tells the step."""
    return _quiet(WanPipeline(**(_wan_parts() | parts)))


def wan_of_two(boundary: float = 0.8) -> WanPipeline:
    """Text to video with two transformers, as Wan 2.2: the first one above a boundary of time, 0 to 1."""
    return wan(transformer_2=dm.WAN.model(seed=1), boundary_ratio=boundary)


def wan_image_to_video(boundary: float | None = 0.8) -> WanImageToVideoPipeline:
    """Image to video with two transformers, or, without a boundary, one; names branches, tells no step."""
    build = functools.partial(dm._wan, in_channels=10)  # latents, a mask of 2 channels, the image's latents
    parts = _wan_parts() | {"transformer": dm.peaked(build), "boundary_ratio": boundary}
    parts["transformer_2"] = None if boundary is None else dm.peaked(build, seed=1)
    return _quiet(WanImageToVideoPipeline(**parts))


def wan_video_to_video() -> WanVideoToVideoPipeline:
    """Video to video; calls cond and uncond in turn, without names."""
    return _quiet(WanVideoToVideoPipeline(**_wan_parts()))


def wan_modular() -> WanModularPipeline:
    """Text to video of modular blocks; calls cond and uncond in turn, without names."""
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(**_wan_parts())
    return _quiet(pipe)


# ---- LTX: 3 x 8 x 4 latents ------------------------------------------------------------------------------------------


def ltx() -> LTXPipeline:
    """Text to video; cond and uncond are one batch."""
    vae = _part(
        AutoencoderKLLTXVideo, latent_channels=4, block_out_channels=(8, 8, 8, 8), patch_size=1,
        spatial_compression_ratio=8, temporal_compression_ratio=8,
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return _quiet(
        LTXPipeline(_scheduler(), vae, _t5(T5Config, T5EncoderModel), _tokenizer(), dm.LTX.model())
    )  # fmt: skip


def ltx2() -> LTX2Pipeline:
    """Text to video and sound; at its defaults a step has three branches, the first of which is a batch of two."""
    vae = _part(
        AutoencoderKLLTX2Video, latent_channels=4, block_out_channels=(8, 8, 8, 8), patch_size=1,
        spatial_compression_ratio=8, temporal_compression_ratio=8,
        decoder_block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
    )  # fmt: skip
    audio_vae = _part(
        AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=1, mel_bins=16
    )
    connectors = _part(
        LTX2TextConnectors, caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, rope_double_precision=False,
    )  # fmt: skip
    vocoder = _part(
        LTX2Vocoder, in_channels=8, hidden_channels=16, upsample_kernel_sizes=[4], upsample_factors=[2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip
    return _quiet(
        LTX2Pipeline(
            _scheduler(), vae, audio_vae, _gemma(), _tokenizer(), connectors, dm.LTX2.model(), vocoder
        )
    )  # fmt: skip


# ---- Flux, Lumina 2: images of 12 x 8 patches ------------------------------------------------------------------------


def _flux(cls: Callable[..., Any]) -> Any:
    return _quiet(
        cls(
            scheduler=_scheduler(), vae=_image_vae(1), text_encoder=_clip(), tokenizer=_tokenizer(),
            text_encoder_2=_t5(T5Config, T5EncoderModel), tokenizer_2=_tokenizer(), transformer=dm.FLUX.model(),
        )
    )  # fmt: skip


def flux() -> FluxPipeline:
    """Text to image; one branch, or two with names at `true_cfg_scale` above 1."""
    return _flux(FluxPipeline)


def flux_image_to_image() -> FluxImg2ImgPipeline:
    """Image to image; calls cond and uncond in turn, without names."""
    return _flux(FluxImg2ImgPipeline)


def flux_kontext() -> FluxKontextPipeline:
    """An image by another one, whose tokens are attended with; calls cond and uncond in turn, without names."""
    return _flux(FluxKontextPipeline)


def lumina2() -> Lumina2Pipeline:
    """Text to image; calls cond and uncond in turn, without names."""
    build = functools.partial(
        Lumina2Transformer2DModel, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )  # fmt: skip
    return _quiet(Lumina2Pipeline(dm.peaked(build), _scheduler(), _image_vae(4), _gemma(), _tokenizer()))


# ---- HunyuanVideo: 3 x 16 x 8 latents --------------------------------------------------------------------------------


def hunyuan_image_to_video() -> HunyuanVideoImageToVideoPipeline:
    """Image to video; calls cond and uncond in turn, without names. Takes embeddings in place of prompts."""
    vae = _part(
        AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
        norm_num_groups=1, mid_block_add_attention=False,
    )  # fmt: skip
    build = functools.partial(dm._hunyuan, image_condition_type="token_replace")
    return _quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, image_processor=None,
            transformer=dm.peaked(build), vae=vae, scheduler=_scheduler(),
        )
    )  # fmt: skip


# ---- how each is called ----------------------------------------------------------------------------------------------

_PROMPTS = {"prompt": "a fox", "negative_prompt": "blur"}


def _wan_call(seed: int) -> dict[str, Any]:
    return _PROMPTS | {"height": 32, "width": 16, "num_frames": 5, "latents": dm.latents(3, 16, 8, seed=seed)}


def _wan_image_call(seed: int) -> dict[str, Any]:
    return _wan_call(seed) | {"image": _image(seed, 32, 16)}


def _wan_video_call(seed: int) -> dict[str, Any]:
    """From latents; `video=..., latents=None` goes through the VAE, to latents that are noise at this strength."""
    return _PROMPTS | {"height": 32, "width": 16, "strength": 1.0, "latents": dm.latents(3, 16, 8, seed=seed)}


def _ltx_call(seed: int) -> dict[str, Any]:
    return _PROMPTS | {"height": 64, "width": 32, "num_frames": 17, "latents": dm.tokens(96, 4, seed=seed)}


def _ltx2_call(seed: int) -> dict[str, Any]:
    return _ltx_call(seed) | {"frame_rate": 8.0}  # slow, so that there are 53 tokens of sound


def _flux_call(seed: int) -> dict[str, Any]:
    return _PROMPTS | {"height": 24, "width": 16, "true_cfg_scale": 4.0, "latents": dm.tokens(96, 4, seed=seed)}


def _flux_image_call(seed: int) -> dict[str, Any]:
    return _flux_call(seed) | {"image": _image(seed, 24, 16), "strength": 1.0}


def _flux_kontext_call(seed: int) -> dict[str, Any]:
    return _flux_call(seed) | {"image": _image(seed, 24, 16), "max_area": 24 * 16, "_auto_resize": False}


def _lumina2_call(seed: int) -> dict[str, Any]:
    return _PROMPTS | {
        "system_prompt": "",
        "height": 192,
        "width": 128,
        "latents": dm.latents(1, 24, 16, seed=seed)[:, :, 0],
    }


def _hunyuan_image_call(seed: int) -> dict[str, Any]:
    call = {"image": _image(seed, 128, 64), "height": 128, "width": 64, "num_frames": 9, "true_cfg_scale": 4.0}
    for number, prefix in enumerate(("", "negative_")):
        call[f"{prefix}prompt_embeds"] = dm.noise(1, TEXT, 16, seed=seed + number)
        call[f"{prefix}pooled_prompt_embeds"] = dm.noise(1, 8, seed=seed + number)
        call[f"{prefix}prompt_attention_mask"] = dm.text_mask(TEXT, 13 + number)
    return call | {"latents": dm.latents(3, 16, 8, seed=seed)}


CALLS: dict[type, Callable[[int], dict[str, Any]]] = {
    WanPipeline: _wan_call,
    WanModularPipeline: _wan_call,
    WanImageToVideoPipeline: _wan_image_call,
    WanVideoToVideoPipeline: _wan_video_call,
    LTXPipeline: _ltx_call,
    LTX2Pipeline: _ltx2_call,
    FluxPipeline: _flux_call,
    FluxImg2ImgPipeline: _flux_image_call,
    FluxKontextPipeline: _flux_kontext_call,
    Lumina2Pipeline: _lumina2_call,
    HunyuanVideoImageToVideoPipeline: _hunyuan_image_call,
}

BUILDERS: list[Callable[[], Any]] = [
    wan, wan_of_two, wan_image_to_video, wan_video_to_video, wan_modular, ltx, ltx2, flux, flux_image_to_image,
    flux_kontext, lumina2, hunyuan_image_to_video,
]  # fmt: skip
