"""Every door of the program: which files come in there, what happens to them, and what comes out."""
import inspect
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import torch
import yaml
from safetensors.torch import load_file, save_file

from explainable_mri.errors import ExplainableMRIError

from . import changes
from .changes import BYTES, TABLES, Change, write
from .originals import PERSON

Use = Callable[[], tuple[dict[str, Any], list[str]]]


@dataclass(frozen=True)
class Door:
    "A way into the program."

    name: str
    needs: list[str]            # files and folders of the originals that are needed
    targets: list[str]          # patterns of files of which one is changed
    changes: list[Change]       # what may happen to it
    use: Callable[[Path], tuple[dict[str, Any], list[str]]]  # results and notes, given the changed file; in the current folder
    valid: tuple[Change, ...] = ()  # changes that make another input, as valid as the first
    remedies: bool = True       # whether a refusal must say what to do; that a Keras file is damaged, or what it holds, is enough


# Scans

def use_scan(path: Path) -> tuple[dict, list[str]]:
    "Predict a scan and read its map."
    from explainable_mri.data.volumes import load_volume
    from explainable_mri.inference import load_model

    prediction = load_model("model.ckpt").predict(path, PERSON)
    volume = load_volume(path, "mni_3mm")
    return {"values": prediction.values, "array": volume.array}, [*prediction.notes, *volume.notes]


def use_raw(path: Path) -> tuple[dict, list[str]]:
    "Find and read a raw scan."
    from explainable_mri.preprocessing.scans import read_scan, survey

    found = survey(next(part for part in Path(path).parents if part.parent == Path()))
    others = [f"{len(found.scans)} scans are found"] if len(found.scans) > 1 else []
    try:
        raw = read_scan(found.scans[0])
    except ExplainableMRIError as error:  # as `prepare` says it
        raise type(error)(f"{found.scans[0].name}: {error}") from None
    return {"array": np.asarray(raw.image.dataobj), "affine": raw.image.affine, "covariates": raw.covariates}, [
        *others, *raw.notes, *found.scans[0].notes, *(f"{name}: {reason}" for name, reason in found.left_out.items()), *raw.series]


def mgh_field(rng: np.random.Generator, path: Path) -> str:
    import gzip

    content = bytearray(gzip.decompress(path.read_bytes()))
    place, values = [(0, [0, 2, 2**31 - 1]), (4, [0, -1, 2**31 - 1, 7]), (12, [0, 2**30]), (16, [0, 3]), (20, [1, 9, -1]), (28, [0, 2, 1])][rng.integers(6)]
    value = int(rng.choice(values))
    content[place:place + 4] = int(value).to_bytes(4, "big", signed=True)
    write(path, gzip.compress(bytes(content), 1))
    return f"bytes {place} to {place + 3} of the header set to {value}"


def analyze_field(rng: np.random.Generator, path: Path) -> str:
    header = path.with_suffix(".hdr")
    content = bytearray(header.read_bytes())
    place, values = [(42, [0, -1, 32767, 7]), (46, [0, 30000]), (40, [0, 7, 9]), (70, [0, 1, 128, 99]), (72, [0, 1, 8])][rng.integers(5)]
    value = int(rng.choice(values))
    content[place:place + 2] = value.to_bytes(2, "little", signed=True)
    write(header, bytes(content))
    return f"bytes {place} to {place + 1} of the header set to {value}"


# Tables and configurations

def use_table(path: Path) -> tuple[dict, list[str]]:
    "Check a cohort by the command line, and read it."
    from explainable_mri.cli import main
    from explainable_mri.config import load_config
    from explainable_mri.experiments.folder import load_cohort

    override = f"cohort.params.path={path}"
    main(["--debug", "check", "table.yaml", override], standalone_mode=False)
    cohort = load_cohort(load_config("table.yaml", [override]))
    columns = ["path", "subject", "session", "group", "age", "sex", "tiv", "field_strength"]
    table = cohort.table.assign(path=[Path(path).name for path in cohort.table.path])
    return {name: table[name].to_numpy() if table[name].dtype.kind in "if" else table[name].tolist() for name in columns}, list(cohort.notes)


def use_config(path: Path) -> tuple[dict, list[str]]:
    "Train with a configuration."
    from explainable_mri.config import load_config
    from explainable_mri.experiments.train import train_fold

    config = load_config(path)
    train_fold(config)
    return {"config": config.model_dump(mode="json")}, []


_WRONG = [None, -1, 0, 1.5, 10**6, 10**12, 1e308, float("nan"), "", "text", "../../x", [], [1, "a"], {}, {"a": 1}, True, "gpu", "1e-3", "x" * 300,
          "/dev/zero", "\0", "ä"]


def config_value(rng: np.random.Generator, path: Path) -> str:
    from explainable_mri.config import load_config

    values = load_config(path).model_dump(mode="json")
    places: list[tuple] = []

    def walk(value: dict, place: tuple) -> None:
        for key, inner in value.items():
            places.append((*place, key))
            if isinstance(inner, dict):
                walk(inner, (*place, key))

    walk(values, ())
    place = [one for one in places if one not in (("training", "epochs"), ("training", "patience"))][rng.integers(len(places) - 2)]
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value = _WRONG[rng.integers(len(_WRONG))]
    write(path, yaml.safe_dump(values).encode())
    return f"valid: {'.'.join(map(str, place))} set to {str(value)[:30]!r}"


def config_params(rng: np.random.Generator, path: Path) -> str:
    from explainable_mri import registry

    kinds = {"cohort": registry.COHORTS, "split": registry.SPLITS, "model": registry.NETWORKS, "loss": registry.LOSSES,
             "transforms": registry.TRANSFORMS, "explainer": registry.EXPLAINERS, "measures": registry.MEASURES}
    kind = str(rng.choice(sorted(kinds)))
    name = str(rng.choice(kinds[kind].names()))
    known = [one for one in inspect.signature(kinds[kind][name]).parameters if one not in ("args", "kwargs", "params", "description")] or ["x"]
    parameter, value = str(rng.choice(known)), _WRONG[rng.integers(len(_WRONG))]
    part = {"name": name, "params": {parameter: value}}
    values = yaml.safe_load(path.read_text())
    if kind in ("explainer", "measures"):
        values["explanation"] = {kind: part if kind == "explainer" else [part]}
    else:
        values[kind] = [part] if kind == "transforms" else part
    write(path, yaml.safe_dump(values).encode())
    return f"valid: {kind} {name} with {parameter}={str(value)[:30]!r}"


_TEXTS = {
    "an alias": "base: tiny.yaml\nname: &a x\nresults: *a\n", "many aliases": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
    "a key twice": "base: other.yaml\ntraining: {epochs: 1, epochs: 3}\n", "a section twice": "base: other.yaml\nseed: 1\nseed: 2\n",
    "based on itself": "base: tiny.yaml\n", "based on /dev/zero": "base: /dev/zero\n", "based on a list": "base: [a, b]\n",
    "based on nothing": "base: nowhere.yaml\n", "based on a folder": "base: data\n", "deep": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "code": "name: !!python/object/apply:os.system ['true']\n", "a tab": "name:\tx\n\tseed: 1\n", "a list": "- a\n- b\n", "a word": "demo\n",
    "bad unicode": "name: \udce4\n", "two documents": "name: a\n---\nname: b\n", "numbers as keys": "1: 2\n", "a million workers": "base: other.yaml\ntraining: {workers: 1000000}\n",
    "long number": "seed: " + "9" * 5000 + "\n", "gpu": "base: other.yaml\ntraining: {accelerator: gpu, epochs: 1}\n",
    "a merge key": "base: other.yaml\ntraining: {<<: {epochs: 1}}\n", "a date": "name: 2020-01-01\nseed: 2020-01-01\n",
}


def config_text(rng: np.random.Generator, path: Path) -> str:
    shutil.copy(path, path.with_name("other.yaml"))
    name = str(rng.choice(sorted(_TEXTS)))
    write(path, _TEXTS[name].encode(errors="surrogateescape"))
    return ("valid: " if name in ("a merge key", "a date") else "") + name


# Networks

def use_model(path: Path) -> tuple[dict, list[str]]:
    "Load a model and predict a scan."
    from explainable_mri.inference import load_model

    path = path.parent if path.parent.name == "native" else path
    model = load_model(path, **({} if path.suffix == ".ckpt" else {"grid": "mni_3mm"}))
    prediction = model.predict("scan.nii.gz", PERSON if model.residuals else None)
    return {"values": prediction.values, "outputs": model.task.outputs}, list(prediction.notes)


def use_import(path: Path) -> tuple[dict, list[str]]:
    "Import a Keras file by the command line, and use what it wrote."
    from explainable_mri.cli import main

    try:
        main(["--debug", "import-keras", str(path), "out"], standalone_mode=False)
    except BaseException:
        assert not Path("out").exists(), "a file was refused, and half of it written"
        raise
    return use_model(Path("out"))


def checkpoint_content(rng: np.random.Generator, path: Path) -> str:
    content = torch.load(path, weights_only=True)
    meta, weights = content["explainable_mri"], content["state_dict"]
    names = sorted(weights)
    name = str(rng.choice(names))
    how = str(rng.choice(["weight dropped", "weight of another shape", "NaN weight", "surplus weight", "weight of text", "grid", "residuals", "epoch",
                          "task", "network", "input_shape", "params", "no metadata", "list", "covariate renamed", "huge network", "ranges"]))
    if how == "weight dropped":
        del weights[name]
    elif how == "weight of another shape":
        weights[name] = torch.zeros(3, 7)
    elif how == "NaN weight":
        weights[name] = weights[name].float() * float("nan")
    elif how == "surplus weight":
        weights["network.surplus.weight"] = torch.zeros(3)
    elif how == "weight of text":
        weights[name] = "text"
    elif how == "grid":
        meta["metadata"]["grid"] = ["nowhere", {"name": "x"}, 3, {"name": "x", "shape": [1, 2], "affine": [[1]], "field_of_view": []}][rng.integers(4)]
    elif how == "residuals":
        meta["metadata"]["residuals"] = [3, {}, {"encoding": {}, "means": None, "coefficients": torch.zeros(2)}][rng.integers(3)]
    elif how == "covariate renamed":
        encoding = meta["metadata"]["residuals"]["encoding"]
        encoding["height"] = encoding.pop("age")
    elif how == "ranges":
        meta["metadata"]["residuals"]["ranges"] = [5, {"mean": "x"}, {}][rng.integers(3)]
    elif how == "epoch":
        meta["epoch"] = "soon"
    elif how == "task":
        meta["task"] = [{}, {"kind": "x"}, {"kind": "classification", "classes": {"A": ["A"], "B": ["B"], "C": ["C"]}}][rng.integers(3)]
    elif how == "network":
        meta["network"] = [{"name": "nothing", "params": {}}, {"name": 3}, None, {"name": "dyrba2021", "params": {"dropout": "x"}}][rng.integers(4)]
    elif how == "input_shape":
        meta["input_shape"] = [[1, 1, 1], [50, 60], ["a", "b", "c"], [10**6] * 3][rng.integers(4)]
    elif how == "params":
        meta["network"]["params"] = {"surplus": 1}
    elif how == "huge network":
        meta["network"]["params"] = {"filters": 10**9}
    elif how == "no metadata":
        del content["explainable_mri"]
    else:
        content = [content]
    path.unlink()
    torch.save(content, path)
    return f"{how} ({name})"


def checkpoint_weights(rng: np.random.Generator, path: Path) -> str:
    content = torch.load(path, weights_only=True)
    name = str(rng.choice(sorted(name for name, value in content["state_dict"].items() if value.is_floating_point() and value.numel() > 1)))
    content["state_dict"][name] = content["state_dict"][name].flip(0) + 0.1
    path.unlink()
    torch.save(content, path)
    return f"weights of {name} edited"


def keras_content(rng: np.random.Generator, path: Path) -> str:
    with h5py.File(path, "a") as file:
        how = str(rng.choice(["weight of another shape", "weight dropped", "NaN", "integers", "external storage", "external link", "soft link",
                              "huge shape", "config", "no config", "group for a weight"]))
        name = "model_weights/out/out/kernel:0"
        if how == "config":
            text = file.attrs["model_config"]
            old, new = [("Conv3D", "Conv9D"), ('"units": 2', '"units": 1000000000000'), ('"filters": 2', '"filters": -2'), ("relu", "mystery"),
                        ("valid", "same"), ("softmax", "linear"), ("50, 60, 50", "5, 6, 5"), ("Flatten", "Lambda")][rng.integers(8)]
            file.attrs["model_config"] = text.replace(old, new)
            return f"{'valid: ' if new in ('linear', 'same') else ''}{old} became {new}"
        if how == "no config":
            del file.attrs["model_config"]
            return how
        values = file[name][:]
        del file[name]
        if how == "weight of another shape":
            file[name] = values[:-1]
        elif how == "NaN":
            file[name] = values * np.nan
        elif how == "integers":
            file[name] = (values * 100).astype(np.int8)
        elif how == "external storage":
            file.create_dataset(name, values.shape, values.dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        elif how == "external link":
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
        elif how == "soft link":
            file[name] = h5py.SoftLink("/model_weights/out/out/bias:0")
        elif how == "huge shape":
            file.create_dataset(name, (10**6, 10**5), np.float32, chunks=(1000, 1000), compression="gzip")
        elif how == "group for a weight":
            file.create_group(name)
        return how


def native_weights(rng: np.random.Generator, path: Path) -> str:
    weights = load_file(path)
    name, how = str(rng.choice(sorted(weights))), str(rng.choice(["dropped", "another shape", "another type", "surplus", "renamed", "NaN"]))
    if how == "dropped":
        del weights[name]
    elif how == "another shape":
        weights[name] = weights[name][..., :1].contiguous()
    elif how == "another type":
        weights[name] = weights[name].to(torch.int32)
    elif how == "surplus":
        weights["surplus"] = torch.zeros(2)
    elif how == "renamed":
        weights[f"{name}x"] = weights.pop(name)
    else:
        weights[name] = weights[name] * float("nan")
    path.unlink()
    save_file(weights, path)
    return f"{name} {how}"


def native_edited(rng: np.random.Generator, path: Path) -> str:
    weights = load_file(path)
    name = str(rng.choice(sorted(weights)))
    weights[name] = weights[name] + 0.1
    path.unlink()
    save_file(weights, path)
    return f"weights of {name} edited"


# Results and caches

def use_results(path: Path) -> tuple[dict, list[str]]:
    "Train, explain and report what is there already."
    from explainable_mri.config import load_config
    from explainable_mri.experiments.explain import explain_fold, read_explanations
    from explainable_mri.experiments.report import write_experiment_report
    from explainable_mri.experiments.train import metrics_table, train_fold

    config = load_config("tiny.yaml")
    folder = train_fold(config)
    explain_fold(config)
    report = write_experiment_report(config).read_text(encoding="utf-8")
    table, scans = metrics_table(config, [folder]), read_explanations([folder]).drop(columns=["path", "relevance_map", "truth"])
    size = {"pictures": report.count("<img"), "headings": report.count("<h2")}
    return {"metrics": table.to_dict("list"), "scans": scans.to_dict("list"), **size}, []


def other_experiment(rng: np.random.Generator, path: Path) -> str:
    import pandas as pd

    if path.suffix == ".csv":
        table = pd.read_csv(path)
        column = str(rng.choice(list(table)))
        how = str(rng.choice(["reversed", "row dropped", "first value", "dropped"]))
        if how == "reversed":
            table[column] = table[column].to_numpy()[::-1]
        elif how == "row dropped":
            table = table.drop(index=0)
        elif how == "first value":
            table.loc[0, column] = table[column].iloc[-1]
        else:
            table = table.drop(columns=column)
        path.unlink()
        table.to_csv(path, index=False)
        return f"column {column} {how}"
    if path.suffix == ".json":
        return changes.json_value(rng, path)
    if path.name.endswith(".nii.gz"):
        return changes.voxels(rng, path)
    return changes.flip(rng, path)


def use_cache(path: Path) -> tuple[dict, list[str]]:
    "Prepare the maps of a cohort, some of which are in a cache."
    from explainable_mri.config import load_config
    from explainable_mri.data.cache import load_volumes
    from explainable_mri.experiments.folder import load_cohort

    config = load_config("tiny.yaml", ["cache.folder=cache"])
    cohort = load_cohort(config)
    volumes = load_volumes(cohort.table, cohort.grid, config.cache)
    return {"sums": np.asarray(volumes).sum((1, 2, 3)), "first": np.array(volumes[0])}, []


# DICOM

_TAGS = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SeriesInstanceUID", "InstanceNumber", "BitsAllocated",
         "PixelRepresentation", "PatientAge", "PatientSex", "PatientName", "MagneticFieldStrength", "SeriesDescription", "SliceThickness", "Modality",
         "StudyDate", "PatientBirthDate", "PixelData", "SOPClassUID", "EchoTime", "ImageType", "SamplesPerPixel", "PhotometricInterpretation", "SOPInstanceUID"]


def dicom_tag(rng: np.random.Generator, path: Path) -> str:
    keyword, everywhere = str(rng.choice(_TAGS)), bool(rng.random() < 0.6)
    values = {"Rows": 1, "Columns": 60000, "BitsAllocated": 8, "PixelSpacing": [0, 0], "ImagePositionPatient": [0, 0, 0], "PatientAge": "999Y",
              "PatientSex": "X", "MagneticFieldStrength": 30000, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB",
              "ImageOrientationPatient": [1, 0, 0, 1, 0, 0], "Modality": "CT", "PixelRepresentation": 0, "SeriesDescription": "t1 +Gd"}
    value = values.get(keyword) if rng.random() < 0.5 else None
    files = sorted(path.parent.glob("*.dcm")) if everywhere else [path]
    for one in files:
        header = pydicom.dcmread(one)
        if keyword in header:
            del header[keyword]
        if value is not None:
            setattr(header, keyword, value)
        one.unlink()
        header.save_as(one)
    harmless = keyword.startswith(("Patient", "Study", "Series", "Magnetic", "Echo", "SliceT", "Pixel", "Instance")) and keyword not in (
        "PixelSpacing", "PixelData", "PixelRepresentation")
    return f"{'valid: ' if harmless else ''}{keyword} {'dropped' if value is None else f'set to {value}'} in {len(files)} files"


def dicom_files(rng: np.random.Generator, path: Path) -> str:
    files = sorted(path.parent.glob("*.dcm"))
    how = str(rng.choice(["slice missing", "slice twice", "only one slice", "slices swapped", "names shuffled", "one slice of another size"]))
    if how == "slice missing":
        files[len(files) // 2].unlink()
    elif how == "slice twice":
        shutil.copy(files[3], files[3].with_name("copy.dcm"))
    elif how == "only one slice":
        for one in files[1:]:
            one.unlink()
    elif how == "slices swapped":  # the places of two slices, which no file tells
        headers = [pydicom.dcmread(one) for one in files[:2]]
        headers[0].PixelData, headers[1].PixelData = headers[1].PixelData, headers[0].PixelData
        for header, one in zip(headers, files):
            one.unlink()
            header.save_as(one)
        how = f"valid: {how}"
    elif how == "names shuffled":
        for number, one in zip(rng.permutation(len(files)), files):
            one.rename(one.with_name(f"i{number}"))
    else:
        header = pydicom.dcmread(path)
        header.Rows = header.Rows - 1
        header.PixelData = header.PixelData[:header.Rows * header.Columns * 2]
        path.unlink()
        header.save_as(path)
    return how


def swap_members(rng: np.random.Generator, path: Path) -> str:
    with zipfile.ZipFile(path, "a") as packed:
        name = str(rng.choice(packed.namelist()))
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed.writestr(name, b"the same name again")
    return f"{name} twice"


_FOLD = "results/tiny/fold-1"
DOORS = [
    Door("grey-matter maps", ["scan.nii", "scan.nii.gz", "model.ckpt"], ["scan.nii", "scan.nii.gz"],
         [*BYTES, changes.header_field, changes.header_field, changes.header_field, changes.voxels, changes.geometry, changes.bomb], use_scan,
         valid=(changes.flip, changes.erase, changes.flip_start)),
    Door("raw scans", ["raw_nii", "raw_mgz", "raw_img"], ["raw_nii/*", "raw_mgz/*"],
         [*BYTES, changes.bomb], use_raw, valid=()),
    Door("raw NIfTI scans", ["raw_nii"], ["raw_nii/*"], [changes.header_field, changes.header_field, changes.voxels, changes.geometry], use_raw,
         valid=(changes.voxels, changes.geometry)),
    Door("raw MGH and Analyze scans", ["raw_mgz", "raw_img"], ["raw_mgz/*"], [mgh_field], use_raw),
    Door("tables", ["table.yaml", "participants.csv", "participants.tsv", "participants.xlsx", "data"], ["participants.*"],
         [*BYTES, *TABLES, *TABLES], use_table, valid=(changes.flip, changes.erase, changes.flip_start, changes.drop, changes.insert, changes.cut)),
    Door("configurations", ["tiny.yaml", "data"], ["tiny.yaml"],
         [*BYTES, *[config_value] * 6, *[config_params] * 12, *[config_text] * 8], use_config,
         valid=(changes.flip, changes.erase, changes.flip_start, changes.drop, changes.insert, changes.cut)),
    Door("checkpoints", ["model.ckpt", "scan.nii.gz"], ["model.ckpt"], [*BYTES, *[checkpoint_content] * 8, checkpoint_weights, changes.zip_member], use_model),
    Door("checkpoints of folds", ["results", "scan.nii.gz", "tiny.yaml"], [f"{_FOLD}/best.ckpt"], [*BYTES, checkpoint_weights, checkpoint_content], use_model),
    Door("caches", ["cache", "data", "tiny.yaml"], ["cache/*/*"], [*BYTES], use_cache),
    Door("caches' descriptions", ["cache", "data", "tiny.yaml"], ["cache/*/*.json"], [changes.json_value], use_cache),
    Door("results", ["results", "data", "tiny.yaml"],
         [f"{_FOLD}/*", f"{_FOLD}/explanations/*", f"{_FOLD}/explanations/relevance/*", "results/tiny/config.yaml"],
         [changes.cut, changes.flip, changes.other_kind, changes.no_file, other_experiment, other_experiment, other_experiment], use_results),
    Door("Keras files", ["network.hdf5", "network.keras", "scan.nii.gz"], ["network.hdf5", "network.keras"], [*BYTES], use_import,
         valid=(changes.flip, changes.erase), remedies=False),
    Door("Keras files' content", ["network.hdf5", "scan.nii.gz"], ["network.hdf5"], [keras_content], use_import, remedies=False),
    Door("Keras archives", ["network.keras", "scan.nii.gz"], ["network.keras"], [changes.zip_member, changes.zip_size], use_import, remedies=False),
    Door("native networks", ["native", "scan.nii.gz"], ["native/network.json", "native/weights.safetensors"], [*BYTES, *BYTES], use_model, remedies=False),
    Door("native networks' content", ["native", "scan.nii.gz"], ["native/network.json"], [changes.json_value], use_model, remedies=False),
    Door("native networks' weights", ["native", "scan.nii.gz"], ["native/weights.safetensors"], [native_weights, native_weights, native_edited], use_model, remedies=False),
    Door("DICOM", ["dicom", "enhanced"], ["dicom/s01/*", "enhanced/s01/*"], [*BYTES, *[dicom_tag] * 5], use_raw,
         valid=(changes.flip, changes.erase, changes.insert, changes.drop)),
    Door("DICOM series", ["dicom"], ["dicom/s01/*"], [dicom_files, dicom_tag], use_raw),
    Door("zip files", ["zipped"], ["zipped/s01.zip"], [*BYTES, *[changes.zip_member] * 4, changes.zip_size, swap_members], use_raw),
]
