"""``python -m post_server.distillations.follower ORDER.json``: helps a job of several GPUs; started by it, and ends with it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from post_server.distillations.launcher import READY
from post_server.processes import parent_death
from post_server.processes.library_logging import quiet_models
from post_shared.method.distillation.distil import follow
from post_shared.method.distillation.teacher_cache import CacheBudget
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.distributed import Group

GRACE = 5.0


def write_order(
    path: Path,
    target: Path,
    options: DistilOptions,
    *,
    dtype: torch.dtype,
    checkpoint: Path | None,
    cache_bytes: int,
    cpu: bool,
) -> None:
    """What a follower has to know: where the model lies, what it computes in and how it is distilled."""
    order = {
        "target": str(target),
        "options": options.model_dump(mode="json", include=set(DistilOptions.model_fields)),
        "cache_bytes": cache_bytes,
        "cpu": cpu,
    }
    order["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps({**order, "checkpoint": None if checkpoint is None else str(checkpoint)}))


def main(order_path: str) -> None:
    """Follow until the leader is done."""
    parent_death.die_with_parent(GRACE)
    quiet_models()
    order = json.loads(Path(order_path).read_text("utf-8"))
    device = "cpu" if order["cpu"] else f"cuda:{os.environ['LOCAL_RANK']}"
    target = LanguageModel.load(order["target"], device=device, dtype=getattr(torch, order["dtype"]))
    options = DistilOptions(**order["options"])
    checkpoint = None if order["checkpoint"] is None else Path(order["checkpoint"])
    print(READY.decode(), flush=True)
    group = Group.join(cpu=order["cpu"])
    follow(target, options, group, checkpoint=checkpoint, cache_budget=CacheBudget(order["cache_bytes"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
