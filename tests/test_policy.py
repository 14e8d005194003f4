"""What the policy stage puts beside the model: which stored replies join a group, and what each token earns there."""

import numpy as np
from ml_collections import ConfigDict

from charjax.engine.score import Group, make_rows, reply_mask
from charjax.stages import policy
from charjax.workdir import write_jsonl


class Words:
  """A language model's two lines of tokenizer: a token a word, 0 at the end."""

  def reply(self, text, ended=True):
    return [int(word) for word in text.split()] + [0] * ended


class Run:
  def __init__(self, folder, stored):
    self.config = ConfigDict({'policy': {'stored_replies': stored, 'max_new_tokens': 3}})
    self.model, self._folder = Words(), folder

  def folder(self, name):
    return self._folder / name


def test_stored_replies_take_turns_in_and_out_of_character(tmp_path):
  rows = [
    ('a', 'plain', 0, '1', 'stop'),
    ('a', 'shown', 0, '2', 'stop'),
    ('a', 'shown', 1, '3 3 3 3 3', 'length'),
    ('a', 'opposed', 0, '4', 'stop'),
    ('b', 'opposed', 1, '5', 'stop'),  # its others were dropped
  ]
  (tmp_path / 'replies').mkdir()
  write_jsonl(
    tmp_path / 'replies' / 'replies.jsonl',
    [
      {'id': f'{m}/{condition}/{k}', 'message': m, 'condition': condition, 'text': text, 'finish': finish}
      for m, condition, k, text, finish in rows
    ],
  )
  everything = policy._stored_replies(Run(tmp_path, 9))
  assert everything == {'a': [[2, 0], [4, 0], [1, 0], [3, 3, 3]], 'b': [[5, 0]]}
  assert policy._stored_replies(Run(tmp_path, 2)) == {'a': [[2, 0], [4, 0]], 'b': [[5, 0]]}


def rollout(scores, lengths, weights):
  """A rollout of prompts with three replies each, the last of them stored."""
  groups = [Group([1, 2], [[7] * n for n in lengths[i : i + 3]]) for i in range(0, len(lengths), 3)]
  rows = make_rows(groups, each=3, prompt_width=4, width=scores.shape[1] + 1)
  group = [{'weight': weight} for weight in weights for _ in range(3)]
  fresh = np.tile([True, True, False], len(weights))
  zeros = np.zeros_like(scores)
  return policy._Rollout(group, [], rows, fresh, zeros, zeros, scores, scores.mean(1))


def test_advantages_are_among_the_replies_to_one_prompt_and_weighted_by_trait():
  config = ConfigDict({'replies_per_prompt': 2, 'stored_replies': 1, 'kl': 0.1, 'discount': 1.0})
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(6, 4)).astype(np.float32)
  lengths = [4, 4, 4, 4, 2, 4]
  plain = rollout(scores, lengths, [1.0, 1.0])
  found = policy._advantages(plain, config)
  # With all replies as long, and each token answering for the whole: GRPO's (r - mean) / std.
  rewards = scores[:3].mean(1)
  np.testing.assert_allclose(
    found[:3], np.repeat(((rewards - rewards.mean()) / rewards.std())[:, None], 4, 1), rtol=1e-2
  )
  assert not found[4][2:].any() and reply_mask(plain.rows)[4].tolist() == [True, True, False, False]
  # Another prompt's replies, however good, change nothing; a trait's weight is a factor.
  other = scores.copy()
  other[3:] += 100
  np.testing.assert_allclose(policy._advantages(rollout(other, lengths, [1.0, 1.0]), config)[:3], found[:3], atol=1e-5)
  weighted = policy._advantages(rollout(scores, lengths, [3.0, 1.0]), config)
  np.testing.assert_allclose(weighted, found * np.repeat([3, 1], 3)[:, None], rtol=1e-5)
