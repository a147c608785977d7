"""Occlusion by `Occlusion` against the plain loop, in alternating rounds: python benchmarks/occlusion.py [--side 32] [--rounds 3]"""
import argparse
import itertools
import statistics
import time

import torch
from torch import nn

from explainable_mri.explainers.base import network_logits
from explainable_mri.explainers.perturbations import Occlusion


def make_scan(side: int) -> torch.Tensor:
    "A ball in an empty volume, as a brain in its field of view."
    axis = torch.linspace(-1.2, 1.2, side)
    inside = sum(one ** 2 for one in torch.meshgrid(axis, axis, axis, indexing="ij")) < 1
    return (torch.rand(side, side, side, generator=torch.Generator().manual_seed(0)) * inside)[None, None]


def plain(network: nn.Module, scan: torch.Tensor, expected: torch.Tensor, radius: int, step: int) -> torch.Tensor:
    "One cube after the other: the scan is occluded as a whole, its covariates are taken out, the network sees it."
    values = []
    with torch.no_grad():
        for centre in itertools.product(*(range((size - 1) % step // 2, size, step) for size in scan.shape[2:])):
            one = scan.clone()
            one[(..., *(slice(max(at - radius, 0), at + radius + 1) for at in centre))] *= 0.5
            values.append(network_logits(network, one - expected)[0][0, 1])
    return torch.stack(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="voxels along each axis")
    parser.add_argument("--radius", type=int, default=3)
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.manual_seed(0)
    network = nn.Sequential(*(layer for before, after in ((1, 8), (8, 8), (8, 8)) for layer in
                              (nn.Conv3d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2))), nn.AdaptiveAvgPool3d(2), nn.Flatten(),
                            nn.Linear(64, 2)).eval()
    scan = make_scan(given.side)
    expected = 0.5 * scan
    ours = Occlusion(network, given.radius, given.step, batch_size=given.batch_size, scans=scan)
    times: dict[str, list[float]] = {"plain loop": [], "Occlusion": []}
    for number in range(given.rounds):
        start = time.perf_counter()
        loop = plain(network, scan, expected, given.radius, given.step)
        times["plain loop"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = ours.maps(scan - expected, 1)
        times["Occlusion"].append(time.perf_counter() - start)
    at = [range((size - 1) % given.step // 2, size, given.step) for size in scan.shape[2:]]
    difference = max(abs(found.logit[0][centre] - value).item() for centre, value in zip(itertools.product(*at), loop))
    assert difference < 1e-5 * max(1, loop.abs().max().item()), f"they differ by {difference}"
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:10} {medians[name]:8.3f} s ({', '.join(f'{value:.3f}' for value in values)})")
    print(f"{found.evaluations} of {len(loop)} cubes evaluated; {medians['plain loop'] / medians['Occlusion']:.2f} times as fast; "
          f"largest difference {difference:.1e}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
