"""Tiny random transformers of diffusers, by class: how small each is, and what its forward takes.

An argument of a constructor or a forward that has a usual size is found by its name in `SMALL` and `_usual_inputs`;
`CONFIGS` has what is particular to a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import transformers
from torch import nn

Inputs = dict[str, Any]

TEXT = 24  # tokens
GRID = (3, 8, 4)  # tokens of a video
IMAGE = (12, 8)  # and of an image, as many

SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_heads": 2, "n_heads": 2, "hidden_size": 32, "dim": 32,
    "num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 1, "n_layers": 2, "n_refiner_layers": 1,
    "in_channels": 4, "out_channels": 4, "sample_size": 16, "text_dim": 16, "text_embed_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "rope_max_seq_len": 32, "joint_attention_dim": 16, "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8), "rope_axes_dim": (4, 4, 8), "cross_attention_dim": 32, "caption_channels": 16,
    "time_embed_dim": 16, "intermediate_size": 32, "num_key_value_heads": 1, "cap_feat_dim": 16,
    "caption_projection_dim": 32, "patch_size_t": 1, "ff_dim": 32, "model_dim": 32, "time_dim": 16, "in_text_dim": 16,
    "in_text_dim2": 8, "in_visual_dim": 4, "out_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 8), "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
    "num_kv_heads": 1, "multiple_of": 8, "max_text_seq_length": TEXT, "condition_dim": 16,
}  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _video(channels: int = 4, patch: int = 2) -> torch.Tensor:
    frames, height, width = GRID
    return noise(1, channels, frames, patch * height, patch * width)


def _image(channels: int = 4, patch: int = 2) -> torch.Tensor:
    return noise(1, channels, *(patch * side for side in IMAGE))


def _packed(channels: int = 4) -> torch.Tensor:
    return noise(1, 96, channels)


def _patches() -> torch.Tensor:
    return _image(patch=1)


def _text(dim: int = 16) -> torch.Tensor:
    return noise(1, TEXT, dim)


def _text_mask() -> torch.Tensor:
    return torch.ones(1, TEXT)


def _ids(axes: int = 3) -> torch.Tensor:
    places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(side)) for side in IMAGE))
    return torch.nn.functional.pad(places, (0, axes - 3))


def _usual_inputs() -> Inputs:
    return {
        "timestep": torch.tensor([500.0]), "timesteps": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, TEXT, 16, seed=1),
        "encoder_attention_mask": (torch.arange(TEXT) < 17).unsqueeze(0),
        "pooled_projections": noise(1, 8, seed=2),
        "img_ids": _ids(), "txt_ids": torch.zeros(TEXT, 3), "r_timestep": torch.tensor([300.0]),
    }  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One class of transformers."""

    inputs: Callable[[], Inputs]  # beside, and in place of, the usual ones
    small: dict[str, Any] = field(default_factory=dict)  # likewise, of the constructor
    drop: tuple[str, ...] = ()  # usual arguments that this class does not want


def _of(**inputs: Callable[[], Any]) -> Callable[[], Inputs]:
    return lambda: {name: make() for name, make in inputs.items()}


def _minimax_h3() -> Inputs:
    """One sequence of text, audio and video."""
    text, audio, video = torch.arange(TEXT + 96 + 96).split((TEXT, 96, 96))
    return {
        "hidden_states": noise(1, 96, 16), "audio_hidden_states": noise(1, 96, 4, seed=3),
        "timestep": torch.tensor([0.3, 0.4, 1.0]),
        "timestep_indices": torch.cat([torch.full((part.numel(),), i) for i, part in enumerate((text, audio, video))]),
        "token_tags": torch.tensor([1] * TEXT + [2] * 96 + [0] * 96),
        "position_ids": torch.arange(TEXT + 192).unsqueeze(1).expand(-1, 3),
        "video_indices": video, "audio_indices": audio, "text_indices": text,
    }  # fmt: skip


_VIDEO = _of(hidden_states=_video)
_VIDEO_TCHW = _of(hidden_states=lambda: _video().transpose(1, 2))
_IMAGE = _of(hidden_states=_image)
_PACKED = _of(hidden_states=_packed)
_PATCH3 = {"patch_size": (1, 2, 2)}
_SIZES = {name: lambda: torch.tensor([[24.0, 16.0]]) for name in ("original_size", "target_size", "crop_coords")}

CONFIGS: dict[str, Config] = {
    "AllegroTransformer3DModel": Config(
        _VIDEO,
        {"sample_height": 16, "sample_width": 8, "sample_frames": 3, "cross_attention_dim": 32},
    ),
    "AuraFlowTransformer2DModel": Config(
        _IMAGE,
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 256},
    ),
    "AnyFlowTransformer3DModel": Config(
        _of(
            hidden_states=lambda: _video().transpose(1, 2), timestep=lambda: torch.full((1, 3), 500.0),
            r_timestep=lambda: torch.full((1, 3), 300.0),
        ),
        _PATCH3,
    ),
    "BriaTransformer2DModel": Config(_PACKED, {"pooled_projection_dim": None}, ("pooled_projections",)),
    "BriaFiboTransformer2DModel": Config(
        _of(hidden_states=_packed, text_encoder_layers=lambda: [noise(1, TEXT, 16)] * 3, encoder_hidden_states=_text),
        {"text_encoder_dim": 16, "pooled_projection_dim": None},
        ("pooled_projections",),
    ),
    "BriaFibo2Transformer2DModel": Config(
        _of(hidden_states=_image, encoder_hidden_states=lambda: noise(1, 2, TEXT, 16)),
        {
            "patch_size": 2, "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 16, "gist_step": 8, "gist_min_text_len": 8, "gist_max_text_len": 32,
            "axes_lens": (64, 64, 64),
        },
    ),
    "ChromaTransformer2DModel": Config(
        _PACKED,
        {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
    ),
    "ChronoEditTransformer3DModel": Config(_VIDEO, _PATCH3),
    "CogVideoXTransformer3DModel": Config(
        _VIDEO_TCHW,
        {"sample_width": 8, "sample_height": 16, "sample_frames": 9, "patch_size_t": None},
    ),
    "CogView3PlusTransformer2DModel": Config(_of(hidden_states=_image, **_SIZES), {"pos_embed_max_size": 32}),
    "CogView4Transformer2DModel": Config(_of(hidden_states=_image, **_SIZES), {"rope_axes_dim": (16, 16)}),
    "ConsisIDTransformer3DModel": Config(_VIDEO_TCHW, {"sample_width": 8, "sample_height": 16, "sample_frames": 9}),
    "CosmosTransformer3DModel": Config(
        _VIDEO,
        {"adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False},
    ),
    "DiTTransformer2DModel": Config(
        _of(
            hidden_states=lambda: noise(1, 4, 20, 20), class_labels=lambda: torch.tensor([1]),
            timestep=lambda: torch.tensor([500]),
        ),
        {"norm_num_groups": 1, "sample_size": 20},
    ),
    "EasyAnimateTransformer3DModel": Config(
        _VIDEO,
        {"patch_size": 2, "mmdit_layers": 1, "sample_width": 8, "sample_height": 16},
    ),
    "ErnieImageTransformer2DModel": Config(
        _of(hidden_states=_patches, text_bth=_text, text_lens=lambda: torch.tensor([17])),
        {"ffn_hidden_size": 32, "text_in_dim": 16, "rope_axes_dim": (4, 4, 8)},
    ),
    "FluxTransformer2DModel": Config(_PACKED),
    "Flux2Transformer2DModel": Config(
        _of(
            hidden_states=_packed, img_ids=lambda: _ids(4), txt_ids=lambda: torch.zeros(TEXT, 4),
            guidance=lambda: torch.tensor([4.0]),
        ),
        {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "Flux3Transformer2DModel": Config(
        _of(hidden_states=_packed, img_ids=lambda: _ids(4), txt_ids=lambda: torch.zeros(TEXT, 4)),
        {"timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 4},
    ),
    "GlmImageTransformer2DModel": Config(
        _of(
            hidden_states=_image, prior_token_id=lambda: torch.randint(0, 32, (1, 96)),
            prior_token_drop=lambda: torch.zeros(1, 96, dtype=torch.bool),
            target_size=lambda: torch.tensor([[24.0, 16.0]]), crop_coords=lambda: torch.zeros(1, 2),
        ),
        {"prior_vq_quantizer_codebook_size": 32},
    ),
    "HeliosTransformer3DModel": Config(
        _VIDEO,
        {
            **_PATCH3, "rope_dim": (4, 4, 8), "guidance_cross_attn": False, "zero_history_timestep": False,
            "has_multi_term_memory_patch": False,
        },
    ),
    "HiDreamImageTransformer2DModel": Config(
        _of(
            hidden_states=_image, encoder_hidden_states_t5=_text,
            encoder_hidden_states_llama3=lambda: noise(2, 1, TEXT, 16), pooled_embeds=lambda: noise(1, 8),
        ),
        {
            "patch_size": 2, "caption_channels": [16, 16], "text_emb_dim": 8, "axes_dims_rope": (4, 4, 8),
            "max_resolution": (32, 32), "llama_layers": [0, 1], "force_inference_output": True,
            "num_routed_experts": 2, "num_activated_experts": 1,
        },
        ("img_ids",),
    ),
    "HunyuanDiT2DModel": Config(
        _of(
            hidden_states=_image, text_embedding_mask=_text_mask, encoder_hidden_states=lambda: noise(1, TEXT, 32),
            encoder_hidden_states_t5=_text, text_embedding_mask_t5=_text_mask,
            image_meta_size=lambda: torch.tensor([[24.0, 16, 24, 16, 0, 0]]), style=lambda: torch.tensor([0]),
            image_rotary_emb=lambda: (noise(96, 16), noise(96, 16)),
        ),
        {
            "patch_size": 2, "text_len": TEXT, "text_len_t5": TEXT, "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
        },
    ),
    "HunyuanImageTransformer2DModel": Config(
        _of(hidden_states=_patches),
        {"patch_size": (1, 1), "rope_axes_dim": (8, 8)},
    ),
    "HunyuanVideoTransformer3DModel": Config(_of(hidden_states=_video, guidance=lambda: torch.tensor([6000.0]))),
    "HunyuanVideo15Transformer3DModel": Config(
        _of(
            hidden_states=lambda: _video(4, 1), encoder_hidden_states_2=lambda: noise(1, 6, 8),
            encoder_attention_mask_2=lambda: torch.ones(1, 6), image_embeds=lambda: torch.zeros(1, 4, 8),
        ),
        {"text_embed_2_dim": 8, "image_embed_dim": 8, "target_size": 16},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Config(
        _of(
            hidden_states=_video, guidance=lambda: torch.tensor([6000.0]), image_embeds=lambda: noise(1, 4, 8),
            indices_latents=lambda: torch.arange(3), latents_clean=lambda: noise(1, 4, 1, 16, 8),
            indices_latents_clean=lambda: torch.arange(1), latents_history_2x=lambda: noise(1, 4, 2, 16, 8),
            indices_latents_history_2x=lambda: torch.arange(2), latents_history_4x=lambda: noise(1, 4, 4, 16, 8),
            indices_latents_history_4x=lambda: torch.arange(4),
        ),
        {"has_image_proj": True, "has_clean_x_embedder": True, "image_proj_dim": 8},
    ),
    "Ideogram4Transformer2DModel": Config(
        _of(
            hidden_states=lambda: noise(1, 120, 4), encoder_hidden_states=lambda: noise(1, 120, 16),
            position_ids=lambda: torch.arange(120).view(1, 120, 1).expand(-1, -1, 3),
            segment_ids=lambda: torch.zeros(1, 120, dtype=torch.long),
            indicator=lambda: (torch.arange(120) >= 24).long().unsqueeze(0),
        ),
        {"adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (4, 2, 2)},
    ),
    "JoyImageEditTransformer3DModel": Config(_VIDEO, {"rope_dim_list": [4, 4, 8]}),
    "JoyImageEditPlusTransformer3DModel": Config(
        _of(hidden_states=lambda: noise(1, 96, 4, 1, 2, 2), shape_list=lambda: [[GRID]]),
        {"rope_dim_list": [4, 4, 8]},
    ),
    "Kandinsky5Transformer3DModel": Config(
        _of(
            hidden_states=lambda: _video().permute(0, 2, 3, 4, 1),
            visual_rope_pos=lambda: [torch.arange(side) for side in GRID], text_rope_pos=lambda: torch.arange(TEXT),
        ),
    ),
    "Kandinsky6Transformer3DModel": Config(
        _of(hidden_states=lambda: _video().permute(0, 2, 3, 4, 1)),
        {"visual_cond": False},
    ),
    "Kandinsky6SRTransformer3DModel": Config(_of(hidden_states=lambda: noise(1, 2, 8, 8, 9))),
    "Krea2Transformer2DModel": Config(
        _of(
            hidden_states=_packed, encoder_hidden_states=lambda: noise(1, TEXT, 2, 16),
            position_ids=lambda: torch.cat([torch.zeros(TEXT, 3), _ids()]),
        ),
        {
            "timestep_embed_dim": 16, "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
    ),
    "LTXVideoTransformer3DModel": Config(
        _of(hidden_states=_packed, num_frames=lambda: 3, height=lambda: 8, width=lambda: 4),
    ),
    "LTX2VideoTransformer3DModel": Config(
        _of(
            hidden_states=_packed, audio_hidden_states=_packed, audio_encoder_hidden_states=_text,
            audio_encoder_attention_mask=_text_mask, num_frames=lambda: 3, height=lambda: 8, width=lambda: 4,
            audio_num_frames=lambda: 96,
        ),
        {
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
        },
    ),
    "LatteTransformer3DModel": Config(
        _VIDEO,
        {
            "patch_size": 2, "sample_size": 16, "video_length": 3, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        ("encoder_attention_mask",),
    ),
    "LongCatImageTransformer2DModel": Config(_PACKED),
    "Lumina2Transformer2DModel": Config(_IMAGE, {"axes_dim_rope": (4, 4, 8), "axes_lens": (64, 64, 64)}),
    "LuminaNextDiT2DModel": Config(
        _of(
            hidden_states=_image, encoder_mask=_text_mask, encoder_hidden_states=lambda: noise(1, TEXT, 32),
            image_rotary_emb=lambda: torch.polar(torch.ones(32, 32, 8), noise(32, 32, 8)),
            cross_attention_kwargs=dict,
        ),
        {"cross_attention_dim": 32, "num_kv_heads": 2},
    ),
    "MiniMaxMusic3Transformer1DModel": Config(
        _of(hidden_states=lambda: noise(1, 4, 96), encoder_hidden_states=lambda: noise(1, 96, 16)),
        {"ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 16},
    ),
    "MiniMaxH3Transformer3DModel": Config(
        _minimax_h3,
        {"time_embed_hidden_dim": 16, "rope_freq_dim": 2, "audio_in_channels": 4, "patch_size": (1, 2, 2)},
    ),
    "MochiTransformer3DModel": Config(
        _VIDEO,
        {"pooled_projection_dim": 16, "time_embed_dim": 4, "max_sequence_length": TEXT},
    ),
    "MotifVideoTransformer3DModel": Config(_VIDEO, {"rope_axes_dim": (4, 4, 8)}),
    "NucleusMoEImageTransformer2DModel": Config(
        _of(hidden_states=_packed, img_shapes=lambda: [(1, *IMAGE)]),
        {"moe_enabled": False, "out_channels": 1},
    ),
    "OmniGenTransformer2DModel": Config(
        _of(
            hidden_states=_image, input_ids=lambda: torch.arange(TEXT).unsqueeze(0), input_img_latents=lambda: [],
            input_image_sizes=dict, attention_mask=lambda: torch.ones(1, TEXT + 97, TEXT + 97).tril(),
            position_ids=lambda: torch.arange(TEXT + 97).unsqueeze(0),
        ),
        {
            "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "pos_embed_max_size": 32,
            "time_step_dim": 16, "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        },
    ),
    "OvisImageTransformer2DModel": Config(_PACKED),
    "PRXTransformer2DModel": Config(_IMAGE, {"context_in_dim": 16, "depth": 2, "axes_dim": [8, 8]}),
    "PixArtTransformer2DModel": Config(
        _IMAGE,
        {"out_channels": 8, "norm_num_groups": 1, "sample_size": 32, "use_additional_conditions": False},
    ),
    "PriorTransformer": Config(
        _of(
            hidden_states=lambda: noise(1, 16), proj_embedding=lambda: noise(1, 16),
            encoder_hidden_states=lambda: noise(1, 77, 16),
        ),
        {"embedding_dim": 16},
    ),
    "QwenImageTransformer2DModel": Config(
        _of(
            hidden_states=_packed, encoder_hidden_states_mask=lambda: torch.ones(1, TEXT, dtype=torch.long),
            img_shapes=lambda: [[(1, *IMAGE)]],
        ),
    ),
    "SD3Transformer2DModel": Config(_IMAGE, {"pos_embed_max_size": 32}),
    "SanaTransformer2DModel": Config(_of(hidden_states=_patches)),
    "SanaVideoTransformer3DModel": Config(_VIDEO, _PATCH3),
    "SkyReelsV2Transformer3DModel": Config(_VIDEO, _PATCH3),
    "StableAudioDiTModel": Config(
        _of(
            hidden_states=lambda: noise(1, 4, 96), encoder_hidden_states=_text,
            global_hidden_states=lambda: noise(1, 1, 16), rotary_embedding=lambda: (noise(97, 8), noise(97, 8)),
        ),
        {
            "num_key_value_attention_heads": 1, "cross_attention_dim": 16, "time_proj_dim": 16,
            "global_states_input_dim": 16, "cross_attention_input_dim": 16, "sample_size": 96,
        },
        ("encoder_attention_mask",),
    ),
    "StableAudio3DiTModel": Config(
        _of(
            hidden_states=lambda: noise(1, 4, 96), global_hidden_states=lambda: noise(1, 16),
            local_add_cond=lambda: noise(1, 4, 96),
        ),
        {
            "io_channels": 4, "embed_dim": 32, "depth": 2, "cond_token_dim": 16, "global_cond_dim": 16,
            "local_add_cond_dim": 4, "timestep_features_dim": 16, "num_memory_tokens": 8,
        },
    ),
    "Transformer2DModel": Config(
        _of(hidden_states=_patches, encoder_hidden_states=lambda: noise(1, TEXT, 32)),
        {"norm_num_groups": 1, "patch_size": None, "caption_channels": None, "sample_size": None},
        ("encoder_attention_mask",),
    ),
    "TransformerTemporalModel": Config(
        _of(hidden_states=lambda: noise(96, 4, 2, 2), num_frames=lambda: 96),
        {"norm_num_groups": 1, "cross_attention_dim": None},
        ("encoder_hidden_states",),
    ),
    "WanTransformer3DModel": Config(_VIDEO, _PATCH3),
    "WanVACETransformer3DModel": Config(
        _of(hidden_states=_video, control_hidden_states=lambda: _video(6)),
        {**_PATCH3, "vace_layers": [0], "vace_in_channels": 6},
    ),
    "ZImageTransformer2DModel": Config(
        _of(x=lambda: [_image()[0].unsqueeze(1)], t=lambda: torch.tensor([0.5]), cap_feats=lambda: [noise(TEXT, 16)]),
        {"n_kv_heads": 2, "axes_lens": [256, 64, 64], "all_patch_size": (2,)},
    ),
    "AceStepTransformer1DModel": Config(
        _of(
            hidden_states=lambda: noise(1, 96, 4), timestep_r=lambda: torch.tensor([0.3]),
            timestep=lambda: torch.tensor([0.5]), encoder_hidden_states=lambda: noise(1, TEXT, 32),
            context_latents=lambda: noise(1, 96, 8),
        ),
        {"in_channels": 12, "head_dim": 16, "num_hidden_layers": 2, "audio_acoustic_hidden_dim": 4},
    ),
    "LongCatAudioDiTTransformer": Config(
        _of(hidden_states=lambda: noise(1, 96, 4), latent_cond=lambda: noise(1, 96, 4)),
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4},
    ),
}  # fmt: skip


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of a class, and arguments of its forward."""
    config, cls = CONFIGS[name], getattr(transformers, name)
    small = {key: SMALL[key] for key in parameters_of(cls.__init__) if key in SMALL} | config.small
    torch.manual_seed(0)
    model: nn.Module = cls(**small).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # gates and projections that begin at 0 would hide the attention
            nn.init.normal_(parameter, std=0.1)
    usual = _usual_inputs()
    wanted = [key for key in parameters_of(cls.forward) if key in usual and key not in config.drop]
    return model, {key: usual[key] for key in wanted} | config.inputs()


def tensors(found: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an output, however it is nested."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from tensors(part)


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return all that a model predicts, as one flat tensor."""
    told = {"return_dict": False} if "return_dict" in parameters_of(type(model).forward) else {}
    return torch.cat([part.flatten() for part in tensors(model(**inputs, **told))])
