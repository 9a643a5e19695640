"""Train the video transformer: flow matching on scenes that are rendered as they are needed.

python -m examples.moving_shapes.train --minutes 8 --out DIR [--decay-minutes 6] [--weights FILE --seed 1]
    [--device cuda] [--tiny]

Goes on from DIR/checkpoint.pt where there is one, and stops by itself. What a step trains on depends on its number
alone, so an interrupted run goes on exactly as if nothing had happened. Writes DIR/weights.safetensors (or weights.pt):
averaged weights in bf16; and DIR/log.jsonl, a line every few steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.moving_shapes.model import PATCH, Config, VideoDiT, load_weights, save_weights, time_shift
from examples.moving_shapes.scenes import NULL_PROMPT, Size, constant, make_videos
from lite_attention.cli.arguments import add_device, integer, number

__all__ = ["Recipe", "Trainer", "flow_loss", "train"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        sizes: of videos: frames, height, width; every step has videos of one size.
        shares: of the steps that each size gets.
        tokens: of a step, about: longer videos come in smaller batches.
        learning_rate: of AdamW, after the warm-up and until the final decay.
        warm_up: steps.
        ema: weight of the past in the running mean of the weights that is kept in the end.
        drop: share of videos whose prompt is left out, for classifier-free guidance.
        log_every: steps between two lines of the log.
    """

    sizes: tuple[Size, ...] = ((10, 48, 48), (16, 64, 64), (32, 64, 64), (28, 96, 96))  # 1440 to 16128 tokens
    shares: tuple[float, ...] = (0.45, 0.30, 0.17, 0.08)
    tokens: int = 65536
    learning_rate: float = 1e-3
    warm_up: int = 500
    ema: float = 0.999
    drop: float = 0.12
    log_every: int = 50

    def batch(self, size: Size) -> int:
        """Return how many videos of a size make a step."""
        return max(1, round(self.tokens * PATCH**2 / math.prod(size)))


TINY = (
    Config(width=64, layers=2, head_dims=(16, 32), mlp_ratio=2, cross_width=32),
    Recipe(sizes=((4, 16, 16), (4, 24, 24)), shares=(0.5, 0.5), tokens=512, warm_up=10, log_every=10),
)


def flow_loss(
    model: VideoDiT, video: torch.Tensor, prompt: torch.Tensor, generator: torch.Generator, drop: float = 0.0
) -> torch.Tensor:
    """Return the mean squared error of the velocity at times drawn from a shifted logit-normal distribution.

    Args:
        model: whose prediction is wanted.
        video: clean, [B, 3, F, H, W].
        prompt: [B, fields].
        generator: on the video's device.
        drop: share of prompts that are left out.
    """
    batch, device = len(video), video.device
    # One time in each quantile of the distribution: small batches would estimate the loss badly from chance draws.
    quantile = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
    at = torch.sigmoid(
        1.2 * torch.special.ndtri(quantile) + math.log(time_shift((video.shape[2], video.shape[3], video.shape[4])))
    )
    noise = torch.randn(video.shape, generator=generator, device=device)
    dropped = torch.rand(batch, 1, generator=generator, device=device) < drop
    prompt = torch.where(dropped, constant(NULL_PROMPT, device), prompt)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(torch.lerp(video, noise, at.view(-1, 1, 1, 1, 1)), at, prompt)
    return F.mse_loss(velocity, noise - video)


class Trainer:
    """A model in training, with all that is needed to go on later.

    Args:
        config: of the model.
        recipe: how to train it.
        device: "cuda" or "cpu".
        seed: of the weights and of what is trained on.
    """

    def __init__(self, config: Config, recipe: Recipe, device: str = "cpu", seed: int = 0) -> None:
        self.config, self.recipe, self.seed = config, recipe, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = VideoDiT(config).to(device)
        self.averaged = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator(device)
        self.steps = 0  # done
        self.seconds = 0.0  # trained, in all pieces
        if device.startswith("cuda"):
            # Code for each size and head dim: some seconds of compiling each, once a machine, but it runs faster than
            # one for all. Eight pieces of code are the most that dynamo makes of one function unless it is told.
            torch._dynamo.config.recompile_limit = 64
            self.model.compile_repeated_blocks(dynamic=False, fullgraph=True)

    def step(self, decay: float = 1.0) -> tuple[Size, torch.Tensor, torch.Tensor]:
        """Do a step, and return its size, loss and gradient norm; the latter two stay on the device.

        Args:
            decay: factor of the learning rate.
        """
        recipe = self.recipe
        seed = self.seed * 2**32 + self.steps
        (size,) = random.Random(seed).choices(recipe.sizes, recipe.shares)
        self.generator.manual_seed(seed)
        video, scenes = make_videos(recipe.batch(size), size, self.generator)
        loss = flow_loss(self.model, video, scenes.prompt(), self.generator, recipe.drop)
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = recipe.learning_rate * min(1.0, (self.steps + 1) / recipe.warm_up) * decay
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        # Early weights are soon of no use: the mean begins short and grows.
        past = min(recipe.ema, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_([*self.averaged.values()], [*self.model.parameters()], 1 - past)
        return size, loss.detach(), gradient

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        content = {
            "config": asdict(self.config),
            "seed": self.seed,
            "steps": self.steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(content, part)
        part.replace(path)

    def begin_with(self, weights: dict[str, torch.Tensor]) -> None:
        """Begin with weights of an earlier training whose checkpoint is lost."""
        self.model.load_state_dict(weights)
        self.averaged = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of a model with another config.
        """
        content = torch.load(path, map_location=self.generator.device, weights_only=True)
        if content["config"] != asdict(self.config):
            raise ValueError(f"checkpoint: expected one of {asdict(self.config)}, got {content['config']}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.averaged = content["averaged"]
        self.seed, self.steps, self.seconds = content["seed"], content["steps"], content["seconds"]


def train(trainer: Trainer, out: Path, minutes: float, decay_minutes: float = 0.0) -> None:
    """Train for some minutes, going on from `out`, and leave checkpoint, weights and log there.

    Args:
        trainer: fresh.
        out: folder.
        minutes: to train now, compilation included.
        decay_minutes: the learning rate falls to zero over the last so many of them; for the last piece.

    Raises:
        FloatingPointError: the training diverged; the last checkpoint is from before.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"goes on from step {trainer.steps}, after {trainer.seconds / 60:.1f} minutes", flush=True)
    start = seen = saved = time.monotonic()
    end, before = start + 60 * minutes, trainer.seconds
    losses: dict[Size, list[torch.Tensor]] = defaultdict(list)
    tokens = 0
    with (out / "log.jsonl").open("a") as log:
        while (now := time.monotonic()) < end:
            decay = min(1.0, (end - now) / (60 * decay_minutes)) if decay_minutes else 1.0
            size, loss, gradient = trainer.step(decay)
            losses[size].append(loss)
            tokens += trainer.recipe.batch(size) * math.prod(size) // PATCH**2
            if trainer.steps % trainer.recipe.log_every:
                continue
            norm = float(gradient)  # waits for the device
            if not math.isfinite(norm):
                raise FloatingPointError(f"step {trainer.steps}: the gradient's norm is {norm}")
            now = time.monotonic()
            trainer.seconds = before + now - start
            line = {
                "step": trainer.steps,
                "minutes": round(trainer.seconds / 60, 2),
                "tokens_per_s": round(tokens / (now - seen)),
                "learning_rate": float(f"{trainer.optimizer.param_groups[0]['lr']:.3g}"),
                "gradient": round(norm, 4),
                "loss": {"x".join(map(str, s)): round(float(torch.stack(losses[s]).mean()), 5) for s in sorted(losses)},
            }
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)
            seen, tokens = now, 0
            losses.clear()
            if now - saved > 120:
                trainer.save(checkpoint)
                saved = now
    trainer.seconds = before + time.monotonic() - start
    trainer.save(checkpoint)
    suffix = ".safetensors" if importlib.util.find_spec("safetensors") else ".pt"
    save_weights(out / f"weights{suffix}", trainer.config, trainer.averaged)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line asks."""
    parser = argparse.ArgumentParser(description="Train the video transformer, or go on training it.")
    parser.add_argument("--minutes", type=number(above=0), required=True, help="to train now")
    parser.add_argument(
        "--decay-minutes", type=number(least=0), default=0.0, help="of them at the end, in which the rate falls"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, weights and log")
    parser.add_argument("--weights", type=Path, help="to begin with, where there is no checkpoint; take another seed")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the weights and of what is trained on")
    add_device(parser)
    parser.add_argument("--tiny", action="store_true", help="a model and videos for trying it out on a CPU")
    args = parser.parse_args(arguments)
    if args.decay_minutes > args.minutes:
        parser.error(
            f"argument --decay-minutes: expected at most --minutes, {args.minutes:g}, got {args.decay_minutes:g}"
        )
    config, recipe = TINY if args.tiny else (Config(), Recipe())
    trainer = Trainer(config, recipe, args.device, args.seed)
    if args.weights:
        trainer.begin_with(load_weights(args.weights).state_dict())
    train(trainer, args.out, args.minutes, args.decay_minutes)


if __name__ == "__main__":
    main()
