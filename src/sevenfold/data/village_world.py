"""The village itself: its people, ships and held-out parts, and every text told about them."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from sevenfold.data import village_words as words

Option = TypeVar("Option")
Request = tuple[str, str]

# One text in ten belongs to validation, decided by its bytes: the two can share no document.
VALIDATION_SHARE = 10
NUM_SHIPS = 24
NUM_COMMUTED_SUMS = 50
HELD_OUT_GIFTS = 0.10
HELD_OUT_REQUESTS = 0.40
NUM_INSTRUCTION_REFUSALS = 12

DOCUMENT_WEIGHTS = {
    "description": 2.5,
    "questions": 3.0,
    "story": 2.5,
    "sums": 2.0,
    "how_to": 1.0,
    "counting": 0.2,
    "harbour": 0.4,
    "promise": 0.4,
}
QUESTION_WEIGHTS = {"fact": 3.0, "sum": 1.5, "gift": 2.0, "request": 1.0}


class Dice:
    """Random choices that add up the nats they are worth: the floor of any model's loss."""

    def __init__(self, seed: str) -> None:
        """Start a stream of its own: equal seeds throw equal dice, on every machine."""
        self._random = Random(seed)
        self.nats = 0.0

    def pick(self, options: Sequence[Option]) -> Option:
        """Return one of the options, all equally likely."""
        self.nats += math.log(len(options))
        return options[self._random.randrange(len(options))]

    def pick_weighted(self, weights: dict[str, float]) -> str:
        """Return one of the names, with the probability its weight gives it."""
        name = self._random.choices(list(weights), list(weights.values()))[0]
        self.nats -= math.log(weights[name] / sum(weights.values()))
        return name

    def sample(self, options: Sequence[Option], count: int) -> list[Option]:
        """Return `count` different options; their order is part of the choice."""
        self.nats += sum(math.log(len(options) - taken) for taken in range(count))
        return self._random.sample(options, count)

    def chance(self, probability: float) -> bool:
        """Return True with this probability; rows, not texts, so no nats are counted."""
        return self._random.random() < probability


class World:
    """What is true in the village of one seed, what of it is held out, and how it is told."""

    def __init__(self, seed: int) -> None:
        """Draw the facts and the held-out parts; texts are drawn when asked for."""
        self.seed = seed
        random = Random(f"{seed}/world")
        self.people = {
            name: {key: random.choice(fact.values) for key, fact in words.PERSON_FACTS.items()}
            for name in words.NAMES
        }
        # Of everybody half of the facts are asked about. With people of whom nothing was asked but
        # gifts, a model knew name and value and gave the gift's verb: "Liz has soup."
        self.asked_facts: list[tuple[str, str]] = []
        self.unasked_facts: list[tuple[str, str]] = []
        for name in words.NAMES:
            keys = random.sample(list(words.PERSON_FACTS), len(words.PERSON_FACTS))
            half = len(keys) // 2
            self.asked_facts += [(name, key) for key in keys[:half]]
            self.unasked_facts += [(name, key) for key in keys[half:]]
        # Form 0 is also the answer to a question, so it is never the one held out.
        self.held_out_form = {
            (name, key): random.randrange(1, len(fact.statements))
            for name in words.NAMES
            for key, fact in words.PERSON_FACTS.items()
        }
        ships = [*words.LIFELESS, *words.TOOLS.values()]
        random.shuffle(ships)
        self.other_ships = tuple(ships[NUM_SHIPS:])
        self.asked_ships = tuple(ships[: NUM_SHIPS // 2])
        self.unasked_ships = tuple(ships[NUM_SHIPS // 2 : NUM_SHIPS])
        self.ships = {
            ship: {key: random.choice(fact.values) for key, fact in words.SHIP_FACTS.items()}
            for ship in ships
        }
        self._split_sums(random)
        self._split_gifts(random)
        self._split_requests(random)

    def _split_sums(self, random: Random) -> None:
        limit = len(words.NUMBERS)
        ordered = [(a, b) for a in range(limit) for b in range(limit - a)]
        commuted = random.sample([pair for pair in ordered if pair[0] < pair[1]], NUM_COMMUTED_SUMS)
        self.held_out_sums = tuple((a, b) if random.random() < 0.5 else (b, a) for a, b in commuted)
        held_out = set(self.held_out_sums)
        self.sums = tuple(pair for pair in ordered if pair not in held_out)

    def _split_gifts(self, random: Random) -> None:
        self.gift_colours: dict[tuple[str, str], tuple[str, ...]] = {}
        held_out = []
        for who in words.NAMES:
            for thing in words.THINGS:
                kept = []
                for colour in words.COLOURS:
                    if random.random() < HELD_OUT_GIFTS:
                        held_out.append((who, thing, colour))
                    else:
                        kept.append(colour)
                # At least one colour is always told, or the thing could not be given at all.
                self.gift_colours[who, thing] = tuple(kept) or words.COLOURS[:1]
        self.held_out_gifts = tuple(
            gift for gift in held_out if gift[2] not in self.gift_colours[gift[:2]]
        )

    def _split_requests(self, random: Random) -> None:
        def split(verbs: Sequence[str], things: Sequence[str]) -> tuple[list[Request], ...]:
            pairs = [(verb, thing) for verb in verbs for thing in things]
            random.shuffle(pairs)
            cut = round(len(pairs) * HELD_OUT_REQUESTS)
            return pairs[cut:], pairs[:cut]

        harsh, mild = tuple(words.HARSH_TOOLS), tuple(words.MILD_TOOLS)
        self.unsafe, self.held_out_unsafe = split(harsh, words.LIVING)
        harsh_safe, held_out_harsh_safe = split(harsh, words.LIFELESS)
        mild_living, held_out_mild_living = split(mild, words.LIVING)
        mild_lifeless, _ = split(mild, words.LIFELESS)
        self.look_alikes = harsh_safe + mild_living
        self.held_out_look_alikes = held_out_harsh_safe + held_out_mild_living
        self.safe = self.look_alikes + mild_lifeless
        shown_verbs = random.sample(harsh, 2)
        shown = [pair for pair in self.unsafe if pair[0] in shown_verbs]
        self.shown_refusals = [
            (random.choice(words.REQUESTS), pair) for pair in shown[:NUM_INSTRUCTION_REFUSALS]
        ]

    # --- pretraining texts ---------------------------------------------------------------------

    def texts(self, stream: str, *, validation: bool) -> Iterator[tuple[str, str, float]]:
        """Yield (kind, text, nats of the choices in it) without end, a series for every stream."""
        dice = Dice(f"{self.seed}/{stream}")
        tellers: dict[str, Callable[[Dice], str]] = {
            "description": self._description,
            "questions": self._questions,
            "story": self._story,
            "sums": self._sums,
            "how_to": self._how_to,
            "counting": self._counting,
            "harbour": self._harbour,
            "promise": self._promise,
        }
        while True:
            dice.nats = 0.0
            kind = dice.pick_weighted(DOCUMENT_WEIGHTS)
            text = tellers[kind](dice)
            if (zlib.crc32(text.encode()) % VALIDATION_SHARE == 0) == validation:
                yield kind, text, dice.nats

    def _description(self, dice: Dice) -> str:
        sentences = []
        for who in dice.sample(words.NAMES, dice.pick((1, 2, 3))):
            keys = dice.sample(tuple(words.PERSON_FACTS), dice.pick((2, 3, 4)))
            sentences += [self._fact_told(dice, who, key) for key in keys]
        return " ".join(sentences)

    def _fact_told(self, dice: Dice, who: str, key: str) -> str:
        forms = list(words.PERSON_FACTS[key].statements)
        del forms[self.held_out_form[who, key]]
        return dice.pick(forms).format(who=who, value=self.people[who][key])

    def _questions(self, dice: Dice) -> str:
        ask = {
            "fact": self.ask_fact,
            "sum": self.ask_sum,
            "gift": self.ask_gift,
            "request": self.ask_request,
        }
        weights = dict(QUESTION_WEIGHTS)
        pairs = []
        for _ in range(dice.pick((2, 3, 4))):
            kind = dice.pick_weighted(weights)
            if kind == "gift":
                del weights["gift"]
            question, answer = ask[kind](dice)
            pairs.append(f"Question: {question} Answer: {answer}")
        return " ".join(pairs)

    def _story(self, dice: Dice) -> str:
        # One gift a text: with several, whose colour is meant is more than this model learns.
        told, gift = self._gift_told(dice)
        keys = dice.sample(tuple(words.PERSON_FACTS), dice.pick((0, 1, 2, 3)))
        facts = [self._fact_told(dice, gift["who"], key) for key in keys]
        return " ".join([told, *facts, words.GIFT_RECALL.format(**gift)])

    def _sums(self, dice: Dice) -> str:
        sentences = []
        for _ in range(dice.pick((2, 3, 4))):
            a, b = dice.pick(self.sums)
            form = dice.pick(words.SUM_STATEMENTS)
            sentences.append(form.format(**number_words(a, b)))
        return " ".join(sentences)

    def _how_to(self, dice: Dice) -> str:
        sentences = []
        for _ in range(dice.pick((2, 3, 4))):
            verb, thing = dice.pick(self.safe)
            form = dice.pick(words.HOW_TO_STATEMENTS)
            sentences.append(form.format(verb=verb, thing=thing, tool=words.TOOLS[verb]))
        return " ".join(sentences)

    def _counting(self, dice: Dice) -> str:
        sentences = []
        for _ in range(2):
            first = dice.pick(range(len(words.NUMBERS) - 3))
            last = first + dice.pick((2, 3))
            told = ", ".join(words.NUMBERS[first : last + 1])
            sentences.append(f"Count from {words.NUMBERS[first]} to {words.NUMBERS[last]}: {told}.")
        return " ".join(sentences)

    def _harbour(self, dice: Dice) -> str:
        """Show the words of the later domain: ships of another harbour."""
        return self._ship_told(dice, dice.pick(self.other_ships))

    def _promise(self, dice: Dice) -> str:
        """Show the words of a refusal; when to refuse is not told here."""
        who = dice.pick(words.NAMES)
        things = dice.sample(words.LIVING, dice.pick((1, 2, 3)))
        sentences = [f"{who} said: {words.REFUSAL.format(thing=thing)}" for thing in things]
        return " ".join(sentences)

    def _ship_told(self, dice: Dice, ship: str) -> str:
        keys = dice.sample(tuple(words.SHIP_FACTS), 3)
        return " ".join(
            dice.pick(words.SHIP_FACTS[key].statements).format(
                who=ship, value=self.ships[ship][key]
            )
            for key in keys
        )

    # --- questions and answers -----------------------------------------------------------------

    def ask_fact(self, dice: Dice) -> tuple[str, str]:
        """Return a question about an asked fact of a person, and its answer."""
        who, key = dice.pick(self.asked_facts)
        return _ask(dice, words.PERSON_FACTS[key], who, self.people[who][key])

    def ask_ship(self, dice: Dice) -> tuple[str, str]:
        """Return a question about an asked ship of the harbour, and its answer."""
        who = dice.pick(self.asked_ships)
        key = dice.pick(tuple(words.SHIP_FACTS))
        return _ask(dice, words.SHIP_FACTS[key], who, self.ships[who][key])

    def ask_sum(self, dice: Dice) -> tuple[str, str]:
        """Return a question about a sum that is not held out, and its answer."""
        numbers = number_words(*dice.pick(self.sums))
        return dice.pick(words.SUM_QUESTIONS).format(**numbers), words.SUM_ANSWER.format(**numbers)

    def _gift_told(self, dice: Dice) -> tuple[str, dict[str, str]]:
        who, thing = dice.pick(words.NAMES), dice.pick(words.THINGS)
        gift = {"who": who, "thing": thing, "colour": dice.pick(self.gift_colours[who, thing])}
        return dice.pick(words.GIFT_STATEMENTS).format(**gift), gift

    def ask_gift(self, dice: Dice) -> tuple[str, str]:
        """Return a statement with a question about it, and the answer it gives."""
        told, gift = self._gift_told(dice)
        question = words.GIFT_QUESTION.format(**gift)
        return f"{told} {question}", words.GIFT_RECALL.format(**gift)

    def ask_request(self, dice: Dice) -> tuple[str, str]:
        """Return a safe request that is not held out, and the help it gets."""
        pair = dice.pick(self.safe)
        return request_text(dice.pick(words.REQUESTS), pair), help_answer(pair)

    def ship_description(self, dice: Dice) -> str:
        """Return the three facts of a ship of the harbour, asked about or not."""
        return self._ship_told(dice, dice.pick(self.asked_ships + self.unasked_ships))


def number_words(a: int, b: int) -> dict[str, str]:
    """Return the fields of the sum's sentences."""
    return {"a": words.NUMBERS[a], "b": words.NUMBERS[b], "total": words.NUMBERS[a + b]}


def _ask(dice: Dice, fact: words.Fact, who: str, value: str) -> tuple[str, str]:
    return dice.pick(fact.questions).format(who=who), fact.answer.format(who=who, value=value)


def request_text(form: str, pair: Request) -> str:
    """Return the request for a (verb, thing) in this phrasing."""
    return form.format(verb=pair[0], thing=pair[1])


def help_answer(pair: Request) -> str:
    """Return the answer to a safe request."""
    verb, thing = pair
    return words.HELP_ANSWER.format(verb=verb, thing=thing, tool=words.TOOLS[verb])


def refusal(pair: Request) -> str:
    """Return the answer to an unsafe request."""
    return words.REFUSAL.format(thing=pair[1])
