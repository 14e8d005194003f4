"""Ids of 2,000 varied strings equal those of transformers, and no string of a message is ever control."""

import json
import re

import pytest
import test_sentencepiece as pieces
from tokenizer_kinds import KINDS, SPECIAL, texts, tokenizer_json

from charjax.errors import UserError
from charjax.model import tokenizer

transformers = pytest.importorskip('transformers')

TEXTS = list(dict.fromkeys(texts(2400)))[:2000]
# The class that transformers makes of the same vocabulary and merges, with a pre-tokenizer and a decoder of its own.
# Its Llama class leaves out the space before a text that begins with one, unlike SentencePiece and the files that come
# with the models.
CLASSES = {
  'gpt2': ('GPT2Tokenizer', 'gpt2'),
  'qwen': ('Qwen2Tokenizer', 'qwen2'),
  'mistral': ('LlamaTokenizer', 'llama'),
  'gemma': ('GemmaTokenizer', 'gemma2'),
}


def test_the_strings_are_varied():
  assert len(TEXTS) == len(set(TEXTS)) == 2000 and '' in TEXTS
  assert sum(any(token in text for token in SPECIAL) for text in TEXTS) > 300
  assert sum('  ' in text for text in TEXTS) > 300 and len(set(''.join(TEXTS))) > 5000


@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_json_gives_the_ids_of_transformers(tmp_path, kind):
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizer_json(kind))
  ours = tokenizer.from_tokenizer_json(str(path), eos='</s>', pad='<pad>', reply_end='<|im_end|>')
  assert set(ours.special_tokens) == set(SPECIAL)
  peers = [transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))]
  if kind in CLASSES:
    name, model_type = CLASSES[kind]
    ends = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<pad>'}
    settings = {'tokenizer_class': name, 'legacy': False, **ends}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type}))
    peers.append(transformers.AutoTokenizer.from_pretrained(str(tmp_path)))
    assert type(peers[1]).__name__ == name
  plain = [ours.encode(text) for text in TEXTS]
  seeing = [ours.encode(text, special=True) for text in TEXTS]
  for peer in peers:
    assert peer(TEXTS, add_special_tokens=False, split_special_tokens=True)['input_ids'] == plain
    assert peer(TEXTS, add_special_tokens=False)['input_ids'] == seeing
  assert peers[0].batch_decode(seeing, skip_special_tokens=True) == [ours.decode(ids) for ids in seeing]
  # What stands for all that a vocabulary lacks is no control.
  control = set(ours.special_tokens.values()) - {ours.special_tokens['<unk>']}
  assert not any(control & set(ids) for ids in plain) and sum(bool(control & set(ids)) for ids in seeing) > 300


@pytest.mark.parametrize('name', [pieces.V1, pieces.V2, pieces.SMALL, pieces.PLAIN])
def test_a_sentencepiece_model_gives_the_ids_of_transformers(tmp_path, name):
  (tmp_path / 'tokenizer.model').write_bytes(pieces.source(name))
  ours = pieces.ours(name)
  plain = [ours.encode(text) for text in TEXTS]
  # A class that runs the library itself.
  peer = transformers.BertGenerationTokenizer(vocab_file=str(tmp_path / 'tokenizer.model'))
  assert [peer.convert_tokens_to_ids(peer._tokenize(text)) for text in TEXTS] == plain
  control = set(ours.special_tokens.values()) - {pieces.theirs(name).unk_id()}
  assert not any(control & set(ids) for ids in plain)
  if name in (pieces.V1, pieces.V2):
    # One that has turned the model into merges, where it does not take spaces otherwise than the library.
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer"}')
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    alike = [(text, ids) for text, ids in zip(TEXTS, plain, strict=True) if not re.search('^ |  |▁', text)]
    assert len(alike) > 1000
    theirs = peer([text for text, _ in alike], add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert theirs == [ids for _, ids in alike]


def test_a_model_that_finds_special_tokens_by_itself_is_refused(tmp_path):
  """Unigram models keep them among their pieces, as T5's does, and find them in any text."""
  description = json.loads(tokenizer_json('unigram'))
  description['model']['vocab'].append(['</s>', 0.0])
  description['added_tokens'] = [token for token in description['added_tokens'] if token['content'] != '</s>']
  (tmp_path / 'tokenizer.json').write_text(json.dumps(description))
  with pytest.raises(UserError, match='would be control'):
    tokenizer.from_tokenizer_json(str(tmp_path / 'tokenizer.json'), eos='</s>')
