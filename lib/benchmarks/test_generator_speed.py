"""Generating annotated text: tokens a second, and the ratio to drawing every word from Faker."""

import random
import time

import pytest
from faker import Faker

from compendium.data import generators
from compendium.data.generators import (
    ENGLISH_RULES,
    chinese_ner,
    english_ner,
    parse_production,
    word_list,
)

FLOOR = 20_000  # tokens a second on one core


def tokens_per_second(generate):
    """The best of three runs of `generate`, which returns the number of tokens it made."""
    generate()
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        tokens = generate()
        rates.append(tokens / (time.perf_counter() - begin))
    return max(rates)


def peer(faker, rng):
    """The plain generator of the English grammar: recursion, and one call of Faker a name."""
    parsed = {}
    for symbol, alternatives in ENGLISH_RULES.items():
        pairs = [(1, a) if isinstance(a, str) else a for a in alternatives]
        parsed[symbol] = [parse_production(t, "word") for _, t in pairs], [w for w, _ in pairs]
    lists = {
        "company_suffix": word_list("en_company_suffixes"),
        "institution_noun": word_list("en_institution_nouns"),
        "subject": word_list("en_subjects"),
        "good": word_list("en_product_nouns"),
        "role": word_list("en_roles"),
        "verb": word_list("en_verbs"),
        "number": [str(number) for number in range(100, 1000, 50)],
    }
    names = {"city": faker.city, "first_name": faker.first_name, "last_name": faker.last_name}
    names["brand"] = faker.last_name

    def expand(symbol, tokens, entities):
        if symbol in names:
            tokens.extend(names[symbol]().split())
        elif symbol in lists:
            tokens.append(rng.choice(lists[symbol]))
        else:
            stack = []
            for kind, value in rng.choices(*parsed[symbol])[0]:
                if kind == "token":
                    tokens.append(value)
                elif kind == "symbol":
                    expand(value, tokens, entities)
                elif kind == "open":
                    stack.append((len(tokens), value))
                else:
                    start, label = stack.pop()
                    entities.append({"start": start, "end": len(tokens), "label": label})

    def sentence():
        tokens, entities = [], []
        expand("sentence", tokens, entities)
        return {"tokens": tokens, "entities": entities}

    return sentence


def count_tokens(dataset):
    return len(dataset.data.column("tokens").combine_chunks().flatten())


@pytest.mark.parametrize("make", [chinese_ner, english_ner])
@pytest.mark.parametrize("count", [100, 5000])
def test_floor(make, count):
    grammar = make("train")
    rate = tokens_per_second(lambda: count_tokens(grammar.generate(count, seed=1)))
    print(f"{make.__name__}, {count} sentences: {rate:,.0f} tokens/s")
    assert rate >= FLOOR


def test_against_faker_per_token():
    grammar, sentence = english_ner(), peer(Faker("en_US"), random.Random(0))
    ours = tokens_per_second(lambda: count_tokens(grammar.generate(2000, seed=1)))
    theirs = tokens_per_second(lambda: sum(len(sentence()["tokens"]) for _ in range(500)))
    print(f"ours {ours:,.0f}, Faker a name {theirs:,.0f} tokens/s: {ours / theirs:.1f} times")
    assert ours >= 10 * theirs


def test_first_sentence():
    """The floor holds for 3,000 sentences even when the lexicons have to be drawn from Faker first."""
    generators.faker_words.cache_clear()
    begin = time.perf_counter()
    tokens = count_tokens(english_ner("train", seed=9).generate(3000, seed=0))
    rate = tokens / (time.perf_counter() - begin)
    print(f"with building the lexicons: {rate:,.0f} tokens/s")
    assert rate >= FLOOR
