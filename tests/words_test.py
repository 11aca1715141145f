"""Word sequences; normalisation itself is tested with the rewards."""

import pytest

from stepsearch import words


@pytest.mark.parametrize('answer, text, found', [
    ('Rome', 'It is Rome.', True),
    ('Rome', 'Romero came', False),
    ('the U.S. Navy', 'an officer of the US navy,', True),
    ('Stanley Hall', 'Hall, Stanley', False),
    ('Stanley Hall', 'G. Stanley\nHall', True),
    ('35', 'there are 1,350 of them', False),
    ('the', 'the end', False),
    ('', 'anything', False),
])
def test_an_answer_occurs_as_whole_words_side_by_side(answer, text, found):
  assert words.occurs(answer, text) == found
