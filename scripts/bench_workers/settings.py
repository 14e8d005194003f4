"""The settings that bench.py tries, by side and task; without --tune the first is taken.

Of each: `dtype`, the precision of products; `preload`, patterns of libraries that the process begins with, below the
folder of peers; `env`, variables. The rest is told in the side's worker.
"""

from typing import Any

Setting = dict[str, Any]

_F32, _BF16 = {'dtype': 'float32'}, {'dtype': 'bfloat16'}
# Float32 products as they are, as fast as torch may make them, and bfloat16.
_TORCH = ({**_F32, 'matmul': 'highest'}, {**_F32, 'matmul': 'medium'}, {**_BF16, 'matmul': 'highest'})
_TCMALLOC = {'preload': ['/usr/lib/*/libtcmalloc_minimal.so.4']}
_IOMP = {'preload': ['/usr/lib/*/libtcmalloc_minimal.so.4', 'vllm/lib/libiomp5.so']}


def _vary(first: Setting, *changes: Setting) -> list[Setting]:
  """A setting, and what becomes of it by each change."""
  return [first, *({**first, **change} for change in changes)]


_SAMPLE = _vary({**_TORCH[0], 'rows': 128}, *_TORCH[1:], {'rows': 64}, {'compile': True}, _TCMALLOC)
_SCORE = _vary({**_TORCH[0], 'rows': 16}, *_TORCH[1:], {'rows': 8}, {'rows': 32}, _TCMALLOC)
# By itself it would leave one of two cores to what hands out the work.
_BIND = {'VLLM_CPU_KVCACHE_SPACE': '3', 'VLLM_CPU_OMP_THREADS_BIND': 'nobind'}
_VLLM = _vary(
  {**_F32, 'rows': 128, 'eager': False, 'env': {**_BIND, 'VLLM_ENABLE_V1_MULTIPROCESSING': '0'}},
  _BF16, {'eager': True}, {'env': _BIND}, _TCMALLOC, _IOMP,
)  # fmt: skip
_REWARD = _vary(
  {**_TORCH[0], 'rows': 8, 'checkpointing': False, 'pairs': 'all'},
  *_TORCH[1:], {'rows': 4}, {'checkpointing': True}, {'pairs': 'two'}, _TCMALLOC,
)  # fmt: skip
_RL = _vary(
  {**_TORCH[0], 'rows': 32, 'checkpointing': False}, *_TORCH[1:], {'rows': 4}, {'checkpointing': True}, _TCMALLOC
)
_LEARNING = _vary({**_F32, 'scan_layers': False}, _BF16, {'scan_layers': True}, {'microbatches': 4}, {'remat': True})
_ENGINE = _vary({**_F32, 'rows': 32}, _BF16, {'scan_layers': False})

SETTINGS: dict[str, dict[str, list[Setting]]] = {
  'charjax': {
    'sample': _vary({**_F32, 'rows': 128}, _BF16),
    'sample_eos': _vary({**_F32, 'rows': 128}, _BF16),
    'score': _ENGINE,
    'score_4': _ENGINE,
    'reward': _LEARNING,
    'rl': _LEARNING,
  },
  'transformers': {'sample': _SAMPLE, 'sample_eos': _SAMPLE, 'score': _SCORE, 'score_4': _SCORE},
  'vllm': {'sample': _VLLM, 'sample_eos': _VLLM},
  'trl': {'reward': _REWARD, 'rl': _RL},
}
