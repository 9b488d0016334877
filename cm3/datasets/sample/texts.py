"""Titles and descriptions of the sample dataset, without the attributes that only images show."""

import numpy as np

BRANDS = (
    "Halden",
    "Mirelle",
    "Oddfellow",
    "Quillon",
    "Tarn & Co",
    "Brightwick",
    "Nordby",
    "Casa Lume",
    "Pemberly",
    "Vantor",
    "Hearthside",
    "Ellery",
    "Kestrel",
    "Juno House",
    "Marlowe",
    "Fenwick",
    "Solvei",
    "Three Rivers",
)

_TITLES = (
    "{brand} {Material} {Kind} for the {Use}",
    "{Use} {Kind} of {Material} by {brand}",
    "{brand} {Kind}, {Material}, Made by Hand",
    "{Material} {Use} {Kind}",
    "{brand} Original {Kind} in {Material}",
)
_OPENINGS = (
    "This {kind} is made of {material} and finished by hand in small batches.",
    "A {kind} in {material}, built to last and pleasant to hold.",
    "Our {kind} comes from a family workshop that has worked with {material} for three generations.",
    "Simple, solid and well made: a {kind} of carefully selected {material}.",
)
_KINDS = {
    "cushion": "The cover zips off, and the filling keeps its shape after years of sitting.",
    "night light": "It glows softly until morning and runs for forty hours on one set of batteries.",
    "wall clock": "The movement is silent, without any ticking, and the hands are easy to read across the room.",
    "keyring": "The ring holds up to eight keys and closes with a click.",
    "serving tray": "The raised rim keeps cups and plates from sliding while you carry them.",
    "coaster": "It keeps hot mugs and cold glasses from leaving rings on the table.",
    "candle holder": "It fits tea lights as well as standard tapers, and wax lifts off easily.",
    "money box": "Coins go in at the top and come out through a plug in the base.",
    "brooch": "The pin has a safety catch and sits flat on coats, scarves and bags.",
    "mirror": "The reflection is free of distortion, and the fittings for hanging are included.",
    "fridge magnet": "The magnet is strong enough for five sheets of paper and does not scratch the door.",
    "rug": "The underside grips the floor, and the edges stay flat from the first day.",
}
_MATERIALS = {
    "wool": "Pure wool breathes, keeps warm and shrugs off stains; wash it cold.",
    "ceramic": "The ceramic is fired twice and glazed, so it can go through the dishwasher.",
    "oak": "The oak is seasoned and oiled; its grain makes each piece different.",
    "steel": "Stainless steel will not rust, dent or hold on to smells.",
    "glass": "The glass is blown by mouth and tempered against knocks.",
    "leather": "The leather is vegetable tanned and grows more beautiful with wear.",
    "cork": "Cork is light, warm to the touch and harvested without felling the tree.",
    "bamboo": "Bamboo grows back within five years and is harder than most timber.",
}
_USES = {
    "nursery": (
        "Parents choose it for the nursery: no sharp edges, safe for babies and toddlers.",
        "Made with newborns in mind, it is at home beside the cot.",
    ),
    "kitchen": (
        "Cooks like it in the kitchen, close to the stove and the chopping board.",
        "It belongs in a busy kitchen where people cook every day.",
    ),
    "office": (
        "It looks right on a desk in the office, next to the keyboard and the paperwork.",
        "A favourite for the study and for colleagues at work.",
    ),
    "camping": (
        "Take it camping: it packs small and stands rain, mud and the tent floor.",
        "For campers and hikers who sleep under the stars and cook on an open fire.",
    ),
    "bathroom": (
        "Steam and splashes do no harm in the bathroom, beside the basin or the tub.",
        "It brings order to the bathroom shelf, among towels and soap.",
    ),
    "garden": (
        "It likes the garden, between flower beds, herbs and the potting shed.",
        "Gardeners keep it on the patio through summer and frost.",
    ),
    "travel": (
        "Frequent flyers slip it into hand luggage; airports and hotels are its world.",
        "A companion for travel, from the train seat to the hotel room.",
    ),
    "party": (
        "Bring it out for a party, a birthday or a wedding with many guests.",
        "It gets guests talking at celebrations and dinners with friends.",
    ),
    "workshop": (
        "It stands up to the workshop, among drills, sawdust and oily hands.",
        "Made for the garage and the workbench, for people who repair things themselves.",
    ),
    "bedroom": (
        "It calms the bedroom and helps you fall asleep on the bedside table.",
        "For slow mornings and quiet nights in the bedroom.",
    ),
}
_CLOSINGS = (
    "Free returns within thirty days.",
    "Ships in recycled packaging &amp; arrives ready to use.",
    "<b>Two years&#39; warranty.</b>",
    "Makes a thoughtful gift.",
    "",
    "",
)


def title(rng: np.random.Generator, brand: str, kind: str, material: str, use: str) -> str:
    """Return a title with kind and material, mostly the brand, and often the use."""
    return _pick(rng, _TITLES).format(brand=brand, Kind=kind.title(), Material=material.title(), Use=use.title())


def description(rng: np.random.Generator, kind: str, material: str, use: str) -> str:
    """Return a description of 15 to 70 words with kind, material and use, sometimes with HTML entities or tags."""
    sentences = [_pick(rng, _OPENINGS).format(kind=kind, material=material)]
    details = [_KINDS[kind], _MATERIALS[material], _pick(rng, _USES[use])]
    keep = [rng.random() < 0.7, rng.random() < 0.7, True]
    sentences += [details[n] for n in rng.permutation(3) if keep[n]]
    sentences.append(_pick(rng, _CLOSINGS))
    return " ".join(sentence for sentence in sentences if sentence)


def categories(kind: str, use: str) -> list[list[str]]:
    """Return the category paths of an item: by kind and by use."""
    section = {"brooch": "Accessories", "keyring": "Accessories", "money box": "Gifts"}.get(kind, "Home Decor")
    return [[section, kind.title()], ["Shop by Use", use.title()]]


def review(rng: np.random.Generator, rating: int) -> tuple[str, str]:
    """Return summary and text of a review with a rating from 1 to 5."""
    summaries = {
        1: ("Broke within a week", "Sent it back"),
        2: ("Not what I hoped for", "Disappointing"),
        3: ("It is all right", "Does the job"),
        4: ("Very nice", "Good value"),
        5: ("Love it", "Exactly what I wanted"),
    }
    texts = ("Would tell a friend.", "Came on time and well packed.", "Bought it as a present.", "As described.")
    return _pick(rng, summaries[rating]), _pick(rng, texts)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
