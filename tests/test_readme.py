"""What README and the docs show runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_int8 import Int8Precision, convert, gemm_counts, ranges, recipes
from lightning_int8.numerics import plane_count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_set_up_is_one_command_line(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    commands = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(commands) == 1
    assert len(commands[0].strip().splitlines()) == 1


@pytest.mark.parametrize("code", [b for b in blocks("python") if "Trainer(plugins" not in b])
def test_python_examples_run(code):
    exec(code, {})


def test_plugin_arguments_are_accepted():
    code = next(b for b in blocks("python") if b.startswith("Trainer(plugins"))
    plugins = eval(code, {"Trainer": lambda plugins: plugins, "Int8Precision": Int8Precision})
    assert plugins[0].precision == "bf16-mixed"


def test_recipe_example_is_a_recipe(tmp_path):
    path = tmp_path / "my_recipe.yaml"
    path.write_text(next(b for b in blocks("yaml") if "grad_weight" in b))
    recipe = recipes.get(path)
    assert recipe.name == "my_recipe"
    assert plane_count(recipe.grad_weight.lhs.bits) == 2
    model = torch.nn.Linear(8, 4)
    convert(model, recipe=path)
    model(torch.randn(3, 8)).sum().backward()
    assert gemm_counts(model)[""] == {"output": 1, "grad_input": 0, "grad_weight": 2}


def methods_examples():
    """The python blocks of each section of the methods page: a later one may use what an earlier one defined."""
    for section in re.split(r"^## ", METHODS, flags=re.MULTILINE)[1:]:
        code = "\n".join(blocks("python", section))
        if code:
            yield pytest.param(code, id=section.split("\n")[0])


@pytest.mark.parametrize("code", list(methods_examples()))
def test_examples_of_the_methods_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    names = {
        "Trainer": lambda **arguments: Trainer(**quiet | arguments),
        "Int8Precision": Int8Precision,
        "LightningModule": LightningModule,
        "CSVLogger": CSVLogger,
    }
    exec(code.replace("from lightning.pytorch import Trainer\n", ""), names)


@pytest.mark.parametrize("text", blocks("yaml", METHODS))
def test_recipes_of_the_methods_page_load(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert recipes.get(path).name == "mine"


def test_the_methods_page_tells_of_every_recipe_and_every_rule():
    assert set(re.findall(r"^## (\w+)$", METHODS, re.MULTILINE)) >= set(recipes.names())
    assert all(f"| `{name}` |" in METHODS for name in (*recipes.names(), *ranges.names()))


def test_the_error_that_the_methods_page_quotes_is_the_one_there_is(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("grad_input: {lhs: {per: channel}}")
    with pytest.raises(ValueError, match="cannot be taken out") as error:
        recipes.get(path)
    quoted = re.search(r"^recipe 'mine': .*?(?=^```)", METHODS, re.MULTILINE | re.DOTALL)
    assert quoted is not None
    assert " ".join(quoted[0].split()) in str(error.value)
