"""Laws of distillation: initialisation, losses, trained weights, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    MixtralConfig,
    PreTrainedConfig,
    SmolLM3Config,
)

from post_shared.data.batches import IGNORE_INDEX
from post_shared.errors import Cancelled, DataInvalid, InvalidInput
from post_shared.method.distillation.corpus import (
    Corpus,
    _permutation,
    in_templates,
    masked_tokens,
    next_token,
    prepare_corpus,
)
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.distillation.student_init import TargetStates, ending_norm, least_squares
from post_shared.method.distillation.trainer import EarlyStopping, Student, Training
from post_shared.method.losses import language_model_loss
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import check_loads, copy_student, layers_of
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.progress import Progress
from tests.distillation import distillation_losses
from tests.models import CAUSAL, MASKED, TEXTS, tiny_model, tokenizer

PARAGRAPHS = [" ".join(TEXTS)] * 40


def test_layers_are_chosen_by_pattern_or_as_listed() -> None:
    assert chosen_layers(8, 30) == [0, 1, 3, 6, 10, 15, 21, 29]
    assert chosen_layers(3, 12, "ends") == [0, 1, 11]
    assert chosen_layers([0, 5, 11], 12) == [0, 5, 11]
    for bad in (0, 13, [], [1, 1], [3, 2], [-1, 2], [0, 12]):
        with pytest.raises(InvalidInput):
            chosen_layers(bad, 12)


@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_keeping_every_layer_is_the_target_itself(family: str) -> None:
    target = tiny_model(family)
    student = copy_student(target, range(4))
    ids = torch.randint(5, 100, (2, 9))
    torch.testing.assert_close(student.hidden(ids), target.hidden(ids))
    assert target.layers == 4


@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_a_student_is_a_plain_model_of_the_same_architecture(family: str, tmp_path: Path) -> None:
    target = tiny_model(family)
    student = copy_student(target, [0, 3])
    student.save(tmp_path)
    again = LanguageModel.load(tmp_path, device="cpu")
    assert (again.layers, again.architecture, again.hidden_size) == (2, target.architecture, target.hidden_size)
    ids = torch.randint(5, 100, (2, 9))
    torch.testing.assert_close(again.hidden(ids), student.hidden(ids))
    if family in CAUSAL:  # with a key/value cache too: the layers have their new indices
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert plain.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 9


def wrapped(config: PreTrainedConfig) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer(masked=False))


SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "setting", "expected"),
    [
        (
            SmolLM3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=6, no_rope_layers=[1, 0, 1, 1, 0, 1]),
            "no_rope_layers",
            [1, 1, 0],
        ),
        (
            GPTNeoConfig(
                vocab_size=400,
                hidden_size=32,
                num_layers=6,
                num_heads=4,
                window_size=4,
                attention_types=[[["global", "local"], 3]],
            ),
            "attention_layers",
            ["global", "global", "global"],
        ),
    ],
    ids=["smollm3", "gpt_neo"],
)
def test_per_layer_settings_are_copied_with_the_layers(
    config: PreTrainedConfig, setting: str, expected: list[object], tmp_path: Path
) -> None:
    """Some layers have no positions, or attend to a window only: lists in the configuration, one entry per layer."""
    student = copy_student(wrapped(config), [0, 2, 4])
    assert list(getattr(student.config, setting)) == expected
    check_loads(student)
    student.save(tmp_path)
    ids = torch.randint(5, 100, (2, 9))
    torch.testing.assert_close(LanguageModel.load(tmp_path, device="cpu").hidden(ids), student.hidden(ids))


def test_a_student_that_would_not_load_unchanged_is_refused() -> None:
    settings = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 400, "scale_attn_by_inverse_layer_idx": True}
    config = DistilOptions(keep_layers=(0, 3), student_init="copy", steps=1, sequence_length=16, batch_tokens=64)
    target = wrapped(GPT2Config(**settings, initializer_range=0.5))
    with pytest.raises(InvalidInput, match="depend on its place"):
        distil(target, PARAGRAPHS, config)


def test_a_mixture_of_experts_is_supported() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=3, num_local_experts=4)
    target, ids = wrapped(config), torch.randint(5, 100, (2, 9))
    torch.testing.assert_close(target.head(target.hidden(ids)), target.model(ids).logits.float())
    short = DistilOptions(keep_layers=(0, 2), student_init="copy", steps=1, sequence_length=16, batch_tokens=64)
    assert distil(target, PARAGRAPHS, short).layers == 2


def test_sequences_longer_than_the_model_has_positions_are_refused() -> None:
    target = tiny_model("gpt2")
    long = target.max_length + 1
    with pytest.raises(InvalidInput, match=f"{long} tokens don't fit the model's {target.max_length} positions"):
        distil(target, PARAGRAPHS, DistilOptions(keep_layers=2, steps=1, sequence_length=long, batch_tokens=long))


@pytest.mark.parametrize(
    "change",
    [{"max_minutes": -1.0}, {"max_minutes": math.nan}, {"steps": 0}, {"temperature": 0.0}, {"learning_rate": math.inf}],
)
def test_invalid_lengths_and_rates_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=r"greater than|finite"):
        DistilOptions(**{"steps": 2, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", *MASKED])
def test_least_squares_is_closer_to_the_target_than_the_copy(family: str) -> None:
    target = tiny_model(family, layers=6)
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None)
    block = corpus.batch(0, 16, 0)
    kept = [0, 1, 5]
    copied, fitted = copy_student(target, kept), copy_student(target, kept)
    least_squares(fitted, kept, TargetStates(target, [block]))

    def gap(student: LanguageModel) -> float:
        return float((student.hidden(block) - target.hidden(block)).norm())

    assert gap(fitted) < gap(copied)
    with pytest.raises(InvalidInput, match="keep the last layer"):
        least_squares(copy_student(target, [0, 1]), [0, 1], TargetStates(target, [block]))


def test_least_squares_is_exact_if_the_removed_layer_has_no_effect() -> None:
    """T is the identity, up to the ridge."""
    target = tiny_model("llama", layers=3)
    for weight in target.model.model.layers[1].parameters():
        weight.data.zero_()
    student = copy_student(target, [0, 2])
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 16, 0)
    least_squares(student, [0, 2], TargetStates(target, [block]))
    torch.testing.assert_close(student.hidden(block), target.hidden(block), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", MASKED)
def test_least_squares_replaces_the_norm_that_ends_a_layer(family: str) -> None:
    """The removed layer adds nothing; it only normalises again, with its own gain and offset."""
    target = tiny_model(family, layers=3)
    layer = getattr(*layers_of(target))[1]
    for name, weight in layer.named_parameters():
        if weight.dim() == 2 or name.endswith("bias"):
            weight.data.zero_()
    norm = layer.get_submodule(ending_norm(target, layer, torch.tensor([[5, 6, 7]])))
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.normal_()
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 16, 0)
    copied, fitted = copy_student(target, [0, 2]), copy_student(target, [0, 2])
    least_squares(fitted, [0, 2], TargetStates(target, [block]))
    gaps = [float((student.hidden(block) - target.hidden(block)).norm()) for student in (copied, fitted)]
    assert gaps[1] < 0.2 * gaps[0]
    check_loads(fitted)


def test_a_model_with_other_layers_cannot_be_fitted() -> None:
    target = tiny_model("gemma2")
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 4, 0)
    with pytest.raises(InvalidInput, match="student_init='copy'"):
        least_squares(copy_student(target, [0, 3]), [0, 3], TargetStates(target, [block]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_finite_for_a_16_bit_target_without_autocast(dtype: torch.dtype) -> None:
    target = tiny_model()
    student = copy_student(target, [0, 3])
    target.model.to(dtype)
    block = prepare_corpus(target, PARAGRAPHS, 32, None).batch(0, 8, 0)
    losses = distillation_losses(target, student, next_token(block, 0.5, torch.Generator().manual_seed(0)))
    assert all(torch.isfinite(each) for each in losses.values())


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_losses_are_zero_for_the_target_itself_and_fall_in_training(family: str) -> None:
    target = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    corpus = prepare_corpus(target, PARAGRAPHS, 32, None)
    block = corpus.batch(0, 8, 0)
    if family == "llama":
        targets = next_token(block, 0.5, generator)
    else:
        targets = masked_tokens(block, target.tokenizer.mask_token_id, target.vocabulary, corpus.counts, generator)
    same = distillation_losses(target, target, targets)
    assert float(same["ce"]) < 1e-4
    assert float(same["cos"]) < 1e-5
    seen: list[Progress] = []
    config = DistilOptions(
        keep_layers=2, student_init="copy", steps=60, batch_tokens=256, sequence_length=32, learning_rate=3e-3
    )
    distil(target, PARAGRAPHS, config, on_progress=seen.append)
    losses = [p.metrics["cos"] for p in seen if p.stage == "distil"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_frozen_head_and_embeddings_do_not_change_and_the_layers_do() -> None:
    target = tiny_model("gpt_neox")  # head and embeddings aren't tied
    for head, embeddings in [(True, True), (True, False), (False, True)]:
        config = DistilOptions(
            keep_layers=2,
            student_init="copy",
            steps=2,
            batch_tokens=64,
            sequence_length=32,
            freeze_head=head,
            freeze_embeddings=embeddings,
        )
        student = distil(target, PARAGRAPHS, config)
        equal = torch.equal(student.model.get_output_embeddings().weight, target.model.get_output_embeddings().weight)
        assert equal == head
        equal = torch.equal(student.model.get_input_embeddings().weight, target.model.get_input_embeddings().weight)
        assert equal == embeddings
        equal = torch.equal(
            student.body.layers[0].mlp.dense_4h_to_h.weight, target.body.layers[0].mlp.dense_4h_to_h.weight
        )
        assert not equal


def test_cancelled_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    target = tiny_model("llama")
    config = DistilOptions(keep_layers=2, steps=8, batch_tokens=64, sequence_length=32)

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        distil(target, PARAGRAPHS, config, on_progress=stop, checkpoint=tmp_path)
    steps: list[int] = []
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert len(file.get_tensor("losses")) == 3  # of the steps so far, for early stopping
    resumed = distil(
        target,
        PARAGRAPHS,
        config,
        on_progress=lambda p: steps.append(p.step) if p.stage == "distil" else None,
        checkpoint=tmp_path,
    )
    assert steps[0] == 4
    undisturbed = distil(target, PARAGRAPHS, config)
    for actual, expected in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert not any(weight.requires_grad for weight in resumed.model.parameters())


def test_a_bfloat16_target_gives_nearly_the_same_losses_and_resumes_exactly(tmp_path: Path) -> None:
    """As on a CPU with bfloat16 matrix units: the pass is in bfloat16, the student's weights are float32."""
    target, exact = tiny_model("llama"), tiny_model("llama")
    target.model.to(torch.bfloat16)
    config = DistilOptions(keep_layers=2, steps=8, batch_tokens=64, sequence_length=32)
    losses: dict[str, list[float]] = {}

    def record(name: str) -> Callable[[Progress], None]:
        return lambda p: losses.setdefault(name, []).append(p.metrics["loss"]) if p.stage == "distil" else None

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        distil(target, PARAGRAPHS, config, on_progress=stop, checkpoint=tmp_path)
    resumed = distil(target, PARAGRAPHS, config, checkpoint=tmp_path)
    undisturbed = distil(target, PARAGRAPHS, config, on_progress=record("bfloat16"))
    distil(exact, PARAGRAPHS, config, on_progress=record("float32"))
    assert undisturbed.dtype == torch.float32
    for actual, expected in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert losses["bfloat16"] != losses["float32"]  # otherwise the pass wasn't in bfloat16
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_a_checkpoint_of_another_target_is_not_resumed(tmp_path: Path) -> None:
    config = DistilOptions(keep_layers=2, steps=4, batch_tokens=64, sequence_length=32)

    def stop(progress: Progress) -> None:
        if progress.stage == "distil" and progress.step == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        distil(tiny_model(seed=1), PARAGRAPHS, config, on_progress=stop, checkpoint=tmp_path)
    steps: list[int] = []
    record = lambda p: steps.append(p.step) if p.stage == "distil" else None  # noqa: E731
    distil(tiny_model(seed=2), PARAGRAPHS, config, on_progress=record, checkpoint=tmp_path)
    assert steps[0] == 1


def test_an_epoch_is_shuffled_once() -> None:
    """Shuffling a corpus of 2 GiB takes seconds, too much for each step."""
    _permutation.cache_clear()
    corpus = Corpus(np.arange(40, dtype=np.int32).reshape(20, 2), np.zeros(1, dtype=np.int64))
    seen = [tuple(row) for step in range(10) for row in corpus.batch(step, 2, seed=0).tolist()]
    assert sorted(seen) == [(first, first + 1) for first in range(0, 40, 2)]
    assert corpus.batch(10, 2, seed=0).tolist() != corpus.batch(0, 2, seed=0).tolist()
    assert _permutation.cache_info().misses == 2


def test_a_time_limit_ends_training_and_early_stopping_too() -> None:
    seen: list[Progress] = []
    config = DistilOptions(keep_layers=2, student_init="copy", max_minutes=0.01, batch_tokens=64, sequence_length=32)
    distil(tiny_model(), PARAGRAPHS, config, on_progress=seen.append)
    assert seen[-1].step >= 1
    early_stopping = EarlyStopping(window=3)
    for loss in (3, 2, 1, 1, 1, 1):
        early_stopping.add(loss)
    assert not early_stopping.reached()  # fell from 6 to 3
    resumed, student = (
        EarlyStopping(window=3),
        Student(tiny_model(), learning_rate=1.0, freeze_head=True, freeze_embeddings=True),
    )
    Training(student, resumed).load_state(Training(student, early_stopping).state())
    for one in (early_stopping, resumed):
        for loss in (1, 1, 1):
            one.add(loss)
        assert one.reached()


def test_the_corpus_is_packed_without_padding_and_read_back(tmp_path: Path) -> None:
    target = tiny_model("roberta")
    corpus = prepare_corpus(target, PARAGRAPHS, 16, tmp_path)
    assert (corpus.blocks[:, 0] == 1).all()  # <s>
    assert (corpus.blocks[:, -1] == 2).all()  # </s>
    assert not (corpus.blocks == 0).any()
    assert np.array_equal(prepare_corpus(target, PARAGRAPHS, 16, tmp_path).blocks, corpus.blocks)
    assert corpus.counts.sum() == corpus.blocks.size
    with pytest.raises(DataInvalid, match="fewer than one block"):
        prepare_corpus(target, ["nice"], 64, None)


def test_templates_hold_short_paragraphs_and_their_answers_are_always_targets_and_open() -> None:
    target = tiny_model()
    long = "a film " * 100
    assert in_templates(["nice", long], ["{text}, it was"], 0) == ["nice, it was", long]
    assert len(set(in_templates(["nice"] * 20, ["{text} A", "{text} B"], 0))) == 2
    corpus = prepare_corpus(target, TEXTS * 20, 32, None, templates=["{text}, it was"])
    block, end = corpus.batch(0, 8, 0), target.tokenizer.eos_token_id
    targets = next_token(block, 0.1, torch.Generator().manual_seed(0), answer_end=end)
    predicted = set(zip(targets.rows.tolist(), targets.positions.tolist(), strict=True))
    answers = {(row, position - 1) for row, position in (block == end).nonzero().tolist() if position}
    assert answers <= predicted
    assert len(predicted) > len(answers)
    last = target.tokenizer(" was").input_ids[-1]
    assert {int(block[row, position]) for row, position in answers} == {last}
    is_open = targets.tokens == IGNORE_INDEX
    assert int(is_open.sum()) == len(answers)
    losses = language_model_loss(torch.randn(len(targets.tokens), 400), targets.tokens)
    assert torch.equal(losses == 0, is_open)
    config = DistilOptions(keep_layers=2, steps=2, batch_tokens=64, sequence_length=32, templates=("{text}, it was",))
    assert distil(target, TEXTS * 20, config).layers == 2
    with pytest.raises(InvalidInput, match="causal models"):
        distil(tiny_model("roberta"), TEXTS * 20, config.replace(student_init="copy"))
    with pytest.raises(InvalidInput, match=r"templates.*\{text"):
        config.replace(templates=("it was",))


def test_masking_covers_15_percent_in_shares_of_80_10_10_and_prefers_rare_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.where(torch.rand(200, 100, generator=generator) < 0.1, 7, 9)  # 7 is rare, 9 common
    counts = np.bincount(block.flatten().numpy(), minlength=400)
    targets = masked_tokens(block, 4, 400, counts, generator)
    assert len(targets.tokens) == round(0.15 * block.numel())
    assert torch.equal(block[targets.rows, targets.positions], targets.tokens)
    inputs = targets.inputs[targets.rows, targets.positions]
    assert abs(float((inputs == 4).float().mean()) - 0.8) < 0.03
    assert abs(float((inputs == targets.tokens).float().mean()) - 0.1) < 0.03
    assert float((targets.tokens == 7).float().mean()) > 0.2  # more than twice its share of the text


@pytest.mark.parametrize(
    "change", [{"student_init": "magic"}, {"steps": None}, {"batch_tokens": 16, "sequence_length": 32}]
)
def test_an_invalid_config_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        DistilOptions(**{"steps": 1, **change})  # type: ignore[arg-type]


def test_a_target_offloaded_to_disk_gives_the_same_student(tmp_path: Path) -> None:
    tiny_model("qwen2", layers=6).save(tmp_path)
    config = DistilOptions(keep_layers=3, steps=2, batch_tokens=128, sequence_length=32, alignment=0.5)
    targets = [LanguageModel.load(tmp_path, device="cpu")]
    targets.append(LanguageModel.load(tmp_path, device="spread", memory={"cpu": 0}))
    expected_student, offloaded_student = (distil(target, PARAGRAPHS, config).model for target in targets)
    for actual, expected in zip(offloaded_student.parameters(), expected_student.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
