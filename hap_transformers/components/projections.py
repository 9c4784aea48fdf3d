"""A linear map inside a model, seen as a matrix of shape (outputs, inputs) however its module stores it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .spreading import given_features, gradients_of_given, read_features
from .subclasses import empty_inputs, empty_outputs


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Projection:
    """A `nn.Linear`, or one of the equal parts of a fused one (queries, keys and values; neurons and gates).

    Subclasses are the other ways to store a linear map: each says where outputs and inputs lie in the weight.

    Args:
        name (`str`): Path of the module from `model.base_model`.
        module (`nn.Module`): The module that owns the weights.
        part (`int`, *optional*, defaults to 0): Which of the equal parts of the module's outputs this is.
        parts (`int`, *optional*, defaults to 1): Number of parts.
    """

    name: str
    module: Any
    part: int = 0
    parts: int = 1

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The module's weight, and its bias if it has one."""
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    @property
    def values(self) -> list[torch.Tensor]:
        """All numbers of the module that a refit may change."""
        return self.parameters

    @property
    def has_bias(self) -> bool:
        """Whether the outputs have biases."""
        return self.module.bias is not None

    @property
    def can_be_cut(self) -> bool:
        """Whether outputs and inputs can be taken away."""
        return True

    @property
    def as_matrix(self) -> torch.Tensor:
        """This part of the weight, shape `(outputs, inputs)`."""
        return self.matrix(self.module.weight)

    @property
    def narrow(self) -> tuple[slice, slice] | None:
        """The outputs that read some of the inputs only, and these inputs."""
        return None

    @property
    def part_sizes(self) -> list[int]:
        """Outputs of each part of the module: equal ones, unless dimensions of heads were cut."""
        outputs = self.module_matrix(self.module.weight).shape[0]
        return vars(self.module).get("part_sizes") or [outputs // self.parts] * self.parts

    @property
    def out_features(self) -> int:
        """Number of outputs of this part."""
        return self.part_sizes[self.part]

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.module_matrix(self.module.weight).shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether the module is known, and its parameters are a weight and a bias of ordinary floating point."""
        parameters = dict(self.module.named_parameters(recurse=False))
        known = isinstance(self.module, tuple(STORED_AS)) and "weight" in parameters
        return (
            known
            and parameters.keys() <= {"weight", "bias"}
            and all(type(p) is nn.Parameter and p.dtype in DTYPES for p in parameters.values())
        )

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """All parts, shape `(outputs of the module, inputs)`, of a tensor shaped like the module's weight."""
        return weight

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """This part, shape `(outputs, inputs)`, of a tensor shaped like the module's weight."""
        return self.outputs_of(self.module_matrix(weight).T).T

    def outputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a tensor whose last dimension is the module's outputs."""
        return tensor.narrow(-1, sum(self.part_sizes[: self.part]), self.out_features)

    def read(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the columns of [`matrix`] read of the module's inputs, shape `(..., inputs)`."""
        return read_features(self.module, inputs)

    def given(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the rows of [`matrix`] give of the module's outputs, shape `(..., outputs)`."""
        return self.outputs_of(given_features(self.module, outputs))

    def tokens(self, inputs: torch.Tensor, examples: int) -> torch.Tensor:
        """What the module read, shape `(examples, tokens, inputs)`."""
        inputs = self.read(inputs)
        return inputs.reshape(examples, -1, inputs.shape[-1])

    def cotangents(self, gradients: torch.Tensor, examples: int) -> torch.Tensor:
        """Gradients of the module's outputs, shape `(examples, tokens, outputs of the module)`."""
        gradients = gradients_of_given(self.module, gradients)
        return gradients.reshape(examples, -1, gradients.shape[-1])

    def seen(self, outputs: torch.Tensor) -> torch.Tensor:
        """Features of the tokens that [`read`] reads, of a tensor with those of all that the module gives."""
        return outputs

    def applied(self, inputs: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the module gives with another matrix, shape `(outputs of the module, inputs)`, and bias."""
        return F.linear(inputs, matrix, bias)

    def times(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The module's inputs, with every example's components multiplied by its row of a mask.

        Args:
            inputs (`torch.Tensor`): Shape `(..., features)`, of one or several rows an example.
            mask (`torch.Tensor`): Shape `(examples, components)`.
        """
        width = inputs.shape[-1]
        places = self.read(torch.arange(width, device=mask.device))  # In the order of the components.
        of_features = mask.repeat_interleave(len(places) // mask.shape[1], 1)
        whole = torch.ones_like(mask[:, :1]).expand(-1, width).index_copy(1, places, of_features)
        tokens = inputs.reshape(len(mask), -1, width)
        return (tokens * whole[:, None].to(tokens.dtype)).reshape(inputs.shape)

    def empty(self, *, outputs: bool) -> None:
        """Lets the module, which has no outputs, or no inputs, left, compute no matrix product."""
        (empty_outputs if outputs else empty_inputs)(self.module)

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module with so many outputs and inputs."""
        return [outputs, inputs]

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Where features that are counted component by component lie in the part, or in the inputs."""
        return index

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some outputs, or inputs, of the whole module, whose parameters are replaced.

        Args:
            index (`torch.Tensor`): Positions to keep, in the order that they shall have.
            outputs (`bool`): Whether positions are those of outputs, over all parts, or of inputs.
        """
        module = self.module
        index = index.to(module.weight.device)
        module.weight = _selected(module.weight, self._dimension(outputs), index)
        if outputs and self.has_bias:
            module.bias = _selected(module.bias, 0, index)
        self._note_sizes()

    def write(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Puts numbers into the weight, and into the bias if there is one.

        Args:
            matrix (`torch.Tensor`): Shape `(outputs, inputs)`.
            bias (`torch.Tensor`, *optional*): Shape `(outputs,)`.
        """
        with torch.no_grad():
            self.matrix(self.module.weight).copy_(matrix)
            if bias is not None:
                self.outputs_of(self.module.bias).copy_(bias)

    def weights_by_rows(self) -> int:
        """Number of weights and biases behind this part's outputs."""
        return self.out_features * (self.in_features + self.has_bias)

    def _dimension(self, outputs: bool) -> int:
        return 0 if outputs else 1

    def _note_sizes(self) -> None:
        self.module.out_features, self.module.in_features = self.module.weight.shape


@dataclass(frozen=True)
class GroupedWriter(Projection):
    """A query projection whose heads share a key/value head: a component has outputs in several of them.

    Args:
        order (`tuple[int, ...]`, *optional*): The part's outputs, component by component.
    """

    order: tuple[int, ...] = ()

    def outputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a tensor whose last dimension is the module's outputs, component by component."""
        return super().outputs_of(tensor)[..., list(self.order)]

    def write(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Puts numbers into the weight, and into the bias if there is one."""
        inverse = _inverse(self.order)
        plain = make_projection(self.name, self.module, self.part, self.parts)
        plain.write(matrix[inverse], None if bias is None else bias[inverse])

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Where outputs that are counted component by component lie in the part, first one first."""
        return torch.tensor(self.order)[index].sort().values


@dataclass(frozen=True)
class GroupedReader(Projection):
    """An output projection whose heads share a value head: a component has inputs in several of them.

    Args:
        order (`tuple[int, ...]`, *optional*): The inputs, component by component.
    """

    order: tuple[int, ...] = ()

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """All parts, shape `(outputs of the module, inputs)`, with inputs component by component."""
        return super().module_matrix(weight)[:, list(self.order)]

    def read(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the columns of [`matrix`] read of the module's inputs, shape `(..., inputs)`."""
        return super().read(inputs)[..., list(self.order)]

    def write(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Puts numbers into the weight, and into the bias if there is one."""
        make_projection(self.name, self.module, self.part, self.parts).write(matrix[:, _inverse(self.order)], bias)

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Where inputs that are counted component by component lie in the module, first one first."""
        return torch.tensor(self.order)[index].sort().values


@dataclass(frozen=True)
class NormedHeads(Projection):
    """The norm of every head of what a projection gives, which is seen as if it were the projection's own output.

    Args:
        given_by (`Projection`, *optional*): The projection.
    """

    given_by: Projection | None = None

    def cotangents(self, gradients: torch.Tensor, examples: int) -> torch.Tensor:
        """Gradients of the norm's outputs, shape `(examples, tokens, outputs of the projection)`."""
        assert self.given_by is not None
        return self.given_by.cotangents(gradients.flatten(-2), examples)

    def outputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The projection's part of a tensor whose last dimension is its module's outputs."""
        assert self.given_by is not None
        return self.given_by.outputs_of(tensor)


class Conv1DProjection(Projection):
    """A `Conv1D` of GPT-2, which stores (inputs, outputs), or a part of a fused one."""

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """All parts, shape `(outputs of the module, inputs)`, of a tensor shaped like the module's weight."""
        return weight.T

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module with so many outputs and inputs."""
        return [inputs, outputs]

    def _dimension(self, outputs: bool) -> int:
        return 1 if outputs else 0

    def _note_sizes(self) -> None:
        self.module.nx, self.module.nf = self.module.weight.shape


# Another way to store a linear map is a subclass of `Projection` and an entry here.
STORED_AS: dict[type[nn.Module], type[Projection]] = {nn.Linear: Projection, Conv1D: Conv1DProjection}


def make_projection(name: str, module: nn.Module, part: int = 0, parts: int = 1) -> Projection:
    """The view of a module; one of an unknown kind is seen as a `nn.Linear` until it is refused by name."""
    module = without_adapter(module)
    view = next((view for stored, view in STORED_AS.items() if isinstance(module, stored)), Projection)
    return view(name, module, part, parts)


def without_adapter(module: nn.Module) -> nn.Module:
    """The layer inside an adapter of PEFT, or the module itself."""
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


def find_projections(root: nn.Module, path: str, names: tuple[str, ...], optional: bool = False) -> list[Projection]:
    """The projections of a layer; a name given n times is a fused one in n parts.

    Args:
        root (`nn.Module`): The base model.
        path (`str`): Path of the layer from there, with a final dot.
        names (`tuple[str, ...]`): Paths from the layer.
        optional (`bool`, *optional*, defaults to `False`): Whether to pass over modules that the layer does not have.

    Raises:
        ValueError: If the layer lacks a module, or the weight of one is no tensor.
    """
    modules = dict(root.get_submodule(path[:-1]).named_modules())
    missing = [name for name in names if name not in modules]
    if missing and not optional:
        raise ValueError(
            f"'{path[:-1]}' of {type(root).__name__} has no module {missing[0]!r}; its entry in "
            "hap_transformers.ARCHITECTURES does not fit this model."
        )
    for name in names:
        if name in modules and not isinstance(getattr(modules[name], "weight", None), torch.Tensor):
            kind = f"{type(modules[name]).__module__}.{type(modules[name]).__name__}"
            raise ValueError(
                f"Cannot score or prune {type(root).__name__}: '{path + name}' is a {kind}, whose weight is no "
                "tensor. Prune before quantizing."
            )
    return [
        make_projection(path + name, modules[name], names[:i].count(name), names.count(name))
        for i, name in enumerate(names)
        if name in modules
    ]


def _inverse(order: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(order, dtype=torch.long).argsort()


def _selected(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)
