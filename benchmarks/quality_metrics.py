"""How near a video is to another one, and how sure a mean over prompts is.

Videos are uint8 (3, frames, height, width), so that the data range of all metrics is 255.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

Pair = tuple[int, int]  # numbers of a prompt and of a seed

RANGE = 255.0
MOST_PSNR = 100.0  # dB; of equal videos, whose PSNR is infinite, and has no mean
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
_VMAF_SIDE = 256  # pixels of the shorter side, at least: VMAF looks at details of up to four halvings
_RESAMPLES, _OUTSIDE = 10_000, 0.05


# ---- fidelity ------------------------------------------------------------------------------------------------------


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Return 10 log10(255^2 / MSE) in dB, the MSE being that of all pixels of the video; at most `MOST_PSNR`."""
    error = float((video.double() - reference.double()).square().mean())
    return min(MOST_PSNR, 10 * math.log10(RANGE**2 / error)) if error else MOST_PSNR


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the structural similarity of the luma, mean over frames and over all whole windows; 1 = equal.

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity, IEEE
    Transactions on Image Processing 13 (4), 2004, section III C: an 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01,
    K2 = 0.03. Their first step, which shrinks large images, is left out.

    Raises:
        ValueError: frames smaller than the window.
    """
    if min(video.shape[-2:]) < _WINDOW:
        raise ValueError(f"video: expected frames of at least {_WINDOW} pixels, got {tuple(video.shape[-2:])}")
    parts = zip(_luma(video).split(16), _luma(reference).split(16), strict=True)
    maps = [_ssim_map(x, y).mean((1, 2, 3)) for x, y in parts]
    return float(torch.cat(maps).mean())


def _luma(video: torch.Tensor) -> torch.Tensor:
    """Return float64 (frames, 1, height, width), as ITU-R BT.601 weighs the colors."""
    weights = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64, device=video.device)
    return torch.einsum("c,cfhw->fhw", weights, video.double()).unsqueeze(1)


def _ssim_map(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the index at each place where the whole window is inside the frame.

    One direction after the other: torchmetrics has the same figures by a single convolution, which at 480 x 832 in
    float64 takes 8 times as long and 1.9 GB a frame (two CPU cores, torchmetrics 1.9).
    """
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).view(1, 1, 1, -1)

    def blurred(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, weights), weights.transpose(2, 3))

    c1, c2 = (_K1 * RANGE) ** 2, (_K2 * RANGE) ** 2
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))


@functools.lru_cache
def vmaf_missing() -> str | None:
    """Return why there is no VMAF, None if there is."""
    try:
        import imageio_ffmpeg

        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
        filters = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except ImportError:
        return "imageio-ffmpeg is not installed"
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"imageio-ffmpeg has no ffmpeg that runs: {error}"
    return None if " libvmaf " in filters else "the ffmpeg of imageio-ffmpeg has no libvmaf"


def vmaf(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the VMAF of ffmpeg's default model, 0 to 100, mean over frames; about 97 to 100 = equal.

    The model was made for pictures of 1080 lines. Frames whose shorter side has less than 256 pixels are enlarged
    (bicubic) by the least whole factor that brings it there.

    Raises:
        RuntimeError: there is no VMAF, see `vmaf_missing`; or ffmpeg failed.
    """
    reason = vmaf_missing()
    if reason:
        raise RuntimeError(f"vmaf: {reason}")
    import imageio_ffmpeg

    _, _, height, width = video.shape
    factor = -(-_VMAF_SIDE // min(height, width))
    enlarge = f"scale={factor * width}:{factor * height}:flags=bicubic,format=yuv420p"
    # The filter reads its options itself: a bare file name in the folder it runs in needs no quoting.
    graph = f"[0:v]{enlarge}[a];[1:v]{enlarge}[b];[a][b]libvmaf=log_fmt=json:log_path=vmaf.json"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error"]
    with tempfile.TemporaryDirectory() as folder:
        for name, pixels in {"video.raw": video, "reference.raw": reference}.items():
            (Path(folder) / name).write_bytes(pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy().tobytes())
            command += ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-i", name]
        command += ["-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vmaf: ffmpeg failed: {done.stderr.strip()[:300]}")
        content = json.loads((Path(folder) / "vmaf.json").read_text())
    return float(content["pooled_metrics"]["vmaf"]["mean"])


def fidelity(video: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None]:
    """Return "psnr" (dB), "ssim", and "vmaf" or None where there is none."""
    return {
        "psnr": psnr(video, reference),
        "ssim": ssim(video, reference),
        "vmaf": None if vmaf_missing() else vmaf(video, reference),
    }


# ---- intervals -----------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over prompts and seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if all of the interval is above or below 0, otherwise 0."""
        return (self.low > 0) - (self.high < 0)


def bootstrap(values: Mapping[Pair, float], resamples: int = _RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean and its 95 % percentile interval (Efron, Tibshirani: An introduction to the bootstrap, 1993, 13).

    Prompts are drawn with replacement, each with all of its seeds: videos of one prompt are no independent evidence.
    Where all values are equal the interval has no width, however few they are.

    Args:
        values: by (prompt, seed).
        resamples: how often.
        seed: of the drawing, so that the same values always give the same interval.

    Raises:
        ValueError: no values.
    """
    prompts = sorted({prompt for prompt, _ in values})
    if not prompts:
        raise ValueError("values: expected at least one, got none")
    of_prompt = [[value for (prompt, _), value in values.items() if prompt == wanted] for wanted in prompts]
    sums = torch.tensor([sum(group) for group in of_prompt], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in of_prompt], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor((_OUTSIDE / 2, 1 - _OUTSIDE / 2), dtype=torch.float64)).tolist()
    return Interval(float(sums.sum() / counts.sum()), low, high)


def difference(
    values: Mapping[Pair, float], others: Mapping[Pair, float], resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of values - others with its 95 % interval: paired, over the (prompt, seed) that both have."""
    return bootstrap({pair: values[pair] - others[pair] for pair in values if pair in others}, resamples, seed)
