"""`PlanningSettings`: how much is removed and what may go, for `plan_pruning`, `HapConfig` and the `hap` command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..components.groups import KINDS, Group, Kind
from ..forward_modes import MODES, validate_mode
from ..number_fields import convert_numbers


# Shares of parameters, FLOPs and measured seconds; a budget named after a kind counts its components.
MEASURES = ("params", "model", "flops", "latency")


def finest_step(step: int, dense: int) -> int:
    """By how many components all parts of a layer get narrower: a quarter of a dense part's if that is less."""
    return min(step, max(1, dense // 4))


@dataclass
class PlanningSettings:
    """How much is removed, and what may go.

    Parameters that control how much is removed:
        budget (`str`, *optional*, defaults to `"params"`): What `ratio` is a share of, always of the dense model:

            - `"params"`: parameters of the encoder's layers;
            - `"model"`: all parameters, embeddings and classifier included; tied ones count once;
            - `"flops"`: their FLOPs on a batch of inputs;
            - `"latency"`: their seconds by a latency table, in `latency_mode`;
            - `"heads"`, `"neurons"` or another kind: the number of these components; only they are removed, and their
              number is rounded to the nearest.
        latency_mode (`str`, *optional*, defaults to `"eager"`): How the model shall run that `budget="latency"` plans
            for: `"eager"`, `"compiled"` (`torch.compile`) or `"cuda_graphs"`.
        ratio (`float`, *optional*, defaults to 0.6): Share that is gone afterwards, in [0, 1). Components pruned
            earlier count. Somewhat more goes where heads and groups of neurons do not fit exactly. Whole layers come
            as near as they can, from either side, and one stays.

    Parameters that control what may go:
        min_heads (`int`, *optional*): Heads every layer keeps at least, where heads go whole. By default 0 for methods
            that foresee a refit (`kronecker`), which know when a layer cannot spare more, and 1 for others, which can
            empty whole layers.
        min_neurons (`float`, *optional*): Share of its dense neurons that every layer keeps at least. By default 0 for
            methods that foresee a refit, and 0.05 for others. Where the floor is 0, whole blocks can go.
        neuron_multiple (`int`, *optional*, defaults to 8): Layers that lose neurons keep a multiple of this. Matrix
            products are faster for such widths.
        even_heads (`bool`, *optional*, defaults to `True`): Whether the heads of a layer that lose dimensions keep
            equally many, a multiple of 8. Attention works with heads as wide as the widest, so even heads are faster.
            Uneven ones keep somewhat more of what matters.
        uniform (`bool`, *optional*, defaults to `False`): Whether all layers keep as many heads, and as many neurons.
            The pruned model is saved with these numbers in its config, as any dense model, and loads without this
            package, also in engines that know one size of layers alone. Kinds are whole heads and neurons, or whole
            layers, which the checkpoint then lacks (models that do without: Llama, Mistral, Qwen, Gemma and others
            whose blocks add to the residual stream without biases).
        weigh_costs (`bool`, *optional*, defaults to `True`): Whether to rank by score over cost, or by score alone.
            Dimensions that heads lose evenly are always ranked by score over cost.
        implant_ratio (`float`, *optional*, defaults to 0.0): Of the neurons or channels chosen for removal, this most
            sensitive share is replaced by implants ([HAP](https://arxiv.org/abs/2101.08940)); more of the others go to
            stay in budget. Neurons are replaced by a low-rank map of half the rank, of which a rank costs what a
            neuron costs. Channels keep a 1x1 filter in the place of a larger one.

    Raises:
        ValueError: If the budget is unknown, or a number is none or out of range.
    """

    budget: str = field(
        default="params",
        metadata={
            "help": "What the ratio is a share of: params, flops or latency of the encoder (embeddings and classifier "
            "stay), model for all its parameters (embeddings get narrower, too), or the number of components of one "
            "kind, such as heads or neurons."
        },
    )
    ratio: float = field(default=0.6, metadata={"help": "Share of the budget to remove, in [0, 1)."})
    min_heads: int | None = field(
        default=None, metadata={"help": "Heads every layer keeps at least; with it, heads go whole."}
    )
    min_neurons: float | None = field(default=None, metadata={"help": "Share of neurons every layer keeps at least."})
    neuron_multiple: int = field(default=8, metadata={"help": "Layers that lose neurons keep a multiple of this."})
    even_heads: bool = field(
        default=True, metadata={"help": "Keep equally many dimensions of all heads of a layer, which is faster."}
    )
    uniform: bool = field(
        default=False, metadata={"help": "Keep as many components in every layer, so that any engine loads the model."}
    )
    weigh_costs: bool = field(default=True, metadata={"help": "Rank by score over cost instead of score alone."})
    implant_ratio: float = field(
        default=0.0,
        metadata={"help": "Most sensitive share of the neurons or channels to remove that implants replace."},
    )
    latency_mode: str = field(
        default="eager", metadata={"help": f"How the model runs whose latency counts: {', '.join(MODES)}."}
    )

    def __post_init__(self):
        convert_numbers(self)
        if self.budget not in (*MEASURES, *KINDS):
            raise ValueError(f"Unknown budget '{self.budget}'; choose one of {', '.join((*MEASURES, *KINDS))}.")
        validate_mode(self.latency_mode)
        if not 0 <= self.ratio < 1:
            raise ValueError(f"`ratio` is the share to remove and must be in [0, 1), got {self.ratio}.")
        for kind in KINDS.values():
            name, floor = f"min_{kind.name}", self.floor_of(kind)
            if floor is not None and floor < 0:
                raise ValueError(f"`{name}` must not be negative, got {floor}.")
            if floor is not None and kind.floor_is_share and not floor < 1:
                raise ValueError(f"`{name}` is a share and must be in [0, 1), got {floor}.")
            if self.step_of(kind) < 1:
                raise ValueError(f"`{kind.singular}_multiple` must be at least 1, got {self.step_of(kind)}.")
        if not 0 <= self.implant_ratio < 1:
            raise ValueError(f"`implant_ratio` is a share and must be in [0, 1), got {self.implant_ratio}.")
        if self.uniform and self.implant_ratio:
            raise ValueError("`uniform` makes layers of a dense model, which has no implants; set implant_ratio=0.")

    def floor_of(self, kind: Kind) -> float | None:
        """What every layer keeps of a kind at least, or `None` for what the method needs."""
        return vars(self).get(f"min_{kind.name}")

    def step_of(self, kind: Kind) -> int:
        """Layers that lose components of a kind keep a multiple of this."""
        return vars(self).get(f"{kind.singular}_multiple", kind.step)

    def floors(self, groups: Sequence[Group], dense: Sequence[int], foresees_refit: bool) -> list[int]:
        """Components that every group keeps at least, given how many it had before any pruning."""
        found = []
        for group, count in zip(groups, dense, strict=True):
            floor = self.floor_of(group.kind)
            if floor is None:
                floor = 0 if foresees_refit else group.kind.floor
            found.append(math.ceil(floor * count) if group.kind.floor_is_share else int(floor))
        return found
