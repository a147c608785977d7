"""Occlusion, feature ablation and KernelSHAP against plain loops and known answers, alone and behind a model."""
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from explainable_mri.data.atlases import load_atlas
from explainable_mri.data.residuals import ResidualModel
from explainable_mri.data.volumes import Volume, get_grid
from explainable_mri.explainers.base import BaseExplainer, ExplainerError, build_explainer, network_logits
from explainable_mri.explainers.perturbations import Cubes, Occlusion, Patched
from explainable_mri.inference import Model, ModelError
from explainable_mri.models.networks import alexnet, dyrba2021, vgg

SCAN = torch.rand(2, 1, 9, 8, 7, generator=torch.Generator().manual_seed(0))
SCAN[:, :, :4] = 0
REGIONS = torch.arange(9)[:, None, None].expand(9, 8, 7) // 2
PARAMS = {"occlusion": {"radius": 2}, "feature_ablation": {"regions": REGIONS}, "kernel_shap": {"regions": REGIONS, "samples": 40}}


def make_network(*end, shape=(9, 8, 7)):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(3), nn.Flatten(), nn.Linear(81, 2), *end).eval()


@pytest.mark.parametrize("name", PARAMS)
def test_methods_explain_the_pre_activation_and_leave_the_network_alone(name):
    network = make_network().train()
    explainer = build_explainer(name, network, **PARAMS[name])
    assert isinstance(explainer, BaseExplainer) and network.training
    found = explainer.explain(SCAN, [0, 1])
    assert network.training and found.relevance.shape == SCAN.shape and found.relevance.any()
    again = build_explainer(name, make_network(nn.Softmax(1)), **PARAMS[name]).attribute(SCAN, [0, 1])
    torch.testing.assert_close(again, found.relevance)


@pytest.mark.parametrize("batch_size, residual", [(1, False), (7, False), (7, True)])
def test_occlusion_is_the_plain_loop(batch_size, residual):
    network, subtracted = make_network(), torch.rand(SCAN.shape) if residual else torch.zeros(SCAN.shape)
    explainer = Occlusion(network, 2, 3, batch_size=batch_size, scans=SCAN if residual else None, method="lrp.z")
    found = explainer.maps(SCAN - subtracted, [0, 1])
    for number, target in ((0, 0), (1, 1)):
        for centre in itertools.product(*(range((size - 1) % 3 // 2, size, 3) for size in (9, 8, 7))):
            one = SCAN[number:number + 1].clone()
            one[(..., *(slice(max(at - 2, 0), at + 3) for at in centre))] *= 0.5
            one -= subtracted[number]
            logits, relevance = network(one).detach(), build_explainer("lrp.z", network).attribute(one, target)
            expected = [logits[0, target], logits.softmax(1)[0, target], relevance.clamp(min=0).sum(), relevance.clamp(max=0).sum()]
            values = [one[(number, *centre)] for one in (found.logit, found.probability, found.positive, found.negative)]
            torch.testing.assert_close(torch.stack(values), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.evaluations < 2 * len(Cubes((9, 8, 7), 2, 3).centres())


@pytest.mark.parametrize("build", [dyrba2021, alexnet, vgg, lambda shape: make_network(shape=shape), lambda shape: nn.Sequential(
    nn.Conv3d(1, 3, 3, stride=2), nn.ReLU(inplace=True), nn.InstanceNorm3d(3), nn.AdaptiveAvgPool3d(3), nn.Flatten(), nn.Linear(81, 2), nn.Softmax(1))])
def test_what_a_cube_does_not_change_is_not_computed_again(build):
    "The group's CNN among others, on boxes around the cube up to the first layer that looks further, equals the plain loop."
    shape, radius, step = (19, 21, 16), 3, 5
    torch.manual_seed(0)
    network = build(shape).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):  # as after training
            nn.init.uniform_(layer.running_mean), nn.init.uniform_(layer.running_var, 0.5, 2), nn.init.uniform_(layer.bias)
    scan, expected = torch.rand(1, 1, *shape), torch.rand(1, 1, *shape)
    found = Occlusion(network, radius, step, batch_size=7, scans=scan).maps(scan - expected, 1)
    for centre in Cubes(shape, radius, step).centres():
        one = scan.clone()
        one[(..., *Cubes(shape, radius, step).part(centre))] *= 0.5
        with torch.no_grad():
            logits, _ = network_logits(network, one - expected)
        assert abs(found.logit[(0, *centre)] - logits[0, 1]) < 1e-5
    local = len(Patched(network, (scan - expected)[0]).steps)
    assert local == {dyrba2021: 12, alexnet: 13}.get(build, local) and local >= 2


def test_a_network_that_is_no_sequence_or_has_hooks_is_applied_to_whole_scans():
    network = make_network()
    assert len(Patched(network, SCAN[0]).steps) == 2
    network[1].register_forward_hook(lambda *_: None)
    assert len(Patched(network, SCAN[0]).steps) == 1  # up to the hook
    network.register_forward_hook(lambda *_: None)
    assert not Patched(network, SCAN[0]).steps


def test_feature_ablation_is_captums():
    from captum import attr

    network = make_network()
    ours = build_explainer("feature_ablation", network, regions=REGIONS, baseline=0.2).attribute(SCAN, 1)
    theirs = attr.FeatureAblation(network).attribute(SCAN, 0.2, 1, feature_mask=REGIONS[None, None])
    sizes = REGIONS.flatten().bincount()[REGIONS]
    torch.testing.assert_close((ours * sizes)[..., REGIONS > 0], theirs[..., REGIONS > 0].detach())
    assert not ours[..., REGIONS == 0].any()


def test_kernel_shap_is_shapley():
    network, numbers = make_network(), range(1, 5)
    value = lambda on: network(torch.where((REGIONS == 0) | torch.isin(REGIONS, torch.tensor(on, dtype=torch.int64)), SCAN[:1], 0.0))[0, 1].item()
    orders = list(itertools.permutations(numbers))
    truth = [np.mean([value(o[:o.index(n) + 1]) - value(o[:o.index(n)]) for o in orders]) for n in numbers]
    found = build_explainer("kernel_shap", network, regions=REGIONS, samples=3000, batch_size=64).explain(SCAN[:1], 1)
    shares = [found.relevance[0, 0][REGIONS == number].sum().item() for number in numbers]
    np.testing.assert_allclose(shares, truth, atol=0.03 * np.abs(truth).max())
    assert found.check.holds


@pytest.mark.parametrize("name, params, words", [
    ("occlusion", {"radius": -1}, "a radius of 0 or more"), ("occlusion", {"scans": SCAN[:1]}, "The scans have the shape"),
    ("feature_ablation", {"regions": torch.zeros(9, 8, 7).long()}, "whole numbers"),
    ("feature_ablation", {"regions": REGIONS.float()}, "whole numbers"), ("kernel_shap", {"regions": REGIONS, "samples": 5}, "4 regions and 5 samples"),
    ("kernel_shap", {"regions": REGIONS[1:]}, "The regions have the shape")])
def test_wrong_parameters_are_refused(name, params, words):
    with pytest.raises(ExplainerError, match=words):
        build_explainer(name, make_network(), **params).attribute(SCAN, 1)


def test_a_model_halves_the_scan_and_knows_the_atlas():
    grid = get_grid("mni_3mm")
    draws, table = np.random.default_rng(0), pd.DataFrame({"path": ["a"] * 8, "age": np.linspace(60, 80, 8)})
    volumes = draws.random((8, *grid.cropped_shape), np.float32)
    residuals, network = ResidualModel(["age"]).fit(iter(volumes), table), make_network()
    model = Model(network, grid, classes=["CN", "AD"], residuals=residuals)
    scan, person = Volume(volumes[0], grid), {"age": 70}
    found = model.explain(scan, "occlusion", target="AD", covariates=person, radius=10, step=20).relevance.array
    residual = torch.from_numpy(residuals.transform(iter(volumes[:1]), pd.DataFrame([person])))[None]
    explainer = Occlusion(network, 10, 20, scans=torch.from_numpy(volumes[:1])[None])
    np.testing.assert_allclose(found, explainer.attribute(residual, 1)[0, 0].numpy(), atol=1e-6)
    assert not np.allclose(found, Occlusion(network, 10, 20).attribute(residual, 1)[0, 0].numpy(), atol=1e-6)
    with pytest.raises(ModelError, match="Occlusion changes a scan"):
        list(model.explain_maps(residual[0].numpy(), "occlusion", 1))
    ablated = model.explain(scan, "feature_ablation", target="AD", covariates=person).relevance.array
    labels = load_atlas("aal", grid).labels
    assert len(np.unique(ablated[labels == labels.max()])) == 1 and not ablated[labels == 0].any() and ablated.any()
