"""Time until a kernel can be launched: compiled cold, loaded from the cache folder, and found in memory.

    python -m benchmarks.compile_time [--head-dims 64 128] [--dtypes bf16] [--json FILE]

Needs the CuTe DSL (`pip install "lite_attention[cu13]"`), but no GPU. Each kernel gets two fresh processes and a cache
folder of its own: the first one compiles it and writes it there, the second one loads it. What they import first
(torch, the DSL) is timed apart.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lite_attention.cli.arguments import new_file
from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import Config
from lite_attention.ops.targets import SM90A

LOOKUPS = 10_000


def ready(config: Config, compiling: bool) -> dict[str, float]:
    """Return the seconds that a fresh process needs for a kernel; run in one by `fresh_process`."""
    start = time.perf_counter()
    if compiling:
        import lite_attention.cute_kernels.build  # noqa: F401
    else:
        import cutlass.cute.runtime  # noqa: F401
    imported = time.perf_counter()
    from lite_attention.cute_kernels.cache import get_kernel

    get_kernel(config)
    first = time.perf_counter()
    for _ in range(LOOKUPS):
        get_kernel(config)
    found = time.perf_counter()
    if not compiling and "lite_attention.cute_kernels.build" in sys.modules:
        raise RuntimeError("the kernel was compiled again, not loaded")
    return {"import": imported - start, "first": first - imported, "again": (found - first) / LOOKUPS}


def fresh_process(config: Config, compiling: bool, cache: str) -> dict[str, float]:
    # A library of ready-made kernels would be asked first.
    environment = {**os.environ, "LITE_ATTENTION_CACHE": cache, "LITE_ATTENTION_KERNELS": ""}
    job = json.dumps({"kernel": config.name, "compiling": compiling})
    command = [sys.executable, "-m", "benchmarks.compile_time", "--job", job]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["no message"])[-1])
    seconds: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return seconds


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def about() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi")}
    return {
        "device": device(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(), **versions, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    head_dims = SM90A.head_dims()
    parser.add_argument(
        "--head-dims", type=int, nargs="+", choices=head_dims, default=head_dims, help="all unless given"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16"), default=["bf16"], help="bf16 unless given")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.job:
        job = json.loads(args.job)
        configs = {config.name: config for config in kernel_configs()}
        print(json.dumps(ready(configs[job["kernel"]], job["compiling"])))
        return

    where = about()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'':56}{'compile, s':>11}{'load, ms':>10}{'in memory, us':>15}")
    rows: list[dict[str, Any]] = []
    for config in kernel_configs(args.head_dims, args.dtypes):
        with tempfile.TemporaryDirectory() as cache:
            try:
                cold, warm = (fresh_process(config, compiling, cache) for compiling in (True, False))
            except RuntimeError as error:
                print(f"  ({config.name}: left out, {error})", flush=True)
                continue
        times = f"{cold['first']:11.2f}{1e3 * warm['first']:10.1f}{1e6 * warm['again']:15.2f}"
        print(f"{config.name:56}{times}", flush=True)
        rows.append({"name": config.name, "cold": cold, "warm": warm})
    if rows:
        imports = [statistics.median(row[kind]["import"] for row in rows) for kind in ("cold", "warm")]
        print(f"imports before that, medians: to compile {imports[0]:.2f} s, to load {imports[1]:.2f} s")
    if args.json:
        args.json.write_text(json.dumps({**where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
