"""The machine table and tables of the user's own."""

import pytest

from k2lab.core.errors import RecipeError
from k2lab.plan import machines

OWN = """
[machine.mine]
device = "cuda"
gpus = 4
gpu = "card"
memory_gb = 24.0
bf16_tflops = 100
fp32_tflops = 50.0
assumed_mfu = 0.3
assumed_attention_mfu = 0.3
dollars_per_hour = 3.5
"""


def test_shipped_table():
    p5 = machines.get("p5.48xlarge")
    assert (p5.gpus, p5.dollars_per_hour, p5.bf16_tflops) == (8, 55.0, 989.0)
    assert "EXAMPLE" in p5.source
    assert machines.get("laptop").devices == 1 and machines.get("laptop").gpus == 0
    assert all(machine.source and machine.name == name for name, machine in machines.table().items())
    assert p5.peak("bf16") == 989e12 and p5.peak("fp32") == 67e12


def test_unknown_machine():
    with pytest.raises(RecipeError, match="Did you mean 'p5.48xlarge'"):
        machines.get("p5.48xlage")


def test_own_table(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(OWN)
    mine = machines.get("mine", file)
    assert mine.dollars_per_hour == 3.5 and mine.bf16_tflops == 100.0 and "$3.5/h" in mine.describe()
    with pytest.raises(RecipeError, match="no machine called 'laptop'"):
        machines.get("laptop", file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_gb = 24.0", "memory = 24.0", "unknown key 'memory'.*Did you mean 'memory_gb'"),
        ("memory_gb = 24.0", "memory_gb = -1.0", "machine.mine.memory_gb"),
        ("assumed_mfu = 0.3", "assumed_mfu = 30.0", "assumed_mfu.*share of the peak"),
        ("gpus = 4", "gpus = 0", "gpus.*at least 1"),
        ('device = "cuda"', 'device = "tpu"', "machine.mine.device"),
        ("dollars_per_hour = 3.5", "dollars_per_hour = -3.5", "dollars_per_hour"),
        ("[machine.mine]", "[gpu.mine]", "no machines"),
        ("gpus = 4", "gpus = ", "cannot be read as TOML"),
    ],
)
def test_wrong_tables(tmp_path, old, new, message):
    file = tmp_path / "mine.toml"
    assert old in OWN
    file.write_text(OWN.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        machines.table(file)


def test_missing_table(tmp_path):
    with pytest.raises(RecipeError, match="no machine table"):
        machines.table(tmp_path / "none.toml")
