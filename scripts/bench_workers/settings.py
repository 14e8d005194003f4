"""The settings that bench.py tries, by side and task, the first being the one that is taken without --tune."""

from typing import Any

_F32, _BF16 = {'dtype': 'float32'}, {'dtype': 'bfloat16'}
_TORCH_F32 = {'dtype': 'float32', 'matmul': 'highest'}
_MEDIUM = {'dtype': 'float32', 'matmul': 'medium'}
_TORCH_BF16 = {'dtype': 'bfloat16', 'matmul': 'highest'}

_SAMPLE = [
  _TORCH_F32 | {'rows': 128},
  _TORCH_F32 | {'rows': 64},
  _MEDIUM | {'rows': 128},
  _TORCH_BF16 | {'rows': 128},
]
_SCORE = [
  _TORCH_F32 | {'rows': 16},
  _TORCH_F32 | {'rows': 8},
  _TORCH_F32 | {'rows': 32},
  _MEDIUM | {'rows': 16},
  _TORCH_BF16 | {'rows': 16},
]

SETTINGS: dict[str, dict[str, list[dict[str, Any]]]] = {
  'charjax': {
    'sample': [_F32 | {'rows': 128}, _BF16 | {'rows': 128}],
    'sample_eos': [_F32 | {'rows': 128}, _BF16 | {'rows': 128}],
    'score': [_F32 | {'rows': 32}, _F32 | {'rows': 32, 'scan_layers': False}, _BF16 | {'rows': 32}],
    'score_4': [_F32 | {'rows': 32}, _F32 | {'rows': 32, 'scan_layers': False}, _BF16 | {'rows': 32}],
    'reward': [_F32, _F32 | {'scan_layers': False}, _BF16],
    'rl': [_F32 | {'rows': 32}, _F32 | {'rows': 32, 'scan_layers': False}, _BF16 | {'rows': 32}],
  },
  'transformers': {'sample': _SAMPLE, 'sample_eos': _SAMPLE, 'score': _SCORE, 'score_4': _SCORE},
}
