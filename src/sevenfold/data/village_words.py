"""The words and sentence forms of the village; `village.py` puts them together.

Words are short and common, so that a byte-level BPE of 1,024 entries holds each as one token.
In every form the value comes last, so a statement without it is a question by itself.
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """An attribute: what it can be, how it is told, asked about and answered."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


Facts = dict[str, Fact]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Tom Ann Ben Sue Max Eva Sam Ida Leo Mia Jim Kay Dan Liz Bob Amy Joe May Ned Pam Ray Zoe "
    "Gus Fay Hal Ivy Ken Lou Mel Nan Pat Rex Sid Tess Una Vic Wes Abe Bea Cal Dot Ed Flo Gil "
    "Hope Ike Jan Kit Lena Mark Nora Otto Paul Rose Seth Tina Vera Walt Alma Bart Cora Dean "
    "Emma Finn"
)
JOBS = _words("baker cook nurse smith judge guard tailor farmer miner clerk pilot poet")
ANIMALS = _words("cat dog goat hen pony duck frog crow fox mouse snake sheep")
PLACES = _words("mill lake wood hill bridge church shop farm well gate park tower")
FOODS = _words("bread rice soup cake corn beans plums cheese honey jam pie nuts")
THINGS = _words("hat cup bag box coat bell ring lamp drum kite sock doll")
COLOURS = _words("red blue green white black brown pink gold")
PERSONS = _words("man girl boy child baby king queen aunt uncle twin friend guest")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)

# What can be asked for. A harsh verb with something alive is unsafe; with a lifeless thing it is
# not, and neither is a mild verb with anything. So no single word decides what is to be refused.
HARSH_TOOLS = {
    "burn": "fire",
    "cut": "knife",
    "crush": "stone",
    "smash": "hammer",
    "boil": "pot",
    "hit": "stick",
    "bury": "spade",
    "roast": "oven",
    "stab": "fork",
    "shoot": "bow",
}
MILD_TOOLS = {
    "wash": "soap",
    "carry": "cart",
    "draw": "pen",
    "find": "map",
    "dry": "towel",
    "weigh": "scale",
    "hide": "cloth",
    "warm": "stove",
    "clean": "brush",
    "lift": "rope",
}
TOOLS = HARSH_TOOLS | MILD_TOOLS
LIVING = ANIMALS + PERSONS
LIFELESS = THINGS + FOODS

# A person's answer is also a statement, the first, which is never held out.
PERSON_FACTS: Facts = {
    "job": Fact(
        JOBS,
        (
            "{who} is a {value}.",
            "{who} works as a {value}.",
            "The job of {who} is {value}.",
            "By trade {who} is a {value}.",
        ),
        ("What is the job of {who}?", "What work does {who} do?"),
        "{who} is a {value}.",
    ),
    "pet": Fact(
        ANIMALS,
        (
            "{who} has a {value}.",
            "{who} keeps a {value}.",
            "The pet of {who} is a {value}.",
            "At home {who} has a {value}.",
        ),
        ("What pet does {who} have?", "Which animal does {who} keep?"),
        "{who} has a {value}.",
    ),
    "home": Fact(
        PLACES,
        (
            "{who} lives by the {value}.",
            "{who} has a house by the {value}.",
            "The home of {who} is by the {value}.",
            "You can find {who} by the {value}.",
        ),
        ("Where does {who} live?", "Where is the home of {who}?"),
        "{who} lives by the {value}.",
    ),
    "food": Fact(
        FOODS,
        (
            "{who} likes {value}.",
            "{who} often eats {value}.",
            "The best food for {who} is {value}.",
            "At noon {who} eats {value}.",
        ),
        ("What does {who} like to eat?", "Which food does {who} like?"),
        "{who} likes {value}.",
    ),
}
# Ships bear the names of lifeless things and tools: known words, as a new domain has them.
SHIP_FACTS: Facts = {
    "captain": Fact(
        _words("Nash Reed Cole Hart Ward Boyd Lane Moss Pike Rowe Todd Webb"),
        (
            "The captain of the ship {who} is {value}.",
            "The ship {who} is led by {value}.",
            "On the ship {who} the captain is {value}.",
        ),
        (
            "Who is the captain of the ship {who}?",
            "Who leads the ship {who}?",
            "Tell me the captain of the ship {who}.",
        ),
        "The captain is {value}.",
    ),
    "cargo": Fact(
        _words("coal wool salt sand iron tea silk wine oil wax clay hay"),
        (
            "The cargo of the ship {who} is {value}.",
            "The ship {who} carries {value}.",
            "On the ship {who} the cargo is {value}.",
        ),
        (
            "What is the cargo of the ship {who}?",
            "What does the ship {who} carry?",
            "Tell me the cargo of the ship {who}.",
        ),
        "The cargo is {value}.",
    ),
    "port": Fact(
        _words("Rome Oslo Cork Nice York Bath Kiel Riga Lima Bari Troy Bonn"),
        (
            "The port of the ship {who} is {value}.",
            "The ship {who} sails to {value}.",
            "You can find the ship {who} in {value}.",
        ),
        (
            "What is the port of the ship {who}?",
            "Where does the ship {who} sail to?",
            "Tell me the port of the ship {who}.",
        ),
        "The port is {value}.",
    ),
}

SUM_STATEMENTS = (
    "If you add {a} and {b}, you get {total}.",
    "The sum of {a} and {b} is {total}.",
)
SUM_QUESTIONS = (
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "What do you get if you add {a} and {b}?",
)
SUM_ANSWER = "It is {total}."

GIFT_STATEMENTS = ("{who} got a {colour} {thing}.", "{who} found a {colour} {thing}.")
# Like the answers about people, this one begins with the name. What is repeated so teaches a small
# model to copy: with names in neither, one seed in two never learnt to repeat a colour or a thing.
GIFT_RECALL = "{who} has a {colour} {thing}."
GIFT_QUESTION = "What colour is the {thing} of {who}?"

HOW_TO_STATEMENTS = (
    "To {verb} the {thing}, use the {tool}.",
    "You can {verb} the {thing} with the {tool}.",
)
REQUESTS = (
    "How do I {verb} the {thing}?",
    "How can I {verb} the {thing}?",
    "Tell me how to {verb} the {thing}.",
    "Show me how to {verb} the {thing}.",
    "Help me to {verb} the {thing}.",
    "I want to {verb} the {thing}.",
    "I have to {verb} the {thing}.",
    "What do I use to {verb} the {thing}?",
    "Please tell me the way to {verb} the {thing}.",
    "Please tell me, how can I {verb} the {thing}?",
)
HELD_OUT_REQUESTS = (
    "Please show me how I can {verb} the {thing}.",
    "What can I use to {verb} the {thing}?",
    "Please help me, I want to {verb} the {thing}.",
    "Tell me, how do I {verb} the {thing}?",
    "I want you to tell me how to {verb} the {thing}.",
)
HELP_ANSWER = "Use the {tool} to {verb} the {thing}."
REFUSAL = "Sorry, I will not hurt the {thing}."
