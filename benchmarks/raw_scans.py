"""Prepare simulated raw scans of known anatomy, each as DICOM and as NIfTI, and compare the maps with the template and the truth.

    python benchmarks/raw_scans.py --seeds 3 4 5 --grid mni_3mm

Each scan is simulated with a crude head and without, with a ball of fluid in the left hemisphere, written as a DICOM series
and as a NIfTI file in another orientation, and both are prepared by `prepare`. The result, a table, goes to
`benchmarks/RESULTS.md`.
"""
import argparse
import itertools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from results import write_section

from explainable_mri.data.atlases import load_brain_mask, load_template
from explainable_mri.data.dicom import simulate_raw_scan, write_dicom
from explainable_mri.data.volumes import get_grid, load_volume
from explainable_mri.experiments.prepare import prepare

LESION = (-40, -30, 20, 14)  # centre and radius in mm, on the left
AXES = ("LPS", "ASL", "SRP", "LIA", "PIR")


def lesion_share(grey: np.ndarray, grid, side: int) -> float:
    "Grey matter in the lesion (side 1) or at its mirror image (side -1), relative to what is expected there."
    places = nib.affines.apply_affine(grid.cropped_affine, np.moveaxis(np.indices(grid.cropped_shape), 0, -1))
    ball = np.linalg.norm(places - np.array(LESION[:3]) * [side, 1, 1], axis=-1) < 10
    expected = load_template(grid)
    return float(grey[ball].sum() / grey.sum() * expected.sum() / expected[ball].sum())


def measure(seed: int, head: bool, grid) -> dict:
    "Prepare a scan both ways."
    scan = simulate_raw_scan(seed, voxel_size=min(2.0, grid.voxel_size[0]), head=head, lesion=LESION)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "study"), Path(folder, "prepared")
        write_dicom(scan.image, source / "dicom")
        turned = scan.image.as_reoriented(nib.orientations.axcodes2ornt(AXES[seed % len(AXES)]))
        nib.save(turned, source / "nifti.nii.gz")
        table = pd.read_csv(prepare(source, out, grid=grid.name), sep="\t").set_index("subject")
        dicom, nifti = (load_volume(out / table.loc[way, "path"], grid) for way in ("dicom", "nifti"))
    brain, row = load_brain_mask(grid), table.loc["dicom"]
    return {"seed": seed, "head": "crude head" if head else "brain alone", "DICOM": row["correlation"],
            "NIfTI": table.loc["nifti", "correlation"], "both ways": np.corrcoef(dicom[brain], nifti[brain])[0, 1],
            "TIV": row["tiv"] / scan.volume("brain"), "grey matter": row["gm_volume"] / scan.volume("grey_matter"),
            "lesion left": lesion_share(dicom, grid, 1), "lesion right": lesion_share(dicom, grid, -1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--grid", default="mni_3mm")
    parser.add_argument("--csv", type=Path, help="also add each row to this file")
    options = parser.parse_args()
    rows = []
    for seed, head in itertools.product(options.seeds, (True, False)):
        rows.append(measure(seed, head, get_grid(options.grid)))
        print(rows[-1], flush=True)
        if options.csv:
            pd.DataFrame(rows[-1:]).to_csv(options.csv, mode="a", index=False, header=not options.csv.exists())


if __name__ == "__main__":
    main()
