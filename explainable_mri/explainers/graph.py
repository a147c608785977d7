
import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from explainable_mri.explainers.rules import Convolution, Dense, LinearLayer, Operation, Scale, StandIn



class ExplainerError(ValueError):
    "A network, an input or a target that a method cannot explain, with the reason."


@contextmanager
def evaluation_mode(
    network: nn.Module,  # any network
) -> Iterator[None]:
    "Put the network into evaluation mode for a while; each module gets its own mode back, whatever happens."
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training



_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold, nn.Tanhshrink,
    nn.Softshrink, nn.Hardshrink)
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "dense": (nn.Linear,),
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "normalization": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "activation": _ACTIVATIONS,
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
                nn.AdaptiveAvgPool3d),
    "routing": (
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
        nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Upsample, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
        nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.ChannelShuffle, nn.PixelShuffle),
    "reshape": (nn.Flatten, nn.Unflatten, nn.Identity),
    "softmax": (nn.Softmax, nn.LogSoftmax),
}
_FUNCTIONS: dict[str, tuple[str, ...]] = {  # functions of torch, torch.nn.functional and operator, methods of tensors
    "activation": (
        "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
        "softsign", "sigmoid", "logsigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish", "threshold", "exp", "clamp",
        "clip"),
    "addition": ("add", "iadd", "sum"),
    "subtraction": ("sub", "isub", "subtract"),
    "multiplication": ("mul", "imul", "multiply", "truediv", "itruediv", "div", "divide"),
    "average": ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                "adaptive_avg_pool3d", "mean"),
    "routing": (
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "amax", "maximum", "minimum", "cat", "concat", "concatenate", "stack", "pad", "dropout", "dropout1d", "dropout2d",
        "dropout3d", "alpha_dropout", "feature_alpha_dropout", "interpolate", "upsample", "getitem", "narrow", "select",
        "repeat", "tile", "expand", "expand_as"),
    "reshape": (
        "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze", "permute", "transpose",
        "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "contiguous", "clone", "to", "float", "double", "detach",
        "identity"),
    "split": ("chunk", "split", "tensor_split", "unbind"),
    "softmax": ("softmax", "log_softmax"),
    "constant": ("size", "dim", "getattr", "numel", "ndimension", "is_floating_point"),
}
_KIND_OF_FUNCTION = {name: kind for kind, names in _FUNCTIONS.items() for name in names}
# Layers that an imported Keras network marks by their class and that have no exact counterpart among PyTorch's modules
_KERAS_JOINS = {"Add": "addition", "Subtract": "subtraction", "Multiply": "multiplication", "Average": "mean of branches",
                "Maximum": "routing", "Minimum": "routing", "Concatenate": "routing"}



@dataclass
class Step:
    "One step of a network."

    name: str                    # of the module, such as "features.0", or of the function, such as "add_1"
    kind: str | None             # what it does, such as "convolution"; None if not known
    description: str             # class of the module or name of the function
    inputs: tuple[fx.Node, ...]  # the nodes whose relevance is asked for
    node: fx.Node                # its place in the graph
    module: nn.Module | None     # the module, where it is one
    from_input: bool             # nothing but reshaping lies between the network's input and this step
    index: int                   # number of the layer; the input is layer 0, an activation belongs to the layer before

    @property
    def rule(self) -> str | None:
        "Name of the rule that the module itself asks for with an attribute `relevance`."
        return None if self.kind == "ReLU layer" else getattr(self.module, "relevance", None)



class _Tracer(fx.Tracer):
    "Looks into every module except those that have a kind of their own."

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return hasattr(module, "relevance") or _kind_of_module(module) is not None \
            or super().is_leaf_module(module, qualified_name)


def _kind_of_module(module: nn.Module) -> str | None:
    if getattr(module, "keras_class", None) in _KERAS_JOINS:
        return _KERAS_JOINS[module.keras_class]
    for kind, classes in _MODULES.items():
        if isinstance(module, classes):
            return _kind_of_activation(module) if kind == "activation" else kind
    return None


def _kind_of_activation(module: nn.Module) -> str:
    "Tell activations of imported Keras networks apart by where they stood."
    if getattr(module, "relevance", None) == "gradient":
        return "ReLU layer"
    return "activation layer" if getattr(module, "keras_class", None) == "Activation" else "activation"


def _layer_name(node: fx.Node, module: nn.Module | None) -> str:
    "Name of the layer to which a step belongs; an imported Keras layer may consist of several modules."
    return ".".join(node.target.split(".")[:2]) if hasattr(module, "keras_class") else node.name


def _function_name(target: Any) -> str:
    "Name of a function or method, without the mark of its in-place variant."
    name = target if isinstance(target, str) else target.__name__
    return name.strip("_")



class Graph:
    "A network as steps in the order of computation."

    def __init__(
        self,
        network: nn.Module,  # any network that torch.fx can trace; it is not changed
    ):
        self.network = network
        try:
            with evaluation_mode(network):
                self.graph = _Tracer().trace(network)
        except Exception as error:
            raise ExplainerError(
                f"The network {type(network).__name__} cannot be traced: {error}. Its forward must not depend on the "
                "values of tensors, and must call no code that torch.fx cannot follow.") from error
        self.nodes = list(self.graph.nodes)
        self.input = next(node for node in self.nodes if node.op == "placeholder")
        self.splits: set[fx.Node] = set()
        self.steps = self._find_steps()
        self.output = self._find_output()
        needed = {self.output}
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.nodes = [node for node in self.nodes if node in needed]
        self.steps = {node: step for node, step in self.steps.items() if node in needed and step.kind != "split"}
        last_use = {one: node for node in self.nodes for one in self._used(node)}
        self.done: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}  # what nobody needs after a node
        for one, node in last_use.items():
            self.done[node].append(one)

    def _used(self, node: fx.Node) -> list[fx.Node]:
        "The nodes whose values are needed to compute this one."
        return [*node.all_input_nodes, *(self.steps[node].inputs if node in self.steps else ())]

    def _find_steps(self) -> dict[fx.Node, Step]:
        modules = dict(self.network.named_modules())
        steps: dict[fx.Node, Step] = {}
        tracked, plain, layer, index = {self.input}, {self.input}, "", 0
        for node in self.nodes:
            inputs = tuple(one for one in node.all_input_nodes if one in tracked)
            if not inputs or node.op == "output":
                continue
            module = modules[node.target] if node.op == "call_module" else None
            name = _function_name(node.target)
            kind = _kind_of_module(module) if module is not None else _KIND_OF_FUNCTION.get(name)
            if kind == "constant":
                continue
            if kind == "multiplication" and len(inputs) == 1:
                kind = "scaling"
            if inputs[0] in self.splits:  # an element of the split's result
                inputs = steps[inputs[0]].inputs
            if kind == "split":
                self.splits.add(node)
            before = inputs[0] in plain
            if before and kind == "reshape":
                plain.add(node)
            tracked.add(node)
            place = _layer_name(node, module)
            if kind != "activation" and place != layer:
                layer, index = place, index + 1
            steps[node] = Step(node.target if module is not None else node.name, kind,
                               type(module).__name__ if module is not None else name, inputs, node, module, before, index)
        return steps

    def _find_output(self) -> fx.Node:
        "The node of the logits."
        [result] = [node.args[0] for node in self.nodes if node.op == "output"]
        if not isinstance(result, fx.Node) or result not in self.steps:
            raise ExplainerError(f"The network {type(self.network).__name__} must return one tensor, its logits.")
        while self.steps[result].kind == "softmax":
            result, *_ = self.steps[result].inputs
        return result

    def operation(
        self,
        step: Step,                        # a step of this graph
        values: dict[fx.Node, Any],        # what the other nodes have computed
    ) -> Operation:                        # the step as a function of its inputs
        "The step as the rules see it."
        if step.kind in _LINEAR:
            return _LINEAR[step.kind](step.module)
        constants = {node: values[node] for node in self._arguments(step) if node not in step.inputs}

        def function(*inputs: torch.Tensor) -> Any:
            given = constants | dict(zip(step.inputs, inputs))
            for node in self._chain(step):
                given[node] = self.run(node, given)
            return given[step.node]

        return Operation(function)

    def _chain(self, step: Step) -> list[fx.Node]:
        "The nodes that make up a step: itself, and the split of which it takes an element."
        return [*(node for node in step.node.all_input_nodes if node in self.splits), step.node]

    def _arguments(self, step: Step) -> list[fx.Node]:
        chain = self._chain(step)
        return [one for node in chain for one in node.all_input_nodes if one not in chain]

    def run(
        self,
        node: fx.Node,              # the node to compute
        values: dict[fx.Node, Any],  # the values of its arguments
    ) -> Any:                       # its value
        "Compute a node, without changing its arguments in place."
        if node.op == "placeholder":  # an argument that the caller leaves out
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.network)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            return _without_inplace(self.network.get_submodule(node.target))(*args, **kwargs)
        if kwargs.get("inplace"):
            kwargs = kwargs | {"inplace": False}
        if node.op == "call_method":
            name = node.target.rstrip("_") if not node.target.startswith("__") else node.target
            return getattr(args[0], name)(*args[1:], **kwargs)
        return _OUT_OF_PLACE.get(node.target, node.target)(*args, **kwargs)


_OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
                 operator.itruediv: operator.truediv, torch.relu_: torch.relu, F.relu_: F.relu}


def _without_inplace(module: nn.Module) -> nn.Module:
    "The module, or a shallow copy that shares its parameters where it would change its input."
    if not getattr(module, "inplace", False):
        return module
    module = copy.copy(module)
    module.inplace = False
    return module



def batch_norm_scale(
    module: nn.Module,  # batch normalisation with running statistics
) -> Scale:             # what it computes in evaluation mode
    "Batch normalisation as the affine function that it is."
    gamma, beta, mean, variance = _batch_norm_parameters(module)
    weight = gamma / torch.sqrt(variance + module.eps)
    return Scale(weight, beta - mean * weight)


def batch_norm_surrogate(
    module: nn.Module,  # batch normalisation with running statistics
) -> StandIn:           # its output, with the weights that iNNvestigate's rules see
    "iNNvestigate's stand-in for batch normalisation: the variance is squared, the mean's term lacks γ."
    gamma, beta, mean, variance = _batch_norm_parameters(module)
    root = torch.sqrt(variance ** 2 + module.eps)
    return StandIn(module, gamma / root, beta - mean / root)


def _batch_norm_parameters(module: nn.Module) -> tuple[torch.Tensor, ...]:
    "γ, β, mean and variance."
    if module.running_mean is None:
        raise ExplainerError("Batch normalisation without running statistics has no fixed scale to propagate through.")
    mean, variance = module.running_mean, module.running_var
    gamma = torch.ones_like(mean) if module.weight is None else module.weight.detach()
    beta = torch.zeros_like(mean) if module.bias is None else module.bias.detach()
    return gamma, beta, mean, variance


_LINEAR: dict[str, Callable[[nn.Module], LinearLayer]] = {
    "dense": lambda module: Dense(module.weight, module.bias),
    "convolution": Convolution,
    "normalization": batch_norm_scale,
}



def choose_targets(
    logits: torch.Tensor,                                  # (N, classes)
    target: int | Sequence[int] | torch.Tensor | None,     # a class for all, one for each, or None for the predicted
) -> torch.Tensor:                                         # classes (N,)
    "The class to explain for each sample of a batch."
    if logits.dim() != 2:
        raise ExplainerError(f"The network must return logits of shape (N, classes), not {tuple(logits.shape)}.")
    if target is None:
        return logits.argmax(1)
    count, classes = logits.shape
    targets = torch.as_tensor(target, device=logits.device)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() > 1 or targets.numel() not in (1, count):
        raise ExplainerError(f"The target must be a class, {count} classes for {count} samples, or None, not {target!r}.")
    targets = targets.long().reshape(-1).expand(count)
    if ((targets < 0) | (targets >= classes)).any():
        raise ExplainerError(f"The network has the classes 0 to {classes - 1}; the target is {target!r}.")
    return targets

