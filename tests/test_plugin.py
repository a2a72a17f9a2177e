"""`Int8Precision` in a Lightning Trainer, the way its users run it."""

import importlib.util
import logging
import pickle

import pytest
import torch
from conftest import BATCHES, Digits, network, read_digits, same, snapshot
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn

from lightning_int8 import Int8Precision, gemm_counts, restore
from lightning_int8.layers import Int8Conv2d, Int8Linear
from lightning_int8.rewrite import conversion_of, layer_states

LAYERS = ["net.0", "net.4", "net.5"]


def accuracy(trainer, model):
    return trainer.test(model, verbose=False)[0]["test_accuracy"]


def moved(model, before):
    """Names of the parameters that a run has changed."""
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


# --- fit, validate, test, predict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_every_entry_point_converts_in_place_and_once(entry, make_trainer):
    model, plugin = Digits(), Int8Precision()
    net, keys, parameters = model.net, list(model.state_dict()), list(model.parameters())
    trainer = make_trainer(plugin)
    assert plugin.report is None
    for _ in range(2):
        getattr(trainer, entry)(model)
        states = layer_states(model)
    assert plugin.report.converted == LAYERS
    assert model.net is net
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    trainer.predict(model)
    assert all(a is b for a, b in zip(layer_states(model), states, strict=True))


def test_a_run_executes_the_contractions_it_should(make_trainer):
    model = Digits()
    make_trainer(Int8Precision(), limit_val_batches=0).fit(model)
    first = {"output": BATCHES, "grad_input": 0, "grad_weight": BATCHES}
    assert gemm_counts(model) == {"net.0": first, "net.4": first | {"grad_input": BATCHES}} | {
        "net.5": first | {"grad_input": BATCHES}
    }


def test_the_report_and_the_counts_are_logged(make_trainer, caplog):
    with caplog.at_level(logging.INFO):
        make_trainer(Int8Precision(skip="net.5")).fit(Digits())
    assert "2 of 3 layers run INT8" in caplog.text
    assert "skip='net.5'" in caplog.text
    assert "total INT8" in caplog.text


def test_int8_learns_digits_as_well_as_float(make_trainer):
    scores = {}
    for name, plugins in (("float", ()), ("int8", (Int8Precision(),))):
        trainer, model = make_trainer(*plugins, max_epochs=5), Digits()
        model.train_dataloader = lambda model=model: model.loader(0, 960)
        trainer.fit(model)
        scores[name] = accuracy(trainer, model)
    assert scores["float"] > 0.85
    assert scores["int8"] > scores["float"] - 0.03


def test_a_restored_model_is_the_float_model(make_trainer):
    model = Digits()
    make_trainer(Int8Precision()).fit(model)
    trained = snapshot(model)
    restore(model)
    assert same(model.state_dict(), trained)
    assert accuracy(make_trainer(), model) > 0.4
    assert not gemm_counts(model)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(make_trainer):
    runs = []
    for seed in (0, 0, 1):
        model = Digits()
        make_trainer(Int8Precision(seed=seed)).fit(model)
        runs.append(snapshot(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_second_trainer_goes_on_with_the_same_model(make_trainer):
    model = Digits()
    make_trainer(Int8Precision()).fit(model)
    states = layer_states(model)
    make_trainer(Int8Precision()).fit(model)
    assert all(a is b for a, b in zip(layer_states(model), states, strict=True))
    assert conversion_of(model).clock.steps == 2 * BATCHES


def test_one_plugin_serves_two_models_in_turn(make_trainer):
    plugin, first, second = Int8Precision(), Digits(), Digits(seed=1)
    make_trainer(plugin).fit(first)
    make_trainer(plugin).fit(second)
    assert plugin.report.converted == LAYERS
    assert plugin.state_dict()["int8"]["steps"] == BATCHES
    make_trainer(plugin).test(first, verbose=False)


def test_a_plugin_can_be_pickled_before_and_after_a_fit(make_trainer):
    """`ddp_spawn` sends it to its processes."""
    plugin = pickle.loads(pickle.dumps(Int8Precision(skip="net.0")))
    make_trainer(plugin).fit(Digits())
    assert pickle.loads(pickle.dumps(plugin)).report.converted == ["net.4", "net.5"]


def test_a_fit_after_a_failed_one(make_trainer):
    class FailsOnce(Digits):
        failed = False

        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and not self.failed:
                self.failed = True
                raise ZeroDivisionError
            return super().training_step(batch)

    model, plugin = FailsOnce(), Int8Precision()
    with pytest.raises(ZeroDivisionError):
        make_trainer(plugin).fit(model)
    make_trainer(plugin).fit(model)
    assert conversion_of(model).clock.steps == 3 + BATCHES


def test_training_without_any_contraction_is_an_error(make_trainer):
    class Emptied(Digits):
        def on_after_backward(self):
            self.net[4].int8_state.counts.clear()

    with pytest.raises(RuntimeError, match=r"layer 'net\.4': trained .* without one INT8 contraction"):
        make_trainer(Int8Precision(), limit_val_batches=0).fit(Emptied())


def test_fine_tuning_with_a_new_head(make_trainer):
    model = Digits()
    make_trainer(Int8Precision()).fit(model)
    model.net[5] = nn.Linear(16, 10)
    plugin = Int8Precision()
    make_trainer(plugin).fit(model)
    assert plugin.report.converted == LAYERS
    assert type(model.net[5]) is Int8Linear
    assert gemm_counts(model)["net.5"]["grad_weight"] == BATCHES


def test_layers_that_move_to_other_names_resume_under_these(make_trainer, tmp_path):
    def grow(model):
        model.net.insert(4, nn.Linear(512, 512))
        return model

    model, plugin = Digits(), Int8Precision()
    make_trainer(plugin).fit(model)
    trainer = make_trainer(plugin)
    trainer.fit(grow(model))
    assert (
        plugin.report.converted == list(plugin.state_dict()["int8"]["layers"]) == ["net.0", "net.4", "net.5", "net.6"]
    )
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer(Int8Precision(), max_epochs=2).fit(grow(Digits()), ckpt_path=tmp_path / "a.ckpt")


def test_fine_tuning_with_a_frozen_body(make_trainer):
    model = Digits()
    model.net[0].requires_grad_(False)
    model.net[4].requires_grad_(False)
    before = snapshot(model)
    make_trainer(Int8Precision()).fit(model)
    assert moved(model, before) == ["net.1.weight", "net.1.bias", "net.5.weight", "net.5.bias"]
    assert gemm_counts(model)["net.4"]["grad_weight"] == 0


class Wrapped(Digits):
    """Keeps its network in an attribute called `module`, as wrappers of torch do."""

    def __init__(self):
        super().__init__()
        self.module = self.net
        del self.net

    def forward(self, x):
        return self.module(x)


def test_a_module_whose_network_is_called_module(make_trainer):
    plugin = Int8Precision()
    make_trainer(plugin).fit(Wrapped())
    assert plugin.report.converted == ["module.0", "module.4", "module.5"]


def test_a_network_built_in_configure_model(make_trainer):
    class Late(Digits):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = network()

    model = Late()
    make_trainer(Int8Precision()).fit(model)
    assert gemm_counts(model)["net.4"]["grad_weight"] == BATCHES


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_lightning_module(make_trainer):
    class Silent(Digits):
        def step(self, batch, name):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    model, twin = Silent(), Silent()
    torch._dynamo.reset()
    make_trainer(Int8Precision()).fit(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    make_trainer(Int8Precision()).fit(twin)
    assert same(snapshot(model), snapshot(twin))


def test_lightning_checks_that_spoil_careless_plugins(make_trainer):
    model = Digits()
    try:
        make_trainer(Int8Precision(), detect_anomaly=True, deterministic=True).fit(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gemm_counts(model)["net.0"]["grad_weight"] == BATCHES


def test_a_nan_loss_is_seen_by_detect_anomaly(make_trainer):
    class Broken(Digits):
        def training_step(self, batch):
            return super().training_step((batch[0] * float("nan"), batch[1]))

    with pytest.raises(RuntimeError, match="nan"):
        make_trainer(Int8Precision(), detect_anomaly=True).fit(Broken())


# --- high precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high_precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_what_is_not_int8_computes_in_high_precision(high_precision, dtype, make_trainer):
    class Watched(Digits):
        def training_step(self, batch):
            self.dtypes = {self.net[0](batch[0]).dtype, self.net(batch[0]).dtype}
            return super().training_step(batch)

    model, plugin = Watched(), Int8Precision(high_precision=high_precision)
    trainer = make_trainer(plugin, max_epochs=3)
    trainer.fit(model)
    assert trainer.precision == high_precision
    assert model.dtypes == {dtype}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert accuracy(trainer, model) > 0.5


def test_a_step_skipped_by_the_gradient_scaler_does_not_count(make_trainer):
    """One gradient overflows: the scaler halves its factor, and the ranges of gradients follow it."""

    class Overflows(Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch)
            return loss * float("inf") if batch_idx == 2 else loss

    model, plugin = Overflows(), Int8Precision(high_precision="16-mixed")
    make_trainer(plugin).fit(model)
    assert plugin.scaler.get_scale() == 2.0**15
    assert conversion_of(model).clock.steps == BATCHES - 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(s.operands["grad_weight.lhs"].clip_value.isfinite() for s in layer_states(model))


# --- loops and optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BoringModel, ManualOptimBoringModel])
@pytest.mark.filterwarnings("ignore")
def test_boring_models(kind, make_trainer):
    model = kind()
    before = snapshot(model)
    trainer = make_trainer(Int8Precision(), fast_dev_run=3)
    trainer.fit(model)
    trainer.test(model, verbose=False)
    assert moved(model, before) == ["layer.weight", "layer.bias"]
    assert gemm_counts(model)["layer"]["grad_weight"] == 3


def test_gradient_accumulation_steps_once_a_window(make_trainer):
    model = Digits()
    make_trainer(Int8Precision(), accumulate_grad_batches=3).fit(model)
    assert conversion_of(model).clock.steps == BATCHES // 3
    assert gemm_counts(model)["net.5"]["grad_weight"] == BATCHES


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(algorithm, make_trainer):
    class Watched(Digits):
        def on_before_zero_grad(self, optimizer):
            if self.net[0].weight.grad is not None:
                flat = torch.cat([p.grad.flatten() for p in self.parameters()])
                self.sizes = {"norm": flat.norm().item(), "value": flat.abs().max().item()}

    model = Watched()
    make_trainer(Int8Precision(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm).fit(model)
    assert model.sizes[algorithm] == pytest.approx(1e-3, rel=1e-3)


class TwoOptimizers(Digits):
    """Body and head each with its own optimizer and its own turn, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            loss = super().training_step(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:4].parameters(), 0.05), torch.optim.Adam(self.net[4:].parameters(), 0.01)]


def test_two_optimizers_in_manual_optimization(make_trainer):
    model = TwoOptimizers()
    before = snapshot(model)
    trainer = make_trainer(Int8Precision(), max_epochs=5)
    trainer.fit(model)
    assert set(moved(model, before)) >= {"net.0.weight", "net.1.bias", "net.4.weight", "net.5.bias"}
    assert accuracy(trainer, model) > 0.7


@pytest.mark.parametrize("high_precision", ["32-true", "16-mixed"])
def test_a_training_step_may_leave_a_batch_out(high_precision, make_trainer):
    """Lightning calls the optimizer all the same; a step counts where the model ran."""

    class Picky(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch) if batch_idx % 2 else None

    model = Picky()
    make_trainer(Int8Precision(high_precision=high_precision)).fit(model)
    assert gemm_counts(model)["net.5"]["grad_weight"] == BATCHES // 2
    assert conversion_of(model).clock.steps == BATCHES // 2


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "LBFGS"])
def test_other_optimizers(name, make_trainer):
    class Other(Digits):
        def configure_optimizers(self):
            return getattr(torch.optim, name)(self.parameters(), 0.01)

    model = Other()
    before = snapshot(model)
    make_trainer(Int8Precision(), limit_train_batches=2, limit_val_batches=0).fit(model)
    assert moved(model, before) == [name for name, _ in model.named_parameters()]
    assert conversion_of(model).clock.steps == 2


# --- callbacks and tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback",
    [
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2),
        lambda: EMAWeightAveraging(decay=0.8),
        lambda: ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_callbacks_that_copy_or_change_the_weights(callback, make_trainer):
    model = Digits()
    trainer = make_trainer(Int8Precision(), max_epochs=4, callbacks=[callback()])
    trainer.fit(model)
    assert accuracy(trainer, model) > 0.5
    assert type(model.net[0]) is Int8Conv2d
    assert gemm_counts(model)["net.5"]["grad_weight"] == 4 * BATCHES
    restore(model)
    assert accuracy(make_trainer(), model) > 0.5


def test_a_backbone_that_thaws_later(make_trainer):
    class Split(Digits):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.net[:4], self.net[4:]
            del self.net

        def forward(self, x):
            return self.head(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    model = Split()
    thaw = BackboneFinetuning(1, verbose=False)
    make_trainer(Int8Precision(), max_epochs=3, callbacks=[thaw]).fit(model)
    assert gemm_counts(model)["backbone.0"]["grad_weight"] == 2 * BATCHES
    assert gemm_counts(model)["head.5"]["grad_weight"] == 3 * BATCHES


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
@pytest.mark.filterwarnings("ignore")
def test_a_tuner_leaves_no_trace_in_the_state(finder, make_trainer):
    class Tuned(Digits):
        batch_size = 8

        def train_dataloader(self):
            return torch.utils.data.DataLoader(super().train_dataloader().dataset, self.batch_size)

    arguments = {"num_training_steps": 6} if finder is LearningRateFinder else {"max_trials": 2}
    model = Tuned()
    trainer = make_trainer(Int8Precision(), callbacks=[finder(**arguments)], limit_train_batches=5)
    trainer.fit(model)
    assert trainer.global_step == conversion_of(model).clock.steps == 5


def test_model_summary_with_an_example_input(make_trainer):
    model = Digits()
    model.example_input_array = torch.zeros(1, 1, 8, 8)
    make_trainer(Int8Precision(), enable_model_summary=True).fit(model)
    text = str(ModelSummary(model, max_depth=-1))
    assert "Int8Conv2d" in text
    assert "[1, 8, 8, 8]" in text


def test_saving_before_any_conversion(make_trainer, tmp_path):
    """The main process of `ddp_spawn` never converts, yet may save after the fit."""
    trainer = make_trainer(Int8Precision())
    trainer.strategy.connect(Digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "state_dict" in torch.load(tmp_path / "a.ckpt", weights_only=True)


# --- the other import name, and the command line ----------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.filterwarnings("ignore")
def test_pytorch_lightning(algorithm, tmp_path):
    import pytorch_lightning
    from pytorch_lightning.demos import boring_classes

    model, plugin = boring_classes.BoringModel(), Int8Precision()
    before = snapshot(model)
    arguments = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    arguments |= {"max_steps": 3, "gradient_clip_val": 1e-4, "gradient_clip_algorithm": algorithm}
    trainer = pytorch_lightning.Trainer(**arguments, limit_val_batches=1, plugins=[plugin])
    trainer.fit(model)
    assert moved(model, before) == ["layer.weight", "layer.bias"]
    assert (model.layer.weight - before["layer.weight"]).abs().max() < 3 * 0.1 * 1.1e-4
    assert gemm_counts(model)["layer"]["grad_weight"] == 3

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Int8Precision()
    resumed = pytorch_lightning.Trainer(**arguments | {"max_steps": 4}, limit_val_batches=1, plugins=[again])
    resumed.fit(boring_classes.BoringModel(), ckpt_path=tmp_path / "a.ckpt")
    assert again.state_dict()["int8"]["steps"] == 4


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_reads_the_plugin_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        """
        trainer:
          accelerator: cpu
          logger: false
          enable_progress_bar: false
          fast_dev_run: 2
          plugins:
            - class_path: lightning_int8.Int8Precision
              init_args: {recipe: default, skip: [head, "*.stem"], high_precision: bf16-mixed, refresh: 7, seed: 3}
        """
    )

    class Net(BoringModel):
        def __init__(self, width: int = 32):
            super().__init__()
            self.head, self.body = nn.Linear(32, 2), nn.ModuleDict({"stem": nn.Linear(4, 4)})

    cli = LightningCLI(Net, BoringDataModule, args=["fit", "--config", "run.yaml"])
    plugin = cli.trainer.precision_plugin
    assert type(plugin) is Int8Precision
    assert plugin.precision == "bf16-mixed"
    assert plugin.report.converted == ["layer"]
    assert conversion_of(cli.model).settings.refresh == 7


def test_lightning_cli_names_a_wrong_field(tmp_path, capsys):
    plugin = "--trainer.plugins=lightning_int8.Int8Precision"
    with pytest.raises(SystemExit):
        LightningCLI(BoringModel, args=["fit", plugin, "--trainer.plugins.sync_clip=sum"])
    message = capsys.readouterr().err
    assert "sync_clip" in message


def test_digits_are_what_they_are_taken_for():
    images, labels = read_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
