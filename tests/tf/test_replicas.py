"""Several devices and several processes."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from tests.tf.models import ROOT

FIT = """
    import contextlib, json, os, sys
    import tensorflow as tf
    kind, rank, ports, dropout = sys.argv[1], int(sys.argv[2]), sys.argv[3:5], float(sys.argv[5])
    if kind == "mirrored":
        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, devices)
    import opt_tf
    scope = contextlib.nullcontext()
    if kind == "mirrored":
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    elif kind == "workers":
        workers = [f"127.0.0.1:{port}" for port in ports]
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(task)
        scope = tf.distribute.MultiWorkerMirroredStrategy().scope()
    from opt_core import TrainConfig
    from opt_tf.training import make_optimizer
    from tests.configs import CONFIGS
    from tests.reference import make_prompts
    config = CONFIGS["pre_ln"].replace(dropout=dropout)
    with scope:
        model = opt_tf.TFOPTForCausalLM(config, seed=1)
        settings = TrainConfig(learning_rate=1e-3, max_grad_norm=0.1)
        model.compile(optimizer=make_optimizer(model, settings))
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    ids = make_prompts(config, 8, 12)
    data = tf.data.Dataset.from_tensor_slices(ids).batch(4).with_options(options)
    losses = model.fit(data, epochs=3, verbose=0).history["loss"]
    print(json.dumps([*losses, float(model.evaluate(data, verbose=0))]))
"""


def fit_elsewhere(kind: str, dropout: float = 0.0, processes: int = 1) -> list[list[float]]:
    """The losses that each process of a training sees."""
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(str(listener.getsockname()[1]))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FIT), kind, str(rank), *ports, str(dropout)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = []
    for process in started:
        try:
            out, err = process.communicate(timeout=180)
        finally:
            process.kill()
        assert process.returncode == 0, err[-2000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.mark.slow
def test_replicas_and_workers_see_the_losses_of_one_process():
    """Gradients are clipped over all of them together, which Keras alone does not do."""
    (alone,) = fit_elsewhere("one")
    assert alone[-1] < alone[0] - 0.1
    (mirrored,) = fit_elsewhere("mirrored")
    np.testing.assert_allclose(mirrored, alone, rtol=1e-5)
    for losses in fit_elsewhere("workers", processes=2):
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


@pytest.mark.slow
def test_replicas_drop_values_of_their_own():
    (losses,) = fit_elsewhere("mirrored", dropout=0.1)
    assert losses[-1] < losses[0] - 0.1
