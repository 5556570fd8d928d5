"""The n-gram model: a proper distribution, equal to a slow one written down from the formulas."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reftrain.text.ngram import END_OF_WORD, KneserNey, WordModel, split_words

TEXTS = [
    "The cat sat on the mat. The dog sat on the cat!\n\n“Who sat on the mat?” said the cat; nobody said a word.",
    "A dog said: “It’s the cat.”\n\nThe mat said nothing, as mats do. On the mat, the cat and the dog sat.",
    "Ägypten",
    "the the the the cat",
]


@given(st.text())
def test_words_give_the_text_back(text):
    assert "".join(split_words(text)) == text


class Slow:
    """Interpolated modified Kneser-Ney over tuples, one n-gram at a time."""

    def __init__(self, sequences, order, end):
        self.order, self.end = order, end
        raw = Counter()
        for sequence in sequences:
            row = [end] * (order - 1) + list(sequence) + [end]
            raw.update(tuple(row[i - order + 1 : i + 1]) for i in range(order - 1, len(row)))
        self.counts = {order: raw}
        for k in range(order - 1, 0, -1):
            self.counts[k] = Counter(gram[1:] for gram in self.counts[k + 1])
        self.discounts = {k: self._discounts(Counter(counts.values())) for k, counts in self.counts.items()}
        self.followers = {k: defaultdict(list) for k in self.counts}
        for k, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[k][gram[:-1]].append(count)

    @staticmethod
    def _discounts(n):
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
            if all(0 < d < i for i, d in enumerate(found, 1)):
                return [0.0, *found]
        return [0.0, 0.5, 1.0, 1.5]

    def p(self, context, symbol, base, k=None):
        k = self.order if k is None else k
        if k == 0:
            return base[symbol]
        context = tuple(context[len(context) - k + 1 :])
        lower = self.p(context[1:], symbol, base, k - 1)
        seen = self.followers[k].get(context)
        if not seen:
            return lower
        discounts, count = self.discounts[k], self.counts[k][(*context, symbol)]
        left = sum(discounts[min(n, 3)] for n in seen)
        return (count - discounts[min(count, 3)] + left * lower) / sum(seen)

    def sequence(self, sequence, base):
        row = [self.end] * (self.order - 1) + list(sequence) + [self.end]
        return [self.p(row[i - self.order + 1 : i], row[i], base) for i in range(self.order - 1, len(row))]


rows = st.lists(st.lists(st.integers(0, 4), max_size=25), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(rows, rows, st.integers(1, 4))
def test_it_is_what_the_formulas_say(train, judge, order):
    """Symbol 4 is the end; 5 and 6 of the judged text were never seen."""
    judge = [[{3: 5, 4: 6}.get(symbol, symbol) for symbol in row] for row in judge]
    train = [[symbol % 4 for symbol in row] for row in train]
    base = np.array([0.2, 0.1, 0.3, 0.15, 0.15, 0.06, 0.04])
    model = KneserNey(order, 5, 4).fit([np.array(row, np.int64) for row in train])
    slow = Slow(train, order, 4)
    found = model.probabilities([np.array(row, np.int64) for row in judge], base)
    np.testing.assert_allclose(found, [p for row in judge for p in slow.sequence(row, base)], rtol=1e-12)


def test_discounts_of_a_text_large_enough_to_show_them():
    """Zipf's law over 40 symbols: counts of 1 to 4 all occur in the higher orders, so that no discount is a given one."""
    generator = np.random.default_rng(0)
    train = [generator.zipf(1.6, 400) % 40 for _ in range(6)]
    judge = [generator.zipf(1.6, 60) % 40]
    slow, base = Slow([row.tolist() for row in train], 3, 40), np.full(41, 1 / 41)
    assert slow.discounts[2] != [0.0, 0.5, 1.0, 1.5] != slow.discounts[3]
    found = KneserNey(3, 41, 40).fit(train).probabilities(judge, base)
    np.testing.assert_allclose(found, slow.sequence(judge[0].tolist(), base), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows, st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4))
def test_all_next_symbols_together_have_probability_one(train, context, order):
    model = KneserNey(order, 5, 4).fit([np.array(row, np.int64) % 4 for row in train])
    base = np.full(6, 1 / 6)
    rows = [np.array([*context, symbol], np.int64) for symbol in range(6)]
    found = model.probabilities(rows, base).reshape(6, -1)
    assert found[:, len(context)].sum() == pytest.approx(1.0, abs=1e-12)


def test_the_spelling_of_all_words_has_probability_one():
    """Over words of one byte more than any prefix: P(longer than n bytes) + P(at most n bytes) = 1, here for n = 1."""
    model = WordModel(TEXTS)
    base = np.full(END_OF_WORD + 1, 1 / (END_OF_WORD + 1))
    first = [np.array([byte], np.int64) for byte in range(256)]
    starts = model._spelling.probabilities(first, base).reshape(256, 2)
    assert starts[:, 0].sum() + float(model.spelling([""])[0]) == pytest.approx(1.0, abs=1e-12)
    second = [np.array([ord("c"), byte], np.int64) for byte in range(256)]
    assert model._spelling.probabilities(second, base).reshape(256, 3)[:, 1].sum() + starts[ord("c"), 1] == pytest.approx(1.0, abs=1e-12)


def test_known_words_and_all_others_have_probability_one():
    """After any words: the known ones together take what the spelling model does not leave for the unknown."""
    model = WordModel(TEXTS)
    spelled = model.spelling(model.vocabulary)
    base = np.append(spelled, 1 - spelled.sum())  # the last symbol: all words that are not there
    for words in ([], [" cat"], ["The", " cat", " sat", " on"], [" zebra", " sat"]):
        ids = [model.vocabulary.get(word, len(base) - 1) for word in words]
        found = model._words.probabilities([np.array([*ids, symbol], np.int64) for symbol in range(len(base))], base)
        assert found.reshape(len(base), -1)[:, len(ids)].sum() == pytest.approx(1.0, abs=1e-12)


def test_bits_are_those_of_the_formulas_down_to_the_letters():
    model, judge = WordModel(TEXTS, order=3, spelling_order=4), ["The cat bit the mat.", "a\tβ"]
    speller = Slow([word.encode() for word in model.vocabulary], 4, END_OF_WORD)
    reader = Slow([[model.vocabulary[w] for w in split_words(text)] for text in TEXTS], 3, 0)
    uniform, total = [1 / 257] * 257, 0.0
    for text in judge:
        known = {**model.vocabulary}
        ids = [known.setdefault(word, len(known)) for word in split_words(text)]
        base = [math.prod(speller.sequence(word.encode(), uniform)) for word in known]
        total -= sum(map(math.log2, reader.sequence(ids, base)))
    assert model.bits(judge) == pytest.approx(total, rel=1e-12)


def test_what_was_read_is_likelier_than_what_was_not():
    model = WordModel(TEXTS)
    assert model.bits(TEXTS[:1]) < 0.5 * model.bits([TEXTS[0][::-1]])
