"""Imported Keras networks against TensorFlow's logits, and their maps against the scan."""

from pathlib import Path

import numpy as np
import pytest
import torch

from explainable_mri.data.volumes import get_grid, load_volume, save_volume
from explainable_mri.explainers.lrp import LRP
from explainable_mri.data.axes import AXES
from explainable_mri.models.keras import import_keras, layer_report, load_keras, load_network, native_weights
from explainable_mri.registry import NETWORKS

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
FILES = sorted(REFERENCE.glob("keras_*/*.hdf5"))
GROUP = [path for path in FILES if path.parent.name == "keras_group"]

pytestmark = pytest.mark.skipif(not FILES, reason=f"reference data absent: no Keras files below {REFERENCE}")


def read_input(path: Path) -> torch.Tensor:
    "The input of a reference, (1, 1, ...) with the network's axes."
    references = np.load(path.with_suffix(".npz"))
    volume = references["x"] if "x" in references else np.load(path.parent / "x.npz")["x"]
    return torch.from_numpy(volume)[None, None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_agree(path):
    network, references = load_keras(path), np.load(path.with_suffix(".npz"))
    with torch.no_grad():
        logits = network(read_input(path))
    np.testing.assert_allclose(logits.numpy(), references["logits"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(torch.softmax(logits, 1).numpy(), references["prob"], atol=1e-5)


@pytest.mark.parametrize("path", GROUP, ids=lambda path: path.stem)
def test_logits_of_group_networks_agree_as_modules_of_the_package(path):
    volume, references = read_input(path), np.load(path.with_suffix(".npz"))
    native = NETWORKS.build(path.stem.split("_")[0], volume.shape[2:], 2).eval()
    native.load_state_dict(native_weights(load_keras(path), native), strict=True)
    with torch.no_grad():
        np.testing.assert_allclose(native(volume).numpy(), references["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_native_format_keeps_the_network(path, tmp_path):
    report = import_keras(path, tmp_path)
    network = load_network(tmp_path)
    assert report.equals(layer_report(network))
    original = load_keras(path)
    torch.testing.assert_close(network.state_dict(), original.state_dict(), rtol=0, atol=0)
    with torch.no_grad():  # the same numbers elsewhere in memory may be summed in another order
        torch.testing.assert_close(network(read_input(path)), original(read_input(path)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", GROUP, ids=lambda path: path.stem)
def test_maps_of_group_networks_overlay_the_scan(path, tmp_path):
    network, grid = load_keras(path, axes="rostock"), get_grid("clinica_1mm")
    assert network.grid == grid.name
    assert network.input_shape == (1, *grid.cropped_shape)

    # the reference's volume, on the grid by plain NumPy, with a bright box that makes it asymmetric in all axes
    turned = read_input(path)[0, 0].numpy().copy()
    volume = np.ascontiguousarray(np.transpose(np.flip(turned), (1, 2, 0)))
    volume[30:50, 120:150, 40:60] += 0.5
    turned = np.ascontiguousarray(np.flip(np.transpose(volume, (2, 0, 1))))
    scan_path = save_volume(volume, tmp_path / "scan.nii.gz", grid)
    scan = torch.from_numpy(load_volume(scan_path, grid).array)[None, None].requires_grad_()
    logits = network(scan)
    [gradient] = torch.autograd.grad(logits[0, 1], scan)
    map_path = save_volume((gradient * scan)[0, 0].detach().numpy(), tmp_path / "map.nii.gz", grid)

    # the same network without axes, on the volume with its own axes
    same = torch.from_numpy(turned)[None, None].requires_grad_()
    [expected] = torch.autograd.grad(load_keras(path)(same)[0, 1], same)
    expected = np.transpose(np.flip((expected * same)[0, 0].detach().numpy()), (1, 2, 0))
    relevance = load_volume(map_path, grid)
    np.testing.assert_allclose(relevance, expected, atol=1e-6 * np.abs(expected).max())
    assert not relevance[load_volume(scan_path, grid) == 0].any()


@pytest.mark.parametrize("path", [path for path in FILES if path not in GROUP], ids=lambda path: path.stem)
def test_relevance_comes_out_on_the_grid(path):
    references, axes = np.load(path.with_suffix(".npz")), AXES["rostock"]
    explainer = LRP(load_keras(path, axes="rostock"), "sequential_preset_a", epsilon=1e-10)
    relevance = explainer.attribute(axes.to_grid(read_input(path)), 1)
    theirs = references["lrp.sequential_preset_a|1"]
    ours = axes.to_network(relevance)[0, 0].numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
