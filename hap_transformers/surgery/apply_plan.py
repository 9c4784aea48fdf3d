"""Removes heads and neurons from a model for real."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy

from transformers import PreTrainedModel

from ..components.groups import Block, FeedForwardBlock, attention_blocks, feed_forward_blocks
from ..components.slicing import keep_components, validate_in_memory, validate_sliceable
from ..components.structure import record_structure, validate_record
from .implants import insert_implant, validate_implantable
from .plan import PruningPlan, validate_heads


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Removes what a plan names from a model, in place.

    Modules stay the same objects (hooks survive), their parameters are replaced by smaller ones of the same dtype,
    device and `requires_grad`: drop any optimizer made before. A block may lose all its components; what is left of it
    is its output bias, added to the residual stream without a matrix product. Implants start from zero: they give
    nothing until they are trained, or initialised by [`reconstruct`]. The new structure is written into
    `model.config`, so that `save_pretrained` makes a checkpoint which `from_pretrained` rebuilds.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned before or not.
        plan (`PruningPlan`): What to remove.

    Raises:
        ValueError: If the plan does not fit the model as it is now, or a weight cannot be sliced because it is
            quantized, wrapped by an adapter or shared with another module; the model is then untouched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: [2, 3, 5]}))
        >>> model.encoder.layer[0].output.dense
        Linear(in_features=5, out_features=8, bias=True)
    """
    plan.validate(model)
    _remove(model, plan.heads, plan.neurons, plan.implants)


@contextmanager
def undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model's structure back, if pruning it or what follows fails or is interrupted.

    Modules and parameters are the same objects again, so that an optimizer made before still has them. What was
    written into the parameters themselves stays.

    Args:
        model (`PreTrainedModel`): The model.
    """
    modules = {
        module: {name: (v, copy(v) if isinstance(v, dict) else None) for name, v in vars(module).items()}
        for module in model.modules()
    }
    classes = {module: type(module) for module in model.modules()}  # Modules that are emptied change it.
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = deepcopy(vars(model.config))
    try:
        yield
    except BaseException:
        for module, attributes in modules.items():
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if content is not None:  # The same dictionary again: hooks' handles know it.
                    value.clear()
                    value.update(content)
                vars(module)[name] = value
            module.__class__ = classes[module]
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        vars(model.config).clear()
        vars(model.config).update(config)
        raise


def prune_heads(model: PreTrainedModel, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
    """Removes attention heads from a model, in place, as [`apply_plan`] does.

    The contract is that of `PreTrainedModel.prune_heads` in Transformers 4: heads are numbered as in the original
    model, heads already gone are passed over, `config.pruned_heads` accumulates. Where query heads share key/value
    heads, the heads are the latter, each with its query heads. In encoder-decoders they are the encoder's.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture.
        heads_to_prune (`Mapping[int, Sequence[int]]`): Layer number to the heads to remove there.

    Raises:
        ValueError: If the architecture is unknown, a layer or head does not exist, or a weight cannot be sliced; the
            model is then untouched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> prune_heads(model, {0: [1, 3]})
        >>> model.encoder.layer[0].attention.self.query.weight.shape
        torch.Size([4, 8])
    """
    _remove(model, validate_heads(attention_blocks(model), heads_to_prune), {}, {})


def _remove(
    model: PreTrainedModel,
    heads: Mapping[int, Sequence[int]],
    neurons: Mapping[int, Sequence[int]],
    implants: Mapping[int, int],
) -> None:
    """Removes heads (original numbers) and neurons (present positions) that are known to exist, puts implants in."""
    attention, feed_forward = attention_blocks(model), feed_forward_blocks(model)
    left: list[tuple[Block, list[int]]] = []
    for attn in attention:
        heads_gone = set(heads.get(attn.index, ()))
        left.append((attn, [i for i, head in enumerate(attn.kept_heads) if head not in heads_gone]))
    for ffn in feed_forward:
        # Neurons in whose place an implant comes stay for now, as the last.
        gone = sorted(neurons.get(ffn.index, ()))
        neurons_left = sorted(set(range(ffn.num_components)) - set(gone))
        left.append((ffn, neurons_left + gone[: implants.get(ffn.index, 0)]))
    kept = [
        (block, positions)
        for block, positions in left
        if len(positions) < block.num_components or (isinstance(block, FeedForwardBlock) and block.index in implants)
    ]
    changed = [block for block, _ in kept]
    validate_record(model, [*attention, *feed_forward])
    validate_sliceable(model, changed)
    validate_in_memory(changed)
    validate_implantable(model, (block for block in feed_forward if block.index in implants))
    for block, positions in kept:
        keep_components(block, positions)
        if isinstance(block, FeedForwardBlock) and block.index in implants:
            insert_implant(block, implants[block.index])
    record_structure(model, [*attention, *feed_forward], changed)
