"""The training of a network from its first epoch, or its last checkpoint, to the end."""
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

import timm_sd
from harness.cli import flag, positive_int, unit_interval
from harness.data.batches import Batches
from harness.data.mixing import Mix
from harness.data.splits import LoadedData, check_same_data
from harness.engine import SeeBatch, autocast, evaluate, train_epoch
from harness.errors import UserError
from harness.graphs import make_step
from harness.loss import Loss, make_loss
from harness.machine import hardware
from harness.pictures import save_samples
from harness.ranks import check_same, from_main_process
from harness.run_folder import RunFolder


@dataclass(frozen=True)
class TrainingSettings:
    """Training."""
    seed: int = flag(0, 'of weights, order, augmentation and gates', type=int)
    grad_accum_steps: int = flag(1, 'batches an update', type=positive_int)
    eval_interval: int | None = flag(None, 'validate within the epochs too', type=positive_int, metavar='UPDATES')
    log_gradients: bool = flag(False, "mean absolute gradient of the first block's first layer, by epoch, into "
                                      'summary.csv')
    cuda_graphs: bool = flag(False, 'record each block of sd_resnet*_cifar once as CUDA graphs, and replay the open '
                                    'ones (not yet run on a GPU; on a CPU a stand-in runs the same lines)')
    model_ema: bool = flag(False, 'keep a moving average (EMA) of the weights too; the better of the two on the '
                                  'validation images becomes model.safetensors')
    model_ema_decay: float = flag(0.9998, 'share of the average that an update keeps', type=unit_interval,
                                  needs='model_ema')
    model_ema_warmup: bool = flag(False, 'let the decay climb to that', needs='model_ema')
    log_interval: int = flag(20, 'steps between updates of the progress bar', type=positive_int)
    checkpoint_interval: int = flag(1, 'epochs between checkpoints: what a kill loses at most', type=positive_int,
                                    metavar='EPOCHS')
    checkpoint_hist: int = flag(2, 'checkpoints to keep', type=positive_int)


@dataclass
class Progress:
    """How far a training is; a part of each checkpoint.

    Attributes:
        epoch: Epochs that are done.
        best_epoch: The epoch, from 0, whose weights are kept.
        best_top1: Their accuracy on the validation images, in percent.
        best_epoch_ema: Likewise, of the average with --model-ema.
        best_top1_ema: Likewise.
        rows: Of summary.csv, one an epoch.
        hardware: What each epoch was trained on, and whether its steps were recorded.
    """
    epoch: int = 0
    best_epoch: int = 0
    best_top1: float = -1.
    best_epoch_ema: int = 0
    best_top1_ema: float = -1.
    rows: list[dict[str, float]] = field(default_factory=list)
    hardware: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Trainer:
    """Trains a network, keeps its best weights, and saves its state every --checkpoint-interval epochs.

    The main process reads and writes the run folder. The others are told what it read.

    Attributes:
        settings: See `TrainingSettings`.
        epochs: Of the whole training.
        model: The network, on its device.
        optimizer: Its optimiser.
        scheduler: timm's scheduler.
        batches: `train`, `val` and `test`.
        accelerator: Says who we are among the processes.
        amp: Train and validate in autocast.
        folder: Where everything goes.
        data: Of the batches; where its validation images don't select, the last weights are kept, not the best.
        watched: The parameter whose gradient is logged, if any.
        amp_dtype: Of autocast.
        loss: See `make_loss`.
        mix: What is done to each training batch on the device.
        clip: See `make_clip`.
        progress: How far it is.
    """
    settings: TrainingSettings
    epochs: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    batches: dict[str, Batches]
    accelerator: Accelerator
    amp: bool
    folder: RunFolder
    data: LoadedData
    watched: nn.Parameter | None = None
    amp_dtype: str = 'bfloat16'
    loss: Loss = field(default_factory=make_loss)
    mix: Mix | None = None
    clip: Callable[[nn.Module], None] | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.gates = timm_sd.depth_gates(self.model)
        # What is validated, by what ends the names of its columns and files: the network, and its average.
        self.networks: dict[str, Any] = {'': self.model}
        if self.settings.model_ema:
            self.ema = ModelEmaV3(self.model, self.settings.model_ema_decay,
                                  use_warmup=self.settings.model_ema_warmup)
            self.networks['_ema'] = self.ema.module
        # The best weights of each, where the folder lacks them yet.
        self.unsaved_best: dict[str, dict[str, torch.Tensor]] = {}
        # Both belong to the epoch that is being trained.
        self.gradients: list[torch.Tensor] = []  # mean absolute gradient of `watched`, one an update
        self.pause_seconds = 0.  # of validations and drawing within the epoch

    def train(self, resume: bool) -> None:
        """Trains the epochs that no checkpoint holds yet; with `resume` off, all of them."""
        model, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.step = make_step(
            model, optimizer, self.accelerator, self.amp, self.settings.cuda_graphs, self.amp_dtype, loss=self.loss,
            grad_accum_steps=self.settings.grad_accum_steps, clip=self.clip)
        if resume:
            self.restore()
        check_same(self.accelerator, dict(epoch=self.progress.epoch))
        # The schedule follows from the epoch alone.
        self.scheduler.step(self.progress.epoch)
        self.scheduler.step_update(self.progress.epoch * len(self.batches['train']))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.remove_after(self.progress.epoch)
        images = self.batches['train'].images
        with tqdm(total=self.epochs * images, initial=self.progress.epoch * images, unit=' images',
                  mininterval=1. if sys.stderr.isatty() else 60.,
                  disable=not self.accelerator.is_main_process) as bar:
            for epoch in range(self.progress.epoch, self.epochs):
                bar.set_description(f'epoch {epoch + 1}/{self.epochs}', refresh=False)
                row = self.run_epoch(epoch, bar)
                self.save(row)
                self.accelerator.log(row, step=epoch)
                if self.accelerator.is_main_process:
                    bar.write(f'epoch {epoch + 1:3d}: train_loss {row["train_loss"]:.4f}, '
                              + ''.join(f'{key} {value:.{2 if "top1" in key else 4}f}, ' for key, value in row.items()
                                        if key.startswith(('eval_loss', 'eval_top1')))
                              + f'lr {row["lr"]:.4g}, {images / row["train_seconds"]:.0f} images/s', file=sys.stderr)

    def restore(self) -> None:
        """Goes back to the last checkpoint, if there is one.

        Raises:
            UserError: If none of them can be gone back to, or an older version wrote it.
        """
        checkpoint = from_main_process(self.accelerator, lambda: self.folder.load_checkpoint(self.go_back))
        if checkpoint is not None and not self.accelerator.is_main_process:
            self.go_back(checkpoint)

    def go_back(self, checkpoint: dict[str, Any]) -> None:
        """Goes back to a checkpoint; it fails, half done, with one that is none of this training."""
        if 'raw_model' in checkpoint:  # its last batch norms and their momenta are in other numbers with scale 'eval'
            raise UserError(f'{self.folder.path} was begun by an older version of timm-sd, whose checkpoints mean '
                            'something else; finish it with that version, or choose another --experiment')
        # Both are missing where an older version began the run, and there were no states of batches.
        check_same_data(checkpoint.get('data', {}), self.data.record['data'])
        states, accelerator = checkpoint.get('batches', []), self.accelerator
        if any(states):
            if len(states) != accelerator.num_processes:
                raise UserError(f'{self.folder.path} reads a stream on {len(states)} processes, and goes on with as '
                                f'many, not on {accelerator.num_processes}')
            self.batches['train'].load_state_dict(states[accelerator.process_index])
        # An older version knew fewer keys.
        progress = Progress(**{key: checkpoint[key] for key in vars(self.progress) if key in checkpoint})
        if not len(progress.rows) == len(progress.hardware) == progress.epoch:
            raise ValueError(f'it has {len(progress.rows)} rows of {progress.epoch} epochs')
        if self.gates is not None:
            for row in progress.rows:  # an older version has no such column: its rate was always the same
                row.setdefault('drop_path_rate', self.gates.drop_path_rates[-1])
        self.model.load_state_dict(checkpoint['network'])
        if self.settings.model_ema:
            self.ema.module.load_state_dict(checkpoint['network_ema'])
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        self.step.scaler.load_state_dict(checkpoint.get('scaler', {}))
        self.progress = progress

    def run_epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """Trains and validates one epoch; returns its row of summary.csv."""
        batches, seed = self.batches['train'], self.settings.seed
        batches.set_epoch(epoch)
        # DropPath and dropout draw from torch's generator: each rank has its own masks, and a resumed run repeats them.
        torch.manual_seed(random.Random(f'{seed}/{epoch}/{self.accelerator.process_index}').getrandbits(63))
        if self.gates is not None:
            self.gates.set_epoch(epoch)
        self.gradients.clear()
        self.pause_seconds = 0.
        rates, start = [group['lr'] for group in self.optimizer.param_groups], time.perf_counter()
        draws = epoch == 0 and self.accelerator.is_main_process
        train_loss = train_epoch(
            self.step, batches, self.scheduler, epoch, bar, self.settings.log_interval, self.mix,
            before_update=self.before_update, after_update=self.update_ema if self.settings.model_ema else None,
            see_first_batch=self.draw_samples if draws else None)
        seconds = time.perf_counter() - start - self.pause_seconds
        if not math.isfinite(train_loss):
            raise UserError(f'the loss of epoch {epoch + 1} is {train_loss}; '
                            f'lower --lr {self.optimizer.defaults["lr"]}')
        val = self.validate()
        self.scheduler.step(epoch + 1)
        row = dict(epoch=epoch, train_loss=train_loss, **val, lr=sum(rates) / len(rates), train_seconds=seconds)
        if self.gates is not None:
            row['drop_path_rate'] = self.gates.drop_path_rates[-1]
        if self.gradients:
            gradients = torch.stack(self.gradients)
            row['grad_magnitude'] = gradients[gradients.isfinite()].mean().item()  # float16's scaler skips the others
        return row

    def draw_samples(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """Draws images (B, C, H, W) of labels (B,) or targets (B, classes): a wrong --mean is seen at once."""
        start = time.perf_counter()
        save_samples(x, target, self.data.class_names, self.folder.path / 'samples.png')
        self.pause_seconds += time.perf_counter() - start

    def before_update(self, update: int) -> None:
        """Logs the gradient, and validates every --eval-interval updates, which are numbered from 0 in each epoch."""
        if self.watched is not None and self.watched.grad is not None:
            self.gradients.append(self.watched.grad.abs().mean())
        if self.settings.eval_interval and update and update % self.settings.eval_interval == 0:
            start = time.perf_counter()
            self.validate()
            self.model.train()
            self.pause_seconds += time.perf_counter() - start

    def update_ema(self, update: int) -> None:
        """Takes the weights into their average, after an update of this epoch."""
        updates = -(-len(self.batches['train']) // self.settings.grad_accum_steps)
        self.ema.update(self.model, step=self.progress.epoch * updates + update + 1)

    def validate(self) -> dict[str, float]:
        """Evaluates on the validation images, and keeps the weights that are the best so far.

        Returns:
            Columns of summary.csv.
        """
        columns: dict[str, float] = {}
        for suffix, network in self.networks.items():
            val = evaluate(network, self.batches['val'], self.accelerator,
                           autocast(self.accelerator.device, self.amp, dtype=self.amp_dtype))
            columns.update({f'eval_{key}{suffix}': val[key] for key in ('loss', 'top1', 'top5')})
            if val['top1'] > self.best(suffix)[1] or not self.data.selects:
                vars(self.progress).update(
                    {f'best_epoch{suffix}': self.progress.epoch, f'best_top1{suffix}': val['top1']})
                if self.accelerator.is_main_process:
                    # A copy on the device: the way to the disk would hold up the epoch.
                    self.unsaved_best[suffix] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        return columns

    def best(self, suffix: str) -> tuple[int, float]:
        """Epoch and validation accuracy of the best weights of one of `networks`."""
        progress = vars(self.progress)
        return progress[f'best_epoch{suffix}'], progress[f'best_top1{suffix}']

    def save(self, row: dict[str, float]) -> None:
        """Ends an epoch: adds its row, saves a checkpoint if it is time for one, and writes summary.csv."""
        self.progress.rows.append(row)
        self.progress.hardware.append(dict(
            hardware(self.accelerator, self.amp, self.amp_dtype), cuda_graphs=self.settings.cuda_graphs))
        self.progress.epoch += 1
        if self.progress.epoch % self.settings.checkpoint_interval == 0 or self.progress.epoch == self.epochs:
            batches = gather_object([self.batches['train'].state_dict()])
            if self.accelerator.is_main_process:
                self.save_checkpoint(batches)
        if self.accelerator.is_main_process:
            self.folder.write_summary(self.progress.rows)

    def save_checkpoint(self, batches: list[dict[str, Any]]) -> None:
        """Saves the state, and before it the best weights, so that each checkpoint finds those that it names.

        Args:
            batches: State of the training batches of each process.
        """
        for suffix, weights in self.unsaved_best.items():
            self.folder.save_best(weights, self.best(suffix)[0], suffix)
        self.unsaved_best.clear()
        networks = {f'network{suffix}': network.state_dict() for suffix, network in self.networks.items()}
        state = dict(vars(self.progress), **networks, data=self.data.record['data'], batches=batches,
                     optimizer=self.optimizer.state_dict(), scaler=self.step.scaler.state_dict())
        self.folder.save_checkpoint(state, self.settings.checkpoint_hist)

    def load_best(self, suffix: str) -> dict[str, torch.Tensor]:
        """The best weights of one of `networks`, in each process."""
        return from_main_process(self.accelerator, lambda: self.folder.load_best(self.best(suffix)[0], suffix))

    def test(self, weights: dict[str, torch.Tensor], see_batch: SeeBatch | None = None) -> dict[str, float]:
        """Test loss and errors of these weights, in fp32, so that validate.py and timm's give the same anywhere.

        Args:
            weights: State dict of the network.
            see_batch: See `evaluate`.
        """
        self.model.load_state_dict(weights)
        metrics = evaluate(self.model, self.batches['test'], self.accelerator,
                           autocast(self.accelerator.device, False), see_batch)
        errors = {f'{key}_err': round(100 - metrics[key], 4) for key in ('top1', 'top5')}
        return dict(loss=metrics['loss'], **errors)
