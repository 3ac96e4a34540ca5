"""One wrapper around any Hugging Face causal or masked language model, and the only door to its fast passes.

Everything that POST does with a model goes through :class:`LanguageModel`: embeddings, hidden states, logits at the
answer positions, the key/value prefix of a prompt.
Shapes: B rows, T tokens, l prompt vectors, L = l + T positions, d hidden size, V vocabulary, P answer positions
(P = B for classification), K prompts or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, GgufConfig

from post_shared.data.batches import Batch
from post_shared.engine.attention import install
from post_shared.engine.backbone import Backbone, Kind, kind_of
from post_shared.engine.cuda_graphs import CudaGraphs, can_capture
from post_shared.engine.devices import SPREAD, Memory, choose_device, training_dtype, usual_dtype
from post_shared.engine.kv_cache import Prefix, behind, padded_on_the_left
from post_shared.engine.offload import free_memory
from post_shared.engine.packing import packed_answers, packed_positions, pays
from post_shared.engine.shared_prefix import PrefixRows, SharedPrefix, can_share_prefix
from post_shared.errors import InvalidInput
from post_shared.model.prefix import RowCache

__all__ = ["Kind", "LanguageModel", "Prompt", "embeddings_of", "kind_of"]

Prompt = Tensor | PrefixRows
"""What a loss is given: a prompt (l, d) for all rows, one for each row (B, l, d), or rows behind a shared prefix."""

install()


def embeddings_of(prompt: Prompt) -> Tensor:
    """The vectors of a prompt: (l, d), or (B, l, d) if each row has its own."""
    return prompt.prompts if isinstance(prompt, PrefixRows) else prompt


class LanguageModel(Backbone):
    """A frozen language model in evaluation mode, with its tokenizer.

    Gradients flow through it to a prompt. Its own weights get none; distillation turns that on for its student.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._graphs: CudaGraphs | None = None

    # --- loading and saving ---------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        teaches: bool = False,
        gguf_file: str | None = None,
        memory: Memory | None = None,
        offload_folder: Path | None = None,
    ) -> LanguageModel:
        """Load from a folder, a ``.gguf`` file, or a hub id. Only safetensors or GGUF weights; never remote code.

        ``dtype`` defaults to float32 on CPU and bfloat16 on CUDA; if it ``teaches``, see
        :func:`~post_shared.model.devices.training_dtype`. The device ``spread`` is all GPUs, then memory, then the
        disk, each up to what ``memory`` allows (default: most of what is free). On the disk, weights stay in the
        model's own files; others are written to ``offload_folder``.

        Raises:
            InvalidInput: there is no such folder or file, or it holds no language model.
        """
        source = str(source)
        if source.endswith(".gguf"):
            path = Path(source)
            source, gguf_file = str(path.parent), path.name
        place = choose_device("auto" if device == SPREAD else device)
        options: dict[str, Any] = {"trust_remote_code": False}
        if gguf_file:
            options["gguf_file"] = gguf_file
        try:
            config = AutoConfig.from_pretrained(source, **options)
            usual = training_dtype(place, config.get_text_config().hidden_size) if teaches else usual_dtype(place)
            dtype = dtype or usual
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            auto = AutoModelForMaskedLM if kind_of(config) == "masked" else AutoModelForCausalLM
            if gguf_file:  # kept quantised, the model could be neither saved nor differentiated
                options["quantization_config"] = GgufConfig(dequantize=True)
            else:
                options["use_safetensors"] = True
            if device == SPREAD:
                options |= {"device_map": "auto", "max_memory": memory or free_memory()}
                options |= {"offload_folder": offload_folder}
            model = auto.from_pretrained(source, dtype=dtype, **options)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"can't load a language model from {source!r}: {error}. Give a folder with config.json, tokenizer "
                "and safetensors weights, a .gguf file, or a hub id of a causal or masked model."
            ) from error
        return cls(model if device == SPREAD else model.to(place), tokenizer)

    def save(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` reads anywhere: safetensors, configuration, tokenizer."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    # --- answers --------------------------------------------------------------------------------------

    def answer_logits(
        self,
        batch: Batch,
        prompt: Prompt | Prefix | Sequence[Prefix] | None = None,
        *,
        prompt_index: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Logits at the answer positions, (P, V), or (P, K) with ``tokens``. The head sees the P rows and no others.

        ``prompt`` stands before each row. It is one of:

        * None: no prompt;
        * (l, d): one for all rows; or (K, l, d) with ``prompt_index`` (B,), of which row i has ``prompt_index[i]``.
          Each is run once rather than once a row, in one pass with all texts, where the model :attr:`packs`;
        * (B, l, d): one for each row, and each row runs its own;
        * :class:`Prefix`, one or one for each row: prompts that were run before (no gradients);
        * :class:`PrefixRows`: rows behind one run of a prompt, each with a gradient of its own.
        """
        if isinstance(prompt, PrefixRows):
            return self._at_answers(batch, tokens, past_key_values=prompt.cache(), use_cache=True)
        if prompt is None:
            return self.head(self.answer_hidden(batch), tokens)
        if not isinstance(prompt, Tensor):
            return self._behind_prefixes(batch, prompt, tokens)
        if prompt.dim() == 3 and prompt_index is None:
            return self.head(self.answer_hidden(batch, prompt), tokens)
        if batch.longest + prompt.shape[-2] > self.packs or not pays(self, batch, prompt, self._graphs):
            own = prompt if prompt_index is None else prompt[prompt_index]
            return self.head(self.answer_hidden(batch, own), tokens)
        self.check_width(prompt)
        prompts = prompt.reshape(-1, *prompt.shape[-2:])  # (l, d) -> (1, l, d)
        hidden = packed_answers(self, batch, prompts, prompt_index, self._graphs, limit=self.packs)
        return self.head(hidden, tokens)  # (P, d) -> (P, V) or (P, K)

    def answer_hidden(self, batch: Batch, prompt: Tensor | None = None) -> Tensor:
        """Hidden states at the answer positions only: (P, d)."""
        hidden = self.hidden(batch.token_ids, batch.attention_mask, prompt)  # (B, L, d)
        shift = 0 if prompt is None else prompt.shape[-2]
        return hidden[batch.rows.to(self.device), batch.positions.to(self.device) + shift]  # (B, L, d) -> (P, d)

    @torch.no_grad()
    def _behind_prefixes(self, batch: Batch, prefix: Prefix | Sequence[Prefix], tokens: Tensor | None) -> Tensor:
        prefixes = [prefix] * len(batch) if isinstance(prefix, Prefix) else prefix
        return self._at_answers(batch, tokens, **behind(prefixes, batch.token_ids.shape[1], self.device))

    def _at_answers(self, batch: Batch, tokens: Tensor | None, **inputs: Any) -> Tensor:
        hidden = self.last_hidden(inputs_embeds=self.embed(batch.token_ids), **inputs)
        rows, positions = batch.rows.to(self.device), batch.positions.to(self.device)
        return self.head(hidden[rows, positions], tokens)  # (B, T, d) -> (P, d) -> (P, V)

    @cached_property
    def packs(self) -> int:
        """The most positions, prompt and text together, that a packed row may have; 0 if the family can't pack."""
        return packed_positions(self) if self.keeps_prefix else 0

    # --- prompts that are run once --------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, prompt: Tensor) -> Prefix:
        """The keys and values of ``prompt`` (l, d), for :meth:`answer_logits` and :meth:`read`.

        Raises:
            InvalidInput: the model is a masked one, or keeps more of a text than keys and values.
        """
        if not self.keeps_prefix:
            raise InvalidInput("a masked or recurrent model has no key/value prefix: put the prompt before each text")
        return Prefix.of(self.cache_of(prompt))

    def can_share_prefix(self, length: int, longest: int | None = None) -> bool:
        """Whether rows of up to ``longest`` tokens have the same gradients behind one run of a prompt of ``length``
        vectors as behind runs of their own."""
        return can_share_prefix(self, length, longest)

    def share_prefix(self, prompt: Tensor) -> SharedPrefix:
        """Run ``prompt`` (l, d) once, for rows that each want a gradient of their own."""
        return SharedPrefix(self, prompt)

    # --- generation -----------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, token_ids: Tensor, prefixes: Sequence[Prefix]) -> tuple[Tensor, RowCache]:
        """Right-padded rows (B, T) behind a prefix each -> last hidden states (B, T, d), and the cache to go on from."""
        inputs = behind(prefixes, token_ids.shape[1], self.device, keep=True)
        hidden = self.run_body(inputs_embeds=self.embed(token_ids), **inputs).last_hidden_state
        return cast(Tensor, hidden), RowCache(inputs["past_key_values"])

    @torch.no_grad()
    def extend(self, token_ids: Tensor, cache: RowCache, lengths: Tensor) -> Tensor:
        """One more token for each row, (B, 1), behind ``lengths`` (B,) positions of the cache -> hidden (B, d)."""
        places = padded_on_the_left(lengths, cache.length, 1, self.device)
        output = self.run_body(
            inputs_embeds=self.embed(token_ids), past_key_values=cache.cache, use_cache=True, **places
        )
        return cast(Tensor, output.last_hidden_state[:, -1])

    # --- CUDA graphs ----------------------------------------------------------------------------------

    def new_graphs(self) -> CudaGraphs | None:
        """Where passes of one prompt are captured; None unless one GPU holds the whole model and the model packs."""
        return CudaGraphs() if can_capture(self) and self.packs else None

    @contextmanager
    def replaying(self, graphs: CudaGraphs | None) -> Iterator[None]:
        """Within it, passes of one prompt for all rows are captured in ``graphs`` and replayed. None: they run eagerly."""
        before, self._graphs = self._graphs, graphs
        try:
            yield
        finally:
            self._graphs = before
