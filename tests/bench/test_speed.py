"""``post bench speed``: both sides of each comparison compute the same, and the results have every figure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from post_bench.speed import cli, curves, machine, results
from post_bench.speed.arithmetic import Arithmetic, distillation_step, prompt_step
from post_bench.speed.bench import Bench, Race
from post_bench.speed.journey import journey
from post_bench.speed.machine import Peak, matrix_rate
from post_bench.speed.memory import transfer_memory
from post_bench.speed.parts import PARTS, TEACHING, Requests
from post_bench.speed.references import PeftPrompts, PeftTrainer, PublishedTransfer
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.method.transfer.teacher_outputs import teacher_outputs
from post_shared.method.transfer.transfer import paper_objective
from post_shared.model.layers import copy_student
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PLAIN
from tests.client.terminal import Captured, post
from tests.models import LABELS, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("terrible", "bad"), "positive": ("great", "good")})
FIGURES = {
    "transfer_vs_published",
    "share_of_limit.transfer",
    "share_of_limit.distil",
    "dp_vs_plain",
    "tune_vs_peft",
    "predict_vs_peft",
    "generate_vs_peft",
    "journey_vs_target",
    "transfer_memory_ratio",
}


@pytest.fixture
def bench() -> Bench:
    target = tiny_model(layers=4)
    rows = [Row(f"{text} {copy}", label) for copy in range(5) for text, label in zip(TEXTS, LABELS, strict=True)]
    student = copy_student(target, [0, 3])
    return Bench(target, student, TASK, rows, [row.text for row in rows], [" ".join(TEXTS)] * 150, length=5)


def test_the_published_loop_and_ours_take_the_same_step(bench: Bench) -> None:
    prompt, batch = bench.prompt(bench.target), bench.batches(bench.public_rows, 8)(0)
    outputs = teacher_outputs(bench.target, bench.student, SoftPrompt(prompt), bench.public_rows)
    ours = nn.Parameter(prompt.clone())
    optimizer = torch.optim.Adam([ours], lr=1e-3)
    paper_objective(bench.target, outputs, 0.7, 2.0)(ours, batch).mean().backward()
    optimizer.step()
    published = PublishedTransfer(bench.target, bench.student, prompt, alpha=0.7, temperature=2.0)
    published.step(batch)
    torch.testing.assert_close(published.prompt, ours, rtol=0, atol=2e-5)
    assert float((ours.detach() - prompt).abs().max()) > 5e-4


def test_peft_and_ours_compute_the_same_logits_for_the_same_prompt(bench: Bench) -> None:
    requests = Requests.draw(bench, count=3, length=4, tokens=6)
    peft = PeftPrompts(bench.target, requests.prompts)
    for index, ids in enumerate(requests.token_ids):
        hidden = bench.target.hidden(torch.tensor([ids]), prompt=requests.prompts[index])
        torch.testing.assert_close(peft.logits(index, ids), bench.target.head(hidden)[0, -1], rtol=1e-4, atol=1e-4)
        assert len(peft.generate(index, ids, 3)) == 3


def test_the_trainer_updates_its_own_prompt_and_no_weight(bench: Bench) -> None:
    before = {name: weight.clone() for name, weight in bench.student.model.named_parameters()}
    trainer = PeftTrainer(bench.student, TASK, length=5)
    start = trainer.peft.prompt_encoder["default"].embedding.weight.detach().clone()
    assert trainer.seconds(bench.batches(bench.private_rows, 8)(0)) > 0
    assert not torch.equal(start, trainer.peft.prompt_encoder["default"].embedding.weight)
    after = dict(bench.student.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_operations_equal_a_count_by_hand() -> None:
    model = tiny_model(layers=2)
    config = model.config
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    weights = width * width * 2 + 2 * width * heads * (width // config.num_attention_heads) + 3 * width * inner
    arithmetic = Arithmetic.of(model)
    assert (arithmetic.layers, arithmetic.head) == (2 * 2 * weights, 2 * config.vocab_size * width)
    assert prompt_step(model, 30, 2, 5) == 2 * (35 * arithmetic.layers + 2 * arithmetic.head)
    assert distillation_step(model, model, 30, 4) == 4 * 30 * arithmetic.layers + 3 * 4 * arithmetic.head


def test_the_first_round_is_a_warm_up_and_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = iter([9.0, 1.0, 2.0, 4.0]), iter([1.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(machine, "PROBE", 0.01)
    part = Race({"post": lambda _: next(ours), "other": lambda _: next(theirs)}, int, float, int).run(
        3, torch.device("cpu")
    )
    assert part.ways["post"].seconds == 2.0
    assert part.ratios == {"other": 2.0}  # the median of 3, 2 and 2, which is not the ratio of the means


def test_the_machine_is_measured() -> None:
    assert matrix_rate(seconds=0.01) > 1e6
    with Peak() as peak:
        block = torch.ones(32 * 2**20)  # too large to reuse freed memory
    assert peak.bytes > 0.9 * block.nbytes


def test_the_journey_is_timed_in_the_dtype_of_a_worker(bench: Bench) -> None:
    teacher = tiny_model(layers=4)
    teacher.model.to(torch.bfloat16)
    names, device = ("transfer", "transfer_constants", "tune_whole", "tune_target"), torch.device("cpu")
    parts = {name: PARTS[name](replace(bench, teacher=teacher)).run(1, device) for name in names}
    assert TEACHING in parts["transfer"].ways
    legs = journey(parts)
    assert legs["transfer"] == TransferOptions().steps * parts["transfer"].ways[TEACHING].seconds
    assert legs["tune"] == PLAIN.steps * parts["tune_whole"].ways["post"].seconds
    assert TEACHING not in PARTS["transfer"](bench).ways


@pytest.mark.slow
def test_every_figure_is_written_and_compared(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(cli, "_bench", lambda *_: bench)
    monkeypatch.setattr(machine, "PROBE", 0.01)
    monkeypatch.setattr(curves, "CURVES", {"batch": replace(curves.CURVES["batch"], values=(2, 4))})
    path = tmp_path / "speed.json"
    assert post("bench", "speed", "--json", path, "--rounds", 1, "--curves") == 0
    document = json.loads(path.read_text())
    figures = results.flat(document)
    assert set(figures) == FIGURES | {f"{name}.seconds" for name in PARTS}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert [point["value"] for point in document["curves"]["batch"]] == [2, 4]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "journey_vs_target" in path.with_suffix(".md").read_text()
    capsys.readouterr()
    other = tmp_path / "other.json"
    assert post("bench", "speed", "--json", other, "--rounds", 1, "--part", "tune", "--compare", path) == 0
    shown = capsys.readouterr().out
    assert "now / before" in shown
    assert "| dp_vs_plain |" in shown
    assert json.loads(other.read_text())["journey_vs_target"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": []}'])
def test_a_file_that_is_not_a_result_is_refused(text: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "old.json").write_text(text)
    line = ("bench", "speed", "--json", tmp_path / "new.json", "--compare", tmp_path / "old.json")
    assert post(*line) != 0
    assert "old.json" in capsys.readouterr().err
    assert post("bench", "speed", "--json", tmp_path / "new.json", "--part", "flight") == 2
    assert "flight" in capsys.readouterr().err


def test_the_memory_of_a_transfer_is_measured_in_its_own_process(bench: Bench, tmp_path: Path) -> None:
    memory = transfer_memory(tmp_path, bench.target, bench.student, TASK, bench.public, bench.prompt(bench.student))
    assert memory["target_bytes"] == sum(weight.nbytes for weight in bench.target.model.parameters())
    assert memory["ratio"] == memory["peak_bytes"] / memory["target_bytes"]
