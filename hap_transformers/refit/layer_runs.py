"""Runs a model over the same batches again and again, layer by layer, each time from what the layer before gave."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import nn
from transformers import PreTrainedModel

from ..components.architectures import decoder_paths, get_architecture, layer_paths
from ..components.groups import Group, find_groups, in_forward_order, layers
from ..components.projections import Projection
from ..efficiency import evaluating
from ..sensitivity.precision import Precision, chosen_precision
from ..sensitivity.self_loss import validate_decoded
from .kept_values import KeptValues
from .least_squares import SMALL
from .windows import out_of_windows


ForwardFunction = Callable[[PreTrainedModel, dict[str, Any]], Any]


@dataclass
class Call:
    """What one call of a group's reader saw; each tensor `(batch, tokens, features)`.

    Args:
        inputs (`torch.Tensor`): What it read.
        block_inputs (`torch.Tensor`, *optional*): What the group's writers read, if they are called.
        stream (`torch.Tensor`, *optional*): The residual stream that the reader adds to, if it does.
        outputs (`torch.Tensor`): What it gave, or the norm behind it.
        scale (`torch.Tensor`, *optional*): What multiplies that before it is added, shape `(features,)`.
    """

    inputs: torch.Tensor
    block_inputs: torch.Tensor | None
    stream: torch.Tensor | None
    outputs: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """What it gave, and what that is added to."""
        added = self.outputs if self.scale is None else self.outputs * self.scale
        return added if self.stream is None else self.stream + added

    def missing(self, target: torch.Tensor) -> torch.Tensor:
        """What it must give for a total; what it gives, of features that a scale of next to zero hides."""
        added = target if self.stream is None else target - self.stream
        if self.scale is None:
            return added
        seen = self.scale.abs() > SMALL * self.scale.abs().amax()
        return torch.where(seen, added / torch.where(seen, self.scale, 1.0), self.outputs)


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether a model runs some of its layers several times, as ALBERT does."""
    if "channels" in get_architecture(model).names:  # What EfficientNet counts as hidden layers are modules in them.
        return False
    return len(layers(model)) < getattr(model.config, "num_hidden_layers", 0) * getattr(
        model.config, "inner_group_num", 1
    )


def is_refitted(group: Group) -> bool:
    """Whether a refit changes a group: what lies outside the layers is the best of its rank already."""
    return bool(group.readers) and not group.kind.outside


def reads_stream(group: Group) -> Projection:
    """A projection by which a group's block reads the residual stream."""
    whole = group if group.runs is None else group.runs.whole
    return (whole.of_stream or group.writers)[-1]


def precision_of_runs(name: str | None, accelerator: Accelerator | None, model: PreTrainedModel) -> Precision:
    """The precision of the forward passes of a refit: bfloat16, or the model's own.

    It has no float16, in which the small gradients of a layer's loss underflow; models in float16 stay in it.

    Args:
        name (`str`, *optional*): `"bf16"`, `"fp16"`, `"no"`, or `None` for the accelerator's.
        accelerator (`Accelerator`, *optional*): What training runs on.
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: If the name is unknown.
    """
    chosen = Precision(chosen_precision(name, accelerator), model.device.type)
    return (
        chosen
        if chosen.dtype == torch.bfloat16 and model.dtype != torch.float16
        else Precision(None, model.device.type)
    )


class _Stop(Exception):
    """All that is wanted of a forward pass has been seen."""


class LayerRuns:
    """Looks at the groups of a model in forward order, on batches known by their position.

    For every batch the output of one layer is kept ([`KeptValues`]). A pass then starts after that layer: layers up to
    it do nothing but return that output, whatever form it has, so nothing needs to be known of how the model calls its
    layers. Only layers of other lists return what they are given: what lies between lists, such as the downsampling of
    ConvNeXt, runs on it. In a decoder, the encoder's layers return the output of their last one, which is kept, too.
    Where layers share weights, each pass runs the whole model.

    Args:
        model (`PreTrainedModel`): The model; its weights may change from group to group in forward order.
        kept (`KeptValues`): Where to keep outputs; several `LayerRuns` may share it.
        forward (`Callable`, *optional*): Takes the model and a batch and runs it. By default `model(**batch)`.
        kinds (`Sequence[str]`, *optional*): The kinds to see the model's components as. By default those in use.
        precision (`Precision`, *optional*): The precision of forward passes. By default the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kept: KeptValues,
        forward: ForwardFunction | None = None,
        kinds: Sequence[str] | None = None,
        precision: Precision | None = None,
    ):
        self.model, self.kept = model, kept
        self.forward = forward or _run_model
        self.precision = precision or Precision(None, model.device.type)
        self.all_groups = in_forward_order(find_groups(model, kinds))
        self.groups = [group for group in self.all_groups if is_refitted(group)]
        self.layers = layers(model)
        architecture = get_architecture(model)
        self.lists = [path[:-1].rpartition(".")[0] for path in layer_paths(model, architecture)]
        # The first layer of a decoder, or the number of layers.
        self.first_decoded = len(self.layers) - len(decoder_paths(model, architecture))
        self.norm_first, self.also_added = architecture.norm_first, architecture.also_added
        self.repeats = shares_layers(model)

    def of_layer(self, layer: int) -> list[Group]:
        """The groups of a layer, or residual block, in forward order."""
        return [group for group in self.groups if group.block == layer]

    def calls(self, position: int, inputs: dict[str, Any], group: Group) -> list[Call]:
        """What one group's reader sees; the earlier layers' weights no longer change."""
        # A feed-forward block may be called in chunks, so the last group of a layer is run to the layer's end.
        last = group is self.of_layer(group.block)[-1]
        stop_at = self.layers[group.block] if last else (group.norm or group.reader).module
        return self._calls(position, inputs, [group], stop_at, finished=group.block - 1)[0]

    def reads(self, position: int, inputs: dict[str, Any], group: Group) -> list[torch.Tensor]:
        """What one group's writers see, a tensor `(batch, tokens, features)` a call of its reader."""
        view, read = reads_stream(group), list[torch.Tensor]()
        writer = view.module
        handle = writer.register_forward_pre_hook(lambda module, args: read.append(view.read(args[0])))
        in_chunks = getattr(self.model.config, "chunk_size_feed_forward", 0)
        self._run(
            position, inputs, [handle], self.layers[group.block] if in_chunks else writer, finished=group.block - 1
        )
        return read if self.repeats or len(read) < 2 else [torch.cat(read, 1)]

    def calls_of_layer(self, position: int, inputs: dict[str, Any], layer: int) -> list[list[Call]]:
        """What all readers of a layer see; no weights up to there change any more."""
        return self._calls(position, inputs, self.of_layer(layer), self.layers[layer], finished=layer)

    def output(self, position: int, inputs: dict[str, Any], layer: int, graph: bool = False) -> torch.Tensor:
        """What a layer gives; the earlier layers' weights no longer change.

        Args:
            position (`int`): Position of the batch.
            inputs (`dict[str, Any]`): The batch.
            layer (`int`): Number of the layer.
            graph (`bool`, *optional*, defaults to `False`): Whether gradients shall lead to the layer's weights.
        """
        given = list[torch.Tensor]()

        def see(module: nn.Module, args: Any, output: Any) -> None:
            given.append(output[0] if isinstance(output, tuple) else output)

        stop_at = self.layers[layer]
        self._run(position, inputs, [stop_at.register_forward_hook(see)], stop_at, layer - 1, graph)
        return given[0]

    def _calls(
        self, position: int, inputs: dict[str, Any], groups: Sequence[Group], stop_at: nn.Module, finished: int
    ) -> list[list[Call]]:
        calls: list[list[Call]] = [[] for _ in groups]
        self._run(position, inputs, self._watch(groups, calls), stop_at, finished)
        if unseen := [group.reader.name for group, seen in zip(groups, calls, strict=True) if not seen]:
            raise ValueError(
                f"{type(self.model).__name__} ran on a batch without calling its '{unseen[0]}'. The refit needs a "
                "model, or `forward`, that runs all its layers."
            )
        return calls if self.repeats else [_merged(seen) for seen in calls]

    def _run(
        self,
        position: int,
        inputs: dict[str, Any],
        handles: list[Any],
        stop_at: nn.Module,
        finished: int,
        graph: bool = False,
    ) -> None:
        """A pass that stops behind a module. Removes the hooks that watch it."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.kept[id(self), position] = (finished, detached(output))

        def keep_memory(module: nn.Module, args: Any, output: Any) -> None:
            self.kept["memory", id(self), position] = detached(output)

        def detached(output: Any) -> Any:
            # With gradient checkpointing embeddings require gradients, and so does all that follows.
            return recursively_apply(torch.detach, output)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Stop

        if not self.repeats:
            if finished >= 0:
                handles.append(self.layers[finished].register_forward_hook(keep))
            if finished >= self.first_decoded and ("memory", id(self), position) not in self.kept:
                handles.append(self.layers[self.first_decoded - 1].register_forward_hook(keep_memory))
            handles.append(stop_at.register_forward_hook(stop))
        # Transformers 4 replaces forwards while it records hidden states, and leaves them when it is stopped.
        forwards = {module: vars(module).get("forward") for module in self.model.modules()}
        torch.clear_autocast_cache()  # An autocast around the caller keeps weights from before the last step.
        try:
            # Compiled code does not call hooks.
            with evaluating(self.model), self._skipping(position), torch.compiler.set_stance("force_eager"):
                with torch.set_grad_enabled(graph), self.precision.autocast():
                    self.forward(self.model, inputs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in forwards.items():
                _set_forward(module, forward)

    def _watch(self, groups: Sequence[Group], calls: list[list[Call]]) -> list[Any]:
        """Hooks that follow the residual stream through the groups' layer and note the calls of their readers."""
        layer = self.layers[groups[0].block]
        stream, size = list[torch.Tensor](), list[Any]()
        read: list[torch.Tensor | None] = [None]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[:] = [args[0] if args else kwargs["hidden_states"]]
            size[:] = args[1:2]

        def as_stream(group: Group, tokens: torch.Tensor) -> torch.Tensor:
            return out_of_windows(layer, tokens, size[0]) if group.windowed else tokens

        def normalized(module: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
            stream[:] = [args[0] if args else kwargs["hidden_states"]]

        def added(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            stream[:] = [stream[0] + output]

        def entered(group: Group) -> Any:
            def enter_group(module: nn.Module, args: tuple[torch.Tensor]) -> None:
                read[:] = [reads_stream(group).read(args[0])]

            return reads_stream(group).module.register_forward_pre_hook(enter_group)

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True)]
        for group, seen in zip(groups, calls, strict=True):
            if group.of_stream != []:
                handles.append(entered(group))
            handles += _watch_reader(group, seen, read, stream, as_stream)
        in_layer = self.of_layer(groups[0].block)
        norms = [group.read_by for group in in_layer if group.read_by is not None]
        if norms:
            handles += [norm.register_forward_pre_hook(normalized, with_kwargs=True) for norm in norms]
        elif self.norm_first:
            inside = dict(layer.named_modules())
            adding = [group.reader.module for group in in_layer[:-1]]
            adding += [inside[path] for path in self.also_added if path in inside]
            handles += [module.register_forward_hook(added) for module in adding]
        else:
            # Those of chains within a block read no sum.
            first = [_reads_sum(group) for group in in_layer[1:] if group.of_stream != []]
            handles += [module.register_forward_pre_hook(normalized, with_kwargs=True) for module in first]
        return handles

    def is_decoder(self, layer: int) -> bool:
        """Whether a layer lies in the decoder of an encoder-decoder."""
        return layer >= self.first_decoded

    @contextmanager
    def _skipping(self, position: int) -> Iterator[None]:
        """Lets layers whose output is known return that of the last of them, or pass on what they are given."""
        # The number of a layer and what it gave.
        last, output = self.kept[id(self), position] if (id(self), position) in self.kept else (-1, None)
        skipped = self.layers[: last + 1]
        forwards = [vars(layer).get("forward") for layer in skipped]
        rest = output[1:] if isinstance(output, tuple) else None

        def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if rest is None else (hidden_states, *rest)

        memory = self.kept["memory", id(self), position] if last >= self.first_decoded else None
        for number, (layer, in_list) in enumerate(zip(skipped, self.lists, strict=False)):
            layer.forward = (lambda *args, **kwargs: output) if in_list == self.lists[last] else pass_on
            if number < self.first_decoded <= last:
                layer.forward = lambda *args, **kwargs: memory
        try:
            yield
        finally:
            for layer, forward in zip(skipped, forwards, strict=True):
                _set_forward(layer, forward)


def _run_model(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    validate_decoded(model, inputs)
    return model(**inputs)


def _reads_sum(group: Group) -> nn.Module:
    """The module that reads the normalized sum before a block: attention, even without heads, or a projection."""
    return group.writers[0].module if group.around is None or group.core is None else group.core


def _watch_reader(
    group: Group,
    seen: list[Call],
    read: list[torch.Tensor | None],
    stream: list[torch.Tensor],
    as_stream: Callable[[Group, torch.Tensor], torch.Tensor],
) -> list[Any]:
    """Hooks that note the calls of a group's reader, of the norm behind it, and of the shortcut around it."""
    reader, elsewhere = group.reader, group.alone or group.shortcut is not None

    def see(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        added_to = (shortcut[0] if shortcut else None) if elsewhere else reader.seen(stream[0])
        inputs, outputs = (as_stream(group, tokens) for tokens in (reader.read(args[0]), reader.seen(output)))
        seen.append(Call(inputs, read[0], added_to, outputs, group.scale))

    def see_norm(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[-1].outputs = reader.seen(output)

    def see_shortcut(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        shortcut[:] = [reader.seen(output)]
        if seen:  # It may run before or after the reader.
            seen[-1].stream = shortcut[0]

    shortcut: list[torch.Tensor] = []
    handles = [reader.module.register_forward_hook(see)]
    if group.norm is not None:
        handles.append(group.norm.module.register_forward_hook(see_norm))
    if group.shortcut is not None:
        handles.append(group.shortcut.register_forward_hook(see_shortcut))
    return handles


def _set_forward(module: nn.Module, forward: Any) -> None:
    """Gives a module its own forward back, or none."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


def _merged(calls: list[Call]) -> list[Call]:
    """One call with the tokens of all chunks."""
    if len(calls) < 2:
        return calls
    parts = {name: [getattr(call, name) for call in calls] for name in vars(calls[0]).keys() - {"scale"}}
    whole: dict[str, Any] = {name: None if p[0] is None else torch.cat(p, 1) for name, p in parts.items()}
    return [Call(**whole, scale=calls[0].scale)]
