"""A tokenizer's special tokens, added tokens and settings, as attributes: read, or set."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, overload

from opt_core.errors import TokenizerError
from opt_core.text import assembly
from opt_core.text.tokenizer_files import NAMES, LoadedTokenizer, token_text

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_DERIVED = ("_bytes", "_prefixing", "_special_ids", "_unencodable_bytes")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class _Token:
    """A special token's text; None where there is none. Set it, and it is in force."""

    def __init__(self, name: str, explanation: str) -> None:
        self._name, self.__doc__ = name, explanation

    @overload
    def __get__(self, owner: None, kind: type) -> "_Token": ...
    @overload
    def __get__(self, owner: "TokenizerAttributes", kind: type) -> str | None: ...
    def __get__(self, owner: "TokenizerAttributes | None", kind: type) -> "_Token | str | None":
        return self if owner is None else owner.loaded.named.get(self._name)

    def __set__(self, owner: "TokenizerAttributes", token: Any) -> None:
        owner.name_token(self._name, token)


class _TokenId:
    """A special token's id; None where there is no token, or where it is not in the vocabulary."""

    def __init__(self, name: str, explanation: str) -> None:
        self._name, self.__doc__ = name, explanation

    @overload
    def __get__(self, owner: None, kind: type) -> "_TokenId": ...
    @overload
    def __get__(self, owner: "TokenizerAttributes", kind: type) -> int | None: ...
    def __get__(self, owner: "TokenizerAttributes | None", kind: type) -> "_TokenId | int | None":
        if owner is None:
            return self
        text = owner.loaded.named.get(self._name)
        return None if text is None else owner.loaded.backend.token_to_id(text)

    def __set__(self, owner: "TokenizerAttributes", token_id: int | None) -> None:
        text = None if token_id is None else owner.loaded.backend.id_to_token(int(token_id))
        if token_id is not None and text is None:
            raise TokenizerError(f"{self._name}_id: no token has id {token_id}")
        owner.name_token(self._name, text)


class TokenizerAttributes:
    """Special tokens by their names, tokens added to the vocabulary, settings."""

    loaded: LoadedTokenizer
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    bos_token = _Token("bos_token", 'What a text begins with ("</s>" for OPT).')
    eos_token = _Token("eos_token", 'What a text ends with ("</s>", for OPT the same one).')
    unk_token = _Token("unk_token", "Stands for what the vocabulary cannot spell: nothing, here.")
    sep_token = _Token("sep_token", "None for OPT.")
    pad_token = _Token("pad_token", 'What padding is made of ("<pad>" for OPT).')
    cls_token = _Token("cls_token", "None for OPT.")
    mask_token = _Token("mask_token", "None for OPT.")
    bos_token_id = _TokenId("bos_token", "Id of the beginning-of-text token (2 for OPT).")
    eos_token_id = _TokenId("eos_token", "Id of the end-of-text token (2, for OPT the same one).")
    unk_token_id = _TokenId("unk_token", "Id of the unknown token; byte-level BPE needs none.")
    sep_token_id = _TokenId("sep_token", "None for OPT.")
    pad_token_id = _TokenId("pad_token", "Id that padding is made of (1 for OPT).")
    cls_token_id = _TokenId("cls_token", "None for OPT.")
    mask_token_id = _TokenId("mask_token", "None for OPT.")

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, added ones left out; `len` counts those too."""
        return self.loaded.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Tokens in all, added ones included."""
        return self.loaded.backend.get_vocab_size(with_added_tokens=True)

    @property
    def add_bos(self) -> bool:
        """Whether a text starts with the beginning-of-text token (OPT yes, Galactica no)."""
        return self.loaded.add_bos

    @add_bos.setter
    def add_bos(self, value: bool) -> None:
        self.loaded.add_bos = bool(value)

    @property
    def padding_side(self) -> str:
        """Where padding goes: "left" for generation, "right" for training."""
        return self.loaded.kept.get("padding_side", "right")

    @padding_side.setter
    def padding_side(self, value: str) -> None:
        self.loaded.kept["padding_side"] = assembly.side("padding_side", value)

    @property
    def truncation_side(self) -> str:
        """Where texts that are too long are cut."""
        return self.loaded.kept.get("truncation_side", "right")

    @truncation_side.setter
    def truncation_side(self, value: str) -> None:
        self.loaded.kept["truncation_side"] = assembly.side("truncation_side", value)

    @property
    def model_max_length(self) -> int:
        """The longest row, for truncation without `max_length`; 10**30 where no file names one."""
        return self.loaded.kept.get("model_max_length", assembly.NO_LIMIT)

    @model_max_length.setter
    def model_max_length(self, value: int) -> None:
        self.loaded.kept["model_max_length"] = value

    @property
    def name_or_path(self) -> str:
        """Where it was read from."""
        return str(self.loaded.source)

    @property
    def backend_tokenizer(self) -> "Tokenizer":
        """The `tokenizers` library's own, which puts no special token in front."""
        return self.loaded.backend

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens that have no name of their own."""
        return list(self.loaded.extra)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Iterable[Any]) -> None:
        self.loaded.extra = [token_text(token, "additional_special_tokens") for token in tokens]
        self.forget()

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Their ids."""
        return [i for i in map(self.loaded.backend.token_to_id, self.loaded.extra) if i is not None]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Iterable[int]) -> None:
        tokens = [self.loaded.backend.id_to_token(int(i)) for i in ids]
        if None in tokens:
            raise TokenizerError(f"additional_special_tokens_ids: no token has one of {[*ids]}")
        self.additional_special_tokens = tokens

    extra_special_tokens = additional_special_tokens
    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The special tokens there are, by name."""
        made: dict[str, Any] = self._in_order()
        return made | ({_LISTS[0]: list(self.loaded.extra)} if self.loaded.extra else {})

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys([*self._in_order().values(), *self.loaded.extra]))

    def _in_order(self) -> dict[str, str]:
        """The special tokens that have names, the usual ones first."""
        named = self.loaded.named
        return {name: named[name] for name in NAMES if name in named} | named

    def __getattr__(self, name: str) -> Any:
        """A special token of a name of its own, such as `image_token`, or its id."""
        named: dict[str, str] = vars(self)["loaded"].named if "loaded" in vars(self) else {}
        if name in named:
            return named[name]
        if name.removesuffix("_id") in named and name.endswith("_token_id"):
            return self.loaded.backend.token_to_id(named[name.removesuffix("_id")])
        return super().__getattribute__(name)  # which says why there is none

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        found = map(self.loaded.backend.token_to_id, self.all_special_tokens)
        return [token_id for token_id in found if token_id is not None]

    @property
    def added_tokens_decoder(self) -> "dict[int, AddedToken]":
        """The tokens that are matched whole in a text, by id."""
        return dict(sorted(self.loaded.backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The tokens that are matched whole in a text, and their ids."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens that are matched whole in a text, and their ids."""
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens that are matched whole in a text; those that have no id get the next ones.

        A model needs a row for each: `model.resize_token_embeddings(len(tokenizer))`.

        Args:
            new_tokens: One token or several, strings or the library's `AddedToken`.
            special_tokens: Whether they are special, so that `decode` can leave them out.

        Returns:
            How many were new.
        """
        from tokenizers import AddedToken

        given: list[Any] = (
            [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        )
        tokens: list[Any] = [
            AddedToken(token, special=special_tokens, normalized=not special_tokens)
            if isinstance(token, str)
            else token
            for token in given
        ]
        for token in tokens:
            token_text(token, "new_tokens")
        backend: Any = self.loaded.backend
        add = backend.add_special_tokens if special_tokens else backend.add_tokens
        count: int = add(tokens)
        self.forget()
        return count

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Names special tokens, and adds to the vocabulary those that it lacks.

        Args:
            special_tokens_dict: Such as `{"pad_token": "[PAD]"}`; a list of tokens without names
                is `additional_special_tokens`.
            replace_additional_special_tokens: Whether that list replaces the one there is.

        Returns:
            How many were new.

        Raises:
            TokenizerError: There is no special token of such a name.
        """
        count = 0
        for name, value in special_tokens_dict.items():
            if name in _LISTS:
                texts = [token_text(token, name) for token in value]
                count += self.add_tokens(value, special_tokens=True)
                kept = [] if replace_additional_special_tokens else self.loaded.extra
                self.loaded.extra = list(dict.fromkeys([*kept, *texts]))
            else:
                self.name_token(name, value)
                count += self.add_tokens([value], special_tokens=True)
        self.forget()
        return count

    def name_token(self, name: str, token: Any) -> None:
        """Makes a text the special token of a name; None takes the name away.

        Raises:
            TokenizerError: There is no such name, or it is no text.
        """
        if name not in NAMES:
            known = ", ".join((*NAMES, _LISTS[0]))
            raise TokenizerError(f"{name}: no special token; expected one of {known}")
        if token is None:
            self.loaded.named.pop(name, None)
        else:
            self.loaded.named[name] = token_text(token, name)
        self.forget()

    def forget(self) -> None:
        """Drops what was worked out from the tokens there were."""
        for name in _DERIVED:
            self.__dict__.pop(name, None)
