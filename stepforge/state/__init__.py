"""The state of a parameter: what ``optimizer.state[p]`` holds, how it is made and converted.

* :mod:`~stepforge.state.layout`: which tensors there are, under which keys, in which formats.
* :mod:`~stepforge.state.values`: what they hold; initial values, and conversion between formats.
* :mod:`~stepforge.state.alike`: which tensors are alike, so that one stands for all.
* :mod:`~stepforge.state.sharding`: the local parts of DTensors.
"""
