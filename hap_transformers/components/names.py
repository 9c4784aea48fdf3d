"""How the table of architectures names the modules that components own. All paths start at a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HeadNames:
    """Names of the modules that attention heads own. All paths start at a layer.

    A path that appears n times among `query`, `key` and `value` is one fused projection, split into n equal parts in
    that order.

    Args:
        attention (`str`): The module that splits its input into heads.
        query (`str`): The query projection.
        key (`str`): The key projection.
        value (`str`): The value projection.
        output (`str`): The projection that reads the heads' concatenated contexts.
        position_inputs (`tuple[str, ...]`, *optional*): Projections of relative positions: that which gives keys, and
            that which gives queries. Their rows go with the heads, but are not scored. Paths that the layer does not
            have are skipped.
        position_bias (`str`, *optional*): For attention modules that add a bias with a row for each head of the dense
            model: `"given"` if it is an argument that always comes from outside, `"computed"` if the first layer
            computes it by `compute_bias` and all layers return it after their output, `"table"` if the module has a
            parameter with a column for each head, `"alike"` if it computes one that is the same for all heads, and
            all layers return that of the first after their output.
        bias_argument (`str`, *optional*, defaults to `"position_bias"`): The name of that argument or parameter.
        position_modules (`tuple[str, ...]`, *optional*): Modules that give a layer's own position bias. Paths that the
            layer does not have are skipped.
        bilinear (`bool`, *optional*, defaults to `True`): Whether the attention logits depend on queries and keys by
            their products alone, so that both may change their basis. They do not with rotary embeddings, or with
            norms of queries and keys.
        rotary (`bool`, *optional*, defaults to `False`): Where not bilinear: whether this is because of rotary
            embeddings that turn dimensions j and j + head size / 2 of queries and keys together, for every j. Such
            pairs can be removed, unless there is a `query_norm`. Other query/key dimensions of a head go together.
        query_norm (`str`, *optional*): The norm of every query head. A norm hides the size of what it reads, so what
            masks on queries cost is measured behind it.
        attention_norm (`str`, *optional*): The LayerNorm that the attention module itself applies to the sum of its
            input and output.
        scale (`str`, *optional*): The parameter that multiplies what `output` gives, before this is added to the
            residual stream. Layers that do not have it add what `output` gives.
        windowed (`bool`, *optional*, defaults to `False`): Whether the attention module sees the tokens of an image in
            windows: the layer has a `window_size` and a `shift_size`, and is called with the image's height and width.
        num_heads (`str`, *optional*): Attribute of the attention module with its number of heads, in those releases
            of Transformers that have it.
        width (`str`, *optional*): Attribute of the attention module with heads x head size, likewise.
        head_size (`str`, *optional*): Attribute of the attention module with the head size, likewise.
        width_of_input (`bool`, *optional*, defaults to `False`): Whether the attention module takes heads x head size
            for the width of its input.
        scaled (`bool`, *optional*, defaults to `True`): Whether attention logits are products over the root of the
            head size. Modules that keep this scale have it in `scaling`; others compute it from the head size.
        config_query_heads (`str`, *optional*, defaults to `"num_attention_heads"`): Attribute of the config with the
            dense model's query heads per layer, given as `config_heads` are.
        config_heads (`str`, *optional*, defaults to `"num_attention_heads"`): Attribute of the config with the dense
            model's heads per layer; of several lists of layers, with a number for each. Query heads that share a
            key/value head are one removable head.
        config_head_size (`str`, *optional*, defaults to `"head_dim"`): Attribute of the config with the head size.
            Without it, the head size is the width of the residual stream / attention heads.
        apart (`bool`, *optional*, defaults to `False`): As for [`NeuronNames`].
    """

    attention: str
    query: str
    key: str
    value: str
    output: str
    position_inputs: tuple[str, ...] = ()
    position_bias: str | None = None
    bias_argument: str = "position_bias"
    position_modules: tuple[str, ...] = ()
    bilinear: bool = True
    rotary: bool = False
    query_norm: str | None = None
    attention_norm: str | None = None
    scale: str | None = None
    windowed: bool = False
    num_heads: str = "num_attention_heads"
    width: str = "all_head_size"
    head_size: str = "attention_head_size"
    width_of_input: bool = False
    scaled: bool = True
    config_query_heads: str = "num_attention_heads"
    config_heads: str = "num_attention_heads"
    config_head_size: str = "head_dim"
    apart: bool = False


@dataclass(frozen=True)
class NeuronNames:
    """Names of the modules that FFN neurons own. All paths start at a layer.

    Args:
        inputs (`tuple[str, ...]`): The projections whose outputs are the neurons, or their gates. Paths that the layer
            does not have are skipped. List a fused projection once per part: a path that appears n times is split
            into n equal parts, in that order.
        output (`str`): The projection that reads the neurons' activations.
        activation (`str`, *optional*): The activation module, through which the first of `inputs` goes. Only implants
            need it.
        followers (`tuple[str, ...]`, *optional*): Modules between the projections that act on every neuron. Paths that
            the layer does not have are skipped.
        config_neurons (`str`, *optional*, defaults to `"intermediate_size"`): Attribute of the config with the dense
            model's neurons per layer.
        apart (`bool`, *optional*, defaults to `False`): Whether what `output` gives is scaled, normalized or laid out
            otherwise, before it is added to the residual stream. A refit then follows what it gives.
        scale (`str`, *optional*): The parameter that multiplies what `output` gives, before this is added to the
            residual stream. Layers that do not have it add what `output` gives.
        norm (`str`, *optional*): The norm that reads the residual stream before this block, for layers whose attention
            adds something else than what its output projection gives.
        otherwise (`NeuronNames`, *optional*): The names in layers that do not have `output`.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str | None = None
    followers: tuple[str, ...] = ()
    apart: bool = False
    scale: str | None = None
    norm: str | None = None
    otherwise: "NeuronNames | None" = None
    config_neurons: str = "intermediate_size"


@dataclass(frozen=True)
class EmbeddingNames:
    """Names of the module that dimensions of word embeddings belong to.

    Args:
        table (`str`): The embeddings of tokens, from `model.base_model`.
    """

    table: str


@dataclass(frozen=True)
class Chain:
    """Channels between two convolutions of a layer. All paths start at the layer.

    Args:
        writer (`str`): The convolution whose filters the channels are.
        reader (`str`): The convolution that reads them.
        followers (`tuple[str, ...]`, *optional*): Modules between the two that act on every channel, or every run of
            channels, for itself: norms with running statistics, and grouped convolutions.
        norm (`str`, *optional*): The norm with running statistics of what the reader gives.
        squeezed (`tuple[str, ...]`, *optional*): The convolutions of squeeze and excitation: the one that reads the
            means of all channels, and the one that gives factors for them.
    """

    writer: str
    reader: str
    followers: tuple[str, ...] = ()
    norm: str | None = None
    squeezed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelNames:
    """Names of the modules that channels own. All paths start at a layer.

    Args:
        chains (`tuple[Chain, ...]`): In the order in which a layer runs them. Those are skipped whose writer or reader
            the layer does not have.
        shortcut (`str`, *optional*): The module that gives what the last reader's block is added to, `nn.Identity`
            where this is the layer's input.
        added (`str`, *optional*): Where there is no such module, the path of an attribute that says whether a layer
            adds its input.
    """

    chains: tuple[Chain, ...]
    shortcut: str | None = None
    added: str | None = None


@dataclass(frozen=True)
class DecoderNames:
    """Names of the decoder of an encoder-decoder.

    Args:
        layers (`str`): Path of the decoder's layers, from `model.base_model`. Models without it are encoders alone.
        names (`Mapping[str, Any]`): As for [`Architecture`], in the decoder's layers. Heads are those of
            self-attention.
        cross_heads (`HeadNames`): The heads of cross-attention, whose keys and values read the encoder's output. A
            layer runs them behind those of self-attention.
        reads_inputs (`bool`, *optional*, defaults to `False`): Whether models without other decoder inputs decode what
            the encoder reads.
    """

    layers: str
    names: Mapping[str, Any]
    cross_heads: HeadNames
    reads_inputs: bool = False


@dataclass(frozen=True)
class Architecture:
    """What the package knows of one model family.

    Args:
        layers (`str`): Path of the layers' `ModuleList`, from `model.base_model`. A `*` in it stands for all modules
            of a list; layers are then numbered through all lists.
        names (`Mapping[str, Any]`): For each kind of component that the family has, its names object, such as
            [`HeadNames`] for `"heads"` and [`NeuronNames`] for `"neurons"`.
        norm_first (`bool`, *optional*, defaults to `False`): Whether each block reads the normalized residual stream
            and adds to it. Otherwise it normalizes the sum.
        also_added (`tuple[str, ...]`, *optional*): Paths, from a layer, of projections that add to the residual stream
            before the layer's last group, and are never pruned. Paths that the layer does not have are skipped.
        decoder (`DecoderNames`, *optional*): The decoder of an encoder-decoder, of which `layers` are the encoder's.
            The decoder's are numbered after them.
        tower (`str`, *optional*): `"vision"` or `"text"`, for families with a tower of each. Classes of more than one
            tower hold it as `vision_model` or `text_model`, their config as `vision_config` or `text_config`.
        requires (`Mapping[str, Any]`, *optional*): Attributes of the config, and the values that they must have.
            Models of the family with other values are built otherwise, and are refused.
    """

    layers: str
    names: Mapping[str, Any]
    norm_first: bool = False
    also_added: tuple[str, ...] = ()
    decoder: DecoderNames | None = None
    tower: str | None = None
    requires: Mapping[str, Any] = field(default_factory=dict)
