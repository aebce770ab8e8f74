"""Users of optimizers: schedulers, gradient scalers, torch.nn, copies, process groups, trainers.

Oracle: the torch.optim twin in the same use. For pickles and copies: the same optimizer itself.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import stepforge
from stepforge.hyperparameter import EXECUTION_FLAGS
from tests.twins import (
    LR,
    SHAPES,
    assert_identical,
    assert_params_close,
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    run,
    save_and_load,
    snapshot,
    tolerance,
    twin_of,
)

Params = list[torch.nn.Parameter]

# Modules of torch warn that they are deprecated when they are imported.
ignore_torch_jit = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def make_model(seed: int = 3) -> torch.nn.Module:
    """Return a new model, with the same weights at every call."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    return (model(batch(step)) - 1).square().mean()


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> torch.nn.Module:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model


def assert_models_close(model: torch.nn.Module, other: torch.nn.Module, steps: int) -> None:
    """Assert that two models are close after training.

    The gradients of a model depend on its parameters, so they amplify differences, here by less
    than a factor of 10.
    """
    bounds = tolerance(torch.float32, 10 * steps)
    assert_params_close(list(model.parameters()), list(other.parameters()), **bounds)


# Schedulers

SCHEDULER_STEPS = 20


def _one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=25, cycle_momentum="betas" in optimizer.defaults
    )


def _cyclic(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CyclicLR(
        optimizer,
        base_lr=0.05,
        max_lr=0.3,
        step_size_up=3,
        cycle_momentum="betas" in optimizer.defaults,
    )


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=5)
    second = lr_scheduler.ExponentialLR(optimizer, gamma=0.75)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[5])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.5),
    "OneCycleLR": _one_cycle,
    "CyclicLR": _cyclic,
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=8),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "SequentialLR": _sequential,
}


def scheduled(
    make: type, schedule: Callable[..., Any], lr: Any
) -> tuple[torch.optim.Optimizer, Params, list[tuple[float, Any]]]:
    """Run an optimizer with a scheduler; return it, its parameters, and the options by step."""
    params = make_params()
    optimizer = make(params, lr=lr)
    scheduler = schedule(optimizer)
    options = []
    for step in range(SCHEDULER_STEPS):
        group = optimizer.param_groups[0]
        options.append((float(group["lr"]), group.get("betas")))
        run(optimizer, params, range(step, step + 1))
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
    return optimizer, params, options


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@each_optimizer
def test_schedulers_drive_the_step_as_they_do_the_twins(
    cls: type, schedule: Callable[..., Any], tensor: bool
) -> None:
    lr = torch.tensor(LR) if tensor else LR
    optimizer, params, options = scheduled(cls, schedule, lr)
    twin_lr = torch.tensor(LR) if tensor else LR
    _, twins, twin_options = scheduled(twin_of(cls), schedule, twin_lr)
    assert options == twin_options
    assert len(set(options)) > 3, "the schedule has to change something"
    assert not tensor or optimizer.param_groups[0]["lr"] is lr
    assert_params_close(params, twins, **tolerance(torch.float32, SCHEDULER_STEPS))


@each_optimizer
def test_one_cycle_asks_for_betas_where_there_are_none(cls: type) -> None:
    optimizer = cls(make_params())
    if "betas" in optimizer.defaults:
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=25)
        assert optimizer.param_groups[0]["betas"][0] == 0.95
    else:
        with pytest.raises(ValueError, match="momentum"):
            lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=25)


@each_optimizer
def test_a_scheduler_sees_that_the_step_came_first(cls: type) -> None:
    params = make_params()
    optimizer = cls(params)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer = cls(params)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    run(optimizer, params, range(1))
    scheduler.step()  # a warning would be an error


# Gradient scaling


def train_scaled(make: type, clip: bool, **flags: bool) -> torch.nn.Module:
    """Return a model trained with a gradient scaler."""
    model = make_model()
    optimizer = make(model.parameters(), lr=LR, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 2.0**8
    return model


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@each_optimizer
def test_a_gradient_scaler_trains_as_with_the_twin(cls: type, clip: bool) -> None:
    assert_models_close(train_scaled(cls, clip), train_scaled(twin_of(cls), clip), 8)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@each_optimizer
def test_unscaling_in_the_step_is_as_exact_as_before_it(cls: type, clip: bool) -> None:
    """The bits are equal, as the scaler multiplies by powers of two."""
    within, before = train_scaled(cls, clip, fused=True), train_scaled(cls, clip)
    assert all(map(torch.equal, within.parameters(), before.parameters()))


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscaled first"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("fused", [None, True])
@each_optimizer
def test_an_overflow_leaves_everything_untouched(
    cls: type, fused: bool | None, steps: int, unscale: bool
) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=LR, fused=fused)
    train(model, optimizer, range(steps))
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model, steps)).backward()
    next(model.parameters()).grad[0, 0] = float("inf")
    before = snapshot(optimizer)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after = snapshot(optimizer)
    assert_identical({**after, "grads": None}, {**before, "grads": None})
    assert scaler.get_scale() == 2.0**7
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    optimizer.zero_grad()
    scaler.scale(loss_of(model, steps)).backward()
    scaler.step(optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {steps + 1.0}


@each_optimizer
def test_only_a_fused_step_claims_to_unscale(cls: type) -> None:
    for fused in (None, False, True):
        optimizer = cls(make_params(), fused=fused)
        for one in (optimizer, pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
            assert bool(one._step_supports_amp_scaling) == bool(fused)


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_backend_divides_by_the_scale(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: gradients divided beforehand, exactly, by a power of two."""
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    params, plain = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, twin = stepforge.NAdam(params, lr=LR), stepforge.NAdam(plain, lr=LR)
    for step in range(3):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)
        give_gradients(params, step)
        gradients = [p.grad for p in params]
        before = [g.mul_(64).clone() for g in gradients]
        optimizer.step()
        assert all(map(torch.equal, gradients, before))  # they are read only
        run(twin, plain, range(step, step + 1))
    assert all(map(torch.equal, params, plain))


def test_a_scale_that_is_no_power_of_two_is_rounded_once() -> None:
    """Oracle: the product with the float32 reciprocal, as in ``GradScaler.unscale_``."""
    params, plain = make_params(), make_params()
    optimizer, twin = stepforge.Adam(params, fused=True), stepforge.Adam(plain)
    give_gradients(params, 0)
    for p, q in zip(params, plain):
        q.grad = p.grad * torch.tensor(3.0).double().reciprocal().float()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, params, plain))


def test_a_step_that_raises_removes_the_attributes_of_the_scaler() -> None:
    """GradScaler would multiply its next scale into a leftover one."""
    model = make_model()
    optimizer = stepforge.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model, 0)).backward()
    optimizer.param_groups[0]["betas"] = ("no", "number")
    with pytest.raises((TypeError, ValueError)):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


# torch.nn and torch.func


@each_optimizer
def test_clipped_gradients_step_as_with_the_twin(cls: type) -> None:
    params, twins = make_params(), make_params()
    for optimizer, owned in ((cls(params, lr=LR), params), (twin_of(cls)(twins, lr=LR), twins)):
        for step in range(5):
            give_gradients(owned, step)
            torch.nn.utils.clip_grad_norm_(owned, 0.5)
            optimizer.step()
    assert_params_close(params, twins, **tolerance(torch.float32, 5))


@each_optimizer
def test_averaged_models_follow(cls: type) -> None:
    averages = []
    for make in (cls, twin_of(cls)):
        model = make_model()
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        optimizer = make(model.parameters(), lr=LR)
        for step in range(6):
            train(model, optimizer, range(step, step + 1))
            average.update_parameters(model)
        assert not torch.equal(next(average.parameters()), next(model.parameters()))
        averages.append(average)
    assert_models_close(*averages, 6)


@each_optimizer
def test_swa_lr_anneals_as_with_the_twin(cls: type) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=6)

    _, params, options = scheduled(cls, schedule, LR)
    _, twins, twin_options = scheduled(twin_of(cls), schedule, LR)
    assert options == twin_options
    assert_params_close(params, twins, **tolerance(torch.float32, SCHEDULER_STEPS))


@each_optimizer
def test_functional_calls_see_the_step(cls: type) -> None:
    models = []
    for make in (cls, twin_of(cls)):
        model = make_model()
        params = dict(model.named_parameters())
        optimizer = make(params.items(), lr=LR)

        def loss(values: dict[str, torch.Tensor], step: int, model: Any = model) -> torch.Tensor:
            return torch.func.functional_call(model, values, batch(step)).square().mean()

        for step in range(5):
            gradients = torch.func.grad(loss)({k: p.detach() for k, p in params.items()}, step)
            for name, p in params.items():
                p.grad = gradients[name]
            optimizer.step()
        models.append(model)
    assert_models_close(*models, 5)


@each_optimizer
def test_optimizers_in_the_backward_pass(cls: type) -> None:
    models = []
    for make in (cls, twin_of(cls)):
        model = make_model()
        optimizers = {p: make([p], lr=LR) for p in model.parameters()}

        def step_at_once(p: torch.Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step_at_once)
        for step in range(5):
            loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        assert {float(o.state[p]["step"]) for p, o in optimizers.items()} == {5.0}
        models.append(model)
    assert_models_close(*models, 5)


@each_optimizer
def test_a_step_between_forward_and_backward_is_noticed_by_autograd(cls: type) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=LR)
    train(model, optimizer, range(1))
    loss = loss_of(model, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Copies


def _pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def _saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [_pickled, copy.deepcopy, _saved])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@each_optimizer
def test_a_copy_continues_identically(cls: type, steps: int, duplicate: Callable[..., Any]) -> None:
    params = make_params()
    optimizer = cls(params, lr=LR, weight_decay=0.1)
    optimizer.register_step_pre_hook(_no_hook)
    run(optimizer, params, range(steps))
    copied = duplicate(optimizer)
    own = copied.param_groups[0]["params"]
    assert type(copied) is cls
    assert not any(p is q for p, q in zip(own, params, strict=True))
    run(optimizer, params, range(steps, steps + 4))
    run(copied, own, range(steps, steps + 4))
    assert_identical(snapshot(copied), snapshot(optimizer))


def _no_hook(*_: Any) -> None:
    """Do nothing. This hook is at module level, where pickle can find it."""


@pytest.mark.parametrize("duplicate", [_pickled, copy.deepcopy])
@each_optimizer
def test_a_copy_is_an_optimizer_in_every_respect(cls: type, duplicate: Callable[..., Any]) -> None:
    optimizer = cls(make_params(), lr=LR)
    optimizer.register_step_pre_hook(_no_hook)
    copied = duplicate(optimizer)
    own = copied.param_groups[0]["params"]
    calls: list[str] = []
    copied.register_step_pre_hook(lambda *_: calls.append("pre"))
    copied.register_step_post_hook(lambda *_: calls.append("post"))
    copied.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    copied.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    run(copied, own, range(1))
    copied.load_state_dict(copied.state_dict())
    assert calls == ["pre", "post", "state_dict", "load"]
    copied.zero_grad()
    assert all(p.grad is None for p in own)
    copied.add_param_group({"params": make_params([(2,)])})
    assert repr(copied).startswith(f"{cls.__name__} (")
    assert stepforge.explain(copied).optimizer == cls.__name__
    lr_scheduler.StepLR(copied, 1)


@each_optimizer
def test_a_scheduled_optimizer_can_be_pickled(cls: type) -> None:
    params = make_params()
    optimizer = cls(params, lr=LR)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, params, range(1))
    scheduler.step()
    copied = _pickled(optimizer)
    run(copied, copied.param_groups[0]["params"], range(1, 2))
    run(optimizer, params, range(1, 2))
    assert_identical(snapshot(copied)["params"], snapshot(optimizer)["params"])


@each_optimizer
def test_a_pickle_of_an_older_version_is_completed(cls: type) -> None:
    params = make_params()
    optimizer = cls(params, lr=LR)
    run(optimizer, params, range(3))
    old = copy.deepcopy(optimizer.__getstate__())
    for name in (*EXECUTION_FLAGS, "maximize"):
        del old["param_groups"][0][name]
    for state in old["state"].values():
        state.update({key: float(x) for key, x in state.items() if key in ("step", "mu_product")})
    restored = cls.__new__(cls)
    restored.__setstate__(old)
    run(restored, restored.param_groups[0]["params"], range(3, 6))
    run(optimizer, params, range(3, 6))
    assert_identical(snapshot(restored)["params"], snapshot(optimizer)["params"])


# Tensors without data


@each_optimizer
def test_meta_parameters_can_be_stepped(cls: type) -> None:
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = cls(params)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.is_meta]
    assert {x.shape for x in moments} == {torch.Size(shape) for shape in SHAPES}


@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@each_optimizer
def test_fake_parameters_can_be_stepped(cls: type, capturable: bool) -> None:
    fake = torch._subclasses.fake_tensor
    with fake.FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        optimizer = cls(params, capturable=capturable)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    for p in params:
        assert isinstance(p.data, fake.FakeTensor)
        for key, value in optimizer.state[p].items():
            assert value.shape == (() if key in ("step", "mu_product") else p.shape)


# Several processes


@ignore_torch_jit
@pytest.mark.usefixtures("single_process_group")
@each_optimizer
def test_zero_redundancy_optimizer_takes_the_class(cls: type) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin_model = make_model(), make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=LR)
    train(model, optimizer, range(4))
    train(twin_model, twin_of(cls)(twin_model.parameters(), lr=LR), range(4))
    assert_models_close(model, twin_model, 4)
    optimizer.consolidate_state_dict()
    fresh_model = make_model()
    fresh = ZeroRedundancyOptimizer(fresh_model.parameters(), optimizer_class=cls, lr=LR)
    fresh.load_state_dict(save_and_load(optimizer.state_dict()))  # its load aliases tensors
    fresh_model.load_state_dict(model.state_dict())
    train(model, optimizer, range(4, 6))
    train(fresh_model, fresh, range(4, 6))
    assert_identical(
        [p.detach() for p in fresh_model.parameters()], [p.detach() for p in model.parameters()]
    )


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@each_optimizer
def test_distributed_state_dicts_restore_by_name(cls: type, flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    optimizer = cls(model.parameters(), lr=LR)
    train(model, optimizer, range(3))
    before = snapshot(optimizer)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert_unchanged(optimizer, before)
    resumed_model = make_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = cls(resumed_model.parameters(), lr=0.7)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == LR
    train(model, optimizer, range(3, 6))
    train(resumed_model, resumed, range(3, 6))
    assert_identical(
        [p.detach() for p in resumed_model.parameters()], [p.detach() for p in model.parameters()]
    )


@pytest.mark.usefixtures("single_process_group")
@each_optimizer
def test_gradients_that_are_views_of_a_bucket(cls: type) -> None:
    models = []
    for make in (cls, twin_of(cls)):
        model = torch.nn.parallel.DistributedDataParallel(
            make_model(), gradient_as_bucket_view=True
        )
        models.append(train(model, make(model.parameters(), lr=LR), range(4)))
    assert_models_close(*models, 4)


def test_the_sums_of_adagrad_can_be_shared() -> None:
    params, alone = make_params(), make_params()
    optimizer, private = stepforge.Adagrad(params, lr=LR), stepforge.Adagrad(alone, lr=LR)
    assert not any(optimizer.state[p]["sum"].is_shared() for p in params)
    optimizer.share_memory()
    run(optimizer, params, range(3))
    run(private, alone, range(3))
    assert all(optimizer.state[p]["sum"].is_shared() for p in params)
    assert_identical(snapshot(optimizer)["params"], snapshot(private)["params"])


# Trainers


class Wrapper:
    """A wrapper of an optimizer, as trainers make: its class is derived from both at run time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        cls = type(optimizer)
        self.__class__ = type("Fabric" + cls.__name__, (type(self), cls), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        return self._optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@each_optimizer
def test_a_wrapper_of_a_class_made_at_run_time(cls: type) -> None:
    params, plain_params = make_params(), make_params()
    optimizer, plain = cls(params, lr=LR), cls(plain_params, lr=LR)
    wrapped = Wrapper(optimizer)
    assert isinstance(wrapped, cls)
    assert type(wrapped).__name__ == f"Fabric{cls.__name__}"
    scheduler = lr_scheduler.StepLR(wrapped, 2, gamma=0.5)
    plain_scheduler = lr_scheduler.StepLR(plain, 2, gamma=0.5)
    for step in range(5):
        run(wrapped, params, range(step, step + 1))
        run(plain, plain_params, range(step, step + 1))
        scheduler.step()
        plain_scheduler.step()
    wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert_identical(snapshot(optimizer)["params"], snapshot(plain)["params"])
    assert_identical(snapshot(optimizer)["state"], snapshot(plain)["state"])


class Counting:
    """A mix-in whose own constructor calls the optimizer's."""

    def __init__(self, *args: Any, start: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = start

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


@each_optimizer
def test_a_mixin_with_its_own_constructor(cls: type) -> None:
    mixed = type("Counting" + cls.__name__, (Counting, cls), {})
    params, plain_params = make_params(), make_params()
    optimizer = mixed(params, lr=LR, start=3)
    run(optimizer, params, range(4))
    run(cls(plain_params, lr=LR), plain_params, range(4))
    assert optimizer.count == 7
    assert_identical([p.detach() for p in params], [p.detach() for p in plain_params])
