"""Two other llamas to compare with: one in plain float64 NumPy, and transformers' on the same weights."""

import numpy as np

from charjax.model.checkpoint_source import tensor_shapes
from charjax.model.config import ModelConfig


def tiny_config(**changes) -> ModelConfig:
  sizes = {
    'num_layers': 2,
    'embed_dim': 32,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 8,
    'mlp_dim': 64,
    'vocab_size': 48,
  }
  return ModelConfig(**(sizes | changes))


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Weights that give logits of a spread of about 2, so that no two tokens are close to equal by design."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in tensor_shapes(config).items():
    if name.endswith('norm'):
      tensors[name] = rng.uniform(0.5, 1.5, shape)
    else:
      tensors[name] = rng.normal(size=shape) * (2 if name in ('embed', 'head') else 1) * config.embed_dim**-0.5
  return {name: value.astype(np.float32) for name, value in tensors.items()}


# ---- NumPy ----


def numpy_log_probs(config: ModelConfig, tensors, tokens, temperature: float = 1.0) -> np.ndarray:
  """log softmax(logits / temperature) [T, V] in float64 after each token of one text: no batch, padding or cache."""
  weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
  length, half = len(tokens), config.head_dim // 2
  angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(half) / half)
  turn = np.exp(1j * angle)[:, None]  # a rotation of the plane (i, i + H/2) is a product of complex numbers
  causal = np.tril(np.ones((length, length), bool))

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

  def rotate(x):
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], -1)

  x = weights['embed'][list(tokens)]
  for layer in range(config.num_layers):
    block = {name[7:]: value[layer] for name, value in weights.items() if name.startswith('blocks.')}
    normed = norm(x, block['attn_norm'])
    q, k, v = (np.einsum('td,dnh->tnh', normed, block[name]) for name in 'qkv')
    q, k = rotate(q), rotate(k)
    for head in range(config.num_heads):
      group = head // (config.num_heads // config.num_kv_heads)
      score = np.where(causal, q[:, head] @ k[:, group].T / np.sqrt(config.head_dim), -np.inf)
      x = x + softmax(score) @ v[:, group] @ block['o'][head]
    normed = norm(x, block['mlp_norm'])
    gate = normed @ block['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (normed @ block['up'])) @ block['down']
  head = weights['embed'].T if config.tied_embeddings else weights['head']
  return np.log(softmax(norm(x, weights['final_norm']) @ head / temperature))


def softmax(x: np.ndarray) -> np.ndarray:
  weight = np.exp(x - x.max(-1, keepdims=True))
  return weight / weight.sum(-1, keepdims=True)


def numpy_reply(config: ModelConfig, tensors, prompt, reply, temperature: float = 1.0) -> np.ndarray:
  """Log-probs [len(reply)] of the tokens of a reply after its prompt."""
  rows = numpy_log_probs(config, tensors, [*prompt, *reply], temperature)[len(prompt) - 1 : -1]
  return rows[np.arange(len(reply)), list(reply)]


# ---- transformers ----

_LAYER = {
  'attn_norm': 'input_layernorm',
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj',
  'mlp_norm': 'post_attention_layernorm',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}


def transformers_names(tensors) -> dict[str, np.ndarray]:
  """Our tensors (or their gradients) by transformers' names, matrices as [out, in]."""
  out = {'model.embed_tokens.weight': tensors['embed'], 'model.norm.weight': tensors['final_norm']}
  if 'head' in tensors:
    out['lm_head.weight'] = tensors['head'].T
  for name, theirs in _LAYER.items():
    for layer, value in enumerate(tensors[f'blocks.{name}']):
      inputs = value.shape[0] * value.shape[1] if name == 'o' else value.shape[0]
      matrix = value if name.endswith('norm') else value.reshape(inputs, -1)
      out[f'model.layers.{layer}.{theirs}.weight'] = matrix.T
  return out


def transformers_llama(config: ModelConfig, tensors):
  """transformers' LlamaForCausalLM in float32 with these weights."""
  import torch
  import transformers

  theirs = transformers.LlamaConfig(
    num_hidden_layers=config.num_layers,
    hidden_size=config.embed_dim,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.mlp_dim,
    vocab_size=config.vocab_size,
    rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
    rms_norm_eps=config.norm_eps,
    tie_word_embeddings=config.tied_embeddings,
    max_position_embeddings=config.max_length,
  )
  model = transformers.LlamaForCausalLM(theirs)
  state = {name: torch.from_numpy(np.array(value)) for name, value in transformers_names(tensors).items()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'} and (config.tied_embeddings or not missing)
  model.tie_weights()
  return model.eval()


def transformers_replies(model, prompts, replies) -> list[np.ndarray]:
  """log softmax [len(reply), V] from which each token of each reply is predicted; one right-padded batch."""
  import torch

  whole = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
  width = max(map(len, whole))
  tokens = torch.tensor([row + [0] * (width - len(row)) for row in whole])
  real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
  with torch.no_grad():
    hidden = model.model(input_ids=tokens, attention_mask=real).last_hidden_state
    used = [hidden[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(zip(prompts, replies, strict=True))]
    log_probs = torch.log_softmax(model.lm_head(torch.cat(used)), -1).numpy()
  return np.split(log_probs, np.cumsum([len(reply) for reply in replies])[:-1])
