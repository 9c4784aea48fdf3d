"""What tests compare against: derivatives of single weights from `torch.func`, summed up by names written out here."""

import torch
from zoo import HEADS, HIDDEN, LAYERS


# Per model type: the layer's path; the weights whose outputs belong to heads, and to neurons; those whose inputs do.
NAMES = {
    "bert": (
        "bert.encoder.layer.{}.",
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.",
        ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "gpt2": ("transformer.h.{}.", ["attn.c_attn"], "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
for _name in ("roberta", "electra"):
    NAMES[_name] = (NAMES["bert"][0].replace("bert", _name, 1), *NAMES["bert"][1:])


def scored_weights(model) -> dict[str, torch.Tensor]:
    """All weights that heads and neurons own, by name."""
    layer, heads_in, heads_out, neurons_in, neurons_out = NAMES[model.config.model_type]
    names = []
    for i in range(LAYERS):
        for module in (*heads_in, neurons_in):
            names += [layer.format(i) + module + ".weight", layer.format(i) + module + ".bias"]
        names += [layer.format(i) + module + ".weight" for module in (heads_out, neurons_out)]
    return {name: model.get_parameter(name).detach() for name in names}


def sum_by_component(model, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums numbers given for each weight into heads, `(LAYERS, HEADS)`, and neurons, `(LAYERS, neurons)`."""
    layer, heads_in, heads_out, neurons_in, neurons_out = NAMES[model.config.model_type]
    transposed = model.config.model_type == "gpt2"  # Conv1D stores (inputs, outputs).
    heads, neurons = [], []
    for i in range(LAYERS):
        prefix = layer.format(i)
        rows = torch.zeros(HEADS, dtype=torch.float64)
        for module in heads_in:
            weight = values[f"{prefix}{module}.weight"]
            table = torch.cat([weight.T if transposed else weight, values[f"{prefix}{module}.bias"][:, None]], 1)
            for part in table.chunk(3 if transposed else 1):
                rows = rows + part.reshape(HEADS, -1).sum(1)
        out = values[f"{prefix}{heads_out}.weight"]
        heads.append(rows + (out if transposed else out.T).reshape(HEADS, -1).sum(1))
        into, out = values[f"{prefix}{neurons_in}.weight"], values[f"{prefix}{neurons_out}.weight"]
        neurons.append(
            into.sum(0 if transposed else 1) + values[f"{prefix}{neurons_in}.bias"] + out.sum(1 if transposed else 0)
        )
    return torch.stack(heads), torch.stack(neurons)


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
        for name, mask in (
            (heads_out, heads[layer].repeat_interleave(HIDDEN // HEADS)),
            (neurons_out, neurons[layer]),
        ):
            weight = model.get_parameter(path.format(layer) + name + ".weight").detach()
            weights[path.format(layer) + name + ".weight"] = (
                weight * mask[:, None] if model_type == "gpt2" else weight * mask
            )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.func.functional_call(model, weights, (), inputs).logits


def mask_of_ones() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks that change nothing."""
    return torch.ones(LAYERS, HEADS, dtype=torch.float64), torch.ones(LAYERS, 24, dtype=torch.float64)
