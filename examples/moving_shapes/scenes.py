"""Videos of flat shapes that move over a panning checkered background, with everything about them known.

Lengths are in units of the frame's shorter side, so that a scene looks the same at every resolution; x points right, y
down, the origin is the top left corner of the frame. Time is in frames. The camera's pan moves the background alone:
paths are those on the screen.

Sprite 0 is the main one, which prompts describe: the largest, in front of all. Sprite i hides what it covers of
sprite i + 1. No two sprites of a video have the same color.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

__all__ = [
    "FIELDS",
    "MAX_SPRITES",
    "NULL_PROMPT",
    "PALETTE",
    "Scenes",
    "Size",
    "constant",
    "draw_scenes",
    "make_videos",
    "prompt_ids",
    "tile",
]

Size = tuple[int, int, int]  # of a video: frames, height, width; in pixels

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
# The direction at frame 0 of a straight path, which bounces off the frame's edges; or the sense of a circular one.
_DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
MOTIONS = (*_DIRECTIONS, "clockwise", "counterclockwise")
SPEEDS = ("slow", "fast")
COUNTS = ("1", "2", "3")
PANS = ("none", "right", "down", "left", "up")

# What a prompt consists of: one token a field, its value an index into these, or one past them for "not said".
FIELDS = {"shape": SHAPES, "color": COLORS, "motion": MOTIONS, "speed": SPEEDS, "count": COUNTS, "pan": PANS}
NULL_PROMPT = tuple(len(values) for values in FIELDS.values())

MAX_SPRITES = len(COUNTS)
PALETTE = (
    (0.9, -0.9, -0.9),
    (-0.9, 0.9, -0.9),
    (-0.9, -0.9, 0.9),
    (0.9, 0.9, -0.9),
    (0.9, -0.9, 0.9),
    (-0.9, 0.9, 0.9),
)

# Corners, pointedness (2 = a regular polygon), turn in radians, and circumradius at size 1, which evens out the areas.
_OUTLINE = ((64.0, 2.0, 0.0, 1.0), (4.0, 2.0, math.pi / 4, 1.2), (3.0, 2.0, 0.0, 1.4), (5.0, 3.2, 0.0, 1.45))
_STRAIGHT = len(_DIRECTIONS)  # motions from here on are circular
_SPEED_RANGE = ((0.012, 0.020), (0.032, 0.045))  # sides a frame


@dataclass
class Scenes:
    """A batch of B scenes of up to S = `MAX_SPRITES` sprites; it knows no resolution and no end.

    Integers are indices into the tuple of that name.
    """

    shape: torch.Tensor  # [B, S]
    color: torch.Tensor  # [B, S]
    size: torch.Tensor  # [B, S] radius of a disc of about the same area, sides
    motion: torch.Tensor  # [B, S]
    fast: torch.Tensor  # [B, S] index into SPEEDS
    speed: torch.Tensor  # [B, S] sides a frame, along the path
    angle: torch.Tensor  # [B, S] direction at frame 0, or where on its circle a sprite starts; radians, clockwise
    turn: torch.Tensor  # [B, S] radius of a circular path, sides
    place: torch.Tensor  # [B, S, 2] start, or center of the circle, in [0, 1] of where it may be
    count: torch.Tensor  # [B] sprites less one
    pan: torch.Tensor  # [B]
    pan_speed: torch.Tensor  # [B] sides a frame
    tones: torch.Tensor  # [B, 2, 3] colors between which the background changes
    slope: torch.Tensor  # [B] direction of that change, radians
    checker: torch.Tensor  # [B, 4] cell size and offset x, y in sides; contrast

    def prompt(self) -> torch.Tensor:
        """Return the prompts [B, fields] that describe the scenes."""
        main = (self.shape, self.color, self.motion, self.fast)
        return torch.stack([*(label[:, 0] for label in main), self.count, self.pan], 1)

    def path(self, size: Size) -> torch.Tensor:
        """Return the centers (x, y) of all sprites, [B, S, F, 2] in sides, for videos of a size."""
        frames, height, width = size
        time = torch.arange(frames, device=self.angle.device).view(-1, 1)
        extent = constant((width / min(height, width), height / min(height, width)), self.angle.device)
        angle, speed, margin = (t[..., None, None] for t in (self.angle, self.speed, self.size))
        place = self.place.unsqueeze(2)

        # A straight path, folded back at the margins.
        room = extent - 2 * margin
        straight = place * room + speed * time * _unit(angle)
        straight = margin + room - (straight.remainder(2 * room) - room).abs()

        turn = self.turn[..., None, None]
        sense = torch.where(self.motion == _STRAIGHT, 1.0, -1.0)[..., None, None]
        center = margin + turn + place * (room - 2 * turn).clamp_min(0)
        circle = center + turn * _unit(angle + sense * speed / turn * time)
        return torch.where((self.motion < _STRAIGHT)[..., None, None], straight, circle)

    def render(self, size: Size) -> torch.Tensor:
        """Return the videos [B, 3, F, H, W] in [-1, 1], anti-aliased."""
        frames, height, width = size
        side = min(height, width)
        device = self.angle.device
        y = (torch.arange(height, device=device) + 0.5).view(-1, 1) / side
        x = (torch.arange(width, device=device) + 0.5) / side
        video = self._background(x, y, torch.arange(frames, device=device).view(-1, 1, 1), side)
        paths = self.path(size)
        for sprite in reversed(range(MAX_SPRITES)):
            center = paths[:, sprite, :, None, None]
            distance = self._distance(sprite, x - center[..., 0], y - center[..., 1])
            cover = (0.5 - side * distance).clamp(0, 1) * (sprite <= self.count).view(-1, 1, 1, 1)
            color = constant(PALETTE, device)[self.color[:, sprite]].view(-1, 3, 1, 1, 1)
            video = torch.lerp(video, color, cover.unsqueeze(1))
        return video

    def _background(self, x: torch.Tensor, y: torch.Tensor, time: torch.Tensor, side: int) -> torch.Tensor:
        slope, pan_speed = (t.view(-1, 1, 1, 1) for t in (self.slope, self.pan_speed))
        cell, offset_x, offset_y, contrast = (t.view(-1, 1, 1, 1) for t in self.checker.unbind(1))
        across = (x - 0.5) * slope.cos() + (y - 0.5) * slope.sin() + 0.5
        low, high = self.tones.view(-1, 2, 3, 1, 1, 1).unbind(1)
        smooth = torch.lerp(low, high, across.clamp(0, 1).unsqueeze(1))

        # The camera moves, so what it sees moves the other way.
        heading = (self.pan - 1).view(-1, 1, 1, 1) * (math.pi / 2)
        way = torch.where(self.pan.view(-1, 1, 1, 1) > 0, pan_speed * time, 0.0)
        world_x, world_y = x + way * heading.cos() + offset_x, y + way * heading.sin() + offset_y
        sharp = cell * side / math.pi  # edges between cells are two pixels wide
        squares = [(sharp * torch.sin(math.pi / cell * world)).clamp(-1, 1) for world in (world_x, world_y)]
        return smooth + (contrast * squares[0] * squares[1]).unsqueeze(1)

    def _distance(self, sprite: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the signed distance to a sprite's outline, negative inside; x and y are relative to its center.

        A star with n corners is folded into one of its 2n congruent wedges, in which its outline is one segment.
        """
        outline = constant(_OUTLINE, x.device)[self.shape[:, sprite]].unbind(1)
        corners, pointed, turn, scale = (t.view(-1, 1, 1, 1) for t in outline)
        radius = scale * self.size[:, sprite].view(-1, 1, 1, 1)
        wedge, edge = math.pi / corners, math.pi / pointed
        angle = (torch.atan2(x, -y) + turn).remainder(2 * wedge) - wedge
        length = torch.hypot(x, y)
        u = length * angle.cos() - radius * wedge.cos()
        v = length * angle.sin().abs() - radius * wedge.sin()
        along = -(u * edge.cos() + v * edge.sin())
        along = torch.minimum(along.clamp_min(0), radius * wedge.sin() / edge.sin())
        u, v = u + along * edge.cos(), v + along * edge.sin()
        return torch.hypot(u, v) * u.sign()


@functools.lru_cache
def constant(values: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """Return a tensor that is made once: to copy one to a GPU in each step would wait for the step before."""
    return torch.tensor(values, device=device)


def _unit(angle: torch.Tensor) -> torch.Tensor:
    """Return (cos, sin) of angles [..., 1] as [..., 2]."""
    return torch.cat([angle.cos(), angle.sin()], -1)


def draw_scenes(batch: int, generator: torch.Generator) -> Scenes:
    """Return scenes that depend on the generator's state alone, on its device."""
    device = generator.device
    sprites = (batch, MAX_SPRITES)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    def index(values: tuple[str, ...], *size: int) -> torch.Tensor:
        return torch.randint(len(values), size, generator=generator, device=device)

    main = torch.arange(MAX_SPRITES, device=device) == 0
    motion, fast = index(MOTIONS, *sprites), index(SPEEDS, *sprites)
    slowest, fastest = constant(_SPEED_RANGE, device)[fast].unbind(-1)
    straight = (motion + uniform(-0.4, 0.4, *sprites)) * (2 * math.pi / _STRAIGHT)
    angle = torch.where(motion < _STRAIGHT, straight, uniform(0, 2 * math.pi, *sprites))
    # Straight paths start where there is way ahead of them.
    ahead = 0.2 * (motion < _STRAIGHT).unsqueeze(-1) * _unit(angle.unsqueeze(-1))
    return Scenes(
        shape=index(SHAPES, *sprites),
        color=uniform(0, 1, batch, len(COLORS)).argsort(1)[:, :MAX_SPRITES],
        size=torch.where(main, uniform(0.15, 0.19, *sprites), uniform(0.08, 0.11, *sprites)),
        motion=motion,
        fast=fast,
        speed=torch.lerp(slowest, fastest, uniform(0, 1, *sprites)),
        angle=angle,
        turn=uniform(0.14, 0.22, *sprites),
        place=0.5 - ahead + uniform(-0.3, 0.3, *sprites, 2),
        count=index(COUNTS, batch),
        pan=index(PANS, batch),
        pan_speed=uniform(0.015, 0.03, batch),
        tones=uniform(-0.6, 0.1, batch, 2, 1) + uniform(-0.15, 0.15, batch, 2, 3),
        slope=uniform(0, 2 * math.pi, batch),
        checker=torch.cat([uniform(0.2, 0.32, batch, 1), uniform(0, 1, batch, 2), uniform(0.08, 0.14, batch, 1)], 1),
    )


def make_videos(batch: int, size: Size, generator: torch.Generator) -> tuple[torch.Tensor, Scenes]:
    """Return videos [batch, 3, F, H, W] in [-1, 1] and the scenes they show."""
    scenes = draw_scenes(batch, generator)
    return scenes.render(size), scenes


def prompt_ids(**values: str) -> torch.Tensor:
    """Return a prompt [1, fields], as `prompt_ids(shape="star", color="red")`; fields left out are not said.

    Raises:
        ValueError: no such field, or no such value of it.
    """
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"prompt: expected fields of {', '.join(FIELDS)}, got {name}")
        if value not in FIELDS[name]:
            raise ValueError(f"{name}: expected one of {', '.join(FIELDS[name])}, got {value}")
    known = (allowed.index(values[name]) if name in values else len(allowed) for name, allowed in FIELDS.items())
    return torch.tensor([list(known)])


def tile(videos: torch.Tensor) -> torch.Tensor:
    """Return videos as rows of their frames, uint8 [B * height, frames * width, 3]."""
    pixels = rearrange(videos, "b c f h w -> (b h) (f w) c").float().clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).cpu()
