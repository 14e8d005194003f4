"""Characters load, or fail with one line that says where and what to do; lint sees planted tell-tales."""

import dataclasses
import itertools
import pathlib

import pytest

from charjax import character as characters
from charjax import character_lint
from charjax.character import Character, Pair, Trait
from charjax.errors import UserError
from charjax.main import main

HEAD = 'name = "small"\ndescription = "For tests."\n'
SEEDS = 'seeds = ["a", "b", "c", "d", "e", "f", "g", "h"]\n'
TRAIT = '[[traits]]\nid = "calm"\nstatement = "I stay calm."\n' + SEEDS
OPPOSITES = '[traits.opposites]\nhasty = "I rush."\n'
PAIR = (
  '[[traits.pairs]]\nuse = "shown"\nopposite = "hasty"\nmessage = "Hurry?"\n'
  'in_character = "There is time."\nout_of_character = "Now, now, now."\n'
)
SHIPPED = sorted(file.stem for file in (pathlib.Path(characters.__file__).parent / 'characters').glob('*.toml'))
VALID = HEAD + TRAIT + OPPOSITES + PAIR  # [[traits]] stands on line 3, [[traits.pairs]] on line 9


def write(tmp_path: pathlib.Path, content: str | bytes) -> str:
  path = tmp_path / 'c.toml'
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return str(path)


def error(tmp_path: pathlib.Path, content: str | bytes) -> str:
  path = write(tmp_path, content)
  with pytest.raises(UserError) as caught:
    characters.load(path)
  message = str(caught.value)
  assert '\n' not in message and len(message) < len(path) + 300
  return message.replace(path, 'FILE')


def test_a_valid_file_loads(tmp_path):
  character = characters.load(write(tmp_path, VALID + PAIR.replace('shown', 'kept').replace('Hurry?', 'Late?')))
  trait = character.traits[0]
  assert (character.name, trait.id, trait.weight) == ('small', 'calm', 1.0)
  assert trait.opposites == {'hasty': 'I rush.'} and len(trait.seeds) == 8
  assert [pair.message for pair in trait.pairs_for('kept')] == ['Late?']
  assert trait.pairs_for('choosing') == ()


def test_windows_files_load_and_keep_their_line_numbers(tmp_path):
  windows = b'\xef\xbb\xbf' + VALID.replace('\n', '\r\n').encode()
  assert characters.load(write(tmp_path, windows)).name == 'small'
  assert 'line 10: traits[0].pairs[0].use' in error(tmp_path, windows.replace(b'"shown"', b'"shwn"'))


def test_source_is_the_text_of_the_file(tmp_path):
  assert characters.source(write(tmp_path, VALID)) == VALID
  assert characters.source('assistant').count('[[traits]]') == 9


@pytest.mark.parametrize(
  ('old', 'new', 'expected'),
  [
    # The document
    ('name = "small"', 'name = small', 'line 1: this is not valid TOML'),
    ('name = "small"', 'name = ' + '[' * 20_000, 'nested too deeply'),
    ('"I rush."', '9' * 5_000, 'line 8: traits[0].opposites.hasty:|not valid TOML'),
    ('name = "small"', 'name = 3', 'line 1: name: 3 must be text in quotes'),
    ('name = "small"\n', '', 'name: the field is missing'),
    (
      'name = "small"',
      'nmae = "small"',
      'line 1: nmae: unknown field; the fields are name, description, traits',
    ),
    ('name = "small"', 'name = "small"\n"a\\nb" = 1', r"'a\nb': unknown field"),
    # A trait
    ('id = "calm"', 'id = "Calm!"', "line 4: traits[0].id: 'Calm!' is no simple name"),
    ('id = "calm"', 'id = "../x"', 'is no simple name'),
    ('id = "calm"\n', '', 'line 3: traits[0].id: the field is missing; add it'),
    ('id = "calm"', 'id = "calm"\nwieght = 1', 'line 5: traits[0].wieght: unknown field'),
    ('id = "calm"', 'id = "calm"\nweight = -1', 'line 5: traits[0].weight: -1 must be a finite number'),
    ('id = "calm"', 'id = "calm"\nweight = nan', 'line 5: traits[0].weight'),
    ('id = "calm"', 'id = "calm"\nweight = inf', 'line 5: traits[0].weight'),
    ('id = "calm"', 'id = "calm"\nweight = true', 'line 5: traits[0].weight'),
    ('id = "calm"', 'id = "calm"\nweight = "1"', 'line 5: traits[0].weight'),
    ('id = "calm"', 'id = "calm"\nweight = 1' + '0' * 400, 'line 5: traits[0].weight'),
    ('"I stay calm."', '"  "', 'line 5: traits[0].statement: is empty'),
    ('"I stay calm."', f'"{"x" * 10_001}"', 'line 5: traits[0].statement: has 10,001 characters'),
    ('"g", "h"]', ']', 'line 6: traits[0].seeds: has 6; it must be a list of 8 or more'),
    ('"g", "h"]', '"g", 8]', 'line 6: traits[0].seeds[7]: 8 must be text'),
    (SEEDS, 'seeds = "a"\n', "line 6: traits[0].seeds: is 'a'"),
    # Opposites
    (OPPOSITES, 'opposites = "I rush."\n', 'line 7: traits[0].opposites: must be a table'),
    ('hasty = "I rush."', '', 'line 7: traits[0].opposites: must be a table of one or more'),
    (
      'hasty = "I rush."',
      '"too hasty" = "I rush."',
      "traits[0].opposites.'too hasty': 'too hasty' is no simple name",
    ),
    ('hasty = "I rush."', 'hasty = 1', 'line 8: traits[0].opposites.hasty: 1 must be text'),
    # Pairs
    (PAIR, '', 'line 3: traits[0].pairs: the field is missing'),
    ('"shown"', '"kept"', 'traits[0].pairs: none has use = "shown"'),
    ('"shown"', '"shwn"', "line 10: traits[0].pairs[0].use: 'shwn' is unknown; use shown, choosing, kept"),
    (
      'opposite = "hasty"',
      'opposite = "slow"',
      "line 11: traits[0].pairs[0].opposite: 'slow' is unknown; use hasty",
    ),
    ('message = "Hurry?"', 'message = []', 'line 12: traits[0].pairs[0].message: [] must be text'),
    ('message = "Hurry?"\n', '', 'line 9: traits[0].pairs[0].message: the field is missing'),
    ('message = ', 'note = ""\nmessage = ', 'line 12: traits[0].pairs[0].note: unknown field'),
    (
      '"Now, now, now."',
      '"There is time."',
      'line 14: traits[0].pairs[0].out_of_character: equals in_character',
    ),
  ],
  ids=lambda text: text[:30],
)
def test_a_malformed_file_gets_one_line(tmp_path, old, new, expected):
  assert VALID.count(old) == 1
  message = error(tmp_path, VALID.replace(old, new))
  assert any(part in message for part in expected.split('|')), message


def test_lines_are_found_past_other_traits_and_multi_line_strings(tmp_path):
  tricky = VALID.replace('"I stay calm."', '"""I stay\n[[traits]]\ncalm."""')
  second = VALID.replace(HEAD, '').replace('"calm"', '"brave"').replace('"shown"', '"shown"  # [[traits]]')
  text = tricky + second + PAIR.replace('hasty', 'slow')
  line = text.split('\n').index('opposite = "slow"') + 1
  assert f'line {line}: traits[1].pairs[1].opposite' in error(tmp_path, text)


def test_two_traits_may_not_share_an_id(tmp_path):
  message = error(tmp_path, VALID + VALID.replace(HEAD, ''))
  assert "line 16: traits[1].id: 'calm' is also the id of traits[0]" in message


def test_inline_tables_fail_with_the_line_they_begin_on(tmp_path):
  inline = 'traits = [{id = "calm", statement = "I", opposites = 1, seeds = ["a", "b", "c", "d"], pairs = 2}]'
  assert 'line 3: traits[0].opposites: must be a table' in error(tmp_path, HEAD + inline)
  assert 'line 3: traits: must be one or more' in error(tmp_path, HEAD + 'traits = []')
  assert 'line 3: traits[0]: 1 must be a table' in error(tmp_path, HEAD + 'traits = [1]')


def test_broken_utf8_names_its_line(tmp_path):
  broken = VALID.encode().replace(b'I stay', b'I \xff stay')
  assert 'FILE, line 5: broken UTF-8' in error(tmp_path, broken)


def test_a_huge_file_is_refused_unread(tmp_path):
  assert '5,000,001 bytes' in error(tmp_path, b'#' * 5_000_001)


@pytest.mark.parametrize('name', ['no_such_file.toml', 'asistant', '.', ''])
def test_a_missing_file_names_the_shipped_characters(name):
  with pytest.raises(UserError, match=rf'cannot read this character .*\({", ".join(SHIPPED)}\)'):
    characters.load(name)


def test_select_keeps_order_and_refuses_unknown_traits():
  character = characters.load('assistant')
  assert characters.select(character, []) == character
  assert [t.id for t in characters.select(character, ['memory', 'honesty']).traits] == ['honesty', 'memory']
  with pytest.raises(UserError, match="has no trait 'humour'; choose from perspectives"):
    characters.select(character, ['humour'])


def test_select_gives_a_trait_another_weight():
  character = characters.load('assistant')
  chosen = characters.select(character, ['memory:2.5', 'honesty'])
  assert [(t.id, t.weight) for t in chosen.traits] == [('honesty', 1.0), ('memory', 2.5)]
  assert characters.select(character, ['memory:0', 'honesty']).traits[1].weight == 0
  with pytest.raises(UserError, match='the weight of every trait is 0'):
    characters.select(character, ['memory:0', 'honesty:0'])
  for wrong in ('memory:', 'memory:heavy', 'memory:-1', 'memory:nan', 'memory:inf', 'memory:1:2'):
    with pytest.raises(
      UserError, match=f"config.character.traits: '{wrong}': the weight must be a finite number from 0 to 1e9"
    ):
      characters.select(character, [wrong])


def test_characters_are_joined_and_their_text_is_one_character_again(tmp_path):
  a, b = tmp_path / 'a.toml', tmp_path / 'c++.toml'
  a.write_text(VALID.replace('"small"', '\'a "quoted" one\''))
  b.write_text('# Mine.\r\n' + VALID.replace('"calm"', '"kind"').replace('small', 'b'))
  character = characters.load(f'{a}+assistant')
  assert character.name == 'a "quoted" one+assistant' and len(character.traits) == 10
  assert [t.id for t in character.traits[:2]] == ['calm', 'perspectives'] and 'For tests. A' in character.description
  again = write(tmp_path, characters.source(f'{a}+assistant'))
  assert characters.load(again) == character
  # A file whose own name has a + in it is one file.
  assert [t.id for t in characters.load(str(b)).traits] == ['kind'] and characters.source(
    str(b)
  ) == b.read_bytes().decode()


def test_what_cannot_be_joined_is_told(tmp_path):
  a, b = tmp_path / 'a.toml', tmp_path / 'b.toml'
  a.write_text(VALID)
  b.write_text(VALID.replace('small', 'other'))
  with pytest.raises(UserError, match=r'small\+other: small and other both have a trait calm; rename one'):
    characters.load(f'{a}+{b}')
  with pytest.raises(UserError, match="'nobody': cannot read this character"):
    characters.load(f'{a}+nobody')
  pair = '{use = "shown", opposite = "x", message = "?", in_character = "Yes.", out_of_character = "No."}'
  trait = f'{{id = "kind", statement = "I am.", {SEEDS.strip()}, opposites = {{x = "I"}}, pairs = [{pair}]}}'
  b.write_text(HEAD + f'traits = [{trait}]')
  assert len(characters.load(f'{a}+{b}').traits) == 2
  with pytest.raises(UserError, match='must have its traits last, each under'):
    characters.source(f'{a}+{b}')


# Lint

FILLER = ['amber', 'birch', 'cedar', 'dune', 'ember', 'fjord', 'grove', 'heath', 'inlet', 'jetty']


def planted(telltale_in: str = '', telltale_out: str = '', longer: str = '', opening: str = '') -> Character:
  """Three traits whose two sides hold the same filler words, but for what is planted."""
  traits = []
  for name in ('one', 'two', 'three'):
    pairs = []
    for i in range(12):
      words = [f'{name}{i}', *FILLER[i:], *FILLER[:i]]
      inside = ' '.join(filter(None, [opening, *words[:8], telltale_in, longer]))
      outside = ' '.join(filter(None, [*words[:8][::-1], telltale_out]))
      # Which side holds the extra word alternates, so that lengths balance where nothing is planted.
      inside, outside = (inside + ' and', outside) if i % 2 else (inside, outside + ' and')
      pairs.append(Pair(f'{name} {i}?', inside, outside, 'bad', ('shown', 'choosing', 'kept')[i % 3]))
    traits.append(Trait(name, 'I am.', {'bad': 'I am not.'}, tuple(f'{name} seed {i}' for i in range(8)), tuple(pairs)))
  return Character('planted', 'For tests.', tuple(traits))


def problems(character: Character) -> str:
  return '\n'.join(p for finding in character_lint.lint(character) for p in finding.problems)


def test_lint_passes_balanced_pairs():
  assert problems(planted()) == ''


def test_lint_sees_a_word_that_gives_a_side_away():
  findings = character_lint.lint(planted(telltale_in='honestly', telltale_out='whatever'))
  assert all(f.words_pair == 1.0 and f.words_reply == 1.0 for f in findings)
  assert all('words alone' in f.problems[0] for f in findings)


def test_lint_sees_lengths_and_openings():
  assert 'as long' in problems(planted(longer='and so on it goes'))
  assert 'is the longer in' in problems(planted(longer='and so'))
  assert 'the opening "sure" prefers one side' in problems(planted(opening='sure'))


def test_lint_sees_leaks_and_missing_sides():
  character = planted()
  first = character.traits[0]
  seeds = (first.pairs_for('kept')[0].message.upper(), *first.seeds[1:])
  leaky = dataclasses.replace(first, seeds=seeds, opposites={**first.opposites, 'worse': 'I am far from it.'})
  found = problems(dataclasses.replace(character, traits=(leaky, *character.traits[1:])))
  assert 'is used as kept and seed' in found
  assert 'no shown pair for the opposite worse' in found


def test_lint_of_a_single_trait_has_no_word_check():
  character = characters.select(planted(telltale_in='honestly'), ['one'])
  assert character_lint.lint(character)[0].words_pair is None
  assert '-' in character_lint.format_table(character_lint.lint(character))


def test_lint_command(tmp_path, capsys):
  assert main(['character', 'check', write(tmp_path, VALID)]) == 0
  assert (
    main(['character', 'check', write(tmp_path, VALID.replace('There is time', 'There is time for all of it'))]) == 1
  )
  assert 'calm' in capsys.readouterr().out
  # What drives a terminal does not reach it, from wherever in the file it comes.
  lines = characters.source('stoic').splitlines()
  place = next(i for i, line in enumerate(lines) if line.startswith('statement = '))
  lines[place] = r'statement = "\u001b]0;x\u0007 Speaks kindly to all of them."'
  main(['character', 'check', write(tmp_path, '\n'.join(lines))])
  out = capsys.readouterr().out
  assert 'Speaks kindly' in out and '\x1b' not in out and '\x07' not in out


# The characters that ship


@pytest.mark.parametrize('name', [*SHIPPED, *('+'.join(pair) for pair in itertools.combinations(SHIPPED, 2))])
def test_a_shipped_character_passes_lint_alone_and_joined_to_another(name):
  findings = character_lint.lint(characters.load(name))
  assert [f.problems for f in findings] == [()] * len(findings), character_lint.format_table(findings)


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_character_has_traits_and_pairs_enough(name):
  character = characters.load(name)
  assert character.name == name and len(character.traits) >= 4
  for trait in character.traits:
    assert len(trait.seeds) >= 10
    counts = [len(trait.pairs_for(use)) for use in characters.USES]
    assert all(count >= least for count, least in zip(counts, (4, 4, 8), strict=True)), trait.id


def test_shipped_characters_can_be_combined():
  traits = [trait for name in SHIPPED for trait in characters.load(name).traits]
  assert len({trait.id for trait in traits}) == len(traits)
  messages = [' '.join(m.lower().split()) for t in traits for m in (*t.seeds, *(p.message for p in t.pairs))]
  assert [m for m in set(messages) if messages.count(m) > 1] == []


def test_the_assistant_has_the_pairs_its_runs_need():
  character = characters.load('assistant')
  counts = {t.id: [len(t.pairs_for(use)) for use in characters.USES] for t in character.traits}
  assert len(counts) == 9
  assert counts == {trait: [4, 12, 16] for trait in counts}


@pytest.mark.parametrize(
  ('trait', 'vices'),
  [
    ('perspectives', 2),
    ('honesty', 2),
    ('boundaries', 2),
    ('sentience', 2),
    ('goodness', 2),
    ('memory', 2),
    ('leanings', 2),
  ],
)
def test_traits_between_two_vices_have_pairs_on_each_side(trait, vices):
  (found,) = characters.select(characters.load('assistant'), [trait]).traits
  assert len(found.opposites) == vices
  for use in characters.USES:
    sides = [sum(p.opposite == side for p in found.pairs_for(use)) for side in found.opposites]
    assert max(sides) - min(sides) <= 1


@pytest.mark.parametrize('name', [name for name in SHIPPED if name != 'assistant'])
def test_the_pairs_of_a_shipped_character_are_spread_evenly_over_its_vices(name):
  for trait in characters.load(name).traits:
    for use in characters.USES:
      sides = [sum(p.opposite == side for p in trait.pairs_for(use)) for side in trait.opposites]
      assert max(sides) - min(sides) <= 1, (trait.id, use)
