"""KerasHub's names and habits, for the models of TensorFlow."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.compatibility import keras_hub
from opt_core.compatibility.keras_hub_preprocessor import (
    OPTCausalLMPreprocessor,
    read_preprocessor,
)
from opt_core.compatibility.refusals import refuse_attributes
from opt_core.config import OPTConfig
from opt_core.errors import UnsupportedError
from opt_core.params import param_specs
from opt_core.quantization import check_not_quantized, check_scheme
from opt_core.text.tokenizer import OPTTokenizer
from opt_tf import _private, checkpoint, lora, quantization


class KerasHubMethods:
    """Methods of KerasHub's tasks and backbones, which both are our models."""

    config: OPTConfig
    presets = keras_hub.PRESETS

    preprocessor: Any = None
    """The tokenizer that `fit` and `generate` turn texts into ids with."""

    @classmethod
    def from_preset(
        cls: Any, preset: str | PathLike[str], load_weights: bool = True, **options: Any
    ) -> Any:
        """Loads a model with its tokenizer, as KerasHub spells it.

        Args:
            preset: One of KerasHub's names, such as "opt_125m_en", or as in `from_pretrained`.
            load_weights: False: a freshly initialised model of the same size.
            **options: Those of `from_pretrained`; `preprocessor`, a tokenizer in place of the
                preset's, or None.
        """
        name = keras_hub.PRESETS.get(str(preset), preset)
        tokenizer = options.pop("preprocessor", cls.preprocessor_cls)
        if load_weights:
            model = cls.from_pretrained(name, **options)
        else:
            model = cls(OPTConfig.from_pretrained(name), **options)
        if tokenizer is cls.preprocessor_cls:
            tokenizer = tokenizer.from_pretrained(name) if cls.can_generate() else None
        model.preprocessor = tokenizer
        return model

    preprocessor_cls = OPTTokenizer

    def save_to_preset(
        self: Any, preset_dir: str | PathLike[str], max_shard_size: Any = 10
    ) -> None:
        """`save_pretrained`, of the tokenizer too.

        Args:
            preset_dir: Where to.
            max_shard_size: Gigabytes of a file at most.
        """
        self.save_pretrained(preset_dir, f"{max_shard_size}GB")
        if self.preprocessor is not None:
            self.preprocessor.save_pretrained(preset_dir)

    def save_assets(self: Any, path: str | PathLike[str]) -> None:
        """Puts the tokenizer's files into a folder of the .keras file, where Keras asks for it."""
        if self.preprocessor is not None:
            self.preprocessor.save_pretrained(path)

    def load_assets(self: Any, path: str | PathLike[str] | None) -> None:
        """Takes the tokenizer up that `save_assets` has written; None: it has written nothing."""
        if path is not None and any(Path(path).glob("*.json")):
            self.preprocessor = read_preprocessor(path)

    def save_lora_weights(self, filepath: Any) -> None:
        """Refused: adapters are saved in PEFT's files."""
        raise UnsupportedError("save_lora_weights is not supported: use opt_tf.lora.save_adapter")

    def load_lora_weights(self, filepath: Any) -> None:
        """Refused: adapters are loaded from PEFT's files."""
        raise UnsupportedError("load_lora_weights is not supported: use opt_tf.lora.load_adapter")

    def export_to_transformers(self: Any, path: str | PathLike[str]) -> None:
        """`save_to_preset`: our folders are those of `transformers`."""
        self.save_to_preset(path)

    @property
    def backbone(self: Any) -> Any:
        """KerasHub's name for `base_model`."""
        return self.base_model

    @property
    def token_embedding(self: Any) -> "TokenEmbedding":
        """The token embedding, whose call may be the product with it."""
        return TokenEmbedding(self.get_input_embeddings())

    @property
    def input(self: Any) -> dict[str, Any]:
        """Symbolic inputs of a functional model, by KerasHub's names."""
        if "input" not in self.programs:
            self.programs["input"] = {
                name: keras.Input((None,), dtype="int32", name=name) for name in keras_hub.INPUTS
            }
        return self.programs["input"]

    @property
    def output(self: Any) -> Any:
        """The model's result for `input`."""
        return self(self.input)

    def get_layer(self: Any, name: str | None = None, index: int | None = None) -> Any:
        """Keras' `get_layer`, which knows KerasHub's `transformer_layer_0` and so on as well.

        Args:
            name: The layer's.
            index: Its number in `layers`, in place of the name.
        """
        number = (name or "").removeprefix("transformer_layer_")
        if number != name and number.isdigit() and int(number) < self.config.num_hidden_layers:
            return self.base_model.decoder.layers[int(number)]
        base: Any = super()
        return base.get_layer(name, index)

    def quantize(self: Any, mode: str, **options: Any) -> None:
        """Keeps the weights so from now on, as `from_pretrained(quantize=...)` does; only to run.

        Args:
            mode: "int8" or "int4".
            **options: Keras' own, which have nothing to say here.
        """
        check_scheme(mode)
        check_not_quantized(self, "quantize")
        specs = param_specs(self.config, self.head)
        arrays = {spec.name: checkpoint.get_parameter(self, spec) for spec in specs}
        quantization.prepare(self, mode)
        layers: list[Any] = _private.sublayers(self)
        for layer in layers:
            if not layer.built:
                layer.build()
        self.quantized = self.base_model.quantized = mode
        for spec in specs:
            checkpoint.set_parameter(self, spec, arrays[spec.name])
        self._forget_programs()

    def enable_lora(self: Any, rank: int, target_layer_names: Any = None) -> None:
        """Puts adapters on queries and values, which alone are trained, as KerasHub does.

        Args:
            rank: Rank of the adapters; `opt_tf.lora.apply` has more to say.
            target_layer_names: Our names of other layers, such as "fc1".
        """
        targets = tuple(target_layer_names or ("q_proj", "v_proj"))
        lora.apply(self, rank, float(rank), targets)
        for spec in param_specs(self.config, self.head):
            checkpoint.locate(self, spec).trainable = False


class TokenEmbedding:
    """The token embedding as KerasHub has it: one layer for both ends of the model.

    Args:
        layer: Our layer, whose attributes it has.
    """

    def __init__(self, layer: Any):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, inputs: Any, reverse: bool = False) -> Any:
        """Rows (B, T, P) of ids (B, T); with `reverse` scores (B, T, V) of states (B, T, P)."""
        if reverse:
            return self._layer.attend(tf.convert_to_tensor(inputs))
        return self._layer(tf.convert_to_tensor(inputs))


class GenerationMethods:
    """Texts in place of ids, for the language model."""

    config: OPTConfig
    preprocessor: Any

    @tf.autograph.experimental.do_not_convert  # there is nothing for it in here, and much to read
    def generate(
        self,
        input_ids: Any = None,
        *args: Any,
        strip_prompt: bool = False,
        stop_token_ids: Any = "auto",
        **options: Any,
    ) -> Any:
        """As in every backend; of a text, or a list of texts, the texts that they go on to.

        Args:
            input_ids: See there; texts need `preprocessor`, a tokenizer.
            *args: See there.
            strip_prompt: Leave a text's own beginning out, as in KerasHub.
            stop_token_ids: KerasHub's name for `eos_token_id`.
            **options: See there.
        """
        base: Any = super()
        if stop_token_ids != "auto":
            options["eos_token_id"] = None if stop_token_ids is None else list(stop_token_ids)
        if keras_hub.are_keras_hubs(input_ids):
            return self._fill_rows(input_ids, **options)
        if isinstance(input_ids, tf.data.Dataset):
            found = [self.generate(batch, *args, **options) for batch in input_ids]
            return [text for texts in found for text in texts]
        texts = keras_hub.texts_of([input_ids] if isinstance(input_ids, str) else input_ids)
        if texts is None:
            return base.generate(input_ids, *args, **options)
        window, pad = self.config.max_position_embeddings, self.config.pad_token_id
        inputs = keras_hub.encode_texts(self.preprocessor, texts, pad, window, None, "left")
        longest = getattr(self.preprocessor, "sequence_length", None)
        if longest is not None and not {"max_length", "max_new_tokens"} & options.keys():
            options["max_length"] = longest
        ids = np.asarray(base.generate(**inputs, **options))
        ids = ids[:, inputs["input_ids"].shape[1] :] if strip_prompt else ids
        found = self.preprocessor.batch_decode(ids, skip_special_tokens=True)
        return found[0] if isinstance(input_ids, str) else found

    def _fill_rows(self: Any, inputs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Fills rows up that have their padding on the right, as KerasHub does.

        Args:
            inputs: `token_ids` and `padding_mask`, (B, W).
            **options: Those of `generate`.
        """
        ids, mask = (np.asarray(inputs[name]) for name in keras_hub.INPUTS)
        lengths, width = (mask != 0).sum(1), ids.shape[1]
        if lengths.min() == width:
            return {"token_ids": ids, "padding_mask": mask != 0}
        prompts, real = keras_hub.left_padded(ids, mask)
        base: Any = super()
        options = {"max_new_tokens": int(width - lengths.min())} | options
        found = base.generate(prompts, attention_mask=real, **options)
        settings = self.generation_config.replace(**options)
        return keras_hub.right_padded(found, width, lengths, settings.eos_ids)


def _field(name: str) -> property:
    return property(
        lambda self: getattr(self.config, name), doc=f"KerasHub's name of `config.{name}`."
    )


for _name, _own in keras_hub.FIELDS.items():
    setattr(KerasHubMethods, _name, _field(_own))
refuse_attributes(KerasHubMethods, keras_hub.REFUSED)
for _kind in (OPTTokenizer, OPTCausalLMPreprocessor):  # Keras makes no others of a configuration
    keras.saving.register_keras_serializable("opt")(_kind)
