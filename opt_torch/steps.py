"""A generation's steps one by one: what `opt_core.generation.observed` asks of a framework."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from opt_core.generation.request import Ids, Mask, Request
from opt_core.generation.rules import Rules, make_rules
from opt_torch.cache import KVCache
from opt_torch.inputs import full_mask

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()
def observe(
    model: "OPTForCausalLM",
    ids_RT: Ids | None,
    embeds_BTP: Tensor | None,
    copies: int,
    mask_RT: Mask | None,
    cache: KVCache | None,
    slots: int,
    output_attentions: bool,
    output_hidden_states: bool,
) -> tuple[Tensor, KVCache, Any, Any]:
    """Reads tokens, for `opt_core.generation.observed`.

    Args:
        model: The language model.
        ids_RT: Token ids; None: embeddings are given.
        embeds_BTP: Embeddings in their place, of one row in `copies`.
        copies: Rows of each row of embeddings.
        mask_RT: bool, False at padding, for the first tokens; None: nothing is padded.
        cache: What was read before; None: nothing.
        slots: Slots of the cache that is then made.
        output_attentions: Whether attention weights are wanted.
        output_hidden_states: Whether hidden states are wanted.

    Returns:
        Logits (R, V) after them, the cache that holds them, attention weights and hidden states.
    """
    decoder = model.get_decoder()
    if embeds_BTP is None:
        embeds_BTP = decoder.embed_tokens(to_tensor(model, ids_RT))
    embeds = embeds_BTP.repeat_interleave(copies, 0)
    if cache is None:
        mask = None if mask_RT is None else to_tensor(model, mask_RT)
        cache = model.init_cache(len(embeds), slots)
    else:
        mask = full_mask(None, 1, cache)
    out = decoder(embeds, None, mask, cache, output_hidden_states, output_attentions)
    logits = model.compute_logits(out.last_hidden_state[:, -1])
    return logits, out.past_key_values, out.attentions, out.hidden_states


def request_rules(model: "OPTForCausalLM", request: Request) -> Rules:
    """The rules of a request, their arrays on the model's device, their numbers Python's own."""
    structure, numbers = make_rules(request, is_compiled=False)
    on_device = {
        name: torch.as_tensor(value, device=model.device) if value.ndim else value.item()
        for name, value in numbers.items()
    }
    return Rules(structure, on_device)


def random_source(model: "OPTForCausalLM", seed: int) -> Callable[[int], torch.Generator]:
    """What draws the token of each number."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return lambda made: generator


def draw_seed() -> int:
    """A seed out of PyTorch's own generator, so that `torch.manual_seed` decides it."""
    return int(torch.randint(2**63 - 1, ()))


def to_tensor(model: "OPTForCausalLM", values: Any) -> Tensor:
    """NumPy's values on the model's device, ids as int64."""
    tensor = torch.as_tensor(values, device=model.device)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def to_array(values: Tensor) -> NDArray[Any]:
    """NumPy's values."""
    return values.detach().cpu().numpy()
