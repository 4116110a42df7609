"""Speculative decoding: several tokens are guessed, one pass of the model checks them all.

Guesses come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what
they are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about
different numbers of guesses; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.speculation import Ids, Mask, Rows, Slots, check_assistant
from opt_core.text.tokenizer import OPTTokenizer
from opt_torch import generation, sampling
from opt_torch.cache import KVCache
from opt_torch.linear import packed
from opt_torch.prefill import prefill_prompts

if TYPE_CHECKING:
    from opt_torch.generation import Request
    from opt_torch.modeling import OPTForCausalLM


def is_requested(settings: GenerationConfig, assistant: Any) -> bool:
    """Whether a request says where guesses come from."""
    return assistant is not None or settings.prompt_lookup_num_tokens is not None


def check(model: "OPTForCausalLM", request: "Request", assistant: Any) -> None:
    """Refuses an assistant that cannot guess for a model.

    Raises:
        GenerationError: It is no language model of this framework, has other ids or too short a
            window, or the settings leave no place for it.
    """
    from opt_torch.modeling import OPTForCausalLM as expected

    if assistant is None:
        return
    if not isinstance(assistant, expected):
        kind = type(assistant).__name__
        raise GenerationError(f"assistant_model: expected an {expected.__name__}, received {kind}")
    check_assistant(request.settings, model.config, assistant.config)


def stream(
    model: "OPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "OPTForCausalLM | None",
) -> Iterator[Tensor]:
    """Guesses, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings.
        assistant: The model that guesses; None: the rows themselves are looked through.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where guesses were right.
    """
    check(model, request, assistant)
    return _stream(model, request, seed, tokenizer, assistant)


def generate(
    model: "OPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "OPTForCausalLM | None",
) -> Tensor:
    """The prompts and all that `stream` yields after them."""
    new = list(stream(model, request, seed, tokenizer, assistant))
    prompts = request.ids.repeat_interleave(request.settings.num_return_sequences, 0)
    return torch.cat([prompts, torch.stack(new, 1)], 1)


def accept_draft(
    scores_RTV: Tensor,
    guesses_RG: Tensor,
    counts_R: Tensor,
    drafted_RGV: Tensor | None,
    settings: GenerationConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which guesses are right, and the token after them.

    A sampled guess that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each guess.
        guesses_RG: G = T - 1 ids.
        counts_R: How many of them are guesses.
        drafted_RGV: The probabilities they were drawn by; None: they were not drawn.
        settings: How tokens are chosen.
        generator: Source of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the guesses that are right and one token more.
    """
    (R, T, V), device = scores_RTV.shape, scores_RTV.device
    is_guess = torch.arange(T - 1, device=device) < counts_R[:, None]
    if not settings.do_sample:
        tokens = scores_RTV.argmax(-1)
        right = is_guess & (tokens[:, :-1] == guesses_RG)
        return tokens, right.long().cumprod(1).sum(1) + 1
    p_RTV = probabilities(scores_RTV.flatten(0, 1), settings).view(R, T, V)
    # What was not drawn was certain.
    q_RGV = F.one_hot(guesses_RG, V).float() if drafted_RGV is None else drafted_RGV
    p, q = (x.gather(2, guesses_RG[..., None])[..., 0] for x in (p_RTV[:, :-1], q_RGV))
    chance = torch.rand(p.shape, generator=generator, device=device)
    right = (is_guess & (chance * q < p)).long().cumprod(1).sum(1)
    row = torch.arange(R, device=device)
    q_RTV = F.pad(q_RGV * is_guess[..., None], (0, 0, 0, 1))
    p_RV = p_RTV[row, right]
    rest = (p_RV - q_RTV[row, right]).clamp(min=0)
    # Where rounding alone refused a guess, nothing is left.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p_RV)
    tokens = F.pad(guesses_RG, (0, 1))
    tokens[row, right] = _draw(rest, generator)
    return tokens, right + 1


def probabilities(logits_BV: Tensor, settings: GenerationConfig) -> Tensor:
    """What sampling draws the next token by, (B, V)."""
    logits_BC, ids_BC = sampling.candidates(logits_BV, settings)
    return torch.zeros_like(logits_BV).scatter_(1, ids_BC, F.softmax(logits_BC, -1))


class _Reader:
    """A model and what it has read: the cache, and which of its slots hold tokens."""

    def __init__(self, model: "OPTForCausalLM", request: "Request", slots: int):
        copies = request.settings.num_return_sequences
        rows = torch.arange(len(request.ids), device=model.device).repeat_interleave(copies)
        self.model = model
        self.slots = Slots(_prompts(request)[1].repeat(copies, 0), slots)
        self.logits, self.cache = prefill_prompts(model, request, rows, slots)

    def read(self, ids_RT: Tensor, places_RT: Ids) -> Tensor:
        """Logits (R, T, V) after each of these tokens, which come behind what was read."""
        decoder, device = self.model.get_decoder(), self.model.device
        end, mask = self.cache.length + ids_RT.shape[1], None
        if not self.slots.is_plain:
            mask = torch.as_tensor(self.slots.mask[:, :end], device=device)
        last = self.model.config.max_position_embeddings - 1  # guesses may go beyond the window
        places = torch.as_tensor(np.minimum(places_RT, last), device=device)
        out = decoder(decoder.embed_tokens(ids_RT.to(device)), places, mask, self.cache)
        self.cache = out.past_key_values
        return self.model.compute_logits(out.last_hidden_state)

    def keep(self, counts_R: Ids, room: int) -> None:
        """Forgets all but the first tokens of each row since `keep` was last called.

        Args:
            counts_R: How many each row keeps.
            room: Slots that must be free then: where they are not, gaps are closed.
        """
        self.slots.keep(counts_R)
        self.cache = self.cache.crop(self.slots.length)
        if self.slots.has_room(room):
            return
        order = torch.as_tensor(self.slots.pack(), device=self.model.device).long()
        buffers = [
            buffer.gather(2, order[:, None, :, None].expand_as(buffer))
            for buffer in (*self.cache.keys, *self.cache.values)
        ]
        N, length = len(self.cache.keys), self.slots.length
        self.cache = KVCache(tuple(buffers[:N]), tuple(buffers[N:]), length, None, [length])


@torch.no_grad()
def _stream(
    model: "OPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "OPTForCausalLM | None",
) -> Iterator[Tensor]:
    settings, device, new = request.settings, model.device, request.new_tokens
    generator = torch.Generator(device).manual_seed(seed)
    most = settings.num_assistant_tokens if assistant else settings.prompt_lookup_num_tokens
    assert most is not None
    rows = Rows(*_prompts(request), settings, new, tokenizer, request.pad)
    width = request.ids.shape[1] + new + most
    # Gaps take slots too, until they are closed.
    slots = width if len(rows.texts) == 1 else width + new
    with packed(model, new), packed(assistant or model, new):
        target = _Reader(model, request, slots)
        draft = None if assistant is None else _Reader(assistant, _behind(request), slots)
        scores = _scores(target.logits[:, None], rows, rows.no_guesses, width, request)[:, 0]
        generation.check_logits(scores)
        token = sampling.select_tokens(scores, settings, generator)
        rows.take(token[:, None].cpu().numpy(), np.ones(len(token), np.int32))
        while True:
            for column in rows.columns():
                yield torch.as_tensor(column, device=device).long()
            if rows.ended.all():
                return
            count, drafted = min(most, int(rows.wanted.max())), None
            if draft is None:
                guesses, counts = rows.look_up(count, settings.max_matching_ngram_size)
                guesses = guesses[:, : counts.max()]
            else:
                guesses, drafted = _propose(draft, rows, count, width, request, generator)
                counts = np.minimum(rows.wanted, count)
            block = torch.as_tensor(np.concatenate([rows.newest(1), guesses], 1), device=device)
            logits = target.read(block, rows.positions(block.shape[1], 1))
            tokens, counts = accept_draft(
                _scores(logits, rows, guesses, width, request),
                block[:, 1:].long(),
                torch.as_tensor(counts, device=device),
                drafted,
                settings,
                generator,
            )
            taken = rows.take(tokens.cpu().numpy(), counts.cpu().numpy())
            if not rows.ended.all():
                for reader in (target, draft):
                    if reader is not None:
                        reader.keep(taken, most + 1)


def _propose(
    draft: _Reader,
    rows: Rows,
    count: int,
    width: int,
    request: "Request",
    generator: torch.Generator,
) -> tuple[Ids, Tensor | None]:
    """What the draft writes, (R, count) ids, and by which probabilities if they are drawn."""
    guesses, drafted = rows.no_guesses, []
    # It is a token behind the model: then it has read what the model has, whatever was right.
    new, places = rows.newest(2), rows.positions(count + 1, 2)
    for i in range(count):
        ids = torch.as_tensor(new, device=draft.model.device)
        logits = draft.read(ids, places[:, i + 2 - new.shape[1] : i + 2])[:, -1:]
        scores = _scores(logits, rows, guesses, width, request)[:, -1]
        if request.settings.do_sample:
            drafted.append(probabilities(scores, request.settings))
            token = _draw(drafted[-1], generator)
        else:
            token = scores.argmax(-1)
        new = token[:, None].cpu().numpy().astype(np.int32)
        guesses = np.concatenate([guesses, new], 1)
    return guesses, torch.stack(drafted, 1) if drafted else None


def _scores(
    logits_RTV: Tensor, rows: Rows, guesses_RG: Ids, width: int, request: "Request"
) -> Tensor:
    """Constrained logits (R, T, V) of the tokens after the last T of a row and its guesses."""
    (R, T, V), device, settings = logits_RTV.shape, logits_RTV.device, request.settings
    ids, real, made = (
        torch.as_tensor(x[:, -T:].reshape(R * T, *x.shape[2:]), device=device)
        for x in rows.histories(guesses_RG, width)
    )
    is_first = not rows.made.any()
    if not is_first:
        settings = settings.replace(begin_suppress_tokens=None)
    scores = generation.mask_vocabulary(logits_RTV.flatten(0, 1), request.vocabulary)
    scores = sampling.process_logits(scores, ids.long(), real, 0 if is_first else made, settings)
    return scores.view(R, T, V)


def _draw(probabilities_BV: Tensor, generator: torch.Generator) -> Tensor:
    B, V = probabilities_BV.shape
    ids = torch.arange(V, device=probabilities_BV.device).expand(B, V)
    return sampling.draw_tokens(probabilities_BV.log(), ids, generator)


def _prompts(request: "Request") -> tuple[Ids, Mask]:
    """The prompts, and where their tokens are real."""
    ids = request.ids.cpu().numpy().astype(np.int32)
    mask = np.ones(ids.shape, bool) if request.mask is None else request.mask.cpu().numpy()
    return ids, mask


def _behind(request: "Request") -> "Request":
    """The prompts without their last token, and with padding before the first."""
    ids = F.pad(request.ids[:, :-1], (1, 0), value=request.pad)
    mask = request.ids.new_ones(ids.shape, dtype=torch.bool)
    mask = F.pad((mask if request.mask is None else request.mask)[:, :-1], (1, 0))
    return replace(request, ids=ids, mask=mask, past=None)
