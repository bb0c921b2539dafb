"""timm's flags of today's recipes: what each does, that a resume repeats it, and that none does nothing in silence."""
import math
import shutil

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from harness import engine, training
from harness.loss import LossSettings, make_loss
from harness.network import DepthSettings, NetworkSettings, build_network
from harness.optimizer import OptimizerSettings, build_optimizer, make_clip
from harness.recipes import changed_by_run, changed_from_recipe, parse_train_flags, read_recipe
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_csv, read_results, refused, run_here, weights

# All of them at once, as far as they go together.
MIXED = ['--mixup', '0.8', '--cutmix', '1', '--mixup-prob', '0.8', '--mixup-switch-prob', '0.4', '--mixup-off-epoch',
         '3', '--reprob', '0.5', '--remode', 'rand', '--recount', '2', '--vflip', '0.3', '--smoothing', '0.1']
MOVED = ['--opt', 'adamw', '--opt-eps', '1e-6', '--opt-betas', '0.8', '0.95', '--opt-kwargs', 'amsgrad=True', '--lr',
         '0.01', '--layer-decay', '0.8', '--clip-grad', '0.5', '--clip-mode', 'agc', '--sched', 'cosine',
         '--warmup-epochs', '1', '--warmup-prefix', '--cooldown-epochs', '1']
EMA = ['--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup']
ALL = [*MIXED, *MOVED, *EMA, '--bce-loss', '--bce-target-thresh', '0.2', '--drop', '0.1']


def train(flags, output, *args):
    result = run_here('train.py', *flags, '--output', output, '--experiment', 'a', *args)
    assert result.returncode == 0, result.stderr
    return output / 'a'


def cut_off(folder):
    """Makes it a run that was killed behind its last checkpoint but one."""
    (folder / 'results.json').unlink()
    *_, last = sorted((folder / 'checkpoints').glob('checkpoint-*.pt'))
    last.unlink()


@pytest.mark.parametrize('path', [[], ['--no-in-memory', '-j', '0', '--ratio', '0.8', '1.2', '--train-interpolation',
                                       'random', '--aa', 'rand-m9-mstd0.5-inc1-mmax9'],
                                  ['--amp', '--amp-dtype', 'float16', '--grad-accum-steps', '2']])
def test_a_resume_repeats_all_of_them_bit_for_bit(toy_flags, tmp_path, path):
    whole = train([*toy_flags, '--no-amp', *ALL, *path], tmp_path / 'whole')
    assert [row['epoch'] for row in read_csv(whole / 'summary.csv')] == ['0', '1', '2', '3', '4']  # 1 + 3 + 1
    assert read_results(whole)['epochs'] == 5
    (tmp_path / 'resumed').mkdir()
    copy = shutil.copytree(whole, tmp_path / 'resumed' / 'a')
    cut_off(copy)
    train([*toy_flags, '--no-amp', *ALL, *path], tmp_path / 'resumed', '--resume', 'auto')
    assert_same_run(copy, whole)
    names = {'model_ema.safetensors', 'model_without_ema.safetensors'}
    (name,) = [path.name for path in whole.iterdir() if path.name in names]
    ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (copy, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize('flags', [MIXED, MOVED, EMA, ['--bce-loss', '--smoothing', '0.1'],
                                   ['--clip-grad', '0.1'], ['--clip-grad', '0.01', '--clip-mode', 'value']])
def test_cuda_graphs_compute_the_same(toy_flags, tmp_path, flags):
    plain = train([*toy_flags, *flags], tmp_path / 'plain')
    recorded = train([*toy_flags, *flags], tmp_path / 'recorded', '--cuda-graphs')
    assert_same_run(plain, recorded)


# --- the average of the weights


@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_average_is_that_of_a_loop_over_the_updates(toy_flags, tmp_path, monkeypatch, accumulate):
    seen = []
    update = engine.TrainStep.update

    def noted(step):
        update(step)
        seen.append({name: tensor.clone() for name, tensor in step.model.state_dict().items()})

    monkeypatch.setattr(engine.TrainStep, 'update', noted)
    folder = train(toy_flags, tmp_path, *EMA, '--grad-accum-steps', accumulate)
    average = {name: tensor.double() for name, tensor in seen[0].items()}
    for number, state in enumerate(seen[1:], start=2):
        decay = min(1 - (1 + number - 1) ** (-2 / 3), 0.9)  # timm's: the first update is taken as it is
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in state.items()}
    found = RunFolder(folder).load_checkpoint()['network_ema']
    assert len(seen) == {1: 15, 2: 9}[accumulate]
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), average[name], atol=1e-6), name


@pytest.mark.parametrize('ema_is_better', [True, False])
def test_the_better_on_the_validation_images_is_published(toy_flags, tmp_path, monkeypatch, ema_is_better):
    evaluate = training.evaluate

    def judged(model, batches, *args):
        found = evaluate(model, batches, *args)
        is_average = model not in trained
        return dict(found, top1=90. if is_average == ema_is_better else 10.) if len(batches.data) == 12 else found

    trained = []
    prepare = training.make_step
    monkeypatch.setattr(training, 'make_step', lambda model, *args, **kwargs: trained.append(model) or prepare(
        model, *args, **kwargs))
    monkeypatch.setattr(training, 'evaluate', judged)
    folder = train(toy_flags, tmp_path, *EMA)
    results, state = read_results(folder), RunFolder(folder).load_checkpoint()
    average, plain = RunFolder(folder).load_best(0, '_ema'), RunFolder(folder).load_best(0)
    best, other = (average, plain) if ema_is_better else (plain, average)
    beside = 'model_without_ema' if ema_is_better else 'model_ema'
    assert results['averaged'] is ema_is_better
    assert (results['val_top1_err'], results['other_weights']['val_top1_err']) == (10, 90)
    for file, expected in (('model', best), (beside, other)):
        found = safetensors.torch.load_file(folder / f'{file}.safetensors')
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(average['fc.weight'], plain['fc.weight'])
    assert state['best_epoch_ema'] == state['best_epoch'] == 0
    assert results['test_best'] != results['other_weights']['test_best']
    card = run_here('publish.py', folder, '--repo', 'our/sd', '--dry-run')
    assert card.returncode == 0, card.stderr
    text = (folder / 'hub' / 'README.md').read_text()
    words = 'the average' if ema_is_better else 'the weights themselves'
    assert f'the better of the two on the validation images, {words}.' in text
    assert text.count('not published') == 1
    assert (folder / 'hub' / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()


def test_where_nothing_may_be_selected_the_average_counts(toy_flags, tmp_path):
    folder = train(toy_flags, tmp_path, *EMA, '--val-split', 'test')
    results = read_results(folder)
    assert results['averaged'] is True
    assert (results['best_epoch'], results['other_weights']['best_epoch']) == (2, 2)
    assert results['test_best'] == results['test_last']


# --- loss, optimiser, schedule


def test_gradients_are_logged_as_they_are_whatever_scales_the_loss(toy_flags, tmp_path):
    logged = []
    for dtype in ('bfloat16', 'float16'):
        flags = [flag for flag in toy_flags if flag != '--no-amp']
        folder = train(flags, tmp_path / dtype, '--amp', '--amp-dtype', dtype, '--log-gradients', '--epochs', '1')
        logged.append(float(read_csv(folder / 'summary.csv')[0]['grad_magnitude']))
    assert logged[0] == pytest.approx(logged[1], rel=0.2)


def test_an_optimiser_within_another_is_known():
    optimizer, _, _ = build_optimizer(OptimizerSettings(opt='lookahead_adamw', opt_eps=1e-7), nn.Linear(1, 1), 5)
    assert optimizer.param_groups[0]['eps'] == 1e-7


def test_bce_is_the_mean_over_the_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    soft = torch.rand(6, 3)
    smooth = F.one_hot(labels, 3) * 0.9 + 0.1 / 3

    def naive(targets):
        chances = logits.sigmoid()
        return -(targets * chances.log() + (1 - targets) * (1 - chances).log()).mean(1).sum()

    assert torch.allclose(make_loss(LossSettings(0.1, bce_loss=True))(logits, labels), naive(smooth))
    assert torch.allclose(make_loss(LossSettings(0.1, bce_loss=True))(logits, soft), naive(soft))
    hard = make_loss(LossSettings(0.1, bce_loss=True, bce_target_thresh=0.4))
    assert torch.allclose(hard(logits, soft), naive((soft > 0.4).float()))
    crossed = -(soft * logits.log_softmax(1)).sum()
    assert torch.allclose(make_loss(LossSettings(0.1))(logits, soft), crossed)  # Mixup has smoothed it


def test_clipping():
    def clipped(**settings):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        network(torch.randn(7, 4)).square().sum().backward()
        before = [param.grad.clone() for param in network.parameters()]
        make_clip(OptimizerSettings(**settings))(network)
        return network, before, [param.grad for param in network.parameters()]

    assert make_clip(OptimizerSettings()) is None
    _, before, after = clipped(clip_grad=0.5)
    norm = math.sqrt(sum(grad.square().sum().item() for grad in before))
    assert all(torch.allclose(ours, grad * 0.5 / norm, rtol=1e-4) for ours, grad in zip(after, before, strict=True))
    _, before, after = clipped(clip_grad=0.5, clip_mode='value')
    assert all(torch.equal(ours, grad.clamp(-0.5, 0.5)) for ours, grad in zip(after, before, strict=True))
    network, before, after = clipped(clip_grad=0.01, clip_mode='agc')
    assert all(map(torch.equal, before[2:], after[2:]))  # the classifier
    for row, (ours, grad) in enumerate(zip(after[0], before[0], strict=True)):
        limit = 0.01 * max(network[0].weight[row].norm().item(), 1e-3)
        assert torch.allclose(ours, grad * min(1, limit / grad.norm().item()), rtol=1e-4)


def test_layer_decay_gives_each_layer_its_learning_rate():
    model = timm.create_model('sd_resnet20_cifar')
    settings = OptimizerSettings(lr=0.1, layer_decay=0.5, sched='cosine', epochs=10)
    optimizer, scheduler, _ = build_optimizer(settings, model, 5)
    scheduler.step(0)
    names = {id(param): name for name, param in model.named_parameters()}
    rates = {names[id(param)]: group['lr'] for group in optimizer.param_groups for param in group['params']}
    assert len(rates) == len(names)
    assert rates['fc.weight'] == 0.1
    order = [rates['conv1.weight'], rates['layer1.0.conv1.weight'], rates['layer3.2.conv1.weight'], rates['fc.weight']]
    assert order == sorted(order)
    assert order[0] < order[1] < order[2]


@pytest.mark.parametrize(('flags', 'epochs', 'rates'), [
    (dict(warmup_epochs=2, warmup_lr=0.), 4, [0., 0.05, 0.05, 0.0146]),
    (dict(warmup_epochs=2, warmup_lr=0., warmup_prefix=True), 6, [0., 0.05, 0.1, 0.0854, 0.05, 0.0146]),
    (dict(cooldown_epochs=2, min_lr=0.01), 6, [0.1, 0.0868, 0.055, 0.0232, 0.01, 0.01]),
    (dict(cooldown_epochs=2, sched='multistep', decay_milestones=[3]), 6, [0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
    (dict(cooldown_epochs=1, warmup_epochs=1, warmup_lr=0., warmup_prefix=True, sched='constant'), 6,
     [0., 0.1, 0.1, 0.1, 0.1, 0.1]),
])
def test_warm_up_before_and_cool_down_after_the_epochs(flags, epochs, rates):
    settings = OptimizerSettings(**dict(dict(lr=0.1, epochs=4, sched='cosine'), **flags))
    optimizer, scheduler, total = build_optimizer(settings, nn.Linear(1, 1), 5)
    assert total == epochs
    found = []
    for epoch in range(total):
        scheduler.step(epoch)
        found.append(round(optimizer.param_groups[0]['lr'], 4))
    assert found == pytest.approx(rates, abs=1e-4)


# --- weights to start from, and trained for longer


def test_initial_checkpoint_starts_from_the_weights_of_a_run(toy_flags, finished, tmp_path):
    start = ['--initial-checkpoint', finished[0] / 'model.safetensors', '--lr', '0', '--warmup-epochs', '0', '--epochs',
             '1']
    folder = train(toy_flags, tmp_path, *start)
    ours, theirs = weights(folder), weights(finished[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith(('mean', 'var', 'tracked')))
    results = read_results(folder)
    assert results['args']['initial_sha256'] == read_results(finished[0])['weights_sha256']
    assert results['changed_from_recipe']['initial_checkpoint'] == 'model.safetensors'


def test_initial_checkpoints_that_can_not_be_used(toy_flags, finished, tmp_path):
    other = tmp_path / 'other.safetensors'
    shutil.copy(finished[0] / 'model.safetensors', other)
    names = '["class 1", "class 0", "class 2", "class 3"]'
    tensors, metadata = weights(finished[0]), dict(timm_sd='0', label_names=names)
    safetensors.torch.save_file(tensors, other, metadata)
    args = ['train.py', *toy_flags, '--output', tmp_path / 'output', '--initial-checkpoint']
    assert 'knows the 4 classes class 1, class 0' in refused(*args, other)
    assert 'local-dir:FOLDER --pretrained' in refused(*args, other)
    safetensors.torch.save_file(dict(tensors, **{'fc.bias': torch.full((4,), math.nan)}), other)
    assert 'fc.bias' in refused(*args, other)
    assert 'Missing key(s)' in refused(*args, finished[0] / 'model.safetensors', '--model', 'sd_resnet32_cifar')
    assert 'can not be read' in refused(*args, tmp_path / 'none.safetensors')
    assert not (tmp_path / 'output').exists()


def test_a_finished_run_is_trained_for_longer_as_if_it_had_been_longer_from_the_start(toy_flags, tmp_path):
    """By a schedule that doesn't end earlier: timm's multistep with its steps far away."""
    flags = [*toy_flags, *EMA, '--sched', 'multistep', '--no-sched-on-updates', '--decay-milestones', '9',
             '--decay-rate', '0.1']
    long = train([*flags, '--epochs', '5'], tmp_path / 'long')
    short = train(flags, tmp_path / 'short')
    before = {path: path.read_bytes() for path in short.rglob('*') if path.is_file()}
    more = ['train.py', *flags, '--epochs', '5', '--output', tmp_path / 'short']
    said = refused(*more, '--experiment', 'a', '--resume', 'auto')
    assert 'epochs 3 -> 5' in said
    assert f'--resume {short} --experiment NEW trains it for longer' in said
    assert f'--initial-checkpoint {short}/model.safetensors --experiment NEW begins with its weights' in said
    result = run_here(*more, '--resume', short, '--experiment', 'longer')
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('train_loss') == 2
    assert_same_run(tmp_path / 'short' / 'longer', long)
    longer = read_results(tmp_path / 'short' / 'longer')
    assert longer['args']['extended'] == changed_by_run(longer)['extended'] == [3]
    assert 'extended' not in read_results(long)['args']
    assert {path: path.read_bytes() for path in before} == before
    other = refused(*more, '--resume', long, '--experiment', 'longer')
    assert f'exists, and was not begun from {long}' in other
    # cut off, it goes on by the same line, or by --resume auto
    cut_off(tmp_path / 'short' / 'longer')
    for resume in (short, 'auto'):
        result = run_here(*more, '--resume', resume, '--experiment', 'longer')
        assert result.returncode == 0, result.stderr
        assert read_results(tmp_path / 'short' / 'longer')['args']['extended'] == [3]
    assert_same_run(tmp_path / 'short' / 'longer', long)


def test_without_its_checkpoints_a_run_can_not_become_longer(toy_flags, finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    shutil.rmtree(copy / 'checkpoints')
    more = ['--epochs', '5', '--output', tmp_path, '--resume', copy, '--experiment', 'more']
    said = refused('train.py', *toy_flags, *more)
    assert f'--initial-checkpoint {copy}/model.safetensors begins with its weights' in said
    assert not (tmp_path / 'more').exists()


def test_a_run_of_an_older_version_becomes_longer_too(toy_flags, finished, tmp_path):
    """Its args.yaml and its checkpoints know none of the newer flags."""
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    known = yaml.safe_load((copy / 'args.yaml').read_text())
    newer = {'aug', 'vflip', 'ratio', 'reprob', 'mixup', 'cutmix', 'model_ema', 'bce_loss', 'layer_decay', 'clip_grad',
             'amp_dtype', 'initial_checkpoint', 'initial_sha256', 'log_with', 'timeout', 'opt_kwargs', 'drop'}
    assert newer < known.keys()
    (copy / 'args.yaml').write_text(yaml.safe_dump({key: known[key] for key in known.keys() - newer}))
    args = ['train.py', *toy_flags, '--output', tmp_path]
    assert run_here(*args, '--resume', 'auto').stderr.splitlines()[0] == f'run folder  {copy}'  # it is found
    assert 'mixup 0.0 -> 0.5' in refused(*args, '--mixup', '0.5', '--resume', copy)
    result = run_here(*args, '--epochs', '5', '--resume', copy, '--experiment', 'more')
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'more')['args']['extended'] == [3]


@pytest.mark.parametrize(('flags', 'words'), [
    (['--epochs', '5', '--lr', '0.2'], 'lr 0.1 -> 0.2'),
    (['--epochs', '2'], 'give more --epochs than its 3'),
    ([], 'the same'),
])
def test_longer_is_all_that_a_run_may_become(toy_flags, finished, tmp_path, flags, words):
    more = ['--output', tmp_path, '--experiment', 'more', '--resume', finished[0]]
    said = refused('train.py', *toy_flags, *flags, *more)
    assert words in said
    assert not list(tmp_path.iterdir())


# --- flags that would do nothing


@pytest.mark.parametrize(('flags', 'words'), [
    (['--scale', '0.5', '1'], '--scale does nothing without --no-in-memory'),
    (['--aa', 'rand-m9'], '--aa does nothing without --no-in-memory'),
    (['--train-interpolation', 'random'], '--train-interpolation does nothing without --no-in-memory'),
    (['--no-in-memory', '--crop-padding', '2'], '--crop-padding does nothing without --in-memory'),
    (['--no-aug', '--hflip', '0.5'], '--hflip does nothing without --aug'),
    (['-j', '3'], '--workers does nothing without --no-in-memory'),
    (['--torchcompile-mode', 'default'], '--torchcompile-mode does nothing without --compile'),
    (['--remode', 'pixel'], '--remode does nothing without --reprob'),
    (['--mixup-prob', '0.5'], '--mixup-prob does nothing without --mixup or --cutmix'),
    (['--mixup', '1', '--mixup-switch-prob', '0.5'], '--mixup-switch-prob does nothing without --cutmix'),
    (['--model-ema-decay', '0.9'], '--model-ema-decay does nothing without --model-ema'),
    (['--clip-mode', 'agc'], '--clip-mode does nothing without --clip-grad'),
    (['--bce-target-thresh', '0.1'], '--bce-target-thresh does nothing without --bce-loss'),
    (['--warmup-prefix', '--warmup-epochs', '0'], '--warmup-prefix does nothing without --warmup-epochs'),
])
def test_a_flag_that_would_do_nothing_is_refused(flags, words):
    assert words in refused('train.py', *flags)


@pytest.mark.parametrize(('flags', 'words'), [
    (['--mixup', '0.5', '-b', '7'], '--batch-size 7 is odd'),
    (['--sync-bn'], 'on GPUs alone'),
    (['--opt', 'sgd', '--opt-betas', '0.9', '0.95'], '--opt-betas: --opt sgd has none'),
    (['--opt', 'sgd', '--opt-kwargs', 'eps=1e-8'], '--opt-eps: --opt sgd has none'),
    (['--opt', 'adamw', '--opt-betas', '0.8', '0.9', '0.95'], '--opt adamw has 2'),
    (['--opt', 'adamw', '--opt-eps', '1e-8', '--opt-kwargs', 'eps=1e-8'], '--opt-kwargs eps: a flag says it too'),
    (['--opt-kwargs', 'nonsense=1'], 'nonsense'),
    (['--cuda-graphs', '--drop', '0.1'], 'dropout'),
    (['--cuda-graphs', '--amp', '--amp-dtype', 'float16'], '--amp-dtype float16'),
    (['--bce-loss', '--smoothing', '1'], '--smoothing 1'),
    (['--no-in-memory', '--aa', 'rand-m9-inc1'], 'rand-m9-inc1-mmax9'),
])
def test_what_can_not_be_done_is_said(toy_flags, tmp_path, flags, words):
    assert words in refused('train.py', *toy_flags, '--output', tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_of_a_recipe_counts_what_has_an_effect(tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('config: own\nmixup: 0.5\nmixup_prob: 0.7\nreprob: 0.2\nrecount: 3\n')
    flags = parse_train_flags(['-c', str(recipe)])
    assert (flags.model, flags.scale, flags.mixup_prob, flags.recount) == ('sd_resnet18', [0.35, 1.], 0.7, 3)
    flags = parse_train_flags(['-c', str(recipe), '--in-memory', '--mixup', '0', '--no-aug'])
    assert (flags.scale, flags.mixup_prob, flags.recount, flags.hflip) == ([0.08, 1.], 1., 1, 0.5)
    recipe.write_text('config: own\nin_memory: true\n')  # what `own` says of files has no effect then
    flags = vars(parse_train_flags(['-c', str(recipe)]))
    assert (flags['in_memory'], flags['scale'], flags['lr']) == (True, [0.08, 1.], 0.05)
    assert changed_from_recipe(vars(parse_train_flags(['-c', 'own', '--in-memory']))) == dict(in_memory=True)
    assert changed_from_recipe(vars(parse_train_flags(['-c', 'quickstart', '--no-aug']))) == dict(aug=False)
    (tmp_path / 'base.yaml').write_text('epochs: 7\nlr: 0.3\n')
    recipe.write_text('config: base.yaml\nlr: 0.2\n')  # beside it, wherever that is
    assert read_recipe(str(recipe)) == dict(epochs=7, lr=0.2)
    recipe.write_text('config: own\nmixup_prob: 0.7\n')
    assert f'recipe {recipe}: mixup_prob does nothing without --mixup or --cutmix' in refused('train.py', '-c', recipe)
    recipe.write_text('config: mine.yaml\n')
    assert 'builds on itself' in refused('train.py', '-c', recipe)


@pytest.mark.parametrize('name', ['finetune', 'scratch'])
def test_the_recipes_build_on_own(name):
    flags, own = vars(parse_train_flags(['-c', name])), read_recipe('own')
    recipe = read_recipe(name)
    assert 'config' not in recipe
    assert all(flags[key] == value for key, value in recipe.items())
    assert own.keys() <= recipe.keys()
    assert timm.is_model(flags['model'].partition('.')[0])


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'resnet18'])
def test_sync_bn_is_the_same_network_on_one_process(name):
    """On a CPU torch has it on one process alone; no GPU has run it."""
    found = []
    for sync in (False, True):
        torch.manual_seed(0)
        network = build_network(NetworkSettings(model=name), DepthSettings(
            drop_path=0.5, drop_path_mode='batch', drop_path_scale='eval', sync_bn=sync), 10, seed=0).train()
        assert sync == any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
        torch.manual_seed(1)
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        found.append({key: param.grad for key, param in network.named_parameters()} | network.state_dict())
    plain, synced = found
    assert plain.keys() == synced.keys()
    assert all(torch.equal(plain[key], synced[key]) for key in plain)
