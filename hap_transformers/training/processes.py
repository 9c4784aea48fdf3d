"""Makes several processes agree."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..surgery.plan import PruningPlan


def made_once(make: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Calls `make` in the main process, and returns its result in every process.

    Measurements such as latencies differ between processes; this gives all of them the same one.
    """
    made = [make() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    return made[0]


def validate_same_plan(plan: PruningPlan | None, accelerator: Accelerator) -> None:
    """Checks that all processes have the same plan, so that all prune the model in the same way.

    Args:
        plan (`PruningPlan`, *optional*): This process's plan, if it has one.
        accelerator (`Accelerator`): The processes. All of them must call this function.

    Raises:
        ValueError: In every process, if the plan of one process differs.
    """
    if accelerator.num_processes == 1:
        return
    text = None if plan is None else json.dumps(asdict(plan), sort_keys=True)
    digests = gather_object([text and hashlib.sha256(text.encode()).hexdigest()])
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"Processes {others} have another pruning plan than process 0. Give all processes the same plan, or none, "
            "and the same model, training set and seed. Nothing was pruned."
        )
