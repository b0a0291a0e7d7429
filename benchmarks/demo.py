"""The demo as a measurement: accuracy before and after, seconds, peak memory, on this machine.

    python benchmarks/demo.py [FOLDER]     runs `qtune demo` in a process of its own; writes results/demo.json
Fetching is not timed apart: the model and the task lie in FOLDER (default: demo) after the first run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from results import machine, write

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default="demo", help="where the demo lies or goes (default: demo)")
    folder = parser.parse_args().folder
    start = time.perf_counter()
    command = [sys.executable, "-m", "qtune", "demo", "--out", folder, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    write(
        RESULTS,
        {
            "command": "python benchmarks/demo.py",
            **machine(),
            "total_seconds": seconds,
            "peak_bytes": peak,
            **json.loads(done.stdout),
        },
    )


if __name__ == "__main__":
    main()
