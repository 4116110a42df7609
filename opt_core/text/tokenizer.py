"""Text to ids and back: OPT's byte-level BPE, with the ids `transformers` gives.

Two things are done here rather than by the library underneath: the beginning-of-text token is put
in front exactly once, whatever the files' own post-processor does, and ids are turned into bytes,
so that streaming, stop strings and `decode` cannot disagree.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from opt_core.adapters.folders import tokenizer_folder
from opt_core.compatibility.keras_hub_tokenizer import KerasHubTokenizer
from opt_core.compatibility.kinds import TokenizerKind
from opt_core.compatibility.tokenizer import TokenizerCompatibility
from opt_core.errors import TokenizerError
from opt_core.hub import TOKENIZER_FILES, resolve
from opt_core.text import assembly, byte_level, tensors, tokenizer_files, tokenizer_parts
from opt_core.text.encoding import Encoding, Rows
from opt_core.text.texts import pairs_of
from opt_core.text.tokenizer_files import LoadedTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding as LibraryEncoding
    from tokenizers import Tokenizer


class OPTTokenizer(TokenizerKind, TokenizerCompatibility, KerasHubTokenizer):
    """OPT's tokenizer; also Galactica's and those of fine-tunes. Made by `from_pretrained`.

    Special tokens (`pad_token`, `eos_token_id` and so on), `padding_side`, `truncation_side`,
    `add_bos_token` and `model_max_length` are attributes, and may be set.

    Args:
        vocab: The id of every token, or a vocab.json.
        merges: Pairs of tokens ("a b", or two strings), the first ones first, or a merges.txt.
        **settings: Entries of tokenizer_config.json, such as `pad_token="[PAD]"`. `vocabulary` and
            `vocab_file`, `merges_file` are other names of the two files, `tokenizer_object` is a
            tokenizer of the `tokenizers` library and `tokenizer_file` one of its files.

    Raises:
        TokenizerError: They contradict each other, or there is no setting of such a name.
    """

    def __init__(self, vocab: Any = None, merges: Any = None, **settings: Any) -> None:
        self.loaded = tokenizer_parts.from_parts(vocab, merges, settings)

    @classmethod
    def from_loaded(cls, loaded: LoadedTokenizer) -> "OPTTokenizer":
        """Makes a tokenizer of what `opt_core.text.tokenizer_files` read."""
        tokenizer = cls.__new__(cls)
        tokenizer.loaded = loaded
        return tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        cache_dir: str | PathLike[str] | None = None,
        subfolder: str = "",
        **settings: Any,
    ) -> "OPTTokenizer":
        """Reads a tokenizer from a folder or a hub repository.

        Args:
            path_or_hub_id: Folder, hub id such as "facebook/opt-125m", or "mini".
            revision: See `opt_core.hub.resolve`, also for the next ones.
            token: Access token.
            local_files_only: Whether to use the hub's local cache only.
            cache_dir: Folder of that cache.
            subfolder: Folder of the repository that the files are in.
            **settings: Entries of tokenizer_config.json in place of the file's: `padding_side`,
                `pad_token`, `bos_token`, `add_bos_token`, `model_max_length` and so on.

        Raises:
            TokenizerError: Its files are missing, damaged, or describe no byte-level BPE; or there
                is no setting of such a name.
        """
        place: Any = settings.pop("pretrained_model_name_or_path", path_or_hub_id)
        changes = tokenizer_parts.check_settings(settings)
        where: dict[str, Any] = {"cache_dir": cache_dir, "subfolder": subfolder}
        path = resolve(
            place,
            files=(),
            optional=TOKENIZER_FILES,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            **{name: value for name, value in where.items() if value},
        )
        path = tokenizer_folder(
            path, revision=revision, token=token, local_files_only=local_files_only
        )
        return cls.from_loaded(
            tokenizer_files.load(path if path.is_dir() else path.parent, **changes)
        )

    def save_pretrained(
        self,
        folder: str | PathLike[str] | None = None,
        push_to_hub: bool = False,
        filename_prefix: str | None = None,
        **others: Any,
    ) -> tuple[str, ...]:
        """Writes the files `transformers` reads into a folder (made if missing).

        Args:
            folder: Where to; `save_directory` is another name of it.
            push_to_hub: Not done here.
            filename_prefix: Put before the files' names, with a dash.
            **others: Without effect.

        Returns:
            The files.
        """
        if push_to_hub:
            raise TokenizerError(
                "push_to_hub: save into a folder and use huggingface_hub's upload_folder"
            )
        given: Any = others.get("save_directory", folder)
        if given is None:
            raise TokenizerError("save_pretrained: expected a folder")
        target = Path(given)
        if filename_prefix is None:
            tokenizer_files.save(self.loaded, target)
            return tuple(
                str(target / name) for name in TOKENIZER_FILES if (target / name).is_file()
            )
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target) as stage:
            tokenizer_files.save(self.loaded, Path(stage))
            files = sorted(Path(stage).iterdir())
            return tuple(
                str(file.replace(target / f"{filename_prefix}-{file.name}")) for file in files
            )

    def __repr__(self) -> str:
        named = (f"{name}={text!r}" for name, text in self.special_tokens_map.items())
        return (
            f"OPTTokenizer({self.name_or_path!r}, {len(self)} tokens, {', '.join(named)}, "
            f"add_bos_token={self.add_bos}, padding_side={self.padding_side!r})"
        )

    def encode(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        """The ids of one text.

        Args:
            text: Any text. Where it spells a special token ("</s>"), that one's id stands for it.
            text_pair: A second text, to follow it.
            add_special_tokens: Whether to begin with the beginning-of-text token, where the model
                expects one.
            **options: As of `__call__`.

        Returns:
            A list of ids, or with `return_tensors` a tensor [1, T].

        Raises:
            TokenizerError: `text` is not a string, or contains half of a surrogate pair.
        """
        if text_pair is None and not options and isinstance(text, str):
            begin = self._begin(add_special_tokens)
            ids = self._encoded([text])[0].ids
            return ids if begin is None else [begin[1], *ids]
        options["add_special_tokens"] = add_special_tokens
        return self(text, text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        add_prefix_space: bool = False,
        **others: Any,
    ) -> Encoding:
        """Encodes one text or several; arguments and results are `transformers`'.

        What comes back depends on what is asked for:

        - nothing: lists. One text gives one flat list of ids, several give a list for each, as
          long as it is. A model takes either: several lists are padded on `padding_side` when
          NumPy or a model makes an array of them (see `Rows`).
        - `return_tensors`: that framework's tensors [B, T], which need rows of one length.
        - `padding_side` without `padding` or `return_tensors`, which means nothing in
          `transformers`: NumPy, int32 [B, T], padded to the longest.

        Args:
            text: One text or several; a pair is a tuple of two. In `tf.data.Dataset.map` a tensor
                of strings will do: ids and mask are padded to the longest then.
            text_pair: As many second texts, each to follow its first one. The beginning-of-text
                token is put before the second one too, as OPT's original tokenizer did.
            add_special_tokens: Whether to begin with the beginning-of-text token, where the model
                expects one.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first" cuts rows to `max_length`; "only_first",
                "only_second" of a pair that text alone.
            max_length: Most tokens of a row. Cuts, unless `padding` or `truncation` says otherwise.
            stride: Tokens that a row of cut-off ones repeats.
            is_split_into_words: Whether a text is a list of words.
            pad_to_multiple_of: Padded rows are as long as a multiple of this.
            padding_side: In place of the attribute, "left" or "right".
            return_tensors: "np", "pt", "tf" or "jax".
            return_token_type_ids: Whether to say which text of a pair a token is of, 0 or 1.
            return_attention_mask: False leaves the mask out.
            return_overflowing_tokens: Whether cut-off tokens make rows of their own, with
                "overflow_to_sample_mapping".
            return_special_tokens_mask: Whether to say which tokens are special.
            return_offsets_mapping: Whether to give each token's characters, (first, last + 1).
            return_length: Whether to give the rows' lengths.
            add_prefix_space: Whether texts begin with a space, as words inside of one do.
            **others: `split_special_tokens`, whether special tokens in a text are text there;
                `pad_to_max_length`, the older word for `padding="max_length"`. Anything else is
                named in a warning, or refused where it nearly is one of these.

        Returns:
            "input_ids", "attention_mask" (1 for tokens, 0 for padding), and what was asked for.

        Raises:
            TokenizerError: A text is no string, the texts do not pair up, or they cannot be padded
                or cut as asked.
        """
        splits = bool(others.pop("split_special_tokens", False))
        if others.pop("pad_to_max_length", False) and not padding:
            padding = "max_length"
        self.check_call_options(others)
        as_arrays = padding_side is not None and padding is None and return_tensors is None
        side = assembly.side("padding_side", padding_side or self.padding_side)
        if tensors.is_symbolic(text):
            options: dict[str, Any] = {
                "add_special_tokens": add_special_tokens, "truncation": truncation,
                "padding": padding, "max_length": max_length, "padding_side": side,
                "pad_to_multiple_of": pad_to_multiple_of,
            }  # fmt: skip
            return Encoding(tensors.in_graph(lambda texts: self(texts, **options), text))
        if isinstance(text, list) and not text and not (return_tensors or as_arrays):
            return Encoding({"input_ids": [], "attention_mask": []})
        pad = self.pad_token_id
        firsts, seconds, is_batch = pairs_of(text, text_pair, is_split_into_words)
        limits = assembly.limits(padding, truncation, max_length, stride, self.model_max_length)
        assembly.check_multiple(limits, pad_to_multiple_of)
        groups = assembly.assemble(
            self._encoded(firsts, is_split_into_words, add_prefix_space, splits),
            None
            if seconds is None
            else self._encoded(seconds, is_split_into_words, add_prefix_space, splits),
            self._begin(add_special_tokens),
            limits,
            self.truncation_side,
        )
        rows = [
            row for group in groups for row in group[: None if return_overflowing_tokens else 1]
        ]
        if limits.padding:
            assembly.pad(rows, self.pad_token, pad, limits, pad_to_multiple_of, side)
        columns = assembly.columns(
            rows,
            token_type_ids=bool(return_token_type_ids),
            attention_mask=return_attention_mask is not False,
            special_tokens_mask=return_special_tokens_mask,
            offset_mapping=return_offsets_mapping,
        )
        fills = assembly.fills(pad)
        made = Encoding(columns, rows)
        made.update({name: Rows(columns[name], fills[name], side) for name in fills & made.keys()})
        if not (is_batch or return_overflowing_tokens or return_tensors or as_arrays):
            made.update({name: column[0] for name, column in columns.items()})
        if return_overflowing_tokens:
            sources = [i for i, group in enumerate(groups) for _ in group]
            made["overflow_to_sample_mapping"] = sources
        if return_length:
            made["length"] = [len(ids) for ids in columns["input_ids"]]
        if as_arrays:
            made.update({n: np.asarray(v) for n, v in made.items() if isinstance(v, Rows)})
        return made.convert_to_tensors(return_tensors)

    def backend(self) -> "Tokenizer":
        """A copy of the library's tokenizer underneath: for other settings than ours.

        Its ids begin with no special token unless it is asked for them.
        """
        return copy.deepcopy(self.loaded.backend)

    def _begin(self, add_special_tokens: bool) -> tuple[str, int] | None:
        """The token that texts begin with, and its id; None: with none."""
        bos, bos_id = self.bos_token, self.bos_token_id
        wanted = add_special_tokens and self.add_bos
        return (bos, bos_id) if wanted and bos is not None and bos_id is not None else None

    def _encoded(
        self,
        texts: Sequence[Any],
        is_split_into_words: bool = False,
        add_prefix_space: bool = False,
        splits: bool = False,
    ) -> "list[LibraryEncoding]":
        for i, text in enumerate(texts):
            for part in text if is_split_into_words else (text,):
                self._check_text(part, i)
        options = {"add_special_tokens": False, "is_pretokenized": is_split_into_words}
        backend: Any = self._prefixing if add_prefix_space else self.loaded.backend
        if splits:
            backend = copy.deepcopy(backend)
            backend.encode_special_tokens = True
        if len(texts) == 1:  # without the library's threads, which forbid a later fork
            return [backend.encode(texts[0], **options)]
        return backend.encode_batch(list(texts), **options)

    def _check_text(self, text: Any, i: int) -> None:
        if not isinstance(text, str):
            raise TokenizerError(f"text {i}: expected a string, received {type(text).__name__}")
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text {i}: character {error.start} ({text[error.start]!r}) is half of a surrogate "
                "pair and has no UTF-8 form; replace it"
            ) from None
        if self._unencodable_bytes and not self._unencodable_bytes.isdisjoint(encoded):
            added = "|".join(map(re.escape, self.added_tokens_encoder)) or "$^"
            rest = re.sub(added, "", text).encode("utf-8")
            for byte in rest:
                if byte in self._unencodable_bytes:
                    raise TokenizerError(
                        f"text {i}: the vocabulary has no token for its byte 0x{byte:02x}"
                    )

    @cached_property
    def _prefixing(self) -> "Tokenizer":
        """The tokenizer that puts a space before a text."""
        made = OPTTokenizer.from_loaded(replace(self.loaded, backend=self.backend()))
        made.add_prefix_space = True
        return made.loaded.backend

    @cached_property
    def _unencodable_bytes(self) -> frozenset[int]:
        return byte_level.unencodable_bytes(self.loaded.backend)
