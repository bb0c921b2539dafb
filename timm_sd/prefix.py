"""What `python -m timm_sd` changes in timm before a script runs: the networks that it creates, their seed and epoch.

Scripts import `create_model` by several names. All of them look up a network's entry point in timm.models._factory, so
that lookup is replaced. `timm.utils.random_seed` is told the seed, and timm's scheduler the epoch and their number.
"""
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import timm
import timm.models._factory
import timm.scheduler
import timm.scheduler.scheduler_factory
import timm.utils
import torch
from timm.layers import is_scriptable
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .compute import computed_share
from .convert import add_stochastic_depth
from .gates import DepthGates
from .skippable import SkippableBlock
from .stochastic_depth import depth_gates


def say(line: str) -> None:
    """A line to stderr, by one process."""
    if os.environ.get('RANK', '0') == '0':
        print(f'timm_sd: {line}', file=sys.stderr, flush=True)


def stop(line: str) -> NoReturn:
    """A line to stderr, and exit status 2."""
    print(f'timm_sd: error: {line}', file=sys.stderr, flush=True)
    sys.exit(2)


class Prefix:
    """Lets the networks of a script skip what they drop.

    Args:
        mode: 'batch' or 'subset'.
        schedule: 'linear' or 'uniform'.
        scale: 'train' or 'eval'.
        over_time: `when`, `change` and `cutoff` of `DepthGates.set_drop_path_when`, as far as they are given. Without
            any of all these timm's networks stay timm's.
    """

    def __init__(self, mode: str | None = None, schedule: str | None = None, scale: str | None = None,
                 **over_time: Any) -> None:
        def given(flags: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in flags.items() if value is not None}

        self.flags, self.over_time = given(dict(mode=mode, schedule=schedule, scale=scale)), given(over_time)
        self.is_on = bool(self.flags or self.over_time)
        self.seed = 0
        self.updates_per_epoch = 0
        self.gates: list[DepthGates] = []

    def install(self) -> None:
        """Changes timm, for the rest of the process."""
        factory: Any = timm.models._factory
        factory.model_entrypoint = self._entrypoint(factory.model_entrypoint)
        utils: Any = timm.utils, timm.utils.random
        for module in utils:
            module.random_seed = self._random_seed(module.random_seed)
        schedulers: Any = timm.scheduler, timm.scheduler.scheduler_factory
        for module in schedulers:
            module.create_scheduler_v2 = self._create_scheduler(module.create_scheduler_v2)
        classes: Any = Scheduler, *Scheduler.__subclasses__()  # that of plateaus has its own `step`
        for scheduler in classes:
            if 'step' in vars(scheduler):
                scheduler.step = self._step(scheduler.step)
            if 'step_update' in vars(scheduler):
                scheduler.step_update = self._step_update(scheduler.step_update)

    # --- networks

    def _entrypoint(self, model_entrypoint: Callable[[str], Any]) -> Callable[[str], Any]:
        @functools.wraps(model_entrypoint)
        def wrapped(name: str, *args: Any) -> Any:
            return functools.partial(self._create, name, model_entrypoint(name, *args))
        return wrapped

    def _create(self, name: str, create: Any, drop_path_rate: float | None = None, **kwargs: Any) -> nn.Module:
        rate = {} if drop_path_rate is None else dict(drop_path_rate=drop_path_rate)
        if self.is_on and drop_path_rate and is_scriptable():
            stop(f'{name}: TorchScript would train the plain network; leave out --torchscript')
        if name.startswith('sd_'):
            flags = {f'drop_path_{flag}': value for flag, value in self.flags.items()}
            model = create(**{'drop_path_seed': self.seed, **rate, **kwargs, **flags})
        elif self.is_on and drop_path_rate:
            model = self._add(name, create(**kwargs), drop_path_rate)
        else:
            if self.is_on:
                say(f'{name} is created without a drop path rate, and left as it is')
            elif drop_path_rate:
                say(f"{name} gets timm's DropPath, which computes what it drops; python -m timm_sd --drop-path-mode "
                    'batch SCRIPT skips it')
            return create(**rate, **kwargs)
        gates: Any = depth_gates(model)
        self._check_seed(gates.seed)
        self.gates.append(gates)
        if self.over_time and gates.mode == 'sample':  # whose passes aren't counted, see `_set_epoch`
            stop(f"{name} has mode 'sample', whose rates --drop-path-when can't change here; give --drop-path-mode")
        if self.over_time and gates.active:  # until a scheduler tells the epochs, a training step is an error
            self._set_when(gates, epochs=max(0, self.over_time.get('cutoff', 0)) + 1)
        if gates.active and gates.mode != 'sample':
            say(f'{name}: {describe(model, gates)}')
        return model

    def _add(self, name: str, model: nn.Module, drop_path_rate: float) -> nn.Module:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                add_stochastic_depth(model, drop_path_rate, seed=self.seed, **self.flags)
        except (ValueError, TypeError) as error:
            stop(f'{name}: {error}')
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                say(f'{name}: {warning.message}')
        return model

    def _check_seed(self, seed: int) -> None:
        """Stops if another process gives its network another seed: gates must be the same on all."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            store = distributed.distributed_c10d._get_default_store()
            first = store.compare_set(f'timm_sd/seed/{len(self.gates)}', '', str(seed)).decode()
            if first != str(seed):
                stop(f'seed {seed} in one process and {first} in another, but gates are the same in all; call '
                     'timm.utils.random_seed(seed, rank)')

    # --- seed and epoch

    def _set_when(self, gates: DepthGates, epochs: int) -> None:
        try:
            gates.set_drop_path_when(**{'when': 'standard', **self.over_time}, epochs=epochs)
        except ValueError as error:
            stop(str(error))

    def _follow(self, scheduler: Any, epochs: int) -> None:
        """Lets the rates of all networks change over a training of so many epochs."""
        if scheduler is None:
            stop('the rates of --drop-path-when follow the epochs of a scheduler, and the script has none; give '
                 'another --sched')
        scheduled = [gates for gates in self.gates if gates.active]
        if not scheduled:
            stop('--drop-path-when: no network has a drop path rate above 0; give --drop-path')
        for gates in scheduled:
            self._set_when(gates, epochs)
            gates.set_epoch(0)  # timm tells the first epoch of a resumed training alone
        if scheduled[0].over_time is not None:
            say(f'drop path rates over {epochs} epochs: {scheduled[0].over_time.describe()}')

    def _random_seed(self, random_seed: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(random_seed)
        def wrapped(seed: int = 42, rank: int = 0) -> None:
            self.seed = seed  # not seed + rank: gates are the same on every rank
            random_seed(seed, rank)
        return wrapped

    def _set_epoch(self, epoch: int) -> None:
        for gates in self.gates:
            # DeiT's loop tells the epoch that has just ended: to begin it again would repeat its gates.
            if gates.epoch != epoch or not gates.step:
                gates.set_epoch(epoch)
            elif gates.over_time is not None:
                stop(f"the script tells timm's scheduler epoch {epoch} when it has ended, and the rates of "
                     '--drop-path-when would lag behind; let it tell the next one')

    def _create_scheduler(self, create_scheduler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create_scheduler)
        def wrapped(*args: Any, updates_per_epoch: int = 0, **kwargs: Any) -> Any:
            self.updates_per_epoch = updates_per_epoch
            scheduler, epochs = create_scheduler(*args, updates_per_epoch=updates_per_epoch, **kwargs)
            if self.over_time:
                self._follow(scheduler, epochs)
            return scheduler, epochs
        return wrapped

    def _step(self, step: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(step)
        def wrapped(scheduler: Scheduler, epoch: int, *args: Any, **kwargs: Any) -> None:
            self._set_epoch(epoch)
            step(scheduler, epoch, *args, **kwargs)
        return wrapped

    def _step_update(self, step_update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(step_update)
        def wrapped(scheduler: Scheduler, num_updates: int, *args: Any, **kwargs: Any) -> None:
            # With --sched-on-updates timm begins a resumed run with this call alone.
            if self.updates_per_epoch and not any(gates.step for gates in self.gates):
                self._set_epoch(num_updates // self.updates_per_epoch)
            step_update(scheduler, num_updates, *args, **kwargs)
        return wrapped


def describe(model: nn.Module, gates: DepthGates) -> str:
    """Which blocks of a network with stochastic depth have gates, and what a training step runs, in one line."""
    names = [name for name, block in model.named_modules() if isinstance(block, SkippableBlock)]
    line = (f'{len(names)} residual blocks have gates, {names[0]} to {names[-1]}: mode {gates.mode}, scale '
            f'{gates.scale}, {gates.schedule} to a rate of {gates.drop_path_rates[-1]:g}, seed {gates.seed}')
    try:
        return f'{line}; a training step runs {computed_share(model, gates):.0%} of the multiplications'
    except Exception:  # torch's counter doesn't know every network, and nothing depends on it
        return line
