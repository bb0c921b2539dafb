"""Steps, epochs and evaluation on one process against loops written out; the share of a rank too."""
import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from harness import engine
from harness.data.in_memory import ImageSet, MemoryBatches
from harness.engine import TrainStep, autocast, convolution_seconds, default_amp, evaluate, train_epoch
from harness.graphs import RecordedStep
from harness.loss import LossSettings, make_loss
from harness.pictures import Mistakes
from support.data import image_set
from support.updates import check_updates

CPU = torch.device('cpu')


@pytest.mark.parametrize('grad_accum_steps', [1, 2, 3])
def test_an_epoch_is_that_of_a_plain_loop(grad_accum_steps):
    check_updates(Accelerator(cpu=True), grad_accum_steps)


@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_ranks_together_make_the_gradient_of_the_mean_over_all_images(smoothing):
    """DDP averages the gradients of two ranks; here by hand, of an update of two batches whose shares differ."""
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    batches = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), (torch.randn(3, 4), torch.tensor([2, 2, 0]))]
    gradients, loss_sum = [], 0.
    for rank in range(2):
        synced = []
        ours = copy.deepcopy(network)
        accelerator = SimpleNamespace(num_processes=2, backward=torch.Tensor.backward,
                                      no_sync=lambda model, synced=synced: synced.append('no') or nullcontext())
        step = TrainStep(ours, torch.optim.SGD(ours.parameters(), 0.1), accelerator, autocast(CPU, False),
                         make_loss(LossSettings(smoothing)))
        for number, (x, target) in enumerate(batches):
            loss_sum += step.backward(x[rank::2], target[rank::2], images=9, is_update=number == 1).item()
        assert synced == ['no']  # in the first batch alone
        gradients.append([param.grad for param in ours.parameters()])
    losses = []
    for x, target in batches:
        for image, label in zip(x, target.tolist(), strict=True):
            logs = network(image).log_softmax(0)
            # smoothed labels: 1 - s on the label, s spread over all three classes
            losses.append(-sum((smoothing / 3 + (1 - smoothing) * (label == k)) * logs[k] for k in range(3)))
    mean = torch.stack(losses).mean()
    for ours, expected in zip(zip(*gradients, strict=True), torch.autograd.grad(mean, network.parameters()),
                              strict=True):
        torch.testing.assert_close(sum(ours) / 2, expected)
    assert loss_sum == pytest.approx(9 * mean.item(), rel=1e-5)


def test_an_update_moves_the_parameters_and_clears_the_gradient():
    network = nn.Linear(1, 1, bias=False)
    before = network.weight.item()
    network.weight.grad = torch.full((1, 1), 2.)
    optimizer = torch.optim.SGD(network.parameters(), 0.25)
    TrainStep(network, optimizer, Accelerator(cpu=True), autocast(CPU, False)).update()
    assert network.weight.item() == pytest.approx(before - 0.5)
    assert network.weight.grad is None


def test_evaluation_counts_as_a_loop_over_the_images_and_changes_nothing():
    """23 images in batches of 5, the last one of 3, seven classes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(7)).train()
    data = ImageSet(torch.randint(256, (23, 3, 6, 6), dtype=torch.uint8), torch.randint(7, (23,)), list('abcdefg'))
    network(torch.randn(16, 3, 6, 6))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = evaluate(network, MemoryBatches(data, 5, (0.5,) * 3, (0.25,) * 3), Accelerator(cpu=True),
                     autocast(CPU, False))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.training
    loss, top1, top5 = 0., 0, 0
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        logits = network(((image / 255 - 0.5) / 0.25)[None])[0].tolist()
        loss += math.log(sum(map(math.exp, logits))) - logits[label]
        better = sum(logit > logits[label] for logit in logits)
        top1, top5 = top1 + (better < 1), top5 + (better < 5)
    assert found == pytest.approx(
        dict(loss=loss / 23, top1=100 * top1 / 23, top5=100 * top5 / 23, images=23), rel=1e-5)
    assert 0 < found['top1'] < found['top5'] < 100


def test_evaluation_counts_the_images_itself():
    """Of a stream nobody knows how many will come."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    batches = MemoryBatches(image_set(7), 4, (0.5,) * 3, (0.25,) * 3)
    known = evaluate(network, batches, Accelerator(cpu=True), autocast(CPU, False))
    batches.images = None
    assert evaluate(network, batches, Accelerator(cpu=True), autocast(CPU, False)) == known
    assert type(known['images']) is int


class OnMeta(Accelerator):
    """On the device meta, which stands for a GPU: it has no values, so whatever would wait for one is an error."""
    device = torch.device('meta')


class CopiesToMeta(TorchDispatchMode):
    """Counts the tensors that go from the CPU to the device meta."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ('_to_copy', 'copy_'):
            self.count += any(tensor.is_cpu for tensor in args if isinstance(tensor, torch.Tensor)) and result.is_meta
        return result


@pytest.fixture
def waits(monkeypatch):
    """The values that were asked for by item() or tolist(), each of which waits for the device; all are 1."""
    asked = []
    monkeypatch.setattr(torch.Tensor, 'item', lambda tensor: asked.append(tensor) or 1.)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda tensor: asked.append(tensor) or [1.] * len(tensor))
    return asked


@pytest.mark.parametrize(('log_interval', 'logs'), [(1, 5), (2, 2), (20, 0)])
@pytest.mark.parametrize(('kind', 'copied'), [(TrainStep, 2), (RecordedStep, 3)])
def test_an_epoch_waits_for_the_device_when_it_logs_and_at_its_end(waits, kind, copied, log_interval, logs):
    """Five steps. To the device go order, draws and, for the recorded step, the rates, before the first of them."""
    accelerator, seen = OnMeta(cpu=True), []
    network = timm.create_model('sd_resnet20_cifar', drop_path_rate=0.5).to('meta')
    model, optimizer = accelerator.prepare(network, create_optimizer_v2(network, 'sgd', lr=0.1))
    batches = MemoryBatches(image_set(19).to('meta'), 4, (0.5,) * 3, (0.25,) * 3, train=True, crop_padding=2, hflip=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', 1, updates_per_epoch=len(batches))
    with CopiesToMeta() as copies:
        train_epoch(kind(model, optimizer, accelerator, autocast(CPU, False)), batches, scheduler, 0,
                    tqdm(disable=True), log_interval, before_update=lambda update: seen.append(copies.count))
    assert len(waits) == logs + 1
    assert seen == [copied] * 5


def test_evaluation_waits_for_the_device_once(waits):
    network = timm.create_model('sd_resnet20_cifar').to('meta')
    batches = MemoryBatches(image_set(19).to('meta'), 4, (0.5,) * 3, (0.25,) * 3)
    for see_batch in (None, Mistakes(10, batches).add):
        evaluate(network, batches, OnMeta(cpu=True), autocast(CPU, False), see_batch)
        assert len(waits) == 1
        waits.clear()


@pytest.mark.parametrize('is_faster', [False, True])
def test_bf16_is_the_default_where_it_is_faster(monkeypatch, is_faster):
    monkeypatch.setattr(engine, 'convolution_seconds', lambda amp: 1. if amp == is_faster else 2.)
    choose = default_amp.__wrapped__  # this process keeps its own choice
    assert choose('cpu') is is_faster
    assert choose('cuda') is True


def test_the_convolution_that_is_timed_runs_in_the_precision_asked_for(monkeypatch):
    ran = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, 'conv2d', lambda *args: ran.append(convolve(*args)) or ran[-1])
    assert min(convolution_seconds(amp=True), convolution_seconds(amp=False)) > 0
    assert [output.dtype for output in ran] == [torch.bfloat16] * 10 + [torch.float32] * 10
