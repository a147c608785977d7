"""The methods beside today's: they agree with Captum where it is right, and with the truth where it is not."""
import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explainable_mri.explainers.base import BaseExplainer, Explainer, ExplainerError, ExplanationWarning, build_explainer

SCAN = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = {"deep_lift": {}, "gradient_shap": {"samples": 8}, "guided_grad_cam": {}, "grad_cam_plus_plus": {}}


def make_network(*end):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2), *end).eval()


class Reused(nn.Module):
    "The same network; its ReLU is one module, used twice, or a function, also one that works in place."

    def __init__(self, relu):
        super().__init__()
        self.relu = relu
        self.first, _, self.second, _, _, self.last = make_network()

    def forward(self, x):
        return self.last(self.relu(self.second(self.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_explainers_that_leave_the_network_alone(name):
    network = make_network().train()
    before = [(module.training, len(module._forward_hooks), len(module._backward_hooks)) for module in network.modules()]
    explainer = build_explainer(name, network, **METHODS[name])
    assert isinstance(explainer, Explainer) and isinstance(explainer, BaseExplainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        found = explainer.explain(SCAN, [0, 1])
    assert found.relevance.shape == SCAN.shape and found.relevance.any() and found.target.tolist() == [0, 1]
    assert [(module.training, len(module._forward_hooks), len(module._backward_hooks)) for module in network.modules()] == before
    assert all(one.grad is None for one in network.parameters())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_], ids=["module", "in place", "function", "relu_"])
def test_no_relu_is_missed(name, relu):
    layer = {} if name in ("deep_lift", "gradient_shap") else {"layer": "second"}
    plain = build_explainer(name, make_network(), **METHODS[name] | ({"layer": "2"} if layer else {}))
    reused = build_explainer(name, Reused(relu), **METHODS[name] | layer)
    if relu is F.relu_ and name == "grad_cam_plus_plus":
        with pytest.raises(ExplainerError, match="changed in place"):
            reused.attribute(SCAN, 1)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        torch.testing.assert_close(reused.attribute(SCAN, 1), plain.attribute(SCAN, 1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_the_pre_activation_is_explained(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        found, expected = (build_explainer(name, network, **METHODS[name]).attribute(SCAN, 0)
                           for network in (make_network(nn.Softmax(1)), make_network()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


class Bends(nn.Module):
    "Steps that DeepLIFT's paper leaves to the gradient: a product, a softmax, a normalisation by the scan's own statistics."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.gate, self.pool, self.last = (
            nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 4, 1), nn.MaxPool3d(3, 2, 1), nn.Linear(108, 2))

    def forward(self, x):
        x = F.relu(self.norm(self.first(x) + 1))
        return self.last(self.pool(x * torch.sigmoid(self.gate(x)) + x.softmax(1)).flatten(1))


def test_deep_lift_adds_up_whatever_bends():
    network, start = Bends().eval(), torch.rand(1, 1, 8, 8, 8)
    check = build_explainer("deep_lift", network, baseline=start).explain(SCAN, 1).check
    difference = (network(SCAN) - network(start))[:, 1].detach()
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(as_tensor(check.expected), difference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(as_tensor(check.total), difference, rtol=1e-2, atol=1e-3)


def test_gradient_shap_is_captums():
    from captum import attr

    network, start = make_network(), torch.rand(3, 1, 8, 8, 8)
    ours = build_explainer("gradient_shap", network, samples=6, batch_size=6, baseline=start, seed=3).attribute(SCAN, 1)
    torch.manual_seed(3)
    np.random.seed(3)
    theirs = attr.GradientShap(network).attribute(SCAN.clone(), start, n_samples=6, target=1)
    torch.testing.assert_close(ours, theirs.detach())


def test_grad_cam_plus_plus_is_monais_for_one_scan():
    from monai.visualize import GradCAMpp

    network = make_network()
    ours = build_explainer("grad_cam_plus_plus", network, layer="2").attribute(SCAN[:1], 1)
    theirs = GradCAMpp(copy.deepcopy(network), "2").compute_map(SCAN[:1], torch.tensor([1])).detach()
    theirs = F.interpolate(theirs, (8, 8, 8), mode="trilinear")
    torch.testing.assert_close(ours / ours.max(), theirs / theirs.max(), rtol=1e-4, atol=1e-5)


def test_wrong_parameters_are_refused():
    for name, params, words in [("deep_lift", {"baseline": torch.zeros(1, 1, 2, 2, 2)}, "is not that of the inputs"),
                                ("gradient_shap", {"samples": 0}, "at least 1 sample"),
                                ("guided_grad_cam", {"layer": "none"}, "no layer 'none'")]:
        with pytest.raises(ExplainerError, match=words):
            build_explainer(name, make_network(), **params).attribute(SCAN, 1)


def test_guided_grad_cam_is_captums_where_it_sees_every_relu():
    from captum import attr

    network = make_network()
    ours = build_explainer("guided_grad_cam", network, layer="2").attribute(SCAN, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum tells of its hooks
        theirs = attr.GuidedGradCam(network, network[2]).attribute(SCAN.clone().requires_grad_(), 1, interpolate_mode="trilinear")
    torch.testing.assert_close(ours, theirs.detach())
