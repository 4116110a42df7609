"""The layer for code written for `transformers`: what Flax has to do for it.

Its Flax models keep parameters outside of the model, as a tree of linen's names
(`params["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]`, [in, out]). Here that tree is a view:
`model.params` makes it, and a call with `params=` runs on a copy of the model's structure that
holds those arrays, traced or not, so that `jax.grad`, `jax.jit` and `jax.pmap` go through it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import GetAttrKey
from numpy.typing import NDArray

from opt_core.compatibility import linen
from opt_core.compatibility.calls import CallOptions
from opt_core.compatibility.linen import Tree
from opt_core.compatibility.methods import MethodsMixin, refuse_to_generate
from opt_core.compatibility.refusals import refuse_attributes
from opt_core.compatibility.sequences import Sequences
from opt_core.errors import ConfigError, UnsupportedError
from opt_core.generation.config import GenerationConfig
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import check_not_quantized
from opt_flax import attention, checkpoint
from opt_flax.linear import Linear
from opt_flax.linen_params import cast_tree, draw_values, turn
from opt_flax.own_layers import OwnLayers

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel

jax.tree_util.register_pytree_with_keys(
    Sequences,
    lambda ids: (((GetAttrKey("sequences"), ids.sequences),), None),
    lambda _, leaves: Sequences(*leaves),
)


class FlaxCallOptions(CallOptions, total=False):
    """Arguments that a Flax model's call takes beside its own.

    Attributes:
        train: The opposite of `deterministic`.
        dropout_rng: A key in place of `rngs`.
    """

    train: bool | None
    dropout_rng: Any


def split_mode(
    options: FlaxCallOptions, deterministic: bool | None, rngs: nnx.Rngs | None
) -> tuple[CallOptions, dict[str, Any]]:
    """Takes the training mode out of a call's options: the rest, and what the decoder takes."""
    rest: Any = dict(options)
    train, key = rest.pop("train", None), rest.pop("dropout_rng", None)
    if train is not None and deterministic is None:
        deterministic = not train
    if key is not None and rngs is None:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        rngs = nnx.Rngs(dropout=key)
    return rest, {"deterministic": deterministic, "rngs": rngs}


class ModelMethods(OwnLayers, MethodsMixin):
    """Parameters outside of the model, and what else there is beside `nnx.Module`'s own."""

    framework: ClassVar[str] = "flax"
    _steps = frozenset({"__call__"})
    input_shape: ClassVar[tuple[int, int]] = (1, 1)
    """Shape that `transformers` has `init_weights` take; no parameter depends on it."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _with_params(vars(cls)["__call__"])

    @property
    def params(self: Any) -> dict[str, Any]:
        """The parameters as a nested dict of linen's names, kernels as [in, out].

        Raises:
            ConfigError: The model was made with `_do_init=False`, or is quantised.
        """
        check_not_quantized(self, "params")
        _check_initialized(self)
        tree = self._tree(lambda spec: checkpoint.get_parameter(self, spec))
        return self._add_own(tree, lambda variable: variable.get_value())

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "params":  # NNX would have refused arrays before it came to a property's setter
            _check_initialized(self)
            self._set_params(value)
        else:
            super().__setattr__(name, value)

    @property
    def params_shape_tree(self: Any) -> dict[str, Any]:
        """Shapes and types of `params`, as `jax.ShapeDtypeStruct`."""
        tree = self._tree(lambda spec: jax.ShapeDtypeStruct(spec.shape, self.dtype))
        return self._add_own(tree, lambda own: jax.ShapeDtypeStruct(own.shape, own.dtype))

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Paths of the leaves of `params`."""
        return {path for path, _ in linen.flat(self.params_shape_tree)}

    @property
    def module(self) -> Any:
        """Refused: this model is its module."""
        name = type(self).__name__
        raise UnsupportedError(
            f"{name}.module is not supported: no linen module; call the model with params=, "
            "or use it as an nnx.Module"
        )

    def init_weights(
        self: Any,
        rng: Array,
        input_shape: tuple[int, ...] | None = None,
        params: Tree | None = None,
    ) -> dict[str, Any]:
        """Fresh parameters, as `params` gives them; the model keeps its own.

        Those of layers that a class of the user's adds are as they are.

        Args:
            rng: Random key.
            input_shape: Without effect: no parameter depends on it.
            params: Take those that are here over.
        """
        fresh = self._tree(draw_values(self.config, rng))
        fresh = self._add_own(fresh, lambda variable: variable.get_value())
        if params is None:
            return fresh
        return linen.merge_trees(fresh, params)

    def to_bf16(self, params: Tree, mask: Any = None) -> Any:
        """Parameters in bfloat16; a mask (a tree of bools) leaves some out where it is False."""
        return cast_tree(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Tree, mask: Any = None) -> Any:
        """Parameters in float16; a mask (a tree of bools) leaves some out where it is False."""
        return cast_tree(params, jnp.float16, mask)

    def to_fp32(self, params: Tree, mask: Any = None) -> Any:
        """Parameters in float32; a mask (a tree of bools) leaves some out where it is False."""
        return cast_tree(params, jnp.float32, mask)

    def with_params(self: Any, params: Tree | None) -> Any:
        """A model of other parameters that shares all else; None: this model.

        Args:
            params: As `params` gives them; they may be traced.

        Raises:
            InputError: Parameters are missing, unknown or misshapen.
        """
        if params is None:
            _check_initialized(self)
            return self
        check_not_quantized(self, "params")
        graph, state = nnx.split(self)
        # Variables of its own, that a program which is being traced may set.
        other = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
        other._set_params(params)
        return other

    def _set_params(self: Any, params: Tree) -> None:
        rest, own = self._split_own(params)
        checkpoint.set_arrays(self, linen.read_tree(self.config, self.head, rest, turn))
        for variable, value in own:
            variable.set_value(value)

    def save_pretrained(self, *args: Any, params: Tree | None = None, **options: Any):
        """As in every backend.

        Args:
            *args: See there.
            params: Save these in place of the model's own.
            **options: See there.
        """
        model: Any = self.with_params(params)
        base: Any = super(ModelMethods, model)
        base.save_pretrained(*args, **options)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the language model's, `FlaxOPTForCausalLM`."""
        refuse_to_generate(self)

    def enable_gradient_checkpointing(self: Any) -> None:
        """`gradient_checkpointing_enable`, as Flax' models called it."""
        self.gradient_checkpointing_enable()

    def __repr__(self: Any) -> str:
        return self._described()

    __str__ = __repr__

    def _tree(self: Any, values: Callable[[ParamSpec], Any]) -> dict[str, Any]:
        return linen.make_tree(self.config, self.head, values, turn)

    def _without_params(self: Any) -> tuple[Any, dict[str, Any]]:
        """The model, with shapes in place of parameters, and its parameters."""
        params = self.params
        checkpoint.init_abstract(self, np.dtype(self.dtype))
        return self, params

    def _decoder_layers(self) -> Iterator[Any]:
        layers = self._decoder.layers
        return iter([layers] if self._decoder.scan_layers else layers)

    def _as_tensor(self, array: NDArray[Any]) -> Array:
        return jnp.asarray(array)

    def _to_array(self, tensor: Array) -> NDArray[Any]:
        return checkpoint.as_array(tensor)

    def _put_embeddings(self, value: Any) -> None:
        table = np.asarray(value.embedding[...])[: value.num_embeddings]
        self._check_width("set_input_embeddings", table.shape[1])
        self._set_config(vocab_size=len(table))
        self._put_table(self._spec("embed_tokens"), table)

    def _put_head(self: Any, value: Any) -> None:
        is_linen = hasattr(value, "kernel")
        table = np.asarray(value.kernel[...].T if is_linen else value.weight[...])
        table = table[: value.out_features]
        self._check_width("set_output_embeddings", table.shape[1])
        if self.lm_head is None:
            self._set_config(tie_word_embeddings=False)
            head: Any = Linear(self.config.embed_dim, len(table), bias=False, mesh=self.mesh)
            self.lm_head = nnx.data(head)
            head.weight.set_value(jnp.zeros((0, 0), self.dtype))
        self._put_table(self._spec("lm_head"), table)

    def _put_table(self: Any, spec: ParamSpec, table: NDArray[Any]) -> None:
        if spec.name == "lm_head.weight":
            self.lm_head.out_features = len(table)
        else:
            self.get_input_embeddings().num_embeddings = len(table)
        checkpoint.set_parameter(self, self._spec(spec.name), table)

    def _spec(self, name: str) -> ParamSpec:
        """A parameter of the model as it is now."""
        return next(s for s in param_specs(self.config, self.head) if name in s.name)

    def _count_trainable(self, specs: list[ParamSpec]) -> int:
        return sum(spec.size for spec in specs)

    def _sizes_in_bytes(self: Any, with_buffers: bool) -> Iterator[int]:
        for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)):
            yield leaf.nbytes
        if with_buffers:
            for leaf in jax.tree.leaves(nnx.state(self, nnx.Not(nnx.Param))):
                yield leaf.nbytes

    def _cast(self: Any, dtype: Any) -> "FlaxOPTPreTrainedModel":
        nnx.update(self, cast_tree(nnx.state(self, nnx.Param), dtype, None))
        return self

    def _check_flash(self: Any) -> None:
        attention.check_flash(attention.platform_of(self.mesh), self.dtype)


refuse_attributes(ModelMethods, linen.REFUSED)


class GenerationMethods:
    """Parameters outside of the model, for generation too."""

    def generate(
        self: Any,
        input_ids: Any = None,
        *args: Any,
        params: Tree | None = None,
        trace: bool = True,
        **options: Any,
    ) -> Any:
        """As in every backend.

        Args:
            input_ids: See there.
            *args: See there.
            params: Generate with these in place of the model's own.
            trace: Without effect: `transformers`' way to debug.
            **options: See there.

        Returns:
            As there; ids have themselves as `sequences` too.
        """
        base: Any = super(GenerationMethods, self.with_params(params))
        if len(args) == 2 and isinstance(args[0], GenerationConfig):  # transformers' order
            args, options["seed"] = (None, args[0]), args[1]
        found = base.generate(_plain(input_ids), *args, **options)
        return Sequences(found) if isinstance(found, Array) else found

    def prepare_inputs_for_generation(
        self: Any, input_ids: Array, max_length: int, attention_mask: Array | None = None
    ) -> dict[str, Any]:
        """Inputs of the first call in a loop of one's own, beside the prompts (B, T).

        Args:
            input_ids: The prompts.
            max_length: Slots of the cache.
            attention_mask: (B, T); None: no padding.
        """
        rows, count = input_ids.shape
        mask = jnp.ones((rows, max_length), jnp.int32)
        if attention_mask is not None:
            mask = mask.at[:, :count].set(attention_mask)
        return {
            "past_key_values": self.init_cache(rows, max_length),
            "attention_mask": mask,
            "position_ids": mask[:, :count].cumsum(1) - 1,
        }

    def update_inputs_for_generation(
        self, model_outputs: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The same for the next call, of one token a row."""
        last = model_kwargs["position_ids"][:, -1:]
        changes = {"past_key_values": model_outputs.past_key_values, "position_ids": last + 1}
        return model_kwargs | changes


_BEHIND_PAST = (
    *("output_attentions", "output_hidden_states", "return_dict", "dropout_rng", "deterministic"),
)
"""Arguments of a call of `transformers`' Flax models behind `past_key_values`, in their order."""


def _with_params(call: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a model's `__call__` take `params` as well."""

    @functools.wraps(call)
    def run(
        self: Any, input_ids: Any = None, *args: Any, params: Tree | None = None, **inputs: Any
    ) -> Any:
        if len(args) > 2 and isinstance(args[2], Mapping):  # transformers' order
            params, names = args[2], ("past_key_values", *_BEHIND_PAST)
            inputs, args = dict(zip(names, args[3:], strict=False)) | inputs, args[:2]
        past = inputs.get("past_key_values", False)
        if past is None and inputs.get("use_cache") is None and self.config.use_cache:
            # Whoever passes what is None so far goes on with what is returned, traced or not.
            train, is_off = inputs.get("train"), inputs.get("deterministic")
            mode = split_mode({"train": train}, is_off, None)[1]
            inputs["use_cache"] = not self._trains(**mode)
        return call(self.with_params(params), _plain(input_ids), *args, **inputs)

    return run


def _plain(ids: Any) -> Any:
    """Ids of a generation as the array they are."""
    return ids.sequences if isinstance(ids, Sequences) else ids


def _check_initialized(model: Any) -> None:
    value = model.get_decoder().embed_positions.embedding.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ConfigError(
            "the model was made with _do_init=False and has no parameters; pass params="
        )
