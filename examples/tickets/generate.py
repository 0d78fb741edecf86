"""Writes the demo's data set: support messages, each answered by a one-line ticket.

    user       Hey, I was charged twice for the lamp. It is order 48213. This is urgent!
    assistant  refund | order 48213 | high

The answer is a function of the message (what is wanted, the order's number, how much it presses), so an answer is right
or wrong and nothing between. Every message is put together from a way to say the wish, a way to give the number and a
way to press; a combination of those three that is in one file is in no other, and no order number comes twice.

    python examples/tickets/generate.py [--out DIRECTORY]

Same script, same bytes.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SEED = 20
SIZES = {"train": 360, "valid": 40, "heldout": 60}
SYSTEM = "Answer with a ticket."

WISHES = {
    "refund": (
        "the {item} arrived broken and I want my money back",
        "I was charged twice for the {item}",
        "please refund the {item}",
        "I sent the {item} back and still wait for my money",
        "the {item} stopped working after a day, I want a refund",
        "you took too much money for the {item}",
    ),
    "exchange": (
        "the {item} is too small, please swap it for a bigger one",
        "I got the {item} in the wrong colour and want to exchange it",
        "can I swap the {item} for another model",
        "please replace the {item}, it is the wrong size",
        "I would like to exchange the {item} for a different one",
        "you sent me the wrong {item}, I need the right one instead",
    ),
    "delivery": (
        "where is my {item}",
        "the {item} has not arrived yet",
        "the parcel with the {item} seems to be lost",
        "when will the {item} be delivered",
        "the tracking page of my {item} has not changed for days",
        "I am still waiting for the {item} to be delivered",
    ),
    "cancel": (
        "please cancel the {item}",
        "I changed my mind and don't want the {item} any more",
        "I ordered the {item} by mistake, please stop it",
        "do not send the {item}, I want to cancel",
        "can you cancel the {item} before it is shipped",
        "I no longer need the {item}, take it off my order",
    ),
    "invoice": (
        "I need a receipt for the {item}",
        "please send me the bill for the {item} again",
        "the invoice for the {item} has the wrong address",
        "can I get an invoice for the {item}",
        "there was no receipt in the box with the {item}",
        "my office needs the bill for the {item}",
    ),
}
NUMBERS = ("It is order {order}.", "Order number {order}.", "(order {order})", "My order is #{order}.")
PRESSURE = {
    "high": ("This is urgent!", "I need it solved today.", "Please hurry.", "It can't wait."),
    "normal": ("", "Thanks.", "Kind regards.", "Thank you."),
    "low": ("No rush.", "Take your time.", "It is not urgent.", "Any time this month is fine."),
}
GREETINGS = ("", "", "Hi, ", "Hello, ", "Hey, ", "Good morning, ")
ITEMS = (
    *("lamp", "kettle", "backpack", "jacket", "desk", "keyboard", "blender", "tent", "mirror", "bicycle", "carpet"),
    *("camera", "teapot", "printer", "sofa", "helmet", "toaster", "radio", "suitcase", "violin", "ladder", "heater"),
)


class Recipe(NamedTuple):
    """What a message is made of, but for its item, its number and its greeting."""

    intent: str
    wish: str
    number: str
    priority: str
    pressure: str


def make_rows(sizes: Mapping[str, int] = SIZES) -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    """The rows of each file, as TrainingDataItems. There are 1,440 different ones."""
    rng = random.Random(SEED)  # noqa: S311  -- a data set, not a secret
    orders = iter(rng.sample(range(10_000, 100_000), sum(sizes.values())))
    recipes = _recipes(rng)
    return {name: [_row(next(recipes), next(orders), rng) for _ in range(size)] for name, size in sizes.items()}


def _recipes(rng: random.Random) -> Iterator[Recipe]:
    """Every combination once; each intent with each priority equally often at any point."""
    piles = []
    for (intent, wishes), (priority, pressures) in itertools.product(WISHES.items(), PRESSURE.items()):
        parts = itertools.product(wishes, NUMBERS, pressures)
        pile = [Recipe(intent, wish, number, priority, pressure) for wish, number, pressure in parts]
        rng.shuffle(pile)
        piles.append(pile)
    for layer in zip(*piles, strict=True):
        yield from rng.sample(layer, len(layer))


def _row(recipe: Recipe, order: int, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    greeting, item = rng.choice(GREETINGS), rng.choice(ITEMS)
    wish = greeting + recipe.wish.format(item=item)
    sentences = [wish[0].upper() + wish[1:] + ".", recipe.number.format(order=order)]
    # Pressing comes last, or first: then without a greeting behind it.
    sentences.insert(0 if recipe.priority != "normal" and not greeting and rng.random() < 1 / 2 else 2, recipe.pressure)
    return {
        "dialog": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": " ".join(filter(None, sentences))},
            {"role": "assistant", "content": f"{recipe.intent} | order {order} | {recipe.priority}"},
        ]
    }


def main() -> None:
    """Writes train.jsonl, valid.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description="Write the demo's data set.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
