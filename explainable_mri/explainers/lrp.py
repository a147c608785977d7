
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from explainable_mri.config import EXPLAINERS, Component, Registry, suggest
from explainable_mri.explainers.graph import (
    ExplainerError, Graph, Step, batch_norm_scale, batch_norm_surrogate, choose_targets,
    evaluation_mode)
from explainable_mri.explainers.rules import (
    RULES, AlphaBeta, AlphaBetaX, Bounded, Epsilon, Flat, Gamma, Gradient, Operation, Pass, Proportional, Rule,
    WSquare, Z, ZPlus, ZPlusFast, fast_layout)



Convention = Literal["innvestigate", "standard"]


@dataclass(frozen=True)
class Composite:
    "Which step of a network gets which rule."

    rules: Mapping[str, Rule]                        # rule of each kind of step
    first: Rule | None = None                        # rule of dense and convolution layers that see the input itself
    until: int | None = None                         # the same rule for all of them up to this layer; the input is 0
    layers: Mapping[str, Rule] = field(default_factory=dict)  # rules of single layers, by name or pattern ("norm*")
    surrogate: bool = False                          # batch normalisation as iNNvestigate replaces it
    fold: bool = False                               # batch normalisation becomes part of the layer before it
    positive_logit: bool = False                     # start from max(logit, 0)

    def rule(
        self,
        step: Step,  # a step of a network
    ) -> Rule | None:  # its rule; None if there is none
        "Choose the rule: by name, by the module's own wish, by place, by kind."
        for pattern, rule in self.layers.items():
            if fnmatchcase(step.name, pattern):
                return rule
        if step.rule is not None:
            return RULES.build(Component(name=step.rule))
        early = step.from_input or (self.until is not None and step.index <= self.until)
        if self.first is not None and step.kind in ("dense", "convolution") and early:
            return self.first
        return self.rules.get(step.kind)



_INNVESTIGATE = {
    "activation": Pass(), "activation layer": Pass(), "addition": Proportional(), "average": Proportional(),
    "subtraction": Gradient(), "mean of branches": Gradient(), "multiplication": Gradient(), "scaling": Gradient(),
    "routing": Gradient(), "reshape": Gradient(), "ReLU layer": Gradient(),
}
_STANDARD = {
    "activation": Pass(), "activation layer": Pass(), "addition": Proportional(), "average": Proportional(),
    "subtraction": Proportional(), "mean of branches": Proportional(), "scaling": Pass(),
    "routing": Gradient(), "reshape": Gradient(), "ReLU layer": Pass(),
}


KINDS = ("dense", "convolution", "normalization", "multiplication", *_STANDARD)


def make_composite(
    convention: Convention,             # whose definition holds for everything else
    dense: Rule,                        # rule of fully connected layers
    convolution: Rule | None = None,    # rule of convolutions; None: as dense layers
    normalization: Rule | None = None,  # rule of batch normalisation; None: as convolutions
    **more: Any,                        # other fields of the composite
) -> Composite:                         # the composite
    "A composite from the rules of the layers that have weights."
    convolution = convolution or dense
    innvestigate = convention == "innvestigate"
    rules = _INNVESTIGATE if innvestigate else _STANDARD
    return Composite(
        {**rules, "dense": dense, "convolution": convolution, "normalization": normalization or convolution},
        surrogate=innvestigate, fold=not innvestigate, **more)



def alpha_beta_rule(convention: Convention, alpha: float, beta: float) -> AlphaBeta:
    return AlphaBeta(alpha, beta, "both" if convention == "innvestigate" else "own")


def preset(
    convention: Convention,     # whose definition holds
    alpha: float,               # α in convolutions
    beta: float,                # β in convolutions
    epsilon: float,             # ε in dense layers
    first: Rule | None = None,  # rule of the first layer
    until: int | None = None,   # it holds up to this layer
) -> Composite:                 # the composite
    "The sequential presets: LRP-ε in dense layers, LRP-αβ in convolutions."
    normalization = AlphaBetaX() if convention == "innvestigate" else None
    return make_composite(convention, Epsilon(epsilon), alpha_beta_rule(convention, alpha, beta), normalization,
                          first=first, until=until)


def deep_taylor(
    convention: Convention,
    first: Rule | None = None,
) -> Composite:
    "Deep Taylor decomposition: z⁺ in all layers with weights, the gradient elsewhere."
    composite = make_composite(convention, ZPlus(), first=first, positive_logit=True)
    if convention == "innvestigate":
        elsewhere = dict.fromkeys(["normalization", "activation layer", "addition", "average"], Gradient())
        return replace(composite, rules={**composite.rules, **elsewhere}, surrogate=False)
    return composite


COMPOSITES = Registry("LRP composite")



@COMPOSITES.register("z", "lrp_0")
def _z(convention: Convention) -> Composite:
    return make_composite(convention, Z())


@COMPOSITES.register("epsilon")
def _epsilon(convention: Convention, epsilon: float = 1e-7) -> Composite:
    return make_composite(convention, Epsilon(epsilon))


@COMPOSITES.register("w_square")
def _w_square(convention: Convention) -> Composite:
    return make_composite(convention, WSquare())


@COMPOSITES.register("flat")
def _flat(convention: Convention) -> Composite:
    return make_composite(convention, Flat())


@COMPOSITES.register("alpha_beta")
def _alpha_beta(convention: Convention, alpha: float = 2.0, beta: float = 1.0) -> Composite:
    return make_composite(convention, alpha_beta_rule(convention, alpha, beta))


@COMPOSITES.register("alpha_1_beta_0")
def _alpha_1_beta_0(convention: Convention) -> Composite:
    return _alpha_beta(convention, 1.0, 0.0)


@COMPOSITES.register("alpha_2_beta_1")
def _alpha_2_beta_1(convention: Convention) -> Composite:
    return _alpha_beta(convention, 2.0, 1.0)


@COMPOSITES.register("alpha_1_beta_0_IB", "z_plus")
def _z_plus(convention: Convention) -> Composite:
    return make_composite(convention, ZPlus())


@COMPOSITES.register("alpha_2_beta_1_IB")
def _alpha_2_beta_1_without_bias(convention: Convention) -> Composite:
    return make_composite(convention, AlphaBeta(2.0, 1.0, "none"))


@COMPOSITES.register("z_plus_fast")
def _z_plus_fast(convention: Convention) -> Composite:
    return make_composite(convention, ZPlusFast())


@COMPOSITES.register("sequential_preset_a")
def _preset_a(convention: Convention, epsilon: float = 0.1) -> Composite:
    return preset(convention, 1.0, 0.0, epsilon)


@COMPOSITES.register("sequential_preset_b")
def _preset_b(convention: Convention, epsilon: float = 0.1) -> Composite:
    return preset(convention, 2.0, 1.0, epsilon)


@COMPOSITES.register("sequential_preset_a_flat")
def _preset_a_flat(convention: Convention, epsilon: float = 0.1) -> Composite:
    return preset(convention, 1.0, 0.0, epsilon, Flat())


@COMPOSITES.register("sequential_preset_b_flat")
def _preset_b_flat(convention: Convention, epsilon: float = 0.1) -> Composite:
    return preset(convention, 2.0, 1.0, epsilon, Flat())


@COMPOSITES.register("sequential_preset_b_flat_until_idx")
def _preset_b_flat_until(convention: Convention, until_layer_idx: int, epsilon: float = 0.1) -> Composite:
    return preset(convention, 2.0, 1.0, epsilon, Flat(), until_layer_idx)


@COMPOSITES.register("deep_taylor")
def _deep_taylor(convention: Convention) -> Composite:
    return deep_taylor(convention)


@COMPOSITES.register("deep_taylor.bounded")
def _deep_taylor_bounded(convention: Convention, low: float, high: float) -> Composite:
    return deep_taylor(convention, Bounded(low, high))



@COMPOSITES.register("epsilon_plus")
def _epsilon_plus(convention: Convention, epsilon: float = 1e-6) -> Composite:
    return make_composite(convention, Epsilon(epsilon), ZPlus())


@COMPOSITES.register("epsilon_gamma_box")
def _epsilon_gamma_box(convention: Convention, low: float = 0.0, high: float = 1.0, epsilon: float = 1e-6,
                       gamma: float = 0.25) -> Composite:
    return make_composite(convention, Epsilon(epsilon), Gamma(gamma), first=Bounded(low, high))



def read_rule(
    entry: str | Mapping[str, Any] | Rule,  # "pass", or {"name": "epsilon", "params": {"epsilon": 0.1}}, or a rule
) -> Rule:                                  # the rule
    "Make a rule from an entry of a configuration; raises `ConfigError` when its name or a parameter is unknown."
    if isinstance(entry, Rule):
        return entry
    return RULES.build(Component(name=entry) if isinstance(entry, str) else Component(**entry))


def read_composite(
    entries: Mapping[str, Any],              # rules by kind; also "first", and "layers" with rules by name
    convention: Convention = "innvestigate",  # whose definition holds for kinds that are not mentioned
) -> Composite:                              # the composite
    "Make a composite from a configuration; raises `ExplainerError` when a kind is unknown."
    entries = dict(entries)
    first = entries.pop("first", None)
    layers = {name: read_rule(rule) for name, rule in entries.pop("layers", {}).items()}
    rules = {kind: read_rule(rule) for kind, rule in entries.items()}
    for kind in rules:
        if kind not in KINDS:
            raise ExplainerError(f"'{kind}' is no kind of layer. {suggest(kind, KINDS)}")
    if "dense" not in rules:
        raise ExplainerError("A composite needs at least a rule for 'dense'.")
    composite = make_composite(convention, rules["dense"], rules.get("convolution"), rules.get("normalization"),
                               first=None if first is None else read_rule(first), layers=layers)
    return replace(composite, rules={**composite.rules, **rules})



class LRP:
    "Layer-wise relevance propagation through any network that torch.fx can trace."

    def __init__(
        self,
        network: nn.Module,                                              # gives logits (N, classes); it is not changed
        composite: str | Composite | Mapping[str, Any] = "sequential_preset_a",  # name in COMPOSITES, or one's own
        convention: Convention = "innvestigate",                         # whose numbers: iNNvestigate's, or the literature's
        layers: Mapping[str, Rule | str | Mapping] | None = None,        # rules of single layers, by name or pattern
        **params: Any,                                                   # parameters of a composite given by name
    ):
        if convention not in get_args(Convention):
            raise ExplainerError(f"There is no convention '{convention}'. {suggest(convention, get_args(Convention))}")
        if isinstance(composite, str):
            composite = COMPOSITES.build(Component(name=composite, params=params), convention)
        elif params:
            raise ExplainerError(f"Parameters ({', '.join(params)}) belong to a composite given by name.")
        elif not isinstance(composite, Composite):
            composite = read_composite(composite, convention)
        own = {name: read_rule(rule) for name, rule in (layers or {}).items()}
        self.composite = replace(composite, layers={**own, **composite.layers})
        self.graph = Graph(network)
        self.rules = {node: self.composite.rule(step) for node, step in self.graph.steps.items()}
        self.folded = self._find_folded() if self.composite.fold else {}
        self.rules |= dict.fromkeys(self.folded.values(), Pass())
        self._check()

    def _check(self) -> None:
        "Raise an error that names every step without a rule, and the choices."
        without = [f"'{step.name}' ({step.description})" for node, step in self.graph.steps.items()
                   if self.rules[node] is None]
        if without:
            raise ExplainerError(
                f"No LRP rule for {', '.join(without)}. There are rules for these kinds of layers: {', '.join(KINDS)}. "
                f"Give a layer a rule by its name, as in LRP(network, layers={{{without[0].split(' ')[0]}: 'pass'}}); "
                f"rules are: {', '.join(RULES.names())}.")

    def _find_folded(self) -> dict[fx.Node, fx.Node]:
        "Layers directly followed by batch normalisation, which can become part of them."
        steps, folded = self.graph.steps, {}
        for node, step in steps.items():
            before, *_ = step.inputs
            if step.kind == "normalization" and before in steps and len(before.users) == 1 \
                    and steps[before].kind in ("dense", "convolution"):
                folded[before] = node
        return folded

    def attribute(
        self,
        inputs: torch.Tensor,                                      # batch (N, C, ...)
        target: int | Sequence[int] | torch.Tensor | None = None,  # class, a class for each sample, or None: the predicted
    ) -> torch.Tensor:                                             # relevance, of the inputs' shape
        "Relevance of every input value for the logit of a class; raises `ExplainerError` for a target out of range."
        inputs = inputs.detach().as_subclass(torch.Tensor)
        with torch.no_grad(), evaluation_mode(self.graph.network):
            logits, saved = self._forward(fast_layout(inputs))
            targets = choose_targets(logits, target)[:, None]
            start = logits.clamp(min=0) if self.composite.positive_logit else logits
            relevance = torch.zeros_like(start).scatter_(1, targets, start.gather(1, targets))
            return self._backward(relevance, saved).contiguous()

    def _forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, list[tuple[fx.Node, Operation, tuple]]]:
        "Logits, and for each step its operation and what its rule keeps."
        graph, values, saved = self.graph, {self.graph.input: inputs}, []
        for node in graph.nodes:
            if node in graph.steps:
                operation = self._operation(graph.steps[node], values)
                arguments = [values[one] for one in graph.steps[node].inputs]
                values[node], kept = self.rules[node].forward(operation, *arguments)
                saved.append((node, operation, kept))
            elif node is not graph.input:
                values[node] = graph.run(node, values)
            for used in graph.done[node]:
                del values[used]
        return values[graph.output], saved

    def _operation(self, step: Step, values: dict[fx.Node, Any]) -> Operation:
        "A step as the rules see it, with batch normalisation as the convention wants it."
        if step.node in self.folded.values():
            return Operation(lambda x: x)
        if step.kind == "normalization" and self.composite.surrogate:
            return batch_norm_surrogate(step.module)
        operation = self.graph.operation(step, values)
        if step.node in self.folded:
            scale = batch_norm_scale(self.graph.steps[self.folded[step.node]].module)
            return operation.scaled(scale.weight, scale.bias)
        return operation

    def _backward(self, relevance: torch.Tensor, saved: list[tuple[fx.Node, Operation, tuple]]) -> torch.Tensor:
        "Hand relevance back step by step; what a step kept is freed when it is done."
        collected = {self.graph.output: relevance}
        while saved:
            node, operation, kept = saved.pop()
            result = self.rules[node].backward(operation, collected.pop(node), *kept)
            parts = result if isinstance(result, tuple) else (result,)
            for source, part in zip(self.graph.steps[node].inputs, parts):
                collected[source] = collected[source] + part if source in collected else part
        return collected[self.graph.input]



def _register(name: str) -> None:
    "Enter a composite into the registry of explainers, under the name that iNNvestigate gives it."

    @EXPLAINERS.register(name if name.startswith("deep_taylor") else f"lrp.{name}")
    def build(network: nn.Module, convention: Convention = "innvestigate", **params: Any) -> LRP:
        return LRP(network, name, convention, **params)


for _name in COMPOSITES.names():
    _register(_name)
EXPLAINERS.register("lrp")(LRP)

