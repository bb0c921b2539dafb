"""A training step that is recorded as CUDA graphs, and replayed by the gates of each mini-batch.

A step of 110 layers is many small kernels, and a GPU seems to wait for Python to start them. So stem, each block, and
head with loss are recorded once, forward and backward: they are the segments. A step draws its gates on the host,
replays the segments of the open blocks forward and then in reverse order backward, and updates. A segment reads where
the one before it writes; behind closed blocks one copy moves the features on, and one the gradient.

Not torch.cuda.make_graphed_callables: each module that it records is a Python function of autograd, whose time on the
host is what is to be saved. `StandIn` runs the same functions again where there is no GPU. So all but `CudaRecorder` is
tested on a CPU, bit for bit against `TrainStep`. A batch of one image is equal up to rounding: its memory format is
ambiguous, and the two may choose other kernels. No GPU has run this yet.
"""
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import timm_sd
from harness.engine import TrainStep, autocast
from harness.errors import UserError
from harness.network import DepthSettings
from timm_sd.resnet_cifar_sd import ResNetCifar
from timm_sd.skippable import SkippableBlock

Function = Callable[[torch.Tensor], torch.Tensor]


class CudaRecorder:
    """Records functions as CUDA graphs in one memory pool, on one stream.

    They may share the pool. Within a step graphs are replayed in the order of their recording, some left out, so the
    memory of a dead tensor is written again only after the tensor's last reader. Between steps nothing passes but
    tensors that are kept alive.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: list[torch.cuda.CUDAGraph] = []  # none may die before the last replay (pytorch#193402)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs a function before a recording."""
        # On the stream of the recording: cuDNN's benchmarks, lazily loaded kernels and cuBLAS's workspace belong to it.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                function()
        torch.cuda.synchronize()

    def record(self, function: Callable[[], torch.Tensor | None]) -> tuple[torch.Tensor | None, Callable[[], None]]:
        """Returns the function's output, whose address stays and which has no values yet, and what to call to fill it.

        The function must read at addresses that stay.
        """
        self.graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(self.graphs[-1], pool=self.pool, stream=self.stream):
            output = function()
        return output, self.graphs[-1].replay


class StandIn:
    """Does the same without a GPU: a replay runs the function again, and copies its output to the recorded place."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], torch.Tensor | None]) -> tuple[torch.Tensor | None, Callable[[], None]]:
        first = function()
        output = None if first is None else torch.full_like(first, float('nan'))

        def replay() -> None:
            again = function()
            if output is not None and again is not None:
                assert output.stride() == again.stride()
                output.copy_(again)
        return output, replay


Recorder = CudaRecorder | StandIn


class Segment:
    """A part of the network, with a recording of its forward and one of its backward pass.

    Args:
        function: x -> y.
        source: Where x comes from: the output of the segment before, or the images.
        params: What it trains. Their gradients are added to their `.grad`.
        is_first: Whether nothing before it wants a gradient.
    """

    def __init__(self, function: Function, source: torch.Tensor, params: Sequence[nn.Parameter] = (),
                 is_first: bool = False) -> None:
        self.function, self.source, self.params = function, source, params
        self.x = source if is_first else source.detach().requires_grad_()
        self.inputs = params if is_first else [self.x, *params]

    def run(self) -> torch.Tensor:
        with torch.enable_grad():
            self.root = self.function(self.x)  # holds the autograd graph for `run_backward`
        return self.root.detach()

    def run_backward(self) -> torch.Tensor | None:
        # not .backward(): its nodes that add to .grad belong to the stream that made them
        grads = torch.autograd.grad(self.root, self.inputs, self.grad_source)
        if self.params:
            flat: Any = [param.grad for param in self.params]
            torch._foreach_add_(flat, grads[-len(self.params):])
        if self.x is self.source:
            return None
        # In the layout of x, in which the backward pass of the segment before was warmed up: the head's isn't.
        return grads[0] if grads[0].stride() == self.x.stride() else torch.empty_like(self.x).copy_(grads[0])

    def warm_up(self) -> None:
        self.grad_source: Any = torch.zeros_like(self.run())
        self.run_backward()
        del self.root

    def record(self, recorder: Recorder) -> Any:
        """Records the forward pass; returns y."""
        recorder.warm_up(self.warm_up)
        self.y, self.replay = recorder.record(self.run)
        return self.y

    def record_backward(self, recorder: Recorder, grad_source: Any) -> Any:
        """Records the backward pass of the gradient of y; returns the gradient of x."""
        self.grad_source = grad_source
        self.grad_x, self.replay_backward = recorder.record(self.run_backward)
        del self.root  # else nodes of autograd live on that belong to the stream of the recording
        return self.grad_x

    def forward(self, x: torch.Tensor) -> Any:
        """Runs the forward pass of x, and returns y."""
        if x is not self.source:  # blocks before it were closed
            self.x.copy_(x)
        self.replay()
        return self.y

    def backward(self, grad: torch.Tensor) -> Any:
        """Runs the backward pass of the gradient of y, and returns that of x."""
        if grad is not self.grad_source:
            self.grad_source.copy_(grad)
        self.replay_backward()
        return self.grad_x


class Recording:
    """The forward and backward pass of a network, for one shape of the images.

    Args:
        step: Whose network, loss and autocast it takes.
        x: Images of the shape, (B, C, H, W).
        target: Labels or targets of the shape, (B,) or (B, classes).
    """

    def __init__(self, step: 'RecordedStep', x: torch.Tensor, target: torch.Tensor) -> None:
        model: Any = step.model
        recorder, active = step.recorder, step.gates.active
        images, self.target = x.clone(), target.clone()
        self.per_image = torch.ones((), device=x.device)  # the gradient of the loss: 1 / images of the update

        def within(function: Function) -> Function:
            def run(x: torch.Tensor) -> torch.Tensor:
                with step.amp():  # entered in each segment: a recording must not begin inside of autocast
                    return function(x)
            return run

        def open_block(block: SkippableBlock, place: int) -> Function:
            return within(lambda x: block.run_open(x, *step.factors[:, place]) if active else block(x))

        stem_params = [*model.conv1.parameters(), *model.bn1.parameters()]
        self.stem = Segment(within(model.forward_stem), images, stem_params, is_first=True)
        y = self.stem.record(recorder)
        self.blocks: list[tuple[Segment, Segment | None]] = []  # open, and closed: None where x passes on as it is
        for place, block in enumerate((*model.layer1, *model.layer2, *model.layer3)):
            opened = Segment(open_block(block, place), y, list(block.parameters()))
            closed = Segment(within(block.run_shortcut), y) if active and block.run_shortcut(y) is not y else None
            y = opened.record(recorder)
            if closed is not None:
                closed.record(recorder)
            self.blocks.append((opened, closed))
        logits = within(model.forward_head)
        self.head = Segment(lambda x: step.loss(logits(x), self.target), y, list(model.fc.parameters()))
        self.head.record(recorder)
        grad = self.head.record_backward(recorder, self.per_image)
        for opened, closed in reversed(self.blocks):
            before = opened.record_backward(recorder, grad)
            if closed is not None:
                closed.record_backward(recorder, grad)
            grad = before
        self.stem.record_backward(recorder, grad)

    def replay(self, x: torch.Tensor, target: torch.Tensor, images: int, is_open: Sequence[bool]) -> torch.Tensor:
        """Runs both passes by the gates `is_open`; returns the loss, which lives until the next replay."""
        self.target.copy_(target)
        self.per_image.fill_(1. / images)
        chosen = [of_block[0] if gate else of_block[1] for of_block, gate in zip(self.blocks, is_open, strict=True)]
        path = [self.stem, *(segment for segment in chosen if segment is not None), self.head]
        y: Any = x
        for segment in path:
            y = segment.forward(y)
        grad: Any = self.per_image
        for segment in reversed(path):
            grad = segment.backward(grad)
        return y


@contextmanager
def _without_collection() -> Iterator[None]:
    """Within it Python collects no garbage: a CUDA graph of an earlier step, freed in a recording, would break it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class RecordedStep(TrainStep):
    """A `TrainStep` that replays recordings: the same numbers, in a fraction of the host's time.

    It makes a recording of each shape of the images at first sight, the last and partial batch's too. The network must
    stay on its device, and no parameter and no gradient may be replaced.
    """

    def __post_init__(self) -> None:
        gates, device = timm_sd.depth_gates(self.model), self.accelerator.device
        assert gates is not None
        self.gates, self.recorder = gates, CudaRecorder() if device.type == 'cuda' else StandIn()
        self.recordings: dict[Any, Recording] = {}
        # 1 / p_l and p_l ** 2 of each block, on the device: a rate may change without a new recording.
        self.rates: Sequence[float] = ()
        self.factors = torch.ones(2, len(gates.open), device=device)
        # All gradients lie in one tensor, which one kernel sets to zero; those of a closed block just stay so. They
        # begin at multiples of 512 bytes, as the allocator's tensors, for kernels that read several values at once.
        params = list(self.model.parameters())
        sizes = [-(-param.numel() // 128) * 128 for param in params]
        self.gradient = torch.zeros(sum(sizes), device=device)
        for param, part in zip(params, self.gradient.split(sizes), strict=True):
            param.grad = part.as_strided(param.shape, param.stride())
        self.first_param, self.first_grad = params[0], params[0].grad  # to notice, in no time, if they are replaced

    @torch.no_grad()
    def backward(self, x: torch.Tensor, target: torch.Tensor, images: int, is_update: bool) -> torch.Tensor:
        """As that of `TrainStep`. The loss lives until the next call.

        Raises:
            RuntimeError: If the network is in evaluation, or its gradients were replaced.
        """
        if not self.model.training:
            raise RuntimeError('the recorded step was recorded in training mode; call model.train()')
        if self.first_param.grad is not self.first_grad:
            raise RuntimeError('gradients were replaced that the recorded step adds to; clear them by update() alone')
        if self.rates is not self.gates.drop_path_rates:
            self.rates = self.gates.drop_path_rates
            survival = 1. - torch.tensor(self.rates, dtype=torch.float64)
            self.factors.copy_(torch.stack([1. / survival, survival ** 2]))
        key = x.shape, self.gates.active
        if key not in self.recordings:
            self.recordings[key] = self.record(x, target)
        recording = self.recordings[key]
        is_open = self.gates.draw() if self.gates.active else [True] * len(recording.blocks)
        return recording.replay(x, target, images, is_open)

    def record(self, x: torch.Tensor, target: torch.Tensor) -> Recording:
        """A recording, which leaves batch norm's statistics and the gradients as they are."""
        kept = [(tensor, tensor.clone()) for tensor in (*self.model.buffers(), self.gradient)]
        with _without_collection():
            recording = Recording(self, x, target)
        for tensor, before in kept:
            tensor.copy_(before)
        return recording

    def clear(self) -> None:
        self.gradient.zero_()  # not the optimiser's zero_grad, which would take the gradients away


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, amp: bool,
              cuda_graphs: bool, amp_dtype: str = 'bfloat16', **kwargs: Any) -> TrainStep:
    """A training step, eager or recorded; `amp` is autocast to `amp_dtype`, the rest are attributes of `TrainStep`."""
    # A weight that autocast keeps would be that of the recording.
    context = autocast(accelerator.device, amp, cache=not cuda_graphs, dtype=amp_dtype)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=amp and amp_dtype == 'float16')
    kind = RecordedStep if cuda_graphs else TrainStep
    return kind(model, optimizer, accelerator, context, scaler=scaler, **kwargs)


def check_recordable(model: nn.Module, depth: DepthSettings, in_memory: bool, accelerator: Accelerator,
                     amp_dtype: str | None = None) -> None:
    """Raises UserError unless `RecordedStep` computes what `TrainStep` does."""
    gates, device = timm_sd.depth_gates(model), accelerator.device.type
    refused = {
        f'{accelerator.num_processes} processes, only one': accelerator.num_processes > 1,
        f'a step on {device!r}, only on cuda (or, to try it, on a CPU)': device not in ('cuda', 'cpu'),
        f'{type(model).__name__}, only the networks sd_resnet*_cifar': not isinstance(model, ResNetCifar),
        f'--drop-path-mode {gates and gates.mode}, only batch': gates is not None and gates.mode != 'batch',
        '--grad-checkpointing': depth.grad_checkpointing,
        '--compile model, only --compile blocks': depth.compile == 'model',
        f'--torchcompile-mode {depth.torchcompile_mode}': depth.torchcompile_mode not in (None, 'default'),
        '--no-in-memory': not in_memory,
        '--amp-dtype float16': amp_dtype == 'float16',  # whose scaler replaces the gradient of the loss by its own
        'dropout (drop_rate)': bool(getattr(model, 'drop_rate', 0.)),
        'frozen parameters': not all(param.requires_grad for param in model.parameters()),
        'SyncBatchNorm': any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()),
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise UserError(f'--cuda-graphs can not record {what}; change that, or go on without')
