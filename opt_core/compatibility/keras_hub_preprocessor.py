"""KerasHub's preprocessor of a causal language model: texts into rows of one length, and back."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.keras_hub import texts_of
from opt_core.errors import InputError
from opt_core.json_files import read_json, write_json
from opt_core.text import tensors
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer

SETTINGS_FILE = "preprocessor.json"
"""KerasHub's name for it."""


class OPTCausalLMPreprocessor:
    """Makes inputs, labels and weights of texts, for `fit` with a loss that does not shift labels.

    Attributes:
        tokenizer: Ours, or one of `transformers`.
        sequence_length: Tokens of a row; longer texts are cut.
        add_start_token: Put `bos_token_id` before each text.
        add_end_token: Put `eos_token_id` behind each text.
        name: What Keras calls it.
    """

    def __init__(
        self,
        tokenizer: Any,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        name: str = "opt_causal_lm_preprocessor",
        **keras_options: Any,
    ):
        """Takes the settings over.

        Args:
            tokenizer: See the attributes, also for the next ones.
            sequence_length: See there.
            add_start_token: See there.
            add_end_token: See there.
            name: What Keras calls it.
            **keras_options: `dtype` and `trainable`, without effect: it has no weights.
        """
        if unknown := keras_options.keys() - {"dtype", "trainable"}:
            names = ", ".join(sorted(unknown))
            raise InputError(f"{names}: no argument of a preprocessor; see its attributes")
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token
        self.name = name

    @classmethod
    def from_preset(cls, preset: str | PathLike[str], **settings: Any) -> "OPTCausalLMPreprocessor":
        """Takes a preset's tokenizer; settings are those of the constructor."""
        return cls(OPTTokenizer.from_preset(preset), **settings)

    def get_config(self) -> dict[str, Any]:
        """The settings, and all of the tokenizer, as `keras.saving` writes them."""
        return {"tokenizer": as_tokenizer(self.tokenizer).get_config(), **self._settings()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OPTCausalLMPreprocessor":
        """Makes the preprocessor that `get_config` describes."""
        settings = dict(config)
        return cls(OPTTokenizer.from_config(settings.pop("tokenizer")), **settings)

    def _settings(self) -> dict[str, Any]:
        names = ("sequence_length", "add_start_token", "add_end_token")
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes the tokenizer's files, and the settings beside them."""
        self.tokenizer.save_pretrained(folder)
        write_json(Path(folder) / SETTINGS_FILE, self._settings())

    save_to_preset = save_pretrained

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(ids, **options)

    def __call__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
        add_start_token: bool | None = None,
        add_end_token: bool | None = None,
    ) -> tuple[dict[str, Any], Any, Any]:
        """Inputs, labels (the next tokens) and their weights, (B, T) each, or (T,) of one text.

        Args:
            x: A text, several of them, or a tensor of them, in `tf.data` too.
            y: Without effect, as in KerasHub: labels follow from the texts.
            sample_weight: Without effect.
            sequence_length: Tokens T of a row; None: the preprocessor's.
            add_start_token: As in the constructor; None: as there.
            add_end_token: As in the constructor; None: as there.
        """
        length = sequence_length or self.sequence_length
        start = self.add_start_token if add_start_token is None else add_start_token
        end = self.add_end_token if add_end_token is None else add_end_token
        ids, mask = self._pack(x, length + 1, start, end)
        inputs = {"token_ids": ids[..., :-1], "padding_mask": mask[..., :-1]}
        return inputs, ids[..., 1:], mask[..., 1:]

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Inputs of `generate`: as a call makes them, without a token at the end."""
        length = sequence_length or self.sequence_length
        ids, mask = self._pack(x, length, self.add_start_token, False)
        return {"token_ids": ids, "padding_mask": mask}

    def generate_postprocess(self, x: Any) -> Any:
        """The text, or texts, of what `generate` returned, without special tokens."""
        ids: Any = np.asarray(x["token_ids"])
        mask: Any = np.asarray(x["padding_mask"]) != 0
        two: Any = np.atleast_2d
        rows: Any = zip(two(ids), two(mask), strict=True)
        decode = self.tokenizer.decode
        texts = [decode(row[kept], skip_special_tokens=True) for row, kept in rows]
        return texts[0] if ids.ndim == 1 else texts

    def _pack(self, x: Any, length: int, start: bool, end: bool) -> tuple[Any, Any]:
        """Ids and mask, int32 [B, length], or [length] of one text."""
        if tensors.is_symbolic(x):
            made = tensors.in_graph(lambda texts: self._rows(texts, length, start, end), x)
            for tensor in made.values():
                tensor.set_shape([*x.shape, length])
            return made["input_ids"], made["attention_mask"]
        given = tensors.texts_of(x)
        texts = texts_of([given] if isinstance(given, str) else given)
        if texts is None:
            raise InputError(f"x: expected a text or texts, received {type(x).__name__}")
        made = self._rows(texts, length, start, end)
        ids, mask = made["input_ids"], made["attention_mask"]
        return (ids[0], mask[0]) if isinstance(given, str) else (ids, mask)

    def _rows(
        self, texts: list[str], length: int, start: bool, end: bool
    ) -> dict[str, NDArray[np.int32]]:
        tokenizer = self.tokenizer
        first = [tokenizer.bos_token_id] if start else []
        last = [tokenizer.eos_token_id] if end else []
        ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        room = length - len(first) - len(last)
        for i, text in enumerate(texts):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = [*first, *own[:room], *last]
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}


def read_preprocessor(folder: str | PathLike[str]) -> OPTTokenizer | OPTCausalLMPreprocessor:
    """The tokenizer of a folder or, where settings lie beside it, the preprocessor with it."""
    tokenizer, settings = OPTTokenizer.from_pretrained(folder), Path(folder) / SETTINGS_FILE
    if not settings.exists():
        return tokenizer
    return OPTCausalLMPreprocessor(tokenizer, **read_json(settings))
