
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from explainable_mri.config import Registry



class Operation:
    "A step of a network as the rules see it: a function of tensors."

    def __init__(
        self,
        function: Callable[..., torch.Tensor],  # what the step computes
    ):
        self.function = function

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)

    def vjp(
        self,
        *inputs: torch.Tensor,              # what the step is applied to
    ) -> tuple[torch.Tensor, Callable]:     # the output, and a function from a tensor of its shape to one for each input
        "The output and the vector-Jacobian product, as a function that can be called once."
        inputs = [value.detach().requires_grad_() for value in inputs]
        with torch.enable_grad():
            output = self.function(*inputs)

        def pull(vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
            gradients = torch.autograd.grad(output, inputs, vector, allow_unused=True)
            return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients))

        return output.detach(), pull



_SMALL = 100_000_000  # multiplications for a sample; up to here, double precision costs little


def _exactly(function: Callable, work: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
             *more: Any) -> torch.Tensor:
    "Apply a linear function, summing up in double precision where there is not much to sum."
    if x.dtype != torch.float32 or x.device.type == "mps" or work > _SMALL:
        return function(x, weight, bias, *more)
    return function(x.double(), weight.double(), None if bias is None else bias.double(), *more).float()



class LinearLayer(Operation):
    "A layer w·x + b; rules use it with other weights, forwards and transposed."

    weight: torch.Tensor       # w
    bias: torch.Tensor | None  # b

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        "w·x + b, with the weights given."
        raise NotImplementedError

    def transpose(self, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        "wᵀ·y, of the input's shape."
        raise NotImplementedError

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor) -> "LinearLayer":
        "This layer followed by one that scales and shifts each channel, as one layer."
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x, self.weight, self.bias)

    def preactivation(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        "w·x + b for the input `x`, which is the output unless the layer stands in for another."
        return output

    def vjp(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable]:
        return self(x), lambda vector: (self.transpose(vector, self.weight, x.shape),)


class Dense(LinearLayer):
    "A fully connected layer, `nn.Linear`."

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _exactly(F.linear, weight.numel(), x, weight, bias)

    def transpose(self, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return y @ weight

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor) -> "Dense":
        return Dense(self.weight * scale[:, None], shift if self.bias is None else self.bias * scale + shift)


class Scale(LinearLayer):
    "A factor and an offset for each channel: batch normalisation in evaluation mode."

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = x * _along_channels(weight, x)
        return output if bias is None else output.add_(_along_channels(bias, x))

    def transpose(self, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return y * _along_channels(weight, y)


class StandIn(Scale):
    "A scale that rules see in place of another one, which gives the output."

    def __init__(
        self,
        layer: Callable[[torch.Tensor], torch.Tensor],  # the layer that gives the output
        weight: torch.Tensor,                           # the factors that rules see
        bias: torch.Tensor,                             # the offsets that rules see
    ):
        super().__init__(weight, bias)
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def preactivation(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.forward(x, self.weight, self.bias)


def _along_channels(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    "The vector, shaped so that it runs along the channels of `x`."
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))



_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONVOLVE_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class Convolution(LinearLayer):
    "`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with zero padding."

    def __init__(
        self,
        module: nn.Module,                          # the convolution
        weight: torch.Tensor | None = None,         # other weights than the module's
        bias: torch.Tensor | None = None,           # the bias that goes with them
    ):
        super().__init__(*((module.weight, module.bias) if weight is None else (weight, bias)))
        self.module = module
        self.padding = _padding(module)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        m = self.module
        work = weight.numel() * x[0, 0].numel() // math.prod(m.stride)
        return _exactly(_CONVOLVE[x.dim()], work, x, _as_fast(weight), bias, m.stride, m.padding, m.dilation, m.groups)

    def transpose(self, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        m = self.module
        smallest = [(n - 1) * s - 2 * p + d * (k - 1) + 1
                    for n, s, p, d, k in zip(y.shape[2:], m.stride, self.padding, m.dilation, m.kernel_size)]
        rest = [max(size - least, 0) for size, least in zip(shape[2:], smallest)]  # voxels that a stride leaves over
        x = _CONVOLVE_TRANSPOSED[y.dim()](y, _as_fast(weight), None, m.stride, self.padding, rest, m.groups, m.dilation)
        return x[(..., *(slice(size) for size in shape[2:]))]

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor) -> "Convolution":
        weight = self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        return Convolution(self.module, weight, shift if self.bias is None else self.bias * scale + shift)


def _padding(module: nn.Module) -> tuple[int, ...]:
    "Voxels padded before each axis; `same` puts an odd one behind."
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size))
    return (0,) * len(module.kernel_size) if module.padding == "valid" else tuple(module.padding)



def _channels_last(dimensions: int) -> torch.memory_format:
    return torch.channels_last_3d if dimensions == 5 else torch.channels_last


def _as_fast(weight: torch.Tensor) -> torch.Tensor:
    "The kernel in the order of memory in which processors convolve fastest."
    return weight.contiguous(memory_format=_channels_last(weight.dim())) if _prefers_channels_last(weight) else weight


def _prefers_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dim() in (4, 5)


def fast_layout(
    x: torch.Tensor,  # batch (N, C, ...)
) -> torch.Tensor:    # the same numbers
    "Reorder a batch in memory for fast convolutions: on the CPU, channels vary fastest."
    if not _prefers_channels_last(x):
        return x
    if x.shape[1] > 1:
        return x.contiguous(memory_format=_channels_last(x.dim()))
    # One channel counts as contiguous in any order. The strides say which is meant.
    x = x.contiguous()
    return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))



def divide(
    numerator: torch.Tensor,    # any shape
    denominator: torch.Tensor,  # the same shape; zeros count as 1e-7
) -> torch.Tensor:              # the quotient
    "Divide as iNNvestigate does, with 1e-7 for denominators that are exactly zero."
    return numerator / denominator.masked_fill(denominator == 0, 1e-7)


def divide_into(
    numerator: torch.Tensor,    # any shape
    denominator: torch.Tensor,  # the same shape; it is overwritten
) -> torch.Tensor:              # the quotient, in the memory of the denominator
    "As `divide`, for a denominator that nobody needs any more; saves memory and time on large volumes."
    denominator.masked_fill_(denominator == 0, 1e-7)
    return torch.div(numerator, denominator, out=denominator)


def stabilize(
    z: torch.Tensor,  # denominators
    epsilon: float,   # what is added to their absolute value
) -> torch.Tensor:    # denominators that are not zero
    "Move denominators away from zero by `epsilon`; zero counts as positive."
    return z + torch.where(z < 0, -epsilon, epsilon).to(z.dtype)



Tensors = torch.Tensor | tuple[torch.Tensor, ...]
RULES = Registry("LRP rule")


class Rule:
    "How a step of the network hands relevance down; two halves, like `torch.autograd.Function`."

    def forward(
        self,
        operation: Operation,     # the step of the network
        *inputs: torch.Tensor,    # what it is applied to
    ) -> tuple[torch.Tensor, tuple]:  # its output, and what `backward` will need
        "Apply the step and keep what the way back needs."
        return operation(*inputs), inputs

    def backward(
        self,
        operation: Operation,     # the step of the network
        relevance: torch.Tensor,  # relevance of its output
        *saved: Any,              # what `forward` kept
    ) -> Tensors:                 # relevance of each input
        "Relevance of the input from relevance of the output."
        raise NotImplementedError



@RULES.register("pass")
@dataclass(frozen=True)
class Pass(Rule):
    "Relevance passes unchanged, as through an activation."

    def forward(self, operation: Operation, *inputs: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        return operation(*inputs), ()

    def backward(self, operation: Operation, relevance: torch.Tensor) -> torch.Tensor:
        return relevance


@RULES.register("gradient")
@dataclass(frozen=True)
class Gradient(Rule):
    "Relevance goes the way of the gradient; for steps that select or rearrange values, such as max-pooling."

    def forward(self, operation: Operation, *inputs: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        output, pull = operation.vjp(*inputs)
        return output, (pull,)

    def backward(self, operation: Operation, relevance: torch.Tensor, pull: Callable) -> Tensors:
        return pull(relevance)


@RULES.register("proportional")
@dataclass(frozen=True)
class Proportional(Rule):
    "Relevance is shared in proportion to what each input adds to the output; for sums and averages."

    def forward(self, operation: Operation, *inputs: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        output, pull = operation.vjp(*inputs)
        return output, (inputs, output, pull)

    def backward(self, operation: Operation, relevance: torch.Tensor, inputs: tuple, output: torch.Tensor,
                 pull: Callable) -> Tensors:
        return tuple(x * gradient for x, gradient in zip(inputs, pull(divide(relevance, output))))



@RULES.register("deconvnet")
@dataclass(frozen=True)
class PositivePass(Pass):
    "Only what is positive passes: deconvnet's rule for a ReLU."

    def backward(self, operation: Operation, relevance: torch.Tensor) -> torch.Tensor:
        return relevance.clamp(min=0)


@RULES.register("guided")
@dataclass(frozen=True)
class PositiveGradient(Gradient):
    "The gradient of what is positive: guided backpropagation's rule for a ReLU."

    def backward(self, operation: Operation, relevance: torch.Tensor, pull: Callable) -> Tensors:
        return pull(relevance.clamp(min=0))



@RULES.register("z", "lrp_0")
@dataclass(frozen=True)
class Z(Rule):
    "LRP-0: relevance in proportion to contributions w·x, z = w·x + b."

    def forward(self, layer: LinearLayer, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        output = layer(x)
        return output, (x, layer.preactivation(x, output))

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x * layer.transpose(divide(relevance, z), layer.weight, x.shape)


@RULES.register("epsilon")
@dataclass(frozen=True)
class Epsilon(Z):
    "LRP-ε: as LRP-0, with denominators moved away from zero, which absorbs a little relevance."

    epsilon: float = 1e-7  # added to the absolute value of denominators

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x * layer.transpose(relevance / stabilize(z, self.epsilon), layer.weight, x.shape)



@RULES.register("gamma")
@dataclass(frozen=True)
class Gamma(Rule):
    "LRP-γ: positive weights count (1 + γ) times; for non-negative inputs, as after a ReLU."

    gamma: float = 0.25  # how much positive weights are favoured

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight + self.gamma * layer.weight.clamp(min=0)
        bias = None if layer.bias is None else layer.bias + self.gamma * layer.bias.clamp(min=0)
        return x * layer.transpose(divide_into(relevance, layer.forward(x, weight, bias)), weight, x.shape)


@RULES.register("w_square")
@dataclass(frozen=True)
class WSquare(Rule):
    "The w² rule: relevance in proportion to squared weights, whatever the input."

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = self.kernel(layer.weight)
        z = layer.forward(fast_layout(torch.ones_like(x[:1])), weight).expand_as(relevance)
        return layer.transpose(divide(relevance, z), weight, x.shape)

    def kernel(self, weight: torch.Tensor) -> torch.Tensor:
        return weight ** 2


@RULES.register("flat")
@dataclass(frozen=True)
class Flat(WSquare):
    "The flat rule: relevance in equal shares to all inputs that a kernel reaches."

    def kernel(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(weight)



@RULES.register("alpha_beta")
@dataclass(frozen=True)
class AlphaBeta(Rule):
    "LRP-αβ: positive contributions share α times the relevance, negative ones −β times."

    alpha: float = 1.0  # weight of positive contributions
    beta: float = 0.0   # weight of negative contributions
    bias: Literal["both", "own", "none"] = "both"  # parts of b in each denominator: both signs, its own sign, none

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        positive, negative = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        activation = self._share(layer, relevance, x, positive, negative, self._bias(layer, 0, None))
        if self.beta == 0:
            return activation
        inhibition = self._share(layer, relevance, x, negative, positive, self._bias(layer, None, 0))
        return self.alpha * activation - self.beta * inhibition

    def _bias(self, layer: LinearLayer, low: float | None, high: float | None) -> torch.Tensor | None:
        if layer.bias is None or self.bias == "none":
            return None
        return layer.bias if self.bias == "both" else layer.bias.clamp(low, high)

    def _share(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
               opposite: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        "Share relevance among positive inputs through `weight` and negative ones through `opposite`."
        if x.amin() >= 0:
            s = divide_into(relevance, layer.forward(x, weight, bias))
            return layer.transpose(s, weight, x.shape).mul_(x)
        above, below = x.clamp(min=0), x.clamp(max=0)
        s = divide_into(relevance, layer.forward(above, weight, bias).add_(layer.forward(below, opposite)))
        return layer.transpose(s, weight, x.shape).mul_(above).add_(layer.transpose(s, opposite, x.shape).mul_(below))


@RULES.register("z_plus")
@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    "The z⁺ rule: positive contributions alone, without bias."

    bias: Literal["both", "own", "none"] = "none"


@RULES.register("z_plus_fast")
@dataclass(frozen=True)
class ZPlusFast(Rule):
    "z⁺ for layers with non-negative input: positive weights, and the input as it is."

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight.clamp(min=0)
        return x * layer.transpose(divide_into(relevance, layer.forward(x, weight)), weight, x.shape)



@RULES.register("bounded")
@dataclass(frozen=True)
class Bounded(Rule):
    "The zB rule for a first layer whose input lies between two bounds."

    low: float = 0.0   # smallest value that the input can take
    high: float = 1.0  # largest value

    def backward(self, layer: LinearLayer, relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = [(x, layer.weight), (torch.full_like(x, -self.low), layer.weight.clamp(min=0)),
                 (torch.full_like(x, -self.high), layer.weight.clamp(max=0))]
        s = divide(relevance, sum(layer.forward(value, weight) for value, weight in parts))
        return sum(value * layer.transpose(s, weight, x.shape) for value, weight in parts)


@RULES.register("alpha_beta_x")
@dataclass(frozen=True)
class AlphaBetaX(Rule):
    "iNNvestigate's rule for batch normalisation: a denominator for each combination of signs."

    alpha: tuple[float, float] = (2.0, 0.0)  # weights of x⁺w⁺ and, by the paper, x⁻w⁻; the second is not used
    beta: tuple[float, float] = (1.0, 0.0)   # weights of x⁺w⁻ and x⁻w⁺; the second also stands for x⁻w⁻

    def backward(self, layer: "Scale", relevance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight, positive = layer.weight, layer.weight > 0
        rest = self.beta[1]
        pieces = [(x.clamp(min=0), torch.where(positive, self.alpha[0], -self.beta[0]))]
        if rest:
            pieces.append((x.clamp(max=0), torch.where(positive, -rest, rest)))
        bias = torch.zeros_like(weight) if layer.bias is None else layer.bias
        parts = []
        for value, share in pieces:
            z = layer.forward(value, weight, torch.where(positive, bias.clamp(min=0), bias.clamp(max=0)))
            parts.append(divide_into(relevance, z).mul_(value).mul_(_along_channels(weight * share, x)))
        return sum(parts[1:], parts[0])

