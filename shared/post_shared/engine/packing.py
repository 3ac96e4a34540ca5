"""Prompts and the texts behind them in one row, so that each layer's matrices are multiplied once for all of them.

In a causal model a prompt sees nothing of the text, so one run of it serves all its texts. Outside attention no
position sees another, so texts of different lengths need no padding. Only attention splits the row: group by group on a
CPU, which then computes no masked products, and under one mask on a GPU, which saves kernel launches.

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

GROUP_COST = 4
"""Tokens of padding that cost about as much as one more group of texts in attention."""
ONE_MASK = 4096
"""Positions up to which a GPU runs a row under one mask: beyond, masked products cost more than launches."""
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query (B, h, T, e), key and value (B, h', L, e), mask (1, 1, T, L), true where visible -> (B, T, h, e)."""


@dataclass(frozen=True, eq=False)
class Texts:
    """``rows`` texts of ``tokens`` tokens. ``prompt_index`` (B,) gives each text's prompt; None if there is one."""

    rows: int
    tokens: int
    prompt_index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Packing:
    """The layout of the row: first ``prompts`` prompts of ``length`` vectors, then the texts, group by group."""

    prompts: int
    length: int
    groups: Sequence[Texts]
    device: torch.device
    by_group: bool = False
    """Run attention group by group on any device: in a CUDA graph, launches cost nothing."""

    @cached_property
    def positions(self) -> Tensor:
        """(1, N): each position's offset from the start of its own prompt."""
        texts = [torch.arange(self.length, self.length + group.tokens).repeat(group.rows) for group in self.groups]
        return torch.cat([torch.arange(self.length).repeat(self.prompts), *texts])[None].to(self.device)

    @cached_property
    def parts(self) -> list[tuple[Texts, Tensor]]:
        """The prompts, then each group of texts, each with its causal mask (1, 1, T, l + T)."""
        parts = [(Texts(self.prompts, self.length), 0), *((group, self.length) for group in self.groups)]
        return [(part, torch.ones(1, 1, part.tokens, n + part.tokens, dtype=torch.bool).tril(n)) for part, n in parts]

    @cached_property
    def mask(self) -> Tensor:
        """(1, 1, N, N): the masks of all :attr:`parts` in one."""
        prompt = [torch.arange(self.prompts).repeat_interleave(self.length)]
        text = [torch.full((self.prompts * self.length,), -1)]  # part of no text
        for group in self.groups:
            index = (
                torch.zeros(group.rows, dtype=torch.long) if group.prompt_index is None else group.prompt_index.cpu()
            )
            prompt.append(index.repeat_interleave(group.tokens))
            text.append((torch.arange(group.rows) + 1 + int(text[-1].max())).repeat_interleave(group.tokens))
        prompts, texts, positions = (
            tensor.to(self.device) for tensor in (torch.cat(prompt), torch.cat(text), self.positions[0])
        )
        same_prompt, before = prompts[:, None] == prompts, positions[:, None] >= positions
        return (same_prompt & before & ((texts[:, None] == texts) | (texts < 0)))[None, None]

    def attend(self, attend: AttentionFn, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (1, h, N, e), key and value (1, h', N, e) -> (1, N, h, e): a text sees its prompt and itself."""
        if self.device.type == "cuda" and query.shape[2] <= ONE_MASK and not self.by_group:
            return attend(query, key, value, self.mask.to(query.device))
        sizes = [part.rows * part.tokens for part, _ in self.parts]
        split = [
            [
                _rows(states, part.rows)
                for states, (part, _) in zip(torch.split(whole, sizes, dim=2), self.parts, strict=True)
            ]
            for whole in (query, key, value)
        ]
        prompt, outputs = [split[1][0], split[2][0]], []
        for number, ((part, mask), q, k, v) in enumerate(zip(self.parts, *split, strict=True)):
            if number:
                k, v = (
                    torch.cat([_for_texts(states, part), own], dim=2)
                    for states, own in zip(prompt, (k, v), strict=True)
                )
            visible = causal_lower_right(*mask.shape[2:]) if q.is_cuda else mask  # GPU kernels know it by its type
            outputs.append(attend(q, k, v, visible).flatten(0, 1))
        return torch.cat(outputs)[None]


def _rows(states: Tensor, rows: int) -> Tensor:
    """(1, h, B T, e) -> (B, h, T, e), without a copy."""
    return states.view(states.shape[1], rows, -1, states.shape[3]).transpose(0, 1)


def _for_texts(prompts: Tensor, texts: Texts) -> Tensor:
    """(K, h, l, e) -> (B, h, l, e): each text's own prompt."""
    if texts.prompt_index is None:
        return prompts.expand(texts.rows, -1, -1, -1)
    return prompts[texts.prompt_index.to(prompts.device)]


_packed: ContextVar[Packing | None] = ContextVar("packed", default=None)
"""Not an argument, since many families don't pass further arguments on to their attention."""


def packed_now() -> Packing | None:
    """The packing of the row that the model is running; None if it isn't packed."""
    return _packed.get()


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Within it, attention treats every row as packed by ``packing``."""
    token = _packed.set(packing)
    try:
        yield
    finally:
        _packed.reset(token)


def packing_pays(model: Backbone, batch: Batch, prompts: Tensor, graphs: CudaGraphs | None) -> bool:
    """Whether a packed row is cheaper than a prompt per row, for ``prompts`` (l, d) or (K, l, d).

    It always is on a CPU and with CUDA graphs. On a GPU, masked attention and its launches cost about as much as
    doubling the positions: there packing pays if it saves more than half of them.
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

    Row i has the prompt ``prompt_index[i]``. ``graphs`` captures the passes of a single prompt; ``limit`` is the result
    of :func:`packed_positions`.
    """
    if graphs is not None and prompt_index is None:
        return captured_answers(model, batch, prompts, graphs, limit)
    places = batch.places(len(batch), cost=GROUP_COST)
    groups = [batch.part(rows) for rows in places]
    indices = [None if prompt_index is None else prompt_index[rows] for rows in places]
    hidden = _packed_hidden(model, prompts, [group.token_ids for group in groups], indices)
    answers, begin = [], prompts.shape[0] * prompts.shape[1]
    for group in groups:
        answers.append(begin + group.rows * group.longest + group.positions)
        begin += len(group) * group.longest
    order = torch.cat([batch.answers_at(rows) for rows in places]).argsort()
    return hidden[torch.cat(answers)[order].to(hidden.device)]  # (N, d) -> (P, d)


def packed_positions(model: Backbone) -> int:
    """Limit on positions of a prompt and a text in a packed row: 0 if the family doesn't use torch's attention.

    Packed rows have full attention, so a sliding window is a limit.
    """
    if not _can_pack(model):
        return 0
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return min([model.max_length, *(int(window) for window in windows if window)])


@torch.no_grad()
def _can_pack(model: Backbone) -> bool:
    """Whether a packed row of a few tokens gives the same states as its texts one by one."""
    if "position_ids" not in inspect.signature(model.body.forward).parameters:
        return False
    prompts = torch.linspace(-1, 1, 4 * model.hidden_size, device=model.device, dtype=model.dtype).reshape(2, 2, -1)
    texts, indices = [torch.tensor([[1, 2, 3]]), torch.tensor([[3], [2]])], [torch.tensor([1]), torch.tensor([0, 1])]
    separate = [model.hidden(ids, prompt=prompts[own])[:, 2:] for ids, own in zip(texts, indices, strict=True)]
    expected = torch.cat([states.flatten(0, 1) for states in separate])
    try:
        actual = _packed_hidden(model, prompts, texts, indices)[4:]
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((actual - expected).norm() <= torch.finfo(model.dtype).eps ** 0.5 * expected.norm())


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


def captured_answers(model: Backbone, batch: Batch, prompt: Tensor, graphs: CudaGraphs, limit: int) -> Tensor:
    """As :func:`packed_answers` behind one prompt (1, l, d), with all texts padded to one length for few shapes."""
    length = prompt.shape[1]
    tokens = min(up_to(batch.longest, TOKENS), limit - length)
    packing = Packing(1, length, [Texts(len(batch), tokens)], model.device, by_group=True)
    token_ids = nn.functional.pad(batch.token_ids, (0, tokens - batch.longest))
    hidden = graphs(partial(_run_row, model, packing), prompt, token_ids)
    return hidden[(length + batch.rows * tokens + batch.positions).to(hidden.device)]  # (N, d) -> (P, d)
