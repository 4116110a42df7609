"""A model spread over devices computes what one device computes, and is really spread."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import opt_flax  # noqa: E402
from opt_core import mesh as rules  # noqa: E402
from opt_core.errors import ConfigError  # noqa: E402
from opt_core.generation.mixin import make_request  # noqa: E402
from opt_core.params import param_specs  # noqa: E402
from opt_core.training.config import TrainConfig  # noqa: E402
from opt_flax import checkpoint, sharding, training, training_checkpoints  # noqa: E402
from opt_flax.generation import beam, loop  # noqa: E402
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.oracle import random_params  # noqa: E402
from tests.support.processes import multi_host  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402
from tests.support.tiers import tiered  # noqa: E402

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
"""4 heads, a vocabulary of 99, 32 x 56: what a mesh of 8 divides, and what it does not."""

MESHES = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "model": {"model": 4},
    "heads that do not divide": {"model": 8},
    "mixed": {"data": 2, "fsdp": 2, "model": 2},
    "mixed, stacked layers": {"data": 2, "fsdp": 2, "model": 2, "scan_layers": True},
}
TRAIN = TrainConfig(max_steps=4, learning_rate=1e-2)
IDS, MASK = make_prompts(CONFIG, 4, 9), make_mask("left", [9, 5, 2, 7])
SETTINGS = {
    "greedy": {"max_new_tokens": 10},
    "sampled": {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "max_new_tokens": 10},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10},
}


@pytest.fixture(autouse=True, scope="module")
def eight_precise_devices():
    assert len(jax.devices()) == 8
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def load(folder):
    """Makes a model: `load("mixed")`, `load()` on one device."""

    def make(name=None, config=CONFIG, **options):
        sizes = dict(MESHES[name]) if name else {}
        options["scan_layers"] = sizes.pop("scan_layers", False)
        mesh = sharding.make_mesh(**sizes) if name else None
        path = folder(config)
        return opt_flax.FlaxOPTForCausalLM.from_pretrained(path, mesh=mesh, **options)

    return make


@nnx.jit
def learn(model, ids, mask):
    """Logits, loss and gradients, with dropout."""

    def loss(model):
        out = model(ids, attention_mask=mask, labels=ids, rngs=nnx.Rngs(dropout=3))
        return out.loss, out.logits

    (value, logits), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    return value, logits, gradients


def by_name(model, state=None):
    """Parameters, or gradients, by canonical name."""
    holder = nnx.clone(model)
    nnx.update(holder, {} if state is None else state)
    specs = param_specs(model.config)
    return {s.name: np.asarray(checkpoint.get_parameter(holder, s)) for s in specs}


def close(ours, theirs, atol=ORACLE_TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def expected(load):
    """The results of one device."""
    model = load()
    model.train()
    loss, logits, gradients = learn(model, IDS, MASK)
    found = {"loss": loss, "logits": logits, "gradients": by_name(model, gradients)}
    for name, settings in SETTINGS.items():
        found[name] = model.generate(IDS, MASK, seed=3, **settings)
    optimizer = training.make_optimizer(model, TRAIN)
    found["losses"] = [training.train_step(model, optimizer, IDS, TRAIN, i) for i in range(2)]
    return found


# What does not divide is shown with padded rows below, stacked layers with training.
@pytest.mark.parametrize("name", tiered(MESHES, lambda name: name == "mixed"))
def test_logits_losses_and_gradients_are_those_of_one_device(load, expected, name):
    model = load(name)
    model.train()
    loss, logits, gradients = learn(model, IDS, MASK)
    assert logits.shape == (4, 9, CONFIG.vocab_size)
    close(logits, expected["logits"])
    close(loss, expected["loss"])
    close_gradients(model, gradients, expected)


def close_gradients(model, gradients, expected):
    for key, value in by_name(model, gradients).items():
        theirs = expected["gradients"][key]
        # The gradient of k_proj.bias is zero: what is there is rounding noise of 1e-7.
        close(value, theirs, max(GRADIENT_TOLERANCE * float(np.abs(theirs).max()), 3e-7))


@pytest.mark.parametrize("name", tiered(MESHES, lambda name: name == "mixed"))
def test_generation_is_that_of_one_device(load, expected, name):
    model = load(name)
    for kind in ("sampled", "beams"):
        found = model.generate(IDS, MASK, seed=3, **SETTINGS[kind])
        np.testing.assert_array_equal(found, expected[kind], err_msg=kind)
    streamed = np.stack(list(model.stream(IDS, MASK, **SETTINGS["greedy"])), 1)
    np.testing.assert_array_equal(streamed, expected["greedy"][:, 9 : 9 + streamed.shape[1]])


def test_a_batch_that_does_not_divide(load, expected):
    model, plain = load("mixed"), load()
    run = nnx.jit(lambda model: model(IDS[:3], attention_mask=MASK[:3]).logits)
    close(run(model), run(plain))
    found = model.generate(IDS[:3], MASK[:3], **SETTINGS["greedy"])
    np.testing.assert_array_equal(found, expected["greedy"][:3])


def parts(array):
    """The shape of what each device holds, the same for all."""
    (shape,) = {shard.data.shape for shard in array.addressable_shards}
    return shape


SHARES = {
    # mesh: fc1's weight (56, 32), q_proj's (32, 32), the embedding (99, 32), a cache (4, 4, 10, 8)
    "data": [(56, 32), (32, 32), (99, 32), (1, 4, 10, 8)],
    "fsdp": [(56, 8), (32, 8), (99, 8), (1, 4, 10, 8)],
    "model": [(14, 32), (8, 32), (25, 32), (4, 1, 10, 8)],
    "heads that do not divide": [(7, 32), (32, 32), (13, 32), (4, 4, 10, 8)],
    "mixed": [(28, 16), (16, 16), (50, 16), (1, 2, 10, 8)],
    "mixed, stacked layers": [(1, 28, 16), (1, 16, 16), (50, 16), (1, 2, 10, 8)],
}


@pytest.mark.parametrize("name", MESHES)
def test_each_device_holds_its_share(load, name):
    model = load(name)
    decoder = model.get_decoder()
    layer = decoder.layers if decoder.scan_layers else decoder.layers[0]
    cache = model.init_cache(4, 10)
    arrays = [layer.fc1.weight, layer.self_attn.q_proj.weight, decoder.embed_tokens.embedding]
    assert [parts(a[...]) for a in arrays] + [parts(cache.keys[0])] == SHARES[name]
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    inputs = training._inputs(model, {"input_ids": IDS, "labels": IDS})
    assert parts(inputs["input_ids"]) == (4 // ways, 9)
    assert len(model.device.device_set) == model.mesh.size


@pytest.mark.parametrize(
    "name", tiered(["data", "mixed, stacked layers"], lambda name: name != "data")
)
def test_training_keeps_everything_in_its_place(load, expected, name, caplog):
    model = load(name)
    model.train()
    optimizer = training.make_optimizer(model, TRAIN)
    before = training_checkpoints._arrays(model, optimizer)
    places = {key: (value.sharding, value.ndim) for key, value in before.items()}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        losses = [training.train_step(model, optimizer, IDS, TRAIN, step) for step in range(2)]
    # One program, though the first step was given counters that were not on the mesh yet.
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "Finished XLA compilation of jit(_step)" in line]) == 1
    close(losses, expected["losses"], 1e-5)
    arrays = training_checkpoints._arrays(model, optimizer)
    assert all(arrays[key].sharding.is_equivalent_to(*place) for key, place in places.items())
    moments = [key for key in arrays if "opt_state.1.mu" in key]
    assert len(moments) == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for key in moments:
        assert parts(arrays[key]) == parts(arrays["model." + key.partition(".mu.")[2]])


def collectives(compiled):
    """The collectives between devices: (kind, shape of what each has afterwards)."""
    found = []
    for line in compiled.as_text().splitlines():
        kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], tuple(int(n) for n in shape.split(",") if n)))
    return found


def decode_program(model):
    request = make_request(model, IDS, MASK, **SETTINGS["greedy"])
    graph, state, rows, settings = loop._start(model, request)
    return loop._step.lower(graph, state, rows, settings).compile(), rows.cache


def test_tensor_parallel_decoding_sends_activations_only(load):
    program, cache = decode_program(load("model"))
    assert parts(cache.keys[0]) == (4, 1, 64, 8)
    found = collectives(program)
    D, N = CONFIG.hidden_size, CONFIG.num_hidden_layers
    # The embedding, then attention and feed-forward of each layer, which a CPU computes the other
    # way round; then each device's best token.
    sums = [("all-reduce", (4, 1, D)), *[("all-reduce", (D, 4))] * 2 * N]
    assert [entry for entry in found if entry in sums] == sums
    rest = [entry for entry in found if entry not in sums]
    assert all(kind == "all-gather" and math.prod(shape) <= 4 * 4 for kind, shape in rest)


def test_data_parallel_decoding_sends_tokens_only(load):
    program, cache = decode_program(load("data"))
    assert parts(cache.keys[0]) == (1, 4, 64, 8)
    assert all(math.prod(shape) <= 4 for _, shape in collectives(program))


@pytest.mark.parametrize("name", tiered(["data", "model", "mixed"], lambda name: name == "mixed"))
def test_beams_stay_with_their_prompts_devices(load, name):
    """Choosing beams anew moves no cache between devices."""
    model = load(name)
    request = make_request(model, IDS, MASK, **SETTINGS["beams"])
    graph, state, search, settings = beam._start(model, request)
    share = parts(search.cache.keys[0])
    rows, heads = SHARES[name][3][:2]
    assert share == (3 * rows, heads, 64, 8)
    text = beam._loop.lower(graph, state, search, settings).compile()
    assert not [shape for _, shape in collectives(text) if shape[1:] in (share[1:], (4, 64, 8))]


def test_padded_rows_of_the_vocabulary_are_never_seen(load, expected, tmp_path):
    model = load("heads that do not divide")
    table = model.get_decoder().embed_tokens.embedding
    assert table.shape == (104, 32)
    assert not table[...][99:].any()
    # Whatever they hold, no result shows it.
    loud = jnp.where(jnp.arange(104)[:, None] < 99, table[...], 100.0)
    table.set_value(jax.device_put(loud, table[...].sharding))
    found = model.generate(IDS, MASK, seed=3, **SETTINGS["sampled"])
    np.testing.assert_array_equal(found, expected["sampled"])
    model.train()
    loss, logits, gradients = learn(model, IDS, MASK)
    assert logits.shape == (4, 9, 99)
    close(logits, expected["logits"])
    close(loss, expected["loss"])
    assert not gradients.model.decoder.embed_tokens.embedding[...][99:].any()
    close_gradients(model, gradients, expected)
    # An id there is as wrong as any other that is none.
    ids = np.array(IDS)
    ids[0, 8] = 99
    outside = np.asarray(learn(model, ids, MASK)[1])
    assert np.isnan(outside[0, 8]).all()
    assert np.isfinite(outside[1:, 8]).all()
    for one, name in ((model, "sharded"), (load(), "plain")):
        one.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sharded", "plain")]
    assert files[0] == files[1]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_reads_slices_only(folder, monkeypatch, dtype, scan):
    sizes = []

    def cast(name, array, wanted):
        sizes.append((name, array.shape))
        return original(name, array, wanted)

    original = checkpoint.cast_array
    monkeypatch.setattr(checkpoint, "cast_array", cast)
    mesh = sharding.make_mesh(fsdp=2, model=4)
    config = CONFIG.replace(num_hidden_layers=2)  # which could be mixed up
    model = opt_flax.FlaxOPTForCausalLM.from_pretrained(
        folder(config), dtype=dtype, mesh=mesh, scan_layers=scan
    )
    stored = random_params(config)
    for spec in param_specs(config):
        found = np.asarray(checkpoint.get_parameter(model, spec))
        np.testing.assert_array_equal(found, stored[spec.name].astype(dtype), err_msg=spec.name)
        values = checkpoint.locate(model, spec)[...]
        share = parts(values)[1:] if scan and ".layers." in spec.name else parts(values)
        pieces = [shape for name, shape in sizes if name == spec.name]
        held = len({str(shard.index) for shard in values.addressable_shards})
        # Once for all devices that hold the same; the last rows of a vocabulary may be fewer.
        assert len(pieces) == held, spec.name
        assert max(pieces) == share, spec.name
        if spec.name.endswith("fc1.weight"):
            assert share == (14, 16)
            assert held == 8
    assert max(math.prod(shape) for _, shape in sizes) == 514 * 16  # positions: only "fsdp" splits


def test_a_model_starts_alike_on_every_mesh():
    ours, theirs = (
        opt_flax.FlaxOPTForCausalLM(CONFIG, seed=5, mesh=mesh)
        for mesh in (sharding.make_mesh(2, 2, 2), None)
    )
    for name, value in by_name(ours).items():
        np.testing.assert_array_equal(value, by_name(theirs)[name])


def test_meshes_that_cannot_be_used():
    make: Any = sharding.make_mesh
    with pytest.raises(
        ConfigError, match=r"data=3 x fsdp=1 x model=4 needs 12 devices, received 8"
    ):
        make(3, 1, 4)
    with pytest.raises(ConfigError, match=r"needs 2 devices, received 3"):
        make(model=2, devices=jax.devices()[:3])
    for size in (0, 2.0, True):
        with pytest.raises(ConfigError, match=r"mesh: expected integers of at least 1, received"):
            make(fsdp=size)
    model: Any = opt_flax.FlaxOPTForCausalLM
    with pytest.raises(ConfigError, match=r"expected the axes data, fsdp, model .* received x, y"):
        model(CONFIG, mesh=jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2))
    with pytest.raises(
        ConfigError, match=r"of type Auto .* received data, fsdp, model of type A.*Explicit"
    ):
        model(CONFIG, mesh=jax.make_mesh((1, 2, 4), rules.AXES, (AxisType.Explicit,) * 3))
    with pytest.raises(ConfigError, match=r"mesh: expected a jax\.sharding\.Mesh, received int"):
        model(CONFIG, mesh=8)


def test_one_table_says_where_parameters_go():
    mesh = sharding.make_mesh(2, 2, 2)
    specs = {spec.name.rpartition("layers.0.")[2]: spec for spec in param_specs(CONFIG)}
    assert {axis for spec in specs.values() for axis in spec.axes} <= rules.RULES.keys()
    for name, expected in (
        ("fc1.weight", ("model", "fsdp")), ("fc1.bias", ("model",)),
        ("fc2.weight", ("fsdp", "model")), ("fc2.bias", ("fsdp",)),
        ("self_attn.q_proj.weight", ("model", "fsdp")),
        ("self_attn.out_proj.weight", ("fsdp", "model")),
        ("model.decoder.embed_tokens.weight", ("model", "fsdp")),
        ("model.decoder.embed_positions.weight", (None, "fsdp")),
    ):  # fmt: skip
        assert sharding.partition(specs[name], CONFIG, mesh) == PartitionSpec(*expected), name
    narrow = CONFIGS["post_ln"]  # projections: an axis of the mesh splits one dimension only
    (into,) = [spec for spec in param_specs(narrow) if "project_in" in spec.name]
    assert sharding.partition(into, narrow, mesh) == PartitionSpec("fsdp")


def test_two_processes_share_a_model(load, folder, expected, tmp_path):
    facts = run_processes(folder(CONFIG), tmp_path)
    model = load()
    total = 4 * sum(spec.size for spec in param_specs(CONFIG))
    for fact in facts:
        # Half of all that "fsdp" splits, once; the largest piece is a slice of the positions.
        assert fact["read"] < 0.6 * total
        assert fact["largest"] == 4 * 514 * 16
        assert fact["complete"]
    assert "cannot be written" in facts[0]["refused"]
    assert "process 0 could not write" in facts[1]["refused"]
    assert "received none of process 1 of 2" in facts[1]["foreign mesh"]
    model.save_pretrained(tmp_path / "alone")
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved").iterdir())
    for name in names:
        saved, alone = (tmp_path / where / name for where in ("saved", "alone"))
        assert saved.read_bytes() == alone.read_bytes(), name

    first, second = (dict(np.load(tmp_path / f"{i}.npz")) for i in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    np.testing.assert_array_equal(first["ids"], expected["greedy"])
    for fact in facts:
        close(fact["losses"], expected["losses"], 1e-5)
    # What two processes wrote together, one goes on with.
    model = load("mixed")
    optimizer = training.make_optimizer(model, TRAIN)
    with training_checkpoints.TrainingCheckpoints(tmp_path / "training") as checkpoints:
        assert checkpoints.restore_latest(model, optimizer) == 1
    for name, value in by_name(model).items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)


def run_processes(model: Path, out: Path, count: int = 2, limit: int = 240) -> list[dict]:
    """Starts `processes.multi_host` so many times; returns the facts that each wrote down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(multi_host.__file__).parents[3]
    command = [sys.executable, "-m", "tests.support.processes.multi_host"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    logs = [out / f"log{index}" for index in range(count)]
    processes = []
    try:
        for index, log in enumerate(logs):
            arguments = [str(x) for x in (index, count, port, model, out)]
            processes.append(
                subprocess.Popen(
                    [*command, *arguments], cwd=root, env=environment,
                    stdout=log.open("w"), stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        for process in processes:
            process.wait(limit)
    except subprocess.TimeoutExpired:
        pass  # said below, with what the processes said
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
    assert codes == [0] * count, f"exit codes {codes} within {limit} s:\n{tails}"
    return [json.loads((out / f"{index}.json").read_text()) for index in range(count)]
