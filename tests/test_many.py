"""Seeds trained side by side do what each of them does alone."""

import dataclasses

import pytest
import torch
from torch import nn

from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError
from mnist_fast.evaluate import evaluate
from mnist_fast.loop import Training
from mnist_fast.many import SideBySide, WideNetwork, train_in_turn, train_many, widen
from mnist_fast.model import NETWORKS, build_network
from mnist_fast.step import TrainingStep

SEEDS = [3, 1, 2]
FAST = Config(  # every part that a step has, in float32: a rest batch, EMA, a plain last epoch
    dataset="digits",
    validation_split=1181,  # leaves 256 images to train on
    epochs=2,
    batch_size=96,
    learning_rate=0.01,
    schedule="onecycle",
    nesterov=True,
    weight_decay=1e-3,
    dropout=0.0,
    label_smoothing=0.1,
    affine_rotation=10,
    shear=5,
    translate=0.09,
    scale_min=0.9,
    scale_max=1.1,
    elastic=1.0,
    brightness=0.2,
    contrast=0.2,
    resampling="bilinear",
    plain_epochs=1,
    precision="no",
    step="eager",
    feed="resident",
    wandb="disabled",
    checkpoint_every=0,
)
LOSS_TOLERANCE = 1e-3  # relative


def train_alone(config):
    """A single run's losses and accuracies by epoch, and its evaluated network's state."""
    training = Training(config)
    records = []
    for _ in range(config.epochs):
        train = training.train_epoch()
        images, labels, count = training.evaluation_set
        network = training.step.best_network()
        held_out = evaluate(network, images, labels, training.runtime, count)
        records.append((train, held_out))
        training.position.epoch, training.position.step = training.position.epoch + 1, 0
        training.step.reset_totals()
    return records, network.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"ema_decay": 0.5, "network": "record", "drop_last": True, "plain_epochs": 0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["notebook", "record-ema"],
)
def test_side_by_side_equals_single_runs(changes, small_betons, in_process, tmp_path):
    """In float32 the two round differently, which every step amplifies: so few and small steps."""
    config = dataclasses.replace(FAST, data_dir=str(small_betons), **changes)
    summaries, together = train_many(config, SEEDS[:2])
    losses = []
    for index, (seed, summary) in enumerate(zip(SEEDS, summaries, strict=False)):
        run_dir = str(tmp_path / str(seed))
        records, state = train_alone(dataclasses.replace(config, seed=seed, run_dir=run_dir))
        for mine, (train, held_out) in zip(summary["records"], records, strict=True):
            assert mine["train_loss"] == pytest.approx(train.loss, rel=LOSS_TOLERANCE)
            assert mine["validation_loss"] == pytest.approx(held_out.loss, rel=LOSS_TOLERANCE)
            assert mine["train_accuracy"] == pytest.approx(train.accuracy, abs=1.5)
            assert mine["validation_accuracy"] == pytest.approx(held_out.accuracy, abs=1.5)
        for name, tensor in together.state_of(index).items():
            torch.testing.assert_close(tensor, state[name], rtol=2e-3, atol=2e-3, msg=name)
        losses.append(records[0][0].loss)
    # the tolerance means something: another seed's losses lie far outside of it
    assert abs(losses[0] / losses[1] - 1) > 5 * LOSS_TOLERANCE


def test_in_turn_equals_single_runs(small_betons, in_process, tmp_path):
    """Exactly: a seed finds nothing of the one before."""
    config = dataclasses.replace(FAST, data_dir=str(small_betons), dropout=0.1, ema_decay=0.5)
    for summary in train_in_turn(config, SEEDS[:2]):
        seed = summary["seed"]
        run_dir = str(tmp_path / str(seed))
        records, _ = train_alone(dataclasses.replace(config, seed=seed, run_dir=run_dir))
        for mine, (train, held_out) in zip(summary["records"], records, strict=True):
            assert mine["train_loss"] == train.loss
            assert mine["validation_loss"] == pytest.approx(held_out.loss, rel=1e-12)
            assert mine["train_accuracy"] == train.accuracy
            assert mine["validation_accuracy"] == held_out.accuracy
        assert summary["validation_accuracy"] == records[-1][1].accuracy


@pytest.mark.parametrize("name", NETWORKS)
def test_a_wide_network_is_its_networks(name):
    """In float64: outputs, batch statistics and gradients are each network's own."""
    torch.manual_seed(0)
    networks = [build_network(name).double() for _ in range(3)]
    wide = WideNetwork(networks).double()
    images = torch.randn(4, 3, 28, 28, dtype=torch.float64)
    together = wide(images)
    together.sum((0, 1))[0].backward()
    for index, network in enumerate(networks):
        alone = network(images[:, index : index + 1])
        alone.sum(0)[0].backward()
        torch.testing.assert_close(together[:, index], alone)
        for key, tensor in wide.state_of(index).items():
            torch.testing.assert_close(tensor, network.state_dict()[key], msg=key)
        for mine, theirs in zip(wide.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.chunk(3)[index], theirs.grad)


def test_a_layer_that_cannot_be_widened_is_refused():
    with pytest.raises(TypeError, match="Linear cannot be widened"):
        widen([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_dropout_masks_differ_between_networks():
    torch.manual_seed(0)
    network = build_network("notebook", dropout=0.5)
    wide = WideNetwork([network, network])
    images = torch.randn(4, 1, 28, 28).expand(-1, 2, -1, -1)
    together = wide(images)
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_step_keeps_its_buffers(small_betons, runtime):
    """What a CUDA graph relies on: nothing that a step reads or writes moves in memory."""
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (64,))
    config = dataclasses.replace(FAST, batch_size=16, ema_decay=0.5)
    together = SideBySide(config, SEEDS, runtime, (images, labels))
    together.train_epoch(0, together.orders(0))

    def addresses():
        momenta = [state["momentum_buffer"] for state in together.optimizer.state.values()]
        own = [value for value in vars(together).values() if isinstance(value, torch.Tensor)]
        networks = [*together.network.state_dict().values()]
        rates = [group["lr"] for group in together.optimizer.param_groups]
        tensors = momenta + own + networks + rates + [*together.averaged.state_dict().values()]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    together.train_epoch(1, together.orders(1))
    assert addresses() == before


class Graph:
    """Stands in for a CUDA graph: runs the work before, as a capture does, and in every replay."""

    made = 0

    def __init__(self, work):
        Graph.made += 1
        for _ in range(3):
            work()
        self.replay = work


def test_a_capture_leaves_no_trace(runtime, monkeypatch):
    """Weights, averages, momenta and counters after two epochs are those without any capture."""
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (40,))
    config = dataclasses.replace(FAST, batch_size=16, ema_decay=0.5)
    monkeypatch.setattr(SideBySide, "graph_type", Graph)
    results = []
    for captures in (False, True):
        together = SideBySide(config, SEEDS, runtime, (images, labels))
        together.captures = captures
        for epoch in range(2):
            together.train_epoch(epoch, together.orders(epoch))
        momenta = together._optimizer_tensors()
        results.append([*together.network.state_dict().values(), *momenta.values()])
        results[-1] += [*together.averaged.state_dict().values(), together.totals]
    assert Graph.made == 2  # with and without augmentation
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_divergence_is_told(small_betons, in_process):
    config = dataclasses.replace(
        FAST, data_dir=str(small_betons), learning_rate=1e3, schedule="constant", weight_decay=1.0
    )
    with pytest.raises(RunError, match="no loss is finite in epoch 1, of any seed"):
        train_many(dataclasses.replace(config, batch_size=8), [1])


def test_a_lost_seed_does_not_end_the_others(small_betons, in_process, monkeypatch):
    config = dataclasses.replace(FAST, data_dir=str(small_betons), epochs=1)
    start_over = TrainingStep.start_over

    def spoil(step, seed):
        start_over(step, seed)
        if seed == 1:
            next(step.network.parameters()).data.fill_(torch.inf)

    monkeypatch.setattr(TrainingStep, "start_over", spoil)
    summaries = []
    with pytest.raises(RunError, match="the loss is not finite with seed 1: lower"):
        summaries.extend(train_in_turn(config, SEEDS))
    # `extend` keeps what came before the end
    assert [summary["seed"] for summary in summaries] == [3, 2]


def test_half_precision_is_refused(small_betons, in_process):
    config = dataclasses.replace(FAST, data_dir=str(small_betons), precision="fp16")
    with pytest.raises(InputError, match="fp16"):
        train_many(config, [1])
