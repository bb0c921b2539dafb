"""The README's examples for other trainers: stopped in the middle of an epoch and resumed equals undisturbed."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timm_sd
from support.markdown import snippets
from support.networks import pictures, toy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

README = Path(__file__).parent.parent.parent / 'README.md'
BATCHES, STEPS, STOP = 4, 8, 6  # stops in the middle of the second epoch


def example(library):
    """The callback of the snippet that imports `library`."""
    names = {}
    exec(*snippets(README.read_text(), of=library), names)
    return names['KeepGates']


class WithLoss(nn.Module):
    """Returns what transformers' Trainer wants."""

    def __init__(self):
        super().__init__()
        self.network = toy(2, drop_path_schedule='uniform')

    def forward(self, images, labels):
        logits = self.network(images)
        return dict(loss=F.cross_entropy(logits, labels), logits=logits)


def data():
    """Each batch is the same: Lightning goes on from an epoch's first batch, unless its loader has a state."""
    return pictures(4).repeat(BATCHES, 1, 1, 1), torch.arange(4).repeat(BATCHES)


def assert_equal(ours, theirs):
    assert timm_sd.depth_gates(ours).state_dict() == timm_sd.depth_gates(theirs).state_dict()
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_transformers_trainer_resumes(tmp_path):
    keep_gates = example('transformers')
    import transformers

    items = [dict(images=x, labels=y) for x, y in zip(*data(), strict=True)]

    def train(folder, steps, resume=False):
        model = WithLoss()
        args = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=STOP, learning_rate=0.01,
            lr_scheduler_type='constant', report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = transformers.Trainer(model, args, train_dataset=items, callbacks=[keep_gates()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / 'whole', STEPS)
    assert timm_sd.depth_gates(whole).step == STEPS
    train(tmp_path / 'resumed', STOP)
    assert_equal(train(tmp_path / 'resumed', STEPS, resume=True), whole)


def test_lightning_resumes(tmp_path):
    keep_gates = example('lightning')
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = WithLoss()

        def training_step(self, batch):
            return self.model(*batch)['loss']

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, 0.9)

    def train(steps, checkpoint=None):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=[keep_gates(module)], accelerator='cpu', logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 4)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f'{steps}.ckpt')
        return module

    whole = train(STEPS)
    assert timm_sd.depth_gates(whole).step == STEPS
    train(STOP)
    assert_equal(train(STEPS, tmp_path / f'{STOP}.ckpt'), whole)
