"""What a run would take on chips that are not there: memory, time and chip-hours, of figures of its programs.

Times are rooflines: the longest of what the arithmetic, the memory and the links of a chip take at their peaks. No run
is faster; a good one takes about twice as long.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from charjax.chips import GIB, Topology
from charjax.limits import ranked_to_message
from charjax.mesh import make_mesh
from charjax.model.config import ModelConfig
from charjax.plan import programs
from charjax.plan.compiled import compile_program
from charjax.plan.programs import Program, nbytes
from charjax.stages import rollouts
from charjax.training.loop import microbatches


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one call of a program; bytes and seconds are of one chip, FLOPs of all.

  Attributes:
    residents: bytes by name, the program's arguments among them.
    working: bytes that it needs beside them.
    sent: bytes in collectives; None where nothing was compiled.
  """

  name: str
  residents: dict[str, int]
  working: int
  limit: int
  refused: bool
  flops: float
  tokens: int
  sent: float | None
  seconds: float

  @property
  def total(self) -> int:
    return sum(self.residents.values()) + self.working

  @property
  def fits(self) -> bool:
    return not self.refused and self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `charjax plan` says."""

  topology: Topology
  programs: list[Figures]
  stages: dict[str, float]
  remedy: str

  @property
  def fits(self) -> bool:
    return all(figures.fits for figures in self.programs)

  @property
  def chip_hours(self) -> float:
    return self.topology.size * sum(self.stages.values()) / 3600

  def as_json(self) -> dict[str, Any]:
    return {
      'fits': self.fits,
      'chip_hours': self.chip_hours,
      'programs': [
        {
          'name': one.name, 'bytes_per_chip': one.total, 'limit_bytes': one.limit, 'flops': one.flops,
          'seconds': one.seconds,
        }
        for one in self.programs
      ],
    }  # fmt: skip


def make(config: Any, character: Any, shape: ModelConfig, topology: Topology, on_program: Any = None) -> Plan:
  """Compiles the programs of a run for a topology, or of GPUs estimates them, and adds up what it takes.

  Args:
    config: the run's.
    character: with the traits that it trains.
    shape: of its model.
    topology: the chips.
    on_program: called with the name of each program before it is compiled.
  """
  devices = topology.devices or jax.devices('cpu')[: topology.size]
  with jax.set_mesh(make_mesh(config.mesh, devices)):
    found = []
    for program in programs.make(config, character, shape, 'tpu' if topology.devices else 'gpu'):
      if on_program:
        on_program(program.name)
      found.append(_figures(program, topology, shape))
    stages = _stages(config, character, {one.name: one for one in found})
    return Plan(topology, found, stages, _remedy(config, found))


def _figures(program: Program, topology: Topology, shape: ModelConfig) -> Figures:
  chip, residents = topology.chip, {name: nbytes(tree) for name, tree in program.residents.items()}
  if topology.devices:
    compiled = compile_program(program)
    working, sent, refused = compiled.working, compiled.sent, compiled.refused
  else:
    working, sent, refused = _working(program, shape), None, False
  cache = program.repeats * residents.get('cache', 0) / 2 if program.repeats > 1 else 0
  seconds = max(
    program.flops / topology.size / chip.flops / programs.busy(program),
    (program.weight_bytes + cache) / chip.memory_bandwidth,
    (sent or 0.0) / chip.link_bandwidth,
  )
  return Figures(
    program.name, residents, working, int(chip.memory), refused, program.flops, program.tokens, sent, seconds
  )


def _working(program: Program, shape: ModelConfig) -> int:
  """Where nothing is compiled: gradients twice where weights are trained, the residual stream of each layer where it is
  recomputed, a layer's attention scores and MLP, and one layer's weights, float32."""
  mesh = jax.sharding.get_mesh()
  rows = program.residents.get('batch')
  if rows is None:
    return int(2 * programs.block_bytes(shape) / shape.num_layers)
  trained = nbytes(program.residents.get('policy' if program.stage == 'policy' else 'preference model', ()))
  width = programs.width_of(program)
  own = -(-program.rows // (mesh.shape['data'] * mesh.shape['fsdp']))
  steps = program.name.endswith('step')
  stream = 4 * own * width * shape.embed_dim * (shape.num_layers if steps else 1)
  scores = 3 * 4 * own * width * width * shape.num_heads // mesh.shape['tensor']
  mlp = 4 * 4 * own * width * shape.mlp_dim // mesh.shape['tensor']
  layer = 2 * programs.block_bytes(shape) / shape.num_layers
  vocab = 2 * 4 * shape.vocab_size * shape.embed_dim / (mesh.shape['fsdp'] * mesh.shape['tensor'])
  return int((2 * trained if steps else 0) + stream + scores + mlp + layer + vocab)


# ---- the run ----


def _stages(config: Any, character: Any, by_name: dict[str, Figures]) -> dict[str, float]:
  """Seconds of each stage, were every text as long as it may be."""
  decode, scoring = by_name['decode'], by_name['scoring']
  draw = decode.seconds / decode.tokens
  # Scoring by the policy reads every text twice, by the starting and the preference model.
  read = scoring.seconds / scoring.tokens / 2
  traits, messages, replies, policy = len(character.traits), config.messages, config.replies, config.policy
  samples = config.evaluation.samples
  asked = traits * (messages.train_per_trait + messages.heldout_per_trait)
  asked += messages.train_neutral + messages.heldout_neutral
  ranked = traits * messages.train_per_trait * ranked_to_message(replies)
  steps = math.ceil(
    traits * messages.train_per_trait / 2 * config.preference.epochs / config.preference.messages_per_batch
  )
  drawn = policy.prompts_per_step * policy.replies_per_prompt
  held = traits * messages.heldout_per_trait
  parts = rollouts.parts_of_step(policy) if drawn else 0
  judged = parts * sum(by_name[name].seconds for name in ('scoring', 'value head') if name in by_name)
  # Ranked replies are judged once, before the first step.
  ranked_once = 2 * read * traits * messages.train_per_trait * policy.ranked_replies * policy.max_new_tokens
  return {
    'messages': asked * messages.max_new_tokens * draw,
    'replies': ranked * replies.max_new_tokens * draw,
    'rankings': 2 * ranked * replies.max_new_tokens * read,
    'preference': 2 * steps * by_name['preference step'].seconds + ranked * replies.max_new_tokens * read,
    'baseline': held * (samples + 2) * config.evaluation.max_new_tokens * (draw + read),
    'policy': policy.steps * (drawn * policy.max_new_tokens * draw + judged + by_name['policy step'].seconds)
    + ranked_once,
    'evaluation': held * samples * config.evaluation.max_new_tokens * (draw + read),
  }


def _remedy(config: Any, found: Sequence[Figures]) -> str:
  """What would save most of the program that exceeds its limit by most; '' if all fit."""
  short = [one for one in found if not one.fits]
  if not short:
    return ''
  worst = max(short, key=lambda one: one.total - one.limit)
  section = 'preference' if worst.name.startswith('preference') else 'policy'
  choices = {}
  if worst.name in ('scoring', 'policy step', 'preference step'):
    size, each = config.policy.prompts_per_step, rollouts.rows_to_prompt(config.policy)
    if section == 'preference':
      size, each = config.preference.messages_per_batch, ranked_to_message(config.replies)
    parts = microbatches(config[section].microbatches, size, each)
    more = next((n for n in range(parts + 1, size + 1) if microbatches(n, size, each) == n), None)
    if more:
      choices[f'config.{section}.microbatches={more}'] = worst.working * (1 - parts / more)
  if cache := worst.residents.get('cache', 0):
    choices[f'config.policy.batch_size={max(1, config.policy.batch_size // 2)}'] = cache / 2
  for one, names in (
    ('policy', ('policy', 'Adam moments')),
    ('preference', ('preference model', 'other preference model', 'Adam moments')),
  ):
    own = names if one == section else names[:1]
    if not config[one].lora_rank and (held := sum(worst.residents.get(name, 0) for name in own)):
      choices[f'config.{one}.lora_rank=64'] = held
  choices['twice as many chips, over which weights and batches are split'] = worst.total / 2
  best = max(choices, key=choices.__getitem__)
  over = (worst.total - worst.limit) / GIB
  return (
    f'{worst.name} needs {worst.total / GIB:.1f} GiB a chip, {max(over, 0):.1f} too many; what saves most: {best} '
    f'(about {choices[best] / GIB:.1f} GiB)'
  )


# ---- in words ----


def as_text(plan: Plan) -> str:
  """A table of the programs, and what the run takes."""
  heads = ('program', 'GiB a chip', 'of', 'resident', 'working', 'PFLOP', 'GB sent', 'seconds', 'tokens/s')
  rows = [
    (
      one.name,
      f'{one.total / GIB:.2f}',
      f'{one.limit / GIB:.2f}',
      f'{sum(one.residents.values()) / GIB:.2f}',
      f'{one.working / GIB:.2f}',
      f'{one.flops / 1e15:.2f}',
      '-' if one.sent is None else f'{one.sent / 1e9:.1f}',
      f'{one.seconds:.2f}',
      f'{one.tokens / one.seconds:.0f}' + ('' if one.fits else '  does not fit'),
    )
    for one in plan.programs
  ]
  lines = [f'{name:<16}' + ''.join(f'{text:>11}' for text in others) for name, *others in (heads, *rows)]
  widest = max(plan.programs, key=lambda one: one.total)
  lines.append(
    f'resident in {widest.name}, GiB a chip: '
    + ', '.join(f'{name} {size / GIB:.2f}' for name, size in widest.residents.items() if size / GIB >= 0.005)
  )
  hours = ', '.join(f'{name} {seconds / 3600:.2f}' for name, seconds in plan.stages.items())
  lines.append(f'hours at the peaks of the chips, every text as long as it may be, without behaviour: {hours}')
  lines.append(f'{plan.chip_hours:.1f} chip-hours on {plan.topology.name} ({plan.topology.size} chips)')
  lines.append('fits' if plan.fits else f'does not fit: {plan.remedy}')
  if plan.topology.devices is None:
    lines.append('An estimate: programs are compiled for TPUs alone.')
  return '\n'.join(lines)
