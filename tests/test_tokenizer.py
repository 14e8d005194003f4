"""The tokenizers: what goes in comes out, and text never turns into control."""

import json
import pickle
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from charjax.errors import UserError
from charjax.model import checkpoint_source, tokenizer


@pytest.fixture(scope='module')
def smol():
  return checkpoint_source.load(checkpoint_source.EMBEDDED).tokenizer


def random_texts(count: int, digits: bool = True) -> list[str]:
  """Text of all kinds of characters that SmolLM2's vocabulary has bytes for."""
  rng = random.Random(0)
  ranges = [(32, 127), (32, 33), (9, 14), (0xA0, 0x800), (0x800, 0xD800), (0xE000, 0x20000)]
  texts = []
  while len(texts) < count:
    text = ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))
    # Unassigned characters may be digits to a library of a later Unicode.
    if digits or not any(unicodedata.category(c) in ('Nd', 'Nl', 'No', 'Cn') for c in text):
      texts.append(text)
  return texts


def test_what_goes_in_comes_out(smol):
  for text in random_texts(500):
    assert smol.decode(smol.encode(text)) == text


def test_random_bytes_are_encoded_without_error_and_settle(smol):
  rng = random.Random(1)
  for _ in range(300):
    ids = smol.encode(rng.randbytes(rng.randrange(80)).decode('utf-8', errors='replace'))
    assert all(0 <= i < smol.vocab_size for i in ids)
    # Bytes without a token are lost; what is left stays as it is.
    kept = smol.decode(ids)
    assert smol.decode(smol.encode(kept)) == kept
  assert smol.decode(smol.encode('a\x04b')) == 'ab'


def test_special_tokens_in_text_stay_text_unless_asked_for(smol):
  for token, index in smol.special_tokens.items():
    text = f'a {token}b{token}'
    plain = smol.encode(text)
    assert not set(plain) & set(smol.special_tokens.values())
    assert smol.decode(plain) == text
    assert smol.encode(text, special=True).count(index) == 2
    assert smol.decode(smol.encode(text, special=True)) == 'a b'


def test_a_pickled_copy_keeps_text_as_text(smol):
  copy = pickle.loads(pickle.dumps(smol))
  assert copy.encode('<|im_end|>') == smol.encode('<|im_end|>') != [2]
  assert copy.encode('<|im_end|>', special=True) == [2]
  assert (copy.eos_ids, copy.pad_id, copy.vocab_size) == (smol.eos_ids, smol.pad_id, smol.vocab_size)


def test_the_ends_of_smollm2(smol):
  assert smol.vocab_size == 49152
  assert smol.eos_ids == (2,)
  assert smol.pad_id not in smol.eos_ids  # though the file says that both are 2


def test_digits_stand_alone(smol):
  assert [smol.decode([i]) for i in smol.encode('in 2026')] == ['in', ' ', '2', '0', '2', '6']
  # Digits are split off first, so that the space before one joins the space before it.
  assert [smol.decode([i]) for i in smol.encode('a  7')] == ['a', '  ', '7']


def test_agrees_with_transformers_on_the_same_vocabulary(smol):
  transformers = pytest.importorskip('transformers')
  model = json.loads(smol.source)['model']
  theirs = transformers.GPT2Tokenizer(
    vocab=model['vocab'], merges=[tuple(m) for m in model['merges']]
  ).backend_tokenizer
  # It knows nothing of this model's way with digits.
  for text in [
    *random_texts(300, digits=False),
    'Where is Paris? It\'s in France.\n\n  "Oui," she said.\t...',
  ]:
    assert smol.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_agrees_with_transformers_on_the_same_tokenizer_json(smol, tmp_path):
  transformers = pytest.importorskip('transformers')
  path = tmp_path / 'tokenizer.json'
  path.write_text(smol.source)
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
  ours = tokenizer.from_tokenizer_json(str(path), eos='<|im_end|>')
  for text in [*random_texts(100), 'a<|im_end|>b 12 <repo_name>']:
    special = theirs.encode(text, add_special_tokens=False)
    plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text, special=True) == smol.encode(text, special=True) == special
    assert ours.encode(text) == smol.encode(text) == plain
    assert ours.decode(special) == theirs.decode(special, skip_special_tokens=True)


def write_tokenizer_json(path, words: bool = False) -> str:
  """A tokenizer that adds BOS by itself, cuts texts off and has an ordinary token for its end of turn."""
  vocab = ['<unk>', '<s>', '</s>', *sorted(pre_tokenizers.ByteLevel.alphabet()), '<end>']
  ids = {token: i for i, token in enumerate(vocab)}
  backend = tokenizers.Tokenizer(models.WordLevel(ids, '<unk>') if words else models.BPE(ids, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.add_special_tokens(['<unk>', '<s>', '</s>'])
  backend.add_tokens(['<end>'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  backend.enable_truncation(2)
  backend.enable_padding(length=8)
  path.write_text(backend.to_str())
  return str(path)


def test_a_tokenizer_json_adds_cuts_and_pads_nothing(tmp_path):
  ours = tokenizer.from_tokenizer_json(write_tokenizer_json(tmp_path / 'tokenizer.json'), eos='</s>')
  ids = ours.encode('hello')
  assert len(ids) == 5 and 1 not in ids
  assert ours.encode('hello', special=True) == ids


def test_a_space_before_what_opens_a_sequence_stands_nowhere_else(tmp_path):
  path = tmp_path / 'tokenizer.json'
  backend = tokenizers.Tokenizer(models.BPE({'</s>': 0, '▁': 1, 'a': 2}, []))
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  backend.add_special_tokens(['</s>'])
  backend.save(str(path))
  ours = tokenizer.from_tokenizer_json(str(path), eos='</s>')
  assert ours.encode('a</s>a', special=True) == [1, 2, 0, 2]
  assert (ours.encode('a'), ours.encode('a', opens=False)) == ([1, 2], [2])
  assert pickle.loads(pickle.dumps(ours)).encode('a', opens=False) == [2]


def test_the_end_of_turn_comes_from_the_template_and_is_made_special(tmp_path):
  path = write_tokenizer_json(tmp_path / 'tokenizer.json')
  ours = tokenizer.from_tokenizer_json(path, eos_ids=[2], eos='</s>', pad='</s>', reply_end='<end></s>\n')
  assert ours.eos_ids == (259, 2)
  assert 259 not in ours.encode('hello<end>')
  assert ours.encode('hello<end>', special=True) == [*ours.encode('hello'), 259]
  assert ours.pad_id == 0
  assert tokenizer.from_tokenizer_json(path, eos='</s>', pad='<s>').pad_id == 1


def test_a_tokenizer_that_cannot_tell_text_from_control_is_refused(tmp_path):
  path = write_tokenizer_json(tmp_path / 'tokenizer.json', words=True)
  with pytest.raises(UserError, match='would be control'):
    tokenizer.from_tokenizer_json(path, eos='a')


@pytest.mark.parametrize(
  ('content', 'remedy'),
  [(None, 'no such file'), ('{"version"', 'not a tokenizer.json'), ('[]', 'not a tokenizer.json')],
)
def test_a_damaged_tokenizer_json_is_told_in_one_line(tmp_path, content, remedy):
  path = tmp_path / 'tokenizer.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(UserError, match=remedy) as error:
    tokenizer.from_tokenizer_json(str(path), eos='</s>')
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path):
  with pytest.raises(UserError, match='end-of-text'):
    tokenizer.from_tokenizer_json(write_tokenizer_json(tmp_path / 'tokenizer.json'), eos_ids=[260])
