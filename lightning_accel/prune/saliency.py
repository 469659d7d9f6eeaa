"""What makes a weight or a unit worth keeping: each saliency with its formula and its paper.

A unit i (a single weight, neuron, head, channel or layer) has a set of weights and biases W_i. The functions give one
number for each unit of a group; the least salient go first. Those that need data read running means over calibration
batches, `Means`, which `observe` fills during forward passes and `add_gradients` after backward passes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .groups import Group

# what a saliency needs beside the weights: nothing, gradients of the loss, inputs of layers, or blocks as they run
SALIENCIES = {
    "l1": "",
    "l2": "",
    "taylor": "gradients",
    "wanda": "inputs",
    "activation": "inputs",
    "block-influence": "blocks",
    "random": "",
}
PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
_HELP = "give calibration=[batch, ...] (or prune in training, where the batches serve), or write saliency='l2'"


def l1(target: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of |w| over W_i, [width] (Li et al. 2017, arXiv:1608.08710)."""
    return unit_sums(target, {name: parameters[name].abs() for name in _names(target, parameters)})


def l2(target: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """sqrt(sum of w^2 over W_i), [width]; of a single weight |w| (Han et al. 2015, arXiv:1506.02626)."""
    return unit_sums(target, {name: parameters[name].square() for name in _names(target, parameters)}).sqrt()


def taylor(target: Group, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """|sum of g w over W_i|, [width], g the gradient of the loss of one batch: to first order what the loss changes by
    when the unit is zeroed (Molchanov et al. 2019, arXiv:1906.10771). Over batches, the root of the mean square.
    """
    products = {n: gradients[n] * parameters[n] for n in _names(target, parameters) if n in gradients}
    return unit_sums(target, products, parameters).abs()


def wanda(target: Group, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Sum of |w_ij| ||x_j|| over the weights w_ij in W_i, [width] (Sun et al. 2023, arXiv:2306.11695).

    `inputs`: of each weight's layer the root mean square of each input over all tokens, which is the paper's ||x_j||
    but for a factor that is the same for all; of a shape that multiplies the weight, as [1, in] for [out, in].
    A bias counts as the weight of an input of 1; layers that are neither linear nor convolutions do not count.
    """
    products = {}
    for name in _names(target, parameters):
        bias_of = name.removesuffix("bias") + "weight"
        if name in inputs:
            products[name] = parameters[name].abs() * inputs[name]
        elif name.endswith("bias") and bias_of in inputs:
            products[name] = parameters[name].abs()
    return unit_sums(target, products, parameters)


def activation(target: Group, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """sqrt(sum of the mean square of the unit's activations), [width], where layers read them (Hu et al. 2016,
    arXiv:1607.03250, counts how often they are zero; the norm is that of Minitron, arXiv:2407.14679).

    `inputs`: as for `wanda`.
    """
    squares, reads = torch.zeros(target.width), False
    for member in target.members:
        if member.name in inputs and inputs[member.name].shape[member.dim] == parameters[member.name].shape[member.dim]:
            read = inputs[member.name].square().movedim(member.dim, 0).flatten(1).mean(1)
            squares, reads = squares.to(read.device) + read[member.index.to(read.device)].sum(1), True
    if not reads:
        raise ValueError(f"no linear layer or convolution reads the {target.kind} of {target.name!r}; {_HELP}")
    return squares.sqrt()


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - mean over tokens of cos(x, y), a scalar, x and y [..., width] a block's input and output (Men et al. 2024,
    arXiv:2403.03853). Of images [batch, channels, height, width], the tokens are the places.

    >>> x = torch.eye(2)
    >>> float(block_influence(x, x)), float(block_influence(x, x.flip(0)))
    (0.0, 1.0)
    """
    dim = 1 if before.dim() == 4 else -1
    return 1.0 - nn.functional.cosine_similarity(before.float(), after.float(), dim=dim).mean()


def random(target: Group, seed: int) -> Tensor:
    """Uniform random numbers [width], the same for a seed, a name and a width: the control of all others."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {target.kind} {target.name}".encode()))
    return torch.rand(target.width, generator=generator)


def saliency(
    name: str, target: Group, parameters: Mapping[str, Tensor], means: Means | None = None, seed: int = 0
) -> Tensor:
    """The saliency called `name` of each unit of a target, [width] in float32; units that are zero already have -1.

    Raises:
        ValueError: the means of what it needs are missing.
    """
    values = {n: p.detach().float() for n, p in parameters.items() if n in {m.name for m in target.members}}
    norms = l2(target, values)
    if name == "l2":
        return norms
    if name == "l1":
        return l1(target, values)
    if name == "random":
        found = random(target, seed).to(norms.device)
    else:
        found = _measured(name, target, values, means if means is not None else Means()).to(norms.device)
    return torch.where(norms > 0, found, -torch.ones_like(found))  # what is pruned stays the least salient


def _measured(name: str, target: Group, values: Mapping[str, Tensor], means: Means) -> Tensor:
    missing = f"saliency={name!r} needs data, and none reached {target.name!r}; {_HELP}"
    if name == "taylor":
        if _key(target) not in means:
            raise ValueError(missing)
        return means[_key(target)].sqrt()
    if name == "block-influence":
        blocks = list(target.units)
        if not all(block in means for block in blocks):
            raise ValueError(missing)
        return torch.stack([means[block] for block in blocks])
    inputs = {n: means[n].sqrt() for n in values if n in means}
    if not inputs:
        raise ValueError(missing)
    return (wanda if name == "wanda" else activation)(target, values, inputs)


def unit_sums(target: Group, values: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sums of per-weight `values` (of a parameter's shape each) over every unit, [width]; missing ones count as 0."""
    first = target.members[0]
    if first.dim < 0:
        weights = values[first.name].flatten()
        return weights[first.index.to(weights.device)].sum(1) if len(first.index) else weights
    device = next(iter((values or like or {}).values()), torch.zeros(())).device
    sums = torch.zeros(target.width, device=device)
    for member in target.members:
        if member.name not in values:
            continue
        if member.unit is not None:
            sums[member.unit] += values[member.name].sum()
            continue
        rows = values[member.name].movedim(member.dim, 0)
        rows = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        sums += rows[member.index.to(device)].sum(1)
    return sums


def _names(target: Group, parameters: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(m.name for m in target.members if m.name in parameters))  # the others are buffers


def _key(target: Group) -> str:
    places = " ".join(f"{m.name}:{m.dim}:{int(m.index.sum())}" for m in target.members[:2])
    return f"{target.kind} {target.name} {places}"


# --- what calibration batches say -------------------------------------------------------------------------------------


class Means:
    """Running means of tensors by name, over batches; while `paused`, observers add nothing.

    >>> means = Means()
    >>> means.add("x", torch.tensor(6.0), 2)
    >>> means.add("x", torch.tensor(2.0), 2)
    >>> float(means["x"])
    2.0
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None, counts: Mapping[str, Tensor] | None = None) -> None:
        self.sums, self.counts = dict(sums or {}), dict(counts or {})
        self.paused = False

    def clear(self) -> None:
        """Forgets what was added."""
        self.sums.clear()
        self.counts.clear()

    def add(self, name: str, total: Tensor, count: float) -> None:
        """Adds a sum over `count` values."""
        total = total.detach().float()
        number = torch.tensor(float(count), device=total.device)
        self.sums[name] = self.sums[name].to(total.device) + total if name in self.sums else total
        self.counts[name] = self.counts[name].to(total.device) + number if name in self.counts else number

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name] / self.counts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def reduced(self, reduce: Callable[[Tensor], Tensor], shapes: Mapping[str, Sequence[int]]) -> Means:
        """Means over ranks, with `reduce` the sum of a tensor over them, of all names that any of them has."""
        zero = torch.zeros(())
        sums = {name: reduce(self.sums.get(name, torch.zeros(shapes[name])).clone()) for name in sorted(shapes)}
        return Means(sums, {name: reduce(self.counts.get(name, zero).clone()) for name in sorted(shapes)})


def observe_inputs(model: nn.Module, means: Means) -> list[Any]:
    """Hooks that add the mean squares of every layer's inputs whenever `model` is called."""
    first = {id(parameter): name for name, parameter in select.named_parameters(model).items()}
    layers = [module for _, module in select.named_modules(model) if isinstance(module, PRUNABLE)]
    named = [(first.get(id(layer.weight)), layer) for layer in layers]
    return [layer.register_forward_pre_hook(_observer(name, means)) for name, layer in named if name is not None]


def observe_blocks(model: nn.Module, units: Sequence[str], means: Means) -> list[Any]:
    """Hooks that add the influence of the blocks called `units`."""
    return [hook for name in units for hook in _observe_block(select.get_module(model, name), name, means)]


def _observer(name: str, means: Means) -> Callable[..., None]:
    @torch.no_grad()
    def observe_input(module: Any, args: tuple) -> None:
        if means.paused:
            return
        x = args[0].detach().float()
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            squares = x.square().movedim(1, -1).flatten(0, -2)
            parts = squares.sum(0).view(module.groups, -1)
            parts = parts if module.groups == 1 else parts.repeat_interleave(module.out_channels // module.groups, 0)
            total = parts.view(*parts.shape, *([1] * (module.weight.dim() - 2)))
        else:
            squares = x.square().flatten(0, -2)
            total = squares.sum(0)[:, None] if isinstance(module, Conv1D) else squares.sum(0)[None]
        means.add(name, total, len(squares))

    return observe_input


def _observe_block(block: nn.Module, name: str, means: Means) -> list[Any]:
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs[:] = [first_tensor((args, kwargs)).detach()]

    @torch.no_grad()
    def compare(module: nn.Module, args: tuple, output: Any) -> None:
        if means.paused:
            return
        after = first_tensor(output)
        tokens = inputs[0].numel() // inputs[0].shape[1 if inputs[0].dim() == 4 else -1]
        means.add(name, block_influence(inputs[0], after) * tokens, tokens)

    return [block.register_forward_pre_hook(keep, with_kwargs=True), block.register_forward_hook(compare)]


def first_tensor(value: Any) -> Tensor:
    """The first tensor in inputs or outputs: of a block of transformers the hidden states."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def add_gradients(means: Means, targets: Sequence[Group], parameters: Mapping[str, Tensor]) -> None:
    """Adds what the gradients of one batch, in `parameter.grad`, say for `taylor`; nothing where one is not finite,
    as in a step that overflows and is skipped."""
    wanted = {member.name for target in targets for member in target.members}
    found = {name: p for name, p in parameters.items() if name in wanted and p.grad is not None}
    values = {name: p.detach().float() for name, p in found.items()}
    gradients = {name: p.grad.detach().float() for name, p in found.items() if p.grad is not None}
    reached = [target for target in targets if any(member.name in found for member in target.members)]
    squares = {_key(target): taylor(target, values, gradients).square() for target in reached}
    if all(square.isfinite().all() for square in squares.values()):
        for key, square in squares.items():
            means.add(key, square, 1)
