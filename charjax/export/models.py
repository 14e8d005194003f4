"""`charjax export`: which model of a run, or which model alone, becomes a Hugging Face directory."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from charjax import workdir as workdirs
from charjax.errors import UserError
from charjax.export import card
from charjax.export.directory import Model, check_output, published, write
from charjax.model import peft
from charjax.model.checkpoint_source import Tensors
from charjax.model.decoder import Decoder
from charjax.model.lora import merge
from charjax.model.save import DTYPES
from charjax.model.weights import dequantized
from charjax.report.read import Run, read_run, without
from charjax.stages import STAGES, policy, preference
from charjax.training.heads import bind
from charjax.workdir import Session

_MODELS_OF = {'preference': 'train', 'judge': 'judge'}  # as the preference stage calls them


def export(session: Session, kind: str, dtype: str, output: epath.Path) -> None:
  """Writes a model as a directory that transformers loads.

  Args:
    session: the model and, unless `kind` is 'start', the run folder.
    kind: 'policy', 'start', or the preference models: 'preference', which rewarded the policy, and 'judge'; or
      'adapter', the policy's LoRA alone, as PEFT loads it, in float32.
    dtype: 'bfloat16' or 'float32', of the weights.
    output: the directory; one that an export wrote is replaced.

  Raises:
    UserError: the model was not trained, or the output is something else, or cannot be written.
  """
  output = output.resolve()
  if kind == 'adapter':
    _export_adapter(session, output)
    return
  check_output(output, session.config.model.path)
  stage = {'policy': 'policy', 'start': ''}.get(kind, 'preference')
  if stage:
    _check_trained(session, stage)
  checkpoint = session.checkpoint
  check_output(output, checkpoint.source)  # the path may be a run, which reads from elsewhere
  base = os.path.basename(os.path.abspath(session.config.model.path))
  said = base, checkpoint.family, dtype
  thinks = 'enable_thinking' in checkpoint.template.source
  if kind == 'start':
    text, model = card.of_start(*said), _start(session, dtype)
  elif kind == 'policy':
    text, model = card.of_policy(_run(session), *said, thinks), _policy(session)
  else:
    model = _reward(session, kind)
    layers = model.config.num_layers, checkpoint.config.num_layers
    text = card.of_reward(_run(session), *said, thinks, kind, layers)
  with published(output) as folder:
    write(folder, model, checkpoint, dtype, text)
  session.log(f'{output}: {kind} in {dtype}')


def _export_adapter(session: Session, output: epath.Path) -> None:
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise UserError(f'--output={output}: something is there; choose another, or move it away')
  _check_trained(session, 'policy')
  trainable, start = policy.load(session), session.config.model
  if 'adapter' not in trainable:
    raise UserError(
      '--model=adapter: this run trained all parameters (config.policy.lora_rank is 0); leave --model out'
    )
  checkpoint = session.checkpoint
  with published(output) as folder:
    peft.write(trainable['adapter'].arrays(), checkpoint.config, checkpoint.family, folder, start.path)
  beside = ' with its adapters (--model=start writes them together)' if start.adapters else ''
  session.log(f"{output}: the policy's LoRA, which stands beside {start.path}{beside}")


def _check_trained(session: Session, name: str) -> None:
  stage = next(stage for stage in STAGES if stage.name == name)
  state = workdirs.status(stage, session)
  if state != 'done':
    raise UserError(
      f'{session.folder(name)}: {state}, and export reads it; run charjax {name} first, or export the model that it '
      'starts from: --model=start'
    )


def _run(session: Session) -> Run:
  """The run folder, without an evaluation that is not up to date, as one of another policy."""
  run = read_run(session.workdir)
  stage = next(stage for stage in STAGES if stage.name == 'evaluation')
  if workdirs.status(stage, session) == 'done':
    return run
  if run.summary or 'evaluation' in run.outdated:
    session.log('the evaluation is left out of the card: it is not up to date; charjax evaluation makes it anew')
  return without(run, ['evaluation'])


def _start(session: Session, dtype: str) -> Model:
  tensors = session.checkpoint.tensors

  def get(name: str) -> Any:
    if not isinstance(tensors, Tensors):
      return tensors[name]
    # Something may be added to norms, before they are rounded.
    return tensors.read(name, np.float32 if name.endswith('norm') else DTYPES[dtype])

  return Model('start', session.checkpoint.config, get)


def _policy(session: Session) -> Model:
  decoder = _merged(*bind(session.model.decoder, policy.load(session)))
  return Model('policy', decoder.config, _arrays(decoder))


def _reward(session: Session, kind: str) -> Model:
  trainable = preference.load(session, _MODELS_OF[kind])
  decoder = _merged(*bind(preference.trunk(session), trainable))
  head = np.asarray(jax.device_get(trainable['head'].w[...]))
  traits = [trait.id for trait in session.character.traits]
  return Model(kind, decoder.config, _arrays(decoder), head, traits)


def _merged(decoder: Decoder, adapter: Any) -> Decoder:
  return dequantized(decoder) if adapter is None else merge(decoder, adapter)


def _arrays(decoder: Decoder) -> Callable[[str], Any]:
  def get(name: str) -> Any:
    owner, _, last = name.rpartition('.')
    return getattr(decoder.blocks if owner else decoder, last)[...]

  return get
