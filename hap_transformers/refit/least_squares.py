"""Sums over tokens, and the ridge regression that they give."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..components.convolutions import RunningNorm
from ..components.projections import Projection
from ..tokens import device_of_sums, products, valid_tokens
from .ridge import solve_ridge


# A norm that multiplies by less than this share of its largest factor is given another factor instead of being undone.
SMALL = 1e-3
# Inputs whose variance is at most this share of their mean square are constant; the rest is rounding of float32.
CONSTANT = 1e-7


@dataclass
class Sums:
    """Sums over tokens, in float64 and on a device that has float64, from which a projection is refitted.

    Args:
        tokens (`torch.Tensor`): Their number.
        x (`torch.Tensor`): Inputs, shape `(inputs,)`.
        y (`torch.Tensor`): Targets, shape `(outputs,)`.
        xx (`torch.Tensor`): Products of inputs, shape `(inputs, inputs)`.
        xy (`torch.Tensor`): Products of inputs and targets, shape `(inputs, outputs)`.
    """

    tokens: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor

    @classmethod
    def zeros(cls, projection: Projection, inputs: int = 0, outputs: int = 0) -> "Sums":
        """Sums of no tokens yet, for so many inputs and targets, or by default the projection's."""
        inputs, outputs = inputs or projection.in_features, outputs or projection.out_features
        shapes = ((), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs))
        device = device_of_sums(projection.module.weight.device)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds the tokens of a call, without padding."""
        x, y = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, y))
        x, y = (valid_tokens(tensor, mask).to(self.x.device) for tensor in (x, y))
        self.tokens += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):  # There may be one around the caller.
            self.xx += products(x)
            self.xy += x.T @ y

    def reduce(self, accelerator: Accelerator) -> None:
        """Adds up the sums of all processes."""
        for name, value in vars(self).items():
            setattr(self, name, accelerator.reduce(value, "sum"))

    def with_map(self, A: torch.Tensor) -> "Sums":
        """The sums for inputs whose last features went through a linear map, shape `(features after, before)`."""
        kept = len(self.x) - A.shape[1]

        def mapped(sums: torch.Tensor) -> torch.Tensor:
            return torch.cat([sums[:kept], A @ sums[kept:]])

        return Sums(self.tokens, mapped(self.x), self.y, mapped(mapped(self.xx).T), mapped(self.xy))

    def with_targets_of(self, projection: Projection) -> "Sums":
        """The sums for what a projection gives of the targets, in place of these."""
        matrix = projection.as_matrix.to(self.x.device).double()
        y, xy = matrix @ self.y, self.xy @ matrix.T
        if projection.has_bias:
            bias = projection.outputs_of(projection.module.bias).to(self.x.device).double()
            y, xy = y + self.tokens * bias, xy + torch.outer(self.x, bias)
        return Sums(self.tokens, self.x, y, self.xx, xy)

    def of_some(self, inputs: slice, outputs: list[int]) -> "Sums":
        """The sums for some of the inputs and targets."""
        return Sums(self.tokens, self.x[inputs], self.y[outputs], self.xx[inputs, inputs], self.xy[inputs][:, outputs])

    def products(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of inputs with inputs and with targets."""
        if not centred:
            return self.xx, self.xy
        xx, xy = (sums - torch.outer(self.x, of) / self.tokens for sums, of in ((self.xx, self.x), (self.xy, self.y)))
        if xx.trace() <= CONSTANT * self.xx.trace():  # Only rounding errors are left.
            return torch.zeros_like(xx), torch.zeros_like(xy)
        return xx, xy

    def refit(self, projection: Projection, ridge: float, norm: RunningNorm | None = None) -> None:
        """Puts the ridge regression into the projection.

        Args:
            projection (`Projection`): The projection.
            ridge (`float`): Strength of the regularization towards the present weights.
            norm (`RunningNorm`, *optional*): The norm behind, if targets are what it gives. Its running statistics
                become those of what the projection then gives, and its weight and bias make up for that.

        Raises:
            ValueError: If a sum is not finite.
        """
        xx, xy = self.products(centred=projection.has_bias or norm is not None)
        if not (xx.isfinite().all() and xy.isfinite().all()):
            raise ValueError(
                f"The inputs or targets of '{projection.name}' are not finite. Check the weights and the batches for "
                "NaN or infinity. The model was not refitted."
            )
        matrix = projection.as_matrix.to(xx.device).double()
        scale = matrix.new_ones(len(matrix)) if norm is None else norm.scale().to(matrix)
        matrix = scale[:, None] * matrix
        missed = xy - xx @ matrix.T
        change = solve_ridge(xx, missed, ridge).T
        if projection.narrow is not None:
            rows, inputs = projection.narrow
            change[rows] = 0
            change[rows, inputs] = solve_ridge(xx[inputs, inputs], missed[inputs, rows], ridge).T
        matrix = matrix + change
        bias = (self.y - matrix @ self.x) / self.tokens
        if norm is not None:
            scale = torch.where(scale.abs() < SMALL * scale.abs().amax(), 1.0, scale)
            matrix = matrix / scale[:, None]
            mean, variance = matrix @ self.x / self.tokens, ((matrix @ xx) * matrix).sum(1) / self.tokens
            norm.set_statistics(mean, variance, scale, self.y / self.tokens)
            bias = torch.zeros_like(bias)
        projection.write(matrix, bias if projection.has_bias else None)
