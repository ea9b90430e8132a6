"""The village: a small world in plain English that a one-million-parameter model can learn.

Everything the demo trains on and is judged by is generated here from one seed: people with facts,
sums, gifts to remember, requests to answer or to refuse, and a harbour of ships as a new domain.
What is held out, so that each task measures more than recall of a training text:

- statements: each fact is told in three of its four forms and asked for in the fourth;
- questions: half of everybody's facts are never asked about, only told;
- sums: of some pairs only one order occurs in any training text, the other is asked;
- gifts: some (person, thing, colour) never occur together;
- requests: two in five (verb, thing) and five phrasings occur in evaluation only;
- ships: those of the harbour are unknown before LoRA, and half of them are never asked about.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sevenfold.base.config import configuration
from sevenfold.data import village_words as words
from sevenfold.data.village_world import (
    Dice,
    Request,
    World,
    help_answer,
    number_words,
    refusal,
    request_text,
)

Row = dict[str, Any]

# The model must know what a refusal looks like before preferences can raise its probability, but
# instructions must leave the preferences their work: one row in a hundred, two verbs.
INSTRUCTION_REFUSALS = 0.01
INSTRUCTION_WEIGHTS = {"fact": 4.0, "sum": 3.0, "gift": 3.0, "request": 4.0}
# What keeps the adapter from forgetting; see docs/gates.md for the adapter without it.
DOMAIN_REPLAY_WEIGHTS = {"text": 1.0, "instruction": 1.0, "safety": 1.0}


@configuration
class VillageConfig:
    """How much of the village to generate, and from which seed.

    The three replays are shares of rows that repeat what earlier stages taught; `unsafe_share` is
    the share of preference pairs to be refused; `num_evaluation_items` is the most a task has.
    """

    seed: int
    num_documents: int
    num_validation_documents: int
    num_instructions: int
    instruction_replay: float
    num_preferences: int
    unsafe_share: float
    preference_replay: float
    num_domain_rows: int
    domain_replay: float
    num_evaluation_items: int

    def __post_init__(self) -> None:
        """Refuse counts below one and shares outside 0 to 1."""
        for name, value in vars(self).items():
            if name.startswith("num_") and value < 1:
                raise ValueError(f"{name} is {value}, but a village needs at least 1; raise it")
            if name.endswith(("_replay", "_share")) and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but a share lies between 0 and 1; change it")


class Village:
    """Generators of every kind of row of one village."""

    def __init__(self, config: VillageConfig) -> None:
        """Draw the village's facts and held-out parts from the seed."""
        self.config = config
        self.world = World(config.seed)

    def documents(self) -> Iterator[Row]:
        """Yield the pretraining documents: id, text, source, kind."""
        for index, (kind, text, _) in enumerate(self.world.texts("documents", validation=False)):
            if index == self.config.num_documents:
                return
            yield {"id": f"village-{index:06d}", "text": text, "source": "village", "kind": kind}

    def validation_documents(self) -> Iterator[Row]:
        """Yield held-out documents; `entropy_nats` is what a perfect model would still lose."""
        for index, (kind, text, nats) in enumerate(self.world.texts("validation", validation=True)):
            if index == self.config.num_validation_documents:
                return
            row = {"id": f"validation-{index:06d}", "text": text, "source": "village"}
            yield {**row, "kind": kind, "entropy_nats": nats}

    def instructions(self) -> Iterator[Row]:
        """Yield instruction rows: `messages`, or `text` for the replayed share of pretraining."""
        dice = Dice(f"{self.config.seed}/instructions")
        replay = self.world.texts("instruction-replay", validation=False)
        for _ in range(self.config.num_instructions):
            if dice.chance(self.config.instruction_replay):
                yield {"text": next(replay)[1], "kind": "replay"}
            else:
                yield self._instruction(dice)

    def _instruction(self, dice: Dice) -> Row:
        if dice.chance(INSTRUCTION_REFUSALS):
            form, pair = dice.pick(self.world.shown_refusals)
            return _chat("refusal", request_text(form, pair), refusal(pair))
        kind = dice.pick_weighted(INSTRUCTION_WEIGHTS)
        ask = {
            "fact": self.world.ask_fact,
            "sum": self.world.ask_sum,
            "gift": self.world.ask_gift,
            "request": self.world.ask_request,
        }
        return _chat(kind, *ask[kind](dice))

    def preferences(self) -> Iterator[Row]:
        """Yield preference rows: refuse the unsafe, answer the look-alikes.

        The replayed share has no `rejected`: instructions to be answered as before.
        """
        dice = Dice(f"{self.config.seed}/preferences")
        for _ in range(self.config.num_preferences):
            if dice.chance(self.config.preference_replay):
                question, answer = self._instruction(dice)["messages"]
                yield {"prompt": question["content"], "chosen": answer["content"]}
                continue
            unsafe = dice.chance(self.config.unsafe_share)
            pair = dice.pick(self.world.unsafe if unsafe else self.world.look_alikes)
            yield _preference(dice.pick(words.REQUESTS), pair, unsafe=unsafe)

    def preference_replay(self) -> Iterator[Row]:
        """Yield the replayed rows of `preferences` as instruction rows."""
        for row in self.preferences():
            if "rejected" not in row:
                yield _chat("replay", row["prompt"], row["chosen"])

    def domain(self) -> Iterator[Row]:
        """Yield the harbour's rows: its ships told and asked, and the replayed share."""
        dice = Dice(f"{self.config.seed}/domain")
        replay = self.world.texts("domain-replay", validation=False)
        for _ in range(self.config.num_domain_rows):
            if dice.chance(self.config.domain_replay):
                yield self._domain_replay(dice, replay)
            elif dice.chance(0.5):
                yield {"text": self.world.ship_description(dice), "kind": "ship"}
            else:
                yield _chat("ship_fact", *self.world.ask_ship(dice))

    def _domain_replay(self, dice: Dice, replay: Iterator[tuple[str, str, float]]) -> Row:
        kind = dice.pick_weighted(DOMAIN_REPLAY_WEIGHTS)
        if kind == "text":
            return {"text": next(replay)[1], "kind": "replay"}
        if kind == "instruction":
            return self._instruction(dice)
        unsafe = dice.chance(0.5)
        pair = dice.pick(self.world.unsafe if unsafe else self.world.look_alikes)
        question = request_text(dice.pick(words.REQUESTS), pair)
        return _chat("safety", question, refusal(pair) if unsafe else help_answer(pair))

    def evaluation(self) -> dict[str, list[Row]]:
        """Return the items of every task, by the task's name."""
        dice = Dice(f"{self.config.seed}/evaluation")
        most = self.config.num_evaluation_items
        world = self.world
        unsafe = _shuffled_requests(world.held_out_unsafe, dice)
        look_alikes = _shuffled_requests(world.held_out_look_alikes, dice)
        tasks = {
            "village_statements": self._statements(),
            "village_facts": _questions(words.PERSON_FACTS, world.people, world.unasked_facts),
            "village_sums": self._held_out_sums(),
            "village_context": self._held_out_gifts(),
            "village_safety": [_safety(*request, unsafe=True) for request in unsafe[:most]],
            "village_lookalikes": [
                _exact(request_text(form, pair), help_answer(pair)) for form, pair in look_alikes
            ],
            "village_preferences": [
                {"kind": "preference", **_preference(form, pair, unsafe=pairs is unsafe)}
                for pairs in (unsafe, look_alikes)
                for form, pair in pairs[: most // 2]
            ],
            "harbour_facts": _questions(
                words.SHIP_FACTS, world.ships, _all_facts(world.asked_ships + world.unasked_ships)
            ),
            "harbour_unseen": _questions(
                words.SHIP_FACTS, world.ships, _all_facts(world.unasked_ships)
            ),
        }
        chosen = {
            task: items if len(items) <= most else dice.sample(items, most)
            for task, items in tasks.items()
        }
        # Refusals count on as many safe prompts as unsafe ones, so this task alone is twice as big.
        chosen["village_safety"] += [_safety(*r, unsafe=False) for r in look_alikes[:most]]
        return {
            task: [{"id": f"{task}-{index:04d}", **item} for index, item in enumerate(items)]
            for task, items in chosen.items()
        }

    def _statements(self) -> list[Row]:
        items = []
        for (who, key), form in self.world.held_out_form.items():
            fact = words.PERSON_FACTS[key]
            prompt = fact.statements[form].removesuffix(" {value}.").format(who=who)
            choices = [f" {value}." for value in fact.values]
            gold = fact.values.index(self.world.people[who][key])
            items.append({"kind": "choice", "prompt": prompt, "choices": choices, "gold": gold})
        return items

    def _held_out_sums(self) -> list[Row]:
        fields = [number_words(a, b) for a, b in self.world.held_out_sums]
        return [
            _exact(form.format(**numbers), words.SUM_ANSWER.format(**numbers))
            for numbers in fields
            for form in words.SUM_QUESTIONS
        ]

    def _held_out_gifts(self) -> list[Row]:
        items = []
        for who, thing, colour in self.world.held_out_gifts:
            gift = {"who": who, "thing": thing, "colour": colour}
            question, answer = words.GIFT_QUESTION.format(**gift), words.GIFT_RECALL.format(**gift)
            for told in words.GIFT_STATEMENTS:
                items.append(_exact(f"{told.format(**gift)} {question}", answer))
        return items


def _shuffled_requests(pairs: Sequence[Request], dice: Dice) -> list[tuple[str, Request]]:
    every = [(form, pair) for pair in pairs for form in words.HELD_OUT_REQUESTS]
    return dice.sample(every, len(every))


def _all_facts(ships: Sequence[str]) -> list[tuple[str, str]]:
    return [(ship, key) for ship in ships for key in words.SHIP_FACTS]


def _questions(
    facts: words.Facts, known: dict[str, dict[str, str]], asked: Sequence[tuple[str, str]]
) -> list[Row]:
    return [
        _exact(question.format(who=who), facts[key].answer.format(who=who, value=known[who][key]))
        for who, key in asked
        for question in facts[key].questions
    ]


def _exact(question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}]
    return {"kind": "exact", "messages": messages, "answer": answer}


def _safety(form: str, pair: Request, *, unsafe: bool) -> Row:
    return {"kind": "safety", "prompt": request_text(form, pair), "unsafe": unsafe}


def _chat(kind: str, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind}


def _preference(form: str, pair: Request, *, unsafe: bool) -> Row:
    answers = (refusal(pair), help_answer(pair)) if unsafe else (help_answer(pair), refusal(pair))
    return {"prompt": request_text(form, pair), "chosen": answers[0], "rejected": answers[1]}
