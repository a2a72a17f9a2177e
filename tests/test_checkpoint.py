"""Checkpoints in both directions, and runs that were interrupted and go on as if they had not been."""

import copy

import pytest
import torch
from conftest import BATCH, BATCHES, Digits, read_digits, same, snapshot
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_int8 import Int8Precision, recipes
from lightning_int8.callbacks import AdaptiveBitWidth, DeviationCounteractiveLR
from lightning_int8.optim import FixedPointSGD
from lightning_int8.rewrite import layer_states

REFRESH = 3


class Shuffled:
    """Digits in an order that changes each epoch; remembers where it stands, as a stateful data loader does.

    Lightning loads the state of a loader in mid-epoch only; at an epoch's end it counts on ``sampler.set_epoch``.
    """

    def __init__(self):
        self.images, self.labels = read_digits()
        self.sampler = self
        self.epoch, self.position = 0, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        order = torch.randperm(BATCH * BATCHES, generator=torch.Generator().manual_seed(self.epoch)).split(BATCH)
        while self.position < BATCHES:
            self.position += 1
            rows = order[self.position - 1]
            yield self.images[rows], self.labels[rows]

    def set_epoch(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class Resumable(Digits):
    def train_dataloader(self):
        return Shuffled()


class Interrupted(Exception):
    pass


class InterruptAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Interrupted


def plugins(precision):
    return [] if precision == "float" else [Int8Precision(refresh=REFRESH, high_precision=precision)]


def end_state(trainer, model):
    """Everything that could differ at the end of a run."""
    optimizers = [o.state_dict() for o in trainer.optimizers]
    return copy.deepcopy([model.state_dict(), optimizers, trainer.precision_plugin.state_dict(), trainer.global_step])


WHEN = [
    pytest.param(BATCHES, {"every_n_epochs": 1}, id="epoch end"),
    pytest.param(4, {"every_n_train_steps": 4}, id="mid-epoch"),
    pytest.param(BATCHES + 5, {"every_n_train_steps": BATCHES + 5}, id="later, mid-epoch"),
]


@pytest.mark.parametrize(("step", "saving"), WHEN)
@pytest.mark.parametrize("precision", ["float", "32-true", "bf16-mixed", "16-mixed"])
def test_an_interrupted_run_goes_on_bit_for_bit(precision, step, saving, make_trainer, tmp_path):
    model = Resumable()
    trainer = make_trainer(*plugins(precision), max_epochs=3)
    trainer.fit(model)
    assert trainer.global_step == 3 * BATCHES
    uninterrupted = end_state(trainer, model)

    saver, stop = ModelCheckpoint(tmp_path, filename="saved", **saving), InterruptAfter(step)
    trainer = make_trainer(*plugins(precision), max_epochs=3, enable_checkpointing=True, callbacks=[saver, stop])
    with pytest.raises(Interrupted):
        trainer.fit(Resumable())

    # A new process would build all objects anew; another seed shows that everything comes from the checkpoint.
    model = Resumable(seed=9)
    trainer = make_trainer(*plugins(precision), max_epochs=3)
    trainer.fit(model, ckpt_path=tmp_path / "saved.ckpt")
    assert same(end_state(trainer, model), uninterrupted)


class FixedPoint(Resumable):
    def configure_optimizers(self):
        return FixedPointSGD(self.parameters(), 0.1)


@pytest.mark.parametrize("callbacks", [False, True], ids=["recipe alone", "with callbacks"])
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_resumes_bit_for_bit(name, callbacks, make_trainer, tmp_path):
    """Factors below 1, widths above 8, layers kept in float: whatever was decided is in the checkpoint."""
    kind = FixedPoint if recipes.get(name).optimizer else Resumable

    def trainer(*more, **arguments):
        steering = [DeviationCounteractiveLR(alpha=300.0), AdaptiveBitWidth(threshold=1e-4)] if callbacks else []
        plugin = Int8Precision(name, refresh=REFRESH)
        return make_trainer(plugin, max_epochs=2, callbacks=[*steering, *more], **arguments)

    whole = trainer()
    whole.fit(model := kind())
    uninterrupted = end_state(whole, model)
    if callbacks:
        layers = whole.precision_plugin.layers
        assert min(layer.factor for layer in layers) < 1
        assert max(o.bits for layer in layers for o in layer.distinct_operands()) > 8

    saver = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=4)
    with pytest.raises(Interrupted):
        trainer(saver, InterruptAfter(4), enable_checkpointing=True).fit(kind())
    resumed = trainer()
    resumed.fit(model := kind(seed=9), ckpt_path=tmp_path / "saved.ckpt")
    assert same(end_state(resumed, model), uninterrupted)


def test_the_interrupted_runs_above_would_differ_without_the_plugin_state(make_trainer, tmp_path):
    """Guards the test above: clip values and noise do matter there."""
    trainer = make_trainer(*plugins("32-true"), max_epochs=1)
    trainer.fit(Resumable())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["Int8Precision"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    ends = []
    for name in ("a.ckpt", "b.ckpt"):
        trainer, model = make_trainer(*plugins("32-true"), max_epochs=2), Resumable()
        trainer.fit(model, ckpt_path=tmp_path / name)
        ends.append(snapshot(model))
    assert not same(*ends)


def test_resuming_with_accumulated_gradients(make_trainer, tmp_path):
    def run(**arguments):
        model = Resumable()
        trainer = make_trainer(*plugins("32-true"), max_epochs=2, accumulate_grad_batches=2)
        trainer.fit(model, **arguments)
        return trainer, end_state(trainer, model)

    uninterrupted = run()[1]
    trainer = make_trainer(*plugins("32-true"), max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(Resumable())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert same(run(ckpt_path=tmp_path / "a.ckpt")[1], uninterrupted)


class Plain(Digits):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


@pytest.mark.parametrize(("before", "after"), [("16-mixed", "32-true"), ("32-true", "16-mixed")])
def test_resuming_in_another_high_precision(before, after, make_trainer, tmp_path):
    """A loss scale appears or disappears; ranges of gradients that are off by its 65,536 would stop all learning."""
    trainer = make_trainer(Int8Precision(high_precision=before))
    trainer.fit(model := Plain())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    start, updates = snapshot(model), []
    for precision in (before, after):
        model, one_step = Plain(), [InterruptAfter(BATCHES + 1)]
        trainer = make_trainer(Int8Precision(high_precision=precision), max_epochs=2, callbacks=one_step)
        with pytest.raises(Interrupted):
            trainer.fit(model, ckpt_path=tmp_path / "a.ckpt")
        updates.append(snapshot(model)["net.4.weight"] - start["net.4.weight"])
    assert (updates[1] - updates[0]).norm() < 0.2 * updates[0].norm()


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    """The path of an INT8 checkpoint and the model it was saved from."""
    model = Digits()
    trainer = make_trainer(*plugins("32-true"))
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    return tmp_path / "int8.ckpt", model


def test_an_int8_checkpoint_holds_tensors_and_primitives_only(checkpoint):
    path, model = checkpoint
    content = torch.load(path, weights_only=True)
    assert list(content["state_dict"]) == list(Digits().state_dict())
    assert same(dict(content["state_dict"]), snapshot(model))
    layers = content["Int8Precision"]["int8"]["layers"]
    assert list(layers) == ["net.0", "net.4", "net.5"]


def test_an_int8_checkpoint_loads_into_the_float_model(checkpoint, make_trainer):
    path, model = checkpoint
    twin = Digits.load_from_checkpoint(path, strict=True)
    assert same(snapshot(twin), snapshot(model))
    fresh = Digits(seed=9)
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert same(snapshot(fresh), snapshot(model))
    make_trainer(max_epochs=2).fit(fresh, ckpt_path=path)


def test_a_float_checkpoint_resumes_under_the_plugin(make_trainer, tmp_path):
    float_model = Digits()
    trainer = make_trainer()
    trainer.fit(float_model)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    model = Digits(seed=9)
    trainer = make_trainer(Int8Precision(), max_epochs=1)
    trainer.fit(model, ckpt_path=tmp_path / "float.ckpt")
    assert same(snapshot(model), snapshot(float_model))
    trainer = make_trainer(Int8Precision(), max_epochs=2)
    trainer.fit(model, ckpt_path=tmp_path / "float.ckpt")
    assert trainer.global_step == 2 * BATCHES
    assert not same(snapshot(model), snapshot(float_model))


@pytest.mark.parametrize("mixed", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore")
def test_a_mixed_precision_checkpoint_resumes_under_the_plugin(mixed, make_trainer, tmp_path):
    """Its scaler's state stands under the name of another plugin and is left alone."""
    trainer = make_trainer(precision=mixed)
    trainer.fit(Digits())
    trainer.save_checkpoint(tmp_path / "mixed.ckpt")
    trainer = make_trainer(Int8Precision(high_precision=mixed), max_epochs=2)
    trainer.fit(Digits(), ckpt_path=tmp_path / "mixed.ckpt")
    assert trainer.global_step == 2 * BATCHES


def test_a_weights_only_checkpoint(make_trainer, tmp_path):
    model = Digits()
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    make_trainer(Int8Precision(), enable_checkpointing=True, callbacks=[saver]).fit(model)
    content = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "Int8Precision" not in content
    other = Digits(seed=9)
    metrics = make_trainer(Int8Precision()).test(other, ckpt_path=tmp_path / "weights.ckpt", verbose=False)[0]
    assert same(snapshot(other), snapshot(model))
    assert metrics["test_accuracy"] > 0.4


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluating_a_checkpoint_gives_what_the_run_itself_gives(entry, checkpoint, make_trainer):
    """Weights and ranges both come from the checkpoint."""
    path, model = checkpoint
    expected = getattr(make_trainer(*plugins("32-true")), entry)(model)
    found = getattr(make_trainer(*plugins("32-true")), entry)(Digits(seed=9), ckpt_path=path)
    assert same(found, expected)


def test_the_best_checkpoint_brings_its_own_ranges(make_trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, trainer = (
        Digits(),
        make_trainer(*plugins("32-true"), max_epochs=3, enable_checkpointing=True, callbacks=[saver]),
    )
    trainer.fit(model)
    expected = make_trainer(*plugins("32-true")).predict(Digits(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(trainer.predict(model, ckpt_path=tmp_path / "epoch=0.ckpt"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": "net.0"}, "layer 'net.0', slot 'grad_input.lhs': saved but not converted now"),
        ({"recipe": "other.yaml"}, "recipe: 'default' was saved, 'other' is in use"),
    ],
)
def test_resuming_with_another_conversion_is_refused_by_name(
    arguments, message, checkpoint, make_trainer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("output: {lhs: {bits: 16}}")
    with pytest.raises(ValueError, match=message):
        make_trainer(Int8Precision(refresh=REFRESH, **arguments), max_epochs=2).fit(Digits(), ckpt_path=checkpoint[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["int8"].update(version=99), "version: 99"),
        (lambda s: s["int8"]["layers"].pop("net.5"), "layer 'net.5'"),
        (lambda s: s.pop("int8"), "field 'version' is missing"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_name(spoil, message, checkpoint, make_trainer):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    spoil(content["Int8Precision"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"INT8 plugin state: .*{message}"):
        make_trainer(*plugins("32-true"), max_epochs=2).fit(Digits(), ckpt_path=path)


def test_a_subclass_of_the_plugin_reads_and_writes_the_same_checkpoint(checkpoint, make_trainer, tmp_path):
    class Mine(Int8Precision):
        pass

    path, _ = checkpoint
    trainer, plugin = make_trainer(mine := Mine(refresh=REFRESH), max_epochs=2), Int8Precision(refresh=REFRESH)
    trainer.fit(Digits(), ckpt_path=path)
    assert mine.state_dict()["int8"]["steps"] == 2 * BATCHES
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    make_trainer(plugin, max_epochs=2).fit(Digits(), ckpt_path=tmp_path / "mine.ckpt")
    assert plugin.state_dict()["int8"]["steps"] == 2 * BATCHES


def test_a_checkpoint_saved_while_evaluating_between_steps_is_the_same(make_trainer, tmp_path):
    """Validation in mid-epoch leaves no trace in the state."""
    ends = []
    for interval in (1.0, 1):
        trainer, model = make_trainer(*plugins("32-true"), val_check_interval=interval), Digits()
        trainer.fit(model)
        ends.append(end_state(trainer, model))
    assert same(*ends)
    assert all(s.operands["output.lhs"].key[2] == BATCHES for s in layer_states(model))
