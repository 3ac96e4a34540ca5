"""``python -m post_server.distillations.follower CONFIG.json``: a follower process of a distillation on several GPUs.

The job starts it, and it ends with the job.
"""

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

GRACE_SECONDS = 5.0


def write_config(
    path: Path,
    target: Path,
    options: DistilOptions,
    *,
    dtype: torch.dtype,
    checkpoint: Path | None,
    cache_bytes: int,
    cpu: bool,
) -> None:
    """Write a follower's configuration: the model's folder, its dtype and the distillation options."""
    config = {
        "target": str(target),
        "options": options.model_dump(mode="json", include=set(DistilOptions.model_fields)),
        "cache_bytes": cache_bytes,
        "cpu": cpu,
    }
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps({**config, "checkpoint": None if checkpoint is None else str(checkpoint)}))


def main(config_path: str) -> None:
    """Follow until the leader is done."""
    parent_death.die_with_parent(GRACE_SECONDS)
    quiet_models()
    config = json.loads(Path(config_path).read_text("utf-8"))
    device = "cpu" if config["cpu"] else f"cuda:{os.environ['LOCAL_RANK']}"
    target = LanguageModel.load(config["target"], device=device, dtype=getattr(torch, config["dtype"]))
    options = DistilOptions(**config["options"])
    checkpoint = None if config["checkpoint"] is None else Path(config["checkpoint"])
    print(READY.decode(), flush=True)
    group = Group.join(cpu=config["cpu"])
    follow(target, options, group, checkpoint=checkpoint, cache_budget=CacheBudget(config["cache_bytes"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
