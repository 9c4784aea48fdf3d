"""Explicit derivatives: `torch.func` computes them per weight, and the zoo's paths tell which component owns it."""

import torch
from zoo import HEADS, LAYERS, NEURONS, ZOO, Tiny


def paths_of(model) -> Tiny:
    """The entry of a model's type, with the paths of its projections."""
    return ZOO[model.config.model_type]


def scored_weights(model) -> dict[str, torch.Tensor]:
    """All weights that heads and neurons own, by name."""
    tiny, parameters, names = paths_of(model), dict(model.named_parameters()), []
    for i in range(model.config.num_hidden_layers):
        layer = tiny.layer.format(i)
        for module in dict.fromkeys((*tiny.heads_in, *tiny.neurons_in)):
            names += [f"{layer}.{module}.weight", f"{layer}.{module}.bias"]
        names += [f"{layer}.{module}.weight" for module in (tiny.heads_out, tiny.neurons_out)]
    return {name: parameters[name].detach() for name in names if name in parameters}


def sum_by_component(model, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums numbers given for each weight into heads, `(layers, HEADS)`, and neurons, `(layers, neurons)`."""
    tiny = paths_of(model)
    transposed = model.config.model_type == "gpt2"  # Conv1D stores (inputs, outputs).

    def sums(prefix, inputs, output, components=None):
        out = values[f"{prefix}.{output}.weight"]
        out = out if transposed else out.T
        components = components or len(out)
        total = out.reshape(components, -1).sum(1)
        for module in dict.fromkeys(inputs):
            weight = values[f"{prefix}.{module}.weight"]
            table = weight.T if transposed else weight
            if f"{prefix}.{module}.bias" in values:
                table = torch.cat([table, values[f"{prefix}.{module}.bias"][:, None]], 1)
            for part in table.chunk(inputs.count(module)):
                total = total + part.reshape(components, -1).sum(1)
        return total

    prefixes = [tiny.layer.format(i) for i in range(model.config.num_hidden_layers)]
    heads = [sums(prefix, tiny.heads_in, tiny.heads_out, HEADS) for prefix in prefixes]
    neurons = [sums(prefix, tiny.neurons_in, tiny.neurons_out) for prefix in prefixes]
    return torch.stack(heads), torch.stack(neurons)


def explicit_gauss_newton(model, batch, loss_of_logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Block traces of mean_i J_i^T L_i J_i, from the full Jacobian of the logits and the Hessian of the loss in them.

    Args:
        loss_of_logits: Takes the logits of all examples and gives the mean loss.
    """
    return sum_by_component(model, gauss_newton_diagonals(model, scored_weights(model), batch, loss_of_logits))


def gauss_newton_diagonals(model, weights, batch, loss_of_logits) -> dict[str, torch.Tensor]:
    """The Gauss-Newton matrix's diagonal, shaped like some weights."""
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
    return diagonals


def explicit_factors(model, batch, module):
    """Kronecker factors A and C of the curvature of a projection's weights, for a classifier's cross-entropy.

    A comes from the inputs of valid tokens, C from each example's own Jacobian times a square root of diag p - p p^T.
    """
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    handle.remove()
    tokens = torch.cat([inputs for inputs, _ in seen]).detach()
    mask = batch.get("attention_mask")
    tokens = tokens.flatten(0, -2)  # Those of OPT's feed-forward blocks are flat.
    tokens = tokens if mask is None else tokens[mask.repeat(len(seen), 1).flatten().bool()]
    cotangents = 0
    for i, example in enumerate(logits):
        p = example.softmax(0).detach()
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            for g in torch.autograd.grad(example @ vector * value.sqrt(), [out for _, out in seen], retain_graph=True):
                own = g.reshape(len(logits), -1, g.shape[-1])[i]  # Swin sees an image's windows one by one.
                cotangents = cotangents + own.T @ own / len(logits)
    centred = tokens - tokens.mean(0) if module.bias is not None else tokens
    return centred.T @ centred / len(tokens), cotangents


def masked_logits(model, batch, heads, neurons) -> torch.Tensor:
    """Logits with masks multiplied into the columns of the output projections; masks `(LAYERS, components)`."""
    tiny, weights = paths_of(model), {}
    transposed = model.config.model_type == "gpt2"
    for layer in range(LAYERS):
        for output, mask in ((tiny.heads_out, heads[layer]), (tiny.neurons_out, neurons[layer])):
            name = f"{tiny.layer.format(layer)}.{output}.weight"
            weight = model.get_parameter(name).detach()
            mask = mask.repeat_interleave(weight.shape[0 if transposed else 1] // len(mask))
            weights[name] = weight * mask[:, None] if transposed else weight * mask
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.func.functional_call(model, weights, (), inputs).logits


def mask_of_ones() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks that change nothing."""
    return torch.ones(LAYERS, HEADS, dtype=torch.float64), torch.ones(LAYERS, NEURONS, dtype=torch.float64)
