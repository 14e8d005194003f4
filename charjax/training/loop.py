"""The loop around the train step, alike for all that is trained: restored, stepped, watched, written, saved."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import optax
from etils import epath

from charjax import hosts
from charjax.mesh import batch_parts, fetch
from charjax.progress import Metrics, Progress
from charjax.training.checkpoint import Checkpoints
from charjax.training.interrupts import Interrupts
from charjax.training.skipped import Skipped
from charjax.training.step import Batch, Loss, init_optimizer, make_step

# (step, what the data gave, trainable) -> what the step learns from, and figures that stand beside the loss's.
NextBatch = Callable[[int, Any, Any], tuple[Batch, Mapping[str, float]]]


def train(
  folder: epath.Path,
  checkpoints: Checkpoints,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  trainable: Any,
  frozen: Any,
  data: Any,
  next_batch: NextBatch,
  *,
  steps: int,
  save_every: int,
  skipped_steps: int,
  bar: Progress,
  note: Callable[[Mapping[str, float]], str],
  prepare: Callable[[Any, Metrics], None] | None = None,
  prepared: int = 0,
  finish: Callable[[Any], None] | None = None,
  save_after: Collection[int] = (),
) -> Any:
  """Trains for `steps` steps, or what is left of them after the latest checkpoint; an interrupt waits for a checkpoint
  of what was learned.

  Args:
    folder: for metrics.jsonl, TensorBoard's events and the batch of a step that was not finite.
    checkpoints: where the state is kept.
    loss: of (trainable, frozen, batch).
    optimizer: for `loss`.
    trainable: what is trained, as it is before the first step.
    frozen: weights that the loss reads and that stay as they are.
    data: an iterator as training.data makes them, whose position is saved.
    next_batch: what a step's batch is made by.
    steps: how many there are in all.
    save_every: steps from one checkpoint to the next; the last step is saved too.
    skipped_steps: so many steps that were not finite stop the run.
    bar: counts steps.
    note: what stands behind the bar, of a step's figures.
    prepare: called before the first step, unless it is done and saved: changes `trainable` in place, and may write
      metrics.
    prepared: lines of metrics, and of the bar's steps, that `prepare` makes; those of the steps are numbered on.
    finish: called after the last step, before it is saved: changes `trainable` in place.
    save_after: steps that are saved besides; `checkpoints` is to keep them.

  Returns:
    What was trained.

  Raises:
    UserError: too many steps were not finite, or the checkpoint cannot be used.
  """
  state, layout = init_optimizer(optimizer, trainable)
  step_function = make_step(loss, optimizer, trainable, layout)

  def save(step: int, position: Any, kept: bool = False) -> None:
    metrics.flush()  # who goes on from this checkpoint finds the rows of its steps
    hosts.at(f'saving after step {step}')
    checkpoints.save(step, trainable, state, position, kept)
    hosts.at(f'saved after step {step}')

  with Metrics(folder) as metrics, Interrupts() as interrupts:
    start, trainable, state, position = checkpoints.restore(trainable, state)
    if position:
      data.set_state(position)
      bar.skip(prepared + start)
    elif prepare:
      metrics.truncate_after(0)
      prepare(trainable, metrics)
      save(0, data.get_state())
    metrics.truncate_after(prepared + start)
    skipped = Skipped(folder, skipped_steps)
    saved = start
    for step in range(start + 1, steps + 1):
      position = data.get_state()
      made, interrupted = interrupts.work(partial(_make, next_batch, step, data, trainable))
      if interrupted:
        # What was being made is made anew; it may take long, and what was learned is not yet touched by it.
        if saved < step - 1:
          save(step - 1, position)
        interrupts.let_through()
      batch, figures = made.result()
      trainable, state, values = step_function(trainable, state, frozen, batch)
      values = fetch(values) | figures
      metrics.write(prepared + step, values)
      skipped.watch(prepared + step, values, batch)
      bar.advance(1, note(values))
      if step == steps and finish:
        finish(trainable)
      interrupted = interrupts.agreed()
      if interrupted or step == steps or step % save_every == 0 or step in save_after:
        save(step, data.get_state(), kept=step == steps or (step in save_after and not interrupted))
        saved = step
      if interrupted:
        interrupts.let_through()
  return trainable


def _make(next_batch: NextBatch, step: int, data: Any, trainable: Any) -> tuple[Any, Mapping[str, float]]:
  return next_batch(step, next(data), trainable)


def microbatches(wanted: int, size: int, each: int) -> int:
  """In how many parts, one after the other, a batch of `size` prompts of `each` rows goes through the model: as many as
  wanted, or fewer where the rows of a part would not be divided among the devices. So a config that was made for few
  devices does on many."""
  divide = (n for n in range(1, wanted + 1) if size % n == 0 and size // n * each % batch_parts() == 0)
  return max(divide, default=wanted)


def tell_division(log: Callable[[str], None], stage: str, config: Any, field: str, each: int) -> None:
  """Says so where batches, of `each` rows to one of those that `field` counts, go through the model in other parts than
  the config says, or are not divided among the devices."""
  devices, wanted = batch_parts(), config.microbatches
  count = microbatches(wanted, config[field], each)
  if config[field] // count * each % devices:
    log(
      f'config.{stage}.{field} is {config[field]}, whose batches do not divide into the {devices} parts of config.mesh '
      f'(data times fsdp): some rows are computed by several devices; a multiple of {devices * wanted} is faster'
    )
  elif count < wanted:
    log(
      f'config.{stage}.microbatches is {wanted}; so that each of the {devices} parts of config.mesh (data times fsdp) '
      f'has as many rows, a batch goes through the model in {count}'
    )
