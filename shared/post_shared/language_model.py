"""One wrapper around any Hugging Face causal or masked language model.

Everything that POST does with a model goes through :class:`LanguageModel`: embeddings, hidden states,
logits at the answer positions, a prompt's key/value prefix. No architecture is named here:
what differs between families is asked of the configuration or of a signature.
Shapes: B rows, T tokens, l prompt vectors, L = l + T positions, d hidden width, V vocabulary,
P answer positions (P = B for classification)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DynamicCache,
    GgufConfig,
)

from post_shared.attention import install
from post_shared.devices import SPREAD, Memory, choose_device, training_dtype, usual_dtype
from post_shared.errors import InvalidInput, PromptMismatch
from post_shared.gated import keep_less
from post_shared.head import Head
from post_shared.offload import device_of, devices_of, free_memory, load_again
from post_shared.packing import packed_answers, packed_positions, pays
from post_shared.prefixes import Prefix, behind, can_keep_prefix

if TYPE_CHECKING:
    from post_shared.batches import Batch

Kind = Literal["causal", "masked"]

install()


class LanguageModel:
    """A frozen language model in evaluation mode, with its tokenizer.

    Gradients flow through it to a prompt; its own weights get none (distillation turns that on for its student)."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.kind: Kind = kind_of(self.model.config)
        load_again(self.model)
        self._head = Head(self.model)
        keep_less(self.model)

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

        ``dtype`` defaults to float32 on CPU and bfloat16 on CUDA; if it ``teaches``, see :func:`training_dtype`. The
        device ``spread`` is all GPUs, then memory, then the disk, each up to what ``memory`` allows (default: most of
        what is free). On the disk weights stay in the model's own files; others are written to ``offload_folder``.

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

    # --- facts ----------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @cached_property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def architecture(self) -> str:
        return str(self.config.model_type)

    @property
    def device(self) -> torch.device:
        """Where its embeddings are: what goes in and what comes out is there, wherever the layers are."""
        return device_of(self.model.get_input_embeddings())

    @cached_property
    def devices(self) -> set[torch.device]:
        """Where its layers compute; more than one of a model that is spread over GPUs."""
        return devices_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @cached_property
    def parameters(self) -> int:
        """Number of distinct weights (tied ones counted once)."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(p.nbytes for p in self.model.parameters())

    @cached_property
    def max_length(self) -> int:
        """Positions that the model has, prompt included. A very large number when nothing limits them."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return 1_000_000
        table = getattr(getattr(self.body, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # such tables number their positions from padding_idx + 1
        return limit if padding is None else limit - padding - 1

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix)  # type: ignore[no-any-return]

    # --- forward --------------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> input embeddings (B, T, d), in the model's data type."""
        return self.model.get_input_embeddings()(token_ids.to(self.device))  # type: ignore[no-any-return]

    def hidden(self, token_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Last hidden states (B, l + T, d) of right-padded rows, with the prompt put before each row.

        ``prompt`` is (l, d), one for all rows, or (B, l, d), a different one per row.
        A causal model needs no mask here: no real position can see the padding on its right.
        """
        inputs = self.embed(token_ids)
        if prompt is not None:
            inputs = self._prepend(prompt, inputs)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (prompt.shape[-2], 0), value=1)
        if self.kind == "causal" or attention_mask is None or bool(attention_mask.all()):
            attention_mask = None
        else:
            attention_mask = attention_mask.to(self.device)
        return self.last_hidden(inputs_embeds=inputs, attention_mask=attention_mask)

    def head(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Hidden states (..., d) -> logits over the vocabulary (..., V), or at ``tokens`` (..., K), float32."""
        return self._head(hidden, tokens)

    def answer_hidden(self, batch: Batch, prompt: Tensor | None = None) -> Tensor:
        """Hidden states at the answer positions only: (P, d)."""
        hidden = self.hidden(batch.token_ids, batch.attention_mask, prompt)  # (B, L, d)
        shift = 0 if prompt is None else prompt.shape[-2]
        return hidden[batch.rows.to(self.device), batch.positions.to(self.device) + shift]  # (B, L, d) -> (P, d)

    def answer_logits(self, batch: Batch, prompt: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Logits at the answer positions, (P, V), or (P, K) with ``tokens``; the head sees the P rows and no others."""
        return self.head(self.answer_hidden(batch, prompt), tokens)

    @cached_property
    def keeps_prefix(self) -> bool:
        """Whether a prompt can be run once and kept as a :class:`Prefix`. A masked model's prompt sees the text too."""
        return self.kind == "causal" and can_keep_prefix(self.body, self.config)

    @torch.no_grad()
    def prefix(self, prompt: Tensor) -> Prefix:
        """The keys and values of ``prompt`` (l, d), for :meth:`answer_logits_after`.

        Raises:
            InvalidInput: the model is a masked one, or keeps more of a text than keys and values.
        """
        if not self.keeps_prefix:
            raise InvalidInput("a masked or recurrent model has no key/value prefix: put the prompt before each text")
        return Prefix.of(self.cache_of(prompt))

    @torch.no_grad()
    def answer_logits_after(
        self, batch: Batch, prefix: Prefix | Sequence[Prefix], tokens: Tensor | None = None
    ) -> Tensor:
        """As :meth:`answer_logits` without running a prompt again: one prefix for all, or one for each row."""
        prefixes = [prefix] * len(batch) if isinstance(prefix, Prefix) else prefix
        return self.at_answers(batch, tokens, **behind(prefixes, batch.token_ids.shape[1], self.device))

    def answer_logits_shared(
        self, batch: Batch, prompt: Tensor, owner: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """As :meth:`answer_logits` with one prompt (l, d), or several (K, l, d) of which row i has ``owner[i]``.

        Gradients included, in fewer operations: where the model :attr:`packs`, each prompt is run once, not once per
        row, in one pass with all texts, and short ones aren't padded to the longest.
        """
        if batch.longest + prompt.shape[-2] > self.packs or not pays(self, batch, prompt):
            return self.answer_logits(batch, prompt if owner is None else prompt[owner], tokens)
        self._check_width(prompt)
        hidden = packed_answers(self, batch, prompt.reshape(-1, *prompt.shape[-2:]), owner)
        return self.head(hidden, tokens)  # (P, d) -> (P, V) or (P, K)

    @cached_property
    def packs(self) -> int:
        """Up to how many positions a prompt and a text can run in a packed row: 0 if the model isn't made for that."""
        return packed_positions(self) if self.keeps_prefix else 0

    def cache_of(self, prompt: Tensor) -> DynamicCache:
        """Keys and values of ``prompt``, (l, d) or (K, l, d), in every layer, as a cache of one row or of K."""
        self._check_width(prompt)
        inputs = prompt.reshape(-1, *prompt.shape[-2:]).to(self.device, self.dtype)
        cache = DynamicCache()  # without the configuration: a sliding layer keeps all of the prompt, and masks it
        self.run_body(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        return cache

    def at_answers(self, batch: Batch, tokens: Tensor | None, **inputs: Any) -> Tensor:
        """Logits (P, V) or (P, K) at the answer positions of ``batch``, the body's further inputs being ``inputs``."""
        hidden = self.last_hidden(inputs_embeds=self.embed(batch.token_ids), **inputs)
        rows, positions = batch.rows.to(self.device), batch.positions.to(self.device)
        return self.head(hidden[rows, positions], tokens)  # (B, T, d) -> (P, d) -> (P, V)

    # --- helpers --------------------------------------------------------------------------------------

    def last_hidden(self, **inputs: Any) -> Tensor:
        """The body's last hidden states, brought back to where its inputs are."""
        return self.run_body(**inputs).last_hidden_state.to(self.device)  # type: ignore[no-any-return]

    def run_body(self, **inputs: Any) -> Any:
        """The body's forward, without those inputs that its family doesn't know."""
        inputs.setdefault("use_cache", False)
        known = inspect.signature(self.body.forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        return self.body(**{name: value for name, value in inputs.items() if takes_all or name in known})

    def _prepend(self, prompt: Tensor, inputs: Tensor) -> Tensor:
        self._check_width(prompt)
        rows = prompt if prompt.dim() == 3 else prompt.expand(inputs.shape[0], -1, -1)  # (l, d) -> (B, l, d)
        return torch.cat([rows.to(inputs.device, inputs.dtype), inputs], dim=1)

    def _check_width(self, prompt: Tensor) -> None:
        if prompt.shape[-1] != self.hidden_size:
            raise PromptMismatch(
                f"the prompt's vectors have width {prompt.shape[-1]}, the model's hidden size is {self.hidden_size}"
            )


def kind_of(config: Any) -> Kind:
    """Masked when the family has a masked-language-model class and isn't configured as a decoder."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "masked" if masked else "causal"
