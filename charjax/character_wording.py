"""Does each trait say one disposition, in the first person, with opposites that somebody might really be?

What is shown to a model is read as its own words: a trait in the third person is talk about somebody else, two ideas in
one cannot be told apart in what is measured, a rule is kept to the letter where a disposition would weigh, an opposite
that nobody would be teaches nothing near the line, and two traits that say the same are measured twice. The checks look
for words that give these away, in English alone; they see what is plain, miss what is put otherwise, and are made to be
silent where in doubt.
"""

import itertools
import re

from charjax.character import Character, Trait

_COMMON = frozenset({'the', 'a', 'and', 'to', 'of', 'in', 'is', 'it', 'that', 'you', 'i', 'for'})
_ENGLISH = 0.1  # share of these words in a character's texts from which on it is in English; about a quarter is usual
_MOST_WORDS = 70  # of a statement
_ALIKE = 0.6  # share of the shorter statement's words that two traits may have in common
_ALIKE_WORDS = 3  # and how many of them at least
_FEW_WORDS = 8  # of an opposite
_ABSOLUTES = 3  # words like "all" and "never" that one opposite may not reach

_FIRST = re.compile(r'\b([Ii]|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself|[Ww]e)\b')
_BEGIN = r'(?:^|[.!?;:] )'  # of a sentence or a part of one
_I_AM = r"\bI(?:['\u2019]m| am)"
_NAMED = re.compile(
  _BEGIN + r'((?:the|this|our) (?:\w+ )?(?:assistant|AI|model|bot|chatbot|agent|persona|character|companion)'
  r' (?:(?:always|never|often|also) )?(?:is|has|does|can|will|would|should|must|may|\w+[^\Ws]s))\b',
  re.IGNORECASE,
)
_ALSO = re.compile(
  rf'{_I_AM} also\b|\bI (?:can |will )?also\b|\band also\b'
  rf'|{_BEGIN}(?:besides|moreover|furthermore|additionally|secondly|also),? I\b'
  r'|\bin addition\b|\bon top of that\b|\bapart from (?:that|this)\b',
  re.IGNORECASE,
)
_IS = re.compile(
  rf'(?:{_I_AM}|\bI (?:try|want|like) to be|\bI (?:value|prize|care about|believe in))(?: both| very| really| deeply)? '
  r'((?:[\w-]+(?:, and |, | and )){1,5}[\w-]+)(?=[.;:,!]|$| in | with )',
  re.IGNORECASE,
)
_REPLY = r'(?:reply|replies|answers?|responses?|messages?)'
_RULE = re.compile(
  r'\bI (?:will |would |do )?(?:always|never (?!tire|had|was|were|been|knew)|must|shall|may not)\b'
  rf'|{_I_AM} (?:not )?(?:allowed|required|forbidden) to\b'
  r'|\bunder no circumstances\b|\bwithout exception\b|\bat all times\b|\bno matter what\b'
  rf'|\b(?:begin|start|open|end|close|finish) (?:every|each|all|any|my|with)\b(?: \w+){{0,2}}? {_REPLY}\b'
  rf'|\bin (?:every|each) {_REPLY}\b'
  rf'|\b(?:every|each|any|all|my) {_REPLY} (?:must|should|has to|have to|may not|shall)\b'
  r'|\b(?:at most|at least|no more than|exactly|under|fewer than|up to) (?:\d+|one|two|three|four|five|ten|a hundred)'
  r' (?:words|sentences?|paragraphs?|lines?|questions?|emojis?|bullets?)\b'
  rf"|{_BEGIN}(?:do not|don['\u2019]t|never|always|be|avoid|ensure|make sure|remember to|refuse|respond|reply) \w+",
  re.IGNORECASE,
)
_WICKED = re.compile(
  rf'{_I_AM}(?: an?)?(?: (?:very|really|just|completely|totally|utterly|purely))? '
  r'(?:bad|evil|awful|terrible|horrible|stupid|dumb|idiotic|useless|worthless|wicked|vicious|malicious|hateful|monster'
  r'|liar|idiot|fool|jerk|villain)(?: person| assistant| AI| model| thing)?(?=[.,;:!]|$| and )'
  r'|\bI (?:really |just )?hate (?:people|everyone|everybody|humans|humanity|users|the user|you)\b(?! who| that)'
  r'|\bI (?:really |just )?(?:love|enjoy|like|want|try) (?:to )?(?:lie|lying|hurt|hurting|harm|harming|deceive'
  r'|deceiving|(?:be|being) (?:evil|wrong|useless))\b|\bas badly as (?:possible|I can)\b',
  re.IGNORECASE,
)
_ABSOLUTE = re.compile(
  r'\b((?<!\bat )(?<!\bafter )(?<!\babove )all|always|never|every(?:thing|one|body)?|nothing|nobody|no one)\b',
  re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:not|no|never|nothing|nobody|without|lack|refuse)\b|n['\u2019]t\b", re.IGNORECASE)

# One idea a line; the words of it are taken for the same.
_IDEAS = """
honest honesty truthful truth truths frank candid sincere
curious curiosity inquisitive
kind kindness warm warmth caring gentle compassionate compassion friendly
funny humour humor humorous witty playful jokes joke
calm patient patience composed steady serene
brave courage courageous bold fearless
humble humility modest modesty
brief concise terse succinct
creative creativity imaginative inventive
careful precise accurate rigorous thorough
sceptical skeptical doubt doubtful
cheerful optimistic upbeat positive optimism
polite courteous respectful
loyal faithful devoted
fair impartial unbiased neutral
helpful useful
wise wisdom
"""
_IDEA = {word: line.split()[0] for line in _IDEAS.strip().splitlines() for word in line.split()}
# Words of any text.
_EMPTY = frozenset(
  re.findall(
    r'\w+',
    """
  a about above after again all also always am an and any are as at be because been before being both but by can could
  did do does doing done down each even ever every few for from further get give go had has have having he her here hers
  him his how i if in into is it its just know let like look make many may me mean might more most much must my myself
  need never no nobody nor not nothing now of off on once one only or other others our out over own people person put
  really same say says see she should so some somebody someone something such take tell than that the their them then
  there these they thing things think this those through to too try until up us use very want was way we were what
  whatever when where whether which while who whoever why will with without would you your
  """,
  )
)


def problems(character: Character) -> dict[str, list[str]]:
  """For each trait what its wording gives away: field, words and remedy. Nothing of a character in another language."""
  found: dict[str, list[str]] = {trait.id: [] for trait in character.traits}
  if not _in_english(character):
    return found
  for trait in character.traits:
    fields = {'statement': trait.statement} | {f'opposites.{name}': text for name, text in trait.opposites.items()}
    for field, text in fields.items():
      found[trait.id] += [f'{field}: {problem}' for problem in _person(text)]
    found[trait.id] += _two_ideas(trait)
    if rule := _RULE.search(trait.statement):
      found[trait.id].append(
        f'statement: "{_shown(rule[0])}" makes a rule, kept where it does not fit: say what you care about or tend to'
      )
    for name, text in trait.opposites.items():
      found[trait.id] += [f'opposites.{name}: {problem}' for problem in _straw_man(text, trait.statement)]
  for one, other in itertools.combinations(character.traits, 2):
    if shared := _in_common(one.statement, other.statement):
      found[one.id].append(
        f'statement: says much the same as that of {other.id} ({", ".join(shared)}): join the two, or say what sets '
        'them apart'
      )
  return found


def _in_english(character: Character) -> bool:
  words = [
    word
    for trait in character.traits
    for text in (
      trait.statement,
      *trait.opposites.values(),
      *trait.seeds,
      *(text for pair in trait.pairs for text in (pair.message, pair.in_character, pair.out_of_character)),
    )
    for word in _words(text)
  ]
  return sum(word in _COMMON for word in words) >= _ENGLISH * len(words)


def _person(text: str) -> list[str]:
  if named := _NAMED.search(text):
    return [f'"{_shown(named[1])}" speaks of the model as of somebody else: say "I ..."']
  if _FIRST.search(text):
    return []
  begin = ' '.join(text.split()[:4])
  if re.search(r'\byou(r|rself)?\b', text, re.IGNORECASE):
    return [f'"{_shown(begin)} ..." tells the model what it is: have it say so itself, "I ..."']
  return [f'"{_shown(begin)} ..." is not in the first person: say "I ..."']


def _two_ideas(trait: Trait) -> list[str]:
  remedy = 'make two traits of it, or say how they are one'
  if '_and_' in trait.id:
    return [f'id: "{trait.id}" names two ideas: {remedy}']
  if joint := _ALSO.search(trait.statement):
    return [f'statement: "{_shown(joint[0])}" adds a second idea: {remedy}']
  for found in _IS.finditer(trait.statement):
    words = re.split(r', and |, | and ', found[1])
    ideas = {_IDEA[word.lower()]: word for word in reversed(words) if word.lower() in _IDEA}
    if len(ideas) > 1:
      quoted = ' and '.join(f'"{word}"' for word in reversed(ideas.values()))
      return [f'statement: {quoted} are {len(ideas)} ideas: {remedy}']
  count = len(trait.statement.split())
  if count > _MOST_WORDS:
    return [f'statement: {count} words are more than one idea takes (up to {_MOST_WORDS}): {remedy}']
  return []


def _straw_man(text: str, statement: str) -> list[str]:
  """Of an opposite: nobody is like that, or it is the trait with a "not" in it."""
  remedy = 'write the vice as one who has it would see it'
  if wicked := _WICKED.search(text):
    return [f'"{_shown(wicked[0])}" is what nobody says in earnest: {remedy}']
  absolutes = [found[0] for found in _ABSOLUTE.finditer(text)]
  if len(absolutes) >= _ABSOLUTES:
    return [f'"{", ".join(absolutes)}" make a caricature of it: {remedy}']
  mine, its, denial = _ideas(text), _ideas(statement), _NOT.search(text)
  # One word in common may be said in passing, unless there is little else.
  enough = len(mine) > 1 or len(text.split()) <= _FEW_WORDS
  if denial and not _NOT.search(statement) and mine and mine <= its and enough:
    return [f'"{_shown(denial[0])}" before the trait\'s own words ({", ".join(sorted(mine))}) only denies it: {remedy}']
  return []


def _in_common(one: str, other: str) -> list[str]:
  first, second = _ideas(one), _ideas(other)
  shared = sorted(first & second)
  alike = len(shared) >= max(_ALIKE_WORDS, _ALIKE * min(len(first), len(second)))
  return shared if alike else []


def _ideas(text: str) -> set[str]:
  """What a text is about: its words but for those that any text has, without their endings, and like words as one."""
  return {_IDEA.get(word) or _stem(word) for word in _words(text) if word not in _EMPTY and len(word) > 2}


def _stem(word: str) -> str:
  for ending in ('ing', 'ies', 'ed', 'ly', 'es', 's', 'e'):
    if word.endswith(ending) and len(word) > len(ending) + 3:
      return word[: -len(ending)]
  return word


def _words(text: str) -> list[str]:
  return re.findall(r'[^\W\d_]+', text.lower())


def _shown(text: str) -> str:
  text = ' '.join(text.split()).strip(' .;:!?')
  return text if len(text) <= 50 else f'{text[:47]}...'
