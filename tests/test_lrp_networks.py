"""LRP explains the network that is there, or says why it cannot: forwards of one's own, changes in place, shapes, gates, names."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import ResNet, SEResNet50, UNet
from torch import nn

from explainable_mri.explainers.base import ExplainerError, ExplanationWarning, build_explainer, network_logits
from explainable_mri.explainers.lrp import LRP, compare_logits
from explainable_mri.explainers.lrp_graph import Graph, TraceError

SCAN = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def input_times_gradient(network: nn.Module, scan: torch.Tensor = SCAN, target: int = 0) -> torch.Tensor:
    "LRP-0 of a network of ReLUs without offsets but for biases, which keep their share."
    x = scan.clone().requires_grad_()
    logits, _ = network_logits(network, x)
    return scan * torch.autograd.grad(logits[:, target].sum(), x)[0]


def check(network: nn.Module, scan: torch.Tensor = SCAN, tolerance: float = 2e-5) -> None:
    "LRP-0 in the standard convention is the input times the gradient."
    expected = input_times_gradient(network.eval(), scan)
    found = LRP(network, "z", "standard").attribute(scan, 0)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


class Standardised(nn.Conv3d):
    "Weight standardisation, by a forward of its own."

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3, 4), keepdim=True)) / (w.std((1, 2, 3, 4), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class Functional(nn.Module):
    "A convolution without a module."

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3, 3))

    def forward(self, x):
        return F.conv3d(input=x, weight=self.kernel, padding=1, stride=(2, 1, 1))


def chain(*layers: nn.Module, scan: torch.Tensor = SCAN) -> nn.Sequential:
    "Layers with a dense layer behind."
    torch.manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).eval()
    network(scan)
    return network


def patched() -> nn.Conv3d:
    conv = nn.Conv3d(1, 4, 3)
    conv.forward = lambda x: F.conv3d(x, 2 * conv.weight, conv.bias)
    return conv


@pytest.mark.parametrize("make", [
    lambda: chain(Standardised(1, 4, 3), nn.ReLU()), lambda: chain(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), Doubled(864, 5), nn.ReLU()),
    lambda: chain(Functional(), nn.ReLU()), lambda: chain(patched(), nn.ReLU()),
    lambda: chain(nn.Conv3d(1, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()),
    lambda: chain(nn.Conv3d(1, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
    lambda: chain(nn.ConvTranspose3d(1, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
    lambda: chain(nn.ConvTranspose3d(1, 4, 2, stride=2), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, groups=2), nn.ReLU()),
    lambda: chain(nn.Conv3d(1, 4, 3), nn.Upsample(scale_factor=2, mode="trilinear"), nn.ReLU()),
    lambda: chain(nn.Conv3d(1, 4, 3), nn.Upsample(scale_factor=2), nn.ReLU()),
    lambda: nn.Sequential(torch.compile(chain(nn.Conv3d(1, 4, 3), nn.ReLU()), backend="eager")),
    lambda: nn.Sequential(nn.DataParallel(chain(nn.Conv3d(1, 4, 3), nn.ReLU())))],
    ids=["weight standardisation", "doubled", "functional", "patched", "circular", "reflect", "transposed", "transposed merged",
         "trilinear", "nearest", "compiled part", "wrapped part"])
def test_layers_of_all_kinds_are_what_they_compute(make):
    check(make())


class Written(nn.Module):
    "A network whose middle is written in `forward`."

    def __init__(self, middle, features=864):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.relu = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.head, self.middle = nn.Linear(features, 2), middle

    def forward(self, x):
        return self.head(self.middle(self, self.stem(x)).flatten(1))


def shortcut(net, h):
    out = net.conv(net.relu(h))
    out += h
    return out


def through_dropout(net, h):
    same = F.dropout(h, 0.5, net.training)
    return net.conv(torch.relu_(h)) + same


def checked(net, h):
    if h.dim() != 5 or h.shape[1] != 4:
        raise ValueError("four channels, please")
    assert h.shape[2] == 6, "six voxels"
    assert len(h.shape) == 5
    return torch.relu(h)


def unrolled(net, h):
    n, c, *size = h.shape
    for _ in range(len(size) - 2):
        h = torch.relu(h)
    return h.view(n, c, -1)


def filled(net, h):
    zeros = torch.zeros(h.size(0), 2, *h.shape[2:5], dtype=h.dtype, device=h.device)
    return torch.cat([torch.relu(h)[:, :2], zeros], 1)


def dense_before_norm(net, h):
    return torch.relu(F.linear(h, torch.eye(6)).mT)


@pytest.mark.parametrize("middle", [
    shortcut, through_dropout, checked, unrolled, filled, dense_before_norm, lambda net, h: F.relu(h, True) + h,
    lambda net, h: h.relu_() + net.conv(h), lambda net, h: h.mul_(2).relu(), lambda net, h: torch.relu(h.mT).mT.contiguous(),
    lambda net, h: torch.relu(h.flatten(2).transpose(1, 2)).movedim(1, 2), lambda net, h: F.interpolate(h, scale_factor=1, mode="trilinear").relu(),
    lambda net, h: torch.relu(h) + torch.zeros_like(h), lambda net, h: torch.relu(h).to(h.dtype)])
def test_what_is_written_in_forward_is_followed(middle):
    check(Written(middle))


def test_a_shortcut_detached_from_the_gradient_is_part_of_the_network():
    plain, detached, data = (LRP(Written(middle).eval(), "z", "standard").attribute(SCAN, 0) for middle in (
        lambda net, h: torch.relu(h) + net.conv(h), lambda net, h: torch.relu(h.detach()) + net.conv(h),
        lambda net, h: torch.relu(h.data) + net.conv(h)))
    torch.testing.assert_close(detached, plain)
    torch.testing.assert_close(data, plain)


def test_a_batch_norm_along_another_axis_is_not_merged():
    class Axis(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.dense, self.norm, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(36, 2)
            nn.init.uniform_(self.norm.running_var, 0.2, 3)

        def forward(self, x):
            return self.head(self.norm(self.dense(x)).relu().flatten(1))

    x = torch.randn(2, 6, 8)
    check(Axis().eval(), x)


@pytest.mark.parametrize("middle, words", [
    (lambda net, h: part_in_place(h), "would explain another network: .* an output is [-0-9.e]+, but the network gives [-0-9.e]+"),
    (lambda net, h: h if h.sum() > 0 else -h, "must not depend on the values"),
    (lambda net, h: h / h.std(), r"No LRP rule for 'std' \(std\)"), (lambda net, h: h * h.flip(2), "'mul': 'equal_share'")])
def test_what_cannot_be_followed_is_refused(middle, words):
    with pytest.raises(ExplainerError, match=words):
        LRP(Written(middle).eval(), "z", "standard").attribute(SCAN, 0)


def part_in_place(h):
    h[:, :2].relu_()
    return h


def test_logits_are_compared_in_their_own_precision():
    compare_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.00001, 2.0]]))
    with pytest.raises(ExplainerError, match="1.001, but the network gives 1"):
        compare_logits(torch.tensor([[1.001, 0.5]]), torch.tensor([[1.0, 0.5]]))
    with pytest.raises(ExplainerError, match="another network"):
        compare_logits(torch.tensor([[1.0 + 1e-9]]).double() + 1e-9, torch.tensor([[1.0]]).double())
    with pytest.raises(ExplainerError, match="another network"):
        compare_logits(torch.tensor([[float("nan")]]), torch.tensor([[1.0]]))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm3d(4), nn.InstanceNorm3d(4, affine=True), nn.LayerNorm([6, 6, 6]),
                                  nn.GroupNorm(1, 4, affine=False)])
def test_normalisation_by_a_scans_own_statistics_is_linear_at_these(norm):
    class Fixed(nn.Module):
        "The same with factors and offsets that do not depend on the scan."

        def forward(self, x):
            from explainable_mri.explainers.lrp_layers import fixed_statistics
            factor, offset = (one.detach() for one in fixed_statistics(norm, x))
            return x * factor + offset

    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    conv, head = nn.Conv3d(1, 4, 3), nn.Linear(864, 2)
    network, fixed = (nn.Sequential(conv, one, nn.ReLU(), nn.Flatten(), head).eval() for one in (norm, Fixed()))
    found, expected = LRP(network, "z", "standard").attribute(SCAN, 0), input_times_gradient(fixed)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for name in ("sequential_preset_a", "epsilon_plus", "flat", "epsilon_gamma_box"):
        for convention in ("innvestigate", "standard"):
            assert LRP(network, name, convention).attribute(SCAN, 0).isfinite().all()


class Gate(nn.Module):
    "Squeeze and excitation, with the factors in either order."

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.head, self.first = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 1), nn.Linear(864, 2), first

    def forward(self, x):
        h = self.conv(x).relu()
        g = self.gate(h.mean((2, 3, 4), keepdim=True)).sigmoid()
        return self.head((g * h if self.first else h * g).flatten(1))


@pytest.mark.parametrize("first", [True, False])
def test_the_signal_takes_all_relevance_of_a_gate(first):
    class Held(Gate):
        "The same with the gate held fixed."

        def forward(self, x):
            h = self.conv(x).relu()
            return self.head((h * self.gate(h.mean((2, 3, 4), keepdim=True)).sigmoid().detach()).flatten(1))

    expected = input_times_gradient(Held(first).eval())
    torch.testing.assert_close(LRP(Gate(first).eval(), "z", "standard").attribute(SCAN, 0), expected, rtol=1e-3, atol=1e-6)
    half = LRP(Gate(first).eval(), "z", "standard", layers={"mul": "equal_share"}).attribute(SCAN, 0)
    assert half.isfinite().all() and not half.equal(expected)
    for rule in ("pass", "epsilon", "proportional", "alpha_beta_x"):
        with pytest.raises(ExplainerError, match="is not for 'mul'.*signal_takes_all"):
            LRP(Gate(first).eval(), "z", "standard", layers={"mul": rule})


def test_names_that_are_no_steps_are_refused():
    norm = nn.BatchNorm3d(4)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    network = chain(nn.Conv3d(1, 4, 3), norm, nn.ReLU())
    nn.init.uniform_(norm.running_var, 0.2, 3)
    plain = LRP(network, "z", "standard").attribute(SCAN, 0)
    for layers in ({"conv1": "flat"}, {"norm*": "flat"}):
        with pytest.raises(ExplainerError, match="no step of the network has that name"):
            LRP(network, "z", "standard", layers=layers)
    for layers in ({"0": "flat"}, {"1": "w_square"}, {"[01]": "z_plus"}):  # a rule by name keeps the normalisation a step
        assert not LRP(network, "z", "standard", layers=layers).attribute(SCAN, 0).equal(plain)


@pytest.mark.parametrize("layers, words", [
    ({"1": "epsilon"}, "is not for '1' (ReLU): it is for layers with weights"), ({"0": "alpha_beta_x"}, "it is for normalisation layers"),
    ({"0": "signal_takes_all"}, "it is for products")])
def test_rules_are_checked_against_their_step(layers, words):
    with pytest.raises(ExplainerError) as error:
        LRP(chain(nn.Conv3d(1, 4, 3), nn.ReLU()), "z", "standard", layers=layers)
    assert words in str(error.value)


def test_pass_keeps_the_shape():
    with pytest.raises(ExplainerError, match="steps that keep the shape"):
        LRP(chain(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2)), "z", "standard", layers={"2": "pass"}).attribute(SCAN, 0)


@pytest.mark.parametrize("shortcut_type", ["A", "B"])
def test_monais_resnet_goes_through_with_both_shortcuts(shortcut_type):
    torch.manual_seed(0)
    network = ResNet("basic", [1, 1, 1, 1], [4, 8, 16, 32], n_input_channels=1, num_classes=2, shortcut_type=shortcut_type).eval()
    explainer = LRP(network, "epsilon_plus", "standard")
    for size in (24, 32):
        scan = torch.rand(1, 1, size, size, size)
        attribution = explainer.explain(scan, 1)
        assert attribution.relevance.isfinite().all()
        torch.testing.assert_close(attribution.logits, network(scan).detach())


def test_a_network_that_returns_a_dictionary():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = chain(nn.Conv3d(1, 4, 3), nn.ReLU())

        def forward(self, x):
            return {"diagnosis": self.network(x).softmax(1), "embedding": x.flatten(1)}

    with pytest.raises(ExplainerError, match="'diagnosis', 'embedding'.*output='diagnosis'"):
        LRP(Several(), "z").attribute(SCAN, 0)
    for name in ("lrp.z", "gradient", "grad_cam", "guided_backprop"):
        found = build_explainer(name, Several().eval(), output="diagnosis").attribute(SCAN, 0)
        torch.testing.assert_close(found, build_explainer(name, Several().network).attribute(SCAN, 0))


def test_innvestigates_start_from_a_sigmoids_probability():
    plain = chain(nn.Conv3d(1, 4, 3), nn.ReLU())
    network = nn.Sequential(plain, nn.Sigmoid())
    logit = plain(SCAN)[:, 0].detach()
    from_logit, from_output = (LRP(network, "z", start=start).attribute(SCAN, 0) for start in ("logit", "output"))
    factor = (logit.sigmoid() / logit).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(from_output, factor * from_logit, rtol=1e-3, atol=1e-6)
    assert (factor < 0).any()  # where the probability is below one half, the map turns round


def test_a_map_a_hundred_times_too_large_is_warned_of():
    torch.manual_seed(0)
    network = SEResNet50(spatial_dims=3, in_channels=1, num_classes=2).eval()
    scan = torch.rand(1, 1, 48, 48, 48)
    with pytest.warns(ExplanationWarning, match="misses its sum"):
        LRP(network, "sequential_preset_a").attribute(scan, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = LRP(network, "epsilon_plus", "standard").explain(scan, 0).check
    assert check.holds and max(check.error) < 2


def test_transposed_convolutions_of_a_unet_go_through():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)

        def forward(self, x):
            return self.net(x).mean((2, 3, 4))

    assert LRP(Pooled().eval(), "epsilon_plus", "standard").attribute(torch.rand(1, 1, 16, 16, 16), 1).isfinite().all()


def test_graph_says_what_is_special():
    class Values(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Values cannot be traced"):
        Graph(Values())
    with pytest.raises(ExplainerError, match="cannot be traced"):
        LRP(Values()).attribute(torch.rand(1, 2))


class Remembering(nn.Module):
    "A network that makes a constant, and that keeps what it has computed, as people do for Grad-CAM."

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(4, 2), None

    def forward(self, x):
        self.seen = self.head(x) * torch.tensor([1.0, 2.0])
        return self.seen


def test_tracing_leaves_nothing_behind():
    network = Remembering()
    before, graph = dict(vars(network)), Graph(network)
    assert vars(network) == before  # neither the constant nor a stand-in for a tensor
    constant, = [node for node in graph.nodes if node.op == "get_attr"]
    assert graph.run(constant, {}).equal(torch.tensor([1.0, 2.0]))


def test_hooks_that_may_change_a_layer_are_refused_and_pruning_is_not():
    network = Remembering()
    hook = network.head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    with pytest.raises(ExplainerError, match="'head' has a forward hook"):
        LRP(network).attribute(torch.rand(1, 4))
    hook.remove()
    pruned = nn.utils.prune.identity(network.head, "weight")  # a hook makes the weight from `weight_orig` in each pass
    with torch.no_grad():
        pruned.weight_orig.fill_(3)
    check(network, torch.rand(1, 4))


def test_modules_that_return_several_tensors_have_no_kind():
    indices = nn.Sequential(nn.MaxPool1d(2, return_indices=True), nn.Flatten())
    assert [step.kind for step in Graph(indices).steps.values()] == [None, "reshape"]
