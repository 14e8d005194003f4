"""What a decoder needs to know of itself before its weights are read."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from charjax.errors import UserError

ACTIVATIONS = ('silu', 'gelu_tanh')
ATTENTION = ('auto', 'xla', 'cpu', 'tpu')  # how it is computed, see charjax.model.attention.choose
PROJECTIONS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')  # the weight matrices of a block


class LayerKind(NamedTuple):
  """How a layer differs from others whose weights are shaped alike.

  Attributes:
    window: tokens that each attends to, itself included; None: all before it.
    rotation: which of the decoder's tables of rotary angles it uses (see `charjax.model.decoder.forward`).
  """

  window: Any
  rotation: Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder of blocks of attention over grouped heads and a gated MLP, each added to the residual stream.

  The defaults are llama's: norms before both, rotary positions in all layers, no biases, no experts.

  Attributes:
    num_layers, embed_dim, num_heads, num_kv_heads, head_dim, vocab_size: the shape.
    mlp_dim: width of the MLP, or of one expert.
    norm_eps: added to the mean square in every norm.
    tied_embeddings: whether the output head is the embedding.
    max_length: tokens that it was trained on.
    rope_theta: base of the rotary frequencies.
    rope_factors: the frequency of each rotated pair is multiplied by its factor; () is all 1.
    rope_gain: cosines and sines are multiplied by it.
    rotary_dim: how many of a head's first dimensions are rotated; 0: all.
    local_rope_theta: base of the frequencies, without factors and gain, of layers with a window; 0: as in the others.
    windows: how many tokens each attends to in each layer, itself included, 0 being all; () is all everywhere.
    rope_layers: whether each layer has rotary positions; () is all.
    query_scale: products of queries and keys are multiplied by it; 0: 1 / sqrt(head_dim).
    attention_softcap, logit_softcap: c tanh(x / c) bounds attention scores and output logits; 0: unbounded.
    qkv_bias, o_bias, mlp_bias: which products have a bias.
    qk_norm: queries and keys are normalised before they are rotated: '' not, 'head' each head, 'all' all heads as one.
    pre_norms, post_norms: whether a norm stands before and after attention and the MLP.
    norm_offset: added to the stored scale of every norm.
    embed_scale: embeddings are multiplied by it.
    activation: of the gate: 'silu', or 'gelu_tanh' (Hendrycks and Gimpel 2016, section 2).
    num_experts: how many MLPs a layer has that each token chooses among; 0: one, for all.
    experts_per_token: how many it chooses.
    renormalize_experts: whether the weights of the chosen sum to 1, or stay those of the softmax over all.
  """

  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  vocab_size: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied_embeddings: bool = True
  max_length: int = 2048
  rope_factors: tuple[float, ...] = ()
  rope_gain: float = 1.0
  rotary_dim: int = 0
  local_rope_theta: float = 0.0
  windows: tuple[int, ...] = ()
  rope_layers: tuple[bool, ...] = ()
  query_scale: float = 0.0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: str = ''
  pre_norms: bool = True
  post_norms: bool = False
  norm_offset: float = 0.0
  embed_scale: float = 1.0
  activation: str = 'silu'
  num_experts: int = 0
  experts_per_token: int = 0
  renormalize_experts: bool = True

  def __post_init__(self) -> None:
    for field in ('num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim', 'vocab_size'):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise UserError(f'model shape: {field} is {value!r}; it must be a positive whole number')
    if self.max_length < 1:
      raise UserError(f'model shape: max_length is {self.max_length}; it must be a positive whole number')
    for field in ('rope_theta', 'norm_eps', 'rope_gain', 'embed_scale'):
      value = getattr(self, field)
      if not (math.isfinite(value) and value > 0):
        raise UserError(f'model shape: {field} is {value!r}; it must be a number above 0')
    for field in ('local_rope_theta', 'query_scale', 'attention_softcap', 'logit_softcap'):
      value = getattr(self, field)
      if not (math.isfinite(value) and value >= 0):
        raise UserError(f'model shape: {field} is {value!r}; it must be a number above 0, or 0 for none')
    if self.num_heads % self.num_kv_heads:
      raise UserError(f'model shape: num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})')
    if self.rotated % 2 or not 0 <= self.rotary_dim <= self.head_dim:
      raise UserError(
        f'model shape: {self.rotated} of the {self.head_dim} dimensions of a head (head_dim) are rotated; '
        f'that must be an even number of them'
      )
    for field, wanted in (
      ('windows', self.num_layers),
      ('rope_layers', self.num_layers),
      ('rope_factors', self.rotated // 2),
    ):
      if (found := len(getattr(self, field))) not in (0, wanted):
        raise UserError(f'model shape: {field} has {found} entries; it must have {wanted}')
    if not all(0 <= window < 2**31 for window in self.windows):
      raise UserError('model shape: windows must be between 0, which is none, and 2**31 - 1')
    if not all(0 < factor < math.inf for factor in self.rope_factors):
      raise UserError('model shape: rope_factors must be above 0')
    for field, choices in (('activation', ACTIVATIONS), ('qk_norm', ('', 'head', 'all'))):
      if getattr(self, field) not in choices:
        raise UserError(
          f'model shape: {field} is {getattr(self, field)!r}; choose from {", ".join(map(repr, choices))}'
        )
    if self.num_experts < 0 or not 0 <= self.experts_per_token <= self.num_experts:
      raise UserError(
        f'model shape: {self.experts_per_token} experts per token of {self.num_experts}; it cannot choose more than are'
      )
    if self.num_experts and (not self.experts_per_token or self.mlp_bias):
      raise UserError('model shape: a mixture chooses at least one expert per token, and its experts have no biases')
    if not (self.pre_norms or self.post_norms):
      raise UserError('model shape: neither pre_norms nor post_norms; a block needs one of them')

  @property
  def rotated(self) -> int:
    """How many dimensions of a head are rotated."""
    return self.rotary_dim or self.head_dim

  @property
  def dense_projections(self) -> tuple[str, ...]:
    """The weight matrices that every token goes through: experts are not among them."""
    return PROJECTIONS[:4] if self.num_experts else PROJECTIONS

  def check_targets(self, targets: Sequence[str], what: str) -> None:
    """Whether adapters can stand beside the named projections.

    Raises:
      UserError: beginning with `what`: the decoder lacks one of them.
    """
    for name in targets:
      if name not in self.dense_projections:
        why = 'experts have no adapters' if name in PROJECTIONS else 'there is no such projection'
        raise UserError(f'{what} {name!r}: {why}; choose from {", ".join(self.dense_projections)}')

  def layer_kinds(self) -> list[LayerKind]:
    """What sets each layer apart, in order."""
    windows = self.windows or (0,) * self.num_layers
    rotated = self.rope_layers or (True,) * self.num_layers
    local = bool(self.local_rope_theta)
    # The last table is that of no rotation, where some layers have none.
    none = 1 + local
    return [
      LayerKind(window or None, none if not rope else int(local and window > 0))
      for window, rope in zip(windows, rotated, strict=True)
    ]

  def lower(self, count: int) -> 'ModelConfig':
    """The config of its first `count` layers."""
    return dataclasses.replace(
      self, num_layers=count, windows=self.windows[:count], rope_layers=self.rope_layers[:count]
    )
