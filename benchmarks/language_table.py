"""Tables of perplexities of pruned language models."""

from glue_scripts.compare_glue.cells import Cell

from .language import DENSE, FILLED, NOTHING_REMOVED, RECOVERED, WAYS, Key


def table(cells: dict[Key, Cell]) -> str:
    """A row a method and numbers of tokens, a column a ratio; methods in the order of `WAYS`.

    A cell has the perplexity, this over the dense model's, and how often both find the same token the likeliest.
    """
    if not cells:
        return "These figures are open: `python -m benchmarks.language` makes them."
    dense, ratios = cells[NOTHING_REMOVED]["perplexity"], _ratios(cells)
    names = ["method", "`<unk>`", "tokens of the refit", "of the recovery", *(f"{ratio:.0%}" for ratio in ratios)]
    lines = [
        _row(*names),
        _row(*["---"] * len(names)),
        _row("the dense model", "", "", "", *[f"{dense:.1f}"] * len(ratios)),
    ]
    for row in _rows(cells):
        found = [cells.get(row._replace(ratio=ratio)) for ratio in ratios]
        tokens = [f"{count:,}" if count else "none" for count in (row.tokens, row.recovery_tokens)]
        lines.append(_row(row.method, row.text, *tokens, *("" if c is None else _figures(c, dense) for c in found)))
    return "\n".join(lines)


def comparison(cells: dict[Key, Cell]) -> str:
    """Perplexity alone of the methods with a refit, on text that was filled in."""
    ratios = _ratios(cells)
    dense = f"perplexity, dense {cells[NOTHING_REMOVED]['perplexity']:.1f}"
    lines = [_row(dense, *(f"{ratio:.0%}" for ratio in ratios)), _row(*["---"] * (1 + len(ratios)))]
    for row in _rows(cells):
        if row.text == FILLED and row.tokens:
            found = [cells.get(row._replace(ratio=ratio)) for ratio in ratios]
            name = f"{row.method} on {row.recovery_tokens:,} tokens" if row.recovery_tokens else row.method
            lines.append(_row(name, *("" if cell is None else f"{cell['perplexity']:.1f}" for cell in found)))
    return "\n".join(lines)


def _ratios(cells: dict[Key, Cell]) -> list[float]:
    return sorted({key.ratio for key in cells if key.method != DENSE})


def _rows(cells: dict[Key, Cell]) -> list[Key]:
    """Methods with their numbers of tokens, in order; text that was filled in first."""
    order = [*WAYS, *RECOVERED]
    rows = {key._replace(ratio=0.0) for key in cells if key.method != DENSE}
    return sorted(rows, key=lambda key: (key.text != FILLED, order.index(key.method), key))


def _row(*fields: str) -> str:
    return f"| {' | '.join(fields)} |"


def _figures(cell: Cell, dense: float) -> str:
    agreement = f", {cell['agreement']:.0%}" if "agreement" in cell else ""
    return f"{cell['perplexity']:.1f} ({cell['perplexity'] / dense:.2f}x{agreement})"
