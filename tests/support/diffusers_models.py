"""Tiny random diffusers transformers with clustered inputs, and dense models with one explicit state per site."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

import lite_attention
from lite_attention.ops import SkipState

TILE = (16, 16)
THRESHOLD = -4.0
NEVER = float("-inf")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A tiny model and what is known about its attention."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]  # (step, seed) -> arguments of forward
    sites: list[str]  # modules that call attention, in order
    swapped: list[str]  # those of them that become skip-aware
    reasons: dict[str, str] = field(default_factory=dict)  # end of a module path -> start of why it is left alone
    block_graphs: int | None = 1  # graphs that hold attention when compiled per repeated block; None = cannot be

    def model(self, seed: int = 0) -> nn.Module:
        """Return the model, with attention that is not uniform."""
        return peaked(self.build, seed)

    def reason_of(self, path: str) -> str | None:
        """Return how the reason of a site begins, None for one that is swapped."""
        if path in self.swapped:
            return None
        return next(reason for end, reason in self.reasons.items() if path.endswith(end))


def peaked(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model, its query norms turned up: attention of default random weights is all but uniform."""
    torch.manual_seed(seed)
    model = build().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            parameter.mul_(5.0)
    return model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, dim: int, step: int = 0, seed: int = 0, clusters: int = 6) -> torch.Tensor:
    """Tokens (1, count, dim) that flock to a few centers along the sequence and drift a little with the step."""
    centers = noise(clusters, dim, seed=seed).repeat_interleave(-(-count // clusters), 0)[:count]
    drift = 0.02 * step * noise(1, count, dim, seed=seed + 2)
    return 2 * centers + 0.2 * noise(1, count, dim, seed=seed + 1) + drift


def latents(frames: int, height: int, width: int, step: int = 0, seed: int = 0, channels: int = 4) -> torch.Tensor:
    """Latents (1, channels, frames, height, width) whose 2 x 2 patches are such tokens."""
    patches = tokens(frames * (height // 2) * (width // 2), channels, step, seed)
    grid = patches.reshape(1, frames, height // 2, width // 2, channels).permute(0, 4, 1, 2, 3)
    return grid.repeat_interleave(2, 3).repeat_interleave(2, 4)


def text_mask(count: int, valid: int) -> torch.Tensor:
    return (torch.arange(count) < valid).long().unsqueeze(0)


# ---- the models: 96 tokens of video or image, 24 of text; see notes of each for what its attention looks like ------


def _wan(layers: int = 3, in_channels: int = 4) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip


def _wan_inputs(step: int = 0, seed: int = 0, text: int = 24) -> Inputs:
    return {
        "hidden_states": latents(3, 16, 8, step, seed),
        "timestep": torch.tensor([900 - 50 * step]),
        "encoder_hidden_states": noise(1, text, 16, seed=seed + 7),
    }


def _ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=3, caption_channels=16,
    )  # fmt: skip


def _ltx_inputs(step: int = 0, seed: int = 0) -> Inputs:
    return {
        "hidden_states": tokens(96, 4, step, seed),
        "encoder_hidden_states": noise(1, 24, 16, seed=seed + 7),
        "timestep": torch.tensor([900 - 50 * step]),
        "encoder_attention_mask": text_mask(24, 17),
        "num_frames": 3, "height": 8, "width": 4,
    }  # fmt: skip


def ltx2(**options: Any) -> nn.Module:
    return LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=16, **options,
    )  # fmt: skip


def _ltx2_inputs(step: int = 0, seed: int = 0, audio: int = 96) -> Inputs:
    """As many tokens of audio as of video: lengths do not tell cross-attention."""
    return {
        "hidden_states": tokens(96, 4, step, seed),
        "audio_hidden_states": tokens(audio, 4, step, seed + 3),
        "encoder_hidden_states": noise(1, 24, 16, seed=seed + 7),
        "audio_encoder_hidden_states": noise(1, 24, 16, seed=seed + 8),
        "timestep": torch.tensor([900 - 50 * step]),
        "encoder_attention_mask": text_mask(24, 17),
        "audio_encoder_attention_mask": text_mask(24, 17),
        "num_frames": 3, "height": 8, "width": 4, "audio_num_frames": audio,
    }  # fmt: skip


def _cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=16, sample_frames=9, max_text_seq_length=24,
    )  # fmt: skip


def _cogvideox_inputs(step: int = 0, seed: int = 0) -> Inputs:
    return {
        "hidden_states": latents(3, 16, 8, step, seed).transpose(1, 2),
        "encoder_hidden_states": noise(1, 24, 16, seed=seed + 7),
        "timestep": torch.tensor([900 - 50 * step]),
    }


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _flux_inputs(step: int = 0, seed: int = 0) -> Inputs:
    return {
        "hidden_states": tokens(96, 4, step, seed),
        "encoder_hidden_states": noise(1, 24, 16, seed=seed + 7),
        "pooled_projections": noise(1, 8, seed=seed + 8),
        "timestep": torch.tensor([0.9 - 0.05 * step]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(12.0), torch.arange(8.0)),
        "txt_ids": torch.zeros(24, 3),
    }


def _hunyuan(**options: Any) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 6), **options,
    )  # fmt: skip


def _hunyuan_inputs(step: int = 0, seed: int = 0, valid: int = 13) -> Inputs:
    return {
        "hidden_states": latents(3, 16, 8, step, seed),
        "timestep": torch.tensor([900 - 50 * step]),
        "encoder_hidden_states": noise(1, 24, 16, seed=seed + 7),
        "encoder_attention_mask": text_mask(24, valid),
        "pooled_projections": noise(1, 8, seed=seed + 8),
        "guidance": torch.tensor([6000.0]),
    }


def _hunyuan15() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(2, 4, 6),
        target_size=16,
    )  # fmt: skip


def _hunyuan15_inputs(step: int = 0, seed: int = 0) -> Inputs:
    return {
        "hidden_states": latents(3, 8, 4, step, seed),
        "timestep": torch.tensor([900.0 - 50 * step]),
        "encoder_hidden_states": noise(1, 12, 16, seed=seed + 7),
        "encoder_attention_mask": text_mask(12, 9),
        "encoder_hidden_states_2": noise(1, 6, 8, seed=seed + 8),
        "encoder_attention_mask_2": text_mask(6, 4),
        "image_embeds": torch.zeros(1, 4, 8),
    }


def _mochi() -> nn.Module:
    return MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip


def _mochi_inputs(step: int = 0, seed: int = 0, text: int = 12) -> Inputs:
    return {
        "hidden_states": latents(3, 16, 8, step, seed),
        "encoder_hidden_states": noise(1, text, 16, seed=seed + 7),
        "timestep": torch.tensor([900 - 50 * step]),
        "encoder_attention_mask": text_mask(text, 9).bool(),
    }


def _minimax_h3() -> nn.Module:
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=4, patch_size=(1, 1, 1), text_dim=16, freq_dim=16, time_embed_hidden_dim=16,
        time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip


def _minimax_h3_inputs(step: int = 0, seed: int = 0, text: int = 24, reference: int = 16, audio: int = 16) -> Inputs:
    """160 rows: text, a picture for reference, audio, and the video."""
    video = 160 - text - reference - audio
    kinds = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([text, reference, audio, video]))
    rows = torch.arange(160)
    return {
        "hidden_states": tokens(reference + video, 4, step, seed),
        "audio_hidden_states": tokens(audio, 4, step, seed + 3),
        "encoder_hidden_states": noise(1, text, 16, seed=seed + 7),
        "timestep": torch.tensor([1.0, 0.9 - 0.05 * step, 0.8 - 0.05 * step]),
        "timestep_indices": torch.tensor([0, 0, 1, 2])[kinds],
        "token_tags": torch.tensor([1, 0, 2, 0])[kinds],
        "position_ids": rows[:, None].expand(-1, 3),
        "video_indices": rows[(kinds == 1) | (kinds == 3)],
        "audio_indices": rows[kinds == 2],
        "text_indices": rows[kinds == 0],
    }


def _paths(blocks: str, count: int, *modules: str) -> list[str]:
    return [f"{blocks}.{layer}.{module}" for layer in range(count) for module in modules]


_LTX2_MODULES = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_JOINT = [*_paths("transformer_blocks", 2, "attn"), *_paths("single_transformer_blocks", 2, "attn")]
_REFINER = "context_embedder.token_refiner.refiner_blocks.0.attn"

MINIMAX_H3 = Case(
    "MiniMax-H3", _minimax_h3, _minimax_h3_inputs,
    ["token_refiner.refiner_blocks.0.attn", *_paths("transformer_blocks", 2, "attn")],
    ["token_refiner.refiner_blocks.0.attn", *_paths("transformer_blocks", 2, "attn")],
)  # fmt: skip
WAN = Case(
    "Wan", _wan, _wan_inputs, _paths("blocks", 3, "attn1", "attn2"), _paths("blocks", 3, "attn1"),
    {".attn2": "cross-attention"},
)  # fmt: skip
WAN_OF_ONE_LAYER = Case(
    "small Wan", functools.partial(_wan, 1), _wan_inputs, ["blocks.0.attn1", "blocks.0.attn2"], ["blocks.0.attn1"],
    {".attn2": "cross-attention"},
)  # fmt: skip
LTX = Case(
    "LTX", _ltx, _ltx_inputs, _paths("transformer_blocks", 3, "attn1", "attn2"),
    _paths("transformer_blocks", 3, "attn1"), {".attn2": "torch.float32 mask"},
)  # fmt: skip
LTX2 = Case(
    "LTX-2", ltx2, _ltx2_inputs, _paths("transformer_blocks", 2, *_LTX2_MODULES),
    _paths("transformer_blocks", 2, "attn1", "audio_attn1"),
    {"_to_video_attn": "cross-attention", "_to_audio_attn": "cross-attention", "attn2": "torch.float32 mask"},
)  # fmt: skip
COGVIDEOX = Case(
    "CogVideoX", _cogvideox, _cogvideox_inputs, _paths("transformer_blocks", 2, "attn1"),
    _paths("transformer_blocks", 2, "attn1"), block_graphs=None,
)  # fmt: skip
# The first of Flux's single blocks gets other strides than the rest.
FLUX = Case("Flux", _flux, _flux_inputs, _JOINT, _JOINT, block_graphs=3)
HUNYUAN = Case(
    "HunyuanVideo", _hunyuan, _hunyuan_inputs, [_REFINER, *_JOINT], _JOINT,
    {_REFINER: "bool mask that differs per query"}, block_graphs=3,
)  # fmt: skip
HUNYUAN15 = Case(
    "HunyuanVideo 1.5", _hunyuan15, _hunyuan15_inputs, [_REFINER, *_paths("transformer_blocks", 2, "attn")],
    _paths("transformer_blocks", 2, "attn"), {_REFINER: "bool mask that differs per query"}, block_graphs=2,
)  # fmt: skip
# The attention of the blocks loops over samples of data-dependent length: no graph ever has it.
MOCHI = Case(
    "Mochi", _mochi, _mochi_inputs, ["time_embed.pooler"], [], {"time_embed.pooler": "only 1 k-tile(s)"},
    block_graphs=None,
)  # fmt: skip

SUPPORTED = [WAN, LTX, LTX2, COGVIDEOX, FLUX, HUNYUAN]


# ---- what the numbers must be --------------------------------------------------------------------------------------


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return all that a model predicts, as one flat tensor."""
    return torch.cat([part.flatten() for part in model(**inputs, return_dict=False)])


class ExplicitStates:
    """A copy of a model whose attention is called with states held here: one per site and branch.

    Sites are told by the order of calls, which is known for each case; nothing of the library's own tracing is used.
    """

    def __init__(self, case: Case, model: nn.Module, threshold: float = THRESHOLD) -> None:
        self.model = copy.deepcopy(model)
        self.threshold = threshold
        self.states: dict[tuple[str, str], SkipState] = {}
        self._case = case

    def __call__(self, inputs: Inputs, branch: str = "") -> torch.Tensor:
        sites = iter(self._case.sites)
        with replaced_sdpa(functools.partial(self._attend, sites, branch)):
            out = run(self.model, inputs)
        assert next(sites, None) is None
        return out

    def _attend(
        self,
        sites: Iterator[str],
        branch: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **more: Any,
    ) -> torch.Tensor:
        site = next(sites)
        if site not in self._case.swapped:
            return F.scaled_dot_product_attention(query, key, value, **more)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        if (site, branch) not in self.states:
            self.states[site, branch] = SkipState(
                batch=q.shape[0], heads=q.shape[2], seq_q=q.shape[1], seq_k=k.shape[1], tile_m=TILE[0],
                tile_n=TILE[1], slots=1, threshold=self.threshold,
            )  # fmt: skip
        mask = more.get("attn_mask")
        key_mask = None if mask is None else mask[:, 0].any(1)
        out = lite_attention.skip_attention(q, k, v, self.states[site, branch], key_mask=key_mask).transpose(1, 2)
        return out if mask is None else out * mask.any(-1, keepdim=True)  # a query without a key gives 0

    def reset(self) -> None:
        self.states.clear()

    def skipped(self, site: str, branch: str = "") -> int:
        return int((~self.states[site, branch].kept_tiles()).sum())


@contextmanager
def replaced_sdpa(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let models call a function in place of scaled_dot_product_attention."""
    original = F.scaled_dot_product_attention

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", original):
            return function(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", call):
        yield


def skipped_by_site(report: lite_attention.Report, slot: int = 0) -> dict[str, int]:
    """Return the number of skipped tiles of each swapped site."""
    return {row.name: int((~row.state.kept_tiles()[slot]).sum()) for row in report.swapped if row.state is not None}


def silent_report(model_or_pipe: Any) -> lite_attention.Report:
    """Return the report without printing it, or warning that it is empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lite_attention.report(model_or_pipe, file=io.StringIO())


def names(report: lite_attention.Report) -> list[str]:
    return [row.name for row in report.rows]
