"""From texts to token ids: each text is put into the template, tokenised and truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.data.tasks import MASK, TEXT, Task
from post_shared.errors import InvalidInput, TaskInvalid
from post_shared.model.language_model import LanguageModel


def encode_rows(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    max_length: int = 128,
    *,
    labels: Sequence[str | None] | None = None,
    reserved: int = 0,
) -> EncodedRows:
    """Put each text into the template and tokenise it. A text that is too long is truncated at its end; the template
    never is. ``labels`` are label names, or the free answers of a generation task. ``reserved`` positions are left for
    the prompt.

    Raises:
        TaskInvalid: the template alone is too long, or a label is unknown to the task.
        InvalidInput: prompt and text together exceed the model's positions.
    """
    if max_length + reserved > model.max_length:
        raise InvalidInput(
            f"texts of {max_length} tokens and a prompt of {reserved} don't fit the model's {model.max_length} "
            "positions; lower the maximum length"
        )
    template = task.template_for(model.kind)
    mask_token = model.tokenizer.mask_token
    if model.kind == "masked":
        template = template.replace(MASK, mask_token)
        texts = [text.replace(mask_token, " ") for text in texts]  # a mask in the text would be answered, too
    names = labels if labels is not None else [None] * len(texts)
    answers = [_answer(model, name) if task.is_generation and name is not None else [] for name in names]
    # Each row reserves space for its own answer. Space for the longest one would let one private row change the others.
    token_ids, truncated = _tokenise(model, template, texts, [max_length - len(answer) for answer in answers])
    if task.is_generation:
        rows = [_generation_row(ids, answer) for ids, answer in zip(token_ids, answers, strict=True)]
    else:
        rows = [_row(model, task, ids, name) for ids, name in zip(token_ids, names, strict=True)]
    return EncodedRows(tuple(replace(row, truncated=True) if n in truncated else row for n, row in enumerate(rows)))


def _tokenise(
    model: LanguageModel, template: str, texts: Sequence[str], limits: Sequence[int]
) -> tuple[list[list[int]], set[int]]:
    """Token ids of each text in the template, at most ``limits[row]``, and the indices of truncated rows."""
    if not texts:
        return [], set()
    before, after = template.split(TEXT)

    def ids_of(inserted: Sequence[str]) -> list[list[int]]:
        return plain_ids(model, [before + text + after for text in inserted])

    bare = len(ids_of([""])[0])
    if bare >= min(limits):
        raise TaskInvalid(f"the template alone takes {bare} tokens; template and text may take {min(limits)}")
    token_ids, truncated = ids_of(texts), set()
    for row, ids in enumerate(token_ids):
        text, excess = texts[row], len(ids) - limits[row]
        while excess > 0:
            truncated.add(row)
            text = _truncated(model, text, excess)
            token_ids[row] = ids_of([text])[0]
            excess = len(token_ids[row]) - limits[row]
    return token_ids, truncated


def _truncated(model: LanguageModel, text: str, excess: int) -> str:
    """``text`` without its last ``excess`` tokens."""
    spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    if len(spans) <= excess:
        return ""
    end = int(spans[len(spans) - excess - 1][1])
    return text[: min(end, len(text) - 1)].rstrip()


def plain_ids(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts for generation to continue, without a template."""
    return [_without_end_token(model, ids) for ids in model.tokenizer(list(texts)).input_ids]


def _without_end_token(model: LanguageModel, ids: list[int]) -> list[int]:
    """Remove an end-of-text token that the tokenizer adds: a causal model answers after the last token."""
    ends = (model.tokenizer.eos_token_id, model.tokenizer.sep_token_id)
    while model.kind == "causal" and len(ids) > 1 and ids[-1] is not None and ids[-1] in ends:
        ids = ids[:-1]
    return ids


def _answer(model: LanguageModel, text: str) -> list[int]:
    """The tokens of a free answer, and the end token that stops generation."""
    ids: list[int] = model.tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    end = model.tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def _generation_row(ids: list[int], answer: list[int]) -> EncodedRow:
    """Each token of the answer is predicted in its place; without an answer, only the first position is."""
    if not answer:
        return EncodedRow(ids, [len(ids) - 1], [], None)
    full = [*ids, *answer]
    return EncodedRow(full[:-1], list(range(len(ids) - 1, len(full) - 1)), answer, None)


def _row(model: LanguageModel, task: Task, ids: list[int], name: str | None) -> EncodedRow:
    label = None
    if name is not None:
        if name not in task.labels:
            raise TaskInvalid(f"label {name!r} is unknown to the task; its labels are: {', '.join(task.labels)}")
        label = task.labels.index(name)
    position = ids.index(model.tokenizer.mask_token_id) if model.kind == "masked" else len(ids) - 1
    return EncodedRow(ids, [position], [], label)
