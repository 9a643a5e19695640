"""A small video diffusion transformer on pixels, built like Wan's: rotary 3-D positions, adaLN, cross-attention.

It predicts the velocity of a rectified flow: `x_t = (1 - t) video + t noise`, velocity `noise - video`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from examples.moving_shapes.scenes import NULL_PROMPT, Size

__all__ = ["WEIGHTS", "Config", "VideoDiT", "load_weights", "save_weights", "time_shift"]

WEIGHTS = Path(__file__).with_name("weights.safetensors")  # the trained ones
PATCH = 4  # pixels, in height and in width; a token is one such patch of one frame
_CHANNELS = 3 * PATCH * PATCH
_SIDE = 16.0  # rotary positions along the shorter side, whatever its resolution: scenes look the same at all
_OCTAVES = 4  # of the Fourier features of the place in the frame
_TIME_FEATURES = 256


@dataclass(frozen=True)
class Config:
    """Sizes of a model; the defaults are what the README's commands train (11.6 M parameters).

    Args:
        width: of a token.
        layers: number of blocks.
        head_dims: of self-attention, taken in turn by the blocks: 6 heads of 64, then 3 of 128, in the default width.
        mlp_ratio: hidden width of a block's MLP, in widths.
        cross_width: of queries and keys in cross-attention, which has few tokens to look at.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    width: int = 384
    layers: int = 6
    head_dims: tuple[int, ...] = (64, 128)
    mlp_ratio: int = 3
    cross_width: int = 128

    def __post_init__(self) -> None:
        dims = self.head_dims
        if not isinstance(dims, tuple) or not dims or any(dim < 1 or dim % 8 or self.width % dim for dim in dims):
            raise ValueError(
                f"head_dims: expected a tuple of multiples of 8 that divide the width, {self.width}, got {dims!r}"
            )
        if self.cross_width < 1 or self.cross_width % min(64, self.cross_width):
            raise ValueError(f"cross_width: expected at most 64, or a multiple of it, got {self.cross_width}")

    @property
    def head_dim_of_blocks(self) -> list[int]:
        """Head dim of the self-attention of each block."""
        return [self.head_dims[block % len(self.head_dims)] for block in range(self.layers)]


class SelfAttention(nn.Module):
    """Attention of all tokens of the video to each other, with normalized queries and keys."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.Parameter(torch.ones(head_dim)) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Take and return tokens [B, N, width]; see `rotary` for the rotation."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        # In float32: with normalized queries and keys, what rounding there is goes straight into the scores.
        q, k = (
            rotate(F.rms_norm(t.float(), (self.head_dim,), weight.float(), 1e-6), rotation).to(v.dtype)
            for t, weight in ((q, self.norm_q), (k, self.norm_k))
        )
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention of the video's tokens to those of the prompt."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = min(64, config.cross_width)
        self.to_q = nn.Linear(config.width, config.cross_width)
        self.to_kv = nn.Linear(config.width, 2 * config.cross_width)
        self.to_out = nn.Linear(config.cross_width, config.width)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Take and return tokens [B, N, width]; the prompt is [B, fields, width]."""
        parts = (self.to_q(x), *self.to_kv(prompt).chunk(2, -1))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in parts)
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP; the time shifts, scales and gates the first and the last."""

    def __init__(self, config: Config, head_dim: int) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(3))
        self.self_attention, self.cross_attention = SelfAttention(width, head_dim), CrossAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width), nn.GELU("tanh"), nn.Linear(config.mlp_ratio * width, width)
        )
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(
        self, x: torch.Tensor, prompt: torch.Tensor, modulation: torch.Tensor, rotation: torch.Tensor
    ) -> torch.Tensor:
        """Take and return tokens [B, N, width]; the modulation is [B, 6, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).unsqueeze(2).unbind(1)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1, rotation)
        x = x + self.cross_attention(self.norm2(x), prompt)
        x = x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)
        return x


class VideoDiT(nn.Module):
    """Predicts the velocity at time t in [0, 1] (1 = noise) of videos in pixels, of any size of whole patches.

    `order`, int64 (tokens,) or None, says which token of the video, counted frame by frame and row by row, stands at
    each place of the sequence. It changes nothing but what attention finds side by side.
    """

    _repeated_blocks = ("Block",)  # `lite_attention.enable(model, compile="blocks")` asks for it, as diffusers does

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.order: torch.Tensor | None = None
        self.embed_patch = nn.Linear(_CHANNELS + 4 * _OCTAVES, width)
        self.embed_prompt = nn.ModuleList(nn.Embedding(values + 1, width) for values in NULL_PROMPT)
        self.embed_time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config, head_dim) for head_dim in config.head_dim_of_blocks)
        self.norm_out = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.modulate_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to_patch = nn.Linear(width, _CHANNELS)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Begin with blocks that change nothing and a velocity of zero, from where large learning rates are safe."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        nn.init.zeros_(self.to_patch.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(("modulate.1.weight", "modulate_out.1.weight", "cross_attention.to_out.weight")):
                nn.init.zeros_(parameter)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks in place, as diffusers' method of this name; those of a head dim share compiled code."""
        for block in self.blocks:
            block.compile(**options)

    def forward(self, video: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return the velocity [B, 3, F, H, W].

        Args:
            video: noisy video [B, 3, F, H, W]; H and W are multiples of `PATCH`.
            time: [B], 0 = clean, 1 = noise.
            prompt: indices [B, fields] into `FIELDS`.
        """
        frames, rows, columns = video.shape[2], video.shape[3] // PATCH, video.shape[4] // PATCH
        dtype = self.to_patch.weight.dtype
        patches = rearrange(video, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH)
        places = _places(frames, rows, columns, video.device)
        if self.order is not None:
            patches, places = patches[:, self.order], places[self.order]
        rotations = {head_dim: rotary(places, head_dim) for head_dim in self.config.head_dims}
        features = _fourier(places[:, 1:] / _SIDE).expand(len(video), -1, -1)
        # The residual stream has the dtype of the weights, also where autocast gives layers another.
        x = self.embed_patch(torch.cat([patches, features], -1).to(dtype)).to(dtype)

        said = torch.stack([embed(field) for embed, field in zip(self.embed_prompt, prompt.unbind(1), strict=True)], 1)
        now = self.embed_time(_time_features(time).to(dtype)) + said.mean(1)
        modulation = self.modulate(now).unflatten(-1, (6, -1))
        for block, head_dim in zip(self.blocks, self.config.head_dim_of_blocks, strict=True):
            x = block(x, said, modulation, rotations[head_dim])
        shift, scale = self.modulate_out(now).unsqueeze(1).chunk(2, -1)
        x = self.to_patch(self.norm_out(x) * (1 + scale) + shift)
        if self.order is not None:
            x = x[:, self.order.argsort()]
        shape = {"f": frames, "h": rows, "w": columns, "p": PATCH, "q": PATCH}
        velocity: torch.Tensor = rearrange(x, "b (f h w) (c p q) -> b c f (h p) (w q)", **shape)
        return velocity.float()


# ---- positions and times -------------------------------------------------------------------------------------------


def _places(frames: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return where each token is, [N, 3]: frame, y, x; y and x in sixteenths of the shorter side."""
    cell = _SIDE / min(rows, columns)
    y, x = ((torch.arange(n, device=device) + 0.5) * cell for n in (rows, columns))
    return torch.cartesian_prod(torch.arange(float(frames), device=device), y, x)


def rotary(places: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return cosines and sines [2, N, head_dim / 2] of the angles by which pairs of channels turn.

    A quarter of the pairs turns with the frame, the others with y and x; at speeds from 1 down to 1/100.
    """
    pairs = head_dim // 2
    of_time = pairs // 4
    of_y = (pairs - of_time) // 2
    angles = [
        place.unsqueeze(1) * 100.0 ** (-torch.arange(n, device=place.device) / n)
        for place, n in zip(places.unbind(1), (of_time, of_y, pairs - of_time - of_y), strict=True)
    ]
    angle = torch.cat(angles, 1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D / 2) of the channels of queries or keys [B, heads, N, D]."""
    cos, sin = rotation.unbind(0)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _fourier(places: torch.Tensor) -> torch.Tensor:
    """Return features [N, 4 * _OCTAVES] of places (y, x) in sides: sprites bounce at the frame's edges."""
    angles = (places.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(_OCTAVES, device=places.device)).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _time_features(time: torch.Tensor) -> torch.Tensor:
    """Return features [B, _TIME_FEATURES] of times in [0, 1]."""
    half = _TIME_FEATURES // 2
    angles = 1000 * time.float().unsqueeze(1) * 10000 ** (-torch.arange(half, device=time.device) / half)
    return torch.cat([angles.cos(), angles.sin()], -1)


def time_shift(size: Size) -> float:
    """Return the shift of times for a video's size: the more pixels show the same thing, the more noise hides it.

    Times are shifted as in Stable Diffusion 3: `shift * t / (1 + (shift - 1) * t)`.
    """
    tokens = math.prod(size) // PATCH**2
    return 3.0 * math.sqrt(tokens / 1440)


# ---- weights -------------------------------------------------------------------------------------------------------


def save_weights(path: Path, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """Write weights in bf16 with their config; a name that ends in .safetensors chooses that format."""
    weights = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, path, {"config": json.dumps(asdict(config))})
    else:
        torch.save({"config": asdict(config), "weights": weights}, path)


def load_weights(path: Path = WEIGHTS) -> VideoDiT:
    """Return the model of a file that `save_weights` wrote, in float32; without one, the trained model."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    else:
        content = torch.load(path, weights_only=True)
        config, weights = content["config"], content["weights"]
    config["head_dims"] = tuple(config["head_dims"])  # JSON has lists alone
    model = VideoDiT(Config(**config))
    model.load_state_dict(weights)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a file of weights from one format to the other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path, help="weights.pt or weights.safetensors")
    parser.add_argument("target", type=Path, help="likewise")
    args = parser.parse_args(arguments)
    model = load_weights(args.source)
    save_weights(args.target, model.config, model.state_dict())


if __name__ == "__main__":
    main()
