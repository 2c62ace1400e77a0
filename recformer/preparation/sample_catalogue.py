"""Words of the generated sample: departments, families, brands, styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGE_TITLES = (
    ("{noun} Starter Kit", "{noun} Starter Set"),
    ("{accessory} for {noun}", "{noun} {accessory}"),
    ("Replacement {part} for {noun}", "{noun} Replacement {part}"),
    ("Professional {noun} Upgrade", "{noun} Pro Upgrade"),
)

STAGE_CATEGORIES = ("Starter Kits", "Accessories", "Replacement Parts", "Professional")

STYLES = (
    ("Budget", "Value", "Basic"),
    ("Premium", "Deluxe", "Luxury"),
    ("Kids", "Junior", "Childrens"),
    ("Outdoor", "Rugged", "Heavy Duty"),
)

COLOURS = (
    ("Black", "Matte Black", "Jet Black"),
    ("Red", "Bright Red", "Cherry Red"),
    ("Green", "Forest Green", "Olive Green"),
    ("Blue", "Navy Blue", "Sky Blue"),
    ("Pink", "Hot Pink", "Rose Pink"),
    ("Orange", "Burnt Orange", "Neon Orange"),
)

SIZES = ("Small", "Medium", "Large", "X-Large", "2-Pack", "Set of 4", '10"', "", "", "", "", "")

MODEL_FRONT = (
    "Trail",
    "Aero",
    "Nova",
    "Terra",
    "Swift",
    "Hydra",
    "Peak",
    "Lumen",
    "Orbit",
    "Zephyr",
)

MODEL_BACK = ("hawk", "line", "flex", "core", "max", "wave", "craft", "guard", "stone", "jet")

# The first six stand in every category, the others in one.
COMMON_BRANDS = ("Northfell", "Brightmoor", "Oak & Vale", "Tindra", "Volmark", "Hallgate")


HARD, SOFT, LIGHT, WOOD = (
    ("Aluminum", "Steel", "Stainless", "Alloy", ""),
    ("Nylon", "Canvas", "Leather", "Mesh", ""),
    ("Silicone", "Plastic", "Rubber", "Carbon", ""),
    ("Maple", "Bamboo", "Walnut", "Cedar", ""),
)


@dataclass(frozen=True)
class Family:
    """A kind of product: the leaf of its category path and the nouns its titles are made of."""

    leaf: str
    noun: str
    accessory: str
    part: str
    materials: tuple[str, ...] = LIGHT


@dataclass(frozen=True)
class Department:
    """Words of a category; its families follow each other in this order."""

    path: tuple[str, ...]
    brands: tuple[str, ...]
    families: tuple[Family, ...]


DEPARTMENTS: Mapping[str, Department] = {
    "Camping": Department(
        ("Camping & Hiking",),
        ("Fernpeak", "Larkspur Ridge", "Moss & Mill", "Granholm", "Tarnside", "Wildmark"),
        (
            Family("Lights & Lanterns", "Camping Light", "Clip Mount", "Battery", HARD),
            Family("Bags", "Dry Bag", "Rain Cover", "Strap", SOFT),
            Family("Bottles", "Water Bottle", "Carry Holder", "Filter"),
            Family("Gloves", "Hiking Gloves", "Storage Case", "Liner", SOFT),
            Family("Tents", "Dome Tent", "Footprint Cover", "Peg", SOFT),
            Family("Sleeping Gear", "Sleeping Pad", "Carry Case", "Valve"),
            Family("Stoves", "Backpacking Stove", "Wind Cover", "Gasket", HARD),
            Family("Furniture", "Folding Chair", "Cup Holder", "Foot Pad", WOOD),
            Family("Navigation", "Compass", "Wrist Strap", "Lens", HARD),
            Family("Trekking Poles", "Trekking Poles", "Storage Stand", "Tip", HARD),
        ),
    ),
    "Kitchen": Department(
        ("Kitchen & Dining",),
        ("Hearthline", "Copperleaf", "Mira Table", "Dunmore", "Saltbox", "Pell & Rye"),
        (
            Family("Cabinet Lighting", "Cabinet Light", "Clip Mount", "Battery", HARD),
            Family("Lunch Bags", "Lunch Bag", "Rain Cover", "Strap", SOFT),
            Family("Bottles", "Water Bottle", "Carry Holder", "Filter"),
            Family("Oven Mitts", "Oven Gloves", "Storage Case", "Liner", SOFT),
            Family("Knives", "Chef Knife", "Edge Cover", "Blade", HARD),
            Family("Coffee", "Coffee Maker", "Pod Holder", "Carafe", HARD),
            Family("Bakeware", "Baking Pan", "Cooling Stand", "Lid", HARD),
            Family("Blenders", "Blender", "Travel Case", "Gasket"),
            Family("Spice Racks", "Spice Rack", "Wall Mount", "Jar", WOOD),
            Family("Scales", "Kitchen Scale", "Tilt Stand", "Foot Pad"),
        ),
    ),
    "Garden": Department(
        ("Patio & Garden",),
        ("Greenhollow", "Thistledown", "Bexley Garden", "Loam & Co", "Sorrel", "Petalworks"),
        (
            Family("Solar Lights", "Solar Light", "Clip Mount", "Battery", HARD),
            Family("Grow Bags", "Grow Bag", "Rain Cover", "Strap", SOFT),
            Family("Sprayers", "Spray Bottle", "Carry Holder", "Filter"),
            Family("Gloves", "Garden Gloves", "Storage Case", "Liner", SOFT),
            Family("Pruning", "Pruning Shears", "Belt Holder", "Blade", HARD),
            Family("Hoses", "Garden Hose", "Wall Mount", "Nozzle"),
            Family("Grills", "Charcoal Grill", "Weather Cover", "Grate", HARD),
            Family("Bird Feeders", "Bird Feeder", "Hanging Stand", "Perch", WOOD),
            Family("Mowers", "Push Mower", "Handle Strap", "Wheel", HARD),
            Family("Planters", "Planter Box", "Wooden Stand", "Tray", WOOD),
        ),
    ),
    "Music": Department(
        ("Musical Instruments",),
        ("Cadenza", "Ravello", "Bluewren Audio", "Fennimore", "Arco & Sons", "Stellan"),
        (
            Family("Stand Lights", "Stand Light", "Clip Mount", "Battery", HARD),
            Family("Gig Bags", "Gig Bag", "Rain Cover", "Strap", SOFT),
            Family("Cleaning", "Polish Bottle", "Carry Holder", "Filter"),
            Family("Gloves", "Drummer Gloves", "Storage Case", "Liner", SOFT),
            Family("Guitars", "Acoustic Guitar", "Wall Mount", "String Set", WOOD),
            Family("Microphones", "Condenser Microphone", "Boom Stand", "Windscreen", HARD),
            Family("Keyboards", "Digital Keyboard", "Dust Cover", "Key Cap"),
            Family("Ukuleles", "Ukulele", "Carry Case", "Bridge", WOOD),
            Family("Tuners", "Chromatic Tuner", "Clip Holder", "Sensor"),
            Family("Drums", "Snare Drum", "Tripod Stand", "Head", WOOD),
        ),
    ),
    "Cycling": Department(
        ("Cycling",),
        ("Velmar", "Spokesmith", "Rondel", "Cobble & Chain", "Pelotine", "Gradient Works"),
        (
            Family("Lights & Reflectors", "Bike Light", "Clip Mount", "Battery", HARD),
            Family("Bags & Panniers", "Frame Bag", "Rain Cover", "Strap", SOFT),
            Family("Bottles & Cages", "Water Bottle", "Carry Holder", "Filter"),
            Family("Gloves", "Cycling Gloves", "Storage Case", "Liner", SOFT),
            Family("Locks", "U Lock", "Frame Mount", "Key Set", HARD),
            Family("Pumps", "Floor Pump", "Hose Holder", "Valve", HARD),
            Family("Helmets", "Helmet", "Visor Cover", "Pad"),
            Family("Saddles", "Saddle", "Seat Cover", "Gel Insert", SOFT),
            Family("Computers", "Bike Computer", "Handlebar Mount", "Sensor"),
            Family("Repair", "Work Stand", "Tool Holder", "Clamp", HARD),
        ),
    ),
}

SURNAMES = ("Abbott", "Bright", "Castle", "Dale", "Ellery", "Finch", "Gale", "Hart", "Ives", "Lowe")

OPINIONS = (
    ("Five Stars", "Just what I was looking for.", 5.0),
    ("Works well", "Does the job, would buy again.", 5.0),
    ("Good value", "Nice for the price &amp; quick delivery.", 4.0),
    ("It is okay", "Smaller than I thought, but fine.", 3.0),
    ("Broke", "Fell apart after a month.", 1.0),
)
