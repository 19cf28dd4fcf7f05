"""LIBERO's four evaluation suites: names of the tasks in LIBERO's order (its task order 0), instructions, horizons.

A table of names, so that suites and tasks can be checked where LIBERO is not installed; a test compares it with
LIBERO's own where it is.
"""

from __future__ import annotations

import re

from vlarft.sim.env import Suite, Task


def _instruction(name: str) -> str:
    """Return what the robot is told: the name without its scene, as LIBERO reads it."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _suite(horizon: int, names: str) -> Suite:
    """Make a suite: names as in LIBERO's files; horizon, after the wait steps, as in the public evaluation scripts."""
    return Suite(horizon, tuple(Task(name, _instruction(name)) for name in names.split()))


def _bowls(*places: str) -> str:
    return " ".join(f"pick_up_the_black_bowl_{place}_and_place_it_on_the_plate" for place in places)


def _groceries(*things: str) -> str:
    return " ".join(f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in things)


LIBERO_SUITES: dict[str, Suite] = {
    "libero_spatial": _suite(
        220,
        _bowls(
            "between_the_plate_and_the_ramekin",
            "next_to_the_ramekin",
            "from_table_center",
            "on_the_cookie_box",
            "in_the_top_drawer_of_the_wooden_cabinet",
            "on_the_ramekin",
            "next_to_the_cookie_box",
            "on_the_stove",
            "next_to_the_plate",
            "on_the_wooden_cabinet",
        ),
    ),
    "libero_object": _suite(
        280,
        _groceries(
            "alphabet_soup",
            "cream_cheese",
            "salad_dressing",
            "bbq_sauce",
            "ketchup",
            "tomato_sauce",
            "butter",
            "milk",
            "chocolate_pudding",
            "orange_juice",
        ),
    ),
    "libero_goal": _suite(
        300,
        """
        open_the_middle_drawer_of_the_cabinet
        put_the_bowl_on_the_stove
        put_the_wine_bottle_on_top_of_the_cabinet
        open_the_top_drawer_and_put_the_bowl_inside
        put_the_bowl_on_top_of_the_cabinet
        push_the_plate_to_the_front_of_the_stove
        put_the_cream_cheese_in_the_bowl
        turn_on_the_stove
        put_the_bowl_on_the_plate
        put_the_wine_bottle_on_the_rack
        """,
    ),
    "libero_10": _suite(
        520,
        """
        LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket
        LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket
        KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it
        KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it
        LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate
        STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy
        LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate
        LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket
        KITCHEN_SCENE8_put_both_moka_pots_on_the_stove
        KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it
        """,
    ),
}
