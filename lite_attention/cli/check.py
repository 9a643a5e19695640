"""The command `check`: what is installed here, which kernel runs, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import subprocess
from typing import Any

import torch

from lite_attention._version import __version__
from lite_attention.cli.arguments import add_device
from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.targets import target_of

__all__ = ["add_parser", "driver", "main"]

_HEAD_DIMS = (64, 128)
_UNKNOWN = "unknown"
_TOLERANCE = 0.02  # of outputs of about 1: bf16 has 8 bits


def add_parser(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "check",
        help="say which kernel runs here, and try it",
        description="Prints versions, the device, and the kernel that bf16 attention runs on; compiles it, and "
        "compares five steps of each method with the CPU kernel. The exit status is 0 if all works. Without a GPU "
        "it is 1, and the last line says what is missing, unless --device says cpu. The output belongs in a bug "
        "report.",
    )
    add_device(parser)
    parser.set_defaults(command=main, device=None)


def main(args: argparse.Namespace) -> int:
    """Print what there is, try it, and return the exit status: 0 if all works."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, value in _about(device).items():
        print(f"{name:20}{value}")
    tries = [(head_dim, method) for head_dim in _HEAD_DIMS for method in METHODS]
    problems = [problem for what in tries if (problem := _problem(*what, device))]
    if device.type == "cpu" and args.device is None:
        problems += [] if problems else ["the CPU kernel works, which --device cpu asks for alone"]
        problems.append(f"no GPU: {_missing()}")
    print("\n".join(problems) or "works")
    return 1 if problems else 0


def _about(device: torch.device) -> dict[str, str]:
    about = {"lite-attention": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "diffusers"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    about["device"] = str(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        about["device"] = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        about["driver"] = f"{driver()}; torch was built for {torch.version.cuda or torch.version.hip}"
    target = target_of(device)
    for head_dim in _HEAD_DIMS:
        tiles = "x".join(map(str, target.tile_shape(head_dim)))
        kernel = "CPU kernel" if not target.kernel else "portable kernel" if target.portable else "kernel of its own"
        about[f"head dim {head_dim}"] = f"{kernel} ({target.name}), tiles {tiles}"
    if target.notice:
        about["note"] = target.notice
    return about


def _missing() -> str:
    """Return what a GPU needs that is not here."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA; install a build for CUDA, see pytorch.org"
    found = driver()
    if found == _UNKNOWN:
        return "there is no driver of NVIDIA, nvidia-smi does not run; install one, or give the container the GPU"
    wanted = torch.version.cuda or torch.version.hip
    return (
        f"torch finds no device, though driver {found} is there; torch was built for {wanted}, which may need a newer "
        "driver, or CUDA_VISIBLE_DEVICES hides the GPU"
    )


def driver() -> str:
    """Return the version of the GPU's driver, or that it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return _UNKNOWN


def _problem(head_dim: int, method: str, device: torch.device) -> str | None:
    """Return why a method does not run with a head dim, or what is wrong with it; None if it works."""
    what = f"head dim {head_dim}, method {method!r},"
    if device.type == "cuda":
        from lite_attention import cute_kernels  # on first use: it may import cutlass

        residual = "fp8" if method == "residual" else ""
        reason = cute_kernels.unsupported_reason(head_dim, head_dim, torch.bfloat16, device, residual=residual)
        if reason is not None:
            return f"{what} does not run: {reason}"
    try:
        off = _try(head_dim, method, device)
    except Exception as error:  # whatever the compiler or the driver has to say
        return f"{what} fails: {type(error).__name__}: {error}"
    return None if off <= _TOLERANCE else f"{what} is off by {off:.3g}, at most {_TOLERANCE} was expected"


def _try(head_dim: int, method: str, device: torch.device) -> float:
    """Return how far five steps are from the CPU kernel's in float32, at most; infinity where a NaN came out."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seq, 2, head_dim).to(device, torch.bfloat16) for seq in (300, 700, 700))
    state, other = (_state(method, q, k, v) for _ in range(2))
    attend: Any = METHODS[method].attend
    off = 0.0
    for _ in range(5):
        out = attend(q, k, v, state)
        want = attend(q.float(), k.float(), v.float(), other, implementation="reference")
        off = max(off, (out - want).abs().nan_to_num(math.inf).max().item())
        other.load_state_dict(state.state_dict())  # votes at the very threshold, and masses of a bin, may differ
    return off


def _state(method: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SiteState:
    if method == "residual":
        return ResidualState.for_inputs(q, k, v, plan=[2, 1, 0, 2, 0], keep=0.5)  # each kind of step
    return SkipState.for_inputs(q, k, threshold=-2.0)
