"""Private rows become tokens in bounded time and memory, whatever the provider's tokenizer is.

A ``tokenizer.json`` may contain regular expressions and replacements. One that runs away on a single person's name
would end the run, and whether a prompt comes out would tell that the row is there. So a tokenizer of known parts
encodes all rows at once. Any other one, and one that fails on a row, encodes them one by one in a process that is
stopped when it takes too long. A row that it can't encode, or whose tokens the student can't use, counts as empty.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import ModelUnsafe
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions

log = logging.getLogger("post.client")

ROW_SECONDS, START_SECONDS = 5.0, 120.0
"""The time that a row may take, and that the process may take to start."""
WORD_CHARACTERS = 1000
"""The longest word that WordPiece may search: the time grows with its square."""
MODEL_STRINGS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
"""Strings that a model may put in once for every piece of a word."""
PLAIN_NORMALIZERS = frozenset(
    [
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Lowercase",
        "Strip",
        "StripAccents",
        "BertNormalizer",
        "ByteLevel",
    ]
)
PLAIN_PRE_TOKENIZERS = frozenset(
    [
        "ByteLevel",
        "BertPreTokenizer",
        "Whitespace",
        "WhitespaceSplit",
        "Metaspace",
        "Digits",
        "Punctuation",
        "UnicodeScripts",
        "CharDelimiterSplit",
    ]
)
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
KNOWN_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        rf"{_START}\p{{N}}{{1,3}}|{_END}",  # GPT-4, Llama 3
        rf"{_START}\p{{N}}|{_END}",  # Qwen 2
    }
)
"""Regular expressions whose time is linear in the text's length."""


def encode_private(model: LanguageModel, task: Task, rows: Sequence[Row], options: TuneOptions) -> EncodedRows:
    """The private rows as token ids, with positions reserved for the prompt, in bounded time and memory.

    Raises:
        ModelUnsafe: the tokenizer can't even encode the template with an empty text.
        TaskInvalid, InvalidInput: as ``encode_rows``.
    """
    encoded: Sequence[EncodedRow | None] | None = None
    if is_plain(json.loads(model.tokenizer.backend_tokenizer.to_str())):
        empty = _encode(model, task, [""], [_filler(task)], options)[0]  # raises what is wrong with the task
        encoded = _encode_or_none(model, task, rows, options)
    if encoded is None:
        empty, encoded = _one_by_one(model, task, rows, options)
    if not _is_sound(model, empty):  # a template without a token of its own
        empty = EncodedRow([0], [0], [0] if task.is_generation else [], empty.label)
    sound = [each if each is not None and _is_sound(model, each) else None for each in encoded]
    if bad := sound.count(None):
        log.warning("the student's tokenizer couldn't encode %d of %d rows: they count as empty", bad, len(rows))
    pairs = zip(sound, rows, strict=True)
    return EncodedRows(tuple(_labelled(task, empty, row) if each is None else each for each, row in pairs))


def _encode(
    model: LanguageModel, task: Task, texts: list[str], labels: list[str | None], options: TuneOptions
) -> tuple[EncodedRow, ...]:
    reserved = options.num_virtual_tokens
    return encode_rows(model, task, texts, options.max_length, labels=labels, reserved=reserved).rows


def _encode_or_none(
    model: LanguageModel, task: Task, rows: Sequence[Row], options: TuneOptions
) -> Sequence[EncodedRow] | None:
    """All rows at once; None if the tokenizer fails on one of them."""
    try:
        return _encode(model, task, [row.text for row in rows], [row.label for row in rows], options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # tokenizers panics with an exception that isn't an Exception
        return None


def _filler(task: Task) -> str:
    """A label for the empty row."""
    return "." if task.is_generation else task.labels[0]


def _labelled(task: Task, empty: EncodedRow, row: Row) -> EncodedRow:
    """The empty row, with the label of ``row``, which is public for a class and not for a free answer."""
    return empty if empty.label is None else replace(empty, label=task.labels.index(str(row.label)))


def _is_sound(model: LanguageModel, row: EncodedRow) -> bool:
    """Whether the student can embed and predict its tokens."""
    ids = [*row.token_ids, *row.tokens]
    known = bool(row.token_ids) and all(0 <= each < model.vocabulary for each in ids)
    return known and all(0 <= at < len(row.token_ids) for at in row.positions)


def is_plain(core: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` has only parts whose time and memory are linear in the text's length."""
    normalizers, pre_tokenizers = _parts(core.get("normalizer")), _parts(core.get("pre_tokenizer"))
    plain = all(map(_plain_normalizer, normalizers)) and all(map(_plain_split, pre_tokenizers))
    kinds = [part["type"] for part in normalizers if part["type"] != "Replace"]  # each may lengthen a text: once only
    strings = [str(core["model"].get(name) or "") for name in MODEL_STRINGS]
    words = core["model"].get("max_input_chars_per_word") or 0
    return plain and len(set(kinds)) == len(kinds) and max(map(len, strings)) <= 256 and words <= WORD_CHARACTERS


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flattened sequences."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers") or []
        return [each for one in inner for each in _parts(one)]
    return [part]


def _plain_normalizer(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":  # a text must not grow
        pattern = part["pattern"].get("String")
        return bool(pattern) and len(part["content"]) <= len(pattern)
    if part["type"] == "Prepend":
        return len(part["prepend"]) <= 8
    return part["type"] in PLAIN_NORMALIZERS


def _plain_split(part: dict[str, Any]) -> bool:
    if part["type"] == "Split":
        return bool(part["pattern"].get("String")) or part["pattern"].get("Regex") in KNOWN_PATTERNS
    return part["type"] in PLAIN_PRE_TOKENIZERS


# --- one by one, in another process -------------------------------------------------------------------


def _one_by_one(
    model: LanguageModel, task: Task, rows: Sequence[Row], options: TuneOptions
) -> tuple[EncodedRow, list[EncodedRow | None]]:
    """The empty row, and every row or None for one that can't be encoded."""
    first = {
        "task": task.spec().model_dump(mode="json"),
        "kind": model.kind,
        "positions": model.max_length,
        "max_length": options.max_length,
        "reserved": options.num_virtual_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="post-tokenizer-") as folder:
        model.tokenizer.save_pretrained(folder)
        process = _Process(folder, first)
        try:
            empty = process.encode("", _filler(task))
            if not isinstance(empty, EncodedRow):  # says nothing of the rows
                raise ModelUnsafe(f"the student's tokenizer can't encode the task's template: {empty}")
            encoded = [process.encode(row.text, row.label) for row in rows]
        finally:
            process.stop()
    return empty, [each if isinstance(each, EncodedRow) else None for each in encoded]


class _Process:
    """:mod:`post_client.students.tokenizer_process`, started again after a row that stopped it."""

    def __init__(self, folder: str, first: dict[str, Any]) -> None:
        self._folder, self._first = folder, first
        self._child: subprocess.Popen[str] | None = None
        self._answers: Queue[str] = Queue()

    def encode(self, text: str, label: str | None) -> EncodedRow | str:
        """The row, or why there is none: the tokenizer failed, or took more than :data:`ROW_SECONDS`."""
        if self._child is None and not self._start():
            return "it can't be loaded by itself"
        with self._stopped_on_failure():
            self._send({"text": text, "label": label})
            answer = json.loads(self._answers.get(timeout=ROW_SECONDS))
            return answer if isinstance(answer, str) else EncodedRow(**answer)
        return f"it took more than {ROW_SECONDS:g} seconds or too much memory"

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> bool:
        command = [sys.executable, "-m", "post_client.students.tokenizer_process", self._folder]
        self._answers = Queue()
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        Thread(target=_read, args=(self._child.stdout, self._answers), daemon=True).start()
        ready = ""
        with self._stopped_on_failure():
            self._send(self._first)
            ready = self._answers.get(timeout=START_SECONDS)
        return bool(ready)

    def _send(self, document: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(document) + "\n")
        self._child.stdin.flush()

    @contextmanager
    def _stopped_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (Empty, OSError, ValueError):  # too slow; gone; gone in the middle of a line
            self.stop()


def _read(stream: IO[str] | None, answers: Queue[str]) -> None:
    """Pass on all lines, and an empty one at the end."""
    with suppress(OSError, ValueError):
        for line in stream or ():
            answers.put(line)
    answers.put("")
