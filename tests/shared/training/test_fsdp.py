"""A target sharded over two processes (FSDP, gloo) gives the outputs, gradients and transfer of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from post_server.distillations.launcher import _free_port
from post_shared.data.tasks import Task
from post_shared.errors import Cancelled
from post_shared.method.transfer.transfer import transfer
from post_shared.method.tuning.tune import tuning_objective
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.memory_plan import saved_per_position
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.transfers import TransferOptions
from post_shared.training.checkpoint import fingerprint
from post_shared.training.distributed import Group
from post_shared.training.fsdp import SharedAdam, shard
from post_shared.training.optimizer import PromptAdam
from post_shared.training.progress import Progress
from tests.models import LABELS, TEXTS, tiny_model

WORDS = {"negative": ("bad", "terrible"), "positive": ("good", "great")}
CONFIG = TransferOptions(steps=4, batch_size=5)


def task_for(model: LanguageModel) -> Task:
    return Task("{text}, it was" if model.kind == "causal" else "{text}, it was {mask}", WORDS)


def gradient(model: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    batch = encode_rows(model, task_for(model), TEXTS).batch(range(8))
    prompt = SoftPrompt.random(tiny_model(), 5, seed=1).embeddings.clone().requires_grad_()
    logits = model.answer_logits(batch, prompt)
    logits.logsumexp(-1).sum().backward()
    assert prompt.grad is not None
    return logits.detach(), prompt.grad


def step(model: LanguageModel, group: Group | None, rows: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step on ``rows`` rows, in micro-batches of two."""
    task = task_for(model)
    batch = encode_rows(model, task, TEXTS, labels=LABELS, reserved=4).batch(range(rows))
    prompt = torch.nn.Parameter(SoftPrompt.random(tiny_model(), 4).embeddings.clone())
    split = lambda batch: batch.split(2)  # noqa: E731
    adam = SharedAdam(prompt, 0.01, split, group) if group else PromptAdam(prompt, 0.01, split)
    value = adam.update(tuning_objective(model, task), batch)
    assert prompt.grad is not None
    return value, prompt.grad


def run_process(rank: int, port: int, family: str, folder: Path) -> None:
    """The checks that each of the two processes runs."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    group, plain = Group.join(cpu=True), tiny_model(family)
    target, student = shard(tiny_model(family), group), copy_student(plain, [0, 3])
    local = sum(weight.to_local().numel() for weight in target.model.parameters() if hasattr(weight, "to_local"))
    total = sum(weight.numel() for weight in target.model.parameters() if hasattr(weight, "to_local"))
    assert 0.45 < local / total < 0.55
    assert fingerprint(target) == fingerprint(plain)
    assert saved_per_position(target) == saved_per_position(plain)
    for actual, expected in zip(gradient(target), gradient(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for rows in (8, 3, 1):  # with one row, one process has none
        actual, expected = step(target, group, rows), step(plain, None, rows)
        assert actual[0] == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-6)
    prompt, task = SoftPrompt.random(plain, 4), task_for(plain)
    alone = transfer(plain, student, task, prompt, TEXTS, CONFIG)

    def stop(progress: Progress) -> None:
        if progress.stage == "transfer" and progress.step == 2:
            raise Cancelled("stop")

    checkpoint = folder / "checkpoint"
    for on_progress in (stop, None):  # both are cancelled, and resume from the leader's checkpoint
        try:
            more = {"on_progress": on_progress} if on_progress else {}
            together = transfer(
                target, student, task, prompt, TEXTS, CONFIG, checkpoint=checkpoint, group=group, **more
            )
        except Cancelled:
            torch.distributed.barrier()  # the leader has written the checkpoint
    torch.testing.assert_close(together.prompt.embeddings, alone.prompt.embeddings, rtol=1e-3, atol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_two_processes_compute_and_learn_what_one_does(family: str, tmp_path: Path) -> None:
    multiprocessing.spawn(run_process, (_free_port(), family, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
