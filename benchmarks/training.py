"""Measure a step and an epoch of the published CNN and of a ResNet beside Keras, in alternating rounds.

python benchmarks/training.py [--networks dyrba2021 resnet] [--rounds 5] [--steps 3] [--epoch 100] [--threads 2] [--without resnet:bfloat16] [--no-write]

All workers stay alive and take turns, one measured while the others wait, so that a busy machine slows all alike; what counts is the
fastest step of each, and the ratio to Keras's fastest. Batches of 20 scans of 100 × 120 × 100 voxels, Adam, dropout and L2 as published.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from lrp import make_environments
from results import write_section

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("training_worker.py")
PEERS = {"Keras, float32": ("keras", "float32"), "plain PyTorch": ("ours", "plain"), "float32": ("ours", "float32"), "bfloat16": ("ours", "bfloat16")}


class Peer:
    "A worker process that is asked for timings."

    def __init__(self, python: Path | str, kind: str, network: str, precision: str, threads: int):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen([str(python), str(WORKER), kind, network, precision, str(threads)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        self.answer()

    def answer(self):
        "The worker's next line of JSON, whatever libraries print in between."
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def ask(self, question: str) -> list[float]:
        "Seconds of what is asked for, such as `step 3`."
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()


def compare(network: str, python: Path, rounds: int, steps: int, epoch: int, threads: int, without: list[str]) -> list[dict]:
    "Rows of the table for a network."
    peers = {name: Peer(python if kind == "keras" else sys.executable, kind, network, precision, threads)
             for name, (kind, precision) in PEERS.items() if f"{network}:{name}" not in without}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    epochs: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds):
        for name, peer in peers.items():
            seconds[name] += peer.ask(f"step {steps}")
        print(f"{network}, round {number + 1}: " + ", ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items()), flush=True)
    if epoch:
        for name, peer in peers.items():
            epochs[name] += peer.ask(f"epoch {epoch}")
    for peer in peers.values():
        peer.process.stdin.close()
        peer.process.wait()
    fastest = min(seconds["Keras, float32"])
    return [{"network": network, "who": name, "fastest": min(values), "median": float(np.median(values)), "ratio": min(values) / fastest,
             "epoch": f"{min(epochs[name]):.1f} s" if epochs[name] else "not measured"} for name, values in seconds.items()]


def bfloat16_instructions() -> str:
    "Whether this CPU computes in bfloat16 or emulates it."
    flags = Path("/proc/cpuinfo").read_text().split()
    has = {"avx512_bf16", "amx_bf16"} & set(flags)
    return "This CPU computes in bfloat16 (" + ", ".join(sorted(has)) + ")." if has else \
        "This CPU has no bfloat16 instructions: PyTorch emulates them, so the row of bfloat16 says nothing of a CPU that has them."


def table(rows: list[dict], arguments: argparse.Namespace) -> str:
    "The section of RESULTS.md for a network."
    epoch = f"; an epoch: {arguments.epoch} scans" if arguments.epoch else ""
    lines = [f"## Training: {rows[0]['network']}", "",
             f"A step on {arguments.threads} threads: 20 scans of 100 × 120 × 100 voxels; {arguments.rounds} rounds of {arguments.steps} "
             f"steps in turn{epoch}. `python benchmarks/training.py` makes this table. "
             f"Load of the machine while it was made: {os.getloadavg()[1]:.1f}. {bfloat16_instructions()}"
             + "".join(f" {name} was left out." for name in arguments.without), "",
             "| network | who | fastest step | median | of Keras's fastest | epoch |", "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {row['network']} | {row['who']} | {row['fastest']:.2f} s | {row['median']:.2f} s | {row['ratio']:.2f} | {row['epoch']} |"
              for row in rows]
    return "\n".join(lines)


def main() -> None:
    "Measure and write down."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["dyrba2021", "resnet"])
    for name, default in (("rounds", 5), ("steps", 3), ("epoch", 100), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--without", nargs="*", default=[], metavar="NETWORK:WHO", help="leave a row out, such as resnet:bfloat16")
    parser.add_argument("--no-write", action="store_true", help="print the table without changing RESULTS.md")
    arguments = parser.parse_args()
    python = make_environments()
    for network in arguments.networks:
        rows = compare(network, python, arguments.rounds, arguments.steps, arguments.epoch, arguments.threads, arguments.without)
        text = table(rows, arguments)
        print(text)
        if not arguments.no_write:
            write_section(f"training-{network}", text)


if __name__ == "__main__":
    main()
