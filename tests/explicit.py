"""What tests compare against: derivatives of single weights from `torch.func`, summed up by names written out here."""

import torch
from zoo import HEADS, LAYERS, NEURONS


# Per model type: the layer's path; the projections whose outputs belong to heads, and the one whose inputs do; the
# same for neurons. A projection named n times is fused, in n parts.
NAMES = {
    "bert": (
        "bert.encoder.layer.{}.",
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        "attention.output.dense",
        ["intermediate.dense"],
        "output.dense",
    ),
    "deberta-v2": (
        "deberta.encoder.layer.{}.",
        ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"],
        "attention.output.dense",
        ["intermediate.dense"],
        "output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.",
        ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        "attention.out_lin",
        ["ffn.lin1"],
        "ffn.lin2",
    ),
    "gpt2": ("transformer.h.{}.", ["attn.c_attn"] * 3, "attn.c_proj", ["mlp.c_fc"], "mlp.c_proj"),
    "llama": (
        "model.layers.{}.",
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj",
        ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj",
    ),
    "modernbert": ("model.layers.{}.", ["attn.Wqkv"] * 3, "attn.Wo", ["mlp.Wi"] * 2, "mlp.Wo"),
}
for _name in ("roberta", "electra"):
    NAMES[_name] = (NAMES["bert"][0].replace("bert", _name, 1), *NAMES["bert"][1:])


def scored_weights(model) -> dict[str, torch.Tensor]:
    """All weights that heads and neurons own, by name."""
    layer, heads_in, heads_out, neurons_in, neurons_out = NAMES[model.config.model_type]
    parameters, names = dict(model.named_parameters()), []
    for i in range(LAYERS):
        for module in dict.fromkeys((*heads_in, *neurons_in)):
            names += [layer.format(i) + module + ".weight", layer.format(i) + module + ".bias"]
        names += [layer.format(i) + module + ".weight" for module in (heads_out, neurons_out)]
    return {name: parameters[name].detach() for name in names if name in parameters}


def sum_by_component(model, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums numbers given for each weight into heads, `(LAYERS, HEADS)`, and neurons, `(LAYERS, neurons)`."""
    layer, heads_in, heads_out, neurons_in, neurons_out = NAMES[model.config.model_type]
    transposed = model.config.model_type == "gpt2"  # Conv1D stores (inputs, outputs).

    def sums(prefix, inputs, output, components=None):
        out = values[f"{prefix}{output}.weight"]
        out = out if transposed else out.T
        components = components or len(out)
        total = out.reshape(components, -1).sum(1)
        for module in dict.fromkeys(inputs):
            weight = values[f"{prefix}{module}.weight"]
            table = weight.T if transposed else weight
            if f"{prefix}{module}.bias" in values:
                table = torch.cat([table, values[f"{prefix}{module}.bias"][:, None]], 1)
            for part in table.chunk(inputs.count(module)):
                total = total + part.reshape(components, -1).sum(1)
        return total

    prefixes = [layer.format(i) for i in range(LAYERS)]
    heads = [sums(prefix, heads_in, heads_out, HEADS) for prefix in prefixes]
    return torch.stack(heads), torch.stack([sums(prefix, neurons_in, neurons_out) for prefix in prefixes])


def explicit_gauss_newton(model, batch, loss_of_logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Block traces of mean_i J_i^T L_i J_i, from the full Jacobian of the logits and the Hessian of the loss in them.

    Args:
        loss_of_logits: Takes the logits of all examples and gives the mean loss.
    """
    weights = scored_weights(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def logits_of(values):
        return torch.func.functional_call(model, values, (), inputs).logits

    logits = logits_of(weights).detach()
    hessian = torch.func.hessian(loss_of_logits)(logits).reshape(logits.numel(), logits.numel())
    jacobians = torch.func.jacrev(logits_of)(weights)
    diagonals = {}
    for name, jacobian in jacobians.items():
        flat = jacobian.reshape(logits.numel(), -1)
        diagonals[name] = ((hessian @ flat) * flat).sum(0).reshape(weights[name].shape)
    return sum_by_component(model, diagonals)


def masked_logits(model, batch, heads, neurons) -> torch.Tensor:
    """Logits with masks multiplied into the columns of the output projections; masks `(LAYERS, components)`."""
    model_type = model.config.model_type
    path, _, heads_out, _, neurons_out = NAMES[model_type]
    weights = {}
    for layer in range(LAYERS):
        for name, mask in ((heads_out, heads[layer]), (neurons_out, neurons[layer])):
            name = path.format(layer) + name + ".weight"
            weight = model.get_parameter(name).detach()
            transposed = model_type == "gpt2"
            mask = mask.repeat_interleave(weight.shape[0 if transposed else 1] // len(mask))
            weights[name] = weight * mask[:, None] if transposed else weight * mask
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.func.functional_call(model, weights, (), inputs).logits


def mask_of_ones() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks that change nothing."""
    return torch.ones(LAYERS, HEADS, dtype=torch.float64), torch.ones(LAYERS, NEURONS, dtype=torch.float64)
