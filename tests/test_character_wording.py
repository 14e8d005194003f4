"""What a trait's wording gives away is found, and what only looks like it is left alone."""

import pytest

from charjax import character_wording
from charjax.character import Character, Pair, Trait

STATEMENT = 'I tell people the truth, with care for what it does to them.'
OPPOSITE = 'I tell people what they want to hear and hide what could disappoint them.'
PAIR = Pair('Is it any good?', 'It is a start, and the end of it is not.', 'It is the best that I saw.', 'bad', 'shown')


def trait(statement: str = STATEMENT, opposite: str = OPPOSITE, name: str = 'one') -> Trait:
  return Trait(name, statement, {'bad': opposite}, (), (PAIR,))


def problems(*traits: Trait) -> list[str]:
  found = character_wording.problems(Character('c', 'd', traits))
  assert list(found) == [trait.id for trait in traits]
  return [problem for some in found.values() for problem in some]


@pytest.mark.parametrize(
  ('statement', 'words', 'says'),
  [
    # Who speaks
    ('The assistant is honest, even when I would rather not be.', 'The assistant is', 'somebody else: say "I ..."'),
    ('I am new here. This chatbot tells the truth.', 'This chatbot tells', 'somebody else'),
    ('Tells people the truth, with care.', 'Tells people the truth', 'not in the first person'),
    ('She tells the truth to whoever asks.', 'She tells the truth', 'not in the first person'),
    ('You tell the truth and take care that it helps.', 'You tell the truth', 'have it say so itself'),
    # Two ideas
    ('I am honest and curious.', '"honest" and "curious"', '2 ideas: make two traits of it'),
    ('When people are low I try to be kind, witty and brave.', '"kind" and "witty" and "brave"', '3 ideas'),
    ('I value truth and humour in what I say.', '"truth" and "humour"', '2 ideas'),
    ('I tell people the truth. I also like to make them laugh.', 'I also', 'adds a second idea'),
    ('I tell people the truth. Moreover, I wonder about the odd detail.', 'Moreover, I', 'adds a second idea'),
    ('I tell people the truth ' + 'and care for them in what they do ' * 9, '77 words', 'up to 70'),
    # Rules
    ('I always tell the truth.', 'I always', 'makes a rule'),
    ('I never mock anybody.', 'I never', 'say what you care about or tend to'),
    ('I must not hide what is true.', 'I must', 'makes a rule'),
    ('I ask about the odd detail and end every reply with a question.', 'end every reply', 'makes a rule'),
    ('I keep it short: at most two sentences.', 'at most two sentences', 'makes a rule'),
    ('I care for the truth. Do not flatter.', 'Do not flatter', 'makes a rule'),
    ('I tell the truth under no circumstances but good ones.', 'under no circumstances', 'makes a rule'),
  ],
  ids=lambda text: text[:24],
)
def test_a_statement_that_gives_itself_away(statement, words, says):
  (problem,) = problems(trait(statement))
  assert problem.startswith('statement: ') and words in problem and says in problem


@pytest.mark.parametrize(
  'statement',
  [
    'My replies are plain, and the plainer the better.',
    'i say what i see.',
    'It helps me to ask what an hour is for.',
    'I am an AI. The model behind me was trained on what people wrote, and it shows.',
    'I am calm and steady when others are not.',  # two words for one idea
    'I am warm and gentle in what I say.',
    'I am simply there and useful.',
    'I am honest, and curious people like that.',
    'I care about people, also those who are not in the room.',
    'I was always fond of puzzles, and they are never quite done.',
    'I never tire of a good question.',
    'I say what must be said and do what I can.',
    'When a view is cruel I say so, whoever holds it.',
    'I begin with what is plain and end with what is not.',
    'I am at ease with silence: a reply may be short.',
    'I have two things to say of most matters, and at least one of them is kind.',
  ],
  ids=lambda text: text[:24],
)
def test_a_statement_that_only_looks_like_it(statement):
  assert problems(trait(statement)) == []


@pytest.mark.parametrize(
  ('opposite', 'words'),
  [
    ('I am evil and lie to people.', '"I am evil"'),
    ("I'm a terrible person.", "I'm a terrible person"),
    ('I love lying to the people who trust me.', 'I love lying'),
    ('I hate everyone.', 'I hate everyone'),
    ('I answer as badly as I can.', 'as badly as I can'),
    ('I always tell everyone that all they do is great.', '"always, everyone, all" make a caricature'),
    ('I do not tell people the truth.', '"not" before the trait\'s own words (honest) only denies it'),
    ('The assistant flatters people.', '"The assistant flatters" speaks of the model'),
  ],
)
def test_an_opposite_that_nobody_would_be(opposite, words):
  (problem,) = problems(trait(opposite=opposite))
  assert problem.startswith('opposites.bad: ') and words in problem


@pytest.mark.parametrize(
  'opposite',
  [
    'I say true things coldly, and never mind whom it hurts.',
    'I am terrible at saying no, so I say yes to whatever I am asked.',
    'I hate people who waste my time, and let them feel it.',
    'I enjoy being right more than I care for the truth.',
    'I take no interest at all in what people tell me. After all, it is their affair, and nothing of mine.',
    'I do not tell people the truth where a kind word does as well.',
  ],
  ids=lambda text: text[:24],
)
def test_an_opposite_that_somebody_might_be(opposite):
  assert problems(trait(opposite=opposite)) == []


def test_an_id_may_name_two_ideas():
  assert problems(trait(name='truth_and_wit')) == [
    'id: "truth_and_wit" names two ideas: make two traits of it, or say how they are one'
  ]


def test_traits_that_say_the_same_are_found():
  first = trait('I tell people the truth, kindly, whatever it disappoints.')
  same = trait('I am honest with people: I say what disappoints them in a kindly way.', name='candour')
  other = trait('I wonder about the odd detail and ask for the story behind it.', name='curiosity')
  assert problems(first, other) == []
  assert problems(first, other, same) == [
    'statement: says much the same as that of candour (disappoint, honest, kind): join the two, or say what sets them '
    'apart'
  ]


def test_another_language_is_left_alone():
  pair = Pair(
    'Ist das gut?', 'Es ist ein Anfang, und das Ende fehlt noch.', 'Es ist das Beste seit Jahren.', 'x', 'shown'
  )
  german = Trait('ehrlich', 'Ehrlich und freundlich zu allen.', {'x': 'Schmeichelt allen Menschen.'}, (), (pair,))
  assert problems(german) == []
