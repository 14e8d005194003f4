"""reward and rl of bench.py with TRL's RewardTrainer and GRPOTrainer.

A setting: `dtype`, bfloat16 being TRL's mixed precision beside float32 weights; `matmul`, torch's precision of float32
products; `rows`, pairs or replies whose gradient is computed together; `checkpointing`, of activations; for rewards
`pairs`, all six of four ranked replies, or two with each reply in one.
"""

import itertools
import os
import tempfile
import threading
import traceback
from typing import Any

import datasets
import torch
import transformers
import trl
from protocol import serve

_PAIRS = {'all': list(itertools.combinations(range(4), 2)), 'two': [(0, 2), (1, 3)]}  # the better reply is the first


class _Turns(transformers.TrainerCallback):
  """Holds a trainer's loop, in a thread of its own, before each step."""

  def __init__(self) -> None:
    self._wanted, self._done = threading.Semaphore(0), threading.Semaphore(0)
    self._logs: dict[str, float] = {}

  def on_step_begin(self, *_: Any, **__: Any) -> None:
    self._wanted.acquire()

  def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
    # Written at the end of each step.
    self._logs = logs
    self._done.release()

  def take(self) -> dict[str, float]:
    """Lets the loop do a step, and returns what it logged."""
    self._wanted.release()
    self._done.acquire()
    return self._logs


class _Worker:
  def __init__(self, job: dict[str, Any]):
    self.data, self.setting = job['data'], job['setting']
    torch.set_num_threads(job['threads'])
    torch.set_float32_matmul_precision(self.setting['matmul'])
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(job['model'])
    # By itself it is what ends a turn, and would not be learned.
    self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)
    self.turns = _Turns()
    self.trainer = self.make(job['model'])
    self.trainer.add_callback(self.turns)
    threading.Thread(target=self._train, daemon=True).start()

  def make(self, model: str) -> transformers.Trainer:
    raise NotImplementedError

  def _train(self) -> None:
    try:
      self.trainer.train()
    except BaseException:
      traceback.print_exc()
      os._exit(1)

  def warm_up(self) -> dict[str, Any]:
    """The first step: the data of both sides move on alike."""
    return self.go()

  def go(self) -> dict[str, Any]:
    raise NotImplementedError

  def arguments(self, rows: int) -> dict[str, Any]:
    """Those of both trainers, for steps of `rows` rows; optimizer and schedule as charjax has them."""
    at_once = min(rows, self.setting['rows'])
    return {
      'output_dir': tempfile.mkdtemp(),
      'max_steps': 10**6,
      'per_device_train_batch_size': at_once,
      'gradient_accumulation_steps': rows // at_once,
      'bf16': self.setting['dtype'] == 'bfloat16',
      'gradient_checkpointing': self.setting['checkpointing'],
      'learning_rate': self.data['learning_rate'],
      'lr_scheduler_type': 'constant',
      'adam_beta2': 0.99,
      'weight_decay': 0.0,
      'max_grad_norm': 1.0,
      'optim': 'adamw_torch_fused',
      'save_strategy': 'no',
      'report_to': 'none',
      'logging_steps': 1,
      'disable_tqdm': True,
      'use_cpu': not torch.cuda.is_available(),
    }


class Reward(_Worker):
  def make(self, model: str) -> transformers.Trainer:
    pairs, size = _PAIRS[self.setting['pairs']], self.data['prompts_a_step']
    rows = [
      {'chosen_ids': row['prompt'] + row['replies'][i], 'rejected_ids': row['prompt'] + row['replies'][j]}
      for row in self.data['train']
      for i, j in pairs
    ]
    count = size * len(pairs)
    # Of each step, pairs of like length together: less padding.
    steps = [rows[begin : begin + count] for begin in range(0, len(rows), count)]
    rows = [row for step in steps for row in sorted(step, key=lambda row: max(map(len, row.values())))]
    arguments = self.arguments(count) | {'train_sampling_strategy': 'sequential', 'max_length': None}
    return trl.RewardTrainer(
      model, trl.RewardConfig(**arguments), train_dataset=datasets.Dataset.from_list(rows),
      processing_class=self.tokenizer,
    )  # fmt: skip

  def go(self) -> dict[str, Any]:
    return {'done': self.data['prompts_a_step'], 'loss': self.turns.take()['loss']}

  def measure(self) -> dict[str, Any]:
    """How many pairs of held-out replies the rewards order rightly."""
    right = []
    self.trainer.model.eval()
    for row in self.data['heldout']:
      rewards = [self._reward(row['prompt'] + reply) for reply in row['replies']]
      right += [rewards[i] > rewards[j] for j in range(len(rewards)) for i in range(j)]
    return {'accuracy': sum(right) / len(right)}

  def _reward(self, ids: list[int]) -> float:
    with torch.inference_mode():
      return float(self.trainer.model(torch.tensor([ids], device=self.trainer.model.device)).logits)


class Policy(_Worker):
  """rl. A reply's reward is what charjax is given: how many of its ids are even."""

  def make(self, model: str) -> transformers.Trainer:
    each, new = self.data['each'], self.data['max_new_tokens']
    rows, size = self.data['messages'], self.data['prompts_a_step']
    config = trl.GRPOConfig(
      **self.arguments(size * each), num_generations=each, max_completion_length=new, beta=0.04,
      temperature=1.0, top_p=1.0, top_k=0, generation_kwargs={'min_new_tokens': new}, shuffle_dataset=False,
      model_init_kwargs={'dtype': 'float32'},
    )  # fmt: skip

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
      return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    told = self.tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=True)['input_ids']
    if told != self.data['prompts']:
      raise ValueError('the chat template of transformers gives other ids')
    return trl.GRPOTrainer(
      model, rewards, config, train_dataset=datasets.Dataset.from_list([{'prompt': row} for row in rows]),
      processing_class=self.tokenizer,
    )  # fmt: skip

  def go(self) -> dict[str, Any]:
    logs, rows = self.turns.take(), self.data['prompts_a_step'] * self.data['each']
    tokens = round(logs['completions/mean_length'] * rows)
    return {'done': 1, 'tokens': tokens, 'entropy': logs['entropy'], 'kl': logs['kl']}


if __name__ == '__main__':
  serve(lambda job: {'reward': Reward, 'rl': Policy}[job['task']](job))
