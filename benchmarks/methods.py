"""Methods that see many changed scans against Captum's own loop: python benchmarks/methods.py [--rounds 3]

The group's CNN on a scan of 100×120×100 voxels. Captum alone sees one changed scan at a time, as its defaults are, over tensors of the scan; ours are the
explainers of the registry with their defaults. Both take turns in one process, and their maps are compared where nothing is drawn at random."""
import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable

import captum
import torch
from captum import attr
from results import write_section

from explainable_mri.data.atlases import load_atlas, load_template
from explainable_mri.data.volumes import get_grid
from explainable_mri.explainers.base import build_explainer, network_logits
from explainable_mri.models.networks import dyrba2021

STEPS, SAMPLES, SETS, RADIUS, STEP = 16, 16, 130, 10, 20


def pairs(network: torch.nn.Module, scan: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[Callable, Callable, bool]]:
    "Captum's loop and ours by method, and whether both compute the same map."
    logits = lambda inputs: network_logits(network, inputs)[0]  # noqa: E731
    mask, window, strides = labels[None, None], (1, *(2 * RADIUS + 1,) * 3), (1, *(STEP,) * 3)
    ours = lambda name, **params: (lambda: build_explainer(name, network, **params).attribute(scan, target=1))  # noqa: E731
    return {
        "integrated_gradients": (lambda: attr.IntegratedGradients(logits).attribute(scan, 0, 1, n_steps=STEPS, method="riemann_left", internal_batch_size=1),
                                 ours("integrated_gradients", steps=STEPS), True),
        "smoothgrad": (lambda: attr.NoiseTunnel(attr.Saliency(logits)).attribute(scan, "smoothgrad", nt_samples=SAMPLES, nt_samples_batch_size=1, stdevs=0.1,
                                                                                target=1, abs=False), ours("smoothgrad", samples=SAMPLES, deviation=0.1), False),
        "gradient_shap": (lambda: attr.GradientShap(logits).attribute(scan, torch.zeros_like(scan), n_samples=SAMPLES, target=1),
                          ours("gradient_shap", samples=SAMPLES), False),
        "feature_ablation": (lambda: attr.FeatureAblation(logits).attribute(scan, 0, 1, feature_mask=mask), ours("feature_ablation", regions=labels), False),
        "kernel_shap": (lambda: attr.KernelShap(logits).attribute(scan, 0, 1, feature_mask=mask, n_samples=SETS),
                        ours("kernel_shap", regions=labels, samples=SETS), False),
        "occlusion": (lambda: attr.Occlusion(logits).attribute(scan, window, strides, 0, 1), ours("occlusion", radius=RADIUS, step=STEP, factor=0.0), False)}


def timed(act: Callable) -> tuple[float, torch.Tensor]:
    "Seconds, and the map."
    start = time.perf_counter()
    found = act()
    return time.perf_counter() - start, found.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds, load = parser.parse_args().rounds, os.getloadavg()[0]
    torch.manual_seed(0)
    grid = get_grid("cat12_1.5mm")
    network = dyrba2021(grid.cropped_shape).eval()
    scan, labels = torch.from_numpy(load_template(grid).copy())[None, None].float(), torch.tensor(load_atlas("aal", grid).labels).long()
    rows = []
    for name, (theirs, ours, same) in pairs(network, scan, labels).items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for kept, act in zip(times, (theirs, ours)):
                seconds, found = timed(act)
                kept.append(seconds)
                if act is theirs:
                    expected = found
        if same:
            assert (found - expected).norm() < 1e-3 * expected.norm(), f"{name}: the maps differ"
        captums, own = map(statistics.median, times)
        rows.append(f"| {name} | {captums:.2f} | {own:.2f} | {captums / own:.1f} | {min(times[0]) / max(times[1]):.1f} to {max(times[0]) / min(times[1]):.1f} |")
        print(rows[-1], flush=True)
    write_section("methods", "\n".join([
        "## Methods that see many changed scans, against Captum's own loop", "",
        f"`python benchmarks/methods.py`, {datetime.date.today()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, Captum "
        f"{captum.__version__}, load of the machine beforehand {load:.1f}; {rounds} rounds in turn, medians. The CNN of Dyrba et al. (2021), a scan of 100×120×100 voxels. "
        f"{STEPS} steps or samples, {SETS} sets of the 116 AAL regions, cubes that reach {RADIUS} voxels in steps of {STEP}; ours "
        "leaves out cubes in the background, and computes the layers up to the first dense one around the cube alone.", "",
        "| method | Captum's loop (s) | ours (s) | Captum ÷ ours | range |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
