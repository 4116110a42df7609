"""A tokenizer's methods in KerasHub, over its own."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from opt_core.errors import TokenizerError
from opt_core.json_files import write_json
from opt_core.text import tokenizer_files
from opt_core.text.decoding import Decoding


class KerasHubTokenizer(Decoding):
    """Methods by which code written for KerasHub calls a tokenizer."""

    @classmethod
    def from_preset(cls, preset: str | PathLike[str], **settings: Any) -> Any:
        """Reads the tokenizer of a KerasHub folder, or of any that `from_pretrained` reads.

        Args:
            preset: The folder.
            **settings: As of `from_pretrained`.
        """
        made, files = cast(Any, cls), Path(preset, "assets", "tokenizer")
        if not files.is_dir():
            return made.from_pretrained(preset, **settings)
        return made(files / "vocabulary.json", files / "merges.txt", **settings)

    def get_config(self) -> dict[str, Any]:
        """All of the tokenizer, its vocabulary too, as `keras.saving` writes it."""
        loaded = self.loaded
        return {
            **loaded.named,
            **loaded.kept,
            "additional_special_tokens": list(loaded.extra),
            "add_bos_token": loaded.add_bos,
            "tokenizer_object": loaded.backend.to_str(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Makes the tokenizer that `get_config` describes.

        Raises:
            TokenizerError: It is a configuration of KerasHub, which has no vocabulary.
        """
        from tokenizers import Tokenizer

        settings = dict(config)
        if "tokenizer_object" not in settings:
            raise TokenizerError(
                "from_config: this configuration has no vocabulary; use from_pretrained, "
                "from_preset, or vocabulary= and merges="
            )
        backend = Tokenizer.from_str(settings.pop("tokenizer_object"))
        return cast(Any, cls).from_loaded(tokenizer_files.adopt(backend, settings, "from_config"))

    @property
    def start_token(self) -> str | None:
        """KerasHub's name of `bos_token`."""
        return cast(Any, self).bos_token

    @property
    def end_token(self) -> str | None:
        """KerasHub's name of `eos_token`."""
        return cast(Any, self).eos_token

    @property
    def start_token_id(self) -> int | None:
        """KerasHub's name of `bos_token_id`."""
        return cast(Any, self).bos_token_id

    @property
    def end_token_id(self) -> int | None:
        """KerasHub's name of `eos_token_id`."""
        return cast(Any, self).eos_token_id

    @property
    def special_tokens(self) -> list[str]:
        """KerasHub's name of `all_special_tokens`."""
        return list(cast(Any, self).all_special_tokens)

    @property
    def special_token_ids(self) -> list[int]:
        """KerasHub's name of `all_special_ids`."""
        return list(cast(Any, self).all_special_ids)

    def save_assets(self, dir_path: str | PathLike[str]) -> None:
        """KerasHub's name of `save_pretrained`; the vocabulary is there under both names."""
        own: Any = self
        own.save_pretrained(dir_path)
        write_json(Path(dir_path, "vocabulary.json"), own.get_vocab())

    def detokenize(self, inputs: Any) -> Any:
        """KerasHub's name of `decode`, and of `batch_decode` for several rows."""
        ids = cast(Any, inputs["input_ids"] if isinstance(inputs, Mapping) else inputs)
        is_one = len(ids) == 0 or np.ndim(ids[0]) == 0
        return self.decode(ids) if is_one else cast(Any, self).batch_decode(ids)

    def vocabulary_size(self) -> int:
        """KerasHub's name of `len`."""
        return len(self)

    def get_vocabulary(self) -> list[str]:
        """Every token, in the order of the ids."""
        vocabulary = self.loaded.backend.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def id_to_token(self, id: int) -> str | None:
        """The token of an id."""
        return self.loaded.backend.id_to_token(id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None where it is none."""
        return self.loaded.backend.token_to_id(token)
