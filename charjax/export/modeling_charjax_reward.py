"""A preference model of charjax as transformers runs it: rewards of the last reply in a conversation, one a trait.

The trunk is the lower layers of a language model and its final norm. The reward for a trait is the inner product of the
trait's direction with the mean of the trunk's states over the tokens of the reply, its end-of-turn token included.

Letters: B conversations, T tokens, H tokens of the header, N traits, D width.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class CharacterRewardConfig(PretrainedConfig):
  """What the model is.

  Attributes:
    trunk: the config.json of the lower layers.
    reply_header: the ids that stand right before an assistant's reply.
    turn_ends: the ids of which the first in a reply is its last token.
  """

  model_type = 'charjax_reward'

  def __init__(self, trunk: Any = None, reply_header: Any = (), turn_ends: Any = (), **kwargs: Any):
    self.trunk, self.reply_header, self.turn_ends = trunk, list(reply_header), list(turn_ends)
    super().__init__(**kwargs)


class CharacterRewardModel(PreTrainedModel):
  """Scores the last reply in each conversation: `logits` [B, N], in the order of `config.id2label`."""

  config_class = CharacterRewardConfig
  base_model_prefix = 'model'
  # Rewards are small differences of large sums.
  _keep_in_fp32_modules_strict = ['traits']  # noqa: RUF012

  def __init__(self, config: Any):
    super().__init__(config)
    # The plain implementation of attention is the one that knows all that families do.
    trunk = AutoConfig.for_model(**{**config.trunk, 'use_cache': False})
    self.model = AutoModel.from_config(trunk, attn_implementation='eager')
    self.traits = torch.nn.Linear(trunk.hidden_size, config.num_labels, bias=False)
    self.post_init()

  def forward(
    self, input_ids: Any, attention_mask: Any = None, reply_mask: Any = None, **kwargs: Any
  ) -> SequenceClassifierOutput:
    """Rewards of replies.

    Args:
      input_ids: [B, T] conversations that end with a reply, padded on either side.
      attention_mask: [B, T] 1 where a token is real; all are by default.
      reply_mask: [B, T] 1 at the tokens of the reply; found by default: what follows the last header, up to the first
        end of turn.
      kwargs: not read, such as token_type_ids.

    Raises:
      ValueError: there is no reply in a conversation.
    """
    del kwargs
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    reply = self.find_reply(input_ids, mask) if reply_mask is None else reply_mask.bool() & mask.bool()
    count = reply.sum(1)
    if (count == 0).any():
      row = int((count == 0).nonzero()[0])
      raise ValueError(f'conversation {row} has no reply: it must end with what the assistant said')
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    hidden = self.model(input_ids, attention_mask=mask, position_ids=positions).last_hidden_state
    mean = torch.where(reply[..., None], hidden.float(), 0.0).sum(1) / count[:, None]
    return SequenceClassifierOutput(logits=self.traits(mean))

  def find_reply(self, input_ids: Any, attention_mask: Any) -> Any:
    """[B, T] which tokens belong to the last reply."""
    header = torch.tensor(self.config.reply_header, device=input_ids.device)
    ends = torch.tensor(self.config.turn_ends, device=input_ids.device)
    real, size = attention_mask.bool(), len(header)
    if input_ids.shape[1] < size:
      return torch.zeros_like(real)
    found = (input_ids.unfold(1, size, 1) == header).all(-1) & real.unfold(1, size, 1).all(-1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    # 0 where there is no header: the first place after one is its length at least.
    begin = torch.where(found, places[: found.shape[1]] + size, 0).amax(1, keepdim=True)
    reply = real & (places >= begin) & (begin > 0)
    ended = torch.isin(input_ids, ends) & reply
    return reply & (ended.long().cumsum(1) - ended.long() == 0)
