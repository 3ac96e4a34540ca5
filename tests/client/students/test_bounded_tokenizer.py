"""A provider's tokenizer can neither end a run nor stall it for the sake of one row."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from post_client.privacy import PrivacyConfig
from post_client.students import bounded_tokenizer
from post_client.students.bounded_tokenizer import encode_private, is_plain
from post_client.tuning.tune import tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import ModelUnsafe
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad",), "positive": ("good",)})
ROWS = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
OPTIONS = TuneOptions(num_virtual_tokens=4, steps=2, batch_size=8, max_length=64)
VICTIM = "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqz"
RUNAWAY = {"type": "Replace", "pattern": {"Regex": "(q+)+(q+)+y"}, "content": ""}
SWAP = {"pattern": {"String": "l"}, "content": "x"}
GROWING = [{"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 40} for _ in range(6)]


def with_parts(model: LanguageModel, /, **parts: Any) -> LanguageModel:
    """The model with other parts in its ``tokenizer.json``."""
    core = json.loads(model.tokenizer.backend_tokenizer.to_str()) | parts
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(core))
        return LanguageModel(model.model, type(model.tokenizer).from_pretrained(folder))


def sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_the_tokenizers_of_common_families_are_plain(family: str) -> None:
    assert is_plain(json.loads(tiny_model(family, layers=1).tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": RUNAWAY},
        {"normalizer": sequence({"type": "NFC"}, sequence(RUNAWAY))},
        {"normalizer": GROWING[0]},
        {"normalizer": {"type": "Prepend", "prepend": "q" * 1000}},
        {"normalizer": {"type": "Novel"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": sequence(*[{"type": "ByteLevel"}] * 30)},
        {
            "normalizer": sequence(
                *[{"type": "NFKD"}, {"type": "Replace", "pattern": {"String": "l"}, "content": "x"}] * 14
            )
        },
        {"model": {"type": "BPE", "unk_token": "u" * 1000}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(q+)+y"}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**6}},
    ],
)
def test_parts_that_may_run_away_are_not(part: dict[str, Any]) -> None:
    core = json.loads(tiny_model(layers=1).tokenizer.backend_tokenizer.to_str())
    assert is_plain(core)
    assert not is_plain(core | part)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_in_a_process_of_its_own_rows_get_the_same_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = (
        tiny_model(kind, layers=1),
        TASK if kind == "llama" else Task("{text}, it was {mask}", TASK.label_words),
    )
    rows = [*ROWS, Row("the plot " * 100, "positive"), Row("\u2028 odd\n\ttext \x00", "negative")]
    expected = encode_private(model, task, rows, OPTIONS)
    monkeypatch.setattr(bounded_tokenizer, "is_plain", lambda _: False)
    assert encode_private(model, task, rows, OPTIONS) == expected
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    assert expected == encode_rows(model, task, texts, 64, labels=labels, reserved=4)


@pytest.mark.parametrize(
    ("normalizer", "seconds"),
    [(RUNAWAY, 5.0), (sequence(*GROWING), 5.0), (RUNAWAY, 0.05)],
    ids=["panic", "memory", "slow"],
)
def test_a_row_that_can_not_be_encoded_counts_as_empty(
    normalizer: dict[str, Any], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_parts(tiny_model("llama", layers=1), normalizer=normalizer)
    rows = [*ROWS[:3], Row(VICTIM * 8, "positive"), *ROWS[3:]]
    if seconds < 1:  # only the victim is slow
        slow = bounded_tokenizer._Process.encode

        def encode(self: Any, text: str, label: str | None) -> Any:
            monkeypatch.setattr(bounded_tokenizer, "ROW_SECONDS", 1e-9 if VICTIM in text else 60.0)
            return slow(self, text, label)

        monkeypatch.setattr(bounded_tokenizer._Process, "encode", encode)
    else:
        monkeypatch.setattr(bounded_tokenizer, "ROW_SECONDS", 60.0)
    encoded = encode_private(model, TASK, rows, OPTIONS)
    empty = encode_private(tiny_model("llama", layers=1), TASK, [Row("", "positive")], OPTIONS).rows[0]
    others = encode_private(tiny_model("llama", layers=1), TASK, ROWS, OPTIONS).rows
    assert encoded.rows[3] == empty
    assert encoded.rows[:3] + encoded.rows[4:] == others


def test_one_row_does_not_decide_whether_a_prompt_comes_out() -> None:
    model = with_parts(tiny_model("llama", layers=1), normalizer=RUNAWAY)
    with pytest.raises(BaseException, match="retry-limit"):
        model.tokenizer(VICTIM * 8)
    rows = [*ROWS, Row(VICTIM * 8, "positive")]
    assert tune(model, TASK, rows, OPTIONS, privacy=PrivacyConfig(epsilon=8)).prompt.length == 4


def test_a_tokenizer_that_can_not_encode_the_template_is_refused_whatever_the_rows() -> None:
    model = with_parts(tiny_model("llama", layers=1), normalizer=RUNAWAY)
    task = Task(f"{{text}}, {VICTIM * 2} was", TASK.label_words)
    with pytest.raises(ModelUnsafe, match="template"):
        encode_private(model, task, ROWS, OPTIONS)


def without_unknown(core: dict[str, Any]) -> dict[str, Any]:
    """Only ASCII is in the vocabulary, and the token for all else doesn't exist."""
    pieces = [*(piece for piece in core["model"]["vocab"] if piece.isascii()), "bad", "good"]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    return core["model"] | {"vocab": vocabulary, "merges": [], "ignore_merges": True, "unk_token": "<gone>"}


@pytest.mark.parametrize("kind", ["unknown token", "no token", "no token, odd tokenizer", "mask in a token"])
def test_a_row_that_breaks_a_plain_tokenizer_counts_as_empty_too(kind: str) -> None:
    model, task, victim = tiny_model("llama", layers=1), TASK, Row("Zoran", "positive")
    core = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if kind == "unknown token":
        model = with_parts(
            model, model=without_unknown(core), pre_tokenizer={"type": "WhitespaceSplit"}, normalizer=None
        )
        victim = Row("\u0417\u043e\u0440\u0430\u043d", "positive")
    elif kind.startswith("no token"):
        pattern = {"Regex": "^Zoran, it was$"} if "odd" in kind else {"String": "Zoran, it was"}
        model = with_parts(model, normalizer={"type": "Replace", "pattern": pattern, "content": ""})
    else:
        model, task = tiny_model("bert", layers=1), Task("{text}, it was {mask}", TASK.label_words)
        token = AddedToken(f"Zoran, it was {model.tokenizer.mask_token}", special=True, normalized=False)
        model.tokenizer.add_tokens([token], special_tokens=True)
        model.model.resize_token_embeddings(len(model.tokenizer))
        model = LanguageModel(model.model, model.tokenizer)
    rows = [*ROWS, victim]
    encoded, empty = (
        encode_private(model, task, rows, OPTIONS),
        encode_private(model, task, [Row("", "positive")], OPTIONS),
    )
    assert encoded.rows[-1] == empty.rows[0]
    assert encoded.rows[:-1] == encode_private(model, task, ROWS, OPTIONS).rows
    assert tune(model, task, rows, OPTIONS, privacy=PrivacyConfig(epsilon=8)).prompt.length == 4


def test_an_answer_that_leaves_no_space_makes_an_empty_row_and_ends_no_run() -> None:
    model, task = tiny_model("llama", layers=1), Task("{text} Answer:")
    rows = [Row("a film", "good"), Row("a plot", " ".join(["good"] * 90))]
    encoded = encode_private(model, task, rows, OPTIONS)
    assert encoded.rows[0] == encode_private(model, task, rows[:1], OPTIONS).rows[0]
    assert encoded.rows[1] == encode_private(model, task, [Row("", ".")], OPTIONS).rows[0]
