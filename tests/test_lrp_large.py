"""What is done to be fast on large volumes changes nothing: random networks, with it from the first value on, and without it."""
import numpy as np
import pytest
import torch
from torch import nn

from explainable_mri.explainers import lrp_kernels as kernels
from explainable_mri.explainers.lrp import LRP
from explainable_mri.explainers.lrp_composites import COMPOSITES

PARAMETERS = {"deep_taylor.bounded": {"low": -1.0, "high": 2.0}, "sequential_preset_b_flat_until_idx": {"until_layer_idx": 2}}


class Branched(nn.Module):
    "Random convolutions, batch normalisation, a sum and pooling, in one to three dimensions."

    def __init__(self, random: np.random.Generator):
        super().__init__()
        self.axes = axes = int(random.integers(1, 4))
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]

        def several(low: int, high: int) -> tuple[int, ...]:
            return tuple(random.integers(low, high, axes).tolist())

        self.first = convolution(1, 2, several(1, 4), several(1, 4), several(0, 3), several(1, 3))
        self.norms = nn.ModuleList(norm(2) for _ in range(2))
        self.second = convolution(2, 2, several(1, 5), padding="same", groups=int(random.integers(1, 3)))
        self.third = convolution(2, 3, several(1, 3), several(1, 3), several(0, 2), bias=False)
        self.head = nn.Linear(3, 2)
        for one in self.norms:
            one.running_mean.normal_()
            one.running_var.uniform_(0.3, 2)
            nn.init.normal_(one.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        x = self.norms[1](torch.relu(self.second(x)) + x)
        return self.head(self.third(x).flatten(2).mean(2))


@pytest.mark.parametrize("seed", range(8))
def test_fast_ways_change_nothing(seed, monkeypatch):
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = Branched(random).double().eval()
    shape = random.integers(9, 14, network.axes).tolist()
    x = torch.randn(2, 1, *shape, dtype=torch.float64)
    # Background around a box. Sometimes only the last voxels of an axis are filled, which a stride may leave out.
    box = [slice(-1, None) if random.random() < 0.4 else slice(*sorted(random.integers(0, n + 1, 2).tolist())) for n in shape]
    inside = torch.zeros(shape, dtype=torch.float64)
    inside[tuple(box)] = 1
    x = x * inside
    for name in COMPOSITES.names():
        explainer, maps = LRP(network, name, **PARAMETERS.get(name, {})), []
        for large, chunk in [(10**9, 10**9), (4, 30)]:
            monkeypatch.setattr(kernels, "_LARGE", large)
            monkeypatch.setattr(kernels, "_CHUNK", chunk)
            maps.append(explainer.attribute(x, 1))
        plain, fast = maps
        assert (fast - plain).norm() <= 1e-9 * plain.norm(), name
