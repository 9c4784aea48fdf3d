"""What several processes must agree in."""

import hashlib
import json
from dataclasses import asdict

from accelerate import Accelerator
from accelerate.utils import gather_object

from .plan import PruningPlan


def validate_same_plan(plan: PruningPlan | None, accelerator: Accelerator) -> None:
    """Checks that all processes hold the same plan, so that none prunes another model than the others.

    Args:
        plan (`PruningPlan`, *optional*): This process's plan, if it has one.
        accelerator (`Accelerator`): The processes; all must call this.

    Raises:
        ValueError: In every process, if one differs.
    """
    if accelerator.num_processes == 1:
        return
    text = None if plan is None else json.dumps(asdict(plan), sort_keys=True)
    digests = gather_object([text and hashlib.sha256(text.encode()).hexdigest()])
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"Processes {others} have another pruning plan than process 0. Give all the same plan, or none, and the "
            "same model, training set and seed. Nothing was pruned."
        )
