"""The 1x1 filters that come nearest to larger ones."""

from ..components.convolutions import RunningNorm
from ..components.groups import Group
from .least_squares import Sums
from .ridge import solve_ridge


def fit_filters(group: Group, dense: Group, read: Sums, ridge: float) -> None:
    """Gives an implant of channels the 1x1 filters whose outputs come nearest to those of the dense filters.

    What the norm behind them multiplies by stays. Its running statistics become those of what the filters give, and it
    gives the same mean as in the dense model.

    Args:
        group (`Group`): The channels of the pruned model, written from the residual stream; changed in place.
        dense (`Group`): Those of the dense model.
        read (`Sums`): Of what the pruned model's writer reads, with what the dense model's reads as targets.
        ridge (`float`): Strength of the regularization towards zero.
    """
    (writer,), (original,) = group.writers, dense.writers
    norm = next((follower for follower in group.followers if isinstance(follower, RunningNorm)), None)
    if writer.narrow is None:
        return
    rows, inputs = writer.narrow
    places = [list(dense.kept).index(number) for number in group.kept[rows]]
    sums = read.with_targets_of(original).of_some(inputs, places)
    xx, xy = sums.products(centred=norm is not None or writer.has_bias)
    filters = solve_ridge(xx, xy, ridge).T
    matrix, mean = writer.as_matrix.to(filters), filters @ sums.x / sums.tokens
    matrix[rows, inputs] = filters
    bias = None
    if writer.has_bias:
        bias = writer.module.bias.detach().to(filters, copy=True)
        bias[rows] = sums.y / sums.tokens - mean
        mean = mean + bias[rows]
    writer.write(matrix, bias)
    if norm is not None:
        means, variances, centre = (
            values.detach().to(filters, copy=True)
            for values in (norm.module.running_mean, norm.module.running_var, norm.module.bias)
        )
        scale = norm.scale().detach().to(filters)
        centre[rows] += scale[rows] * (sums.y / sums.tokens - means[rows])
        means[rows], variances[rows] = mean, ((filters @ xx) * filters).sum(1) / sums.tokens
        norm.set_statistics(means, variances, scale, centre)
