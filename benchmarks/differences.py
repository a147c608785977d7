"""Measure how much each difference between implementations of LRP changes the maps of the group's networks.

    python benchmarks/differences.py --networks ../shared/reference/keras_group

The baseline is iNNvestigate's `lrp.sequential_preset_a`, ε = 1e-10, class 1. Then one definition at a time is replaced, then all of
them; then come the maps of Captum and of Zennit themselves, each with that of our rules set to theirs. Chapter 52 explains the
changes and draws what this script writes: `benchmarks/differences.csv`, a section of `benchmarks/RESULTS.md`, and
`nbs/images/why_maps_differ.png`.
"""
import argparse
import copy
import datetime
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from lrp import EPSILON, FOLDER, NETWORKS, ROOT, TARGET, captum_maps, zennit_maps
from PIL import Image
from results import write_section
from torch import nn

from explainable_mri.analysis.regions import merge_regions, region_table, without_side
from explainable_mri.data.atlases import load_atlas
from explainable_mri.data.volumes import get_grid
from explainable_mri.explainers.lrp_peers import captum_composite, changed_composites, compare_maps, zennit_composite
from explainable_mri.explainers.lrp_canonizers import batch_norm_surrogate
from explainable_mri.explainers.lrp import LRP
from explainable_mri.models.keras import KerasNetwork, load_keras

TITLES = {"alexnet": "AlexNet", "resnet": "ResNet", "densenet": "DenseNet"}
BASELINE, STANDARD = "iNNvestigate's definition", "all: the standard convention"
CAPTUM, ZENNIT, MERGED, OURS = "Captum", "Zennit", "Zennit, batch norm merged", ", by our rules"
EXACT = "Zennit, batch norm merged exactly"
CORONAL = -21  # mm, through the hippocampi


def install_zennit() -> None:
    "Put Zennit where `lrp.zennit_maps` looks for it."
    if not (FOLDER / "zennit").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER / "zennit"),
                        "zennit==0.5.1"], check=True)


def merged_zennit_maps(network: KerasNetwork) -> Callable:
    "Zennit with the canonizer that merges batch normalisation into the convolution before it."
    zennit_maps(network)  # makes Zennit importable
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus

    def attribute(inputs: torch.Tensor) -> torch.Tensor:
        with Gradient(network, EpsilonPlus(epsilon=EPSILON, canonizers=[SequentialMergeBatchNorm()])) as attributor:
            logits = network(inputs).detach()
            return attributor(inputs, torch.eye(logits.shape[1])[[TARGET]] * logits)[1]

    return attribute


def move_epsilon(network: KerasNetwork) -> KerasNetwork:
    "The same network with ε as part of the variance: Zennit's canonizer leaves ε behind in the layer that it has merged."
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_var += module.eps
            module.eps = 0.0
    return network


def all_maps(network: KerasNetwork, inputs: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    "Name and map of each definition, beginning with the baseline."
    def explain(composite) -> torch.Tensor:
        return LRP(network, composite).attribute(inputs, TARGET)

    def ask(peer: Callable) -> torch.Tensor:
        return peer(network)(inputs.clone().requires_grad_()).detach()

    baseline = LRP(network, "sequential_preset_a", epsilon=EPSILON).attribute(inputs, TARGET)
    yield BASELINE, baseline
    with torch.no_grad():
        logits = network(inputs)[0]
    # Relevance is proportional to what it starts from.
    yield "start: from the probability", baseline * (logits.softmax(0) / logits)[TARGET]
    for name, composite in changed_composites(EPSILON).items():
        yield name, explain(composite)
    yield CAPTUM, ask(captum_maps)
    yield CAPTUM + OURS, explain(captum_composite(EPSILON))
    yield ZENNIT, ask(zennit_maps)
    yield ZENNIT + OURS, explain(zennit_composite(EPSILON))
    yield MERGED, ask(merged_zennit_maps)
    yield MERGED + OURS, explain(replace(zennit_composite(EPSILON), fold=True))
    yield EXACT, merged_zennit_maps(move_epsilon(network))(inputs.clone().requires_grad_()).detach()


def region_shares(relevance: torch.Tensor, grid_name: str) -> pd.Series:
    "The share of all relevance, as magnitude, that lies in each region of the AAL atlas."
    grid = get_grid(grid_name)
    table = merge_regions(region_table(relevance[0, 0].numpy(), load_atlas("aal", grid), grid, sort=None), without_side)
    magnitude = table.set_index("region").eval("positive - negative")
    return magnitude / relevance.double().abs().sum().item()


def measure(name: str, folder: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    "The rows of one network, and the maps that the figure shows."
    network = load_keras(folder / f"{name}_cv8.hdf5", axes="rostock")
    source = torch.from_numpy(np.load(folder / "x.npz")["x"].astype(np.float32))[None, None]
    inputs = network.axes.to_grid(source)
    with np.load(folder / f"{name}_cv8.npz") as file:
        expected = torch.from_numpy(file[f"lrp.sequential_preset_a|{TARGET}"])
    rows, shown = [], {"scan": inputs[0, 0].numpy()}
    for change, relevance in all_maps(network, inputs):
        shares = region_shares(relevance, network.grid)
        if not rows:
            baseline, baseline_shares = relevance, shares
            sampled = network.axes.to_network(relevance)[0, 0, ::4, ::4, ::4]
            print(f"  baseline against iNNvestigate 2.1.2: {compare_maps(sampled, expected)['difference']:.1e}", flush=True)
            with torch.no_grad():
                logit = network(inputs)[0, TARGET].item()
        moved = shares - baseline_shares
        row = {"network": TITLES[name], "change": change, **compare_maps(relevance, baseline),
               "sum over logit": relevance.double().sum().item() / logit,
               "hippocampus": shares["Hippocampus"], "share moved": moved.abs().sum() / 2,
               "region": moved.abs().idxmax(), "region change": moved[moved.abs().idxmax()],
               "from peer": np.nan}
        if change == BASELINE:
            row |= {"region": "", "from peer": compare_maps(sampled, expected)["difference"]}
        if change.endswith(OURS) or change == EXACT:
            row["from peer"] = compare_maps(relevance, last)["difference"]
        print("  " + "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()),
              flush=True)
        rows.append(row)
        last = relevance
        if change in (BASELINE, STANDARD, CAPTUM):
            shown[change] = relevance[0, 0].numpy()
    return rows, shown


def count_channels(name: str, folder: Path) -> str:
    "How many channels of batch normalisation show the surrogate's weights, in words."
    layers = [module for module in load_keras(folder / f"{name}_cv8.hdf5").modules() if isinstance(module, nn.BatchNorm3d)]
    surrogates = [batch_norm_surrogate(layer) for layer in layers]
    gamma = torch.cat([layer.weight for layer in layers])
    opposite = torch.cat([surrogate.weight * surrogate.bias for surrogate in surrogates]) < 0
    return (f"{TITLES[name]}: {len(layers)} layers, {len(gamma)} channels, {(gamma < 0).sum()} with negative γ, "
            f"{opposite.float().mean():.0%} with a bias of the other sign than the weight")


def draw(maps: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    "One coronal slice of each network's maps by three definitions, over the scan, left is left."
    grid = get_grid("clinica_1mm")
    index = round((np.linalg.inv(grid.cropped_affine) @ [0, CORONAL, 0, 1])[1])
    columns = {BASELINE: BASELINE, STANDARD: "the literature’s (“standard”)",
               CAPTUM: f"Captum {version('captum')}"}
    figure, axes = plt.subplots(len(maps), len(columns), figsize=(8.4, 7.9), dpi=72, layout="constrained")
    for row, (name, shown) in zip(axes, maps.items()):
        scan = shown["scan"][:, index].T
        down, across = (np.flatnonzero((scan > 0.1).any(axis)) for axis in (1, 0))
        brain = slice(down[0] - 4, down[-1] + 5), slice(across[0] - 4, across[-1] + 5)
        scan = scan[brain]
        for ax, key in zip(row, columns):
            plane = shown[key][:, index].T[brain]
            limit = np.quantile(np.abs(plane[plane != 0]), 0.995)
            ax.imshow(scan, cmap="gray_r", origin="lower", vmax=2.5)
            strength = np.clip(np.abs(plane) / limit, 0, 1)
            ax.imshow(plane, cmap="RdBu_r", origin="lower", vmin=-limit, vmax=limit, alpha=strength ** 0.6)
            ax.set(xticks=[], yticks=[])
            ax.text(0.02, 0.02, "L", transform=ax.transAxes)
            ax.text(0.98, 0.02, "R", transform=ax.transAxes, ha="right")
        row[0].set_ylabel(TITLES[name])
    for ax, title in zip(axes[0], columns.values()):
        ax.set_title(title)
    with BytesIO() as buffer:
        figure.savefig(buffer)
        Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def table(rows: pd.DataFrame) -> str:
    "The rows as Markdown."
    lines = ["| network | change | relative L2 difference | correlation | sum ÷ logit | hippocampus's share | share moved "
             "| largest change of a region | from the peer |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows.to_dict("records"):
        region = f"{row['region']} {row['region change']:+.1%}" if row["region"] else "–"
        peer = "–" if np.isnan(row["from peer"]) else f"{row['from peer']:.1e}"
        lines.append(f"| {row['network']} | {row['change']} | {row['difference']:.2g} | {row['correlation']:.3f} | "
                     f"{row['sum over logit']:.2f} | {row['hippocampus']:.2%} | {row['share moved']:.1%} | {region} | {peer} |")
    return "\n".join(lines)


def write_results(text: str, notes: str) -> None:
    "Replace this benchmark's section of RESULTS.md."
    write_section(
        "differences",
        f"## What each difference changes\n\n`python benchmarks/differences.py`, {datetime.date.today()}; the group's three networks "
        f"on their reference scan (179×169×208), class {TARGET}. Baseline: `lrp.sequential_preset_a`, ε = {EPSILON}, as iNNvestigate "
        "defines it. Each row replaces one definition, `all` every one; difference and correlation are to the baseline, over voxels. "
        "Shares are of the sum of magnitudes in a region of the AAL atlas, both sides; *share moved* is half the sum of their changes. "
        "*From the peer* is the relative L2 difference between our map and the peer's own: iNNvestigate 2.1.2 (its reference map, every "
        f"fourth voxel) for the baseline, Captum {version('captum')} and Zennit 0.5.1, the rows before, for our rules set to theirs; "
        "*merged exactly*, with ε moved into the variance first, is compared with our rules in the row before. "
        f"PyTorch {torch.__version__}.\n\n{text}\n\n{notes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, default=ROOT.parent / "shared" / "reference" / "keras_group",
                        help="folder with alexnet_cv8.hdf5, resnet_cv8.hdf5, densenet_cv8.hdf5, their .npz and x.npz")
    folder = parser.parse_args().networks
    if not (folder / "x.npz").exists():
        sys.exit(f"There is no {folder / 'x.npz'}. Name the folder with the group's networks: --networks FOLDER")
    install_zennit()
    rows, maps = [], {}
    for name in NETWORKS:
        print(TITLES[name], flush=True)
        more, maps[name] = measure(name, folder)
        rows += more
    rows = pd.DataFrame(rows)
    rows.to_csv(Path(__file__).with_name("differences.csv"), index=False, float_format="%.6g")
    text = table(rows)
    print(text)
    scan = np.load(folder / "x.npz")["x"]
    notes = (f"Batch normalisation. {'; '.join(count_channels(name, folder) for name in NETWORKS)}. Of the scan's voxels that are not 0, "
             f"{(scan == 1).sum() / (scan != 0).sum():.1%} are exactly 1.")
    print(notes)
    write_results(text, notes)
    draw(maps, ROOT / "nbs" / "images" / "why_maps_differ.png")


if __name__ == "__main__":
    main()
