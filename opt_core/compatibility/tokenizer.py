"""A tokenizer's other methods in `transformers`, and those of KerasHub's, over its own."""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from opt_core.compatibility.config_keys import near_miss
from opt_core.compatibility.notices import notice
from opt_core.compatibility.tokenizer_extras import TokenizerExtras
from opt_core.errors import TokenizerError
from opt_core.json_files import write_json
from opt_core.text import assembly, byte_level, tokenizer_files
from opt_core.text.chat_templates import render
from opt_core.text.encoding import Encoding
from opt_core.text.texts import rows_of
from opt_core.text.tokenizer_files import NAMES
from opt_core.text.vocabulary_files import write_merges

if TYPE_CHECKING:
    from opt_core.text.tokenizer import OPTTokenizer

_WITHOUT_EFFECT = {"verbose", "tokenizer_kwargs", "return_dict"}
_OF_A_CALL = (
    *("text_pair", "add_special_tokens", "padding", "truncation", "max_length", "stride"),
    *("is_split_into_words", "pad_to_multiple_of", "padding_side", "return_tensors"),
    *("return_token_type_ids", "return_attention_mask", "return_overflowing_tokens"),
    *("return_special_tokens_mask", "return_offsets_mapping", "return_length"),
    *("add_prefix_space", "split_special_tokens"),
)


class TokenizerCompatibility(TokenizerExtras):
    """Methods by which code written for `transformers` or KerasHub calls a tokenizer."""

    is_fast = True
    clean_up_tokenization_spaces = False
    pad_token_type_id = 0
    verbose = False

    if TYPE_CHECKING:

        def __call__(self, text: Any = None, text_pair: Any = None, **options: Any) -> Encoding:
            """Encodes texts; see `OPTTokenizer`."""
            ...

    @property
    def add_bos_token(self) -> bool:
        """Whether a text starts with the beginning-of-text token."""
        return self.add_bos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self.add_bos = value

    @property
    def add_prefix_space(self) -> bool:
        """Whether texts begin with a space, as words inside of one do."""
        cutter: Any = self.loaded.backend.pre_tokenizer
        return bool(getattr(cutter, "add_prefix_space", False))

    @add_prefix_space.setter
    def add_prefix_space(self, value: bool) -> None:
        cutter: Any = self.loaded.backend.pre_tokenizer
        if value and not hasattr(cutter, "add_prefix_space"):
            kind = type(cutter).__name__
            raise TokenizerError(f"add_prefix_space: expected a ByteLevel cutter, found {kind}")
        cutter.add_prefix_space = bool(value)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations; OPT's have none."""
        return self.loaded.kept.get("chat_template")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.loaded.kept["chat_template"] = template

    @property
    def max_len_single_sentence(self) -> int:
        """Most tokens of a text, special ones left out."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Most tokens of a pair, special ones left out."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def vocab(self) -> dict[str, int]:
        """The id of every token."""
        return self.get_vocab()

    @staticmethod
    def check_call_options(options: Mapping[str, Any]) -> None:
        """Refuses slips, and texts to learn; what has no meaning is named in a warning."""
        for name, value in options.items():
            if value is not None and name in ("text_target", "text_pair_target"):
                raise TokenizerError(
                    f"{name}: a causal language model has no texts of its own to learn; its labels "
                    "are the input ids"
                )
            if name in _WITHOUT_EFFECT or value is None:
                continue
            if near := near_miss(name, _OF_A_CALL):
                raise TokenizerError(f"{name}: no argument of a tokenizer; did you mean {near!r}?")
            notice(f"{name}={value!r}: no argument of a tokenizer, without effect")

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The same as calling the tokenizer."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **options: Any) -> Any:
        """The same as calling the tokenizer with several texts."""
        return self(list(batch_text_or_text_pairs), **options)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> Encoding:
        """Pads rows that were encoded before, as a data collator does.

        Args:
            encoded_inputs: One dictionary of rows, or a list of dictionaries of one row each.
                Entries that this tokenizer does not make, such as labels, are not padded.
            padding: As of `__call__`.
            max_length: As there.
            pad_to_multiple_of: As there.
            padding_side: As there.
            return_attention_mask: False makes no mask where there is none.
            return_tensors: As there; None: tensors of those that were given, if they were.
            verbose: Without effect.

        Raises:
            TokenizerError: There are no ids, or no padding token.
        """
        given, is_batch, kind = rows_of(encoded_inputs)
        return_tensors = return_tensors or kind
        if "input_ids" not in given:
            there = ", ".join(map(str, given)) or "nothing"
            raise TokenizerError(f"pad: expected rows with input_ids, received {there}")
        if return_attention_mask is not False and "attention_mask" not in given:
            given["attention_mask"] = [[1] * len(ids) for ids in given["input_ids"]]
        limits = assembly.limits(padding, False, max_length, 0, self.model_max_length)
        side = assembly.side("padding_side", padding_side or self.padding_side)
        if limits.padding:
            pad = self.pad_token_id
            given = assembly.padded(given, pad, limits, pad_to_multiple_of, side)
        if not is_batch and not return_tensors:
            given = {name: column[0] for name, column in given.items()}
        return Encoding(given).convert_to_tensors(return_tensors)

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[str]:
        """The tokens of a text, as the vocabulary spells them; options are those of a call."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return self.loaded.backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or those of several; a text that is none has the unknown one's."""
        if tokens is None:
            return None
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.loaded.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or those of several; None where no token has it."""
        if np.ndim(ids) == 0:
            return self.loaded.backend.id_to_token(int(ids))
        row = [int(i) for i in ids]
        return [
            self.loaded.backend.id_to_token(i)
            for i in row
            if not (skip_special_tokens and self.is_special(i))
        ]

    def _convert_id_to_token(self, index: int) -> str | None:
        """The token of an id: `transformers`' `StopStringCriteria` asks for it so."""
        return self.convert_ids_to_tokens(index)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens as the vocabulary spells them."""
        added = self.added_tokens_encoder
        pieces = (byte_level.spelled_bytes(token, token in added) for token in tokens)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens that a call puts before a text, or a pair."""
        has_begin = self.add_bos and self.bos_token_id is not None
        return has_begin * (1 + bool(pair))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one text or two with the special tokens in their places."""
        bos = self.bos_token_id
        begin = [bos] if bos is not None and self.num_special_tokens_to_add() else []
        second = [] if token_ids_1 is None else [*begin, *token_ids_1]
        return [*begin, *token_ids_0, *second]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: OPT does not tell the texts of a pair apart."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for special tokens and 0 for others.

        Args:
            token_ids_0: Ids of a text.
            token_ids_1: Of a second one.
            already_has_special_tokens: Whether they are in `token_ids_0`; else those are counted
                that a call would add.
        """
        if already_has_special_tokens:
            special = {*self.all_special_ids}
            return [int(i in special) for i in token_ids_0]
        begin = [1] * self.num_special_tokens_to_add()
        second = [] if token_ids_1 is None else [*begin, *([0] * len(token_ids_1))]
        return [*begin, *([0] * len(token_ids_0)), *second]

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Iterable[Any] | None = None,
        **options: Any,
    ) -> "OPTTokenizer":
        """Trains a tokenizer of the same kind on other texts.

        Args:
            text_iterator: Texts, or lists of texts.
            vocab_size: Its tokens, the special ones, which keep their order, included.
            length: How many there are, for a progress bar.
            new_special_tokens: More special tokens.
            **options: Of the `tokenizers` library's `BpeTrainer`.
        """
        from tokenizers import Tokenizer, pre_tokenizers, trainers

        loaded = self.loaded
        contents: dict[str, Any] = json.loads(loaded.backend.to_str())
        contents["model"] |= {"vocab": {}, "merges": []}
        contents["added_tokens"] = []
        special: list[Any] = [*self.added_tokens_decoder.values(), *(new_special_tokens or ())]
        backend: Any = Tokenizer.from_str(json.dumps(contents))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        settings: dict[str, Any] = {"initial_alphabet": alphabet, "show_progress": False, **options}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, **settings)
        backend.train_from_iterator(text_iterator, length=length, trainer=trainer)
        named = {name: loaded.named.get(name) for name in NAMES}
        extra = [*loaded.extra, *(new_special_tokens or ())]
        changes = {"add_bos_token": loaded.add_bos, "additional_special_tokens": extra}
        made = tokenizer_files.adopt(backend, {**named, **changes, **loaded.kept}, "trained")
        return cast(Any, type(self)).from_loaded(made)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        tools: Any = None,
        documents: Any = None,
        continue_final_message: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Lays conversations out as text, by a template, and encodes them.

        Args:
            conversation: Messages with "role" and "content", or a list of several conversations.
            chat_template: In place of the tokenizer's own, or the name of one of its own.
            add_generation_prompt: Whether to end where an answer begins.
            tokenize: Whether to return ids and not the text.
            return_dict: Whether to return ids and mask.
            tools: For the template.
            documents: For the template.
            continue_final_message: Whether the text ends with the last message's content.
            tokenizer_kwargs: More options.
            **options: As of `__call__`.

        Raises:
            TokenizerError: There is no template: OPT was not trained on conversations.
        """
        template = self.get_chat_template(chat_template, tools)
        given = list(conversation)
        is_batch = bool(given) and isinstance(given[0], list | tuple)
        texts: list[str] = []
        for messages in given if is_batch else [given]:
            text = render(
                template,
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens_map,
            )
            if continue_final_message:
                last = str(messages[-1]["content"]).strip()
                text = text[: text.rindex(last) + len(last)]
            texts.append(text)
        result: Any = texts if is_batch else texts[0]
        if not tokenize:
            return result
        options = {"add_special_tokens": False, **options, **(tokenizer_kwargs or {})}
        encoded = self(result, **options)
        return encoded if return_dict else encoded["input_ids"]

    def save_vocabulary(
        self, save_directory: str | PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, str]:
        """Writes vocab.json and merges.txt, without added tokens or settings.

        Args:
            save_directory: The folder, which is there.
            filename_prefix: Put before the files' names, with a dash.

        Returns:
            The two files.
        """
        model: dict[str, Any] = json.loads(self.loaded.backend.to_str())["model"]
        start = "" if filename_prefix is None else f"{filename_prefix}-"
        files = [Path(save_directory, start + name) for name in ("vocab.json", "merges.txt")]
        write_json(files[0], model["vocab"])
        write_merges(files[1], model["merges"])
        return str(files[0]), str(files[1])

    def push_to_hub(self, repo_id: str, **_: Any) -> None:
        """Not done here.

        Raises:
            TokenizerError: Always; it says what to use.
        """
        raise TokenizerError(
            f"push_to_hub: save_pretrained into a folder, then huggingface_hub's upload_folder("
            f"repo_id={repo_id!r}, folder_path=...)"
        )
