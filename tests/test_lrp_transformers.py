"""LRP through transformers of MONAI and PyTorch, held against a gradient that PyTorch computes by itself."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from explainable_mri.explainers.base import ExplainerError, build_explainer
from explainable_mri.explainers.lrp_conservation import relevance_kept
from explainable_mri.registry import NETWORKS


class Exchanged(TorchFunctionMode):
    "The functions of a transformer with the gradients that AttnLRP's (or CP-LRP's) rules amount to."

    def __init__(self, fixed: bool):
        super().__init__()
        self.fixed = fixed  # whether attention is held fixed

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.einsum, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            *formula, a, b = args
            attention = bool((a >= 0).all() and torch.allclose(a.sum(-1), torch.ones_like(a.sum(-1))))  # rows of a softmax
            if self.fixed and attention:
                return function(*formula, a.detach(), b)
            return (function(*formula, a.detach(), b) + function(*formula, a, b.detach())) / 2
        if function is F.gelu:
            x = args[0]
            return x * (function(*args, **kwargs) / x).detach()
        if function is F.layer_norm:
            x, shape, weight, bias, eps = [*args, *kwargs.values(), None, None, 1e-5][:5]
            spread = (x.var(-1, correction=0, keepdim=True) + (eps or 1e-5)).sqrt().detach()
            y = (x - x.mean(-1, keepdim=True)) / spread
            return y if weight is None else y * weight + bias
        return function(*args, **kwargs)


class Swin(nn.Module):
    "MONAI's 3D Swin transformer with a head."

    def __init__(self):
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        self.body = SwinTransformer(in_chans=1, embed_dim=12, window_size=(3, 3, 3), patch_size=(2, 2, 2), depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), spatial_dims=3)
        self.head = nn.Linear(192, 2)

    def forward(self, x):
        return self.head(self.body(x)[-1].mean((2, 3, 4)))


class Encoder(nn.Module):
    "Layers of PyTorch's own transformer over patches."

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.patches, self.body, self.head = nn.Conv3d(1, 8, 8, stride=8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    def by_hand(self, x):
        "The same, in single functions."
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.body.layers:
            attention = layer.self_attn
            parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
            query, key, value = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in parts)
            seen = torch.matmul((torch.matmul(query, key.transpose(-2, -1)) / 2).softmax(-1), value)
            x = layer.norm1(x + attention.out_proj(seen.transpose(1, 2).flatten(2)))
            x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
        return self.head(x.mean(1))


def _vit(**params):
    return NETWORKS.build("monai.ViT", input_shape=(32, 32, 32), classes=2, patch_size=8, hidden_size=24, mlp_dim=32, num_layers=2, num_heads=3, **params)


MAKERS = {"vit": _vit, "vit, perceptron and sincos": lambda: _vit(proj_type="perceptron", pos_embed_type="sincos", qkv_bias=True), "swin": Swin, "encoder": Encoder}


@pytest.fixture(scope="module", params=MAKERS, ids=lambda name: name)
def network(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MAKERS[request.param]().double().eval()


@pytest.fixture(scope="module")
def scan():
    return torch.rand(2, 1, 32, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["lrp.attnlrp", "lrp.cplrp"])
def test_maps_are_input_times_a_gradient_that_pytorch_computes(network, scan, name):
    ours = build_explainer(name, copy.deepcopy(network), epsilon=1e-14).attribute(scan, 1)
    given = scan.clone().requires_grad_()
    with Exchanged(name == "lrp.cplrp"):
        logits = network.by_hand(given) if isinstance(network, Encoder) else network(given)
    torch.testing.assert_close(logits, network(scan))
    reference = scan * torch.autograd.grad(logits[:, 1].sum(), given)[0]
    assert (ours - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("name", ["lrp.attnlrp", "lrp.cplrp"])
def test_what_is_kept_and_the_map_add_up_to_the_logit(network, scan, name):
    result = build_explainer(name, network).explain(scan, 1)
    table = relevance_kept(build_explainer(name, network), scan, 1)
    torch.testing.assert_close(torch.tensor(table.kept.sum()) + float(result.relevance.sum()), result.logits[:, 1].sum(), rtol=1e-6, atol=1e-8, check_dtype=False)


def test_composites_without_rules_for_attention_say_which_have_them(network, scan):
    with pytest.raises(ExplainerError, match="lrp.attnlrp"):
        build_explainer("lrp.epsilon", network, convention="standard").attribute(scan, 1)
