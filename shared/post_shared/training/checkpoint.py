"""Checkpoints: safetensors with a JSON header, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from post_shared.files.atomic import replacing
from post_shared.model.language_model import LanguageModel

log = logging.getLogger("post.training")


def fingerprint(*parts: Any) -> str:
    """A run id: a digest that is equal for equal configurations, texts and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        elif isinstance(part, LanguageModel):
            digest.update(_sample(part.weights()).encode())
        elif isinstance(part, nn.Module):
            digest.update(_sample(part.parameters()).encode())
        else:
            plain = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
            plain = plain.model_dump() if isinstance(plain, BaseModel) else plain
            digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _sample(weights: Iterable[Tensor]) -> str:
    """A digest of a sample of each weight: enough to distinguish models, while reading all weights takes minutes."""
    samples = [weight.flatten()[:256] for weight in weights]
    return fingerprint(*samples, [str(sample.dtype) for sample in samples])


@dataclass(frozen=True)
class Checkpoint:
    """One resumable state in ``folder``; the state of a run with another ``run_id`` is ignored."""

    folder: Path
    run_id: str
    every_seconds: float = 60.0
    writes: bool = True
    """False in processes that only read what the leader writes."""
    keeps_end: bool = False
    """Whether the state after the last step is saved too, so that a finished stage is not repeated."""

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self, step: int, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        """Atomically: a kill at any moment leaves the old state or the new one."""
        if not self.writes:
            return
        header = {"run_id": self.run_id, "step": str(step), "seconds": repr(seconds)}
        with replacing(self.path) as partial:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial, header)

    def try_to_save(self, step: int, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        """Like :meth:`save`, but a full disk only logs a warning: training continues and the previous state stays."""
        try:
            self.save(step, seconds, tensors)
        except (OSError, SafetensorError) as error:
            log.warning("no checkpoint saved at step %d: %s", step, error)

    def load(self) -> tuple[int, float, dict[str, Tensor]] | None:
        """(steps done, seconds spent, tensors), or None if there is no state to resume from."""
        if not self.begun():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                return int(header["step"]), float(header["seconds"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def begun(self) -> bool:
        """Whether there is a state of this run to resume from."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return (file.metadata() or {}).get("run_id") == self.run_id
        except (OSError, SafetensorError):
            return False
