"""The demo: a Wan video transformer denoises a latent twice in step, dense and skip-aware, and shows what differs.

There are no trained weights here. `build_model` sets a diffusers `WanTransformer3DModel` up by hand so that its
attention is peaked and local, roughly as in trained models, and so that the model really denoises, by smoothing. That
is enough to see what the method does with a real model, scheduler and guidance; it says nothing about video quality.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

import lite_attention
from lite_attention import plot
from lite_attention.ops import SkipState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HEAD_KINDS", "DemoOptions", "DemoResult", "DemoStep", "add_parser", "build_model", "main", "run"]

# What the heads of every layer attend to, and how sharply along (time, height, width): by how many nats each fast
# rotary pair of that axis moves the score up and down with distance.
HEAD_KINDS = {
    "local": (1.5, 1.5, 1.5),
    "spatial": (2.0, 0.2, 0.2),
    "temporal": (0.1, 2.0, 2.0),
    "broad": (0.5, 0.5, 0.5),
}
_HEAD_DIM, _LAYERS, _CHANNELS, _TEXT_DIM, _TEXT_TOKENS = 64, 3, 16, 64, 32
_CONTENT = 1.0  # standard deviation of the content of queries and keys: how much it adds to what positions say
_BRANCHES = ("cond", "uncond")
_GUIDANCE = 4.0
_FLOW_SHIFT = 3.0  # what Wan uses at 480p


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chooses.

    Args:
        steps: denoising steps.
        threshold: in log2 units, see `SkipState`.
        frames: of the latent, as are height and width; 2 x 2 places of a frame make one token.
        height: even.
        width: even.
        seed: of the weights, the prompt and the noise.
        device: "cpu" or "cuda".
        compile: compile both models; False runs them eagerly.

    Raises:
        ValueError: a size that does not fit, or no CUDA device to run on.
    """

    steps: int = 12
    threshold: float = -2.0
    frames: int = 12
    height: int = 32
    width: int = 32
    seed: int = 0
    device: str = "cpu"
    compile: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.frames, self.height, self.width) < 1 or self.height % 2 or self.width % 2:
            raise ValueError(
                "steps, frames, height, width: expected numbers above 0, height and width even, "
                f"got {self.steps}, {self.frames}, {self.height}, {self.width}"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device: expected cpu, since PyTorch sees no CUDA device, got " + self.device)

    @property
    def tokens(self) -> int:
        """Length of the sequence that attention sees."""
        return self.frames * (self.height // 2) * (self.width // 2)


@dataclass(frozen=True)
class DemoStep:
    """One denoising step."""

    timestep: float  # 1000 = pure noise, 0 = clean
    sparsity: float  # share of tiles that this step skipped, over all layers, heads and both branches
    error: float  # sum|skip-aware - dense| / sum|dense| of the latent after this step
    dense_seconds: float
    skip_seconds: float


@dataclass
class DemoResult:
    """What a run measured."""

    options: DemoOptions
    steps: list[DemoStep] = field(default_factory=list)
    # By step: share of tiles skipped [layers, heads], and tiles computed, bool [layers, heads, q_tiles, k_tiles], of
    # the cond branch.
    head_sparsity: list[torch.Tensor] = field(default_factory=list)
    kept_tiles: list[torch.Tensor] = field(default_factory=list)
    tile_shape: tuple[int, int] = (0, 0)
    heads: tuple[str, ...] = tuple(HEAD_KINDS)


# ---- the model -----------------------------------------------------------------------------------------------------


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('the demo needs diffusers: pip install "lite-attention[diffusers,plot]"') from error
    return diffusers


@torch.no_grad()
def build_model(seed: int = 0) -> Any:
    """Return a small diffusers `WanTransformer3DModel` with peaked, local attention that changes over the steps.

    Its attention subtracts a local mean from every token, so that what is left, and what the model predicts, is the
    noise. Layer norm scales the prediction to unit size, as flow matching wants it.
    """
    heads = len(HEAD_KINDS)
    dim = heads * _HEAD_DIM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _diffusers().WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=_HEAD_DIM, num_layers=_LAYERS, ffn_dim=2 * dim,
            in_channels=_CHANNELS, out_channels=_CHANNELS, text_dim=_TEXT_DIM, freq_dim=64,
        )  # fmt: skip
        # Tokens in and noise out through the same orthonormal map: what no layer touches passes unchanged.
        patch = nn.init.orthogonal_(model.patch_embedding.weight.view(dim, -1)).view(dim, _CHANNELS, -1)
        model.patch_embedding.bias.zero_()
        model.proj_out.weight.copy_(patch.permute(2, 1, 0).reshape(-1, dim))
        model.proj_out.bias.zero_()
        model.scale_shift_table.zero_()
        # The timestep moves shift and scale of the self-attention's input, so its pattern changes over the steps.
        time_proj = model.condition_embedder.time_proj
        time_proj.weight.zero_()
        time_proj.weight[: 2 * dim].normal_(std=0.6)
        time_proj.bias.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, 2] = 1.0  # gate of the self-attention
            block.scale_shift_table[:, 5] = 0.5  # gate of the feed-forward
            _set_self_attention(block.attn1, model.rope)
    return model.eval()


def _set_self_attention(attention: Any, rope: Any) -> None:
    """Let positions speak through the fast rotary pairs, by biases, and content through the slow ones, by weights."""
    heads, dim = len(HEAD_KINDS), attention.to_q.in_features
    # Angle by which each pair turns from one token to the next, and the axis along which it does.
    turn = torch.atan2(rope.freqs_sin[1, 1::2], rope.freqs_cos[1, 0::2])
    axis = torch.arange(3).repeat_interleave(torch.tensor([rope.t_dim, rope.h_dim, rope.w_dim]) // 2)
    fast = turn > 0.03
    content = torch.where(fast, 0.0, _CONTENT).repeat_interleave(2).repeat(heads)

    sharpness = torch.tensor(list(HEAD_KINDS.values())) * torch.randn(heads, 3).mul(0.4).exp()
    size = (sharpness[:, axis] * math.sqrt(_HEAD_DIM)).sqrt() * fast
    phase = 2 * math.pi * torch.rand(heads, len(turn))
    offset = torch.randn(heads, 3).round()  # tokens between a query and what it looks for
    for linear, norm, angle in (
        (attention.to_q, attention.norm_q, phase),
        (attention.to_k, attention.norm_k, phase + offset[:, axis] * turn),
    ):
        linear.bias.copy_(torch.view_as_real(torch.polar(size, angle)).flatten())
        linear.weight.normal_(std=dim**-0.5).mul_(content.unsqueeze(1))
        # The norm divides by the root mean square, which hardly varies between tokens: give it back.
        norm.weight.fill_(float((linear.bias.square() + linear.weight.square().sum(1)).mean().sqrt()))
    nn.init.orthogonal_(attention.to_v.weight)
    attention.to_out[0].weight.copy_(-0.5 * attention.to_v.weight.T)
    attention.to_v.bias.zero_()
    attention.to_out[0].bias.zero_()


# ---- one generation ------------------------------------------------------------------------------------------------


class _Generation:
    """A model on its way from noise to a clean latent, with classifier-free guidance."""

    def __init__(self, model: Any, options: DemoOptions) -> None:
        self.model, self.steps = model, options.steps
        device, self.dtype = torch.device(options.device), model.patch_embedding.weight.dtype
        self.scheduler = _diffusers().FlowMatchEulerDiscreteScheduler(shift=_FLOW_SHIFT)
        self.scheduler.set_timesteps(options.steps, device=device)
        generator = torch.Generator().manual_seed(options.seed)
        size = (1, _CHANNELS, options.frames, options.height, options.width)
        self.latent = torch.randn(size, generator=generator).to(device)
        text = torch.randn(len(_BRANCHES), 1, _TEXT_TOKENS, _TEXT_DIM, generator=generator)
        self.text = dict(zip(_BRANCHES, text.to(device, self.dtype), strict=True))

    def predict(self, branch: str, step: int) -> torch.Tensor:
        """Run one branch of one step; this is how diffusers' pipelines tell the model where they are."""
        with self.model.cache_context(branch, step_index=step, num_inference_steps=self.steps):
            velocity: torch.Tensor = self.model(
                hidden_states=self.latent.to(self.dtype),
                timestep=self.scheduler.timesteps[step].expand(1),
                encoder_hidden_states=self.text[branch],
                return_dict=False,
            )[0]
        return velocity.float()

    def advance(self, step: int) -> float:
        """Denoise by one step and return the seconds that it took."""
        start = self._now()
        cond, uncond = (self.predict(branch, step) for branch in _BRANCHES)
        velocity = uncond + _GUIDANCE * (cond - uncond)
        self.latent = self.scheduler.step(velocity, self.scheduler.timesteps[step], self.latent, return_dict=False)[0]
        return self._now() - start

    def warm_up(self) -> float:
        """Compile what there is to compile, and return the seconds that it took."""
        start = self._now()
        self.predict(_BRANCHES[0], 0)
        return self._now() - start

    def _now(self) -> float:
        if self.latent.is_cuda:
            torch.cuda.synchronize(self.latent.device)
        return time.perf_counter()


def _to_device(model: Any, device: str) -> Any:
    """Move a model, on CUDA in bfloat16 save for what diffusers, too, keeps in float32."""
    model.to(device)
    if device.startswith("cuda"):
        for part in (model.patch_embedding, model.condition_embedder, model.blocks, model.proj_out):
            part.to(torch.bfloat16)
        model.condition_embedder.time_embedder.float()
    return model


# ---- the comparison ------------------------------------------------------------------------------------------------


def _report(model: Any) -> lite_attention.Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was swapped is told below, with the reason
        return lite_attention.report(model, file=io.StringIO())


def _states(model: Any) -> list[SkipState]:
    """Return the skip states of the self-attention layers, in order."""
    return [row.state for row in _report(model).swapped if row.state is not None]


def run(options: DemoOptions) -> DemoResult:
    """Denoise the same noise dense and skip-aware, step by step, and print a row for each step.

    Both advance in turn, so that whatever else the machine does slows both alike.

    Raises:
        NotImplementedError: no attention could be made skip-aware on this device; says why.
    """
    _say_what_runs(options)
    model = _to_device(build_model(options.seed), options.device)
    dense, skipping = _Generation(copy.deepcopy(model), options), _Generation(model, options)
    result = DemoResult(options)
    with torch.no_grad():
        _prepare(dense, skipping, options)
        states = _states(model)
        result.tile_shape = (states[0].tile_m, states[0].tile_n)
        print(f"\n{'step':>4}  {'t':>6}  {'skipped':>7}  {'error':>7}  {'dense':>7}  {'skip-aware':>10}")
        for i in tqdm(range(options.steps), desc="denoising", unit="step", file=sys.stderr):
            result.head_sparsity.append(torch.stack([state.sparsity(per="head") for state in states]).cpu())
            result.kept_tiles.append(torch.stack([state.kept_tiles()[0, 0] for state in states]).cpu())
            dense_seconds, skip_seconds = dense.advance(i), skipping.advance(i)
            difference = (skipping.latent - dense.latent).abs().sum() / dense.latent.abs().sum()
            row = DemoStep(
                timestep=float(dense.scheduler.timesteps[i]),
                sparsity=float(result.head_sparsity[-1].mean()),
                error=float(difference),
                dense_seconds=dense_seconds,
                skip_seconds=skip_seconds,
            )
            result.steps.append(row)
            tqdm.write(
                f"{i:>4}  {row.timestep:>6.1f}  {row.sparsity:>7.1%}  {row.error:>7.2%}  "
                f"{row.dense_seconds:>5.2f} s  {row.skip_seconds:>8.2f} s",
                file=sys.stdout,
            )
    _say_what_came_out(result)
    return result


def _prepare(dense: _Generation, skipping: _Generation, options: DemoOptions) -> None:
    """Compile both models, make one skip-aware, and print the report of its attention sites."""
    if options.compile:
        dense.model.compile_repeated_blocks()
    lite_attention.enable(
        skipping.model,
        threshold=options.threshold,
        num_steps=options.steps,
        compile="blocks" if options.compile else False,
    )
    print("\ncompiling:" if options.compile else "\nwarming up:", end=" ", flush=True)
    print(f"dense {dense.warm_up():.1f} s,", end=" ", flush=True)
    print(f"skip-aware {skipping.warm_up():.1f} s; with one call each, not in the times below\n")
    lite_attention.reset(skipping.model)
    report = _report(skipping.model)
    print(report)
    if not _states(skipping.model):
        reasons = "; ".join(sorted({str(row.reason) for row in report.rows}))
        raise NotImplementedError(f"no attention is skip-aware on {options.device}: {reasons}")


def _say_what_runs(options: DemoOptions) -> None:
    tokens_of = f"{options.frames} frames of {options.height // 2} x {options.width // 2}"
    print(
        f"diffusers WanTransformer3DModel, {_LAYERS} layers of {len(HEAD_KINDS)} heads ({', '.join(HEAD_KINDS)}) of "
        f"{_HEAD_DIM}, {options.tokens:,} tokens ({tokens_of})\n"
        f"FlowMatchEulerDiscreteScheduler, {options.steps} steps, guidance {_GUIDANCE:g} "
        f"({' and '.join(_BRANCHES)} forwards), seed {options.seed}, {options.device}, "
        f"{'compiled' if options.compile else 'eager'}, threshold {options.threshold:g} (log2 units)\n"
        "The weights are not trained: they are set up so that attention is peaked and local, roughly as in trained "
        "models.\nThis shows what the method does, not how good a video it makes."
    )


def _say_what_came_out(result: DemoResult) -> None:
    last, options = result.steps[-1], result.options
    dense, skipping = (sum(getattr(step, name) for step in result.steps) for name in ("dense_seconds", "skip_seconds"))
    print(
        f"\nall {options.steps} steps: dense {dense:.1f} s, skip-aware {skipping:.1f} s ({skipping / dense:.2f} times "
        f"as long); the last step skipped {last.sparsity:.0%} of the {result.tile_shape[0]} x {result.tile_shape[1]} "
        f"tiles, and the latent is {last.error:.1%} off the dense one (relative L1)"
    )


def _draw(result: DemoResult) -> Figure:
    """Return the figure of the demo: skip maps of a layer's heads over the steps, sparsity, and error.

    Raises:
        ImportError: matplotlib is missing.
    """
    options, last = result.options, len(result.steps) - 1
    figure = plot.new_figure(
        12,
        8,
        f"Attention tiles that LiteAttention skips: a small Wan transformer with untrained weights, "
        f"{options.tokens:,} tokens, threshold {options.threshold:g}",
    )
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    left, right = panels

    shown = sorted({0, min(1, last), last // 2, last})
    layer = result.kept_tiles[0].shape[0] // 2
    kept = torch.stack([result.kept_tiles[step][layer] for step in shown], dim=1)
    left.suptitle(
        f"Layer {layer}, cond branch: tiles of {result.tile_shape[0]} queries x {result.tile_shape[1]} keys; "
        "blue = computed, grey = skipped",
        fontsize=9,
    )
    plot.draw_skip_maps(left, list(kept), [f"{kind} head" for kind in result.heads], [f"step {step}" for step in shown])

    upper, lower = right.subplots(2, 1, height_ratios=(1.5, 1))
    upper.set_title("Skipped, mean over layers and branches", fontsize=10)
    plot.draw_sparsity(upper, torch.stack(result.head_sparsity).mean(1), result.heads)
    lower.set_title("Distance of the latent from the dense run's", fontsize=10)
    lower.plot([100 * step.error for step in result.steps], color="black", marker="o", markersize=3)
    lower.set(xlabel="denoising step", ylabel="relative L1 error after the step (%)", ylim=(0, None))
    lower.sharex(upper)
    lower.grid(alpha=0.3)
    return figure


def add_parser(commands: Any) -> None:
    """Add the command `demo` to what `argparse.ArgumentParser.add_subparsers` returned."""
    default = DemoOptions()
    parser = commands.add_parser(
        "demo",
        help="denoise with a small Wan transformer, dense and skip-aware, and draw what was skipped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=default.steps, help="denoising steps")
    parser.add_argument("--threshold", type=float, default=default.threshold, help="log2 units; lower skips less")
    parser.add_argument("--frames", type=int, default=default.frames, help="frames of the latent")
    parser.add_argument("--height", type=int, default=default.height, help="height of the latent, even")
    parser.add_argument("--width", type=int, default=default.width, help="width of the latent, even")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, prompt and noise")
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile both models")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write")
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    """Run the demo as the command line asks, write the picture, and return the exit status."""
    options = DemoOptions(**{f.name: getattr(args, f.name) for f in fields(DemoOptions)})
    plot.require_matplotlib()  # before a minute of work, not after it
    result = run(options)
    _draw(result).savefig(args.output)
    print(f"picture: {args.output}")
    print("On your own pipeline: `lite_attention.enable(pipe, threshold=-6.0)`, then call `pipe` as you always do.")
    return 0
