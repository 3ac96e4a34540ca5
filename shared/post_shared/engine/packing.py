"""Prompts and the texts behind them in one row, so that each layer's matrices are multiplied once for all of them.

In a causal model a prompt sees nothing of the text, so one run of it serves all its texts. Apart from attention no
position sees another, so texts of different lengths need no padding. Attention alone takes the row apart: group by
group on a CPU, which then computes no product in vain, and under one mask on a GPU, which then waits for no launches.

Shapes: K prompts of l vectors; groups of B texts with T tokens each; N = K l + sum of B T positions; h heads, e wide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache

from post_shared.data.batches import Batch
from post_shared.engine.backbone import Backbone
from post_shared.engine.cuda_graphs import TOKENS, CudaGraphs, up_to

GROUP = 4
"""Tokens: padding that costs about as much as one more group of texts in attention does."""
ONE_MASK = 4096
"""Positions up to which a GPU takes a row under one mask: beyond, what is masked out costs more than launches do."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query (B, h, T, e), key and value (B, h', L, e), mask (1, 1, T, L), true where seen -> (B, T, h, e)."""


@dataclass(frozen=True, eq=False)
class Texts:
    """``rows`` texts of ``tokens`` tokens; ``prompt_index`` (B,) is the prompt of each, None if there is one."""

    rows: int
    tokens: int
    prompt_index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Packing:
    """What stands where in the row: ``prompts`` of ``length`` vectors first, then the texts, group by group."""

    prompts: int
    length: int
    groups: Sequence[Texts]
    device: torch.device
    apart: bool = False
    """Attention group by group wherever it runs: a replayed graph waits for no launches."""

    @cached_property
    def positions(self) -> Tensor:
        """(1, N): each position's place behind the beginning of its own prompt."""
        texts = [torch.arange(self.length, self.length + each.tokens).repeat(each.rows) for each in self.groups]
        return torch.cat([torch.arange(self.length).repeat(self.prompts), *texts])[None].to(self.device)

    @cached_property
    def parts(self) -> list[tuple[Texts, Tensor]]:
        """Prompts, then each group of texts, with what they see, (1, 1, T, l + T): themselves and what is before."""
        apart = [(Texts(self.prompts, self.length), 0), *((each, self.length) for each in self.groups)]
        return [(each, torch.ones(1, 1, each.tokens, n + each.tokens, dtype=torch.bool).tril(n)) for each, n in apart]

    @cached_property
    def seen(self) -> Tensor:
        """(1, 1, N, N): the same for the whole row at once."""
        whose = [torch.arange(self.prompts).repeat_interleave(self.length)]
        text = [torch.full((self.prompts * self.length,), -1)]  # no text's
        for each in self.groups:
            index = torch.zeros(each.rows, dtype=torch.long) if each.prompt_index is None else each.prompt_index.cpu()
            whose.append(index.repeat_interleave(each.tokens))
            text.append((torch.arange(each.rows) + 1 + int(text[-1].max())).repeat_interleave(each.tokens))
        indices, texts, places = (
            each.to(self.device) for each in (torch.cat(whose), torch.cat(text), self.positions[0])
        )
        one_prompt, before = indices[:, None] == indices, places[:, None] >= places
        return (one_prompt & before & ((texts[:, None] == texts) | (texts < 0)))[None, None]

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (1, h, N, e), key and value (1, h', N, e) -> (1, N, h, e): a text sees its prompt and itself."""
        if self.device.type == "cuda" and query.shape[2] <= ONE_MASK and not self.apart:
            return attend(query, key, value, self.seen.to(query.device))
        sizes = [each.rows * each.tokens for each, _ in self.parts]
        split = [
            [
                _rows(part, each.rows)
                for part, (each, _) in zip(torch.split(whole, sizes, dim=2), self.parts, strict=True)
            ]
            for whole in (query, key, value)
        ]
        prompt, found = [split[1][0], split[2][0]], []
        for at, ((each, seen), q, k, v) in enumerate(zip(self.parts, *split, strict=True)):
            if at:
                k, v = (torch.cat([_of(some, each), own], dim=2) for some, own in zip(prompt, (k, v), strict=True))
            mask = causal_lower_right(*seen.shape[2:]) if q.is_cuda else seen  # its kernels know it by name
            found.append(attend(q, k, v, mask).flatten(0, 1))
        return torch.cat(found)[None]


def _rows(part: Tensor, rows: int) -> Tensor:
    """(1, h, B T, e) -> (B, h, T, e), without a copy."""
    return part.view(part.shape[1], rows, -1, part.shape[3]).transpose(0, 1)


def _of(prompts: Tensor, texts: Texts) -> Tensor:
    """(K, h, l, e) -> (B, h, l, e): each text's own."""
    if texts.prompt_index is None:
        return prompts.expand(texts.rows, -1, -1, -1)
    return prompts[texts.prompt_index.to(prompts.device)]


_packed: ContextVar[Packing | None] = ContextVar("packed", default=None)
"""Not an argument, since many families don't hand further arguments down to their attention."""


def packed_now() -> Packing | None:
    """How the row that the model is running is packed; None if it isn't."""
    return _packed.get()


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Within it, attention takes every row apart as ``packing`` says."""
    token = _packed.set(packing)
    try:
        yield
    finally:
        _packed.reset(token)


def pays(model: Backbone, batch: Batch, prompts: Tensor, graphs: CudaGraphs | None) -> bool:
    """Whether rows behind ``prompts``, (l, d) or (K, l, d), are cheaper in a packed row than with a prompt each.

    On a CPU always, and where passes are replayed. On a GPU, attention under a mask and its launches cost about as
    much as a second position for each position: there it pays if it saves more than half of them.
    """
    if model.device.type != "cuda" or (prompts.dim() == 2 and graphs is not None):
        return True
    length = prompts.shape[-2]
    texts = sum(map(batch.encoded.length, batch.index))
    return len(batch) * (length + batch.longest) > 2 * (prompts.shape[:-1].numel() + texts)


def packed_answers(
    model: Backbone,
    batch: Batch,
    prompts: Tensor,
    prompt_index: Tensor | None,
    graphs: CudaGraphs | None = None,
    *,
    limit: int,
) -> Tensor:
    """Hidden states (P, d) at the answer positions of rows behind ``prompts`` (K, l, d).

    Row i has the prompt ``prompt_index[i]``. ``graphs`` replays the passes of a single prompt; ``limit`` is what
    :func:`packed_positions` gave.
    """
    if graphs is not None and prompt_index is None:
        return replayed_answers(model, batch, prompts, graphs, limit)
    places = batch.places(len(batch), cost=GROUP)
    groups = [batch.part(some) for some in places]
    indices = [None if prompt_index is None else prompt_index[some] for some in places]
    hidden = _packed_hidden(model, prompts, [group.token_ids for group in groups], indices)
    answers, begin = [], prompts.shape[0] * prompts.shape[1]
    for group in groups:
        answers.append(begin + group.rows * group.longest + group.positions)
        begin += len(group) * group.longest
    order = torch.cat([batch.answers_at(some) for some in places]).argsort()
    return hidden[torch.cat(answers)[order].to(hidden.device)]  # (N, d) -> (P, d)


def packed_positions(model: Backbone) -> int:
    """How many positions a prompt and a text may have in a packed row: 0 if the family doesn't use torch's attention.

    Rows are packed for full attention, so a sliding window is a limit.
    """
    if not _can_pack(model):
        return 0
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return min([model.max_length, *(int(each) for each in windows if each)])


@torch.no_grad()
def _can_pack(model: Backbone) -> bool:
    """Whether a packed row of a few tokens gives what its texts give one by one."""
    if "position_ids" not in inspect.signature(model.body.forward).parameters:
        return False
    prompts = torch.linspace(-1, 1, 4 * model.hidden_size, device=model.device, dtype=model.dtype).reshape(2, 2, -1)
    texts, indices = [torch.tensor([[1, 2, 3]]), torch.tensor([[3], [2]])], [torch.tensor([1]), torch.tensor([0, 1])]
    apart = [model.hidden(ids, prompt=prompts[own])[:, 2:] for ids, own in zip(texts, indices, strict=True)]
    expected = torch.cat([each.flatten(0, 1) for each in apart])
    try:
        found = _packed_hidden(model, prompts, texts, indices)[4:]
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((found - expected).norm() <= torch.finfo(model.dtype).eps ** 0.5 * expected.norm())


def _packed_hidden(
    model: Backbone, prompts: Tensor, texts: Sequence[Tensor], indices: Sequence[Tensor | None]
) -> Tensor:
    """Last hidden states (N, d) of the row: ``prompts`` (K, l, d), then each group of ``texts``, token ids (B, T)."""
    groups = [Texts(ids.shape[0], ids.shape[1], index) for ids, index in zip(texts, indices, strict=True)]
    packing = Packing(prompts.shape[0], prompts.shape[1], groups, model.device)
    return _run_row(model, packing, prompts, torch.cat([ids.flatten() for ids in texts]))


def _run_row(model: Backbone, packing: Packing, prompts: Tensor, token_ids: Tensor) -> Tensor:
    """Last hidden states (N, d) of ``prompts`` (K, l, d) and the texts' ``token_ids``, N - K l in all."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # four-dimensional: it is left as it is
    inputs = torch.cat([prompts.flatten(0, 1).to(model.device, model.dtype), model.embed(token_ids.flatten())])
    with packed(packing):
        return model.last_hidden(inputs_embeds=inputs[None], position_ids=packing.positions, attention_mask=mask)[0]


def replayed_answers(model: Backbone, batch: Batch, prompt: Tensor, graphs: CudaGraphs, limit: int) -> Tensor:
    """As :func:`packed_answers` behind one prompt (1, l, d), in one of few shapes: all texts padded to one length."""
    length = prompt.shape[1]
    tokens = min(up_to(batch.longest, TOKENS), limit - length)
    packing = Packing(1, length, [Texts(len(batch), tokens)], model.device, apart=True)
    token_ids = nn.functional.pad(batch.token_ids, (0, tokens - batch.longest))
    hidden = graphs(partial(_run_row, model, packing), prompt, token_ids)
    return hidden[(length + batch.rows * tokens + batch.positions).to(hidden.device)]  # (N, d) -> (P, d)
