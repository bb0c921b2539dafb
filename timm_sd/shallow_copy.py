"""Shallow copies of modules: a forward pass can give them other attributes and layers, and the module keeps its own.

With a copy each, passes in several threads don't disturb one another, and a recomputation finds what its own pass had.
"""
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of the module's own fires when it is called."""
    return any(map(module.__dict__.__getitem__, _HOOKS))


class _ShallowCopy(nn.Module):
    """Mixed into the class of a shallow copy: what is assigned to it, the module gets too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        setattr(self.__dict__['copied_from'], name, value)


@cache
def _shallow_copy_class(module_class: Any) -> Any:
    if issubclass(module_class, _ShallowCopy):  # a copy of a copy
        return module_class
    return type(module_class.__name__, (_ShallowCopy, module_class), dict(__module__=module_class.__module__))


def shallow_copy(module: Any, *own: str) -> Any:
    """A module with the same attributes as `module`, of which it has the dicts `own`, such as '_modules', for itself.

    Change its `__dict__`, which leaves `module` alone. Its own hooks get `module`, not the copy; hooks of all modules
    get the copy.
    """
    module_class: Any = type(module)
    copy = object.__new__(_shallow_copy_class(module_class))
    attributes = copy.__dict__
    attributes.update(module.__dict__, copied_from=module)
    for name in own:
        attributes[name] = dict(attributes[name])
    for kind in _HOOKS:
        if attributes[kind]:
            attributes[kind] = OrderedDict((key, partial(_call_hook, hook, module))
                                           for key, hook in attributes[kind].items())
    return copy


def _call_hook(hook: Callable[..., Any], module: nn.Module, copy: nn.Module, *args: Any) -> Any:
    return hook(module, *args)
