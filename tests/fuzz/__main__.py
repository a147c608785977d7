"""`python -m tests.fuzz --seed 1 --count 300`: try inputs, print what went wrong and counts, and write the counts down."""
import argparse
import datetime
import json
import sys
from pathlib import Path

import explainable_mri

from .judge import KINDS, Verdict
from .run import count_kinds, run

COUNTS = Path(__file__).with_name("counts.json")


def _show(verdict: Verdict) -> None:
    mark = "." if verdict.kind in KINDS[:2] else f"\n{verdict.kind.upper()} [{verdict.door}] {verdict.change}: {verdict.detail}\n{verdict.words}\n"
    print(mark, end="", flush=True)


def _show_all(verdict: Verdict) -> None:
    print(f"{verdict.kind:13} {verdict.seconds:5.1f} s [{verdict.door}] {verdict.change}: {verdict.detail[:200]}\n    {verdict.words[:1500]}", flush=True)


def main() -> int:
    "Run from the command line; the exit code is 1 where something went wrong."
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--door", action="append", help="a door to try, by name; all by default")
    parser.add_argument("--only", type=int, help="number of the one input to try")
    parser.add_argument("--all", action="store_true", help="show every input")
    parser.add_argument("--keep", type=Path, help="folder that keeps the valid inputs for the next run")
    parser.add_argument("--write", action="store_true", help=f"write the counts to {COUNTS.name}")
    options = parser.parse_args()
    verdicts = run(options.seed, options.count, options.door, _show_all if options.all else _show, options.keep and options.keep.resolve(), options.only)
    counts = count_kinds(verdicts)
    print("\n" + " ".join(f"{kind:>13}" for kind in ["", *KINDS]))
    for door, kinds in counts.items():
        print(f"{door:26}" + " ".join(f"{kinds[kind]:13}" for kind in KINDS))
    totals = {kind: sum(kinds[kind] for kinds in counts.values()) for kind in KINDS}
    print(f"{'all':26}" + " ".join(f"{totals[kind]:13}" for kind in KINDS))
    if options.write:
        about = {"seed": options.seed, "inputs": len(verdicts), "date": datetime.date.today().isoformat(), "version": explainable_mri.__version__}
        COUNTS.write_text(json.dumps({**about, "counts": counts}, indent=1) + "\n")
    return int(any(totals[kind] for kind in KINDS[2:]))


if __name__ == "__main__":
    sys.exit(main())
