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

from tests.support.tf_models import ROOT

FIT = """
    import contextlib, json, os, sys
    import tensorflow as tf
    kind, rank, ports = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    if kind != "workers":
        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, devices)
    import opt_tf
    from opt_core import TrainConfig
    from opt_tf.training import make_optimizer
    from tests.support.configs import CONFIGS
    from tests.support.reference import make_prompts

    def fit(scope, dropout=0.0):
        config = CONFIGS["pre_ln"].replace(dropout=dropout, num_hidden_layers=1)
        with scope:
            model = opt_tf.TFOPTForCausalLM(config, seed=1)
            settings = TrainConfig(learning_rate=1e-3, max_grad_norm=0.1)
            optimizer = make_optimizer(model, settings)
            model.compile(optimizer=optimizer, jit_compile=False)  # what is split is the batch
        options = tf.data.Options()
        policy = tf.data.experimental.AutoShardPolicy.DATA
        options.experimental_distribute.auto_shard_policy = policy
        ids = make_prompts(config, 8, 12)
        data = tf.data.Dataset.from_tensor_slices(ids).batch(4).with_options(options)
        losses = model.fit(data, epochs=2, verbose=0).history["loss"]
        return [*losses, float(model.evaluate(data, verbose=0))]

    def drop(strategy):
        # A logit of each replica; all read the same, with dropout.
        with strategy.scope():
            model = opt_tf.TFOPTForCausalLM(CONFIGS["pre_ln"].replace(num_hidden_layers=1), seed=1)
        ids = tf.constant(make_prompts(model.config, 1, 12))
        run = tf.function(lambda: strategy.run(lambda: model(ids, training=True).logits[0, -1, 5]))
        return [float(x) for x in strategy.experimental_local_results(run())]

    if kind == "workers":
        workers = [f"127.0.0.1:{port}" for port in ports]
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(task)
        runs = [fit(tf.distribute.MultiWorkerMirroredStrategy().scope())]
    else:
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        runs = [fit(contextlib.nullcontext()), fit(two.scope())]
        runs.append(fit(two.scope(), dropout=0.1) if kind == "dropping" else drop(two))
    print(json.dumps(runs))
"""


def fit_elsewhere(kind: str, processes: int = 1) -> list[list[list[float]]]:
    """The losses that each process of a training sees, run by run."""
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(str(listener.getsockname()[1]))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FIT), kind, str(rank), *ports],
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


@pytest.fixture(scope="module")
def replicas():
    """The losses of one process, alone and on two replicas; and what those drop."""
    ((alone, mirrored, dropped),) = fit_elsewhere("replicas")
    return alone, mirrored, dropped


def test_replicas_see_the_losses_of_one_process(replicas):
    """Gradients are clipped over all of them together, which Keras alone does not do."""
    alone, mirrored, dropped = replicas
    assert alone[-1] < alone[0] - 0.1
    np.testing.assert_allclose(mirrored, alone, rtol=1e-5)
    one, other = dropped
    assert abs(one - other) > 1e-3, "both replicas drop the same values"


@pytest.mark.slow
def test_replicas_learn_with_dropout():
    ((_, mirrored, dropping),) = fit_elsewhere("dropping")
    assert dropping[-1] < dropping[0] - 0.1
    assert dropping[0] != mirrored[0]


@pytest.mark.slow
def test_workers_see_the_losses_of_one_process(replicas):
    alone, *_ = replicas
    for (losses,) in fit_elsewhere("workers", processes=2):
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


STEPS = """
    import contextlib, json
    import tensorflow as tf
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, devices)
    import opt_tf
    from opt_core import TrainConfig
    from opt_tf import sharding, training
    from opt_tf.trainer import Trainer
    from tests.support.configs import CONFIGS
    from tests.support.reference import make_prompts

    config = CONFIGS["pre_ln"].replace(dropout=0.0, num_hidden_layers=1)
    ids = make_prompts(config, 8, 12)
    labels = ids.copy()
    labels[:3, 4:] = -100  # devices have unlike numbers of labels
    settings = TrainConfig(max_steps=3, learning_rate=1e-3, max_grad_norm=0.1, batch_size=8,
                           gradient_accumulation_steps=2)
    runs = []
    for mesh in (None, sharding.make_mesh(data=2)):
        trainer = Trainer.make(opt_tf.TFOPTForCausalLM, "", settings, config, True, None, mesh)
        batch = {"input_ids": ids, "labels": labels}
        runs.append([value for step in range(3) for value in trainer.step(batch, step)])
        runs[-1].append(trainer.evaluate([batch]))
    print(json.dumps(runs))
"""


@pytest.mark.slow
def test_steps_on_two_devices_are_those_of_one():
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STEPS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
