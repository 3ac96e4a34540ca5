"""On a GPU, everything computes what it computes on the CPU, up to float32 rounding."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_steps
from torch import Tensor, distributed

from post_client.privacy import PrivacyConfig
from post_client.students.checks import load_student
from post_client.tuning.tune import tune
from post_server.distillations.launcher import _free_port
from post_shared.data.batches import Batch, EncodedRow, EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine import packing
from post_shared.errors import Cancelled, OutOfMemory
from post_shared.inference.classification import ServedPrompt, classify_mixed
from post_shared.inference.evaluation import evaluate
from post_shared.inference.generation import Decoder, DecodingRow, Sampling
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.teacher_cache import CacheBudget
from post_shared.method.transfer.transfer import transfer
from post_shared.model import language_model
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.memory_plan import held_per_position, plan_step, saved_per_position
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.distributed import Group
from post_shared.training.fsdp import shard
from post_shared.training.progress import Progress
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
WORDS = {"negative": ("bad", "terrible"), "positive": ("good", "great")}
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
PARAGRAPHS = [" ".join(TEXTS)] * 40
DISTIL = DistilOptions(keep_layers=2, steps=40, batch_tokens=128, sequence_length=32)


def task_for(model: LanguageModel) -> Task:
    return Task("{text}, it was" if model.kind == "causal" else "{text}, it was {mask}", WORDS)


def on(device: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The same model on the given device."""
    model = tiny_model(family)
    return LanguageModel(model.model.to(device, dtype), model.tokenizer)


def close(mine: Tensor, expected: Tensor, *, rtol: float = 1e-3) -> None:
    """Equal up to float32 rounding, which the models' large random weights amplify."""
    error = float((mine.cpu().double() - expected.cpu().double()).norm() / expected.double().norm().clamp_min(1e-12))
    assert error < rtol, error


def gradients(model: LanguageModel, *, several: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and prompt gradients, with one shared prompt or with three prompts and an index per text."""
    batch = encode_rows(model, task_for(model), TEXTS).batch(range(8))
    prompts = torch.stack([SoftPrompt.random(tiny_model(), 5, seed=seed).embeddings for seed in range(3)])
    prompt = (prompts if several else prompts[0]).to(model.device).requires_grad_()
    prompt_index = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1], device=model.device) if several else None
    logits = model.answer_logits(batch, prompt, prompt_index=prompt_index)
    logits.logsumexp(-1).sum().backward()
    assert prompt.grad is not None
    return logits.detach(), prompt.grad


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_logits_and_prompt_gradients(family: str, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "packing_pays", lambda *_: True)
    for mine, expected in zip(
        gradients(on("cuda", family), several=several), gradients(on("cpu", family), several=several), strict=True
    ):
        close(mine, expected)


def test_few_texts_with_a_short_prompt_are_not_packed() -> None:
    model = on("cuda")
    batch = EncodedRows((EncodedRow([5] * 40, [39], [], None),) * 8).whole
    short, long = (SoftPrompt.random(tiny_model(), length).embeddings for length in (5, 100))
    assert not packing.packing_pays(model, batch, short)
    assert packing.packing_pays(model, batch, long)
    with model.using_graphs(model.new_graphs()):
        assert packing.packing_pays(model, batch, short)


@pytest.mark.parametrize("several", [False, True])
def test_a_packed_row_with_one_mask_equals_its_groups(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "packing_pays", lambda *_: True)
    model = on("cuda")
    assert model.packs
    one_mask = gradients(model, several=several)
    monkeypatch.setattr(packing, "ONE_MASK", 0)
    for mine, expected in zip(one_mask, gradients(model, several=several), strict=True):
        close(mine, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "opt"])
def test_passes_replayed_from_cuda_graphs(family: str, dtype: torch.dtype) -> None:
    """Alternating shapes, so that graphs overwrite each other's memory."""
    model = on("cuda", family, dtype)
    encoded = encode_rows(model, task_for(model), TEXTS)
    prompts = [SoftPrompt.random(tiny_model(), 5, seed=seed).embeddings.cuda() for seed in range(6)]
    cases = [(encoded.batch(rows), prompt) for prompt in prompts for rows in ([0, 2, 7], [1, 3, 4, 5], [4, 3])]

    def run(batch: Batch, prompt: Tensor) -> tuple[Tensor, Tensor]:
        leaf = prompt.clone().requires_grad_()
        logits = model.answer_logits(batch, leaf)
        logits.logsumexp(-1).sum().backward()
        assert leaf.grad is not None
        return logits.detach(), leaf.grad

    expected = [run(*case) for case in cases]
    graphs = model.new_graphs()
    assert graphs is not None
    with model.using_graphs(graphs):
        replayed = [run(*case) for case in cases]
    assert graphs.made
    for mine, plain in zip(replayed, expected, strict=True):
        for actual, reference in zip(mine, plain, strict=True):
            close(actual, reference, rtol=1e-4 if dtype == torch.float32 else 0.1)


def test_the_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_steps.SHAPES, "tiny", (64, 128, 10, 4, 2, 512))
    monkeypatch.setattr(gpu_steps, "CASES", ((4, 10, 5),))
    moved, whole, tuned = gpu_steps.measure("tiny", torch.device("cuda"), 2)
    assert whole["seconds"]["replayed"] > 0
    assert set(moved["ways"]) == {"replayed", "launched", "published"}
    assert set(tuned["ways"]) == {"replayed", "launched", "private"}
    assert all(way["ms"] > 0 for part in (moved, tuned) for way in part["ways"].values())


def test_a_pass_that_can_not_be_captured_still_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on("cuda")
    expected, graphs = gradients(model), model.new_graphs()
    plain = packing._run_row

    def synchronising(*args: Any) -> Tensor:
        hidden = plain(*args)
        return hidden + 0.0 * float(hidden.detach().sum())  # waits for the GPU, which a capture forbids

    monkeypatch.setattr(packing, "_run_row", synchronising)
    with caplog.at_level(logging.WARNING, "post.cuda_graphs"), model.using_graphs(graphs):
        for _ in range(3):
            for mine, other in zip(gradients(model), expected, strict=True):
                close(mine, other, rtol=1e-4)
    assert "passes aren't recorded" in caplog.text
    assert torch.randn(4, device="cuda").isfinite().all()  # the random generator isn't left in capture mode


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_bfloat16_is_close_to_float32(family: str) -> None:
    model = on("cuda", family, torch.bfloat16)
    assert gradients(model)[0].dtype == torch.float32
    close(gradients(model)[0], gradients(on("cpu", family))[0], rtol=0.15)


@pytest.mark.parametrize("privacy", [None, PrivacyConfig(epsilon=8, batch_size=16, steps=6, seed=3)])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_tuning(family: str, privacy: PrivacyConfig | None, tmp_path: Path) -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=6, batch_size=8, learning_rate=0.01)
    tiny_model(family).save(tmp_path / "student")
    mine, expected = (
        tune(
            load_student(tmp_path / "student", device), task_for(tiny_model(family)), ROWS * 20, config, privacy=privacy
        )
        for device in ("cuda", "cpu")
    )
    assert (mine.statement is None) == (privacy is None)
    assert mine.prompt.embeddings.device.type == "cpu"
    close(mine.prompt.embeddings, expected.prompt.embeddings, rtol=0.02)  # Adam also steps on tiny gradients


def test_an_interrupted_tuning_is_resumed(tmp_path: Path) -> None:
    config, privacy = (
        TuneOptions(num_virtual_tokens=4, steps=8, batch_size=4),
        PrivacyConfig(epsilon=8, batch_size=4, steps=8, seed=3),
    )
    model = on("cuda")

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        tune(model, task_for(model), ROWS * 20, config, privacy=privacy, on_progress=stop, checkpoint=tmp_path)
    steps: list[int] = []
    resumed = tune(
        model,
        task_for(model),
        ROWS * 20,
        config,
        privacy=privacy,
        on_progress=lambda progress: steps.append(progress.step),
        checkpoint=tmp_path,
    )
    assert steps == [6, 7, 8]
    whole = tune(model, task_for(model), ROWS * 20, config, privacy=privacy)
    close(resumed.prompt.embeddings, whole.prompt.embeddings)


@pytest.mark.parametrize("method", ["ensemble", "paper"])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_transfer(family: str, method: str, tmp_path: Path) -> None:
    config = TransferOptions(steps=6, batch_size=5, method=method, learning_rate=0.003)  # type: ignore[arg-type]
    results = []
    for device in ("cuda", "cpu"):
        target = on(device, family)
        prompt = SoftPrompt.random(tiny_model(family), 4)
        results.append(transfer(target, copy_student(target, [0, 3]), task_for(target), prompt, TEXTS * 10, config))
    mine, expected = results
    assert mine.first_loss == pytest.approx(expected.first_loss, rel=1e-2)
    close(mine.prompt.embeddings, expected.prompt.embeddings, rtol=0.02)
    bf16 = on("cuda", family, torch.bfloat16)
    in_bf16 = transfer(
        bf16, copy_student(bf16, [0, 3]), task_for(bf16), prompt, TEXTS * 10, config, checkpoint=tmp_path
    )
    assert in_bf16.first_loss == pytest.approx(expected.first_loss, rel=0.2)


def test_a_distillation_in_mixed_precision_trains_float32_weights(tmp_path: Path) -> None:
    def losses(target: LanguageModel) -> list[float]:
        seen: list[float] = []

        def note(progress: Progress) -> None:
            if progress.stage == "distil":
                seen.append(progress.metrics["ce"])

        student = distil(target, PARAGRAPHS, DISTIL, on_progress=note)
        assert {weight.dtype for weight in student.model.parameters()} == {torch.float32}
        assert student.device.type == target.device.type
        student.save(tmp_path)
        return seen

    expected, mine = losses(on("cpu")), losses(on("cuda", dtype=torch.bfloat16))
    assert mine[-1] == pytest.approx(expected[-1], rel=0.2)
    assert mine[-1] < 0.9 * mine[0]
    student = LanguageModel.load(tmp_path)
    assert evaluate(student, task_for(student), ROWS).rows == len(ROWS)


def test_a_distillation_with_gradient_accumulation_and_a_teacher_cache(tmp_path: Path) -> None:
    target = on("cuda", dtype=torch.bfloat16)
    config = DISTIL.replace(gradient_accumulation_steps=2, alignment=0.0, templates=("{text}, it was",))
    steps: list[int] = []
    distil(
        target,
        PARAGRAPHS,
        config,
        on_progress=lambda p: steps.append(p.step),
        checkpoint=tmp_path,
        cache_budget=CacheBudget(2**24),
    )
    assert steps[-1] == DISTIL.steps


def test_mixed_prompts_and_generation() -> None:
    results = []
    for device in ("cuda", "cpu"):
        model = on(device)
        task = task_for(model)
        prompts = [
            ServedPrompt.of(model, task, SoftPrompt.random(tiny_model(), n, seed=n).embeddings if n else None)
            for n in (3, 7, 0)
        ]
        scores = [each.scores for each in classify_mixed(model, TEXTS, [prompts[at % 3] for at in range(len(TEXTS))])]
        decoder = Decoder(model)
        rows = [
            DecodingRow(model.tokenizer(text).input_ids, prompts[at % 3].prefix, 6, Sampling())
            for at, text in enumerate(TEXTS)
        ]
        decoder.add(rows)
        while decoder.rows:
            decoder.step()
        results.append((torch.tensor(scores), [[token.id for token in row.made] for row in rows]))
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_model_with_most_layers_in_main_memory_runs_on_the_gpu(family: str, tmp_path: Path) -> None:
    tiny_model(family).save(tmp_path)
    reserved = int(0.6 * tiny_model(family).nbytes)
    spread = LanguageModel.load(tmp_path, device="spread", memory={0: reserved, "cpu": 2**30}, dtype=torch.float32)
    assert {"cpu", 0} <= set(spread.model.hf_device_map.values())
    for mine, expected in zip(gradients(spread), gradients(on("cuda", family)), strict=True):
        close(mine, expected)


def test_a_target_sharded_with_nccl() -> None:
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(names, RANK="0", LOCAL_RANK="0")
    try:
        group = Group.join()
        assert group.device.type == "cuda"
        expected = gradients(on("cuda"))
        for mine, other in zip(gradients(shard(on("cpu"), group)), expected, strict=True):
            close(mine, other)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name in (*names, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)


def test_the_memory_plan_measures_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = on("cuda"), on("cpu")
    assert saved_per_position(model) == pytest.approx(saved_per_position(other), rel=0.5)
    assert held_per_position(model) > 0
    assert plan_step(model, longest=10).free <= torch.cuda.mem_get_info()[0] + 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1000, 10**9))
    with pytest.raises(OutOfMemory, match="cuda"):
        plan_step(on("cuda"), longest=10)


def test_a_long_packed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """More positions than one mask covers, and the same logits."""
    monkeypatch.setattr(language_model, "packing_pays", lambda *_: True)
    model = on("cuda")
    rows = EncodedRows(tuple(EncodedRow([5 + at % 90] * (40 + at % 7), [39], [], None) for at in range(120)))
    prompt = SoftPrompt.random(tiny_model(), 5).embeddings
    logits = model.answer_logits(rows.whole, prompt)
    monkeypatch.setattr(packing, "ONE_MASK", 10**6)
    close(model.answer_logits(rows.whole, prompt), logits, rtol=1e-4)
