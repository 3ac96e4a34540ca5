"""``python -m post_server.ml.follower ORDER.json``: helps a job of several GPUs; started by it, and ends with it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from post_server.ml.distillation import DistilConfig, follow
from post_server.ml.processes import READY, Group
from post_server.ml.teacher_cache import CacheRoom
from post_server.worker import lifeline
from post_server.worker.quiet import quiet_models
from post_shared.language_model import LanguageModel

GRACE = 5.0


def write_order(
    path: Path,
    target: Path,
    config: DistilConfig,
    *,
    dtype: torch.dtype,
    checkpoint: Path | None,
    cache_bytes: int,
    cpu: bool,
) -> None:
    """What a follower has to know: where the model lies, what it computes in and how it is distilled."""
    order = {"target": str(target), "config": asdict(config), "cache_bytes": cache_bytes, "cpu": cpu}
    order["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps({**order, "checkpoint": None if checkpoint is None else str(checkpoint)}))


def main(order_path: str) -> None:
    """Follow until the leader is done."""
    lifeline.die_with_parent(GRACE)
    quiet_models()
    order = json.loads(Path(order_path).read_text("utf-8"))
    device = "cpu" if order["cpu"] else f"cuda:{os.environ['LOCAL_RANK']}"
    target = LanguageModel.load(order["target"], device=device, dtype=getattr(torch, order["dtype"]))
    options: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in order["config"].items()}
    config = DistilConfig(**options)
    checkpoint = None if order["checkpoint"] is None else Path(order["checkpoint"])
    print(READY.decode(), flush=True)
    group = Group.join(cpu=order["cpu"])
    follow(target, config, group, checkpoint=checkpoint, room=CacheRoom(order["cache_bytes"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
