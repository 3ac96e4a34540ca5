"""One wrapper around any Hugging Face causal or masked language model, and the only door to the engine.

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
from post_shared.engine.devices import SPREAD, Memory, choose_device, usual_dtype
from post_shared.engine.kv_cache import Prefix, inputs_behind, left_padding
from post_shared.engine.offload import free_memory
from post_shared.engine.packing import packed_answers, packed_positions, packing_pays
from post_shared.engine.precision import Precision, choose_precision, inner_size
from post_shared.errors import InvalidInput
from post_shared.model.prefix import RowCache

__all__ = ["Kind", "LanguageModel", "kind_of"]

install()


class LanguageModel(Backbone):
    """A frozen language model in evaluation mode, with its tokenizer.

    Gradients flow through it to a prompt. Its own weights get none; distillation enables them for its student.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.precision = Precision(self.dtype, "as it was made")
        """The data type, and why it is that."""
        self._graphs: CudaGraphs | None = None

    # --- loading and saving ---------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        for_training: bool = False,
        gguf_file: str | None = None,
        memory: Memory | None = None,
        offload_folder: Path | None = None,
    ) -> LanguageModel:
        """Load from a folder, a ``.gguf`` file, or a hub id. Only safetensors or GGUF weights; never remote code.

        ``dtype`` defaults to float32 on CPU and bfloat16 on CUDA; with ``for_training``, for a frozen model that
        others learn from, to what is faster there (:func:`~post_shared.engine.precision.choose_precision`). The device
        ``spread`` is all GPUs, then memory, then the disk, each up to the limit in ``memory`` (default: most of what is
        free). Weights on the disk are read from the model's own files where possible; others are written to
        ``offload_folder``.

        Raises:
            InvalidInput: there is no such folder or file, or it doesn't hold a language model.
        """
        source = str(source)
        if source.endswith(".gguf"):
            path = Path(source)
            source, gguf_file = str(path.parent), path.name
        place = choose_device("auto" if device == SPREAD else device)
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": Path(source).exists()}
        if gguf_file:
            options["gguf_file"] = gguf_file
        try:
            config = AutoConfig.from_pretrained(source, **options)
            precision = _precision(place, config.get_text_config(), dtype, for_training=for_training)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            auto = AutoModelForMaskedLM if kind_of(config) == "masked" else AutoModelForCausalLM
            if gguf_file:  # a quantised model can be neither saved nor differentiated
                options["quantization_config"] = GgufConfig(dequantize=True)
            else:
                options["use_safetensors"] = True
            if device == SPREAD:
                options |= {"device_map": "auto", "max_memory": memory or free_memory()}
                options |= {"offload_folder": offload_folder}
            model = auto.from_pretrained(source, dtype=precision.dtype, **options)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"can't load a language model from {source!r}: {error}. Give a folder with config.json, tokenizer "
                "and safetensors weights, a .gguf file, or a hub id of a causal or masked model."
            ) from error
        loaded = cls(model if device == SPREAD else model.to(place), tokenizer)
        loaded.precision = precision
        return loaded

    @property
    def training_precision(self) -> Precision:
        """The data type in which others learn fastest from this model, wherever it is now."""
        return _precision(self.device, self.config.get_text_config(), None, for_training=True)

    def save(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` can read: safetensors, configuration, tokenizer."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    # --- answers --------------------------------------------------------------------------------------

    def answer_logits(
        self,
        batch: Batch,
        prompt: Tensor | Prefix | Sequence[Prefix] | None = None,
        *,
        prompt_index: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Logits at the answer positions, (P, V), or (P, K) with ``tokens``. The head runs at these positions only.

        ``prompt`` is put before each row. It is one of:

        * None: no prompt;
        * (l, d): one for all rows; or (K, l, d) with ``prompt_index`` (B,), where row i has prompt ``prompt_index[i]``.
          Each is run once instead of once per row, in one pass with all texts, if the model :attr:`packs`;
        * (B, l, d): one per row, and each row runs its own;
        * :class:`Prefix`, one for all rows or one per row: prompts that were run before (no gradients).
        """
        if prompt is None:
            return self.head(self.answer_hidden(batch), tokens)
        if not isinstance(prompt, Tensor):
            return self._behind_prefixes(batch, prompt, tokens)
        if prompt.dim() == 3 and prompt_index is None:
            return self.head(self.answer_hidden(batch, prompt), tokens)
        if batch.longest + prompt.shape[-2] > self.packs or not packing_pays(self, batch, prompt, self._graphs):
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
        return self._at_answers(batch, tokens, **inputs_behind(prefixes, batch.token_ids.shape[1], self.device))

    def _at_answers(self, batch: Batch, tokens: Tensor | None, **inputs: Any) -> Tensor:
        hidden = self.last_hidden(inputs_embeds=self.embed(batch.token_ids), **inputs)
        rows, positions = batch.rows.to(self.device), batch.positions.to(self.device)
        return self.head(hidden[rows, positions], tokens)  # (B, T, d) -> (P, d) -> (P, V)

    @cached_property
    def packs(self) -> int:
        """Limit on positions, prompt and text together, in a packed row; 0 if the family can't pack."""
        return packed_positions(self) if self.keeps_prefix else 0

    # --- prompts that are run once --------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, prompt: Tensor) -> Prefix:
        """The keys and values of ``prompt`` (l, d), for :meth:`answer_logits` and :meth:`read`.

        Raises:
            InvalidInput: the model is masked, or keeps other state than keys and values.
        """
        if not self.keeps_prefix:
            raise InvalidInput("a masked or recurrent model has no key/value prefix: put the prompt before each text")
        return Prefix.of(self.cache_of(prompt))

    # --- generation -----------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, token_ids: Tensor, prefixes: Sequence[Prefix]) -> tuple[Tensor, RowCache]:
        """Right-padded rows (B, T) behind a prefix each -> last hidden states (B, T, d), and the cache to extend."""
        inputs = inputs_behind(prefixes, token_ids.shape[1], self.device, growing=True)
        hidden = self.run_body(inputs_embeds=self.embed(token_ids), **inputs).last_hidden_state
        return cast(Tensor, hidden), RowCache(inputs["past_key_values"])

    @torch.no_grad()
    def extend(self, token_ids: Tensor, cache: RowCache, lengths: Tensor) -> Tensor:
        """One more token per row, (B, 1), behind ``lengths`` (B,) positions of the cache -> hidden states (B, d)."""
        padding = left_padding(lengths, cache.length, 1, self.device)
        output = self.run_body(
            inputs_embeds=self.embed(token_ids), past_key_values=cache.cache, use_cache=True, **padding
        )
        return cast(Tensor, output.last_hidden_state[:, -1])

    # --- CUDA graphs ----------------------------------------------------------------------------------

    def new_graphs(self) -> CudaGraphs | None:
        """Graphs for passes of one prompt; None unless one GPU holds the whole model and the model packs."""
        return CudaGraphs() if can_capture(self) and self.packs else None

    @contextmanager
    def using_graphs(self, graphs: CudaGraphs | None) -> Iterator[None]:
        """Within it, passes of one prompt for all rows are captured in ``graphs`` and replayed; None: run eagerly."""
        before, self._graphs = self._graphs, graphs
        try:
            yield
        finally:
            self._graphs = before


def _precision(device: torch.device, config: Any, dtype: torch.dtype | None, *, for_training: bool) -> Precision:
    """Of a model with that text configuration: what was asked for, else what its use makes of it."""
    if dtype is not None:
        return Precision(dtype, "as asked for")
    if for_training:
        return choose_precision(device, config.hidden_size, inner_size(config))
    return Precision(usual_dtype(device), "the default where answers are computed")
