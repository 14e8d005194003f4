"""What differs between two characters, and what a character makes of a model before any training."""

import dataclasses
import json
import re
import shutil

import pytest

from charjax import character as characters
from charjax import character_diff
from charjax import main as command_line
from charjax.character_diff import diff, marked
from charjax.stages import prompts


@pytest.fixture(scope='module')
def stoic():
  return characters.load('stoic')


def changed(character, place, **fields):
  traits = list(character.traits)
  traits[place] = dataclasses.replace(traits[place], **fields)
  return dataclasses.replace(character, traits=tuple(traits))


def test_words_that_went_and_came_are_marked():
  assert marked('I am calm and kind.', 'I am calm, and very kind.') == 'I am [-calm-] {+calm,+} and {+very+} kind.'
  assert marked('', 'new') == '{+new+}' and marked('old', '') == '[-old-]' and marked('a b', 'a  b') == 'a b'


def test_all_that_differs_is_told_and_nothing_else(stoic):
  assert diff(stoic, stoic) == ''
  first = stoic.traits[0]
  kept = first.pairs_for('kept')[0]
  pairs = tuple(
    p if p != kept else dataclasses.replace(p, in_character='Another reply. \x1b[31m \u202e') for p in first.pairs
  )
  other = changed(stoic, 0, statement=first.statement + ' Always.', seeds=('Is it new?', *first.seeds[1:]), weight=2.0,
                  pairs=pairs)  # fmt: skip
  found = diff(stoic, other)
  assert '{+Always.+}' in found and 'weight: 1 -> 2' in found and 'seeds: 1 gone, 1 new' in found
  assert '+ Is it new?' in found and 'kept pairs: 1 gone, 1 new' in found and 'not to be compared' in found
  assert '\x1b' not in found and '\u202e' not in found and max(map(len, found.splitlines())) <= 96
  assert found.count('trait ') == 1 and f'trait {first.id}' in found
  less = dataclasses.replace(stoic, traits=stoic.traits[1:])
  assert f'trait {first.id}: gone' in diff(stoic, less) and f'trait {first.id}: new' in diff(less, stoic)
  assert 'in another order' in diff(stoic, dataclasses.replace(stoic, traits=stoic.traits[::-1]))
  one, two = first.seeds[0], first.seeds[1]
  assert 'seeds: in another order' in diff(stoic, changed(stoic, 0, seeds=(two, one, *first.seeds[2:])))


def test_the_command_takes_names_files_and_folders_of_runs(tmp_path, capsys, monkeypatch):
  source = characters.source('stoic')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'character.toml').write_text(source)
  (tmp_path / 'mine.toml').write_text(source.replace('name = "stoic"', 'name = "mine"', 1))
  assert command_line.main(['character', 'diff', 'stoic', str(tmp_path / 'run')]) == 0
  assert capsys.readouterr().out == 'They do not differ.\n'
  # A record of another version, and damaged ones.
  for config, code in (({'seed': 1, 'gone': 2}, 0), ({'character': {'traits': 3}}, 2), ({'character': 'stoic'}, 2)):
    (tmp_path / 'run' / 'config.json').write_text(json.dumps({'config': config}))
    assert command_line.main(['character', 'diff', 'stoic', str(tmp_path / 'run')]) == code
    told = capsys.readouterr().err
    assert not told if not code else re.search(r'config.json: config field character.* is ', told)
  (tmp_path / 'run' / 'config.json').unlink()
  assert command_line.main(['character', 'diff', 'stoic', str(tmp_path / 'mine.toml')]) == 0
  assert capsys.readouterr().out == '  name: [-stoic-] {+mine+}\n'
  shutil.rmtree(tmp_path / 'run')
  (tmp_path / 'run').mkdir()
  assert command_line.main(['character', 'diff', 'stoic', str(tmp_path / 'run')]) == 2
  assert 'without a character.toml' in capsys.readouterr().err
  assert command_line.main(['character', 'diff', 'stoic']) == 2
  assert command_line.main(['character', 'diff', 'stoic', '~nobody/x']) == 2
  assert '~nobody/x' in capsys.readouterr().err
  # What ships comes first.
  (tmp_path / 'stoic').mkdir()
  monkeypatch.chdir(tmp_path)
  assert character_diff.read('stoic').name == 'stoic'


def test_a_preview_shows_messages_and_replies_of_each_trait(capsys, monkeypatch):
  shown = []
  monkeypatch.setattr(
    prompts, 'shown_character', lambda character, _: shown.append(character.name) or [prompts.user('Be calm.')]
  )
  flags = ['--config.model.path=random', '--config.model.dtype=float32', '--config.model.compute_dtype=float32',
           '--config.messages.max_new_tokens=8', '--config.replies.max_new_tokens=8', '--config.replies.examples=1',
           '--config.messages.seeds_shown=1', '--config.model.remat=False',
           '--config.replies.show=character']  # fmt: skip
  traits = [trait.id for trait in characters.load('stoic').traits[:2]]
  flags.append(f'--config.character.traits={",".join(traits)}')
  code = command_line.main(['character', 'check', 'stoic', '--preview=1', *flags])
  found = capsys.readouterr().out
  assert code in (0, 1)
  for trait in traits:
    assert f'\n{trait}: ' in found
  assert shown == ['stoic'] * 2  # as the config says for a run's replies
  assert found.count('    plain  ') == found.count('    in character  ') == 2
