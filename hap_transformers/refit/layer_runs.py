"""Runs a model over the same batches again and again, layer by layer, each time from what the layer before gave."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..components.architectures import get_architecture
from ..components.groups import Block, attention_blocks, feed_forward_blocks, layers
from ..efficiency import evaluating


ForwardFunction = Callable[[PreTrainedModel, dict[str, Any]], Any]


@dataclass
class Call:
    """What one call of a block's output projection saw; each tensor `(batch, tokens, features)`.

    Args:
        inputs (`torch.Tensor`): What it read.
        block_inputs (`torch.Tensor`, *optional*): What the block's input projections read, if they are called.
        stream (`torch.Tensor`): The residual stream that the block adds to.
        outputs (`torch.Tensor`): What it gave.
    """

    inputs: torch.Tensor
    block_inputs: torch.Tensor | None
    stream: torch.Tensor
    outputs: torch.Tensor


class _Stop(Exception):
    """All that is wanted of a forward pass has been seen."""


class LayerRuns:
    """Looks at the blocks of a model in forward order, on batches known by their position.

    Of every batch the output of one layer is kept; a pass then starts after that layer: layers up to it do nothing but
    return that output, whatever form it has, so that nothing needs to be known of how the model calls its layers.
    Where layers share weights, each pass runs the whole model.

    Args:
        model (`PreTrainedModel`): The model; its weights may change from block to block in forward order.
        forward (`Callable`, *optional*): Takes the model and a batch and runs it. By default `model(**batch)`.
    """

    def __init__(self, model: PreTrainedModel, forward: ForwardFunction | None = None):
        self.model = model
        self.forward = forward or (lambda model, inputs: model(**inputs))
        pairs = zip(attention_blocks(model), feed_forward_blocks(model), strict=True)
        self.blocks: list[Block] = [block for pair in pairs for block in pair]
        self.layers = layers(model)
        self.norm_first = get_architecture(model).norm_first
        calls = model.config.num_hidden_layers * getattr(model.config, "inner_group_num", 1)
        self.repeats = len(self.layers) < calls
        # Position of a batch to the number of a layer and what it gave.
        self.kept: dict[int, tuple[int, Any]] = {}

    def calls(self, position: int, inputs: dict[str, Any], number: int) -> list[Call]:
        """What one block's output projection sees; the earlier layers' weights do not change any more."""
        # A feed-forward block may be called in chunks.
        block, layer = self.blocks[number], number // 2
        stop_at = self.layers[layer] if number % 2 else block.output.module
        return self._run(position, inputs, [number], stop_at, finished=layer - 1)[0]

    def calls_of_layer(self, position: int, inputs: dict[str, Any], layer: int) -> list[list[Call]]:
        """What both output projections of a layer see; no weights up to there change any more."""
        return self._run(position, inputs, [2 * layer, 2 * layer + 1], self.layers[layer], finished=layer)

    def _run(
        self, position: int, inputs: dict[str, Any], numbers: list[int], stop_at: nn.Module, finished: int
    ) -> list[list[Call]]:
        layer = numbers[0] // 2
        calls: list[list[Call]] = [[] for _ in numbers]
        stream: list[torch.Tensor] = []
        read: list[torch.Tensor | None] = [None]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[:] = [args[0] if args else kwargs["hidden_states"]]

        def normalized(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            stream[:] = [args[0]]

        def attended(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            stream[:] = [stream[0] + output]

        def enter_block(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            read[:] = [args[0]]

        def see(own: list[Call]) -> Any:
            return lambda module, args, output: own.append(Call(args[0], read[0], stream[0], output))

        def keep(number: int) -> Any:
            return lambda module, args, output: self.kept.__setitem__(position, (number, output))

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Stop

        handles = [self.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)]
        for own, number in zip(calls, numbers, strict=True):
            handles.append(self.blocks[number].inputs[-1].module.register_forward_pre_hook(enter_block))
            handles.append(self.blocks[number].output.module.register_forward_hook(see(own)))
        attention, feed_forward = self.blocks[2 * layer : 2 * layer + 2]
        if self.norm_first:
            handles.append(attention.output.module.register_forward_hook(attended))
            crossed = getattr(self.layers[layer], "crossattention", None)
            if crossed is not None:  # GPT-2 as a decoder adds what it reads of the encoder, too.
                handles.append(crossed.c_proj.register_forward_hook(attended))
        else:
            handles.append(feed_forward.inputs[0].module.register_forward_pre_hook(normalized))
        if not self.repeats:
            if finished >= 0:
                handles.append(self.layers[finished].register_forward_hook(keep(finished)))
            handles.append(stop_at.register_forward_hook(stop))
        # Transformers 4 replaces forwards while it records hidden states, and leaves them when it is stopped.
        forwards = {module: vars(module).get("forward") for module in self.model.modules()}
        try:
            with evaluating(self.model), self._skipping(position):
                self.forward(self.model, inputs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in forwards.items():
                _set_forward(module, forward)
        return calls if self.repeats else [_merged(own) for own in calls]

    @contextmanager
    def _skipping(self, position: int) -> Iterator[None]:
        """Lets layers whose output is known return that of the last of them."""
        last, output = self.kept.get(position, (-1, None))
        skipped = self.layers[: last + 1]
        own = [vars(layer).get("forward") for layer in skipped]
        for layer in skipped:
            layer.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for layer, forward in zip(skipped, own, strict=True):
                _set_forward(layer, forward)


def _set_forward(module: nn.Module, forward: Any) -> None:
    """Gives a module its own forward back, or none."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


def _merged(calls: list[Call]) -> list[Call]:
    """One call with the tokens of all chunks."""
    if len(calls) < 2:
        return calls
    parts = {name: [getattr(call, name) for call in calls] for name in vars(calls[0])}
    whole: dict[str, Any] = {name: None if own[0] is None else torch.cat(own, 1) for name, own in parts.items()}
    return [Call(**whole)]
