"Every reference map that iNNvestigate made: does LRP give the same? Prints a table (pytest -s)."
from pathlib import Path

import numpy as np
import pytest
import torch

from explainable_mri.config import Component
from explainable_mri.explainers.gradients import build_explainer
from explainable_mri.models.keras import load_keras

SHARED = Path(__file__).parents[2] / "shared" / "reference"
PRESETS = {f"lrp.sequential_preset_{name}": {"epsilon": 1e-10} for name in ("a", "b", "a_flat", "b_flat")}
PARAMETERS = {**PRESETS, "lrp.epsilon": {"epsilon": 0.01}, "deep_taylor.bounded": {"low": -1.0, "high": 1.0}}
# Methods whose denominators stay away from zero agree to rounding; the others have poles that amplify it.
EXACT = {"lrp.sequential_preset_a", "lrp.sequential_preset_a_flat", "lrp.alpha_1_beta_0_IB", "lrp.z_plus", "gradient",
         "input_t_gradient", "deep_taylor", "deep_taylor.bounded"}
POLES = {"lrp.z", "lrp.alpha_2_beta_1"}  # on networks that add branches; compared by the share of voxels that agree
# In the constant background of a scan, rounding decides which voxel wins a pooling window.
BACKGROUND = {"gradient", "deconvnet", "guided_backprop", "lrp.flat", "lrp.w_square", "lrp.sequential_preset_a_flat"}

# The networks of the group take grey-matter maps between 0 and 1.
GROUP_PARAMETERS = {**PARAMETERS, "deep_taylor.bounded": {"low": 0.0, "high": 1.0}}

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason=f"the reference data is not at {SHARED}")
FILES = sorted([*SHARED.glob("keras_small/*.npz"), *SHARED.glob("keras_group/*_cv8.npz")])


def within_limit(network: str, analyzer: str, difference: float, agreeing: float) -> bool:
    "The limits of the references' README."
    branches = "resnet" in network or "densenet" in network
    if branches and analyzer in POLES:
        return agreeing >= 0.99
    if network.endswith("_cv8"):
        if analyzer in BACKGROUND:
            return difference < 0.2
        if "densenet" not in network:
            return difference < (1e-6 if "preset" in analyzer else 5e-3)
        return difference < (2e-4 if analyzer == "lrp.sequential_preset_a" else 1e-2)
    return difference < (1e-5 if analyzer in EXACT else 5e-3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_references(path: Path) -> None:
    "Logits agree to 1e-5 and every map within its limit."
    network = load_keras(path.with_suffix(".hdf5"))
    group = path.stem.endswith("_cv8")
    with np.load(path) as references, np.load(path.with_name("x.npz") if group else path) as source:
        inputs = torch.from_numpy(source["x"].astype(np.float32))[None, None]
        maps = {key: references[key] for key in references.files if key.count("|") == 1}
        with torch.no_grad():
            assert np.abs(network(inputs).numpy() - references["logits"]).max() < 1e-5
    failures, parameters = [], GROUP_PARAMETERS if group else PARAMETERS
    for key, expected in maps.items():
        analyzer, neuron = key.split("|")
        explainer = build_explainer(Component(name=analyzer, params=parameters.get(analyzer, {})), network)
        found = explainer.attribute(inputs, target=int(neuron))[0, 0].numpy()
        found = found[::4, ::4, ::4] if group else found
        # Deep Taylor maps of a negative logit are zero everywhere, and so must ours be.
        difference = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1e-30))
        agreeing = float((np.abs(found - expected) <= 0.01 * expected.std()).mean())
        good = within_limit(path.stem, analyzer, difference, agreeing)
        print(f"{path.stem:24} {key:32} {difference:8.1e}  {agreeing:8.3%}  {'' if good else 'over the limit'}", flush=True)
        if not good:
            failures.append(f"{key}: {difference:.1e}, {agreeing:.3%} of voxels agree")
    assert not failures, "\n".join(failures)
