"""The command `compile-kernels`: kernels ahead of time, on any machine that has the CuTe DSL."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lite_attention.ops.targets import DTYPE_NAMES, TARGETS, target_of

__all__ = ["add_parser", "main"]

_ALL = "all"


def add_parser(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "compile-kernels",
        help="compile the kernels ahead of time; no GPU is needed",
        description="Writes an object file for each kernel, and, where a C compiler and a CUDA 13 toolkit are present, "
        "one library. Set LITE_ATTENTION_KERNELS to the folder where the kernels run: no compiler is needed there. "
        "They need the same sources of this package there, and a folder that nobody else may write to.",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=[target_of("cuda").name],
        choices=[*TARGETS, _ALL],
        help="GPU architectures; that of the GPU here unless given, or sm_90a without one",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    head_dims = sorted({head_dim for target in TARGETS.values() for head_dim in target.head_dims()})
    dtypes = list(DTYPE_NAMES.values())
    parser.add_argument(
        "--head-dims", type=int, nargs="+", default=head_dims, choices=head_dims, help="all unless given"
    )
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="all unless given")
    parser.add_argument("--all-variants", action="store_true", help="also those for initial masks and must_do ranges")
    parser.add_argument(
        "--wheel",
        action="store_true",
        help="also write a wheel of the library; where it is installed, it is found without a variable",
    )
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    """Compile what the command line asks for, and return the exit status."""
    from lite_attention.cute_kernels.aot import compile_library, kernel_configs
    from lite_attention.cute_kernels.wheel import write_wheel

    targets = list(TARGETS.values()) if _ALL in args.arch else [TARGETS[name] for name in args.arch]
    configs = kernel_configs(args.head_dims, args.dtypes, all_variants=args.all_variants, targets=targets)
    library = compile_library(configs, args.out)
    print(f"{len(configs)} kernels in {args.out}")
    if library is None:
        print("not linked: that needs cc, a CUDA 13 toolkit (CUDA_HOME) and the cu13 flavor of the CuTe DSL")
    else:
        print(f"library: {library}; where it runs, set LITE_ATTENTION_KERNELS={args.out}")
    if not args.wheel:
        return 0
    if library is None:
        raise ValueError("--wheel: expected a library to put into it, got none")
    print(f"wheel: {write_wheel(library, args.out)}; where it is installed, nothing needs to be set")
    return 0
