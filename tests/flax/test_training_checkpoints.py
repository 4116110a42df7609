"""Training checkpoints: nothing is lost, on whatever mesh training resumes."""

import shutil

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import optax  # noqa: E402
from flax import nnx  # noqa: E402

import opt_flax  # noqa: E402
from opt_core.errors import CheckpointError  # noqa: E402
from opt_core.training.config import TrainConfig  # noqa: E402
from opt_flax import sharding, training, training_checkpoints  # noqa: E402
from opt_flax.training_checkpoints import TrainingCheckpoints  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_prompts  # noqa: E402

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
TRAIN = TrainConfig(max_steps=4, learning_rate=1e-2)
IDS = make_prompts(CONFIG, 4, 9)


@pytest.fixture(autouse=True, scope="module")
def precise():
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def fresh(folder):
    """A model in training mode and its optimizer: `fresh(2, 2, 2)` on a mesh."""

    def make(*sizes, config=CONFIG, **options):
        mesh = sharding.make_mesh(*sizes) if sizes else None
        model = opt_flax.FlaxOPTForCausalLM.from_pretrained(folder(config), mesh=mesh, **options)
        model.train()
        return model, training.make_optimizer(model, TRAIN)

    return make


def values(model, optimizer):
    """Copies of everything that training changes, padding of the vocabulary left out."""
    arrays = training_checkpoints._arrays(model, optimizer)
    return {
        key: np.array(value)[:99] if "embed_tokens" in key else np.array(value)
        for key, value in arrays.items()
    }


def test_training_resumes_on_another_mesh(fresh, tmp_path):
    """From one device to a mesh, and from there to one device. Dropout is on, and resumed too."""
    model, optimizer = fresh()
    training.train_step(model, optimizer, IDS, TRAIN, 0)
    saved = values(model, optimizer)
    with TrainingCheckpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, model, optimizer)
        # The step takes the model's arrays over while they are being written.
        losses = [training.train_step(model, optimizer, IDS, TRAIN, step) for step in (1, 2)]
        checkpoints.wait()
        for step, (sizes, rows, share) in enumerate(
            (((2, 2, 2), 100, (28, 16)), ((), 99, (56, 32))), start=1
        ):
            other, its = fresh(*sizes)
            other.get_decoder().rngs = nnx.Rngs(dropout=7)  # not those that are resumed
            assert checkpoints.restore_latest(other, its) == step
            table = other.get_decoder().embed_tokens.embedding[...]
            assert table.shape[0] == rows
            assert not table[99:].any()
            found = values(other, its)
            assert found.keys() == saved.keys()
            for key, value in found.items():
                np.testing.assert_array_equal(value, saved[key], err_msg=key)
            layer = other.get_decoder().layers[0].fc1.weight[...]
            assert {shard.data.shape for shard in layer.addressable_shards} == {share}
            if sizes:  # steps there are those of one device: tests/flax/test_sharding.py
                checkpoints.save(2, other, its)
                checkpoints.wait()
        again = [training.train_step(other, its, IDS, TRAIN, step) for step in (1, 2)]
        np.testing.assert_allclose(again, losses, rtol=0, atol=1e-5)


def test_the_newest_few_are_kept(fresh, tmp_path):
    model, optimizer = fresh()
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        for step in (1, 5, 20):
            checkpoints.save(step, model, optimizer)
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "5"]
        with pytest.raises(CheckpointError, match="expected a step after 20, received 20"):
            checkpoints.save(20, model, optimizer)


def test_what_a_killed_process_left_is_not_looked_at(fresh, tmp_path):
    model, optimizer = fresh()
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(3, model, optimizer)
    # Orbax writes under this name, and gives the folder its own when all is there.
    shutil.copytree(tmp_path / "3", tmp_path / "9.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "9.orbax-checkpoint-tmp" / "state")
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(model, optimizer) == 3
        checkpoints.save(9, model, optimizer)
        checkpoints.wait()
        assert checkpoints.restore_latest(model, optimizer) == 9


def test_what_does_not_fit_is_refused(fresh, tmp_path):
    model, optimizer = fresh()
    checkpoints = TrainingCheckpoints(tmp_path)
    with pytest.raises(CheckpointError, match="expected a training checkpoint, found none"):
        checkpoints.restore_latest(model, optimizer)
    checkpoints.save(1, model, optimizer)
    for options, message in (
        ({"config": CONFIG.replace(ffn_dim=40)}, "ffn_dim: expected 40, received 56"),
        ({"config": CONFIG.replace(vocab_size=100)}, "vocab_size: expected 100, received 99"),
        (
            {"config": CONFIG.replace(activation_function="gelu")},
            "expected 'gelu', received 'relu'",
        ),
        ({"dtype": "bfloat16"}, "dtype: expected 'bfloat16', received 'float32'"),
        ({"scan_layers": True}, "scan_layers: expected True, received False"),
    ):
        with pytest.raises(CheckpointError, match=f"step 1 does not fit: .*{message}"):
            checkpoints.restore_latest(*fresh(**options))
    before = values(model, optimizer)
    with pytest.raises(CheckpointError, match="step 1 does not fit: optimizer: expected"):
        checkpoints.restore_latest(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))
    after = values(model, optimizer)
    assert all((after[key] == value).all() for key, value in before.items())
    # How much is dropped may change from one day to the next.
    assert checkpoints.restore_latest(*fresh(config=CONFIG.replace(dropout=0.2))) == 1
    checkpoints.close()


@pytest.mark.parametrize("lost", ["about/metadata", "state/manifest.ocdbt"])
def test_damaged_checkpoints_are_refused(fresh, tmp_path, lost):
    model, optimizer = fresh()
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, optimizer)
    (tmp_path / "1" / lost).unlink()
    with (
        TrainingCheckpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="step 1 cannot be restored"),
    ):
        checkpoints.restore_latest(model, optimizer)


@pytest.mark.parametrize("keep", [0, True, 1.5])
def test_how_many_to_keep_is_checked(tmp_path, keep):
    with pytest.raises(CheckpointError, match="keep: expected an integer of at least 1"):
        TrainingCheckpoints(tmp_path, keep=keep)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be used"):
        TrainingCheckpoints(tmp_path / "file" / "run")
