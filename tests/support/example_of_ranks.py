"""An example for several GPUs, run by processes of a CPU."""

from __future__ import annotations

import functools
import os
import runpy
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import lite_attention

__all__ = ["run_example", "run_program"]


def run_example(example: str, folder: str, arguments: list[str]) -> Any:
    """Run an example in a folder, in a rank of a group that is there; return the video that it made."""
    os.chdir(folder)
    small = functools.partial(lite_attention.enable, compile=False, tile_shape=(16, 16))
    with (
        mock.patch.object(sys, "argv", [example, *arguments]),
        mock.patch.object(lite_attention, "enable", small),
        mock.patch.object(torch.accelerator, "device_count", return_value=1),  # diffusers divides by it
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        return runpy.run_path(example, run_name="__main__")["video"]


def run_program(code: str) -> tuple[int, ...]:
    """Run a program of a page in a rank of a group that is there; return the shape of its output."""
    names: dict[str, Any] = {}
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        exec(code, names)
    return tuple(names["out"].shape)
