"""Occlusion as published against the plain loop: python benchmarks/occlusion.py [--shape 100 120 100] [--radius 10] [--step 3]

The group's CNN; cubes at half intensity, covariates taken out of the occluded scan. The loop would take hours, so a random sample of its cubes is timed before and after
ours, and scaled up to all cubes; ours is timed whole. The values of the sampled cubes are compared."""
import argparse
import datetime
import itertools
import os
import random
import time

import torch
from results import write_section
from torch import nn

from explainable_mri.explainers.base import network_logits
from explainable_mri.explainers.perturbations import Cubes, Occlusion
from explainable_mri.models.networks import dyrba2021


def make_scan(shape: list[int]) -> torch.Tensor:
    "An ellipsoid in an empty volume, as a brain in its field of view."
    axes = [torch.linspace(-1.1, 1.1, side) for side in shape]
    inside = sum(one ** 2 for one in torch.meshgrid(*axes, indexing="ij")) < 1
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * inside)[None, None]


def plain(network: nn.Module, scan: torch.Tensor, expected: torch.Tensor, radius: int, centres: list[tuple[int, ...]]) -> tuple[torch.Tensor, float]:
    "One cube after the other: the scan is occluded as a whole, its covariates are taken out, the network sees it. Logits, and seconds."
    values, start = [], time.perf_counter()
    with torch.no_grad():
        for centre in centres:
            one = scan.clone()
            one[(..., *(slice(max(at - radius, 0), at + radius + 1) for at in centre))] *= 0.5
            values.append(network_logits(network, one - expected)[0][0, 1])
    return torch.stack(values), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[100, 120, 100], help="voxels along each axis")
    parser.add_argument("--radius", type=int, default=10)
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sample", type=int, default=30, help="cubes of the plain loop that are timed, twice")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    network, scan = dyrba2021(given.shape).eval(), make_scan(given.shape)
    expected = 0.5 * scan
    ours = Occlusion(network, given.radius, given.step, batch_size=given.batch_size, scans=scan)
    every = list(itertools.product(*(range((size - 1) % given.step // 2, size, given.step) for size in given.shape)))
    touched = len(Cubes(tuple(given.shape), given.radius, given.step).touched(scan[0]))
    samples = [random.Random(seed).sample(every, given.sample) for seed in (0, 1)]
    plain(network, scan, expected, given.radius, samples[0][:3])  # the first calls are slower
    before, first = plain(network, scan, expected, given.radius, samples[0])
    start = time.perf_counter()
    found = ours.maps(scan - expected, 1)
    own = time.perf_counter() - start
    after, second = plain(network, scan, expected, given.radius, samples[1])
    values = torch.stack([found.logit[0][centre] for centre in (*samples[0], *samples[1])])
    difference = (values - torch.cat([before, after])).abs().max().item()
    assert difference < 1e-5 * max(1, values.abs().max().item()), f"they differ by {difference}"
    each = (first + second) / (2 * given.sample)
    shape = "×".join(map(str, given.shape))
    text = f"""## Occlusion on the CPU

`python benchmarks/occlusion.py`, {datetime.date.today()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}, load of the machine beforehand {load:.1f}.
The CNN of Dyrba et al. (2021), a scan of {shape} voxels, cubes that reach {given.radius} voxels, steps of {given.step}, intensity halved, covariates taken out of the occluded
scan; the map of the logit and of the probability. *Plain loop*, as published: all {len(every)} cubes, one scan at a time; {2 * given.sample} of them were timed, half before and half after ours
({first / given.sample:.3f} and {second / given.sample:.3f} s a cube), and scaled up. *Ours*, whole: the {touched} cubes that change the scan, of which the layers up to the first dense one see
a box around the cube alone. Largest difference of the logits of the timed cubes: {difference:.1e}. Maps of total relevance need the whole occluded scan: there only the background is left out.

|  | seconds | plain loop ÷ it |
|---|---|---|
| plain loop, scaled up | {each * len(every):.0f} | 1 |
| of these, cubes in the background left out | {each * touched:.0f} | {len(every) / touched:.1f} |
| ours | {own:.0f} | {each * len(every) / own:.0f} |"""
    print(text)
    write_section("occlusion", text)


if __name__ == "__main__":
    main()
