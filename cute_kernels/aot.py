"""Compiling kernels ahead of time: objects, and one library that needs no compiler where it runs."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence

from lite_attention.cute_kernels.cache import LIBRARY_NAME, publish
from lite_attention.cute_kernels.config import KEY_CHUNK, VALUE_BLOCK, Config, KernelConfig, QuantizeConfig
from lite_attention.ops.quantize import QUERY_ROWS
from lite_attention.ops.tiles import HOPPER_HEAD_DIMS, QUANTIZATIONS, tile_shape

__all__ = ["compile_library", "kernel_configs"]


def kernel_configs(
    head_dims: Iterable[int] = HOPPER_HEAD_DIMS, dtypes: Iterable[str] = ("bf16", "fp16"), *, all_variants: bool = False
) -> list[Config]:
    """Return the kernels worth having, or all variants: with and without state, key mask and quantization.

    Args:
        head_dims: of the table in `lite_attention.ops.tiles`.
        dtypes: "bf16" and "fp16".
        all_variants: also initial masks and must_do ranges, in all combinations.
    """
    flags = (False, True)
    extras = [(i, d) for i in flags for d in flags] if all_variants else [(False, False)]
    configs: list[Config] = []
    for head_dim, dtype, quantization in itertools.product(head_dims, dtypes, QUANTIZATIONS):
        try:
            tile_m, tile_n = tile_shape(head_dim, None, "cuda", quantization)
        except ValueError:  # not for this head dim
            continue
        sizes = (dtype, head_dim, tile_m, tile_n)
        if quantization != "none":
            configs.append(QuantizeConfig("quantize_query", dtype, head_dim, QUERY_ROWS))
        for key_mask in flags:
            if quantization == "none":
                configs.append(KernelConfig(*sizes, skip=False, key_mask=key_mask))
            else:
                configs.append(QuantizeConfig("key_sums", dtype, head_dim, KEY_CHUNK, key_mask))
                configs.append(QuantizeConfig("quantize_key", dtype, head_dim, tile_n, key_mask))
            if quantization == "int8_fp8":
                configs.append(QuantizeConfig("value_max", dtype, head_dim, KEY_CHUNK, key_mask))
                configs.append(QuantizeConfig("quantize_value", dtype, head_dim, VALUE_BLOCK, key_mask))
            for initial_mask, must_do in extras:
                configs.append(
                    KernelConfig(
                        *sizes, initial_mask=initial_mask, must_do=must_do, key_mask=key_mask, quantization=quantization
                    )
                )
    return list(dict.fromkeys(configs))  # quantizations share some


def compile_library(configs: Sequence[Config], out: pathlib.Path, *, arch: str = "sm_90a") -> pathlib.Path | None:
    """Compile kernels into a folder, and link them where a C compiler and a CUDA toolkit are present.

    Args:
        configs: what to compile; a GPU is not needed.
        out: the folder, made if it is not there.
        arch: "sm_90a" is the only one.

    Returns:
        The library, or None if only the objects could be made.

    Raises:
        ValueError: another architecture.
        ImportError: the CuTe DSL is not installed.
    """
    if arch != "sm_90a":
        raise ValueError(f"arch: expected 'sm_90a', got {arch!r}")
    try:
        from lite_attention.cute_kernels.build import compile_kernel
    except ImportError as error:
        raise ImportError(f"the CuTe DSL is not installed ({error}): pip install 'lite-attention[cu13]'") from error
    out.mkdir(parents=True, exist_ok=True)
    objects = []
    for config in configs:
        path = out / f"{config.name}.o"
        publish(compile_kernel(config), path, config)
        objects.append(path)
    return _link(objects, out / LIBRARY_NAME)


def _link(objects: Sequence[pathlib.Path], library: pathlib.Path) -> pathlib.Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    toolkit = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"
    site = pathlib.Path(sysconfig.get_paths()["platlib"])
    runtime = site / "nvidia_cutlass_dsl" / "cu13" / "lib" / "libcuda_dialect_runtime_static.a"
    if compiler is None or not (toolkit / "libcudart_static.a").is_file() or not runtime.is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        stub = pathlib.Path(folder) / "stub.o"
        source = pathlib.Path(__file__).with_name("cutedsl_stub.c")
        subprocess.run([compiler, "-O2", "-fPIC", "-c", source, "-o", stub], check=True)
        libraries: list[str | pathlib.Path] = ["-L", toolkit, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        libraries += ["-L", site / "tvm_ffi" / "lib", "-ltvm_ffi", "-Wl,-z,defs,--strip-all"]
        command: list[str | pathlib.Path] = [compiler, "-shared", "-o", library, *objects, stub, runtime, *libraries]
        subprocess.run(command, check=True)
    return library
