"""Many inputs, one after another, and counts of what became of them."""
import importlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from explainable_mri.registry import COHORTS, EXPLAINERS, LOSSES, MEASURES, NETWORKS, SPLITS, TRANSFORMS

from .doors import DOORS, Door
from .judge import KINDS, Observation, Verdict, judge, observe
from .originals import make_originals

# How often each door is tried, relative to the others
_WEIGHTS = {"grey-matter maps": 3, "tables": 3, "configurations": 4, "results": 3, "checkpoints": 2, "DICOM": 2, "zip files": 2}


def _preload() -> None:
    "Import what the doors import, so that the processes of the inputs need not."
    for name in ("cli", "config", "inference", "experiments.experiment", "models.keras", "preprocessing.study", "preprocessing.simulation",
                 "training.trainer", "explainers.lrp"):
        importlib.import_module(f"explainable_mri.{name}")
    for registry in (COHORTS, EXPLAINERS, LOSSES, MEASURES, NETWORKS, SPLITS, TRANSFORMS):
        registry.names()
    for name in ("lightning.pytorch", "monai.transforms", "nilearn.plotting", "sklearn.metrics", "tableone", "tensorboard", "openpyxl", "pydicom", "dicom2nifti"):
        with suppress(ImportError):
            importlib.import_module(name)


def _copy(originals: Path, door: Door, folder: Path) -> None:
    "Put what a door needs into a folder; files are hard links, which changes break."
    folder.mkdir(parents=True)
    for name in door.needs:
        if (originals / name).is_dir():
            shutil.copytree(originals / name, folder / name, copy_function=os.link if name == "data" else shutil.copy2)
        else:
            shutil.copy2(originals / name, folder / name)


def _try(door: Door, originals: Path, folder: Path, rng: np.random.Generator, known: dict[tuple[str, str], Observation]) -> Verdict:
    "Change one file of a door, and judge what comes of it."
    _copy(originals, door, folder)
    files = sorted(path for pattern in door.targets for path in folder.glob(pattern) if path.is_file())
    path = files[rng.integers(len(files))]
    below = path.relative_to(folder)
    key = door.name, below.parts[0]  # what is used is a file, or all of a folder
    if key not in known:
        known[key] = _original(door, originals, folder.with_name("original"), below)
    change = door.changes[rng.integers(len(door.changes))]
    try:
        words = change(rng, path)
    except Exception as error:
        raise AssertionError(f"{change.__name__} of {below} failed") from error
    start = time.perf_counter()
    found = observe(lambda: door.use(below), folder)
    meaning = "other" if words.startswith("valid: ") or change in door.valid else "wrong"
    names = [path.name, path.stem, str(below.parent) if below.parent != Path() else path.name, below.parent.name or path.name, *_keys(words)]
    kind, said = judge(found, known[key], meaning, names, door.remedies)
    return Verdict(door.name, change.__name__, f"{below}: {words}", kind, said, time.perf_counter() - start)


def _keys(words: str) -> list[str]:
    "Names of keys and columns in the words of a change, which a refusal may give instead of a file."
    return [one.strip("':=,") for part in words.split() for one in (part, part.partition("=")[0], part.rpartition(".")[2]) if len(one) > 2]


def _original(door: Door, originals: Path, folder: Path, below: Path) -> Observation:
    "What comes of the unchanged files."
    shutil.rmtree(folder, ignore_errors=True)
    _copy(originals, door, folder)
    found = observe(lambda: door.use(below), folder, seconds=300)
    shutil.rmtree(folder)
    if found.kind != "result":
        raise AssertionError(f"{door.name}: the unchanged {below} is {found.kind}: {found.message}")
    return found


def run(
    seed: int,                                    # seed of everything random
    count: int,                                   # inputs to try
    doors: Iterable[str] | None = None,           # names of doors; None: all
    show: Callable[[Verdict], None] = lambda verdict: None,  # called after each
    keep: Path | None = None,                     # folder in which originals are kept for the next run
    only: int | None = None,                      # number of the one input to try
) -> list[Verdict]:                               # one for each input
    "Try inputs and judge what becomes of each."
    _preload()
    chosen = [door for door in DOORS if doors is None or door.name in set(doors)]
    weights = np.array([_WEIGHTS.get(door.name, 1) for door in chosen], float)
    verdicts, known = [], {}
    with tempfile.TemporaryDirectory() as place:
        originals = keep or Path(place, "originals")
        if not (originals / "native").exists():
            originals.mkdir(parents=True, exist_ok=True)
            made = observe(lambda: (make_originals(originals) or {}, []), originals, seconds=600)
            if made.kind != "result":
                raise AssertionError(f"The valid inputs cannot be made: {made.message}")
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            door = chosen[rng.choice(len(chosen), p=weights / weights.sum())]
            if only is not None and number != only:
                continue
            folder = Path(place, "tried")
            verdicts.append(_try(door, originals, folder, rng, known))
            show(verdicts[-1])
            shutil.rmtree(folder, ignore_errors=True)
    return verdicts


def count_kinds(
    verdicts: list[Verdict],      # from `run`
) -> dict[str, dict[str, int]]:   # for each door, how many inputs were of each kind
    "Count the verdicts."
    counted: dict[str, Counter] = {}
    for verdict in verdicts:
        counted.setdefault(verdict.door, Counter())[verdict.kind] += 1
    return {door: {kind: counted[door][kind] for kind in KINDS} for door in sorted(counted)}
