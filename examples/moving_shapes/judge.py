"""A judge of videos: a small network, trained on known scenes, that says what the main sprite is and where.

python -m examples.moving_shapes.judge --minutes 1.5 --out DIR [--device cuda]

Writes DIR/judge.pt and prints how well it judges scenes that it has not seen: the best that a sample can get.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from examples.moving_shapes.scenes import FIELDS, Size, make_videos
from lite_attention.cli.arguments import add_device, number

__all__ = [
    "HOLD_OUT",
    "JUDGE",
    "Judge",
    "Verdict",
    "feature_distance",
    "load_judge",
    "measure",
    "measure_truth",
    "path_distance",
    "train_judge",
]

JUDGE = Path(__file__).with_name("judge.pt")  # the trained one

_SIDE = 64  # frames are brought to this size, to one sprite size whatever their resolution
_GRID = _SIDE // 4
_OF_FRAME, _OF_PATH = ("shape", "color", "count"), ("motion", "speed")
_SIZES = ((10, 48, 48), (16, 64, 64), (28, 96, 96))
HOLD_OUT = 2**40  # seeds from here on are those of scenes that nothing is trained on


@dataclass
class Verdict:
    """What a judge says of B videos."""

    logits: dict[str, torch.Tensor]  # field of `FIELDS` (all but the pan) -> [B, values]
    path: torch.Tensor  # [B, F, 2] center (x, y) of the main sprite, sides
    certainty: torch.Tensor  # [B, F] how much of the heat map lies within 2 cells of the center


class Judge(nn.Module):
    """Looks at each frame alone for what there is, and at the main sprite's path for how it moves. Square frames."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, width, 2), (width, width, 1), (width, 2 * width, 2)):
            layers += [nn.Conv2d(before, after, 5, stride, 2), nn.GroupNorm(8, after), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.GroupNorm(8, 2 * width), nn.ReLU()]
        self.see = nn.Sequential(*layers)
        self.heat = nn.Conv2d(2 * width, 1, 1)
        self.of_frame = nn.ModuleDict({name: nn.Linear(4 * width, len(FIELDS[name])) for name in _OF_FRAME})
        self.follow = nn.Sequential(
            nn.Conv1d(5, 64, 3, padding=1), nn.ReLU(), nn.Conv1d(64, 64, 3, padding=1), nn.ReLU()
        )
        self.of_path = nn.ModuleDict({name: nn.Linear(128, len(FIELDS[name])) for name in _OF_PATH})

    @staticmethod
    def images(video: torch.Tensor) -> torch.Tensor:
        """Return the frames [B F, 3, side, side] that are looked at, of videos [B, 3, F, H, W]."""
        frames = video.transpose(1, 2).flatten(0, 1)
        return F.interpolate(frames, (_SIDE, _SIDE), mode="bilinear", antialias=True)

    def forward(self, video: torch.Tensor) -> Verdict:
        """Judge videos [B, 3, F, H, W] in [-1, 1]."""
        batch, frames = video.shape[0], video.shape[2]
        seen = self.see(self.images(video))
        heat = self.heat(seen).flatten(1).softmax(1)  # [B F, cells]
        centers = (torch.arange(_GRID, device=video.device) + 0.5) / _GRID
        places = torch.cartesian_prod(centers, centers).flip(1)  # [cells, 2], x before y
        path = heat @ places
        near = (torch.cdist(path.unsqueeze(1), places.unsqueeze(0)).squeeze(1) < 2.5 / _GRID).float()

        # What is at the sprite, and what is anywhere.
        features = torch.cat([(seen.flatten(2) * heat.unsqueeze(1)).sum(2), seen.flatten(2).amax(2)], 1)
        logits = {
            name: head(features).unflatten(0, (batch, frames)).log_softmax(2).mean(1)
            for name, head in self.of_frame.items()
        }
        path = path.unflatten(0, (batch, frames))
        moved = self._follow(path.detach())
        logits |= {name: head(moved) for name, head in self.of_path.items()}
        return Verdict(logits, path, (heat * near).sum(1).unflatten(0, (batch, frames)))

    def _follow(self, path: torch.Tensor) -> torch.Tensor:
        """Return features [B, 128] of paths: a straight one's name is its direction at the start."""
        step = 20 * (path[:, 1:] - path[:, :-1])
        when = torch.linspace(0, 1, step.shape[1], device=path.device).view(1, -1, 1).expand(len(path), -1, -1)
        moved = self.follow(torch.cat([step, path[:, 1:] - 0.5, when], 2).transpose(1, 2))
        return torch.cat([moved[:, :, :4].mean(2), moved.mean(2)], 1)


def judge_loss(judge: Judge, video: torch.Tensor, prompt: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Return the loss of a judge's verdict: cross-entropies, and the distance to the path [B, F, 2]."""
    verdict = judge(video)
    truth = dict(zip(FIELDS, prompt.unbind(1), strict=True))
    named = [F.cross_entropy(logits, truth[name]) for name, logits in verdict.logits.items()]
    return torch.stack(named).sum() + 20 * F.smooth_l1_loss(verdict.path, path, beta=0.02)


def train_judge(minutes: float, out: Path, device: str = "cpu", frames: int = 512, seed: int = 0) -> Judge:
    """Train a judge for some minutes, going on from `out`/judge.pt where there is one; leave it there.

    Args:
        minutes: to train now.
        out: folder.
        device: "cuda" or "cpu".
        frames: of a step, about.
        seed: of weights and scenes.
    """
    torch.manual_seed(seed)
    judge = load_judge(out / "judge.pt") if (out / "judge.pt").exists() else Judge()
    judge.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    generator = torch.Generator(device)
    start, step, said = time.monotonic(), 0, 0
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        generator.manual_seed(seed * 2**32 + step)
        size = _SIZES[step % len(_SIZES)]
        video, scenes = make_videos(max(1, frames // size[0]), size, generator)
        # Samples of a model are not as clean as what is rendered.
        grain = 0.15 * torch.rand(len(video), 1, 1, 1, 1, generator=generator, device=device)
        noisy = video + grain * torch.randn(video.shape, generator=generator, device=device)
        loss = judge_loss(judge, noisy, scenes.prompt(), scenes.path(size)[:, 0])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - spent))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        step += 1
        if spent * 10 >= said:
            print(f"step {step}, loss {float(loss.detach()):.4f}", flush=True)
            said += 1
    out.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), out / "judge.pt")
    return judge.eval()


def load_judge(path: Path = JUDGE) -> Judge:
    """Return the judge of a file that `train_judge` wrote; without one, the trained judge."""
    judge = Judge()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    judge.load_state_dict({name.replace("colour", "color"): x for name, x in weights.items()})  # of older files
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def measure(
    judge: Judge, video: torch.Tensor, prompt: torch.Tensor, path: torch.Tensor | None = None
) -> dict[str, float]:
    """Return how true videos are to their prompts, and how steady.

    Args:
        judge: on the videos' device.
        video: [B, 3, F, H, W].
        prompt: [B, fields]; what a prompt does not say is not counted.
        path: [B, F, 2] where the main sprite is, if known.

    Returns:
        For each field the share of videos that show what was asked for; "certainty" that there is one main sprite;
        "jitter", the mean change of its velocity from frame to frame, sides; "flicker", the mean change of a pixel's
        change from frame to frame; "path_error", sides.
    """
    verdict = judge(video)
    result = {}
    for (name, values), asked in zip(FIELDS.items(), prompt.unbind(1), strict=True):
        said = asked < len(values)
        if name in verdict.logits and said.any():
            result[name] = float((verdict.logits[name].argmax(1) == asked)[said].float().mean())
    result["certainty"] = float(verdict.certainty.mean())
    result["jitter"] = float(verdict.path.diff(n=2, dim=1).norm(dim=2).mean())
    result["flicker"] = float(video.diff(n=2, dim=2).abs().mean())
    if path is not None:
        result["path_error"] = float((verdict.path - path).norm(dim=2).mean())
    return result


@torch.no_grad()
def path_distance(judge: Judge, video: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far apart the main sprites of two batches of videos are, mean over frames, sides."""
    return float((judge(video).path - judge(other).path).norm(dim=2).mean())


@torch.no_grad()
def feature_distance(judge: Judge, video: torch.Tensor, other: torch.Tensor) -> float:
    """Return how different two batches of videos look to a judge: 0 = alike; its layers have five parts in it.

    The squared distance of features as unit vectors at each place, mean over places, summed over the layers, as LPIPS
    (Zhang et al. 2018, arXiv 1801.03924) has it, without learned weights of the channels.
    """
    x, y = judge.images(video), judge.images(other)
    distance = 0.0
    for layer in judge.see:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            distance += float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean())
    return distance


def measure_truth(judge: Judge, batch: int, size: Size, device: str = "cpu") -> dict[str, float]:
    """Return `measure` of rendered scenes that nothing was trained on: what a perfect model would get."""
    generator = torch.Generator(device).manual_seed(HOLD_OUT)
    video, scenes = make_videos(batch, size, generator)
    return measure(judge, video, scenes.prompt(), scenes.path(size)[:, 0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a judge as the command line asks, and judge it."""
    parser = argparse.ArgumentParser(description="Train the judge of videos, or go on training it.")
    parser.add_argument("--minutes", type=number(above=0), required=True, help="to train now")
    parser.add_argument("--out", type=Path, required=True, help="folder of judge.pt")
    add_device(parser)
    args = parser.parse_args(arguments)
    judge = train_judge(args.minutes, args.out, args.device)
    for size in _SIZES:
        measured = measure_truth(judge, 64, size, args.device)
        print("x".join(map(str, size)), json.dumps({name: round(value, 4) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
