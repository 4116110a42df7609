"""One process of several that share a model; `tests/flax/test_sharding.py` starts two of them.

Each is a program of its own with two emulated devices, as a host of a pod has its chips. What it
computes goes into a file, for the test to compare with what a single process computes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, PADDED = 4, 9, [9, 5, 2, 7]


def main(index: int, count: int, port: int, model_folder: Path, out: Path) -> None:
    # As in tests/conftest.py, but for the number of devices.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags.append("--xla_force_host_platform_device_count=2")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)

    import opt_flax
    from opt_core.errors import CheckpointError, ConfigError
    from opt_core.params import param_specs
    from opt_core.training.config import TrainConfig
    from opt_flax import checkpoint, sharding, training, training_checkpoints
    from tests.support.reference import make_mask, make_prompts

    assert len(jax.local_devices()) == 2
    assert len(jax.devices()) == 2 * count
    read: list[int] = []
    cast = checkpoint.cast_array
    checkpoint.cast_array = lambda *args: (read.append(args[1].nbytes), cast(*args))[1]
    # "fsdp" lies across the processes, "model" within each.
    mesh = sharding.make_mesh(fsdp=count, model=2)
    model = opt_flax.FlaxOPTForCausalLM.from_pretrained(model_folder, mesh=mesh)
    facts: dict[str, object] = {"read": sum(read), "largest": max(read)}
    try:
        sharding.make_mesh(model=2, devices=[d for d in jax.devices() if d.process_index == 0])
    except ConfigError as error:
        facts["foreign mesh"] = str(error)

    model.save_pretrained(out / "saved")
    facts["complete"] = (out / "saved" / "generation_config.json").exists()
    (out / "file").touch()
    try:
        model.save_pretrained(out / "file" / "model")
    except CheckpointError as error:
        facts["refused"] = str(error)

    ids, mask = make_prompts(model.config, BATCH, LENGTH), make_mask("left", PADDED)
    values = {"ids": model.generate(ids, mask, max_new_tokens=10)}
    config = TrainConfig(max_steps=4, learning_rate=1e-2)
    optimizer = training.make_optimizer(model, config)
    model.train()
    facts["losses"] = [training.train_step(model, optimizer, ids, config, 0)]
    with training_checkpoints.TrainingCheckpoints(out / "training") as checkpoints:
        checkpoints.save(1, model, optimizer)
        for spec in param_specs(model.config):
            values[spec.name] = checkpoint.as_array(checkpoint.get_parameter(model, spec))
        facts["losses"].append(training.train_step(model, optimizer, ids, config, 1))
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in values.items()}
    np.savez(out / f"{index}.npz", **arrays)
    (out / f"{index}.json").write_text(json.dumps(facts))
    jax.distributed.shutdown()


if __name__ == "__main__":
    index, count, port, *paths = sys.argv[1:]
    main(int(index), int(count), int(port), *map(Path, paths))
