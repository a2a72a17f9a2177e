"""What several test files share: a small network on real digits, a quiet Trainer, and exact comparison."""

import torchvision_without_ops  # noqa: F401 - first, since lightning imports torchvision where it is installed

# isort: split

import machines
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 64
BATCHES = 6


def read_digits():
    """The 1,797 handwritten digits of scikit-learn: images (N, 1, 8, 8) in [0, 1] and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16), nn.Linear(16, 10)
    )


class Digits(LightningModule):
    """Classifies digits; 384 of them to train on, in a fixed order, unless another loader is given."""

    def __init__(self, seed=0, lr=0.05):
        super().__init__()
        self.net = network(seed)
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def step(self, batch, name):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log_dict({name: loss, f"{name}_accuracy": (logits.argmax(1) == y).float().mean()}, batch_size=len(y))
        return loss

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def loader(self, first, count):
        images, labels = read_digits()
        return DataLoader(TensorDataset(images[first : first + count], labels[first : first + count]), batch_size=BATCH)

    def train_dataloader(self):
        return self.loader(0, BATCH * BATCHES)

    def val_dataloader(self):
        return self.loader(1000, 2 * BATCH)

    test_dataloader = predict_dataloader = val_dataloader


class TwoOptimizers(Digits):
    """Body and head take turns, so that each sees every other step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net[:4], self.net[4:])]


def same(a, b):
    """Whether two nests of tensors and primitives are equal, bit for bit, in the same order."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def snapshot(module):
    """A copy of the module's state_dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors here are too small to be shared out: threads that wait for each other take many times as long."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Routes that tests time are not remembered for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=machines.PARAMETERS, scope="module")
def machine(request):
    """A machine that runs the CUDA kernels, see `machines`."""
    return machines.make_machine(request.param)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*plugins, **arguments):
        quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
        quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        return Trainer(**quiet | arguments, plugins=list(plugins))

    return make
