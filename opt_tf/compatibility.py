"""The layer for code written for `transformers` and KerasHub: what TensorFlow has to do for it."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.compatibility import keras_hub, keras_two
from opt_core.compatibility.calls import OPTIONS
from opt_core.compatibility.methods import MethodsMixin, refuse_to_generate
from opt_core.compatibility.refusals import refuse_attributes, refuse_methods
from opt_core.dialects import KERAS
from opt_core.errors import ArgumentError, ConfigError, UnsupportedError
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import check_not_quantized
from opt_tf import _private, checkpoint, losses
from opt_tf.keras_hub import KerasHubMethods
from opt_tf.linear import Embedding, Linear

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel

_ALIASES = ("base_model", "backbone", "_decoder", "token_embedding", "input", "output")
"""Properties that are parts of a model under other names."""


def name_inputs(
    model: Any, first: Any, others: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a model's call by name: Keras takes positional ones for tensors.

    Args:
        model: The model.
        first: Its first argument: ids, or, as Keras and `transformers` have it, several inputs in a
            mapping, or in a tuple or list in the order of the parameters.
        others: Its other positional arguments.
        named: Arguments by name.

    Raises:
        ArgumentError: The third input may be one of two, and nothing tells which.
    """
    explicit = named
    if isinstance(first, Mapping):
        renamed = {keras_hub.INPUTS.get(str(name), name): value for name, value in first.items()}
        values = explicit = {**renamed, **named}
    else:
        if isinstance(first, tuple | list) and first and len(getattr(first[0], "shape", ())) == 2:
            first, others = first[0], tuple(first[1:])
        if others and _is_cache(others[0]):  # transformers' order
            filled = (*others, *(None,) * (5 - len(others)))
            past, mask, places, heads, embeds, *rest = filled
            others = (mask, places, embeds, past, *rest[:1])
            named = {"head_mask": heads, **named}
        elif len(others) > 1 and others[0] is None and others[1] is not None:
            raise ArgumentError(
                "the third input, without a second, is attention_mask in transformers and "
                "position_ids here; pass it by name"
            )
        values = {**inspect.signature(model.call).bind_partial(first, *others).arguments, **named}
    if any(isinstance(value, keras.KerasTensor) for value in values.values()):
        values.setdefault("use_cache", False)  # a functional model knows its outputs beforehand
    elif explicit.get("past_key_values", False) is None and values.get("use_cache") is None:
        # Whoever passes what is None so far goes on with what is returned, traced or not.
        values["use_cache"] = model.config.use_cache and not values.get("training")
    return {k: _Covered(v) if k in OPTIONS and tf.is_tensor(v) else v for k, v in values.items()}


class _Covered:
    """A tensor among a call's options, which Keras refuses to see beside what is none."""

    def __init__(self, tensor: Any):
        self.tensor = tensor


def _uncovering(call: Callable[..., Any]) -> Callable[..., Any]:
    """A `call` that finds the tensors again."""

    @functools.wraps(call)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        found = {k: v.tensor if isinstance(v, _Covered) else v for k, v in options.items()}
        return call(self, *args, **found)

    return run


def _is_cache(value: Any) -> bool:
    """Whether it is a cache, or keys and values, and no mask."""
    is_pairs = isinstance(value, tuple | list) and value and isinstance(value[0], tuple | list)
    return hasattr(value, "keys") or bool(is_pairs and hasattr(value[0][0], "shape"))


class ModelMethods(KerasHubMethods, MethodsMixin):
    """Methods of every model, beside `keras.Model`'s own."""

    framework: ClassVar[str] = "tf"
    supports_xla_generation: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "call" in vars(cls):
            cls.call = _uncovering(vars(cls)["call"])

    def __repr__(self: Any) -> str:
        return self._described()

    __str__ = __repr__

    def build_in_name_scope(self: Any) -> None:
        """`build`, as `transformers` called it."""
        self.build()

    def save_spec(self, dynamic_batch: bool = True) -> Any:
        """Refused: `tf.lite.TFLiteConverter.from_keras_model` asks for it.

        Args:
            dynamic_batch: Without effect.
        """
        raise UnsupportedError(
            "TFLiteConverter.from_keras_model is not supported: use model.export(path, "
            'format="litert"), which takes the converter\'s settings by name'
        )

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """Inputs of `serving`: ids and mask, (B, T) of any sizes."""
        return {
            name: tf.TensorSpec((None, None), tf.int32, name)
            for name in (self.main_input_name, "attention_mask")
        }

    @property
    def serving(self) -> Any:
        """The model as a `tf.function` of `input_signature`."""
        return tf.function(self.eager_serving, input_signature=[self.input_signature])

    def eager_serving(self: Any, inputs: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        """The model's output for a dict of inputs, as an export returns it."""
        return dict(self.serving_output(self(dict(inputs))))

    def serving_output(self, output: Any) -> Any:
        """An output of tensors alone; those of all layers stacked, no cache."""
        present = {name: value for name, value in output.items() if name != "past_key_values"}
        return type(output)(
            (name, tf.stack(value) if isinstance(value, tuple) else value)
            for name, value in present.items()
        )

    def export(
        self: Any,
        filepath: str | PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **options: Any,
    ) -> None:
        """Writes the forward pass as a program, as Keras does; no call has to come before.

        Texts are generated by what `opt_tf.export` writes.

        Args:
            filepath: Where to.
            format: "tf_saved_model" (endpoint `serve`) or "litert".
            verbose: Whether to say what was written.
            input_signature: What the program takes; None: `input_signature`.
            **options: Of `tf.lite.TFLiteConverter`, to be set there.

        Raises:
            ConfigError: Another format, or a quantised model.
        """
        check_not_quantized(self, "export")
        if format not in ("tf_saved_model", "litert"):
            raise ConfigError(
                f"format: expected tf_saved_model or litert, received {format!r}; "
                "other formats are exported from PyTorch (opt_torch.export)"
            )
        if format == "tf_saved_model":
            self.write_saved_model(filepath, {"serve": input_signature}, bool(verbose))
            return
        with TemporaryDirectory() as folder:
            self.write_saved_model(folder, {"serve": input_signature}, False)
            converter: Any = tf.lite.TFLiteConverter.from_saved_model(
                folder, signature_keys=["serve"]
            )
            for name, value in options.items():
                setattr(converter, name, value)
            Path(filepath).write_bytes(converter.convert())

    def write_saved_model(
        self: Any,
        folder: str | PathLike[str],
        signatures: Mapping[str, Any] | Callable[..., Any] | None = None,
        verbose: bool = False,
    ) -> None:
        """Writes a SavedModel, as `save_pretrained(saved_model=True)` of `transformers` did.

        Args:
            folder: Where to.
            signatures: Name -> a `tf.function` that has an input signature; or what the forward
                pass takes, None for `input_signature`; or a function, or None, of that alone.
            verbose: Whether to say what was written.
        """
        if not isinstance(signatures, Mapping):
            signatures = {"serving_default": signatures}
        archive: Any = keras.export.ExportArchive()
        archive.track(self)
        for name, wanted in signatures.items():
            if callable(wanted):
                archive.add_endpoint(name, wanted)
                continue
            specs = self.input_signature if wanted is None else wanted
            specs = specs if isinstance(specs, list | tuple) else [specs]
            archive.add_endpoint(name, self.eager_serving, input_signature=specs)
        archive.write_out(str(folder), verbose=verbose)

    def save(self, filepath: str | PathLike[str], *args: Any, **options: Any) -> None:
        """Keras' `save`, of a .keras file.

        Raises:
            ConfigError: A format of Keras 2, by `save_format`.
        """
        if "save_format" in options:
            raise ConfigError(
                "save: Keras 3 has no save_format; use model.export(folder) for a SavedModel, "
                "a .keras file, or save_pretrained"
            )
        base: Any = super()
        base.save(filepath, *args, **options)

    def save_weights(self, filepath: str | PathLike[str], *args: Any, **options: Any) -> None:
        """Keras' `save_weights`.

        Raises:
            ConfigError: The name of another format of Keras 2.
        """
        keras_two.check_weights_name("save_weights", filepath)
        base: Any = super()
        base.save_weights(filepath, *args, **options)

    def load_weights(self, filepath: str | PathLike[str], *args: Any, **options: Any) -> None:
        """Keras' `load_weights`.

        Raises:
            ConfigError: A file of another format.
        """
        if Path(filepath).suffix != ".keras":
            keras_two.check_weights_name("load_weights", filepath)
        base: Any = super()
        base.load_weights(filepath, *args, **options)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the language model's, `TFOPTForCausalLM`."""
        refuse_to_generate(self)

    def prepare_inputs_for_generation(
        self, inputs: Any, past_key_values: Any = None, use_cache: bool | None = None, **given: Any
    ) -> dict[str, Any]:
        """The inputs of a call in a loop of one's own: behind a cache, the last token alone.

        Args:
            inputs: (B, T) ids so far.
            past_key_values: The cache of the call before.
            use_cache: Passed on.
            **given: `attention_mask`, which is passed on.
        """
        return {
            "input_ids": inputs if past_key_values is None else inputs[:, -1:],
            "attention_mask": given.get("attention_mask"),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def hf_compute_loss(self: Any, labels: Any, logits: Any) -> tf.Tensor:
        """The mean loss of logits.

        Args:
            labels: Of the language model ids (B, T), shifted already; of a classifier (B,).
            logits: Of as many places (B, T, V), or (B, num_labels).

        Raises:
            ConfigError: The model has no such loss.
        """
        if self.head == "causal_lm":
            # The model's own loss takes each place for the one before.
            labels = tf.pad(tf.cast(labels, tf.int32), [[0, 0], [1, 0]])
            return losses.causal_lm(tf.pad(logits, [[0, 0], [0, 1], [0, 0]]), labels)
        if self.head == "sequence_classification":
            return losses.classification(logits, labels, self.config)
        raise ConfigError(f"hf_compute_loss: {type(self).__name__} has no loss of this kind")

    def get_head_mask(self, head_mask: Any, num_hidden_layers: int) -> Any:
        """A head mask (H,) or (N, H) for each layer, (N, 1, H, 1, 1); of None as many of them."""
        if head_mask is None:
            return [None] * num_hidden_layers
        mask = tf.cast(head_mask, tf.float32)
        mask = tf.broadcast_to(mask, (num_hidden_layers, mask.shape[-1]))
        return mask[:, None, :, None, None]

    def get_label_to_output_name_mapping(self: Any) -> dict[str, str]:
        """The output that belongs to each label, where the names do not say it."""
        if self.head != "question_answering":
            return {}
        return {"start_positions": "start_logits", "end_positions": "end_logits"}

    def get_output_layer_with_bias(self) -> None:
        """Layer of the head's bias: OPT has none."""

    def get_prefix_bias_name(self) -> None:
        """Name of the head's bias: OPT has none."""

    def get_lm_head(self) -> Any:
        """`get_output_embeddings`, as TensorFlow's models called it."""
        return self.get_output_embeddings()

    def get_bias(self) -> None:
        """Bias of the language-model head: OPT has none."""

    def __dir__(self) -> list[str]:
        # Keras saves whatever layers it finds here, and would save these twice or for ever.
        return [name for name in super().__dir__() if name not in _ALIASES]

    def _forget_programs(self: Any) -> None:
        """Drops what was compiled for the layers as they were."""
        self.programs.clear()
        self.train_function = self.test_function = self.predict_function = None

    def _decoder_layers(self) -> Iterator[Any]:
        return iter(self._decoder.blocks)

    def _parameter_paths(self) -> Iterator[str]:
        for name, part in vars(self).items():
            if isinstance(part, keras.layers.Layer):
                yield from (f"{name}.{variable.name}" for variable in part.variables)

    def _as_tensor(self, array: NDArray[Any]) -> tf.Tensor:
        return tf.constant(array)

    def _to_array(self, tensor: NDArray[Any]) -> NDArray[Any]:
        return tensor

    def _put_embeddings(self, value: Any) -> None:
        table = np.asarray(value.embeddings)
        self._check_width("set_input_embeddings", table.shape[1])
        self._set_config(vocab_size=len(table))
        self._put_table(self._spec("embed_tokens"), table)

    def _put_head(self: Any, value: Any) -> None:
        is_dense = hasattr(value, "kernel")
        table = np.asarray(value.kernel).T if is_dense else np.asarray(value.weight)
        self._check_width("set_output_embeddings", table.shape[1])
        if self.lm_head is None:
            self._set_config(tie_word_embeddings=False)
        self._put_table(self._spec("lm_head"), table)

    def _put_table(self: Any, spec: ParamSpec, table: NDArray[Any]) -> None:
        parent, name = KERAS.parent(self, spec)
        count, width = table.shape
        options = {"name": name, "dtype": self._decoder.embed_tokens.dtype_policy}
        if name == "lm_head":
            new: Any = Linear(width, count, False, **options)
        else:
            new = Embedding(count, width, self.config.pad_token_id, **options)
        new.build()
        _private.replace_layer(parent, name, new)
        checkpoint.set_parameter(self, self._spec(spec.name), table)
        self._forget_programs()

    def _spec(self, name: str) -> ParamSpec:
        """A parameter of the model as it is now."""
        return next(s for s in param_specs(self.config, self.head) if name in s.name)

    def _count_trainable(self: Any, specs: list[ParamSpec]) -> int:
        return sum(spec.size for spec in specs if checkpoint.locate(self, spec).trainable)

    def _sizes_in_bytes(self: Any, with_buffers: bool) -> Iterator[int]:
        for variable in self.weights if with_buffers else self.trainable_weights:
            yield variable.value.dtype.size * int(np.prod(variable.shape))

    def _cast(self: Any, dtype: Any) -> "TFOPTPreTrainedModel":
        return type(self)(self.config, 0, self.attn_implementation, dtype=dtype)


refuse_attributes(ModelMethods, keras_two.REFUSED)
refuse_methods(ModelMethods, {"set_bias": "OPT's head has no bias"}, UnsupportedError)
