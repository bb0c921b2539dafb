"""The same training twice: by the eager step, and by the recorded one, on the CPU with its stand-in."""
import copy
import io

import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2

import timm_sd
from harness.engine import TrainStep, autocast
from harness.graphs import RecordedStep
from harness.loss import LossSettings, make_loss
from support.networks import lively

STEPS_PER_EPOCH, EPOCHS = 10, 2
SIZES = [8] * 9 + [5]  # of the batches of an epoch


class Twins:
    """Two networks with the same weights and gates, and the two kinds of step.

    Args:
        rate: 1 - p_L; 0 is constant depth.
        bf16: Autocast.
        channels_last: Memory format.
        accumulate: Batches an update.
        compiled: Compile the branches.
        **kwargs: Of the network.
    """

    def __init__(self, rate=0.6, bf16=False, channels_last=True, accumulate=1, compiled=False, **kwargs):
        torch.manual_seed(0)
        kwargs = {f'drop_path_{name}': value for name, value in kwargs.items()}
        network = lively(timm.create_model('sd_resnet20_cifar', drop_path_rate=rate, **kwargs))
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        if compiled:
            timm_sd.compile_blocks(network)
        self.network, self.bf16, self.accumulate, self.channels_last = network, bf16, accumulate, channels_last
        self.eager, self.recorded = (self.make_step(kind, copy.deepcopy(network)) for kind in (TrainStep, RecordedStep))
        self.draws = []

    @property
    def steps(self):
        return self.eager, self.recorded

    def make_step(self, kind, network):
        optimizer = create_optimizer_v2(network, opt='sgd', lr=0.05, momentum=0.9, weight_decay=1e-3,
                                        filter_bias_and_bn=False, fused=True)
        amp = autocast(torch.device('cpu'), self.bf16, cache=kind is TrainStep)
        return kind(network.train(), optimizer, Accelerator(cpu=True), amp, make_loss(LossSettings(0.1)),
                    self.accumulate)

    def batch(self, number):
        generator = torch.Generator().manual_seed(number)
        size = SIZES[number % STEPS_PER_EPOCH]
        x = torch.randn(size, 3, 16, 16, generator=generator)
        return (x.to(memory_format=torch.channels_last) if self.channels_last else x,
                torch.randint(10, (size,), generator=generator))

    def images_of_update(self, place):
        first = place - place % self.accumulate
        return sum(SIZES[first:first + self.accumulate])

    def run(self, number):
        """Step `number` of both; they must have the same gates, loss and gradient."""
        place = number % STEPS_PER_EPOCH
        x, target = self.batch(number)
        is_update = (place + 1) % self.accumulate == 0 or place + 1 == STEPS_PER_EPOCH
        losses, gradients = [], []
        for step in self.steps:
            gates = timm_sd.depth_gates(step.model)
            if place == 0:
                gates.set_epoch(number // STEPS_PER_EPOCH)
            losses.append(step.backward(x, target, self.images_of_update(place), is_update).item())
            if is_update:
                gradients.append(step.model.layer1[0].conv1.weight.grad.abs().mean().item())
                step.update()
        ours, theirs = (timm_sd.depth_gates(step.model) for step in self.steps)
        assert ours.open == theirs.open
        assert ours.step == theirs.step
        self.draws.append(list(ours.open))
        assert losses[0] == losses[1]
        assert len(set(gradients)) <= 1

    def check(self):
        """Parameters, momenta and buffers are equal bit for bit, and so are the networks in evaluation."""
        (ours, of_ours), (theirs, of_theirs) = ((step.model, step.optimizer) for step in self.steps)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
        for name, (one, other) in enumerate(zip(of_ours.state.values(), of_theirs.state.values(), strict=True)):
            assert torch.equal(one['momentum_buffer'], other['momentum_buffer']), name
        x, _ = self.batch(0)
        with torch.no_grad():
            assert torch.equal(ours.eval()(x), theirs.eval()(x))
        ours.train()
        theirs.train()

    def resumed(self, kind, step):
        """A step of another kind that goes on where `step` is, as from a checkpoint."""
        buffer = io.BytesIO()
        torch.save(dict(network=step.model.state_dict(), optimizer=step.optimizer.state_dict()), buffer)
        buffer.seek(0)
        state, network = torch.load(buffer, weights_only=True), copy.deepcopy(self.network)
        network.load_state_dict(state['network'])
        other = self.make_step(kind, network)
        other.optimizer.load_state_dict(state['optimizer'])
        timm_sd.depth_gates(network).load_state_dict(timm_sd.depth_gates(step.model).state_dict())
        return other

    def train(self, before=None):
        """Two epochs.

        Args:
            before: Functions to call before a step, by its number.
        """
        for number in range(EPOCHS * STEPS_PER_EPOCH):
            if before and number in before:
                before[number]()
            self.run(number)
        self.check()
