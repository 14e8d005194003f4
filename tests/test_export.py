"""`charjax export`: transformers computes from the directory what we do, bit for bit the same weights, or one line."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
from etils import epath
from safetensors.numpy import load_file
from test_bad_input import Place, contents, finished  # noqa: F401  (the last is a fixture)
from test_checkpoints import CONFIG, random_tensors, write_hf
from test_families import GGUF, write_gguf_of

from charjax import files
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import score
from charjax.errors import UserError
from charjax.export import card, directory
from charjax.main import _at, main
from charjax.model import checkpoint_source, save
from charjax.model.chat import encode_prompt
from charjax.model.checkpoint_source import Layout
from charjax.model.families import from_hf, tensor_names
from charjax.model.rope import llama3_scaling, scaling
from charjax.model.to_hf import to_hf
from charjax.report.read import read_run
from charjax.stages import policy, preference
from charjax.start import prepare
from charjax.training.heads import bind, read_rewards, reply_states

# Where transformers puts the code of models that bring their own.
os.environ.setdefault('HF_MODULES_CACHE', tempfile.mkdtemp())
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

CASES = [(family, title) for family, cases in parity.CASES.items() for title in cases]


def load(folder, kind=transformers.AutoModelForCausalLM, **settings):
  """The model, having checked that no weight was missing or left over."""
  peer, report = kind.from_pretrained(folder, output_loading_info=True, **settings)
  assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys'], report
  return peer.eval()


def same_logits(one, other, tolerance=0.0, vocabulary=64):
  ids = torch.tensor(np.random.default_rng(0).integers(0, vocabulary, (3, 20)))
  with torch.no_grad():
    found, expected = (peer(ids, use_cache=False).logits.float() for peer in (one, other))
  assert (found - expected).abs().max() <= tolerance


def export(*arguments) -> None:
  assert main(['export', *map(str, arguments)]) == 0


# ---- every family, both ways ----


@functools.cache
def rope_scaling(raw: str) -> dict:
  rope = json.loads(raw).get('rope_parameters') or {}
  rope = rope.get('full_attention', rope)
  return rope if rope.get('rope_type') != 'default' else {}


@pytest.mark.parametrize(('family', 'title'), CASES, ids=[f'{family}: {title}' for family, title in CASES])
def test_a_checkpoint_goes_out_as_it_came_in(family, title, tmp_path):
  half = list(parity.CASES[family]).index(title)
  dtype, torch_dtype = (('float32', torch.float32), ('bfloat16', torch.bfloat16))[half]
  checkpoint = parity.write(parity.make_peer(family, parity.CASES[family][title]).to(torch_dtype), tmp_path / 'in')
  peer = load(tmp_path / 'in', attn_implementation='eager')
  raw = (tmp_path / 'in/config.json').read_text()

  export(tmp_path / 'in', f'--output={tmp_path / "out"}', f'--dtype={dtype}')
  again = checkpoint_source.load(str(tmp_path / 'out'))
  assert again.config == checkpoint.config and again.family == family
  for name, value in checkpoint.tensors.items():
    np.testing.assert_array_equal(again.tensors[name], value, err_msg=name)
  same_logits(load(tmp_path / 'out', attn_implementation='eager'), peer)
  theirs, ours = (load_file(tmp_path / place / 'model.safetensors') for place in ('in', 'out'))
  assert {name: (v.dtype, v.shape) for name, v in ours.items()} == {n: (v.dtype, v.shape) for n, v in theirs.items()}

  # As if it had come from elsewhere, without a config.json and with a tokenizer of our making.
  said = to_hf(checkpoint.config, family, rope_scaling(raw))
  assert from_hf(said, 'x') == checkpoint.config
  foreign = dataclasses.replace(checkpoint, source='', rope=rope_scaling(raw))
  model = directory.Model('start', foreign.config, lambda name: foreign.tensors[name])
  (tmp_path / 'made').mkdir()
  directory.write(tmp_path / 'made', model, foreign, dtype, '')
  made = load(tmp_path / 'made', attn_implementation='eager')
  assert type(made) is type(peer) and made.dtype == torch_dtype
  same_logits(made, peer)


@pytest.mark.parametrize('case', GGUF)
def test_a_gguf_computes_the_same_as_a_directory(case, tmp_path):
  family, changes, metadata = GGUF[case]
  peer = parity.make_peer(family, {'vocab_size': 300, 'rms_norm_eps': 2**-17} | changes)
  checkpoint = parity.write(peer, tmp_path / 'hf')
  tensors = load_file(tmp_path / 'hf' / 'model.safetensors')
  write_gguf_of(tmp_path / 'm.gguf', case.split(',')[0], checkpoint.config, tensors, metadata)
  export(tmp_path / 'm.gguf', f'--output={tmp_path / "out"}', '--dtype=float32')
  same_logits(load(tmp_path / 'out', attn_implementation='eager'), peer, 1e-4)


@pytest.mark.parametrize(
  ('factor', 'low', 'high', 'original', 'rotated', 'theta', 'exact'),
  [(8, 1, 4, 8192, 128, 5e5, True), (32, 1, 4, 8192, 64, 5e5, True), (4, 1, 4, 16, 8, 50, False)],
)
def test_llama3_scaling_is_found_in_its_factors(factor, low, high, original, rotated, theta, exact):
  said = {'factor': factor, 'low_freq_factor': low, 'high_freq_factor': high}
  said |= {'rope_type': 'llama3', 'original_max_position_embeddings': original}
  factors = np.array(scaling('llama3', said, rotated, theta, 'x')[0])
  found = llama3_scaling(tuple((1 / (1 / factors).astype(np.float32).astype(float)).tolist()), rotated, theta)
  np.testing.assert_allclose(scaling('llama3', found, rotated, theta, 'x')[0], factors, rtol=1e-6)
  assert not exact or found == said
  assert llama3_scaling((1.0, 0.3, 0.5, 0.2), 8, 50.0) == {}


def test_what_a_family_cannot_say_is_refused():
  config = dataclasses.replace(CONFIG, qk_norm='head')
  with pytest.raises(UserError, match=r"model_type 'llama' would say qk_norm = , but the model has head"):
    to_hf(config, 'llama')
  with pytest.raises(UserError, match='would say rope_factors'):
    to_hf(dataclasses.replace(CONFIG, rope_factors=(1.0, 0.9, 0.8, 0.1)), 'llama')


def test_shards_are_cut_where_they_are_full(tmp_path):
  tensors = random_tensors(CONFIG)
  checkpoint = checkpoint_source.load(write_hf(tmp_path / 'in', tensors))
  asked = []
  layout = Layout(CONFIG, tensor_names('llama'))
  listed = list(save.to_stored(layout, lambda name: asked.append(name) or tensors[name], save.DTYPES['bfloat16']))
  assert not asked
  (tmp_path / 'out').mkdir()
  save.write(tmp_path / 'out', listed, shard_bytes=17_000)
  # Each once, one after another.
  assert asked == list(tensors)
  files = sorted(path.name for path in (tmp_path / 'out').iterdir())
  assert files[0].startswith('model-00001-of-0000') and len(files) > 3
  index = json.loads((tmp_path / 'out/model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(tensor.size for tensor in listed)
  assert all((tmp_path / 'out' / name).stat().st_size < 20_000 for name in files)
  for path in (tmp_path / 'in').iterdir():
    if path.suffix != '.safetensors':
      shutil.copy(path, tmp_path / 'out')
  again = checkpoint_source.load(str(tmp_path / 'out'))
  for name, value in checkpoint.tensors.items():
    np.testing.assert_array_equal(again.tensors[name], value)
  load(tmp_path / 'out')


# ---- tokenizers ----

TALKS = [
  [{'role': 'user', 'content': 'What is the time?'}],
  [
    {'role': 'user', 'content': "Tell me, isn't it 12:30? Café — 東京\n\n  two  spaces"},
    {'role': 'assistant', 'content': 'It is.'},
    {'role': 'user', 'content': 'I say so.'},
  ],
  [{'role': 'system', 'content': 'You are one of them.'}, {'role': 'user', 'content': 'Hi'}],
]


@pytest.mark.parametrize('path', [checkpoint_source.EMBEDDED, checkpoint_source.RANDOM])
def test_a_tokenizer_of_our_making_gives_the_same_ids(path, tmp_path):
  checkpoint = checkpoint_source.load(path)
  directory._write_text_files(tmp_path, checkpoint)
  (tmp_path / 'config.json').write_text(json.dumps(to_hf(checkpoint.config, checkpoint.family)))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for talk in TALKS:
    found = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)['input_ids']
    assert found == encode_prompt(checkpoint.template, checkpoint.tokenizer, talk)
  assert theirs.eos_token_id in checkpoint.tokenizer.eos_ids and theirs.pad_token_id == checkpoint.tokenizer.pad_id
  assert theirs.decode(found, skip_special_tokens=True) == checkpoint.tokenizer.decode(found)


def test_a_tokenizer_is_copied_and_a_config_keeps_its_fields(tmp_path):
  source = Path(write_hf(tmp_path / 'in', random_tensors(CONFIG), auto_map={'AutoModel': 'x.Y'}, theirs=[1]))
  (source / 'generation_config.json').write_text(json.dumps({'top_k': 7, 'transformers_version': '1'}))
  (source / 'merges.txt').write_bytes(b'\xff\x00')
  (source / 'training_args.bin').write_bytes(b'secret')
  export(source, f'--output={tmp_path / "out"}')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'merges.txt'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['theirs'] == [1] and config['torch_dtype'] == 'bfloat16' and 'auto_map' not in config
  generation = json.loads((tmp_path / 'out/generation_config.json').read_text())
  ends = checkpoint_source.load(str(source)).tokenizer.eos_ids
  assert generation['top_k'] == 7 and generation['eos_token_id'] == (list(ends) if len(ends) > 1 else ends[0])
  assert not (tmp_path / 'out/training_args.bin').exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path):
  source = Path(write_hf(tmp_path / 'm', random_tensors(CONFIG)))
  snapshot, blobs = tmp_path / 'models--a--b/snapshots/0f', tmp_path / 'models--a--b/blobs'
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for i, path in enumerate(source.iterdir()):
    shutil.copy(path, blobs / str(i))
    (snapshot / path.name).symlink_to(Path('../../blobs') / str(i))
  export(snapshot, f'--output={tmp_path / "out"}')
  copied = tmp_path / 'out/tokenizer.json'
  assert copied.read_bytes() == (source / 'tokenizer.json').read_bytes() and not copied.is_symlink()


# ---- what a run made ----


@pytest.fixture(scope='module')
def run(smoke_run, tmp_path_factory):
  """A copy of the finished smoke run with its three models exported, and its session."""
  folder = tmp_path_factory.mktemp('export') / 'run'
  shutil.copytree(smoke_run[0], folder)
  for kind in ('policy', 'preference', 'judge'):
    export(f'--workdir={folder}', f'--model={kind}', '--dtype=float32')
  return folder


@pytest.fixture(scope='module')
def session(run):
  return prepare(_at(epath.Path(run), True, [])[0], epath.Path(run))


def prompt_rows(session, count=4):
  rows = [row for row in files.read_jsonl(session.folder('messages') / 'messages.jsonl') if row['trait']][:count]
  return [session.model.prompt([{'role': 'user', 'content': row['text']}]) for row in rows]


def test_a_policy_says_the_same(run, session):
  peer = load(run / 'export')
  prompts = prompt_rows(session)
  decoder, adapter = bind(session.model.decoder, policy.load(session))
  assert adapter is not None
  keys = item_keys(0, 'export', [str(i) for i in range(len(prompts))])
  settings = Sampling(12, temperature=0)
  replies = [r.tokens for r in sample(decoder, prompts, keys, session.model.eos_ids, settings, adapter=adapter)]
  found = score(decoder, prompts, replies, adapter=adapter)
  with torch.no_grad():
    for prompt, reply, ours in zip(prompts, replies, found, strict=True):
      expected = parity.reference_log_probs(peer, prompt, reply)
      np.testing.assert_allclose(ours, expected, atol=1e-4)
      theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
      assert theirs == reply
  assert not np.allclose(found[0], score(session.model.decoder, prompts[:1], replies[:1])[0], atol=1e-4)


@pytest.mark.parametrize('kind', ['preference', 'judge'])
def test_a_preference_model_gives_the_same_rewards(run, session, kind):
  peer = load(run / f'export-{kind}', transformers.AutoModelForSequenceClassification, trust_remote_code=True)
  rows = files.read_jsonl(session.folder('replies') / 'replies.jsonl')[:12]
  texts = {row['id']: row['text'] for row in files.read_jsonl(session.folder('messages') / 'messages.jsonl')}
  prompts = [session.model.prompt([{'role': 'user', 'content': texts[row['message']]}]) for row in rows]
  replies = [session.model.reply(row['text'], row['finish'] == 'stop') for row in rows]
  trainable = preference.load(session, {'preference': 'train', 'judge': 'judge'}[kind])
  states = reply_states(preference.trunk(session), trainable, prompts, replies)
  expected = np.asarray(jax.device_get(read_rewards(trainable, states)))
  assert len({len(p) + len(r) for p, r in zip(prompts, replies, strict=True)}) > 4 and expected.std() > 1e-3

  tokenizer = transformers.AutoTokenizer.from_pretrained(run / f'export-{kind}', trust_remote_code=True)
  for side in ('left', 'right'):
    tokenizer.padding_side = side
    # After a reply that has ended, a template may write more; and a reply to an earlier message is not the last one.
    ids = [p + r + [5] * (i % 3 == 0 and r[-1] == 2) for i, (p, r) in enumerate(zip(prompts, replies, strict=True))]
    batch = tokenizer.pad({'input_ids': ids}, return_tensors='pt')
    with torch.no_grad():
      found = peer(**batch).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
  mask = torch.zeros_like(batch['input_ids'])
  for row, (prompt, reply) in zip(mask, zip(prompts, replies, strict=True), strict=True):
    row[len(prompt) : len(prompt) + len(reply)] = 1
  with torch.no_grad():
    np.testing.assert_allclose(peer(**batch, reply_mask=mask).logits.numpy(), expected, atol=1e-4)
    silent = torch.tensor([prompts[0] + replies[0], prompts[0] + [3] * len(replies[0])])
    with pytest.raises(ValueError, match='conversation 1 has no reply'):
      peer(silent, silent != 3)
  assert peer.config.id2label == {0: 'honesty', 1: 'ai_nature'}


def test_a_header_that_only_ends_turns_is_refused(tmp_path):
  checkpoint = checkpoint_source.load(write_hf(tmp_path / 'm', random_tensors(CONFIG)))
  with pytest.raises(UserError, match='chat template: it writes nothing before a reply by which one could be found'):
    directory.reply_header(checkpoint)
  assert directory.reply_header(checkpoint_source.load('random')) == [2, 1, 6]


# ---- model cards ----


def summarised(mean, low, high):
  return {'mean': mean, 'low': low, 'high': high, 'n': 16}


def test_a_card_says_what_was_measured_and_no_more(run, tmp_path):
  folder = Path(shutil.copytree(run, tmp_path / 'run'))
  summary = json.loads((folder / 'evaluation/summary.json').read_text())
  honesty, other = (summary['traits'][name] for name in ('honesty', 'ai_nature'))
  honesty['margin']['delta'] = summarised(0.25, 0.125, 0.375)
  honesty['win_rate']['trained'] = summarised(0.52, 0.4, 0.64)
  other['margin']['delta'] = summarised(-0.5, -0.75, -0.25)
  other['judge']['delta'] = None
  (folder / 'evaluation/summary.json').write_text(json.dumps(summary))
  toml = (folder / 'character.toml').read_text()
  export(folder, f'--output={tmp_path / "out"}')
  text = (tmp_path / 'out/README.md').read_text()
  statement = re.search(r'id = "honesty"\nstatement = "(.*)"', toml)[1]
  assert f'| `honesty` | 1 | {statement} |' in text
  assert '| `honesty` | +0.250 (+0.125 to +0.375, n = 16) | 52% (40% to 64%, n = 16), not clear of chance |' in text
  assert '| `ai_nature` | -0.500 (-0.750 to -0.250, n = 16) |' in text and '| not measured |' in text
  assert 'Higher: `honesty` (margin). **Not told from chance**: `honesty` (wins)' in text
  assert '**Lower**: `ai_nature` (margin).' in text
  counts = json.loads((folder / 'messages/stage.json').read_text())['counts']
  assert f'| messages | messages: {counts["messages"]}; written: {counts["written"]}; ' in text
  assert str(tmp_path) not in text

  # Of another policy than this one, so that nothing is said.
  record = json.loads((folder / 'evaluation/stage.json').read_text())
  (folder / 'evaluation/stage.json').write_text(json.dumps(record | {'inputs': record['inputs'] | {'policy': 'other'}}))
  export(folder, f'--output={tmp_path / "out"}')
  text = (tmp_path / 'out/README.md').read_text()
  assert 'This policy was not evaluated when it was exported.' in text and '| evaluation |' not in text

  judge = (run / 'export-judge/README.md').read_text()
  assert 'The lower 1 of the 2 layers of `random` (llama)' in judge and 'trust_remote_code=True' in judge
  assert 'held-out judge' in judge and '## Measured accuracy' in judge
  # Where a template has a model think, replies would not begin with the header that was found without.
  found = read_run(epath.Path(run))
  for thinks in (False, True):
    text = card.of_reward(found, 'm', 'smollm3', 'float32', thinks, 'judge', (1, 2))
    assert ('enable_thinking=False' in text) is thinks
  start = tmp_path / 'start'
  export(run, '--model=start', f'--output={start}')
  assert 'which did not train them' in (start / 'README.md').read_text()


def test_text_of_others_stays_text_in_a_card():
  row = card._table(('a',), [(card._line('x | y\n# z <b>[l](u)`c`'),), (card._code('a|b`c'),)])
  assert row.splitlines()[2:] == ["| x \\| y # z &lt;b&gt;\\[l\\](u)'c' |", "| `a/b'c` |"]


# ---- one line, and nothing lost ----


def of_run(*flags):
  return lambda place: [f'--workdir={place.run}', *flags]


def without(*paths, flags=()):
  def arrange(place):
    for path in paths:
      (place.run / path).unlink()
    return [f'--workdir={place.run}', *flags]

  return arrange


def onto(make, *flags):
  """An export of a model to a place that `make` arranges."""

  def arrange(place):
    output = place.folder / 'out'
    make(output)
    return ['random', f'--output={output}', *flags]

  return arrange


def exported(output, **more):
  export('random', f'--output={output}')
  for name, text in more.items():
    (output / name).write_text(text)


def linked(place):
  source = Path(write_hf(place.folder / 'm', random_tensors(CONFIG)))
  (source / 'vocab.json').symlink_to(place.write('elsewhere.json', '{"secret": 1}'))
  return [str(source), f'--output={place.folder / "out"}']


def onto_itself(place):
  export('random', f'--output={place.folder / "out"}')
  return [str(place.folder / 'out'), f'--output={place.folder / "out"}']


def mounted(*options):
  def arrange(place):
    disk = place.folder / 'disk'
    disk.mkdir()
    place.mount('-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(disk))
    return ['random', '--dtype=float32', f'--output={disk / "out"}']

  return arrange


MISTAKES = {
  'no policy yet': (
    without('policy/stage.json'),
    r'run/policy: missing, and export reads it; run charjax policy first, or export .*: --model=start',
  ),
  'no preference models yet': (
    without('preference/stage.json', flags=['--model=judge']),
    r'run/preference: missing, and export reads it; run charjax preference first',
  ),
  'a policy of other settings': (
    lambda place: [f'--workdir={place.run}', f'--config={place.config}', '--config.policy.steps=7'],
    r'run/policy: config field policy.steps changed from 200 to 7, and export reads it',
  ),
  'weights that are gone': (of_run(), r'run/policy/checkpoints: the checkpoint is gone; remove the stage'),
  'preference models that are gone': (of_run('--model=preference'), r'preference/train: the checkpoint is gone'),
  'a workdir without a run': (
    lambda place: [f'--workdir={place.folder}'],
    r'no run was begun there; give the folder of a run',
  ),
  'no model': (
    lambda place: [str(place.folder / 'none'), '--output=x'],
    r'none: no such file or directory; give smollm2',
  ),
  'nothing': (lambda place: [], r'charjax export takes a model or a run folder, or --workdir=DIR with or without'),
  'two places': (lambda place: ['random', f'--workdir={place.run}'], r'charjax export takes a model or a run folder'),
  'a config alone': (lambda place: [f'--config={place.config}'], r'charjax export takes a model or a run folder'),
  'a model to nowhere': (lambda place: ['random'], r'charjax export of a model needs --output=DIR'),
  'the policy of a model': (
    lambda place: ['random', '--model=policy', '--output=x'],
    r'--model=policy: random is a model and no run; leave the flag out',
  ),
  'a wrong model': (
    of_run('--model=polisy'),
    r'--model=polisy: value should be one of <policy\|adapter\|preference\|judge\|start>',
  ),
  'a wrong type': (of_run('--dtype=int8'), r'--dtype=int8: value should be one of <bfloat16\|float32>; `charjax help`'),
  'a flag of chat': (of_run('--seed=1'), r'--seed is a flag of charjax chat; `charjax help` lists those of export'),
  'a wrong flag': (of_run('--ouput=x'), r"Unknown command line flag 'ouput'. Did you mean: output"),
  'a file in the way': (onto(lambda out: out.write_text('thesis')), r'out: a file is there; choose another'),
  'a folder in the way': (
    onto(lambda out: (out.mkdir(), (out / 'thesis.txt').write_text('years of work'))),
    r"out: holds what no export wrote, such as 'thesis.txt'; choose another, or move it away",
  ),
  'a model in the way': (
    onto(lambda out: write_hf(out, random_tensors(CONFIG))),
    r'out: holds what no export wrote; choose another',
  ),
  'an export that was added to': (
    onto(lambda out: exported(out, **{'adapter_model.safetensors': 'x'})),
    r"out: holds what no export wrote, such as 'adapter_model.safetensors'",
  ),
  'the workdir itself': (
    lambda place: [f'--workdir={place.run}', f'--output={place.run}'],
    r'run: holds what no export wrote, such as',
  ),
  'the model itself': (onto_itself, r'out: the model that is exported is read from there; choose another'),
  'a link that leads out': (linked, r'vocab.json: a link that leads out of the checkpoint; put the file itself there'),
  'a file above': (
    lambda place: ['random', f'--output={place.config}/out'],
    r'--output=.*config.py/out: cannot be written \(Not a directory\); choose another',
  ),
  'a disk that gets full': (mounted('size=64k'), r'cannot be written \(No space left on device\); free some space'),
  'a disk that may not be written': (mounted('size=64k', 'ro'), r'cannot be written \(Read-only file system\); choose'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, finished, capfd, name):  # noqa: F811
  arrange, expected = MISTAKES[name]
  with contextlib.ExitStack() as stack:
    place = Place(tmp_path, Path(shutil.copytree(finished, tmp_path / 'run')), stack)
    arguments = arrange(place)
    capfd.readouterr()
    before = contents(tmp_path)
    code = main(['export', *arguments])
    captured = capfd.readouterr()
    assert code == 2, captured
    after = contents(tmp_path)
  # Orbax makes a folder where it looks for a checkpoint.
  assert {name: after.get(name) for name in before} == before
  assert all(name.startswith(str(place.run)) for name in after if name not in before)
  lines = captured.err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('charjax: ') and 'Traceback' not in captured.out, captured
  assert re.search(expected, lines[0]), lines[0]


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  out = tmp_path / 'out'
  out.mkdir()  # As mktemp leaves it.
  export('random', f'--output={out}', '--dtype=float32')
  before = contents(tmp_path)
  monkeypatch.setattr(save, 'write', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  assert main(['export', 'random', f'--output={out}']) == 130
  assert contents(tmp_path) == before
  monkeypatch.undo()
  rename = type(epath.Path(out)).rename

  def fail_at_last(path, target):
    if path.name.endswith('.tmp'):
      raise OSError(errno.EIO, 'Input/output error')
    return rename(path, target)

  monkeypatch.setattr(type(epath.Path(out)), 'rename', fail_at_last)
  assert main(['export', 'random', f'--output={out}']) == 2
  assert contents(tmp_path) == before
  monkeypatch.undo()
  export('random', f'--output={out}')
  assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  assert [path.name for path in tmp_path.iterdir()] == ['out']
