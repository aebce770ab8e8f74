"""What an editor sees of the constructors. Oracle: mypy in strict mode."""

import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
import torch
import stepforge
from stepforge.declare import Betas, NonNegative, zeros
from stepforge.ops import Value, ema

params = [torch.zeros(3)]
stepforge.Adagrad(params, 1e-2, 0.0, 0.0, 0.0, 1e-10, True, maximize=True)
stepforge.Adam(params, torch.tensor(1e-3), (0.9, 0.99), amsgrad=True, fused=None)
stepforge.Adam([("w", params[0])], betas=(torch.tensor(0.9), torch.tensor(0.99)))
stepforge.AdamW([{"params": params, "lr": 1e-2}], weight_decay=0.1)
stepforge.NAdam(params, 1e-3, (0.9, 0.99), 1e-8, 0.0, 4e-3, True, foreach=False)
stepforge.RAdam(params, decoupled_weight_decay=True, capturable=False)
stepforge.Adagrad(params, state_format="int8", rounding_seed=1)
stepforge.AdamW(params, state_format="bfloat16", master_weight_bits=24)
model = torch.nn.Linear(2, 2)
groups = stepforge.param_groups(model, weight_decay=0.1, no_decay=("bias", torch.nn.Embedding))
stepforge.AdamW(groups)
stepforge.param_groups(model, weight_decay=0, lr=1, lr_scale={"head": 2, torch.nn.LayerNorm: 0.5})
stepforge.param_groups(model, weight_decay=0, lr=0.1, lr_scale=lambda name: 0.5)
scale = {"head": 2.0}
stepforge.param_groups(model, weight_decay=0.1, no_decay=["norm"], lr=0.1, lr_scale=scale)
result: stepforge.LoadResult = stepforge.RAdam(params).load_state_dict({}, strict=False)
loss: float = stepforge.RAdam(params).step(lambda: 1.0)

def signed(h: object, t: Value, p: Value, g: Value, m: Value) -> tuple[Value, Value]:
    return p, ema(m, g, 0.9)

class Mine(stepforge.Optimizer, rule=signed):
    lr: NonNegative = 1e-3
    betas: Betas = (0.9, 0.99)
    m = zeros("exp_avg")

Mine(params, 1e-3, betas=(0.5, 0.6), maximize=True)
"""

WRONG = {
    "unknown argument": "stepforge.Adam(params, momentum=0.9)",
    "wrong type": "stepforge.Adam(params, lr='fast')",
    "unknown format": "stepforge.Adagrad(params, state_format='int4')",
    "unknown width": "stepforge.NAdam(params, master_weight_bits=16)",
    "wrong tuple": "stepforge.NAdam(params, betas=(0.9, 0.99, 0.999))",
    "keyword-only by position": "stepforge.Adam(params, 1e-3, (0.9, 0.99), 1e-8, 0.0, False, True)",
    "no parameters": "stepforge.RAdam()",
    "groups without weight decay": "stepforge.param_groups(torch.nn.Linear(2, 2))",
    "an entry that is no class": (
        "stepforge.param_groups(torch.nn.Linear(2, 2), weight_decay=0.1, no_decay=(1,))"
    ),
    "factors that are no numbers": (
        "stepforge.param_groups(torch.nn.Linear(2, 2), weight_decay=0, lr=1, lr_scale={'a': 'b'})"
    ),
    "fixed value": "stepforge.AdamW(params, decoupled_weight_decay=True)",
    "tensor betas where only floats may be": (
        "stepforge.NAdam(params, betas=(torch.tensor(0.9), torch.tensor(0.99)))"
    ),
}

HEADER = "import torch\nimport stepforge\nparams = [torch.zeros(3)]\n"


def mypy(source: str, folder: Path) -> tuple[int, str]:
    path = folder / "snippet.py"
    path.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_right_calls_are_accepted(tmp_path: Path) -> None:
    status, output = mypy(RIGHT, tmp_path)
    assert status == 0, output


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy says of each wrong call; all are in one file, as each run costs seconds."""
    first = HEADER.count("\n") + 1
    lines = list(WRONG.values())
    _, output = mypy(HEADER + "\n".join(lines) + "\n", tmp_path_factory.mktemp("wrong"))
    return {
        name: [line for line in output.splitlines() if f"snippet.py:{first + number}:" in line]
        for number, name in enumerate(WRONG)
    }


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_rejected(name: str, complaints: dict[str, list[str]]) -> None:
    assert any("error:" in line for line in complaints[name]), f"accepted: {WRONG[name]}"
