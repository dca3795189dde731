"""The same cut in all processes of a distributed run, or an error in all of them.

    plan = broadcast_plan(lambda: my_plan(model))  # made in process 0, sent to the others
    check_agreement(model)
    plan.apply_(model)
    check_agreement(model)  # raises everywhere if one process holds something else

`model` is the bare model, not DistributedDataParallel around it: wrap it again afterwards, and build the optimiser
anew, since the parameters are new. Without `torch.distributed` both functions work as for a single process. Plans
travel as JSON, never as pickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ss_pruning.errors import InputError, PlanError
from ss_pruning.importance.strength import synaptic_strength
from ss_pruning.sparsity.masks import mask_, merge_masks_, synapse_masks, zero_masks
from ss_pruning.sparsity.penalty import StrengthPenalty
from ss_pruning.surgery.plan import Plan, plan_of


def broadcast_plan(plan: Plan | Callable[[], Plan] | None) -> Plan:
    """Send the plan of process 0 to all others. All processes have to call this.

    Args:
        plan: In process 0 a plan, or a function that makes it; not looked at in the others.

    Returns:
        The plan of process 0.

    Raises:
        Exception: In process 0: what making the plan raised.
        PlanError: In the others: process 0 has made none; the message says why.
    """
    if not _several():
        return _made(plan)
    if dist.get_rank():
        answer = json.loads(_from_first(""))
        if "failed" in answer:
            raise PlanError(f"process 0 could not make a plan: {answer['failed']}")
        return Plan.from_json(answer["plan"])
    try:
        made = _made(plan)
    except BaseException as error:
        _from_first(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        raise
    _from_first(json.dumps({"plan": made.to_json()}))
    return made


def check_agreement(model: nn.Module) -> None:
    """Compare the model of all processes: names, shapes and types of its tensors, and the plan that it was cut by.

    All processes have to call this, and all of them raise if one differs.

    Args:
        model: The bare model; only read.

    Raises:
        PlanError: Names the processes whose model is not that of process 0.
    """
    if not _several():
        return
    own = torch.tensor(list(fingerprint(model)), dtype=torch.uint8, device=_device())
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    odd = [rank for rank, digest in enumerate(gathered) if not torch.equal(digest, gathered[0])]
    if odd:
        raise PlanError(
            f"the model of process {', '.join(map(str, odd))} is not that of process 0: tensors of other shapes, or "
            "cut by another plan. Start from the same model, and make the plan once "
            "(ss_pruning.io.distributed.broadcast_plan)"
        )


def sparsify_(
    models: Sequence[nn.Module],
    example_inputs: Any,
    *,
    sparsity: float | None,
    planned: Callable[[], Plan] | None,
    keep_zeros: bool,
) -> Plan:
    """Mask the weakest synapses of alike models, and cut channels, in all processes alike.

    Args:
        models: The first says which synapses are weak; the others, such as averages of its weights, follow.
        example_inputs: What `forward` takes.
        sparsity: Share of the synapses to mask, those of first layers and classifiers aside; they stay 0.
        planned: Makes the plan in process 0; None cuts nothing.
        keep_zeros: Kernels that are 0 now stay 0 in any case.

    Returns:
        The plan that was applied.

    Raises:
        PlanError: The models of two processes differ, or process 0 has made no plan.
    """
    first, plan = models[0], Plan()
    for model in models:
        merge_masks_(model)
    if sparsity is not None:
        strengths, paths = (
            synaptic_strength(first, example_inputs),
            StrengthPenalty(first, example_inputs).paths,
        )
        masks = synapse_masks({path: strengths[path] for path in paths}, fraction=sparsity)
        for model in models:
            merge_masks_(mask_(model, masks))
    if planned is not None:
        plan = broadcast_plan(planned)
    for model in models:
        check_agreement(model)
        if planned is not None:
            plan.apply_(model)
            check_agreement(model)
    if keep_zeros or sparsity is not None:
        masks = zero_masks(first)
        for model in models:
            mask_(model, masks)
    return plan


def fingerprint(model: nn.Module) -> bytes:
    """32 bytes that depend on the names, shapes and types of all tensors, and on the plan that the model carries."""
    plan = plan_of(model)
    digest = hashlib.sha256(plan.to_json().encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.digest()


def _made(plan: Plan | Callable[[], Plan] | None) -> Plan:
    made = plan() if callable(plan) else plan
    if not isinstance(made, Plan):
        raise InputError("process 0 has to give a plan, or a function that returns one")
    return made


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Where the process group can send tensors from."""
    backend = str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _from_first(text: str) -> str:
    """The text of process 0, in all processes."""
    encoded = text.encode()
    length = torch.tensor(len(encoded), device=_device())
    dist.broadcast(length, 0)
    content: Tensor = torch.zeros(int(length), dtype=torch.uint8, device=_device())
    if not dist.get_rank():
        content = torch.tensor(list(encoded), dtype=torch.uint8, device=_device())
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()
