"""The former home of ParamGroup, under which older pickles name it."""

from stepforge.checkpoint.save import ParamGroup

__all__ = ["ParamGroup"]
