"""Time of `import lite_attention` on top of `import torch`, in fresh processes.

python -m benchmarks.import_time [--processes 11] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lite_attention.cli.arguments import integer, new_file

STATEMENTS = ("import torch", "import torch; import lite_attention")


def seconds_to_run(statement: str) -> float:
    """Return the time that a fresh interpreter, once it is up, takes for a statement."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return float(result.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=integer(1), default=11, help="fresh processes for each statement, in turns")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)

    for statement in STATEMENTS:
        seconds_to_run(statement)  # fills the disk cache and writes the bytecode
    rounds = [[seconds_to_run(statement) for statement in STATEMENTS] for _ in range(args.processes)]
    medians = {
        statement: statistics.median(times)
        for statement, times in zip(STATEMENTS, zip(*rounds, strict=True), strict=True)
    }
    medians["difference"] = statistics.median(both - torch_alone for torch_alone, both in rounds)
    print(f"medians of {args.processes} fresh processes, Python {sys.version.split()[0]}")
    for name, seconds in medians.items():
        print(f"{name:40}{1e3 * seconds:10.1f} ms")
    if args.json:
        args.json.write_text(json.dumps({"processes": args.processes, "seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
