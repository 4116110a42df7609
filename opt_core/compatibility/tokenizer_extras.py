"""A tokenizer's older and rarer methods and attributes in `transformers`."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

from opt_core.compatibility.refusals import refuse_methods
from opt_core.errors import TokenizerError
from opt_core.text.decoding import Decoding
from opt_core.text.encoding import Encoding
from opt_core.text.tokenizer_files import NAMES

REFUSED = {
    "prepare_seq2seq_batch": "OPT has no encoder; call the tokenizer",
    "save_chat_templates": "save_pretrained writes the template",
    "encode_message_with_chat_template": "use apply_chat_template on the whole conversation",
    "parse_response": "read the text that decode gives",
    "get_response_parser": "read the text that decode gives",
    "convert_to_native_format": "from_pretrained reads all formats",
    "bpe": "use tokenize",
}
"""Methods of `transformers` that there are not, and what to do instead."""


class TokenizerExtras(Decoding):
    """Methods that few programs call; each is a line or two over the tokenizer's own."""

    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [*NAMES, "additional_special_tokens"]
    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
    }
    pretrained_vocab_files_map: ClassVar[dict[str, Any]] = {}
    slow_tokenizer_class: ClassVar[Any] = None
    can_save_slow_tokenizer: ClassVar[bool] = True
    init_inputs: ClassVar[tuple[Any, ...]] = ()
    add_eos_token: ClassVar[bool] = False
    deprecation_warnings: ClassVar[dict[str, bool]] = {}
    _auto_class: ClassVar[Any] = None

    @property
    def encoder(self) -> dict[str, int]:
        """The id of every token, added ones left out."""
        return self.loaded.backend.get_vocab(with_added_tokens=False)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Notes the name, as `transformers` does for classes of a user's own."""
        cls._auto_class = getattr(auto_class, "__name__", auto_class)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The settings it was made with, and those that were set since."""
        named = {name: self.loaded.named.get(name) for name in NAMES}
        made = {**named, **self.loaded.kept, "add_bos_token": self.add_bos}
        return {**made, "name_or_path": self.name_or_path}

    @property
    def _tokenizer(self) -> Any:
        return self.backend_tokenizer

    @property
    def decoder(self) -> Any:
        """The part of the library's tokenizer that joins tokens."""
        return self.backend_tokenizer.decoder

    @property
    def model(self) -> Any:
        """The part of the library's tokenizer that has vocabulary and merges."""
        return self.backend_tokenizer.model

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """`special_tokens_map`, as it was called where tokens were objects."""
        return self.special_tokens_map

    @property
    def all_special_tokens_extended(self) -> list[str]:
        """`all_special_tokens`, as it was called where tokens were objects."""
        return self.all_special_tokens

    def sanitize_special_tokens(self) -> int:
        """Gives every special token an id; returns how many had none."""
        return self.add_tokens(self.all_special_tokens, special_tokens=True)

    def convert_added_tokens(self, obj: Any, **_: Any) -> Any:
        """A token, or several, as they are: files are read without it."""
        return obj

    def update_post_processor(self) -> None:
        """Without effect: the beginning-of-text token is put in front at each call."""

    def set_truncation_and_padding(self, *args: Any, **kwargs: Any) -> None:
        """Without effect: both are arguments of each call."""

    def prepare_for_tokenization(
        self, text: str, is_split_into_words: bool = False, **kwargs: Any
    ) -> tuple[str, dict[str, Any]]:
        """The text as it is."""
        return text, kwargs

    def as_target_tokenizer(self) -> AbstractContextManager[None]:
        """Without effect: labels are encoded as inputs are."""
        return nullcontext()

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that `apply_chat_template` takes.

        Args:
            chat_template: A template, or the name of one of the tokenizer's.
            tools: Without effect.

        Raises:
            TokenizerError: There is none.
        """
        own: Any = self.loaded.kept.get("chat_template")
        if isinstance(own, Mapping):
            named = cast("Mapping[str, str]", own)
            own = named.get(chat_template or "default")
            chat_template = None if chat_template in named else chat_template
        template = chat_template or own
        if template is None:
            raise TokenizerError(
                "apply_chat_template: this tokenizer has no chat_template (OPT was not trained on "
                "conversations); pass chat_template= or write the prompt as text"
            )
        return template

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Cuts ids of one text or two.

        Args:
            ids: Of the first text.
            pair_ids: Of the second one, or None.
            num_tokens_to_remove: How many.
            truncation_strategy: "longest_first", "only_first" or "only_second".
            stride: Tokens that what was cut off repeats.

        Returns:
            Both rows, and what was cut off from the one that was cut alone.

        Raises:
            TokenizerError: A text is shorter than what is to be removed.
        """
        rows = [list(ids), None if pair_ids is None else list(pair_ids)]
        strategy = str(getattr(truncation_strategy, "value", truncation_strategy))
        if num_tokens_to_remove <= 0 or strategy == "do_not_truncate":
            return rows[0] or [], rows[1], []
        if strategy == "longest_first" and rows[1] is not None:
            for _ in range(num_tokens_to_remove):
                longer = 0 if len(rows[0] or []) > len(rows[1]) else 1
                rows[longer] = self._cut(rows[longer] or [], 1)
            return rows[0] or [], rows[1], []
        which = 1 if strategy == "only_second" else 0
        row = rows[which] or []
        if len(row) <= num_tokens_to_remove:
            raise TokenizerError(
                f"truncation: {num_tokens_to_remove} tokens cannot be cut off a text of {len(row)}"
            )
        window = min(len(row), stride + num_tokens_to_remove)
        rest = row[:window] if self.truncation_side == "left" else row[-window:]
        rows[which] = self._cut(row, num_tokens_to_remove)
        return rows[0] or [], rows[1], rest

    def _cut(self, row: list[int], count: int) -> list[int]:
        return row[count:] if self.truncation_side == "left" else row[:-count]

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **options: Any,
    ) -> Encoding:
        """Lays ids out as a call does texts: special tokens, cutting, padding.

        Args:
            ids: Of a text, without special tokens.
            pair_ids: Of a second one, or None.
            add_special_tokens: As of `__call__`, as are the next ones.
            padding: See there.
            truncation: See there.
            max_length: See there.
            stride: See there.
            return_special_tokens_mask: See there.
            return_length: See there.
            **options: Of `pad`.
        """
        own: Any = self
        extra = own.num_special_tokens_to_add(pair_ids is not None) if add_special_tokens else 0
        strategy = "longest_first" if truncation is True else truncation or "do_not_truncate"
        over = len(ids) + len(pair_ids or ()) + extra - (max_length or self.model_max_length)
        first, second, rest = self.truncate_sequences(ids, pair_ids, over, strategy, stride)
        row = [*first, *(second or ())]
        if add_special_tokens:
            row = own.build_inputs_with_special_tokens(first, second)
        made: dict[str, Any] = {"input_ids": row, "attention_mask": [1] * len(row)}
        if return_special_tokens_mask:
            made["special_tokens_mask"] = (
                own.get_special_tokens_mask(first, second) if add_special_tokens else [0] * len(row)
            )
        if rest and options.pop("return_overflowing_tokens", False):
            made["overflowing_tokens"], made["num_truncated_tokens"] = rest, over
        if return_length:
            made["length"] = len(row)
        return own.pad(made, padding, max_length, **_known(options))


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    names: Sequence[str] = ("pad_to_multiple_of", "padding_side", "return_tensors", "verbose")
    return {name: value for name, value in options.items() if name in names}


refuse_methods(TokenizerExtras, REFUSED, TokenizerError, "{name} is not supported: {advice}")
