"""`opt-lm generate`: prompts in, text out, as it is written."""

import secrets
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend, load_backend
from opt_cli.devices import Coordinator, Mesh, Process, spread
from opt_core.errors import ConfigError, GenerationError

if TYPE_CHECKING:
    from opt_core import GenerationConfig, OPTTokenizer

DEFAULT_NEW_TOKENS = 64
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SAMPLING, _BEAMS, _OUTPUT = "Sampling", "Beam search", "Output"


@dataclass(frozen=True)
class _Completion:
    prompt: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class _Session:
    """A loaded model and what to do with it."""

    model: Any
    tokenizer: "OPTTokenizer"
    settings: "GenerationConfig"
    seed: int
    assistant: Any = None


def _option(help: str, metavar: str, panel: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            help='Texts to continue; "-": stdin; none: stdin, or asked for.',
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help='Folder, hub id, or "mini".', metavar="MODEL")
    ] = "mini",
    adapter: Annotated[
        str | None, _option("PEFT adapter to merge: folder or hub id.", "MODEL")
    ] = None,
    revision: Annotated[str | None, _option("Branch, tag or commit of a hub id.", "NAME")] = None,
    backend: Backend = AUTO,
    dtype: Annotated[
        str, _option("float32, bfloat16, float16; auto: as stored.", "NAME")
    ] = "float32",
    quantize: Annotated[
        str | None, _option("Keep the weights as int8 or int4: less memory.", "NAME")
    ] = None,
    device: Annotated[
        str | None, _option('Device of the torch backend, such as "cuda".', "NAME")
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(
            "--offload/--no-offload",
            help="Read layers from the file when their turn comes; torch (default: if too large).",
            show_default=False,
        ),
    ] = None,
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    process: Process = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help=f"Most tokens to write (default: the model's own, else {DEFAULT_NEW_TOKENS}).",
            metavar="N",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, _option("Stop once this is written; may be repeated.", "TEXT")
    ] = None,
    repetition_penalty: Annotated[float | None, _option("Above 1: repeat less.", "X")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, _option("Write no sequence of N tokens twice.", "N")
    ] = None,
    num_return_sequences: Annotated[int | None, _option("Texts per prompt.", "N")] = None,
    prompt_lookup: Annotated[
        int | None, _option("Draft N tokens at a time from the text so far; same text.", "N")
    ] = None,
    assistant: Annotated[
        str | None, _option("A smaller model that drafts tokens; same text.", "MODEL")
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--greedy",
            help="Draw tokens, or take the likeliest (default: the model's own, else greedy).",
            rich_help_panel=_SAMPLING,
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None, _option("Below 1: more conservative.", "X", _SAMPLING)
    ] = None,
    top_k: Annotated[int | None, _option("Among the N likeliest; 0: all.", "N", _SAMPLING)] = None,
    top_p: Annotated[
        float | None, _option("Among the fewest of this probability.", "X", _SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None, _option("Among those at least X times the likeliest.", "X", _SAMPLING)
    ] = None,
    typical_p: Annotated[
        float | None, _option("Among the most typical of this probability.", "X", _SAMPLING)
    ] = None,
    seed: Annotated[
        int | None, _option("Same seed, same text; drawn and told if not given.", "N", _SAMPLING)
    ] = None,
    num_beams: Annotated[
        int | None, _option("Beams to keep; above 1: beam search.", "N", _BEAMS)
    ] = None,
    length_penalty: Annotated[
        float | None, _option("Above 0: longer texts win more often.", "X", _BEAMS)
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print each token as it is made (default: for one prompt).",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object instead.", rich_help_panel=_OUTPUT),
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            "-i",
            help="Write one text by turns; /help there says how.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Continue one or several texts.

    opt-lm generate "ROMEO:" --do-sample --temperature 0.8 --seed 7

    Options that are not given come from the model's generation_config.json.
    """
    if interactive and (prompt or json or stream is not None or assistant):
        raise GenerationError("--interactive asks for texts; without TEXT, --json and such options")
    prompts = [] if interactive else _read_prompts(prompt or [])
    given = {
        "max_new_tokens": max_new_tokens, "stop_strings": stop or None, "do_sample": do_sample,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "typical_p": typical_p, "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size, "num_beams": num_beams,
        "length_penalty": length_penalty, "num_return_sequences": num_return_sequences,
        "prompt_lookup_num_tokens": prompt_lookup,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    seed = secrets.randbelow(2**31) if seed is None else seed
    if mesh is not None and backend == "tf":
        raise ConfigError("--mesh: TensorFlow generates on one device; use --backend torch or flax")
    with spread(mesh, backend, coordinator, process) as (devices, _):
        started = time.perf_counter()
        session = _load(
            model,
            adapter,
            revision,
            backend,
            dtype,
            quantize,
            device,
            offload,
            given,
            seed,
            assistant,
            devices,
        )
        loaded = time.perf_counter()
        if interactive:
            from opt_cli.interactive import Conversation, converse

            parts = session.model, session.tokenizer, backend, session.settings, session.seed
            converse(Conversation(*parts))
            return
        single = len(prompts) == 1 and session.settings.num_return_sequences == 1
        can_stream = single and not session.settings.is_beam_search and not json
        if stream and not can_stream:
            raise GenerationError(
                "--stream needs one prompt, one text, no --num-beams and no --json"
            )
        streams = can_stream if stream is None else stream
        completions = [_stream(session, prompts[0])] if streams else _complete(session, prompts)
        elapsed = time.perf_counter() - loaded
        new = sum(len(completion.ids) for completion in completions)
        if json:
            console.print_json(
                {
                    "model": model,
                    "backend": backend,
                    "dtype": dtype,
                    "quantize": quantize,
                    "seed": seed,
                    "settings": asdict(session.settings),
                    "load_s": round(loaded - started, 3),
                    "generate_s": round(elapsed, 3),
                    "tokens": new,
                    "tokens_per_s": round(new / elapsed, 2),
                    "completions": [asdict(completion) for completion in completions],
                }
            )
        elif not streams:
            _print(completions)
        drawn = f", seed {seed}" if session.settings.do_sample else ""
        console.note(
            f"{model} on {backend}, {quantize or dtype}: loaded in {loaded - started:.2f} s, "
            f"{new} tokens in {elapsed:.2f} s, {new / elapsed:.1f} tokens/s{drawn}"
        )


def _read_prompts(arguments: list[str]) -> list[str]:
    if not arguments and sys.stdin.isatty():
        return [console.ask("prompt: ", "no prompt; expected one as an argument or on stdin")]
    return [_read_stdin() if text == "-" else text for text in arguments or ["-"]]


def _read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(f"stdin: expected UTF-8 text: {error}") from None
    if not text:
        raise GenerationError('stdin: expected a prompt, received nothing (pass "" for none)')
    return text.removesuffix("\n").removesuffix("\r")  # the shell's line end, not the writer's


def _load(
    model: str,
    adapter: str | None,
    revision: str | None,
    backend: str,
    dtype: str,
    quantize: str | None,
    device: str | None,
    offload: bool | None,
    given: dict[str, Any],
    seed: int,
    assistant: str | None,
    mesh: Any,
) -> _Session:
    from opt_core import OPTTokenizer
    from opt_core.adapters.folders import tokenizer_folder
    from opt_core.hub import resolve

    if device is not None and backend != "torch":
        raise ConfigError(f"--device is for the torch backend; {backend} places its arrays itself")
    path = resolve(model, revision=revision)
    tokenizer = OPTTokenizer.from_pretrained(tokenizer_folder(path, adapter))
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize}
    options |= {"device": device} if device else {}
    options |= {} if mesh is None else {"mesh": mesh}
    helper = None
    stay = {"offload": "auto" if offload is None else offload}
    with console.progress(f"loading {model}") as progress, console.notices("offload: "):
        made = load_backend(backend).from_pretrained(
            path, progress=progress, adapter=adapter, **options, **stay
        )
    if assistant is not None:
        with console.progress(f"loading {assistant}") as progress:
            helper = load_backend(backend).from_pretrained(
                resolve(assistant), progress=progress, **options
            )
    settings = resolve_settings(made.generation_config, given)
    return _Session(made, tokenizer, settings, seed, helper)


def resolve_settings(base: "GenerationConfig", given: dict[str, Any]) -> "GenerationConfig":
    """Puts the options of the command line over a model's own settings.

    Args:
        base: The model's settings.
        given: Options by the names of their settings, without those that were not given.

    Raises:
        GenerationError: A bad value, or an option that would have no effect.
    """
    # What was asked for switches off what the model's file has in its place.
    given = dict(given)
    if given.get("temperature") == 0:
        if given.get("do_sample") is not False:
            raise GenerationError("--temperature 0: for the likeliest token each time, --greedy")
        del given["temperature"]
    if given.get("num_beams", 1) > 1:
        given.setdefault("do_sample", False)
    elif given.get("do_sample"):
        given.setdefault("num_beams", 1)
    settings = base.replace(**given)
    if settings.max_new_tokens is None and settings.max_length == type(base)().max_length:
        settings = settings.replace(max_new_tokens=DEFAULT_NEW_TOKENS)
    for name in _ONLY_SAMPLING:
        if name in given and not settings.do_sample:
            raise GenerationError(f"{console.option(name)} has no effect without --do-sample")
    if "length_penalty" in given and not settings.is_beam_search:
        raise GenerationError("--length-penalty has no effect without --num-beams above 1")
    return settings


def _stream(session: _Session, prompt: str) -> _Completion:
    import numpy as np

    from opt_core.text import Detokenizer

    encoded = session.tokenizer([prompt], padding_side="left")
    detokenizer = Detokenizer(session.tokenizer)
    ids: list[int] = []
    pieces: list[str] = []
    tokens = session.model.stream(
        encoded.input_ids,
        attention_mask=encoded.attention_mask,
        generation_config=session.settings,
        seed=session.seed,
        tokenizer=session.tokenizer,
        assistant_model=session.assistant,
    )
    try:
        console.write(prompt, style="bold")  # a setting that does not fit has raised above
        for token in tokens:
            ids.append(int(np.asarray(token)[0]))
            pieces.append(detokenizer.push(ids[-1]))
            console.write(pieces[-1])
        pieces.append(detokenizer.flush())
        console.write(pieces[-1])
    finally:
        console.write("\n")
    return _Completion(prompt, "".join(pieces), ids)


def _complete(session: _Session, prompts: list[str]) -> list[_Completion]:
    import numpy as np

    encoded = session.tokenizer(prompts, padding_side="left")
    with console.progress("generating"):
        rows = session.model.generate(
            encoded.input_ids,
            attention_mask=encoded.attention_mask,
            generation_config=session.settings,
            seed=session.seed,
            tokenizer=session.tokenizer,
            assistant_model=session.assistant,
        )
    width = encoded.input_ids.shape[1]
    completions: list[_Completion] = []
    for index, row in enumerate(np.asarray(rows)[:, width:].tolist()):
        ids = _without_padding(row, session.settings)
        text = session.tokenizer.decode(ids, skip_special_tokens=True)
        prompt = prompts[index // session.settings.num_return_sequences]
        completions.append(_Completion(prompt, text, ids))
    return completions


def _without_padding(ids: list[int], settings: "GenerationConfig") -> list[int]:
    """Cuts what follows a row's end: `generate` fills rows to the length of the longest."""
    for index, token in enumerate(ids):
        if token in settings.eos_ids:
            return ids[: index + 1]
    while ids and ids[-1] == settings.pad_token_id:
        ids = ids[:-1]
    return ids


def _print(completions: list[_Completion]) -> None:
    for number, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            console.write(f"[{number}/{len(completions)}] ", style="dim")
        console.write(completion.prompt, style="bold")
        console.write(completion.text + "\n")
