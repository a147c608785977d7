"""Time residual maps at full size: our `ResidualModel`, and scikit-learn's `LinearRegression` voxel by voxel as published.

    python benchmarks/residuals.py

663 maps of 100×120×100 voxels, of which 254 belong to controls, are simulated in a temporary folder (3.2 GB, and as much for the
result) and deleted afterwards. Every measurement runs in a process of its own. The loop over voxels works in memory on a sample
of voxels and is scaled up; our model is measured in memory, from file to file, and from compressed NIfTI. The result, a table, goes to
`benchmarks/RESULTS.md`.
"""
import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from results import bring_up_memory, write_section

SCANS, CONTROLS = 663, 254
GRID = "cat12_1.5mm"
COVARIATES = ["age", "sex", "tiv", "field_strength"]


def simulate(folder: Path) -> dict:
    "Write maps, controls first, and their covariates: the grey-matter template with noise, thinner with age."
    from nilearn.datasets import load_mni152_gm_template
    from nilearn.image import resample_img

    from explainable_mri.data.streams import release
    from explainable_mri.data.volumes import get_grid

    grid, rng = get_grid(GRID), np.random.default_rng(0)
    template = resample_img(load_mni152_gm_template(resolution=1), grid.affine, grid.shape, interpolation="linear")
    template = grid.crop(template.get_fdata(dtype=np.float32))
    table = pd.DataFrame({
        "age": rng.normal(75, 7, SCANS), "sex": rng.choice(["F", "M"], SCANS), "tiv": rng.normal(1420, 140, SCANS),
        "field_strength": rng.choice([1.5, 3.0], SCANS)})
    table.to_csv(folder / "covariates.csv", index=False)
    maps = np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float32, (SCANS, *template.shape))
    brain, largest = template > 0.01, 0.0
    for row, scan in table.iterrows():
        thickness = 1 - 0.006 * (scan.age - 75) + 0.0002 * (scan.tiv - 1420) + 0.02 * (scan.sex == "F")
        maps[row][brain] = template[brain] * (thickness + 0.2 * rng.standard_normal(brain.sum(), np.float32))
        largest = max(largest, float(np.abs(maps[row]).max()))
        release(maps)
    return {"voxels": brain.size, "brain": int(brain.sum()), "largest": largest}


def peak_memory() -> float:
    "Peak resident memory of this process in GB, pages of mapped files included."
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9


def forget(path: Path) -> None:
    "Write a file to disk and drop it from the operating system's cache."
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours_in_memory(folder: Path) -> dict:
    "Fit on the controls and subtract from all maps, in memory and in place, as the loop does."
    from explainable_mri.data.residuals import ResidualModel

    table, maps = pd.read_csv(folder / "covariates.csv"), np.load(folder / "maps.npy")
    begin = time.perf_counter()
    model = ResidualModel(COVARIATES).fit(maps[:CONTROLS], table[:CONTROLS])
    fitted = time.perf_counter()
    model.transform(maps, table, out=maps)
    return {"fit": fitted - begin, "transform": time.perf_counter() - fitted, "memory": peak_memory()}


def ours(folder: Path, cold: bool = False) -> dict:
    "The same from one file to another."
    from explainable_mri.data.residuals import ResidualModel
    from explainable_mri.data.streams import write_maps

    table = pd.read_csv(folder / "covariates.csv")
    (folder / "residuals.npy").unlink(missing_ok=True)
    bring_up_memory(7)
    if cold:
        forget(folder / "maps.npy")
    begin = time.perf_counter()
    maps = np.load(folder / "maps.npy", mmap_mode="r")
    model = ResidualModel(COVARIATES).fit(maps[:CONTROLS], table[:CONTROLS])
    fitted = time.perf_counter()
    write_maps(model.stream(maps, table), folder / "residuals.npy", maps.shape)
    return {"fit": fitted - begin, "transform": time.perf_counter() - fitted, "memory": peak_memory()}


def ours_nifti(folder: Path, scans: list[str]) -> dict:
    "The same from compressed NIfTI files, read one after the other."
    from explainable_mri.data.residuals import ResidualModel
    from explainable_mri.data.streams import write_maps
    from explainable_mri.data.volumes import get_grid, load_volume

    bring_up_memory(2)
    table, grid = pd.read_csv(folder / "covariates.csv")[:len(scans)], get_grid(GRID)
    controls = round(len(scans) * CONTROLS / SCANS)
    begin = time.perf_counter()
    model = ResidualModel(COVARIATES).fit((load_volume(scan, grid) for scan in scans[:controls]), table[:controls])
    fitted = time.perf_counter()
    left = model.stream((load_volume(scan, grid) for scan in scans), table)
    write_maps(left, folder / "residuals.npy", (len(scans), *grid.cropped_shape))
    return {"fit": fitted - begin, "transform": time.perf_counter() - fitted, "memory": peak_memory()}


def design(folder: Path) -> np.ndarray:
    "Covariates as the group's notebook passes them to scikit-learn."
    table = pd.read_csv(folder / "covariates.csv")
    return np.column_stack([table.age, table.sex == "F", table.tiv, table.field_strength]).astype(np.float32)


def loop(folder: Path, sample: int) -> dict:
    "Fit and predict a sample of voxels of the brain, one after the other; saves what is left, of 1000 in float64 as well."
    from sklearn.linear_model import LinearRegression

    maps, covariates = np.load(folder / "maps.npy", mmap_mode="r"), design(folder)
    brain = np.flatnonzero(maps[0])
    voxels = np.sort(np.random.default_rng(1).choice(brain, sample, replace=False))
    values = np.stack([volume.ravel()[voxels] for volume in maps])
    before, precise = values[:, :1000].astype(np.float64), covariates.astype(np.float64)
    model = LinearRegression()
    model.fit(covariates[:CONTROLS], values[:CONTROLS, 0])
    begin = time.perf_counter()
    for voxel in range(sample):
        model.fit(covariates[:CONTROLS], values[:CONTROLS, voxel])
        values[:, voxel] -= model.predict(covariates)
    seconds = time.perf_counter() - begin
    np.savez(folder / "loop.npz", voxels=voxels, residuals=values)
    exact = [model.fit(precise[:CONTROLS], column[:CONTROLS]).predict(precise) for column in before.T]
    np.savez(folder / "exact.npz", voxels=voxels[:len(exact)], residuals=(before - np.stack(exact, 1)).astype(np.float32))
    return {"voxel": seconds / sample}


def at_once(folder: Path) -> dict:
    "Fit all voxels in one call of scikit-learn and predict all maps, in memory."
    from sklearn.linear_model import LinearRegression

    covariates, maps = design(folder), np.load(folder / "maps.npy").reshape(SCANS, -1)
    begin = time.perf_counter()
    model = LinearRegression().fit(covariates[:CONTROLS], maps[:CONTROLS])
    maps -= model.predict(covariates)
    return {"seconds": time.perf_counter() - begin, "memory": peak_memory()}


def measure(what: str, folder: Path, **options) -> dict:
    "Run one of the functions above in a new process."
    result = subprocess.run([sys.executable, __file__, "--worker", what, "--folder", str(folder), "--options", json.dumps(options)],
                            check=True, capture_output=True, text=True)
    values = json.loads(result.stdout.splitlines()[-1])
    print(what, options if len(str(options)) < 100 else "", values, flush=True)
    return values


def compare(folder: Path, name: str) -> float:
    "The largest difference between our residuals and those that a loop saved."
    theirs, found = np.load(folder / f"{name}.npz"), np.load(folder / "residuals.npy", mmap_mode="r")
    return max(float(np.abs(volume.ravel()[theirs["voxels"]] - wanted).max())
               for volume, wanted in zip(found, theirs["residuals"]))


def measure_all(folder: Path, sample: int, repeats: int, nifti: int) -> str:
    "All measurements, as a Markdown table with its explanation."
    from loading import make_scans

    size = measure("simulate", folder)
    one = measure("loop", folder, sample=sample)
    cold = measure("ours", folder, cold=True)
    runs = [measure("ours", folder) for _ in range(repeats)]
    difference, precise = compare(folder, "loop"), compare(folder, "exact")
    direct = [measure("ours_in_memory", folder) for _ in range(repeats)]
    together = measure("at_once", folder)
    compressed = measure("ours_nifti", folder, scans=[str(path) for path in make_scans(nifti)])

    looped, skipping = one["voxel"] * size["voxels"], one["voxel"] * size["brain"]
    fast, warm = ({part: statistics.median(run[part] for run in of) for part in ("fit", "transform")} for of in (direct, runs))
    most = [max(run["memory"] for run in of) for of in (direct, [cold, *runs])]
    ours_cold = cold["fit"] + cold["transform"]
    ours_nifti_all = (compressed["fit"] + compressed["transform"]) * SCANS / nifti
    row = "| {} | {} | {} | {} | {} |".format
    lines = [row("", "seconds", "loop over all voxels ÷ it", "loop over the brain's ÷ it", "peak memory (GB)"), "|---|---|---|---|---|",
             row("loop over all voxels, scaled up", f"{looped:.0f}", 1, "–", "–"),
             row("loop over the brain's voxels, scaled up", f"{skipping:.0f}", "–", 1, "–")]
    for name, seconds, used in [
            (f"ours, in memory as the loop (fit {fast['fit']:.2f}, subtract {fast['transform']:.2f})", sum(fast.values()), most[0]),
            (f"ours, file to file, maps in the system's cache (fit {warm['fit']:.2f}, subtract {warm['transform']:.2f})",
             sum(warm.values()), most[1]),
            ("ours, file to file, maps not in the cache", ours_cold, cold["memory"]),
            (f"ours, compressed NIfTI, scaled up from {nifti} scans", ours_nifti_all, compressed["memory"]),
            ("scikit-learn, all voxels in one call, maps in memory", together["seconds"], together["memory"])]:
        lines.append(row(name, f"{seconds:.1f}", f"{looped / seconds:.0f}", f"{skipping / seconds:.0f}", f"{used:.2f}"))
    return (
        f"{SCANS} maps of 100×120×100 voxels in float32, fitted on {CONTROLS}, subtracted from all. *Loop*: `LinearRegression` fitted "
        f"and predicted voxel by voxel as in the group's notebook, on {sample} voxels in memory ({1000 * one['voxel']:.2f} ms each), "
        f"scaled up to {size['voxels']:,} voxels; its reading and writing of files is not counted. The notebook skips voxels that are 0 "
        f"in all scans, which leaves {size['brain']:,} here; ours computes all. *Ours*: median of {repeats} runs; maps are "
        "mapped into memory and residual maps written as a stream, which ends in the system's cache, not on the disk; memory that a virtual machine "
        "would first have to get from its host is touched before each run. NIfTI files are read one after the other, twice for "
        "controls. Peak memory is the resident set of the whole process, pages of mapped files included. Largest difference between "
        f"our residuals and the loop's, which runs in float32 as published: {difference:.1e}; and those of the loop in float64, on 1000 "
        f"voxels: {precise:.1e}. The largest value of a map is {size['largest']:.2f}.\n\n" + "\n".join(lines))


def write_results(text: str) -> None:
    "Replace this benchmark's section of RESULTS.md."
    versions = "; ".join(f"{package} {version(package)}" for package in ("scikit-learn", "numpy"))
    write_section("residuals",
                  f"## Residual maps at full size\n\n`python benchmarks/residuals.py`, {datetime.date.today()}, "
                  f"{os.cpu_count()} CPU cores ({platform.machine()}). {text}\n\nVersions: {versions}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; the system's own by default")
    parser.add_argument("--sample", type=int, default=10_000, help="voxels that the loop computes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of our model")
    parser.add_argument("--nifti", type=int, default=120, help="scans that are read from compressed files")
    parser.add_argument("--worker", choices=["simulate", "loop", "ours_in_memory", "ours", "ours_nifti", "at_once"], help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(globals()[options.worker](options.folder, **json.loads(options.options))))
        return
    if (free := shutil.disk_usage(options.folder or tempfile.gettempdir()).free) < 8e9:
        sys.exit(f"The benchmark needs 8 GB of disk space, but {free / 1e9:.1f} GB are free. Name another folder: --folder FOLDER")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_results(measure_all(Path(folder), options.sample, options.repeats, options.nifti))


if __name__ == "__main__":
    main()
