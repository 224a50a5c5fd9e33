"""Measures everything, then writes every table and draws every figure from it: one command.

    python bench/all.py                    on a GPU; writes bench/results/<gpu>.json, <gpu>-high.json, <gpu>-grid.json
    python bench/all.py --from-recorded    without one: tables and figures from what is there

Measuring is bench/measure.py at 'highest' (all of it) and at 'high' (times, hard data, energy), and bench/grid.py: some
seven minutes on an H200.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tables import companion, results_path


def main(argv=None):
    """Exit status 0, or 1 where a command failed; the commands after it run all the same."""
    parser = argparse.ArgumentParser(prog="bench/all.py", description=__doc__.splitlines()[0])
    parser.add_argument("--from-recorded", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default bench/results/<gpu>.json")
    arguments = parser.parse_args(argv)
    results, commands = arguments.results or results_path(), []
    if not arguments.from_recorded:
        import torch  # only here: tables and figures do without

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no CUDA device here; --from-recorded works without one")
        results = arguments.results or results_path(torch.cuda.get_device_name())
        high = "--precision", "high", "--sections", "time,slow-data,energy"
        commands = [
            ["measure.py", "--output", results],
            ["measure.py", "--output", companion(results, "high"), *high],
            ["grid.py", "--output", companion(results, "grid")],
        ]
    commands += [[script, "--results", results] for script in ("tables.py", "figures.py")]
    failed = []
    for number, (script, *options) in enumerate(commands, 1):
        print(f"\n== {number}/{len(commands)}: bench/{script} {' '.join(map(str, options))}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name(script), *options]).returncode:
            failed.append(script)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
