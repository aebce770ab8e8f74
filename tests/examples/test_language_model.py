"""examples/language_model.py, in miniature.

Oracles: the same run without an interruption, bit for bit; torch.optim on the same text.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import language_model
import pytest
import torch
import typer
from language_model import LEARNING_RATES, Config, LanguageModel, Run, corpus, train, windows
from typer.testing import CliRunner

TINY = Config(
    steps=12, warmup=3, batch=4, context=16, width=16, depth=1, heads=2, lr=1e-2,
    validate_every=5, validation_batches=2,
)  # fmt: skip


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Return all parameters and their states, by name."""
    tensors = {name: p.detach() for name, p in run.model.named_parameters()}
    for name, p in run.model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in run.optimizer.state[p].items()}
    return tensors


def assert_same_run(a: Run, b: Run) -> None:
    assert a.curve == b.curve
    tensors, others = tensors_of(a), tensors_of(b)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert torch.equal(a.order.get_state(), b.order.get_state())
    assert a.scheduler.get_last_lr() == b.scheduler.get_last_lr()


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_it_learns(optimizer: str) -> None:
    run = train(dataclasses.replace(TINY, optimizer=optimizer, steps=60, validate_every=60))

    # To an untrained model, all 256 bytes are about equally likely: 8 bits.
    assert run.curve.train[0] == pytest.approx(8, abs=0.2)
    [(step, loss)] = run.curve.validation
    assert step == 60
    assert loss < 7.5  # RAdam has barely finished its own warm-up; the others are below 6


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_a_resumed_run_equals_an_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, optimizer=optimizer)
    uninterrupted = train(config)

    # Stop once during the warm-up and once after it, each time between validations.
    path = tmp_path / "run.pt"
    train(config, checkpoint=path, until=2)
    torch.rand(7)  # other users of the global generator must not matter
    train(config, checkpoint=path, resume=True, until=7)
    resumed = train(config, checkpoint=path, resume=True)

    assert [step for step, _ in resumed.curve.validation] == [5, 10, 12]
    assert_same_run(resumed, uninterrupted)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    finished = train(TINY, checkpoint=path)

    assert_same_run(train(TINY, checkpoint=path, resume=True), finished)


def test_training_leaves_the_random_numbers_of_others_alone() -> None:
    before = torch.get_rng_state()

    train(TINY, until=1)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_torch_optim_learns_the_same(optimizer: str) -> None:
    ours, theirs = (
        train(dataclasses.replace(TINY, optimizer=optimizer, library=library)).curve
        for library in ("stepforge", "torch")
    )

    # Both round to float32, and the first steps of training amplify that little.
    assert ours.train == pytest.approx(theirs.train, rel=1e-4)


def test_only_matrices_decay() -> None:
    groups = Run(TINY).optimizer.param_groups

    assert [group["weight_decay"] for group in groups] == [TINY.weight_decay, 0]
    assert "position" in groups[0]["param_names"]
    assert "embedding.weight" in groups[0]["param_names"]
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert "blocks.0.mlp_in.bias" in groups[1]["param_names"]


def test_the_learning_rate_rises_and_falls() -> None:
    rates: list[float] = []
    train(TINY, after_step=lambda run: rates.append(run.scheduler.get_last_lr()[0]))

    assert rates.index(max(rates)) + 1 == TINY.warmup
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)


def test_the_model_cannot_see_the_future() -> None:
    model = LanguageModel(TINY)
    text = torch.arange(16).unsqueeze(0)
    changed = text.clone()
    changed[0, 10:] = 200

    before, after = model(text), model(changed)

    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_a_target_is_the_byte_that_follows() -> None:
    text = torch.arange(100, dtype=torch.uint8)

    seen, following = windows(text, torch.tensor([0, 83]), TINY)

    assert seen[1].tolist() == list(range(83, 99))
    assert torch.equal(following, seen + 1)


def test_the_corpus_is_python_in_two_parts() -> None:
    training, validation = corpus()

    assert b"import" in bytes(training[:10_000].tolist())
    assert 0.01 < len(validation) / len(training) < 0.15


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(TINY, checkpoint=path, until=1)

    with pytest.raises(ValueError, match=r"is of another run \(seed: 0 there, 1 here\)"):
        train(dataclasses.replace(TINY, seed=1), checkpoint=path, resume=True)


def test_a_failing_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    run = train(TINY, checkpoint=path, until=1)
    before = path.read_bytes()

    def fails(_: object, file: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        run.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_sample_continues_its_prompt_and_is_reproducible() -> None:
    model = LanguageModel(TINY)

    first, second = (model.continued(b"def ", 20, temperature=0.7, seed=3) for _ in range(2))

    assert first == second
    assert first.startswith(b"def ")
    assert len(first) == 24


SMALL = ["--batch", "2", "--context", "8", "--width", "16", "--depth", "1", "--sample", "10"]


def test_the_command_line_runs_as_a_script() -> None:
    command = [sys.executable, "-W", "error", language_model.__file__, "--steps", "3", *SMALL]

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # other tests run at the same time
    )

    assert done.returncode == 0, done.stderr
    assert "validation" in done.stdout
    assert "bits per byte" in done.stdout
    assert "a sample" in done.stdout


def test_the_command_line_resumes_and_explains_itself(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(language_model.main)
    path = tmp_path / "run.pt"

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(path), *SMALL])
        return result.exit_code, " ".join(result.output.split())

    assert invoke("--steps", "2", "--resume")[0] == 2
    assert invoke("--steps", "2", "--optimizer", "NAdam")[0] == 0
    code, output = invoke("--steps", "2", "--optimizer", "NAdam", "--resume")
    assert code == 0
    assert "2/2" in output
    code, output = invoke("--steps", "3", "--optimizer", "NAdam", "--resume")
    assert code == 2
    assert "steps: 2 there, 3 here" in output
    assert invoke("--optimizer", "SGD")[0] == 2
