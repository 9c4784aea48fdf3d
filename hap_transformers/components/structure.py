"""What a pruned model's config says of its structure, and a dense model cut down to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .groups import AttentionBlock, Block, FeedForwardBlock, attention_blocks, feed_forward_blocks
from .pruned_modules import set_implant_rank
from .slicing import keep_components, validate_sliceable


METHOD = "hap"


def record_structure(model: PreTrainedModel, blocks: Sequence[Block], changed: Sequence[Block]) -> None:
    """Writes what is left into the config.

    `config.pruned_heads` says which heads are gone, as in Transformers 4. `config.quantization_config` says how many
    heads and neurons pruned layers have, and how many of the neurons are linear; it bears that name because
    Transformers lets nothing else change a model between its construction and the loading of its weights.

    Args:
        model (`PreTrainedModel`): The model.
        blocks (`Sequence[Block]`): All its blocks.
        changed (`Sequence[Block]`): Those that have just lost components.
    """
    recorded = recorded_structure(model.config) or {}
    heads = {block.index: block for block in blocks if isinstance(block, AttentionBlock)}
    heads = {index: block for index, block in heads.items() if block.num_components < block.num_original_heads}
    neurons = {str(block.index): block.num_components for block in changed if not isinstance(block, AttentionBlock)}
    model.config.pruned_heads = {index: _heads_gone(block) for index, block in heads.items()}
    implants = {str(block.index): block.implant_rank for block in blocks if isinstance(block, FeedForwardBlock)}
    implants = {layer: rank for layer, rank in implants.items() if rank}
    if changed or recorded:
        model.config.quantization_config = {
            "quant_method": METHOD,
            "heads": {str(index): block.num_components for index, block in heads.items()},
            "neurons": {**(recorded.get("neurons") or {}), **neurons},
            **({"implants": implants} if implants else {}),
        }


def validate_record(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Checks that a model's config describes this model, before more is removed and written into it.

    Raises:
        ValueError: If it describes another one: a config was shared between models, or taken from a pruned one.
    """
    pruned_heads = {int(layer): set(h) for layer, h in (getattr(model.config, "pruned_heads", None) or {}).items()}
    neurons = (recorded_structure(model.config) or {}).get("neurons") or {}
    for block in blocks:
        if isinstance(block, AttentionBlock):
            fits = pruned_heads.get(block.index, set()) == set(_heads_gone(block))
        else:
            fits = neurons.get(str(block.index), block.num_components) == block.num_components
        if not fits:
            raise ValueError(
                f"The config of this {type(model).__name__} says that layer {block.index} was pruned otherwise than "
                "it is. Models that share a config, or were made from that of a pruned model, cannot be pruned; make "
                "each from a copy.deepcopy(config). Nothing was pruned."
            )


def _heads_gone(block: AttentionBlock) -> list[int]:
    return sorted(set(range(block.num_original_heads)) - set(block.kept_heads))


def recorded_structure(config: PretrainedConfig) -> dict[str, Any] | None:
    """The structure in a config, or `None` if it says of none."""
    recorded = getattr(config, "quantization_config", None)
    if recorded is None:
        return None
    recorded = dict(recorded) if isinstance(recorded, Mapping) else recorded.to_dict()
    return recorded if recorded.get("quant_method") == METHOD else None


def recorded_counts(model: PreTrainedModel, structure: Mapping[str, Any]) -> list[tuple[Block, int]]:
    """Pairs every block of a model with the number of components it shall have.

    Args:
        model (`PreTrainedModel`): The model as built from its config, dense or rebuilt already.
        structure (`Mapping[str, Any]`): What [`record_structure`] wrote.

    Raises:
        ValueError: If the record names a layer that does not exist, gives it a number of heads or neurons that is
            not a whole number between zero and the dense model's, or contradicts `config.pruned_heads`.
    """
    unknown = structure.keys() - {"quant_method", "heads", "neurons", "implants"}
    if unknown:
        raise ValueError(
            f"The structure in the checkpoint's config has {sorted(unknown)}, which this release of hap_transformers "
            "does not know. Upgrade the package."
        )
    _validate_pruned_heads(model)
    counts: list[tuple[Block, int]] = []
    for kind, blocks in (("heads", attention_blocks(model)), ("neurons", feed_forward_blocks(model))):
        recorded = structure.get(kind) or {}
        if not isinstance(recorded, Mapping) or recorded.keys() - {str(block.index) for block in blocks}:
            raise ValueError(
                f"The checkpoint's config gives numbers of {kind} by layer as {recorded!r:.200}; "
                f"{type(model).__name__} has layers 0 to {len(blocks) - 1}."
            )
        for block in blocks:
            count = recorded.get(str(block.index), block.num_components)
            if type(count) is not int or not 0 <= count <= block.num_components:
                raise ValueError(
                    f"The checkpoint's config gives layer {block.index} {count!r:.200} {kind}; expected a whole "
                    f"number from 0 to {block.num_components}."
                )
            if isinstance(block, AttentionBlock):
                left = len(_heads_left(model, block))
                if left != count:
                    raise ValueError(
                        f"The checkpoint's config gives layer {block.index} {count} heads, but its pruned_heads "
                        f"leaves it {left} of {block.num_original_heads}."
                    )
            counts.append((block, count))
    _recorded_implants(model, structure)
    return counts


def rebuild_structure(model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
    """Cuts a model, dense or rebuilt already, down to a recorded structure; its weights are yet to be loaded.

    Raises:
        ValueError: As [`recorded_counts`] does, before anything is changed.
    """
    counts = [(block, count) for block, count in recorded_counts(model, structure) if count < block.num_components]
    validate_sliceable(model, [block for block, _ in counts])
    for block, count in counts:
        heads_left = isinstance(block, AttentionBlock) and _heads_left(model, block)
        keep_components(block, heads_left or range(count))
    for block, rank in _recorded_implants(model, structure):
        set_implant_rank(block, rank)


def _recorded_implants(model: PreTrainedModel, structure: Mapping[str, Any]) -> list[tuple[FeedForwardBlock, int]]:
    """Every block that has an implant, with its rank."""
    blocks = {str(block.index): block for block in feed_forward_blocks(model)}
    recorded, neurons = structure.get("implants") or {}, structure.get("neurons") or {}
    if not isinstance(recorded, Mapping):
        raise ValueError(f"The checkpoint's config gives implants by layer as {recorded!r:.200}.")
    for layer, rank in recorded.items():
        width = neurons.get(layer, 0)
        if layer not in blocks or type(rank) is not int or not 0 < rank <= width or blocks[layer].activation is None:
            raise ValueError(
                f"The checkpoint's config gives layer {layer!r:.20} an implant of rank {rank!r:.200}; expected a "
                f"whole number from 1 to its {width} neurons, in layers 0 to {len(blocks) - 1} of an architecture "
                "whose activation is known."
            )
    return [(blocks[layer], rank) for layer, rank in recorded.items()]


def _validate_pruned_heads(model: PreTrainedModel) -> None:
    blocks = {str(block.index): block for block in attention_blocks(model)}
    recorded = getattr(model.config, "pruned_heads", None) or {}
    for layer, heads in recorded.items() if isinstance(recorded, Mapping) else [("", recorded)]:
        total = blocks[str(layer)].num_original_heads if str(layer) in blocks else 0
        if not isinstance(heads, list) or any(type(head) is not int or not 0 <= head < total for head in heads):
            raise ValueError(
                f"The pruned_heads of the checkpoint's config are {recorded!r:.200}; expected heads of layers 0 to "
                f"{len(blocks) - 1}."
            )


def _heads_left(model: PreTrainedModel, block: AttentionBlock) -> Sequence[int]:
    """The numbers of a dense block's heads that `config.pruned_heads` leaves."""
    recorded = getattr(model.config, "pruned_heads", None) or {}
    pruned = {str(layer): heads for layer, heads in recorded.items()}.get(str(block.index))
    return [head for head in block.kept_heads if head not in pruned] if pruned else block.kept_heads
