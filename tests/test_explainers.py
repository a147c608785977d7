"""What all explainers share, at its edges: inputs, outputs, decisions, checks, and the layer at which Grad-CAM looks."""
import copy
import warnings

import pytest
import torch
from torch import nn

from explainable_mri.explainers.base import (
    BaseExplainer, Explainer, ExplainerError, ExplanationWarning, build_explainer, check_inputs, choose_targets, input_errors,
    network_logits)
from explainable_mri.explainers.gradcam import GradCam
from explainable_mri.explainers.gradients import GradientExplainer, IntegratedGradients, SmoothGrad

METHODS = ["gradient", "input_t_gradient", "integrated_gradients", "smoothgrad", "grad_cam", "deconvnet", "guided_backprop", "lrp.z"]
FAST = {"smoothgrad": {"samples": 8, "deviation": 0.1}, "integrated_gradients": {"steps": 64, "convention": "standard"}}


def make_network(*end: nn.Module, outputs: int = 2) -> nn.Sequential:
    "A small network on (1, 8, 8, 8)."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, outputs), *end).eval()


SCAN = torch.randn(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_explainers_leave_the_network_as_it_was(name):
    network = make_network().train()
    before = [(module.training, len(module._forward_hooks)) for module in network.modules()]
    explainer = build_explainer(name, network, **FAST.get(name, {}))
    assert isinstance(explainer, Explainer) and isinstance(explainer, BaseExplainer)
    assert explainer.attribute(SCAN).shape == SCAN.shape
    assert [(module.training, len(module._forward_hooks)) for module in network.modules()] == before
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["gradcam", "lrp.sequential_preset"])
def test_a_wrong_name_is_met_with_the_right_one(name):
    with pytest.raises(ValueError, match="Did you mean"):
        build_explainer(name, make_network())


@pytest.mark.parametrize("make, words", [
    (lambda network: IntegratedGradients(network, steps=1), "at least 2 steps"),
    (lambda network: IntegratedGradients(network, convention="standrad"), "Did you mean 'standard'"),
    (lambda network: IntegratedGradients(network, baseline=SCAN[0]).attribute(SCAN), "is not that of the inputs"),
    (lambda network: IntegratedGradients(network, baseline="zero").attribute(SCAN), "must be a number or a tensor"),
    (lambda network: SmoothGrad(network, samples=0), "at least 1 sample"),
    (lambda network: GradientExplainer(lambda x: x), "torch.nn.Module"),
])
def test_parameters_are_checked(make, words):
    with pytest.raises(ExplainerError, match=words):
        make(make_network())


def test_half_precision_works_where_it_can():
    full = SmoothGrad(make_network(), samples=8, deviation=0.1).attribute(SCAN, 1)
    half = SmoothGrad(copy.deepcopy(make_network()).half(), samples=8, deviation=0.1).attribute(SCAN.half(), 1)
    assert (half - full).norm() < 0.05 * half.norm()


@pytest.mark.parametrize("wrong", [SCAN[:0], SCAN.long(), torch.ones(4), SCAN.numpy()], ids=["none", "integers", "flat", "NumPy"])
def test_inputs_must_be_a_batch(wrong):
    with pytest.raises(ExplainerError, match="must be a tensor"):
        check_inputs(wrong)


def test_inputs_must_be_finite():
    with pytest.raises(ExplainerError, match="512 values that are not finite, of 1536"):
        check_inputs(torch.where(torch.arange(3).reshape(3, 1, 1, 1, 1) == 1, torch.nan, SCAN))


@pytest.mark.parametrize("wrong, words", [
    (torch.ones(2, 3, 8, 8, 8), r"shape \(2, 3, 8, 8, 8\) and type float32: its first convolution takes a batch \(N, 1, ...\)"),
    (torch.ones(1, 8, 8, 8), "with 3 spatial axes"), (SCAN.double(), "its weights are float32. Convert"),
    (torch.ones(1, 1, 9, 8, 8), "mat1 and mat2")])
def test_inputs_that_do_not_fit_are_named(wrong, words):
    with pytest.raises(ExplainerError, match=words), input_errors(make_network(), wrong):
        make_network()(wrong)


@pytest.mark.parametrize("target", [2, -1, [0, 1], "AD", 0.5, True])
def test_targets_are_checked(target):
    with pytest.raises(ExplainerError):
        choose_targets(torch.zeros(3, 2), target)


class Ending(nn.Module):
    "A network whose end is written in `forward`."

    def __init__(self, end, outputs=2):
        super().__init__()
        self.network, self.end = make_network(outputs=outputs), end

    def forward(self, x):
        return self.end(self.network(x))


@pytest.mark.parametrize("outputs, end", [
    (2, nn.Softmax(1)), (2, nn.LogSoftmax(1)), (2, lambda x: torch.softmax(x, dim=1)), (2, lambda x: x.softmax(-1)),
    (2, nn.Sigmoid()), (1, nn.Sigmoid()), (1, lambda x: torch.sigmoid(x).squeeze(1)), (2, lambda x: {"out": x}),
    (2, lambda x: nn.functional.softmax(x.flatten(1), 1)), (2, lambda x: (x.log_softmax(1),))],
    ids=["Softmax", "LogSoftmax", "softmax", "method", "two sigmoids", "one sigmoid", "squeezed", "dictionary", "F.softmax", "tuple"])
def test_all_methods_explain_the_pre_activation(outputs, end):
    network, plain = Ending(end, outputs), make_network(outputs=outputs)
    torch.testing.assert_close(network_logits(network, SCAN)[0], plain(SCAN))
    for name in METHODS:
        found = build_explainer(name, network, **FAST.get(name, {})).attribute(SCAN, 0)
        expected = build_explainer(name, plain, **FAST.get(name, {})).attribute(SCAN, 0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item(), msg=f"{name} differs")


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_changes_its_input_is_explained_as_if_it_did_not(name):
    class Centre(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.inplace = inplace

        def forward(self, x):
            return x.sub_(0.5) if self.inplace else x - 0.5

    scan, maps = SCAN.clone(), []
    for inplace in (True, False):
        network = nn.Sequential(Centre(inplace), nn.ReLU(inplace=inplace), *make_network())
        maps.append(build_explainer(name, network, **FAST.get(name, {})).attribute(scan, 0))
    assert torch.equal(scan, SCAN)
    torch.testing.assert_close(*maps)


class ZScore(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return (x - x.mean((1, 2, 3, 4), keepdim=True)) / (x.std((1, 2, 3, 4), keepdim=True) + self.eps)


def test_integrated_gradients_that_miss_their_sum_say_so():
    for convention in ("innvestigate", "standard"):
        with pytest.raises(ExplainerError, match="no finite number for the baseline"):
            IntegratedGradients(nn.Sequential(ZScore(0), make_network()), convention=convention).attribute(SCAN, 0)
        with pytest.warns(ExplanationWarning, match="misses its sum"):
            IntegratedGradients(nn.Sequential(ZScore(1e-6), make_network()), convention=convention).attribute(SCAN, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = IntegratedGradients(make_network(), convention="standard").explain(SCAN, 0).check
    assert check.holds and max(check.error) < 0.05
    difference = make_network()(SCAN)[:, 0] - make_network()(0 * SCAN)[:, 0]
    torch.testing.assert_close(torch.tensor(check.expected), difference.double(), check_dtype=False)


def test_a_map_that_is_not_finite_is_refused():
    class Root(nn.Module):
        def forward(self, x):
            return x.clamp(min=0).sqrt()

    network = nn.Sequential(Root(), make_network())
    with pytest.raises(ExplainerError, match="not finite"):
        GradientExplainer(network).attribute(0 * SCAN, 0)


class Turned(nn.Module):
    "A network that takes its input turned, in one of several ways."

    def __init__(self, turn):
        super().__init__()
        self.turn, self.network = turn, nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x):
        return self.network(self.turn(x))


@pytest.mark.parametrize("there, back", [
    (lambda x: x.permute(0, 1, 4, 2, 3).flip([2, 3, 4]), lambda x: x.flip([2, 3, 4]).permute(0, 1, 3, 4, 2)),
    (lambda x: torch.flip(x, dims=(2,)), lambda x: x.flip(2)), (lambda x: x.transpose(2, 4), lambda x: x.transpose(2, 4)),
    (lambda x: x.mT.flip(-1), lambda x: x.flip(-1).mT), (lambda x: torch.rot90(x, 1, (2, 3)), lambda x: torch.rot90(x, -1, (2, 3))),
    (lambda x: x.movedim(2, 4), lambda x: x.movedim(4, 2)),
    (lambda x: x.squeeze(1).permute(0, 3, 2, 1).unsqueeze(1), lambda x: x.transpose(2, 4))])
def test_grad_cam_comes_back_on_the_grid(there, back):
    torch.manual_seed(0)
    network, scan = Turned(there).eval(), torch.rand(1, 1, 8, 10, 12)
    expected = back(GradCam(network.network, positive=False).attribute(there(scan).contiguous(), 0))
    torch.testing.assert_close(GradCam(network, positive=False).attribute(scan, 0), expected)


class Block(nn.Module):
    "A residual block with a shortcut convolution and a gate, as people list them."

    def __init__(self):
        super().__init__()
        self.conv, self.shortcut = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(1, 4, 1)
        self.gate, self.attention, self.head = nn.Conv3d(4, 4, 1), nn.Conv3d(4, 1, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3, 4), keepdim=True)))
        y = torch.sigmoid(self.attention(y)) * y
        return self.head((y + self.shortcut(x)).mean((2, 3, 4)))


def test_grad_cam_looks_at_the_main_path():
    assert GradCam(Block().eval()).explain(SCAN).layer == "conv"
    assert GradCam(Block().eval(), "shortcut").explain(SCAN).layer == "shortcut"
