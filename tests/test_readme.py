"""What README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from lightning_int8 import Int8Precision, convert, gemm_counts, recipes
from lightning_int8.numerics import plane_count

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


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
