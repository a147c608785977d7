"""Valid inputs for every door, made once by the program itself."""
import json
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd

CONFIG = """\
name: tiny
cohort: {name: phantom, params: {folder: data/tiny, scans: 32, seed: 1}}
split: {params: {folds: 2}}
training: {epochs: 1}
"""
TABLE_CONFIG = """\
name: listed
cohort: {name: table, params: {path: participants.csv}}
split: {params: {folds: 2}}
training: {epochs: 1}
"""
PERSON = {"age": 74, "sex": "F", "tiv": 1410, "field_strength": 3}
KERAS = {"class_name": "Sequential", "config": {"name": "small", "layers": [
    {"class_name": "Conv3D", "config": {"name": "conv", "filters": 2, "kernel_size": [5, 5, 5], "strides": [5, 5, 5], "padding": "valid",
                                        "activation": "relu", "use_bias": True, "batch_input_shape": [None, 50, 60, 50, 1]}},
    {"class_name": "Flatten", "config": {"name": "flatten"}},
    {"class_name": "Dense", "config": {"name": "out", "units": 2, "activation": "softmax", "use_bias": True}}]}}


def make_originals(folder: Path) -> None:
    "Fill a folder with valid inputs; the current folder must be this one."
    from explainable_mri.config import CacheConfig, load_config
    from explainable_mri.data.cache import load_volumes
    from explainable_mri.experiments.explain import explain_fold
    from explainable_mri.experiments.folder import load_cohort
    from explainable_mri.experiments.train import train_fold
    from explainable_mri.inference import load_model

    for name, text in (("tiny.yaml", CONFIG), ("table.yaml", TABLE_CONFIG)):
        (folder / name).write_text(text)
    config = load_config("tiny.yaml")
    cohort = load_cohort(config)
    fold = train_fold(config)
    explain_fold(config)
    load_model(fold).save(folder / "model.ckpt")
    make_volumes(folder, Path(cohort.table.path[0]))
    make_tables(folder, cohort.table)
    make_dicom(folder)
    make_keras(folder)
    load_volumes(cohort.table, cohort.grid, CacheConfig(folder=folder / "cache"))


def make_volumes(folder: Path, scan: Path) -> None:
    "A grey-matter map, and a raw scan in several formats."
    from explainable_mri.preprocessing.simulation import simulate_raw_scan

    image = nib.load(scan)
    nib.save(image, folder / "scan.nii")
    nib.save(image, folder / "scan.nii.gz")
    raw = simulate_raw_scan(seed=3, voxel_size=4.0).image
    for kind in ("nii", "mgz", "img"):
        (folder / f"raw_{kind}").mkdir()
    nib.save(raw, folder / "raw_nii" / "sub-01_T1w.nii.gz")
    nib.save(nib.MGHImage(np.asarray(raw.dataobj), raw.affine), folder / "raw_mgz" / "sub-01_T1w.mgz")
    nib.save(nib.AnalyzeImage(np.asarray(raw.dataobj), None, nib.AnalyzeHeader()), folder / "raw_img" / "sub-01_T1w.img")


def make_tables(folder: Path, table: pd.DataFrame) -> None:
    "The cohort's table in three formats."
    columns = ["path", "subject", "session", "group", "age", "sex", "tiv", "field_strength"]
    listed = table[columns].assign(path=[str(Path(path).relative_to(folder.resolve())) for path in table.path])
    listed.to_csv(folder / "participants.csv", index=False)
    listed.to_csv(folder / "participants.tsv", index=False, sep="\t")
    listed.to_excel(folder / "participants.xlsx", index=False)


def make_dicom(folder: Path) -> None:
    "A DICOM series in a folder, one in a single file, and one in a zip file."
    from explainable_mri.preprocessing.simulation import simulate_raw_scan, write_dicom, write_enhanced_dicom

    image = simulate_raw_scan(seed=3, voxel_size=4.0).image
    write_dicom(image, folder / "dicom" / "s01")
    write_enhanced_dicom(image, folder / "enhanced" / "s01" / "one.dcm")
    (folder / "zipped").mkdir()
    with zipfile.ZipFile(folder / "zipped" / "s01.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted((folder / "dicom" / "s01").iterdir()):
            packed.write(path, f"s01/{path.name}")


def make_keras(folder: Path) -> None:
    "A network as Keras 2 writes it, as Keras 3 does, and imported."
    from explainable_mri.models.keras import import_keras

    rng = np.random.default_rng(0)
    arrays = {"conv": [rng.normal(size=(5, 5, 5, 1, 2)), np.zeros(2)], "out": [rng.normal(size=(2400, 2)), np.array([0.1, -0.1])]}
    arrays = {name: [array.astype(np.float32) / 20 for array in both] for name, both in arrays.items()}
    with h5py.File(folder / "network.hdf5", "w") as file:
        file.attrs["model_config"], file.attrs["keras_version"] = json.dumps(KERAS), "2.15.0"
        for layer in ("conv", "flatten", "out"):
            group = file.create_group(f"model_weights/{layer}")
            group.attrs["weight_names"] = [f"{layer}/{name}:0" for name in ["kernel", "bias"][:len(arrays.get(layer, []))]]
            for name, array in zip(("kernel", "bias"), arrays.get(layer, [])):
                group[f"{layer}/{name}:0"] = array
    with h5py.File(folder / "weights.h5", "w") as file:
        for name, both in (("conv3d", arrays["conv"]), ("dense", arrays["out"])):
            for index, array in enumerate(both):
                file[f"layers/{name}/vars/{index}"] = array
    with zipfile.ZipFile(folder / "network.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(KERAS))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        archive.write(folder / "weights.h5", "model.weights.h5")
    (folder / "weights.h5").unlink()
    import_keras(folder / "network.hdf5", folder / "native")
