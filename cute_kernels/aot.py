"""Compiling kernels ahead of time: objects, and one library that needs no compiler where it runs."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from lite_attention.cute_kernels.cache import LIBRARY_LABEL, LIBRARY_NAME, publish
from lite_attention.cute_kernels.config import (
    DTYPES,
    KEY_CHUNK,
    RESIDUAL_DTYPES,
    VALUE_BLOCK,
    ChoiceConfig,
    Config,
    KernelConfig,
    QuantizeConfig,
)
from lite_attention.cute_kernels.files import check_owner, whole
from lite_attention.cute_kernels.fingerprint import kernels_of
from lite_attention.ops.quantization import NONE, QUANTIZATIONS, Quantization
from lite_attention.ops.quantize import QUERY_ROWS
from lite_attention.ops.targets import SM90A, Target

__all__ = ["compile_library", "kernel_configs"]


def kernel_configs(
    head_dims: Iterable[int] | None = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    *,
    all_variants: bool = False,
    targets: Iterable[Target] = (SM90A,),
) -> list[Config]:
    """Return the kernels worth having, or all variants: with and without state, residual, key mask and quantization.

    Args:
        head_dims: of the tables in `lite_attention.ops.targets`; None = all.
        dtypes: "bf16" and "fp16".
        all_variants: also initial masks and must_do ranges, in all combinations, and residuals in bf16.
        targets: what to compile for, by default Hopper.
    """
    configs: list[Config] = []
    for target, dtype, quantization in itertools.product(targets, dtypes, QUANTIZATIONS.values()):
        for head_dim in target.head_dims(quantization.name):
            if head_dims is None or head_dim in head_dims:
                configs += _quantizers(target, dtype, quantization, head_dim)
                configs += _attention(target, dtype, quantization, head_dim, all_variants)
        configs += _choice(target, all_variants)
    return list(dict.fromkeys(configs))  # quantizations share some


def _attention(
    target: Target, dtype: str, quantization: Quantization, head_dim: int, all_variants: bool
) -> Iterator[Config]:
    """What attends, without a state only where nothing is quantized."""
    config = KernelConfig(
        dtype, head_dim, *target.tile_shape(head_dim, quantization.name), quantization=quantization, target=target
    )
    flags = (False, True)
    extras = [(i, d) for i in flags for d in flags] if all_variants else [(False, False)]
    for key_mask in flags:
        if quantization == NONE:
            yield replace(config, skip=False, key_mask=key_mask)
        for initial_mask, must_do in extras:
            votes = replace(config, initial_mask=initial_mask, must_do=must_do, key_mask=key_mask)
            yield votes
            for residual in RESIDUAL_DTYPES if all_variants else ("fp8",):
                yield replace(votes, residual=residual)


def _choice(target: Target, all_variants: bool) -> Iterator[Config]:
    """What chooses the tiles that stay."""
    yield ChoiceConfig("choose_tiles", target=target)
    for must_do in (False, True) if all_variants else (False,):
        yield ChoiceConfig("count_masses", must_do, target)


def _quantizers(target: Target, dtype: str, quantization: Quantization, head_dim: int) -> Iterator[Config]:
    """What makes queries, keys and values ready for it."""
    _, tile_n = target.tile_shape(head_dim, quantization.name)
    needed = []
    if quantization.scores is not None:
        yield QuantizeConfig("quantize_query", dtype, head_dim, QUERY_ROWS, target=target)
        needed += [("key_sums", KEY_CHUNK), ("quantize_key", tile_n)]
    if quantization.values is not None:
        needed += [("value_max", KEY_CHUNK), ("quantize_value", VALUE_BLOCK)]
    for (op, rows), key_mask in itertools.product(needed, (False, True)):
        yield QuantizeConfig(op, dtype, head_dim, rows, key_mask, target)


def compile_library(configs: Sequence[Config], out: pathlib.Path) -> pathlib.Path | None:
    """Compile kernels into a folder, and link them where a C compiler and a CUDA toolkit are present.

    Args:
        configs: what to compile; a GPU is not needed. One library may hold kernels for several architectures.
        out: the folder, made if it is not there.

    Returns:
        The library, or None if only the objects could be made.

    Raises:
        ImportError: the CuTe DSL is not installed.
        PermissionError: others may write to the folder, from which no library would be loaded.
    """
    try:
        from lite_attention.cute_kernels.build import compile_kernel
    except ImportError as error:
        raise ImportError(f"the CuTe DSL is not installed ({error}): pip install 'lite-attention[cu13]'") from error
    out.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_owner(out, "folder of kernels", "give --out another, or take others' leave to write to it", or_root=True)
    objects = []
    progress = tqdm(configs, desc="compiling", unit="kernel")  # on stderr
    for config in progress:
        progress.set_postfix_str(config.name)
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
    with tempfile.TemporaryDirectory() as folder, whole(library) as temporary:
        stub, label = pathlib.Path(folder) / "stub.o", pathlib.Path(folder) / "label.c"
        source = pathlib.Path(__file__).with_name("cutedsl_stub.c")
        subprocess.run([compiler, "-O2", "-fPIC", "-c", source, "-o", stub], check=True)
        label.write_text(f'const char lite_attention_kernels_of[] = "{LIBRARY_LABEL}{kernels_of()}";\n')
        libraries: list[str | pathlib.Path] = ["-L", toolkit, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        libraries += ["-L", site / "tvm_ffi" / "lib", "-ltvm_ffi", "-Wl,-z,defs,--strip-all"]
        command: list[str | pathlib.Path] = [compiler, "-shared", "-fPIC", "-o", temporary, *objects, stub, label]
        subprocess.run([*command, runtime, *libraries], check=True)
        os.chmod(temporary, 0o755)
    return library
