"""sample, sample_eos, score and score_4 of bench.py as a user of transformers would do them.

A setting: `dtype`; `matmul`, torch's precision of float32 products; `rows` in a batch; for sampling `compile`, of its
decoding step, with a cache of fixed size. Its continuous batching is not tried: on a CPU it takes 60% of all memory.
"""

from typing import Any

import torch
import transformers
from protocol import serve

_LOGITS = 512  # tokens whose log-probs over the vocabulary are computed together
_DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class _Worker:
  def __init__(self, job: dict[str, Any]):
    self.data, self.setting = job['data'], job['setting']
    torch.set_num_threads(job['threads'])
    torch.set_float32_matmul_precision(self.setting['matmul'])
    dtype = getattr(torch, self.setting['dtype'])
    model = transformers.AutoModelForCausalLM.from_pretrained(job['model'], dtype=dtype)
    self.model = model.to(_DEVICE).eval()


class Sample(_Worker):
  """sample and sample_eos."""

  def _draw(self, prompts: list[list[int]], each: int, **more: Any) -> torch.Tensor:
    """New tokens [prompts * each, N], those behind the end of a reply being the pad id."""
    width = max(map(len, prompts))
    pad = self.model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=_DEVICE)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=_DEVICE)
    with torch.inference_mode():
      out = self.model.generate(ids, attention_mask=mask, num_return_sequences=each, pad_token_id=pad, **more)
    return out[:, width:]

  def _sampled(self, prompts: list[list[int]], tokens: int) -> torch.Tensor:
    if not self.data['eos']:
      self.model.generation_config.eos_token_id = None
    compiling = {}
    if self.setting.get('compile'):
      config = transformers.CompileConfig(mode='default')
      config._compile_all_devices = True
      compiling = {'cache_implementation': 'static', 'compile_config': config}
    return self._draw(
      prompts, self.data['each'], do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens,
      **compiling,
    )  # fmt: skip

  def warm_up(self) -> dict[str, Any]:
    greedy = self._draw(self.data['prompts'][:16], 1, do_sample=False, max_new_tokens=8)
    rows = self.setting['rows'] // self.data['each']
    # A step that is compiled knows the length of its cache.
    tokens = self.data['max_new_tokens'] if self.setting.get('compile') else 8
    self._sampled(sorted(self.data['prompts'], key=len)[:rows], tokens)
    return {'greedy': greedy.tolist()}

  def go(self) -> dict[str, Any]:
    prompts, rows = sorted(self.data['prompts'], key=len), self.setting['rows'] // self.data['each']
    lengths: list[int] = []
    for begin in range(0, len(prompts), rows):
      out = self._sampled(prompts[begin : begin + rows], self.data['max_new_tokens'])
      lengths += self._lengths(out)
    return {'done': sum(lengths), 'mean_length': sum(lengths) / len(lengths)}

  def _lengths(self, out: torch.Tensor) -> list[int]:
    """Of replies, with the id that ended them."""
    if not self.data['eos']:
      return [out.shape[1]] * len(out)
    ended = torch.isin(out, torch.tensor(self.model.generation_config.eos_token_id, device=_DEVICE))
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
    return first.tolist()


class Score(_Worker):
  """score and score_4: each sequence is read as a whole, and logits are computed of the replies alone."""

  def warm_up(self) -> None:
    self._some(list(range(self.setting['rows'])))

  def go(self) -> dict[str, Any]:
    prompts, replies = self.data['prompts'], self.data['replies']
    lengths = [len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    found = [0.0] * len(prompts)
    for begin in range(0, len(order), self.setting['rows']):
      some = order[begin : begin + self.setting['rows']]
      for i, value in zip(some, self._some(some), strict=True):
        found[i] = value
    return {'done': sum(lengths), 'log_probs': found}

  def _some(self, some: list[int]) -> list[float]:
    """Mean log-probs of the replies at these places."""
    prompts, replies = ([self.data[name][i] for i in some] for name in ('prompts', 'replies'))
    whole = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, whole))
    # Padded on the right, where causal attention does not look: no mask is needed, and none is faster.
    ids = torch.tensor([one + [0] * (width - len(one)) for one in whole], device=_DEVICE)
    with torch.inference_mode():
      hidden = self.model.model(ids, use_cache=False).last_hidden_state
      parts = zip(hidden, prompts, replies, strict=True)
      states = torch.cat([row[len(prompt) - 1 : len(prompt) - 1 + len(reply)] for row, prompt, reply in parts])
      said = torch.tensor([token for reply in replies for token in reply], device=_DEVICE)
      chunks = zip(states.split(_LOGITS), said.split(_LOGITS), strict=True)
      log_probs = torch.cat([self._log_probs(*chunk) for chunk in chunks])
    return [float(one.mean()) for one in log_probs.split([len(reply) for reply in replies])]

  def _log_probs(self, states: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(self.model.lm_head(states).float(), said, reduction='none')


if __name__ == '__main__':
  serve(lambda job: (Sample if job['task'].startswith('sample') else Score)(job))
