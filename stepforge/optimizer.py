"""The optimizer contract: param groups, state, hooks, checkpoints and the step.

:class:`Optimizer` is a ``torch.optim.Optimizer``, so schedulers, gradient scalers and trainers
accept it. It inherits hook registration, ``zero_grad`` and profiling. Declarations, validation,
``add_param_group``, checkpoints and the step are its own.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar
from typing import Any, ClassVar, Literal, cast, dataclass_transform, overload

import torch
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from stepforge import checkpoint
from stepforge.backends.grad_scale import GradScale
from stepforge.checkpoint import LoadResult
from stepforge.declare import Seed, hyper, read_body, signature_of
from stepforge.explain import without_effect
from stepforge.formats import StateFormat
from stepforge.hyperparameter import Hyperparameter
from stepforge.metrics import Metric
from stepforge.rule import Rule
from stepforge.state.layout import HALF_DTYPES, holds_all_bits, is_flat
from stepforge.state.values import initial_states
from stepforge.step.control import Control
from stepforge.step.stepper import Stepper

__all__ = ["Optimizer", "ParamsT"]


# Raises if a graph is being captured without `capturable`; older versions of torch name it
# differently.
_check_graph_capture: Callable[[torch.optim.Optimizer], None] = getattr(
    torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009


# Asked at a step, not before: looking for a GPU may forbid children of this process to use one.
_has_accelerator = functools.cache(torch.accelerator.is_available)


@dataclass_transform(field_specifiers=(hyper,))
class _Declared(torch.optim.Optimizer):
    """Reader of class bodies: gives every subclass its rule and its constructor.

    It is a class of its own because type checkers read the declarations of subclasses of a class
    with ``dataclass_transform``, not of that class itself.
    """

    _hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    #: The rule that an optimizer steps by; bases of optimizers have none.
    rule: ClassVar[Rule]

    def __init_subclass__(cls, rule: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hyperparameters, states = read_body(cls, cls._hyperparameters)
        inherited: Rule | None = getattr(cls, "rule", None)
        if rule is None and hyperparameters == cls._hyperparameters and not states:
            return  # a subclass that changes behaviour only; trainers make them at run time
        cls._hyperparameters = hyperparameters
        if inherited is not None:
            rule, states = rule or inherited.function, states or dict(inherited.states)
        if rule is None:
            return  # a base of optimizers, not one itself
        cls.rule = Rule(rule, hyperparameters, states)
        if "__init__" not in vars(cls):
            _give_constructor(cast(type[Optimizer], cls))


class Optimizer(_Declared):
    """Base of all optimizers: a rule, its hyperparameters and its states.

    A subclass names its rule in the class header and declares the rest in its body. The
    declarations make its constructor, with ``params`` first. Every optimizer also takes the keyword
    arguments below.

    Args:
        params: parameters, or ``(name, parameter)`` pairs, or dicts that describe param groups:
            ``"params"`` and any hyperparameters that differ from the constructor's.
        maximize: climb the objective instead of descending it.
        foreach: True asks for the foreach path, False (with ``fused`` unset or False) for the
            reference. None takes the fastest backend for each parameter.
        capturable: keep step counts and scalar states on the device, and never synchronize it.
        differentiable: let autograd see the step.
        fused: True asks for a generated kernel, and raises an error where there is none.
        state_format: the format of states with one value per element. None stores them in the
            parameter's dtype, as torch.optim does; ``"float32"`` and ``"bfloat16"`` in that dtype;
            ``"int8"`` in one byte per element, with one scale per 128 elements of a row. With
            ``"int8"``, parameters with fewer than 4,096 elements, with rows of dimension 0 below
            64 elements, or sharded along another dimension keep full states.
        master_weight_bits: 24 or 32, for bfloat16 and float16 parameters: the bits of the weight
            that a step updates. The low bits are in the state ``low_bits_8`` or ``low_bits_16``.
            Longer parameters have the bits already, and are left alone. Call
            :func:`stepforge.checkpoint.reset_low_bits` after changing weights without the
            optimizer.
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random, so that
            small steps are not lost on average. Longer parameters are left alone.
        rounding_seed: the seed of random rounding, below 2**32. The same seed gives the same bits
            on every backend, with any number of threads, and sharded along dimension 0.
        max_grad_norm: clip the gradients of all groups together, so that their 2-norm is at most
            this, as ``torch.nn.utils.clip_grad_norm_`` does before the step and after a gradient
            scaler has unscaled them. Gradients are not written to. None does not clip.
        skip_nonfinite: leave everything as it is, step counts included, in a step with NaN or an
            infinity in any gradient; :meth:`metrics` counts such steps.
        telemetry: compute the metrics of :meth:`metrics` in every step. A dict adds metrics of
            one's own, as in :mod:`stepforge.metrics`: each a name, and a function of some of the
            symbols ``p``, ``new_p``, ``g``, ``change`` and ``size``.

    Attributes:
        param_groups: a list of dicts, one per group: ``"params"`` and every hyperparameter.
        state: for each parameter that was stepped, a dict of its states and ``"step"``.
        defaults: the constructor's hyperparameters.

    Raises:
        ValueError: a hyperparameter is out of its range, a parameter is in two groups or is not a
            leaf, or there are no parameters.
        TypeError: something is of the wrong kind.

    Example:
        >>> import torch
        >>> from stepforge.declare import NonNegative
        >>> def gradient_descent(h, t, p, g):
        ...     return p - h.lr * g
        >>> class SGD(Optimizer, rule=gradient_descent):
        ...     lr: NonNegative = 0.5
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> p.grad = torch.tensor([2.0, 2.0])
        >>> SGD([p]).step()
        >>> p.tolist()
        [0.0, 1.0]
    """

    #: True if the rule leaves elements with a zero gradient alone, so that a sparse gradient
    #: touches only the elements it names.
    _takes_sparse: ClassVar[bool] = False
    #: True if the constructor makes the states, not the first step.
    _eager_state: ClassVar[bool] = False

    params: InitVar[ParamsT]
    maximize: bool = hyper(default=False, kw_only=True, optional_in_checkpoint=True)
    foreach: bool | None = hyper(default=None, kw_only=True, optional_in_checkpoint=True)
    capturable: bool = hyper(default=False, kw_only=True, optional_in_checkpoint=True)
    differentiable: bool = hyper(default=False, kw_only=True, optional_in_checkpoint=True)
    fused: bool | None = hyper(default=None, kw_only=True, optional_in_checkpoint=True)
    state_format: StateFormat | None = hyper(
        default=None, kw_only=True, optional_in_checkpoint=True
    )
    master_weight_bits: Literal[24, 32] | None = hyper(
        default=None, kw_only=True, optional_in_checkpoint=True
    )
    stochastic_rounding: bool = hyper(default=False, kw_only=True, optional_in_checkpoint=True)
    rounding_seed: Seed = hyper(default=0, kw_only=True, optional_in_checkpoint=True)
    # Options of the optimizer, not of a param group.
    max_grad_norm: InitVar[float | None] = hyper(default=None, kw_only=True)
    skip_nonfinite: InitVar[bool] = hyper(default=False, kw_only=True)
    telemetry: InitVar[bool | Mapping[str, Metric]] = hyper(default=False, kw_only=True)

    def __init__(self, params: ParamsT, **options: Any) -> None:
        if not hasattr(self, "rule"):
            raise TypeError(
                f"{type(self).__name__} has no rule: name it in the class header, rule=..."
            )
        self._control = Control(**{n: options.pop(n) for n in Control.DEFAULTS if n in options})
        unknown = sorted(options.keys() - {n for n, h in self._hyperparameters.items() if h.init})
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}")
        defaults = {
            name: declared.checked(options.get(name, declared.default))
            for name, declared in self._hyperparameters.items()
        }
        self._check_options(defaults)
        # A gradient scaler then leaves unscaling to the step.
        self._step_supports_amp_scaling = bool(defaults["fused"])
        self._stepper = self._new_stepper()
        self._lent: Mapping[torch.Tensor, checkpoint.Lent] = {}  # to the last state dict
        self._step_is_running: list[bool] = []  # empty unless one is
        _check_ordered(params)
        super().__init__(params, defaults)
        if self._eager_state:
            for group in self.param_groups:
                members: list[torch.Tensor] = group["params"]
                self.state.update(zip(members, initial_states(self.rule, members, group)))
        for message in without_effect(self.rule, self.param_groups):
            warnings.warn(message, stacklevel=3)

    def _new_stepper(self) -> Stepper:
        rule = self.rule.with_metrics(self._control.step_metrics)
        return Stepper(self, rule, self._sparse_gradient_error(), self._control)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raise if options exclude each other."""
        if options["fused"] and options["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if options["fused"] and options["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if options["foreach"] and options["differentiable"]:
            raise RuntimeError("`foreach` does not support `differentiable`")
        for name in ("state_format", "master_weight_bits", "stochastic_rounding"):
            if options[name] and options["differentiable"]:
                raise RuntimeError(f"`{name}` does not support `differentiable`")
        for name, value in self._control.options.items():
            if value and options["differentiable"]:
                raise RuntimeError(f"`{name}` does not support `differentiable`")
        if options["master_weight_bits"] and options["stochastic_rounding"]:
            raise ValueError(
                "`master_weight_bits` and `stochastic_rounding` exclude each other: weights that "
                "keep their lower bits are not rounded"
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"control": self._control.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self._control = Control(**state.pop("control", {}))
        super().__setstate__(state)
        self._stepper = self._new_stepper()
        self._lent = {}
        self._step_is_running = []
        self.param_groups = list(map(self._param_group, self.param_groups))
        checkpoint.complete_options(self._hyperparameters, self.defaults)
        self._step_supports_amp_scaling = bool(self.defaults["fused"])
        for group in self.param_groups:
            checkpoint.complete_options(self._hyperparameters, group)
            for p in group["params"]:
                if p in self.state:
                    self.state[p] = checkpoint.unpickled(self.rule, group, p, self.state[p])

    def _patch_step_function(self) -> None:
        # torch wraps the step of every class in hooks and a profiler record. If a subclass
        # overrides step and calls super().step(), both are wrapped; only the outer runs hooks.
        cls = type(self)
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{cls.__name__}.zero_grad"
        if not getattr(cls.step, "hooked", False):
            hooked = _outermost(cls.step, self.profile_hook_step(cls.step))
            hooked.hooked = True  # type: ignore[attr-defined]
            cls.step = hooked  # type: ignore[method-assign]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as when frozen layers are unfrozen.

        Args:
            param_group: ``"params"``, a parameter, or an ordered collection of parameters or of
                ``(name, parameter)`` pairs; and any hyperparameters that differ from the
                constructor's. It is not changed.

        Raises:
            ValueError: a hyperparameter is out of its range; a parameter is not a leaf, or is in
                another group; names are given for some parameters only.
            TypeError: something is of the wrong kind.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = self.defaults | param_group
        group["params"], names = _params_and_names(param_group)
        if names is not None:
            group["param_names"] = names
        for name, declared in self._hyperparameters.items():
            if not declared.init and group[name] != declared.default:
                raise ValueError(f"{name} is always {declared.default} in {type(self).__name__}")
            group[name] = declared.checked(group[name])
        self._check_options(group)
        self._check_params(group)
        self.rule.graph(group)  # raise for a mistake in the rule now, not at the first step
        self.param_groups.append(self._param_group(group))
        self._stepper.traced = None

    def _param_group(self, options: Mapping[str, Any]) -> checkpoint.ParamGroup:
        return checkpoint.ParamGroup(options, checkpoint.local_options(type(self)))

    def _check_params(self, group: Mapping[str, Any]) -> None:
        params = group["params"]
        for p in params:
            if not isinstance(p, torch.Tensor):
                raise TypeError(
                    "optimizer can only optimize Tensors, but one of the params is "
                    + torch.typename(p)
                )
            if not self.defaults["differentiable"] and not (p.is_leaf or p.retains_grad):
                raise ValueError("can't optimize a non-leaf Tensor")
            for name in ("master_weight_bits", "stochastic_rounding"):
                if (
                    group[name]
                    and p.requires_grad
                    and not (p.dtype in HALF_DTYPES or holds_all_bits(p.dtype))
                ):
                    raise ValueError(
                        f"{name}={group[name]} is for bfloat16 and float16 parameters and leaves "
                        f"longer ones alone, but one of the params is {p.dtype}: give it a param "
                        f"group without {name}"
                    )
            if group["master_weight_bits"] and p.dtype in HALF_DTYPES and is_flat(p):
                raise ValueError(
                    f"master_weight_bits={group['master_weight_bits']} is not for parameters that "
                    "FullyShardedDataParallel has flattened, as its optim_state_dict takes no "
                    "states of integers: use fully_shard, or stochastic_rounding"
                )
        if len(params) != len(set(params)):
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters; each is stepped "
                "once",
                stacklevel=5,
            )
        for other in self.param_groups:
            if ("param_names" in group) != ("param_names" in other):
                given = "with names" if "param_names" in group else "without names"
                raise ValueError(
                    "all optimizer param groups should be with/without names. "
                    f"cannot add param group {given} to the optimizer"
                )
            if not set(other["params"]).isdisjoint(params):
                raise ValueError("some parameters appear in more than one parameter group")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, in the format of torch.optim.

        Returns:
            A dict with ``"state"``, the state of each parameter by its index, and
            ``"param_groups"``, the options of each group with its parameters' indices. Tensors are
            the optimizer's own: copy those that must outlive the next step. torch.optim knows no
            formats; :func:`stepforge.checkpoint.to_torch` exports to it. Options that the twin does
            not have and that are not loaded are left out: ``state_format``,
            ``master_weight_bits``, ``stochastic_rounding``, ``rounding_seed``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        local = checkpoint.local_options(type(self))
        state_dict = checkpoint.pack(self.param_groups, self.state, local)
        self._lent = checkpoint.lent(self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _unless_none(post_hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> LoadResult:
        """Load a state dict of this optimizer, or of its torch.optim twin.

        Everything is checked before anything changes. Tensors are copied to their parameter's
        device and sharding, and converted to the format of its group, rounded to nearest. Tensors
        that have the format already are copied bit for bit. Without a ``state_format`` they keep
        their dtype, unless the parameter's is longer.

        The options of the groups are loaded, except those that choose how a step runs and how
        states are stored: ``foreach``, ``fused``, ``capturable``, ``differentiable``,
        ``state_format``, ``master_weight_bits``, ``stochastic_rounding``, ``rounding_seed``. A flag
        that adds a state, such as ``amsgrad``, is on if it is on in either. A learning rate that is
        a tensor is updated in place.

        Parameters are matched by name if both sides have names for all of them, else by order.

        Args:
            state_dict: the state dict; not changed.
            strict: False to load everything that fits. A parameter keeps its state unless all of
                its new state fits.

        Returns:
            The missing, unexpected and mismatched keys; none if ``strict``.

        Raises:
            ValueError: the state dict is not an optimizer's, holds a value out of its range or,
                if ``strict``, has a key that does not fit.
        """
        found = self._examined(state_dict, strict)
        self._apply(found, strict)
        return found.result

    def _examined(
        self,
        state_dict: Mapping[str, Any],
        strict: bool,
        names: Sequence[Sequence[str]] | None = None,
    ) -> checkpoint.Loading:
        """Check a state dict, and return the changes that loading it will make."""
        given = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            given = _unless_none(pre_hook(self, given), given)
        groups: Sequence[Mapping[str, Any]] = self.param_groups
        if names is not None:
            groups = [{**group, "param_names": own} for group, own in zip(groups, names)]
        return checkpoint.examine(
            self.rule,
            groups,
            given,
            strict=strict,
            foreign=_hyperparameters_of_others(self._hyperparameters),
            state=self.state,
            lent=self._lent,
        )

    def _apply(self, loading: checkpoint.Loading, strict: bool) -> None:
        checkpoint.apply(loading, self.param_groups, self.state, strict=strict)
        self._stepper.forget()
        self._lent = {}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients; called first.

        Returns:
            The closure's loss; None without one.

        Raises:
            RuntimeError: a gradient is sparse and the rule does not take them, or the backend of
                ``fused`` or ``STEPFORGE_BACKEND`` cannot serve a parameter. Nothing has changed.
            TypeError: a parameter with a gradient is not of a floating point or complex dtype.
        """
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and _has_accelerator():
            _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_compiling:
            # It imports torch._dynamo, a second that only users who compile should pay.
            from stepforge.step import compiled

            with torch.set_grad_enabled(self.defaults["differentiable"]):
                if getattr(self, "found_inf", None) is None:
                    compiled.step(self._stepper, self.state, self._run)
                else:  # a gradient scaler's numbers are not for a graph
                    compiled.step_outside(self._run)
        else:
            self._run()
        return loss

    @overload
    def metrics(self, by: None = None) -> dict[str, torch.Tensor]: ...

    @overload
    def metrics(self, by: Literal["group"]) -> list[dict[str, torch.Tensor]]: ...

    @overload
    def metrics(self, by: Literal["parameter"]) -> dict[str | int, dict[str, torch.Tensor]]: ...

    def metrics(self, by: Literal["group", "parameter"] | None = None) -> Any:
        """Return what is known of the last step, as float64 tensors without dimensions.

        They are on the device of the parameters, and nothing waits for it until one is read. With
        ``telemetry`` they are:

        - ``grad_norm``: the 2-norm of the gradients, unscaled, before clipping.
        - ``grad_max``: the largest magnitude in a gradient.
        - ``nonfinite``: the number of elements of gradients that are NaN or infinite.
        - ``update_norm``: the 2-norm of what was added to the parameters, as they are stored.
        - ``param_norm``: the 2-norm of the parameters after the step.
        - ``update_ratio``: ``update_norm`` over ``param_norm``.
        - ``lost``: the share of elements with a gradient other than 0 that were to change, and
          stayed what they were, as with steps below half a unit in the last place. Low bits of
          ``master_weight_bits`` count as parts of a parameter.
        - the metrics of one's own.

        A step that was skipped has changed nothing: its ``update_norm`` and ``lost`` are 0.

        Args:
            by: None for all parameters together; ``"group"`` for those of each param group;
                ``"parameter"`` for each parameter that was stepped.

        Returns:
            A dict by the names above; by group a list of them; by parameter a dict of them, by the
            parameters' names, or their numbers where they have none. Of all parameters together
            there are also ``clip_factor``, what gradients were multiplied by, with
            ``max_grad_norm``; and ``skipped``, the number of steps skipped so far, with
            ``skip_nonfinite`` or ``telemetry``. Without ``telemetry``, ``grad_norm`` is known with
            ``max_grad_norm``, and ``nonfinite`` with ``skip_nonfinite``. Before the first step
            nothing is.

        Raises:
            ValueError: ``by`` is none of these.

        Example:
            >>> from stepforge import AdamW
            >>> p = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = AdamW([("bias", p)], lr=0.25, weight_decay=0, telemetry=True)
            >>> p.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.step()
            >>> optimizer.metrics()["grad_norm"].item()
            5.0
            >>> optimizer.metrics(by="parameter")["bias"]["update_ratio"].item()
            1.0
        """
        return self._control.known(self.param_groups, by)

    def _run(self) -> None:
        scale = GradScale.of(self)
        was_enabled = torch.is_grad_enabled()
        try:
            # One call: an interrupt within torch's context manager would leave autograd off.
            torch._C._set_grad_enabled(self.defaults["differentiable"])
            if (
                scale is not None
                and scale.on_host
                and scale.found_inf
                and not self._control.metrics
            ):
                self._control.count_skipped()
                return
            self._stepper.step(self.param_groups, self.state, scale)
        except BaseException:
            # GradScaler multiplies into leftovers: they are about this step only.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _sparse_gradient_error(self) -> str | None:
        """Return the error for a sparse gradient; None if the rule takes them."""
        if self._control.metrics:
            return "`telemetry` does not support sparse gradients"
        if self._takes_sparse:
            return None
        return (
            f"{type(self).__name__} does not support sparse gradients, "
            "please consider Adagrad instead"
        )


#: The constructor's arguments that are options of the optimizer, not of a param group.
_OF_THE_OPTIMIZER = [
    inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=Control.DEFAULTS[name],
        annotation=annotation,
    )
    for name, annotation in {
        "max_grad_norm": float | None,
        "skip_nonfinite": bool,
        "telemetry": bool | Mapping[str, Metric],
    }.items()
]


def _give_constructor(cls: type[Optimizer]) -> None:
    """Define ``cls.__init__`` with the signature that the declarations describe."""
    signature = signature_of(cls._hyperparameters, ParamsT, _OF_THE_OPTIMIZER)

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{cls.__name__}() {error}") from None
        params = arguments.pop("params")
        Optimizer.__init__(self, params, **arguments)

    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[receiver, *signature.parameters.values()]
    )
    __init__.__annotations__ = {
        name: parameter.annotation for name, parameter in signature.parameters.items()
    } | {"return": None}
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    cls.__init__ = __init__  # type: ignore[method-assign]


def _outermost(inner: Callable[..., Any], hooked: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that runs hooks, unless it is called from within another step.

    Args:
        inner: the step of a class.
        hooked: the same within torch's hooks and profiler record, which take 10 us.
    """

    @functools.wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A list, not a flag: torch.compile of 2.10 cannot set attributes of an optimizer. It is
        # filled within `try`: an interrupt must not leave it filled, or no hook would run again.
        running = self._step_is_running
        if running:
            return inner(self, *args, **kwargs)
        try:
            running.append(True)
            if torch.compiler.is_compiling() or _is_observed(self):
                return hooked(self, *args, **kwargs)
            return inner(self, *args, **kwargs)
        finally:
            running.clear()

    return step


def _is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a hook or a profiler wants to know of a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled
    )


def _params_and_names(
    param_group: Mapping[str, Any],
) -> tuple[list[torch.Tensor], list[str] | None]:
    if "params" not in param_group:
        raise ValueError(f"a param group needs 'params', but got only {list(param_group)}")
    params = param_group["params"]
    if isinstance(params, torch.Tensor):
        return [params], None
    _check_ordered(params)
    members = list(params)
    names = [member[0] for member in members if isinstance(member, tuple)]
    if not names:
        return members, None
    if len(names) != len(members):
        raise ValueError(
            "all optimizer params should be with/without names. Some param names are missing"
        )
    return [member[1] for member in members], names


def _check_ordered(params: object) -> None:
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering "
            "of tensors in sets will change between runs. Please use a list instead."
        )


def _hyperparameters_of_others(own: Mapping[str, Any]) -> frozenset[str]:
    """Return the hyperparameters that only other built-in optimizers have."""
    names: set[str] = set()
    pending: list[type[Optimizer]] = [Optimizer]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        # A user's optimizer may give a hyperparameter the name of another user's note in a group.
        if cls.__module__.startswith("stepforge.rules."):
            names.update(cls._hyperparameters)
    return frozenset(names - set(own))


def _unless_none(result: Any, otherwise: Any) -> Any:
    return otherwise if result is None else result
