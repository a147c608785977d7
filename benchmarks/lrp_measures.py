"""What each measure for speed in chapters 46 and 47 gives: time a map with one of them switched off, and with all.

    python benchmarks/lrp_measures.py --networks ../shared/reference/keras_group

Every variant runs in a process of its own, in several rounds, so that a busy moment of the machine hits all alike. The
result, a table, goes to `benchmarks/RESULTS.md`.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import write_section

from explainable_mri.explainers import lrp, lrp_kernels as kernels, lrp_rules as rules
from explainable_mri.models.keras import load_keras

ROOT = Path(__file__).parents[1]
NETWORKS = ("alexnet", "resnet", "densenet")


# ---- how to switch a measure off ---------------------------------------------------------------------------------------


def _transposed_by_pytorch(layer: kernels.FastConvolution, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    x = F.conv_transpose3d(y, kernels._as_fast(weight), None, layer.stride, 0, 0, layer.groups, layer.dilation)
    return kernels.cut(x, [before for before, _ in layer.padding], shape[2:])


def _convolved_by_pytorch(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    return F.conv3d(kernels.fast_layout(x), kernels._as_fast(weight), bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def without_kept_memory() -> None:
    lrp.keep_freed_memory = lambda: False


def without_channels_last() -> None:
    kernels._prefers_channels_last = lambda x: False


def without_onednn_by_name() -> None:
    kernels._convolve = _convolved_by_pytorch


def without_turned_kernels() -> None:
    kernels.FastConvolution.transpose = _transposed_by_pytorch


def without_remainders() -> None:
    convolution, ours = kernels.FastConvolution, kernels.FastConvolution.transpose
    convolution.transpose = lambda self, *a: _transposed_by_pytorch(self, *a) if max(self.stride) > 1 else ours(self, *a)


def without_depths_as_channels() -> None:
    kernels.FastConvolution._transpose_narrow = lambda self, y, weight, rest: kernels._convolve(
        y, kernels._turned_around(weight, 1), None, self.stride, rest, self.dilation, 1)


def without_leaving_out() -> None:
    lrp._region = lambda *_: None


def without_chunks() -> None:
    kernels.chunks = lambda x: [x]


def without_look_at_signs() -> None:
    share = rules.AlphaBeta._share_of_sign

    def both_signs(self, layer, relevance, x, *rest):
        x = x.clone()
        x[(0,) * x.dim()] = min(x[(0,) * x.dim()].item(), -1e-30)  # one negative value, and none may be left out
        return share(self, layer, relevance, x, *rest)

    rules.AlphaBeta._share_of_sign = both_signs


MEASURES: dict[str, Callable[[], None]] = {
    "all measures": lambda: None,
    "freed memory is given back": without_kept_memory,
    "channels in PyTorch's usual order": without_channels_last,
    "oneDNN only where PyTorch chooses it": without_onednn_by_name,
    "transposed convolutions by PyTorch": without_turned_kernels,
    "only those with a stride by PyTorch": without_remainders,
    "no depths as channels": without_depths_as_channels,
    "background worked out too": without_leaving_out,
    "large volumes in one piece": without_chunks,
    "both signs also where inputs have one": without_look_at_signs,
}


# ---- the comparison ------------------------------------------------------------------------------------------------------


def work(measure: str, model: Path, scan: Path, repeats: int) -> list[float]:
    "Seconds of each map after the first."
    MEASURES[measure]()
    explainer = lrp.LRP(load_keras(model), "sequential_preset_a", epsilon=1e-10)
    inputs = torch.from_numpy(np.load(scan)["x"].astype(np.float32))[None, None]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        explainer.attribute(inputs, target=1)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, default=ROOT.parent / "shared" / "reference" / "keras_group",
                        help="folder with alexnet_cv8.hdf5, resnet_cv8.hdf5, densenet_cv8.hdf5 and x.npz")
    parser.add_argument("--repeats", type=int, default=2, help="maps a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all variants")
    for name in ("--worker", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    scan = options.networks / "x.npz"
    if options.worker:
        print(json.dumps(work(options.worker, Path(options.model), scan, options.repeats)))
        return
    if not scan.exists():
        sys.exit(f"There is no {scan}. Name the folder with the group's networks: --networks FOLDER")
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds):
        for measure in MEASURES:
            for network in NETWORKS:
                command = [sys.executable, __file__, "--worker", measure, "--model", options.networks / f"{network}_cv8.hdf5",
                           "--networks", options.networks, "--repeats", options.repeats]
                result = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True,
                                        env={**os.environ, "PYTHONPATH": str(ROOT)})
                seconds.setdefault((measure, network), []).extend(json.loads(result.stdout.splitlines()[-1]))
            print(number + 1, measure, [round(statistics.median(seconds[measure, network]), 2) for network in NETWORKS], flush=True)
    lines = ["| | AlexNet (s) | ÷ all | ResNet (s) | ÷ all | DenseNet (s) | ÷ all |", "|---|---|---|---|---|---|---|"]
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    for measure in MEASURES:
        cells = [f"{middle[measure, network]:.2f} | {middle[measure, network] / middle['all measures', network]:.2f}" for network in NETWORKS]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    write_section("lrp-measures",
                  "## What each measure for speed gives\n\n"
                  f"`python benchmarks/lrp_measures.py`, {datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), PyTorch "
                  f"{torch.__version__}; `lrp.sequential_preset_a` as above. The first row has all measures of chapters 46 and 47; each other row lacks the one "
                  f"that it names. Median of {options.rounds * options.repeats} maps a cell, the first of each process not counted. AlexNet and ResNet have no "
                  "strides, so their ratios in that row show the machine's noise.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
