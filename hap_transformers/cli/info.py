"""`hap info`."""

from typing import Any

from ..components.groups import by_kind, find_groups
from ..efficiency import count_flops, count_parameters, example_inputs
from ..reporting.ranks import head_ranks, ranks_of
from ..reporting.wording import count_left, numbering_in_words
from .loading import chosen_length, load_model, size_in_words
from .options import Batch, Json, Length, Model, print_result, table_by_layer


def info(model: Model, batch: Batch = 1, length: Length = None, json_: Json = False) -> None:
    """Report the components of each layer, the parameters and the FLOPs of a model."""
    loaded = load_model(model, "cpu")
    length = chosen_length(length, loaded)
    groups = find_groups(loaded)
    figures: dict[str, Any] = {"model": model, "class": type(loaded).__name__}
    columns: dict[str, dict[int, str]] = {}
    ranks_by_kind = head_ranks(loaded)
    for kind, members in by_kind(groups).items():
        if ranks_by_kind.get(kind.name):  # Of every head, which differ.
            figures[kind.name] = ranks_by_kind[kind.name]
            figures["dense_head_dims"] = members[0].runs.whole.head_size if members[0].runs else 0
            columns[f"{kind.name} of each head"] = {g.layer: " ".join(map(str, ranks_of(g))) for g in members}
            continue
        figures[kind.name] = [group.num_components for group in members]
        if kind.keeps_numbers:
            figures[f"dense_{kind.name}"] = [group.original for group in members]
        columns[kind.name] = {group.layer: count_left([group]) for group in members}
    ranks = dict.fromkeys(sorted({group.layer for group in groups}), 0)
    for group in groups:
        ranks[group.layer] += group.implant_rank
    columns["implant"] = {layer: str(rank) for layer, rank in ranks.items() if rank}
    parameters, flops = count_parameters(loaded), count_flops(loaded, example_inputs(loaded, batch, length))
    figures |= {"implants": list(ranks.values()), "parameters": parameters, "flops": flops}
    what = size_in_words(loaded, length, batch)
    title = f"{figures['class']}: {parameters:,} parameters, {flops / 1e9:.2f} GFLOPs for {what}"
    title = " ".join(filter(None, [title, numbering_in_words(groups)]))
    print_result(figures, table_by_layer(columns), title, json_)
