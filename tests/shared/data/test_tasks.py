"""Tasks, label words and encoding: valid input is encoded correctly, invalid input is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from post_shared.data.batches import ShuffledBatches
from post_shared.data.tasks import Task, preset_names
from post_shared.errors import InvalidInput, TaskInvalid
from post_shared.model.encoding import encode_rows
from post_shared.model.verbalizer import label_words
from tests.models import TEXTS, tiny_model

WORDS = {"negative": ("bad", "terrible"), "positive": ("good", "great")}
TASK = Task("{text}, it was", WORDS)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_task_whose_spec_round_trips(name: str) -> None:
    task = Task.preset(name)
    assert Task.from_spec(task.spec()) == Task(task.template, task.label_words)
    assert task.description  # a prompt starts from it
    assert "description" not in task.spec().model_dump()


@pytest.mark.parametrize(
    ("template", "words", "reason"),
    [
        ("it was", WORDS, "exactly one {text}"),
        ("{text} {text}", WORDS, "exactly one {text}"),
        ("{text} {mask} {mask}", WORDS, "more than one {mask}"),
        ("{text}", {"only": ("one",)}, "at least two labels"),
        ("{text}", {"a": (), "b": ("x",)}, "at least one label word"),
        ("{text}", {"a": (" ",), "b": ("x",)}, "none may be empty"),
        ("{text}", {"a": ("same",), "b": ("same",)}, "label word of both"),
        ("{text}", {" ": ("x",), "b": ("y",)}, "label is empty"),
    ],
)
def test_bad_tasks_are_refused_with_the_reason(template: str, words: dict[str, tuple[str, ...]], reason: str) -> None:
    with pytest.raises(TaskInvalid, match=reason):
        Task(template, words)


def test_a_task_file_is_read_and_its_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"template": TASK.template, "label_words": {k: list(v) for k, v in WORDS.items()}}))
    assert Task.load(path) == TASK
    for text, reason in [
        ("{", "can't read"),
        ("[]", "JSON object"),
        ('{"template": "x"}', "exactly one"),
        ('{"temp": 1}', "template"),
    ]:
        path.write_text(text)
        with pytest.raises(TaskInvalid, match=f"task.json.*{reason}"):
            Task.load(path)
    with pytest.raises(TaskInvalid, match="no preset"):
        Task.preset("sst3")


def test_a_template_fits_both_kinds_of_model_or_is_refused() -> None:
    assert TASK.template_for("masked") == "{text}, it was {mask}"
    assert Task("{text}, it was {mask}.", WORDS).template_for("causal") == "{text}, it was"
    with pytest.raises(TaskInvalid, match="continues after"):
        Task("It was {mask}: {text}", WORDS).template_for("causal")
    with pytest.raises(TaskInvalid, match="can't generate"):
        Task("{text} The answer is").template_for("masked")


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_label_words_are_the_tokens_after_the_template_and_scores_their_mean(family: str) -> None:
    model = tiny_model(family)
    tokens = label_words(model, TASK)
    logits = torch.randn(3, model.vocabulary)
    ids = {
        word: model.tokenizer(" " + word, add_special_tokens=False).input_ids[0]
        for words in WORDS.values()
        for word in words
    }
    expected = torch.stack([logits[:, [ids[word] for word in words]].mean(1) for words in WORDS.values()], 1)
    torch.testing.assert_close(tokens.of(logits), expected)


def test_label_words_of_several_tokens_and_colliding_ones_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(TaskInvalid, match=r"'cinematography' of label 'a' takes \d+ tokens"):
        label_words(model, Task("{text}", {"a": ("cinematography",), "b": ("good",)}))

    fitting = label_words(model, Task("{text}", {"a": ("cinematography", "great"), "b": ("good", "cinematographer")}))
    plain = label_words(model, Task("{text}", {"a": ("great",), "b": ("good",)}))
    assert torch.equal(fitting.token_ids, plain.token_ids), "unusable words are left out while one remains"
    assert torch.equal(fitting.weights, plain.weights)

    class Lowercasing:  # a tokenizer that lowers case, as BERT's does
        def __getattr__(self, name: str) -> object:
            return getattr(model.tokenizer, name)

        def __call__(self, text: str, **options: object) -> object:
            return model.tokenizer(text.lower(), **options)

    lowercased = type("M", (), {"tokenizer": Lowercasing()})()
    with pytest.raises(TaskInvalid, match="same token"):
        label_words(lowercased, Task("{text}", {"a": ("Good",), "b": ("good",)}))


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_long_text_is_truncated_and_the_template_never(family: str) -> None:
    model = tiny_model(family)
    long = "a great film with a boring plot " * 50
    encoded = encode_rows(model, TASK, [long, "nice"], max_length=24)
    assert [len(row.token_ids) <= 24 for row in encoded.rows] == [True, True]
    assert len(encoded.rows[0].token_ids) >= 20
    decoded = model.tokenizer.decode(encoded.rows[0].token_ids)
    assert ", it was" in decoded
    if family == "roberta":
        assert all(row.token_ids[row.positions[0]] == model.tokenizer.mask_token_id for row in encoded.rows)
    else:
        assert decoded.endswith(", it was")


def test_a_mask_token_in_the_text_is_not_a_second_answer() -> None:
    model = tiny_model("roberta")
    row = encode_rows(model, TASK, ["a <mask> film"]).rows[0]
    assert row.token_ids.count(model.tokenizer.mask_token_id) == 1


def test_templates_and_texts_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(TaskInvalid, match="template alone takes"):
        encode_rows(model, Task("{text} " + "very " * 40, WORDS), ["x"], max_length=16)
    with pytest.raises(InvalidInput, match="don't fit the model's 256 positions"):
        encode_rows(model, TASK, ["x"], max_length=250, reserved=20)
    with pytest.raises(TaskInvalid, match="'meh' is unknown to the task"):
        encode_rows(model, TASK, ["x"], labels=["meh"])


def test_generation_rows_predict_each_answer_token_in_its_place() -> None:
    model = tiny_model()
    row = encode_rows(model, Task("{text} The story is"), ["a film"], labels=["good"]).rows[0]
    answer = [*model.tokenizer(" good").input_ids, model.tokenizer.eos_token_id]
    assert row.tokens == answer
    assert [*row.token_ids[1:], model.tokenizer.eos_token_id][row.positions[0] :] == answer


def test_a_long_text_leaves_space_for_the_answer_which_is_never_truncated() -> None:
    model = tiny_model()
    task, long = Task("{text} The story is"), "a great film with a boring plot " * 50
    row = encode_rows(model, task, [long], max_length=32, labels=["good and nice"]).rows[0]
    assert len(row.token_ids) <= 32
    decoded = model.tokenizer.decode(row.token_ids)
    assert decoded.startswith("a great film")
    assert decoded.endswith(" The story is good and nice")
    with pytest.raises(TaskInvalid, match="template alone"):
        encode_rows(model, task, ["x"], max_length=32, labels=["good " * 40])


def test_shuffled_batches_are_a_function_of_seed_and_step_and_cover_each_epoch() -> None:
    encoded = encode_rows(tiny_model(), TASK, TEXTS)
    one, two = ShuffledBatches(encoded, 3, seed=5), ShuffledBatches(encoded, 3, seed=5)
    ahead = two(7)
    assert [one(step).index for step in range(8)][7] == ahead.index
    epoch = [row for step in range(2) for row in one(step).index]
    assert len(set(epoch)) == 6
    assert (
        ShuffledBatches(encoded, 3, seed=6)(0).index != one(0).index
        or ShuffledBatches(encoded, 3, 6)(1).index != one(1).index
    )


def test_splitting_a_batch_keeps_its_rows() -> None:
    batch = encode_rows(tiny_model(), TASK, TEXTS).batch([0, 3, 5, 1, 4])
    parts = batch.split(2)
    assert sorted(row for part in parts for row in part.index) == [0, 1, 3, 4, 5]
    assert [len(part) for part in parts] == [2, 2, 1]
