"""The callbacks: they hand their arguments to the plugin, log what it does, and keep nothing themselves."""

import math

import pytest
import torch
from conftest import BATCHES, Digits, TwoOptimizers, same, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_int8 import Int8Precision, recipes
from lightning_int8.callbacks import AdaptiveBitWidth, DeviationCounteractiveLR, QuantizationMonitor
from lightning_int8.callbacks.plugin_callback import mean_over_ranks
from lightning_int8.policies import BitWidthRule, DeviationFactor

LAYERS = ("net.0", "net.4", "net.5")
EVERY = 2


class Recording(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.records = []

    def log_metrics(self, metrics, step=None):
        self.records.append((step, metrics))


def fit(make_trainer, *callbacks, recipe="default", **arguments):
    plugin, logger = Int8Precision(recipe, refresh=EVERY), Recording()
    model = Digits()
    trainer = make_trainer(plugin, callbacks=list(callbacks), **{"logger": logger} | arguments)
    trainer.fit(model)
    ours = [(s, m) for s, m in logger.records if not any(k in m for k in ("train", "val", "epoch"))]
    return plugin, model, ours


@pytest.mark.parametrize("recipe", recipes.names())
def test_all_three_work_with_every_recipe(recipe, make_trainer):
    callbacks = [AdaptiveBitWidth(), DeviationCounteractiveLR(), QuantizationMonitor(log_every_n_steps=EVERY)]
    plugin, _, records = fit(make_trainer, *callbacks, recipe=recipe)
    assert records
    for layer in plugin.layers:
        assert layer.learning_rate == DeviationFactor()
        assert all((o.width is not None) == (o.spec.bits != 9) for o in layer.distinct_operands())
    assert [c.state_dict() for c in callbacks] == [{}, {}, {}]


def test_factors_follow_the_distance_that_is_logged(make_trainer):
    callback = DeviationCounteractiveLR(alpha=50.0, beta=0.2, log_every_n_steps=EVERY)
    _, _, records = fit(make_trainer, callback)
    assert [step for step, _ in records] == [1, 3, 5]
    for _, record in records:
        assert set(record) == {f"{kind}/{n}" for kind in ("learning_rate_factor", "cosine_distance") for n in LAYERS}
        for layer in LAYERS:
            distance = record[f"cosine_distance/{layer}"]
            assert 0 < distance < 0.1
            expected = max(math.exp(-50.0 * distance), 0.2)
            assert record[f"learning_rate_factor/{layer}"] == pytest.approx(expected, rel=1e-5)
    assert callback.logged == records[-1][1]


def test_a_factor_changes_the_training_and_none_does_not(make_trainer):
    plain = snapshot(fit(make_trainer)[1])
    same_rates = snapshot(fit(make_trainer, DeviationCounteractiveLR(alpha=0.0))[1])
    slower = snapshot(fit(make_trainer, DeviationCounteractiveLR(alpha=1e6, beta=0.1))[1])
    assert same(plain, same_rates)
    assert not same(plain, slower)


def test_widths_are_logged(make_trainer):
    callback = AdaptiveBitWidth(threshold=0.0, max_bits=16, operands=("g",), log_every_n_steps=1)
    plugin, _, records = fit(make_trainer, callback)
    assert len(records) == BATCHES
    # A threshold of 0 is always exceeded: from the second step on gradients have 16 bits, and nothing else has.
    wide = {name for name, bits in records[-1][1].items() if bits == 16}
    slots = [(layer.name, o) for layer in plugin.layers for o in layer.distinct_operands()]
    assert wide == {f"bits/{name}/{o.slot}" for name, o in slots if o.tensor == "g"}
    counts = {layer.name: layer.counts.of("grad_weight") for layer in plugin.layers}
    assert counts == dict.fromkeys(LAYERS, 1 + 2 * (BATCHES - 1))


def test_the_monitor_measures_every_operand_at_its_interval(make_trainer):
    plugin, _, records = fit(make_trainer, QuantizationMonitor(log_every_n_steps=3))
    assert [step for step, _ in records] == [1, 4]
    slots = {f"{s.name}/{o.slot}" for s in plugin.layers for o in s.distinct_operands()}
    figures = ("clip_value", "cosine_distance", "magnitude_shift", "saturation")
    needless = {"net.0/grad_input.lhs", "net.0/grad_input.rhs"}  # nothing needs the gradient of the images
    names = {f"quantization/{slot}/{figure}" for slot in slots for figure in figures}
    for _, record in records:
        missing = names - set(record)
        assert all(any(f"/{slot}/" in name for slot in needless) for name in missing)
        assert all(math.isfinite(value) for value in record.values())
    assert 0 < records[0][1]["quantization/net.4/output.lhs/cosine_distance"] < 1e-2
    assert records[0][1]["quantization/net.4/output.rhs/saturation"] == 0.0


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 4, 6, 8, 10, 12]), (2, [2, 4, 6, 8, 10, 12]), (4, [2, 6, 10])])
def test_records_come_where_a_batch_brings_two_steps(every, steps, make_trainer):
    callback, logger = QuantizationMonitor(log_every_n_steps=every), Recording()
    make_trainer(Int8Precision(), callbacks=[callback], logger=logger, limit_val_batches=0).fit(TwoOptimizers())
    assert [step for step, record in logger.records if "epoch" not in record] == steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_second_fit_and_accumulated_gradients_log_each_interval_once(accumulate, make_trainer):
    callback, logger = QuantizationMonitor(log_every_n_steps=2), Recording()
    arguments = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 10**6}
    trainer = make_trainer(Int8Precision(), callbacks=[callback], logger=logger, limit_val_batches=0, **arguments)
    trainer.fit(model := Digits())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    found = [step for step, record in logger.records if any(name.startswith("quantization/") for name in record)]
    assert found == list(range(1, 2 * BATCHES // accumulate + 1, 2))


def test_layers_that_stay_float_are_not_logged(make_trainer):
    for callback in (QuantizationMonitor(EVERY), DeviationCounteractiveLR(log_every_n_steps=EVERY), AdaptiveBitWidth()):
        _, _, records = fit(make_trainer, callback, recipe="unified")
        assert records
        assert all("net.4" in name for _, record in records for name in record)


def test_the_monitor_changes_nothing(make_trainer):
    assert same(snapshot(fit(make_trainer)[1]), snapshot(fit(make_trainer, QuantizationMonitor(1))[1]))


def test_any_logger_and_several(make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path), Recording()]
    fit(make_trainer, DeviationCounteractiveLR(log_every_n_steps=EVERY), logger=loggers)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "learning_rate_factor/net.5" in text
    assert fit(make_trainer, DeviationCounteractiveLR(), logger=False)[2] == []


@pytest.mark.parametrize("callback", [AdaptiveBitWidth, DeviationCounteractiveLR, QuantizationMonitor])
def test_a_trainer_without_the_plugin_is_refused(callback, make_trainer):
    with pytest.raises(TypeError, match=f"{callback.__name__} steers the plugin Int8Precision, but the Trainer's is"):
        make_trainer(callbacks=[callback()]).fit(Digits())


@pytest.mark.parametrize("callback", [AdaptiveBitWidth, DeviationCounteractiveLR, QuantizationMonitor])
def test_bad_arguments_are_refused(callback):
    with pytest.raises(ValueError, match=r"^log_every_n_steps: 0 is not a positive number"):
        callback(log_every_n_steps=0)


def test_the_arguments_of_the_rules_are_checked():
    with pytest.raises(ValueError, match=r"^beta: 2\.0 is not a finite number from 0 to 1"):
        DeviationCounteractiveLR(beta=2.0)
    with pytest.raises(ValueError, match=r"^mode: 0 is not 1 or 2"):
        AdaptiveBitWidth(mode=0)
    assert AdaptiveBitWidth(operands=["g"]).rule == BitWidthRule(operands=("g",))


@pytest.mark.parametrize("recipe", ["default", "unified", "fixed_point"])
def test_a_run_resumed_without_the_callback_is_steered_as_before(recipe, make_trainer, tmp_path):
    """Whether or not the recipe has rules of its own."""
    save = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=3)
    steered = [DeviationCounteractiveLR(alpha=1e12, beta=0.25), AdaptiveBitWidth(threshold=0.0, max_bits=16)]
    fit(make_trainer, *steered, save, recipe=recipe, enable_checkpointing=True, max_steps=3)
    plugin = Int8Precision(recipe, refresh=EVERY)
    trainer = make_trainer(plugin, max_steps=4)
    model = Digits()
    trainer.fit(model, ckpt_path=tmp_path / "last.ckpt")
    trainer.test(model, verbose=False)
    layers = [layer for layer in plugin.layers if not layer.kept_float]
    assert {layer.factor for layer in layers} == {0.25}
    operands = [o for layer in layers for o in layer.distinct_operands()]
    # The pixels are multiples of 1/16: on a power-of-two grid they have no error at all.
    assert {o.bits for o in operands if o.tensor != "x" and o.clip_value is not None} == {16}


def test_a_callback_of_the_resumed_run_has_the_last_word(make_trainer, tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=3)
    fit(make_trainer, DeviationCounteractiveLR(alpha=1e12, beta=0.25), save, enable_checkpointing=True, max_steps=3)
    plugin = Int8Precision(refresh=EVERY)
    trainer = make_trainer(plugin, callbacks=[DeviationCounteractiveLR(alpha=1e12, beta=0.5)], max_steps=4)
    trainer.fit(Digits(), ckpt_path=tmp_path / "last.ckpt")
    assert {layer.factor for layer in plugin.layers} == {0.5}


def test_a_state_from_before_the_first_step_takes_all_decisions_back(make_trainer):
    """As the learning-rate finder does when it is done."""
    plugin, model = Int8Precision("unified"), Digits()
    steering = [DeviationCounteractiveLR(alpha=1e12, beta=0.25), AdaptiveBitWidth(threshold=0.0, max_bits=16)]
    trainer = make_trainer(plugin, callbacks=steering, max_steps=4)
    trainer.validate(model, verbose=False)
    untrained = plugin.state_dict()
    trainer.fit(model)
    assert min(layer.factor for layer in plugin.layers) == 0.25
    plugin.load_state_dict(untrained)
    assert [layer.factor for layer in plugin.layers] == [1.0, 1.0, 1.0]
    assert not any(layer.kept_float for layer in plugin.layers)
    assert {o.bits for layer in plugin.layers for o in layer.distinct_operands()} == {8}


def test_callbacks_of_both_host_packages():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    assert isinstance(QuantizationMonitor(), pytorch_lightning.Callback)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pytorch_lightning.Trainer(plugins=[Int8Precision()], callbacks=[QuantizationMonitor()], **quiet)
    assert isinstance(trainer.precision_plugin, Int8Precision)


def test_means_leave_out_what_nobody_knows():
    values = {"a": 1.0, "b": math.nan, "c": torch.tensor(3.0, dtype=torch.float64)}
    assert mean_over_ranks(values, torch.device("cpu")) == {"a": 1.0, "c": 3.0}
    assert mean_over_ranks({}, torch.device("cpu")) == {}
