
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum import attr
from torch import nn

from explainable_mri.config import EXPLAINERS, Component, suggest
from explainable_mri.explainers.graph import ExplainerError, choose_targets, evaluation_mode
from explainable_mri.explainers.lrp import LRP, Composite
from explainable_mri.explainers.rules import Gradient, PositiveGradient, PositivePass



class GradientExplainer:
    "The gradient of a class's logit; base of the methods that use it."

    def __init__(
        self,
        network: nn.Module,  # gives logits (N, classes)
    ):
        self.network = network

    def attribute(
        self,
        inputs: torch.Tensor,                                     # batch (N, C, ...)
        target: int | Sequence[int] | torch.Tensor | None = None,  # class, classes, or None for the predicted
    ) -> torch.Tensor:                                            # tensor of the inputs' shape
        "Explain the logit of a class for each sample."
        inputs = inputs.detach().as_subclass(torch.Tensor).clone()
        with evaluation_mode(self.network):
            with torch.no_grad():
                targets = choose_targets(self.network(inputs), target)
            with torch.enable_grad():
                return self._explain(inputs, targets).detach()

    def _explain(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return attr.Saliency(self.network).attribute(inputs, targets, abs=False)


EXPLAINERS.register("gradient")(GradientExplainer)


@EXPLAINERS.register("input_t_gradient")
class InputTimesGradient(GradientExplainer):
    "The gradient times the input."

    def _explain(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return attr.InputXGradient(self.network).attribute(inputs, targets)



@EXPLAINERS.register("integrated_gradients")
class IntegratedGradients(GradientExplainer):
    "The gradient averaged along the straight line from a baseline to the input, times the way."

    def __init__(
        self,
        network: nn.Module,                   # gives logits (N, classes)
        steps: int = 64,                      # points on the line
        baseline: float | torch.Tensor = 0.0,  # where the line begins: a value for all voxels, or a volume
        batch_size: int = 4,                  # points that are computed at once
    ):
        super().__init__(network)
        self.steps, self.baseline, self.batch_size = steps, baseline, batch_size

    def _explain(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return attr.IntegratedGradients(self.network).attribute(
            inputs, self.baseline, targets, n_steps=self.steps, method="riemann_trapezoid",
            internal_batch_size=max(self.batch_size, len(inputs)))


@EXPLAINERS.register("smoothgrad")
class SmoothGrad(GradientExplainer):
    "The gradient averaged over copies of the input with noise."

    def __init__(
        self,
        network: nn.Module,     # gives logits (N, classes)
        samples: int = 64,      # noisy copies
        deviation: float = 1.0,  # standard deviation of the noise
        seed: int = 0,          # seed of the noise
        batch_size: int = 4,    # copies that are computed at once
    ):
        super().__init__(network)
        self.samples, self.deviation, self.seed, self.batch_size = samples, deviation, seed, batch_size

    def _explain(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return attr.NoiseTunnel(attr.Saliency(self.network)).attribute(
                inputs, nt_type="smoothgrad", nt_samples=self.samples, stdevs=self.deviation,
                nt_samples_batch_size=min(self.batch_size, self.samples), target=targets, abs=False)



@EXPLAINERS.register("grad_cam")
class GradCam(GradientExplainer):
    "Grad-CAM: channels of a late layer weighted with their mean gradient, enlarged to the input's size."

    def __init__(
        self,
        network: nn.Module,          # gives logits (N, classes)
        layer: str | None = None,    # name of a module; None: the last convolution
        positive: bool = True,       # keep what speaks for the class, as in the paper
    ):
        super().__init__(network)
        modules = dict(network.named_modules())
        convolutions = [name for name, module in modules.items() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        if layer is None and not convolutions:
            raise ExplainerError("Grad-CAM needs a convolution, and the network has none.")
        layer = convolutions[-1] if layer is None else layer
        if layer not in modules:
            raise ExplainerError(f"The network has no layer '{layer}'. {suggest(layer, filter(None, modules))}")
        self.layer, self.positive = modules[layer], positive

    def _explain(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        maps = attr.LayerGradCam(self.network, self.layer).attribute(inputs, targets, relu_attributions=self.positive)
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[inputs.dim()]
        return F.interpolate(maps, inputs.shape[2:], mode=mode).expand_as(inputs)



def _gradient_composite(relu: Gradient | PositivePass) -> Composite:
    kinds = ("dense", "convolution", "normalization", "addition", "subtraction", "multiplication", "scaling", "average",
             "mean of branches", "routing", "reshape")
    return Composite({**dict.fromkeys(kinds, Gradient()),
                      **dict.fromkeys(("activation", "activation layer", "ReLU layer"), relu)})


@EXPLAINERS.register("deconvnet")
def deconvnet(
    network: nn.Module,  # gives logits
) -> LRP:                # explainer
    "Deconvnet."
    return LRP(network, _gradient_composite(PositivePass()))


@EXPLAINERS.register("guided_backprop")
def guided_backprop(
    network: nn.Module,  # gives logits
) -> LRP:                # explainer
    "Guided backpropagation."
    return LRP(network, _gradient_composite(PositiveGradient()))



def build_explainer(
    component: Component,  # name and parameters
    network: nn.Module,    # gives logits (N, classes)
) -> Any:                  # object with `attribute(inputs, target=None)`
    "Build an explainer by its name in the registry."
    return EXPLAINERS.build(component, network)

