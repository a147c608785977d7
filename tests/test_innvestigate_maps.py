"""Small networks with every kind of layer against maps that iNNvestigate made; no reference data beside the repository.

`make_innvestigate_maps.py` made the files. Prints a table (pytest -s).
"""
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from explainable_mri.explainers.base import build_explainer
from explainable_mri.models.keras import load_keras

FILES = sorted((Path(__file__).parent / "data" / "innvestigate").glob("*.npz"))


def as_batch(array: np.ndarray) -> torch.Tensor:
    "A Keras batch, channels last, as a PyTorch batch."
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def test_files_are_there():
    assert len(FILES) == 11
    assert sum(path.stat().st_size for path in FILES[0].parent.iterdir()) < 300_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_maps_agree(path, tmp_path):
    file, failures = tmp_path / "network.hdf5", []
    file.write_bytes(gzip.decompress(path.with_suffix(".hdf5.gz").read_bytes()))
    network = load_keras(file)
    with np.load(path) as references:
        inputs, targets = as_batch(references["x"]), references["neurons"].tolist()
        with torch.no_grad():
            np.testing.assert_allclose(network(inputs).numpy(), references["logits"], atol=1e-5, rtol=1e-5)
        for key in references.files:
            if "|" not in key:
                continue
            name, parameters = key.split("|")
            explainer = build_explainer(name, network, **json.loads(parameters))
            found, expected = explainer.attribute(inputs, targets), as_batch(references[key])
            # What moving the input by a rounding error does to the map: near a pole, rounding is all there is to agree on.
            moved = explainer.attribute(inputs * (1 + 1e-7), targets)
            size = expected.norm().clamp(min=1e-30)
            difference, rounding = ((found - expected).norm() / size).item(), ((moved - found).norm() / size).item()
            limit = max(1e-5, min(20 * rounding, 5e-3))
            over = "" if difference < limit else "over the limit"
            print(f"{path.stem:14} {name:42} {difference:8.1e} {rounding:8.1e}  {over}")
            if not difference < limit:
                failures.append(f"{key}: {difference:.1e}, limit {limit:.1e}")
    assert not failures, "\n".join(failures)
