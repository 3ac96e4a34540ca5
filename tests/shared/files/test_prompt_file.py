"""A prompt file has one form, contains only the documented data, and is checked before it becomes a tensor."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save

from post_shared.errors import PromptFileInvalid
from post_shared.files.prompt_file import MAX_HEADER, PromptFile, read_prompt, write_prompt
from post_shared.schemas.tasks import TaskSpec

SPEC = TaskSpec(template="{text}, it was", label_words={"positive": ["good", "great"], "negative": ["bad"]})
HASH = "0123456789abcdef" * 4
GOOD = PromptFile(np.arange(12, dtype=np.float32).reshape(3, 4), HASH, SPEC, epsilon=8.0, delta=1e-5)
DATA = write_prompt(GOOD)


def same(a: PromptFile, b: PromptFile) -> bool:
    facts = [(p.model_hash, p.task, p.epsilon, p.delta, p.embeddings.shape, p.embeddings.tobytes()) for p in (a, b)]
    return facts[0] == facts[1]


def header_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])  # type: ignore[no-any-return]


def packed(header: object, body: bytes = GOOD.embeddings.tobytes()) -> bytes:
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def changed(metadata: dict[str, str | None] | None = None, tensor: dict[str, object] | None = None) -> bytes:
    header = header_of(DATA)
    header["__metadata__"] |= metadata or {}
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    header["prompt_embeddings"] |= tensor or {}
    return packed(header)


# --- valid files --------------------------------------------------------------------------------------


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
specs = st.one_of(
    st.just(TaskSpec(template="{text} =>")),
    st.dictionaries(names, names, min_size=2, max_size=4)
    .filter(lambda words: len({word.strip() for word in words.values()}) == len(words))
    .map(lambda words: TaskSpec(template="{text}", label_words={k: [v] for k, v in words.items()})),
)
matrices = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
privacies = st.one_of(
    st.just((None, None)),
    st.tuples(
        st.floats(0, exclude_min=True, allow_infinity=False), st.floats(0, 1, exclude_min=True, exclude_max=True)
    ),
)


@given(matrices, specs, privacies)
def test_a_written_prompt_is_read_back(
    embeddings: np.ndarray, spec: TaskSpec, privacy: tuple[float | None, float | None]
) -> None:
    prompt = PromptFile(embeddings, HASH, spec, *privacy)
    data = write_prompt(prompt)
    assert same(read_prompt(data), prompt)
    assert write_prompt(read_prompt(data)) == data


def test_the_bytes_are_always_the_same() -> None:
    """These bytes are frozen: changing a single one needs a new version of the format."""
    assert write_prompt(PromptFile(GOOD.embeddings.copy(), HASH, SPEC, 8.0, 1e-5)) == DATA
    assert (
        packed(
            {
                "__metadata__": {
                    "format": "post.prompt",
                    "version": "1",
                    "model_hash": HASH,
                    "task": '{"template":"{text}, it was",'
                    '"label_words":{"positive":["good","great"],"negative":["bad"]}}',
                    "epsilon": "8.0",
                    "delta": "1e-05",
                },
                "prompt_embeddings": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            }
        )
        == DATA
    )


def test_safetensors_sees_one_tensor_and_the_documented_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(DATA)
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
        np.testing.assert_array_equal(file.get_tensor("prompt_embeddings"), GOOD.embeddings)
        assert file.metadata() == {
            "format": "post.prompt",
            "version": "1",
            "model_hash": HASH,
            "task": json.dumps(SPEC.model_dump(), separators=(",", ":")),
            "epsilon": "8.0",
            "delta": "1e-05",
        }
    path.write_bytes(write_prompt(PromptFile(GOOD.embeddings, HASH, SPEC)))
    with safe_open(path, framework="np") as file:
        assert set(file.metadata()) == {"format", "version", "model_hash", "task"}


def test_labels_keep_their_order() -> None:
    task = read_prompt(DATA).task
    assert list(task.label_words or {}) == ["positive", "negative"]


def test_a_torch_tensor_is_copied_and_a_read_prompt_is_writable() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    prompt = PromptFile(tensor, HASH, SPEC)  # type: ignore[arg-type]
    assert (prompt.length, prompt.width) == (2, 3)
    tensor.data.zero_()
    assert prompt.embeddings.all()
    embeddings = read_prompt(DATA).embeddings
    embeddings[0, 0] = 5.0
    assert embeddings.flags.owndata or embeddings.base is not None


@pytest.mark.parametrize(
    "embeddings",
    [
        np.ones((2, 3)),
        np.ones(3, np.float32),
        np.ones((0, 3), np.float32),
        np.ones((1001, 1), np.float32),
        np.ones((1, 65_537), np.float32),
        np.full((2, 2), np.nan, np.float32),
        np.full((2, 2), np.inf, np.float32),
    ],
)
def test_a_prompt_that_could_not_be_read_can_not_be_created(embeddings: np.ndarray) -> None:
    with pytest.raises(PromptFileInvalid):
        PromptFile(embeddings, HASH, SPEC)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(8.0, None), (None, 1e-5), (0.0, 1e-5), (-1.0, 1e-5), (float("inf"), 1e-5), (8.0, 0.0), (8.0, 1.0)],
)
def test_an_incomplete_or_empty_guarantee_can_not_be_claimed(epsilon: float | None, delta: float | None) -> None:
    with pytest.raises(PromptFileInvalid):
        PromptFile(GOOD.embeddings, HASH, SPEC, epsilon, delta)


def test_a_task_too_long_for_the_header_can_not_be_written() -> None:
    words = {str(n): ["w" * 1000 + str(n)] for n in range(600)}
    with pytest.raises(PromptFileInvalid, match="header"):
        write_prompt(PromptFile(GOOD.embeddings, HASH, TaskSpec(template="{text}", label_words=words)))


# --- invalid files ------------------------------------------------------------------------------------


def with_value(value: float) -> bytes:
    embeddings = GOOD.embeddings.copy()
    embeddings[1, 2] = value
    return DATA[: -embeddings.nbytes] + embeddings.tobytes()


def two_tensors() -> bytes:
    header = header_of(DATA)
    header["extra"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [48, 52]}
    return packed(header, GOOD.embeddings.tobytes() + b"\0\0\0\0")


def spaced() -> bytes:
    return packed(json.dumps(header_of(DATA)).encode())


def reordered() -> bytes:
    header = header_of(DATA)
    return packed({"prompt_embeddings": header["prompt_embeddings"], "__metadata__": header["__metadata__"]})


def duplicated() -> bytes:
    text = json.dumps(header_of(DATA), separators=(",", ":")).replace(
        '"version":"1"', '"version":"row 17 of the private file","version":"1"'
    )
    return packed(text.encode())


TASK_TEXT = json.dumps(SPEC.model_dump(), separators=(",", ":"))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "three bytes": (b"abc", "3 bytes"),
    "pickle": (pickle.dumps({"prompt_embeddings": GOOD.embeddings}), "header"),
    "zip, as torch.save writes": (b"PK\x03\x04" + b"\0" * 500, "header"),
    "2 GB header": ((2 * 2**30).to_bytes(8, "little") + b"{}", "header of 2147483648 bytes"),
    "2^63 header": (b"\xff" * 8 + b"{}", "header"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "truncated header": (DATA[:60], "truncated"),
    "truncated tensor": (DATA[:-1], "truncated"),
    "one byte more": (DATA + b"\0", "too long"),
    "header not JSON": (packed(b"{,}"), "not JSON"),
    "header not text": (packed(b"\xff\xfe\xfd"), "not JSON"),
    "header a list": (packed([]), "not.* JSON object"),
    "header nested deep": (packed(b"[" * 200_000), "not JSON"),
    "no tensor": (packed({"__metadata__": {}}, b""), "0 tensors"),
    "two tensors": (two_tensors(), "2 tensors"),
    "another name": (save({"prompt": GOOD.embeddings}), "1 tensors"),
    "float16": (save({"prompt_embeddings": GOOD.embeddings.astype(np.float16)}), "F16"),
    "float64": (save({"prompt_embeddings": GOOD.embeddings.astype(np.float64)}), "F64"),
    "one dimension": (changed(tensor={"shape": [12]}), "1 dimensions"),
    "three dimensions": (changed(tensor={"shape": [3, 2, 2]}), "3 dimensions"),
    "no length": (
        packed(header_of(DATA) | {"prompt_embeddings": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}, b""),
        "0 vectors",
    ),
    "shape and size differ": (changed(tensor={"shape": [3, 5]}), "offsets"),
    "shape of 2^80": (changed(tensor={"shape": [2**40, 2**40]}), "offsets"),
    "shape overflows": (changed(tensor={"shape": [2**70, 4]}), "shape"),
    "negative shape": (changed(tensor={"shape": [-3, -4]}), "shape"),
    "fractional shape": (changed(tensor={"shape": [3.0, 4]}), "shape"),
    "true for a shape": (changed(tensor={"shape": [True, 12]}), "shape"),
    "offsets elsewhere": (changed(tensor={"data_offsets": [4, 52]}), "starts at byte 4"),
    "unknown dtype": (changed(tensor={"dtype": "C64"}), "dtype"),
    "extra member of the tensor": (changed(tensor={"comment": "row 17"}), "nothing else"),
    "metadata a list": (packed(header_of(DATA) | {"__metadata__": []}), "metadata"),
    "metadata a number": (changed({"epsilon": 8.0}), "metadata"),  # type: ignore[dict-item]
    "no metadata": (save({"prompt_embeddings": GOOD.embeddings}), "missing"),
    "unknown metadata": (changed({"accuracy": "0.93"}), "unknown metadata 'accuracy'"),
    "another format": (changed({"format": "pt"}), "format is 'pt'"),
    "another version": (changed({"version": "2"}), "version '2'"),
    "no hash": (changed({"model_hash": None}), "'model_hash' is missing"),
    "hash in capitals": (changed({"model_hash": HASH.upper()}), "SHA-256"),
    "short hash": (changed({"model_hash": HASH[:-1]}), "SHA-256"),
    "task not JSON": (changed({"task": "{"}), "task"),
    "task nested deep": (changed({"task": "[" * 50_000}), "task"),
    "task without a text slot": (changed({"task": '{"template":"it was"}'}), "task.*{text}"),
    "task with more in it": (changed({"task": TASK_TEXT[:-1] + ',"rows":4598}'}), "task"),
    "task with one label": (changed({"task": '{"template":"{text}","label_words":{"a":["b"]}}'}), "two labels"),
    "task with spaces": (changed({"task": json.dumps(SPEC.model_dump())}), "one form"),
    "task with a lone surrogate": (
        changed({"task": '{"template":"{text} ' + chr(92) + 'ud800"}'}),
        "task",
    ),
    "epsilon alone": (changed({"delta": None}), "both or neither"),
    "epsilon not a number": (changed({"epsilon": "eight"}), "not a number"),
    "epsilon NaN": (changed({"epsilon": "nan"}), "epsilon"),
    "epsilon infinite": (changed({"epsilon": "1e999"}), "epsilon"),
    "epsilon negative": (changed({"epsilon": "-8.0"}), "epsilon"),
    "epsilon written otherwise": (changed({"epsilon": "8.00000"}), "one form"),
    "delta of 1": (changed({"delta": "1.0"}), "delta"),
    "NaN": (with_value(float("nan")), "NaN"),
    "infinite": (with_value(float("-inf")), "NaN or infinite"),
    "spaces in the header": (spaced(), "one form"),
    "another order": (reordered(), "one form"),
    "a hidden duplicate": (duplicated(), "one form"),
    "header over the limit": (packed(b" " * MAX_HEADER + b"{}"), "header"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_with_the_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(PromptFileInvalid, match=reason):
        read_prompt(data)


def test_too_many_bytes_are_refused() -> None:
    with pytest.raises(PromptFileInvalid, match="at most 100"):
        read_prompt(DATA, max_bytes=100)


@pytest.mark.parametrize("name", ["2 GB header", "2^63 header", "shape of 2^80", "pickle"])
def test_nothing_large_is_allocated_for_a_refusal(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PromptFileInvalid):
            read_prompt(BAD[name][0])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_wrong_size_is_found_before_the_tensor_is_created() -> None:
    """A megabyte of NaN behind a wrong header: the wrong size is reported, and the values are never read."""
    data = packed(header_of(DATA), b"\xff" * 1_000_000)
    with pytest.raises(PromptFileInvalid, match="too long"):
        read_prompt(data)


edits = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "swap"]), st.integers(0, len(DATA) - 1), st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400)
@given(edits)
def test_mutated_bytes_read_equal_or_are_refused(changes: list[tuple[str, int, bytes]]) -> None:
    data = DATA
    for kind, at, inserted in changes:
        if kind == "set":
            data = data[:at] + inserted + data[at + len(inserted) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + inserted + data[at:]
        else:
            data = data[at:] + data[:at]
    try:
        prompt = read_prompt(data)
    except PromptFileInvalid:
        return
    assert write_prompt(prompt) == data


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PromptFileInvalid):
        read_prompt(data)
