"""A model as StableHLO with its weights beside it: it runs with this project nowhere near."""

from collections.abc import Callable
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, export

from opt_core.checkpoints.safetensors_format import PendingTensor, write_safetensors
from opt_core.errors import CheckpointError, ConfigError, GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request, check_export
from opt_core.quantization import check_not_quantized
from opt_core.text.tokenizer import OPTTokenizer
from opt_flax.generation import beam, loop

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where an exported program runs, wherever it was made."""

REFUSED = -1
"""The id that fills a row `generate` cannot continue: a program raises no errors."""

Weights = dict[str, Array]
Program = Callable[..., dict[str, Array]]


def export_stablehlo(
    model: "FlaxOPTForCausalLM",
    folder: str | PathLike[str],
    max_prompt: int,
    generation_config: GenerationConfig | None = None,
    tokenizer: OPTTokenizer | None = None,
    **overrides: Any,
) -> None:
    """Writes the programs `forward.jax` and `generate.jax`, and `weights.safetensors` for both.

    `jax.export.deserialize` reads a program; its `call(weights, input_ids, attention_mask)` takes
    int32 arrays (B, T). B is free. `forward` takes 2 to `max_position_embeddings` tokens and
    returns `logits`, NaN where an id is none. `generate` takes 2 to `max_prompt` tokens, prompts
    padded on the left, and returns `sequences`: the ids of `model.generate`, filled with the
    padding id to T + `max_new_tokens`. Rows with ids outside the vocabulary, with padding on the
    right or with no possible token are -1 all over. A model that samples takes a `seed` too, an
    int32 scalar.

    Args:
        model: The language model, on one device.
        folder: Where to; files of an earlier export there are replaced.
        max_prompt: Most tokens T of a prompt, padding included.
        generation_config: Settings of `generate`; by default the model's.
        tokenizer: Where given, ids it does not know are never generated.
        **overrides: Fields of `GenerationConfig`, `max_new_tokens` among them.

    Raises:
        CheckpointError: The disk refuses.
        ConfigError: A quantised model, one on a mesh, or with an attention kernel that one platform
            has.
        GenerationError: A setting that cannot be honoured, or that cannot be exported.
    """
    check_not_quantized(model, "export")
    if model.mesh is not None:
        raise ConfigError("export: expected a model on one device, received one on a mesh")
    if model.get_decoder().implementation == "flash_attention_2":
        raise ConfigError('export: expected attn_implementation="sdpa", received flash_attention_2')
    if type(max_prompt) is not int or max_prompt < 2:
        raise GenerationError(f"max_prompt: expected an integer above 1, received {max_prompt!r}")
    if find_spec("flatbuffers") is None:
        raise ConfigError("export: jax.export writes with flatbuffers: pip install flatbuffers")
    request = check_export(
        model.config, model.generation_config, max_prompt, generation_config, tokenizer, **overrides
    )
    weights, rebuild = _take_apart(model)
    window = model.config.max_position_embeddings
    programs = {
        "forward": _lower(_forward(rebuild), weights, window, False),
        "generate": _lower(
            _generate(model, rebuild, request), weights, max_prompt, request.settings.do_sample
        ),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".export.") as stage:
            tensors = [_pending(name, values) for name, values in weights.items()]
            write_safetensors(Path(stage) / "weights.safetensors", tensors, {"format": "flax"})
            for name, data in programs.items():
                (Path(stage) / f"{name}.jax").write_bytes(data)
            for path in Path(stage).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _take_apart(
    model: "FlaxOPTForCausalLM",
) -> tuple[Weights, Callable[[Weights], "FlaxOPTForCausalLM"]]:
    """A model's weights by name, and what makes a model of such weights."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]

    def rebuild(weights: Weights) -> "FlaxOPTForCausalLM":
        state = jax.tree.unflatten(tree, [weights[name] for name in names])
        return nnx.merge(graph, state, rest)

    return dict(zip(names, (values for _, values in leaves), strict=True)), rebuild


def _lower(program: Program, weights: Weights, longest: int, is_seeded: bool) -> bytes:
    """A program for any number of rows of up to `longest` tokens, serialized."""
    shape = export.symbolic_shape("b, t", constraints=("t >= 2", f"t <= {longest}"))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    seed = (jax.ShapeDtypeStruct((), jnp.int32),) if is_seeded else ()
    made = export.export(jax.jit(program), platforms=PLATFORMS)(weights, ids, ids, *seed)
    return bytes(made.serialize())


def _pending(name: str, values: Array) -> PendingTensor:
    return PendingTensor(name, values.shape, np.dtype(values.dtype), lambda: np.asarray(values))


def _forward(rebuild: Callable[[Weights], "FlaxOPTForCausalLM"]) -> Program:
    def forward(weights: Weights, input_ids: Array, attention_mask: Array) -> dict[str, Array]:
        model = rebuild(weights)
        logits = model(input_ids, attention_mask=attention_mask, deterministic=True).logits
        assert logits is not None
        known = (input_ids >= 0) & (input_ids < model.config.vocab_size)
        return {"logits": jnp.where(known[..., None], logits, jnp.nan)}

    return forward


def _generate(
    model: "FlaxOPTForCausalLM",
    rebuild: Callable[[Weights], "FlaxOPTForCausalLM"],
    request: Request,
) -> Program:
    settings, new_tokens = request.settings, request.new_tokens
    count = settings.num_return_sequences
    rows = settings.num_beams if settings.is_beam_search else count
    run = beam.run if settings.is_beam_search else loop.run

    def generate(
        weights: Weights, input_ids: Array, attention_mask: Array, seed: Array | int = 0
    ) -> dict[str, Array]:
        mask = attention_mask.astype(bool)
        found, best = loop.trace(rebuild(weights), request, run, input_ids, mask, seed)
        fits = (input_ids >= 0) & (input_ids < model.config.vocab_size)
        fits = fits.all(1) & mask[:, -1] & jnp.isfinite(best).reshape(-1, rows).all(1)
        found = found[:, : input_ids.shape[1] + new_tokens]
        return {"sequences": jnp.where(jnp.repeat(fits, count)[:, None], found, REFUSED)}

    return generate
