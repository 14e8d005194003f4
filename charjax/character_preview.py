"""What a character makes of the starting model before any training: messages it writes, and replies in character.

charjax character check FILE --preview=2
"""

from collections.abc import Iterator, Sequence

from charjax.engine.batch import item_keys
from charjax.engine.sample import as_told, sample
from charjax.stages import messages, prompts, replies
from charjax.terminal import wrapped
from charjax.workdir import Session

_TOKENS = 48  # of a reply at most: enough to hear its tone


def preview(session: Session, count: int) -> Iterator[str]:
  """Of each trait, up to `count` messages that a run would write, each with a plain reply and one in character."""
  for trait in session.character.traits:
    # Some are rejected, as in a run.
    items = [f'{trait.id}/0/{i}' for i in range(2 * count)]
    written = [row['text'] for row in messages.write(session, trait, 0, items, 0) if not messages.broken(row)][:count]
    lines = ['', wrapped(f'{trait.id}: {trait.statement}', '', '  ')]
    if not written:
      lines += ['', '  no usable message was written; replies are to its first seed']
    asked = written or [trait.seeds[0]]
    said = [_reply(session, before, asked) for before in (prompts.plain(), replies.shown(session, trait))]
    for text, plain, shown in zip(asked, *said, strict=True):
      lines += ['', _wrapped(text, '  '), _wrapped(plain, '    plain         '), _wrapped(shown, '    in character  ')]
    yield '\n'.join(lines)


def _reply(session: Session, before: prompts.Messages, asked: Sequence[str]) -> list[str]:
  config, model = session.config.replies, session.model
  drawn = sample(
    model.decoder,
    [model.prompt([*before, prompts.user(text)]) for text in asked],
    item_keys(session.config.seed, 'preview', asked),
    model.eos_ids,
    as_told(config, max_new_tokens=min(_TOKENS, config.max_new_tokens), batch_size=len(asked)),
    width=config.prompt_width,
  )
  return [model.text(reply.tokens) + ('' if reply.finish == 'stop' else ' ...') for reply in drawn]


def _wrapped(text: str, first: str) -> str:
  return wrapped(text, first, ' ' * len(first))
