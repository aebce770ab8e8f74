"""One step: the way from ``optimizer.step()`` to the launches of its backends.

* :mod:`~stepforge.step.stepper`: finds a kept plan, or builds one; binds and runs its launches.
* :mod:`~stepforge.step.kept_plans`: a few plans, by the parameters that have a gradient.
* :mod:`~stepforge.step.params`: the parameters of a step, checked before anything changes.
* :mod:`~stepforge.step.plan`: a plan groups parameters into launches.
* :mod:`~stepforge.step.guards`: tell whether a kept plan still fits.
* :mod:`~stepforge.step.launch`: a launch binds the tensors of a step, and runs.
* :mod:`~stepforge.step.uniform`: the values that are one number per parameter.
* :mod:`~stepforge.step.scalar_states`: step counts, and other states of one number.
* :mod:`~stepforge.step.compiled`: the step under ``torch.compile``.
* :mod:`~stepforge.step.signals`: signal handlers wait until all launches have run.
* :mod:`~stepforge.step.garbage`: garbage collection waits until a plan is built.
"""
