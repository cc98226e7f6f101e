"""How long a step takes on H100s, estimated on paper: `unift.commands.doctor.throughput` with assumptions of one's own.

    python benchmarks/estimate.py                                     # the table of docs/cluster.md
    python benchmarks/estimate.py --completion 1024 --disk 5e9        # every completion at the limit, a faster disk
    python benchmarks/estimate.py --shares                            # best number of GPUs for the server

Nothing here is measured. An assumption that is given replaces all three of low, middle and high.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from unift.commands.doctor.sizes import MODELS
from unift.commands.doctor.throughput import HIGH, LOW, Batch, Machine, best_share, step, table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {**asdict(Machine()), **asdict(Batch())}
    for name, value in defaults.items():
        kind = argparse.BooleanOptionalAction if isinstance(value, bool) else "store"
        more = {} if isinstance(value, bool) else {"type": type(value), "metavar": type(value).__name__}
        parser.add_argument(f"--{name.replace('_', '-')}", action=kind, help=f"default {value}", **more)
    parser.add_argument("--shares", action="store_true", help="the share of the server with which a step is shortest")
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    shares = given.pop("shares")
    batch = replace(Batch(), **{k: v for k, v in given.items() if k in asdict(Batch())})
    of_machine = {k: v for k, v in given.items() if k in asdict(Machine())}
    low, middle, high = (replace(m, **of_machine) for m in (LOW, Machine(), HIGH))
    if not shares:
        print("Estimate, nothing measured:\n")
        print(table(batch, (low, middle, high)))
        return
    for name, shapes in MODELS.items():
        for gpus in (8, 64):
            n = best_share(shapes, batch, middle, gpus)
            print(
                f"{name}: {n} of {gpus} for the server, a step {step(shapes, batch, middle, gpus, n).seconds:.0f} s (estimate)"
            )


if __name__ == "__main__":
    main()
