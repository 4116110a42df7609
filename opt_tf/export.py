"""A model as a SavedModel or for LiteRT: it runs with this project nowhere near."""

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request, check_export, merge_settings
from opt_core.quantization import check_not_quantized
from opt_core.text.tokenizer import OPTTokenizer
from opt_tf.generation import beam, loop

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def export_saved_model(
    model: "TFOPTForCausalLM",
    folder: str | PathLike[str],
    max_prompt: int,
    generation_config: GenerationConfig | None = None,
    tokenizer: OPTTokenizer | None = None,
    **overrides: Any,
) -> None:
    """Writes a SavedModel with the signatures `forward` and `generate`.

    `forward` takes `input_ids` and `attention_mask`, int32 (B, T), and returns `logits`. `generate`
    takes the same (prompts padded on the left) and returns `sequences`, int32, the ids that
    `model.generate` returns; a model that samples also takes `seed`, an int64 scalar. B and T are
    free. Both refuse ids outside the vocabulary and too long texts.

    Args:
        model: The language model.
        folder: Where to; files of an earlier export there are replaced.
        max_prompt: Most tokens T of a prompt, padding included.
        generation_config: Settings of `generate`; by default the model's.
        tokenizer: Where given, ids it does not know are never generated.
        **overrides: Fields of `GenerationConfig`, `max_new_tokens` among them.

    Raises:
        ConfigError: A quantised model.
        GenerationError: A setting that cannot be honoured, or that cannot be exported.
    """
    check_not_quantized(model, "export")
    request = check_export(
        model.config, model.generation_config, max_prompt, generation_config, tokenizer, **overrides
    )
    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    ids = tf.TensorSpec((None, None), tf.int32, "input_ids")
    mask = tf.TensorSpec((None, None), tf.int32, "attention_mask")
    seed = [tf.TensorSpec((), tf.int64, "seed")] if request.settings.do_sample else []
    archive.add_endpoint("forward", _forward(model), input_signature=[ids, mask])
    archive.add_endpoint("generate", _generate(model, request), input_signature=[ids, mask, *seed])
    archive.write_out(str(folder), verbose=False)


def export_tflite(
    model: "TFOPTForCausalLM",
    file: str | PathLike[str],
    max_prompt: int,
    generation_config: GenerationConfig | None = None,
    tokenizer: OPTTokenizer | None = None,
    **overrides: Any,
) -> None:
    """Writes a LiteRT (TensorFlow Lite) model with the signatures of `export_saved_model`.

    It needs LiteRT's built-in operations only, and takes no sampling: LiteRT draws no numbers.

    Args:
        model: The language model.
        file: Where to, usually ending in ".tflite".
        max_prompt: As in `export_saved_model`, like the arguments that follow.
        generation_config: See there.
        tokenizer: See there.
        **overrides: See there.

    Raises:
        ConfigError: A quantised model.
        GenerationError: A setting that cannot be honoured, or that cannot be exported.
    """
    if merge_settings(model.generation_config, generation_config, **overrides).do_sample:
        raise GenerationError("do_sample=True cannot be exported to LiteRT; use greedy or beams")
    with TemporaryDirectory() as folder:
        export_saved_model(model, folder, max_prompt, generation_config, tokenizer, **overrides)
        signatures = ["forward", "generate"]
        converter: Any = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=signatures)
        Path(file).write_bytes(converter.convert())


def _forward(model: "TFOPTForCausalLM") -> Any:
    def forward(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        window = model.config.max_position_embeddings
        longest = tf.reduce_max(tf.reduce_sum(attention_mask, 1))
        tf.debugging.assert_less_equal(longest, window, "too long for the model's window")
        _check_ids(model, input_ids)
        logits = model(input_ids, attention_mask=attention_mask).logits
        assert logits is not None
        return {"logits": logits}

    return forward


def _generate(model: "TFOPTForCausalLM", request: Request) -> Any:
    max_prompt = request.ids.shape[1]
    run = beam.run if request.settings.is_beam_search else loop.run

    def generate(
        input_ids: tf.Tensor, attention_mask: tf.Tensor, seed: tf.Tensor | int = 0
    ) -> dict[str, tf.Tensor]:
        prompt = tf.shape(input_ids)[1]
        tf.debugging.assert_less_equal(prompt, max_prompt, "prompt longer than max_prompt")
        tf.debugging.assert_equal(attention_mask[:, -1], 1, "pad prompts on the left")
        _check_ids(model, input_ids)
        mask = tf.cast(attention_mask, tf.bool)
        found, made, best = loop.trace(model, request, run, input_ids, mask, seed)
        tf.debugging.assert_all_finite(best, "no token can be generated")
        return {"sequences": found[:, : prompt + made]}

    return generate


def _check_ids(model: "TFOPTForCausalLM", ids: tf.Tensor) -> None:
    message = "input_ids outside the vocabulary"
    tf.debugging.assert_non_negative(ids, message)
    tf.debugging.assert_less(ids, model.config.vocab_size, message)
