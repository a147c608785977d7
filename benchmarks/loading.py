"""Time how fast scans become batches: our cache and dataset, TorchIO's SubjectsLoader, MONAI's CacheDataset and PersistentDataset.

    python benchmarks/loading.py speed     # samples a second in the first and in later epochs; also with --workers 2
    python benchmarks/loading.py memory    # peak memory as the cohort grows
    python benchmarks/loading.py memory-limited    # a cohort larger than the memory there is; on Linux, as root, with version 1 of cgroups

All read the same compressed NIfTI files at 1.5 mm, cut out the same field of view and vary each scan by a left-right flip and a shift of
up to 10 voxels. Each peer runs in a process of its own, one after the other. The scans are simulated once, in `.benchmarks/`; a
large cohort consists of hard links to 40 different files. The result, a table, goes to `benchmarks/RESULTS.md`.
"""
import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from results import bring_up_memory, write_section

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".benchmarks" / "loading"
DIFFERENT = 40
GRID, DISTANCE, VOXELS = "cat12_1.5mm", 15.0, 10
PEERS = {"ours": "explainable-mri", "TorchIO SubjectsLoader": "torchio", "MONAI CacheDataset": "monai",
         "MONAI PersistentDataset": "monai"}


def make_scans(count: int) -> list[Path]:
    "Simulate scans from the grey-matter template, once, and link as many as asked for."
    import numpy as np
    from nilearn.datasets import load_mni152_gm_template
    from nilearn.image import resample_img
    from scipy.ndimage import gaussian_filter, zoom

    from explainable_mri.data.volumes import get_grid, save_volume

    paths = [FOLDER / f"{number:04}.nii.gz" for number in range(count)]
    if not all(path.exists() for path in paths[:DIFFERENT]):
        grid, rng = get_grid(GRID), np.random.default_rng(0)
        template = resample_img(load_mni152_gm_template(resolution=1), grid.affine, grid.shape)
        template = grid.crop(template.get_fdata(dtype=np.float32))
        for path in paths[:DIFFERENT]:
            coarse = gaussian_filter(rng.standard_normal([size // 4 for size in template.shape], np.float32), 1)
            save_volume((template * (1 + zoom(coarse, 4, order=1))).astype(np.float32), path, grid)
    for number, path in enumerate(paths):
        if not path.exists():
            os.link(paths[number % DIFFERENT], path)
    return paths


# ---- the peers; each returns a function that gives the batches of an epoch ---------------------------------------------


def our_batches(paths: list[Path], batch_size: int, workers: int, folder: Path):
    import pandas as pd
    from torch.utils.data import DataLoader

    from explainable_mri.config import CacheConfig, Component
    from explainable_mri.data.transforms import build_transforms
    from explainable_mri.data.cache import load_volumes
    from explainable_mri.data.datasets import ScanDataset
    from explainable_mri.data.volumes import get_grid
    from explainable_mri.training.trainer import _as_it_is, _EpochSampler, _Seeded

    grid = get_grid(GRID)
    volumes = load_volumes(pd.DataFrame({"path": [str(path) for path in paths]}), grid, CacheConfig(folder=folder))
    transform = build_transforms([Component(name="flip"), Component(name="shift", params={"distance": DISTANCE})], grid)
    dataset = ScanDataset(volumes, [0] * len(paths), transform=transform)  # loaded as `train` does
    return DataLoader(_Seeded(dataset), batch_size, sampler=_EpochSampler(dataset, 0, 0), collate_fn=_as_it_is,
                      num_workers=workers, persistent_workers=workers > 0)


def torchio_batches(paths: list[Path], batch_size: int, workers: int, folder: Path):
    import torchio as tio

    before, after = zip(*((part.start, size - part.stop) for part, size in field_of_view()))
    transform = tio.Compose([
        tio.Crop([margin for both in zip(before, after) for margin in both]),
        tio.RandomFlip(axes=0, flip_probability=0.5),
        tio.RandomAffine(scales=0, degrees=0, translation=DISTANCE, image_interpolation="nearest", default_pad_value=0)])
    subjects = [tio.Subject(volume=tio.ScalarImage(path), label=0) for path in paths]
    return tio.SubjectsLoader(tio.SubjectsDataset(subjects, transform=transform), batch_size=batch_size, shuffle=True,
                              num_workers=workers, persistent_workers=workers > 0)


def monai_batches(paths: list[Path], batch_size: int, workers: int, dataset_of):
    "A shift by whole voxels is a margin of zeros, of which a random part is cut off again."
    from monai import transforms
    from monai.data import DataLoader, set_track_meta

    set_track_meta(False)
    parts = [part for part, _ in field_of_view()]
    transform = transforms.Compose([
        transforms.LoadImage(image_only=True), transforms.EnsureChannelFirst(channel_dim="no_channel"),
        transforms.SpatialCrop(roi_start=[part.start for part in parts], roi_end=[part.stop for part in parts]),
        transforms.RandFlip(prob=0.5, spatial_axis=0), transforms.BorderPad(VOXELS),
        transforms.RandSpatialCrop([part.stop - part.start for part in parts], random_size=False)])
    dataset = dataset_of([str(path) for path in paths], transform)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def cache_batches(paths: list[Path], batch_size: int, workers: int, folder: Path):
    from monai.data import CacheDataset

    return monai_batches(paths, batch_size, workers, lambda files, transform: CacheDataset(
        files, transform, num_workers=4, progress=False))


def persistent_batches(paths: list[Path], batch_size: int, workers: int, folder: Path):
    from monai.data import PersistentDataset

    return monai_batches(paths, batch_size, workers, lambda files, transform: PersistentDataset(files, transform, folder))


BATCHES = dict(zip(PEERS, (our_batches, torchio_batches, cache_batches, persistent_batches)))


def field_of_view() -> list[tuple[slice, int]]:
    "The part of each axis that is used, and the size of the axis."
    from explainable_mri.data.volumes import get_grid

    grid = get_grid(GRID)
    return list(zip(grid.field_of_view, grid.shape))


# ---- measuring -----------------------------------------------------------------------------------------------------------


class PeakMemory(threading.Thread):
    "Watches the memory of this process and its workers that is not the copy of a file, shared pages counted once."

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        "Bytes: anonymous memory and shared memory, proportional to the number of processes that share it."
        me = os.getpid()
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        total = 0
        for process in [me, *children]:
            try:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return total * 1024


@contextmanager
def limited_memory(gigabytes: float) -> Iterator[Path]:
    "A group of processes that may use so much memory together, cached pages of files included; exits where there can be none."
    group = Path("/sys/fs/cgroup/memory", f"explainable-mri-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        sys.exit(f"No group of processes with limited memory can be made ({error}). It takes Linux, version 1 of cgroups and root's rights.")
    try:
        (group / "memory.limit_in_bytes").write_text(str(int(gigabytes * 1e9)))
        yield group
    finally:
        for _ in range(50):
            try:
                return group.rmdir()
            except OSError:
                time.sleep(0.1)  # the last process is still leaving


def work(peer: str, scans: int, batch_size: int, workers: int, epochs: int, watch: bool = False, group: str | None = None) -> dict:
    "Measure one peer: seconds of the first epoch, building included, and of each later one."
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    import numpy as np
    import torch

    for name in ("data.transforms", "data.cache", "training.trainer"):  # imports are not part of the first epoch
        importlib.import_module(f"explainable_mri.{name}")

    torch.set_num_threads(1)
    paths, sizes = make_scans(scans), [part.stop - part.start for part, _ in field_of_view()]
    memory = PeakMemory()
    start_memory = PeakMemory.now()
    if not watch and not group:
        bring_up_memory(4)
    if watch:
        memory.start()
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        start, seconds, loader = time.perf_counter(), [], None
        for _ in range(epochs):
            loader = loader or BATCHES[peer](paths, batch_size, workers, Path(folder))
            count = 0
            for batch in loader:
                volumes = batch if isinstance(batch, torch.Tensor) else batch["volume"]
                volumes = volumes["data"] if isinstance(volumes, dict) else volumes
                assert volumes.shape[1:] == (1, *sizes) and volumes.dtype == torch.float32, (volumes.shape, volumes.dtype)
                count += len(volumes)
            assert count == scans and np.isfinite(float(volumes.sum()))
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        memory.stopped.set()
        result = {"first": seconds[0], "later": seconds[1:]} | ({"memory": memory.peak - start_memory} if watch else {})
        del loader
    return result


def measure(peer: str, **options) -> dict:
    "Run a peer in its own process."
    command = [sys.executable, __file__, "worker", "--peer", peer, "--options", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == -signal.SIGKILL and "group" in options:
        return {}
    if result.returncode:
        sys.exit(f"{peer} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure_speed(scans: int, workers: int, batch_size: int) -> str:
    "Samples a second of all peers, as a Markdown table."
    lines = ["| loader | first epoch (s) | ÷ ours | later epochs (samples/s) | ours ÷ it |", "|---|---|---|---|---|"]
    results = {}
    for peer in PEERS:
        epochs = 2 if peer.startswith("TorchIO") else 4
        results[peer] = measure(peer, scans=scans, batch_size=batch_size, workers=workers, epochs=epochs, watch=False)
        print(workers, peer, results[peer], flush=True)
    ours = results["ours"]
    for peer, result in results.items():
        rate = scans / statistics.median(result["later"])
        lines.append(f"| {peer} | {result['first']:.1f} | {result['first'] / ours['first']:.1f} | {rate:.0f} | "
                     f"{scans / statistics.median(ours['later']) / rate:.1f} |")
    return (f"{scans} scans, 100×120×100 voxels in float32, batches of {batch_size}. The first epoch includes reading the files and building the "
            "cache; memory that a virtual machine would first have to get from its host is touched before. Later epochs: the "
            "median of three (TorchIO, which keeps nothing between epochs: one).\n\n"
            + "\n".join(lines))


def measure_memory(small: int, large: int, batch_size: int) -> str:
    "Peak memory of a small and a large cohort, as a Markdown table."
    lines = [f"| loader | {small} scans (GB) | {large} scans (GB) | growth for each further GB of maps (GB) |", "|---|---|---|---|"]
    for peer in PEERS:
        if peer.startswith("TorchIO"):
            continue
        peaks = []
        for scans in (small, large):
            result = measure(peer, scans=scans, batch_size=batch_size, workers=2, epochs=2, watch=True)
            peaks.append(result["memory"] / 1e9)
            print(peer, scans, result, flush=True)
        growth = (peaks[1] - peaks[0]) / ((large - small) * 4.8e-3)
        lines.append(f"| {peer} | {peaks[0]:.2f} | {peaks[1]:.2f} | {growth:.2f} |")
    return (f"Two worker processes, batches of {batch_size}, two epochs, building included. The maps of {small} scans take {small * 4.8e-3:.1f} GB, those "
            f"of {large} take {large * 4.8e-3:.1f} GB. Measured is the peak of anonymous and shared memory of the process and its workers together (`Pss_Anon` and "
            "`Pss_Shmem`, sampled five times a second), above what it is after imports. Pages of a mapped file are not counted: the operating "
            "system drops them when memory is short. Peaks shorter than the sampling are missed, so small values, such as ours, are no more than an order of "
            "magnitude: the batches under way alone may take 0.1 GB each.\n\n" + "\n".join(lines))


def measure_limited(scans: int, limit: float, batch_size: int) -> str:
    "Samples a second of a cohort that is larger than memory, as a Markdown table."
    lines = ["| loader | first epoch (s) | second epoch (samples/s) | peak memory, cached pages included (GB) |", "|---|---|---|---|"]
    for peer in PEERS:
        if peer.startswith("TorchIO"):
            continue
        with limited_memory(limit) as group:
            result = measure(peer, scans=scans, batch_size=batch_size, workers=0, epochs=2, group=str(group))
            peak = int((group / "memory.max_usage_in_bytes").read_text()) / 1e9
        print(peer, result, peak, flush=True)
        lines.append(f"| {peer} | {result['first']:.1f} | {scans / result['later'][0]:.0f} | {peak:.2f} |" if result else
                     f"| {peer} | killed by the system for want of memory | – | {peak:.2f} |")
    return (f"{scans} scans whose maps take {scans * 4.8e-3:.1f} GB, in a group of processes (cgroup) with {limit} GB of memory, in which the system counts "
            f"cached pages of files as well. No worker processes, batches of {batch_size}; the first epoch includes building.\n\n" + "\n".join(lines))


def write_results(title: str, command: str, text: str) -> None:
    "Replace this benchmark's section of RESULTS.md."
    versions = "; ".join(f"{package} {version(package)}" for package in ("torchio", "monai", "torch", "numpy"))
    write_section(f"loading-{command.replace(' --workers ', '-')}",
                  f"## {title}\n\n`python benchmarks/loading.py {command}`, {datetime.date.today()}, {os.cpu_count()} CPU cores "
                  f"({platform.machine()}). {text}\n\nVersions: {versions}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "memory-limited", "worker"])
    parser.add_argument("--scans", type=int, default=120, help="scans of the comparison, and of the small cohort")
    parser.add_argument("--large", type=int, default=480, help="scans of the large cohort")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the comparison of speed")
    parser.add_argument("--limited", type=int, default=600, help="scans of the cohort that is larger than memory")
    parser.add_argument("--limit", type=float, default=1.2, help="memory that there is for it, in GB")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "worker":
        print(json.dumps(work(options.peer, **json.loads(options.options))))
        return
    make_scans({"speed": options.scans, "memory": options.large, "memory-limited": options.limited}[options.what])
    title, text = {
        "speed": (f"speed with {options.workers} workers", lambda: measure_speed(options.scans, options.workers, options.batch_size)),
        "memory": ("memory", lambda: measure_memory(options.scans, options.large, options.batch_size)),
        "memory-limited": ("a cohort larger than memory", lambda: measure_limited(options.limited, options.limit, options.batch_size)),
    }[options.what]
    command = f"speed --workers {options.workers}" if options.what == "speed" else options.what
    write_results(f"Loading batches: {title}", command, text())


if __name__ == "__main__":
    main()
