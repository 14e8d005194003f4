"""sample and sample_eos of bench.py with vLLM.

A setting: `dtype`; `rows`, the most sequences that are decoded together; `eager`, without its compiled graph.
"""

from typing import Any

import vllm
from protocol import serve

_LONGEST = 512  # tokens of a prompt and its reply


class Sample:
  def __init__(self, job: dict[str, Any]):
    self._data, setting = job['data'], job['setting']
    self._model = vllm.LLM(
      model=job['model'],
      dtype=setting['dtype'],
      max_model_len=_LONGEST,
      max_num_seqs=setting['rows'],
      enforce_eager=setting['eager'],
      disable_log_stats=True,
    )

  def _draw(self, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    # What an earlier round left of the prompts would be work saved.
    self._model.reset_prefix_cache()
    asked = [{'prompt_token_ids': prompt} for prompt in prompts]
    found = self._model.generate(asked, vllm.SamplingParams(**more), use_tqdm=False)
    return [list(one.token_ids) for request in found for one in request.outputs]

  def warm_up(self) -> dict[str, Any]:
    self._draw(self._data['prompts'][:16], n=self._data['each'], max_tokens=8)
    return {'greedy': self._draw(self._data['prompts'][:16], temperature=0.0, max_tokens=8)}

  def go(self) -> dict[str, Any]:
    out = self._draw(
      self._data['prompts'], n=self._data['each'], temperature=1.0, max_tokens=self._data['max_new_tokens'],
      ignore_eos=not self._data['eos'],
    )  # fmt: skip
    lengths = list(map(len, out))
    return {'done': sum(lengths), 'mean_length': sum(lengths) / len(lengths)}


if __name__ == '__main__':
  serve(Sample)
