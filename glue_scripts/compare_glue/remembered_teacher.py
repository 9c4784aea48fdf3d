"""A teacher that runs once on each example, however many models learn from it for however many epochs."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def remember_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a classifier return its logits from a cache where it has seen an example before, and returns it.

    The key of an example is its input tokens. The model's logits of it must not depend on the rest of the batch, nor
    may the model change.

    Args:
        model (`PreTrainedModel`): The dense model.
    """
    forward = model.forward
    known: dict[bytes, torch.Tensor] = {}

    def remembered(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor
    ) -> SequenceClassifierOutput:
        examples = zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        keys = [ids[mask].numpy().tobytes() for ids, mask in examples]
        if any(key not in known for key in keys):
            logits = forward(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
            for key, row in zip(keys, logits.float().cpu(), strict=True):
                known.setdefault(key, row)
        return SequenceClassifierOutput(logits=torch.stack([known[key] for key in keys]).to(input_ids.device))

    model.forward = remembered
    return model
